"""Triton kernels of the cross convolution. Importing this module imports Triton.

Both kernels work on contiguous (N, C, H, W) tensors and multiply matrices (``tl.dot``), with
tensor cores where the GPU has them and with sums in float32.
"""
# Kernels are written in Triton's language; annotations other than constexpr mean nothing there.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """Matrix product, in float32 if PRECISION is 'float32'."""
    # Triton's interpreter multiplies the bits of bfloat16 numbers.
    if PRECISION == 'float32':
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision='ieee')
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _add_wide(
    acc,
    plane,
    taps,
    h,
    w_first,
    H,
    W,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the convolution of a tile with one kernel, along the rows.

    ``acc[h, w] += sum over i and u of plane[h + i - KH // 2, u] * taps[i, u - w + KW // 2]``: for
    each kernel row a product with a banded matrix, whose entries are read from the taps.
    """
    w = w_first + tl.arange(0, BLOCK_W)
    first = tl.maximum(w_first - KW // 2, 0)
    last = tl.minimum(w_first + BLOCK_W + KW // 2, W)
    for i in range(KH):
        rows = h + (i - KH // 2)
        inside = (rows >= 0) & (rows < H)
        for begin in range(first, last, BLOCK_K):
            u = begin + tl.arange(0, BLOCK_K)
            seen = tl.load(
                plane + rows[:, None] * W + u[None, :], mask=inside[:, None] & (u < last)[None, :], other=0.0
            )
            tap = u[:, None] - w[None, :] + KW // 2
            band = tl.load(taps + i * KW + tap, mask=(tap >= 0) & (tap < KW), other=0.0)
            acc = _dot(seen, band, acc, PRECISION)
    return acc


@triton.jit
def _add_tall(
    acc,
    plane,
    taps,
    h_first,
    w,
    H,
    W,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the convolution of a tile with one kernel, along the columns."""
    h = h_first + tl.arange(0, BLOCK_H)
    first = tl.maximum(h_first - KH // 2, 0)
    last = tl.minimum(h_first + BLOCK_H + KH // 2, H)
    for j in range(KW):
        columns = w + (j - KW // 2)
        inside = (columns >= 0) & (columns < W)
        for begin in range(first, last, BLOCK_K):
            u = begin + tl.arange(0, BLOCK_K)
            seen = tl.load(
                plane + u[:, None] * W + columns[None, :], mask=(u < last)[:, None] & inside[None, :], other=0.0
            )
            tap = u[None, :] - h[:, None] + KH // 2
            band = tl.load(taps + tap * KW + j, mask=(tap >= 0) & (tap < KH), other=0.0)
            acc = _dot(band, seen, acc, PRECISION)
    return acc


@triton.jit
def _add(
    acc,
    x,
    kernel,
    c,
    plane,
    h_first,
    w_first,
    H,
    W,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one branch to the tile at (h_first, w_first)."""
    taps = kernel + c * (KH * KW)
    if KH > KW:
        acc = _add_tall(
            acc, x + plane, taps, h_first, w_first + tl.arange(0, BLOCK_W), H, W, KH, KW, BLOCK_H, BLOCK_K, PRECISION
        )
    else:
        acc = _add_wide(
            acc, x + plane, taps, h_first + tl.arange(0, BLOCK_H), w_first, H, W, KH, KW, BLOCK_W, BLOCK_K, PRECISION
        )
    return acc


@triton.jit
def convolve_kernel(
    x0,
    x1,
    x2,
    k0,
    k1,
    k2,
    bias,
    y0,
    y1,
    y2,
    C,
    H,
    W,
    KH0: tl.constexpr,
    KW0: tl.constexpr,
    KH1: tl.constexpr,
    KW1: tl.constexpr,
    KH2: tl.constexpr,
    KW2: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Convolve up to three inputs, each with its kernel; one program for a tile of a plane.

    A kernel of height 0 does not exist. With REDUCE the sum and the bias go to ``y0``.
    """
    columns = tl.cdiv(W, BLOCK_W)
    tiles = columns * tl.cdiv(H, BLOCK_H)
    number = tl.program_id(0)
    c = (number // tiles) % C
    plane = (number // tiles).to(tl.int64) * H * W
    h_first = (number % tiles) // columns * BLOCK_H
    w_first = (number % tiles) % columns * BLOCK_W
    h = h_first + tl.arange(0, BLOCK_H)
    w = w_first + tl.arange(0, BLOCK_W)
    place = plane + h[:, None] * W + w[None, :]
    inside = (h < H)[:, None] & (w < W)[None, :]

    acc = tl.zeros((BLOCK_H, BLOCK_W), dtype=tl.float32)
    acc = _add(acc, x0, k0, c, plane, h_first, w_first, H, W, KH0, KW0, BLOCK_H, BLOCK_W, BLOCK_K, PRECISION)
    if KH1 > 0:
        if not REDUCE:
            tl.store(y0 + place, acc.to(y0.dtype.element_ty), mask=inside)
            acc = tl.zeros((BLOCK_H, BLOCK_W), dtype=tl.float32)
        acc = _add(acc, x1, k1, c, plane, h_first, w_first, H, W, KH1, KW1, BLOCK_H, BLOCK_W, BLOCK_K, PRECISION)
    if KH2 > 0:
        if not REDUCE:
            tl.store(y1 + place, acc.to(y0.dtype.element_ty), mask=inside)
            acc = tl.zeros((BLOCK_H, BLOCK_W), dtype=tl.float32)
        acc = _add(acc, x2, k2, c, plane, h_first, w_first, H, W, KH2, KW2, BLOCK_H, BLOCK_W, BLOCK_K, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + c).to(tl.float32)
    result = acc.to(y0.dtype.element_ty)
    if REDUCE or KH1 == 0:
        tl.store(y0 + place, result, mask=inside)
    elif KH2 == 0:
        tl.store(y1 + place, result, mask=inside)
    else:
        tl.store(y2 + place, result, mask=inside)


@triton.jit
def gradient_kernel(
    x,
    grad,
    partial,
    N,
    C,
    R,
    L,
    stride_r,
    stride_l,
    items_per_program,
    TAPS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALONG_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Part of the gradient of a kernel of TAPS x LENGTH on planes of R x L pixels.

    ``partial[s, c, i, m]`` is the sum over some pixels (r, l) of the images of
    ``grad[r - i + TAPS // 2, l] * x[r, l + m - LENGTH // 2]``: the product of a matrix of shifted
    gradients (taps x pixels) and one of shifted inputs (pixels x length). A step takes BLOCK_K
    pixels, along r if ALONG_R, else along l, whichever is contiguous in memory; program s takes
    ``items_per_program`` steps. Nothing is added atomically, so that the bits do not depend on
    the order of the programs.
    """
    c = tl.program_id(0)
    s = tl.program_id(1)
    i = tl.arange(0, BLOCK_I)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    if ALONG_R:
        blocks = tl.cdiv(R, BLOCK_K)
        lines = L
    else:
        blocks = tl.cdiv(L, BLOCK_K)
        lines = R
    acc = tl.zeros((BLOCK_I, BLOCK_M), dtype=tl.float32)
    end = tl.minimum((s + 1) * items_per_program, N * lines * blocks)
    for item in range(s * items_per_program, end):
        image = item // (lines * blocks)
        line = item // blocks % lines
        first = item % blocks * BLOCK_K
        if ALONG_R:
            r = first + k
            l = line + tl.zeros_like(k)  # noqa: E741
        else:
            r = line + tl.zeros_like(k)
            l = first + k  # noqa: E741
        plane = (image * C + c).to(tl.int64) * R * L
        inside = (r < R) & (l < L)
        rows = r[None, :] - i[:, None] + TAPS // 2
        given = tl.load(
            grad + plane + rows * stride_r + l[None, :] * stride_l,
            mask=inside[None, :] & (rows >= 0) & (rows < R) & (i < TAPS)[:, None],
            other=0.0,
        )
        places = l[:, None] + m[None, :] - LENGTH // 2
        seen = tl.load(
            x + plane + r[:, None] * stride_r + places * stride_l,
            mask=inside[:, None] & (places >= 0) & (places < L) & (m < LENGTH)[None, :],
            other=0.0,
        )
        acc = _dot(given, seen, acc, PRECISION)
    tl.store(
        partial + ((s * C + c) * TAPS + i[:, None]) * LENGTH + m[None, :],
        acc,
        mask=(i < TAPS)[:, None] & (m < LENGTH)[None, :],
    )
