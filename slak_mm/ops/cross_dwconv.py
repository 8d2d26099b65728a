"""The cross-shaped depthwise convolution under every large-kernel block.

Liu et al. ("More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity", ICLR 2023, section 4) replace
an M x M kernel by two parallel rectangular ones, M x N and N x M, beside a small N x N one.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _operator
from ._context import autocast_dtype, is_autocast_enabled

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overload
def cross_dwconv2d(
    x: Tensor,
    k_v: Tensor,
    k_h: Tensor | None = ...,
    k_s: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    reduce: Literal[True],
    center: int | None = ...,
) -> Tensor: ...


@overload
def cross_dwconv2d(
    x: Tensor,
    k_v: Tensor,
    k_h: Tensor | None = ...,
    k_s: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    reduce: Literal[False] = ...,
    center: int | None = ...,
) -> tuple[Tensor, Tensor | None, Tensor | None]: ...


def cross_dwconv2d(
    x: Tensor,
    k_v: Tensor,
    k_h: Tensor | None = None,
    k_s: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    reduce: bool = False,
    center: int | None = None,
) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:
    """Convolve depthwise with a tall, a wide and a small kernel, stride 1, zero padding.

    As in all deep-learning frameworks the kernels are correlated with the input, not flipped.
    The results have the spatial size of the input; maps smaller than the kernel are allowed.

    Each result is summed up in float32 at least and rounded once. Under autocast all operands are brought to its dtype
    first, as by ``F.conv2d``. A NaN or an infinity in ``x`` reaches each result that it enters with a weight other than
    zero. Whether it also reaches results around it, with weights of zero, depends on the backend: as by ``F.conv2d``
    with ``reference``, not from a rim of the kernel that is zero in all channels with ``cpu_native``, and along a whole
    line of the map with ``gemm`` and ``triton``, whose matrices are filled up with zeros.

    Gradients of any order are supported. Forward-mode AD and the transforms of ``torch.func`` other
    than ``grad``, such as ``vmap`` and ``jvp``, run on ``reference`` whatever was chosen.

    Args:
        x: Input of shape (N, C, H, W).
        k_v: Tall kernel of shape (C, M, n); a square kernel (M = n) may stand alone.
        k_h: Wide kernel of shape (C, n, M).
        k_s: Small kernel of shape (C, s, s), s odd.
        bias: Shape (C,), added to the sum. Only with ``reduce=True``.
        reduce: Return the sum of the branches instead of each of them.
        center: Tap of the long axis (rows of ``k_v``, columns of ``k_h``) that meets the output pixel, 0 to M - 1.
            Default: ``M // 2``, for which M must be odd. The short axis is always centered and odd.

    Returns:
        The sum, shape (N, C, H, W), if ``reduce``; else the tuple (y_v, y_h, y_s) of such
        tensors, with None for a kernel that was not given.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, a dtype is not floating-point, a kernel
            size is even, ``center`` is outside the kernel, ``bias`` was given without ``reduce``,
            or ``SLAK_MM_BACKEND`` names an unknown backend.
        RuntimeError: A backend was forced that cannot run on these tensors.
    """
    given = {'x': x, 'k_v': k_v, 'k_h': k_h, 'k_s': k_s, 'bias': bias}
    operands = {name: t for name, t in given.items() if t is not None}
    _check_tensors(operands)
    _check_shapes(operands, reduce, center)
    device = x.device.type
    if is_autocast_enabled(device) and x.dtype is not torch.float64:
        # As F.conv2d would: all operands in the dtype of autocast.
        dtype = autocast_dtype(device)
        operands = {name: t.to(dtype) for name, t in operands.items()}
        with torch.autocast(device, enabled=False):
            return _convolve(operands, reduce, center)
    return _convolve(operands, reduce, center)


def _convolve(
    operands: dict[str, Tensor], reduce: bool, center: int | None
) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:
    k_v, k_h, k_s = _centered(operands['k_v'], 1, center), operands.get('k_h'), operands.get('k_s')
    if k_h is not None:
        k_h = _centered(k_h, 2, center)
    if reduce:
        k_v, k_h, k_s = _merge_small(k_v, k_h, k_s)
    kernels = [k for k in (k_v, k_h, k_s) if k is not None]
    results = iter(_operator.apply(operands['x'], kernels, operands.get('bias'), reduce))
    if reduce:
        return next(results)
    return (next(results), None if k_h is None else next(results), None if k_s is None else next(results))


def _check_tensors(operands: dict[str, Tensor]) -> None:
    x = operands['x']
    # Autocast converts what is not float64.
    is_converted = is_autocast_enabled(x.device.type) and x.dtype is not torch.float64
    is_fit, device = x.dtype in _DTYPES, x.device
    for name, t in operands.items():
        if is_fit and t.dtype is x.dtype and t.device == device and t.layout is torch.strided:
            continue
        if t.dtype not in _DTYPES:
            raise ValueError(f'{name} must have dtype float16, bfloat16, float32 or float64, got {t.dtype}')
        if t.layout is not torch.strided:
            raise ValueError(f'{name} must be a dense tensor, got layout {t.layout}')
        if t.device != x.device:
            raise ValueError(f'{name} is on {t.device}, but x is on {x.device}')
        if t.dtype != x.dtype and (t.dtype is torch.float64 or not is_converted):
            raise ValueError(f'{name} has dtype {t.dtype}, but x has {x.dtype}')


def _check_shapes(operands: dict[str, Tensor], reduce: bool, center: int | None) -> None:
    x, k_v, k_h, k_s = operands['x'], operands['k_v'], operands.get('k_h'), operands.get('k_s')
    bias = operands.get('bias')
    if x.dim() != 4:
        raise ValueError(f'x must have shape (N, C, H, W), got {tuple(x.shape)}')
    channels = x.shape[1]
    for name, kernel in (('k_v', k_v), ('k_h', k_h), ('k_s', k_s)):
        if kernel is not None and (kernel.dim() != 3 or kernel.shape[0] != channels):
            raise ValueError(
                f'{name} must have shape ({channels}, height, width) for an input of {channels} '
                f'channels, got {tuple(kernel.shape)}'
            )
    long, short = k_v.shape[1:]
    if long < short or short % 2 == 0:
        raise ValueError(f'k_v must be tall or square with an odd width, got a {long} x {short} kernel')
    if k_h is not None and tuple(k_h.shape[1:]) != (short, long):
        raise ValueError(
            f'k_h must be the transposed shape of k_v, {short} x {long}, got {k_h.shape[1]} x {k_h.shape[2]}'
        )
    if k_s is not None and (k_s.shape[1] != k_s.shape[2] or k_s.shape[1] % 2 == 0):
        raise ValueError(f'k_s must be square and odd, got {k_s.shape[1]} x {k_s.shape[2]}')
    if center is None and long % 2 == 0:
        raise ValueError(f'a kernel of even length {long} has no middle tap: give center, 0 to {long - 1}')
    if center is not None and not 0 <= center < long:
        raise ValueError(f'center must lie within the kernel, 0 to {long - 1}, got {center}')
    if bias is not None:
        if not reduce:
            raise ValueError('bias is added to the sum of the branches: it needs reduce=True')
        if tuple(bias.shape) != (channels,):
            raise ValueError(f'bias must have shape ({channels},), got {tuple(bias.shape)}')


def _centered(kernel: Tensor, dim: int, center: int | None) -> Tensor:
    """Pad an off-center kernel with zero taps, so that its middle tap meets the output pixel."""
    length = kernel.shape[dim]
    if center is None:
        return kernel
    behind = length - 1 - center
    reach = max(center, behind)
    pad = (reach - center, reach - behind)
    return F.pad(kernel, pad if dim == 2 else (0, 0, *pad)) if any(pad) else kernel


def _merge_small(k_v: Tensor, k_h: Tensor | None, k_s: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Add the small kernel to the center of a larger one that covers it.

    Not in half precision, where the sum of two taps would be rounded.
    """
    if k_s is None or k_s.dtype.itemsize < 4:
        return k_v, k_h, k_s
    host = k_v if k_h is None else k_h
    rows, columns = host.shape[1] - k_s.shape[1], host.shape[2] - k_s.shape[2]
    if rows < 0 or columns < 0:
        return k_v, k_h, k_s
    merged = host + F.pad(k_s, (columns // 2, columns // 2, rows // 2, rows // 2))
    return (merged, None, None) if k_h is None else (k_v, merged, None)
