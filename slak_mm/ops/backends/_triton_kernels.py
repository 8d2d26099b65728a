"""Triton kernels of :mod:`slak_mm.ops.backends.triton`.

A map is a set of planes, one for each image and channel, whose rows are contiguous and padded to a multiple of 8
entries with zeros, so that loads are 16 bytes wide for half precision. The rows of all images lie below each other: a
program takes ``R`` of them at a time. One row of a kernel of ``KW`` taps is a banded matrix of ``U`` inputs by
``T`` outputs; a branch is the sum of the products of row-shifted blocks with the bands of its ``KH`` rows.
"""
# Kernels are written in Triton's language; annotations other than constexpr mean nothing there.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """Add a matrix product; Triton's interpreter multiplies half precision as float32."""
    if PRECISION == 'float32':
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision='ieee')
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _band(k, k_tap, u, t, KW, OFF: tl.constexpr):
    """Toeplitz matrix (U, T) of the row of a kernel that begins at ``k``, with ``k_tap`` entries from tap to tap."""
    tap = u[:, None] - t[None, :] + (KW // 2 - OFF)
    return tl.load(k + tap * k_tap, mask=(tap >= 0) & (tap < KW), other=0.0)


@triton.jit
def _shifted(x, plane, h, ok, shift, u, uok, H, stride):
    """Block (R, U) of the rows ``h + shift``; zeros outside of the image."""
    row = h + shift
    mask = (ok & (row >= 0) & (row < H))[:, None] & uok[None, :]
    return tl.load(x + (plane + row * stride)[:, None] + u[None, :], mask=mask, other=0.0)


# Sizes are not specialized: each kind would be compiled again for every network and image.
_SIZES = ['N', 'C', 'H', 'W', 'x_eighths', 'y_eighths', 'steps', 'KW', 'k_first', 'k_channel', 'k_row', 'k_tap']


@triton.jit(do_not_specialize=_SIZES)
def convolve_rows(
    x,
    k,
    bias,
    addend,
    y,
    N,
    C,
    H,
    W,
    x_eighths,
    y_eighths,
    steps,
    KW,
    k_first,
    k_channel,
    k_row,
    k_tap,
    KH: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    U: tl.constexpr,
    OFF: tl.constexpr,
    KEEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y = x * k`` along the rows, plus a bias (C,) and a float32 addend of the layout of ``y``.

    Planes of ``x`` are H by ``8 * x_eighths``; of ``y`` likewise, or with ``TRANSPOSED`` W by ``8 * y_eighths``,
    columns and rows exchanged. ``KEEP`` (at most five kernel rows) holds all bands for the whole program. Tap m of row
    i of the kernel of channel c is ``k[k_first + c * k_channel + i * k_row + m * k_tap]``.
    """
    c = tl.program_id(0)
    k += k_first + c * k_channel
    w0 = tl.program_id(1) * T
    split = tl.program_id(2)
    t = tl.arange(0, T)
    ul = tl.arange(0, U)
    u = w0 - OFF + ul
    w = w0 + t
    stride = x_eighths * 8
    uok = (u >= 0) & (u < stride)
    y_stride = y_eighths * 8
    start = tl.load(bias + c).to(tl.float32) if HAS_BIAS else 0.0
    if KEEP:
        band0 = _band(k, k_tap, ul, t, KW, OFF)
        if KH > 1:
            band1 = _band(k + k_row, k_tap, ul, t, KW, OFF)
            band2 = _band(k + 2 * k_row, k_tap, ul, t, KW, OFF)
        if KH > 3:
            band3 = _band(k + 3 * k_row, k_tap, ul, t, KW, OFF)
            band4 = _band(k + 4 * k_row, k_tap, ul, t, KW, OFF)
    for step in tl.range(0, steps, num_stages=1):
        r = (split * steps + step) * R + tl.arange(0, R)
        ok = r < N * H
        n = r // H
        h = r % H
        plane = (n.to(tl.int64) * C + c) * H * stride
        acc = tl.zeros((R, T), tl.float32) + start
        if KEEP:
            acc = _dot(_shifted(x, plane, h, ok, -(KH // 2), u, uok, H, stride), band0, acc, PRECISION)
            if KH > 1:
                acc = _dot(_shifted(x, plane, h, ok, 1 - KH // 2, u, uok, H, stride), band1, acc, PRECISION)
                acc = _dot(_shifted(x, plane, h, ok, 2 - KH // 2, u, uok, H, stride), band2, acc, PRECISION)
            if KH > 3:
                acc = _dot(_shifted(x, plane, h, ok, 3 - KH // 2, u, uok, H, stride), band3, acc, PRECISION)
                acc = _dot(_shifted(x, plane, h, ok, 4 - KH // 2, u, uok, H, stride), band4, acc, PRECISION)
        else:
            for i in range(KH):
                band = _band(k + i * k_row, k_tap, ul, t, KW, OFF)
                acc = _dot(_shifted(x, plane, h, ok, i - KH // 2, u, uok, H, stride), band, acc, PRECISION)
        # Not (w < W) for rows: what lands in their padding is not read, and whole vectors can be stored.
        mask = ok[:, None] & (w < (W if TRANSPOSED else y_stride))[None, :]
        if TRANSPOSED:
            to = ((n.to(tl.int64) * C + c) * W * y_stride + h)[:, None] + (w * y_stride)[None, :]
        else:
            to = ((n.to(tl.int64) * C + c) * H * y_stride + h * y_stride)[:, None] + w[None, :]
        if HAS_ADDEND:
            acc += tl.load(addend + to, mask=mask, other=0.0)
        tl.store(y + to, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['N', 'C', 'H', 'W', 'eighths', 'steps', 'KW'])
def kernel_gradient_rows(
    x,
    g,
    out,
    N,
    C,
    H,
    W,
    eighths,
    steps,
    KW,
    KH: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    U: tl.constexpr,
    OFF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum ``g[r, w0 + t] * x[r + i - KH // 2, w0 + t + m - KW // 2]`` over rows into ``out[split, tile, c, i, m, t]``.

    The gradient of tap (i, m) is the sum over split, tile and t. Entries whose input lies outside of the map are
    not written.
    """
    c = tl.program_id(0) // KH
    i = tl.program_id(0) % KH
    tile = tl.program_id(1)
    split = tl.program_id(2)
    t = tl.arange(0, T)
    u = tile * T - OFF + tl.arange(0, U)
    w = tile * T + t
    stride = eighths * 8
    uok = (u >= 0) & (u < stride)
    acc = tl.zeros((U, T), tl.float32)
    for step in tl.range(0, steps, num_stages=2):
        r = (split * steps + step) * R + tl.arange(0, R)
        ok = r < N * H
        h = r % H
        plane = ((r // H).to(tl.int64) * C + c) * H * stride
        a = _shifted(x, plane, h, ok, i - KH // 2, u, uok, H, stride)
        b = tl.load(g + (plane + h * stride)[:, None] + w[None, :], mask=ok[:, None] & (w < stride)[None, :], other=0.0)
        acc = _dot(tl.trans(a), b, acc, PRECISION)
    m = u[:, None] - w[None, :] + KW // 2
    base = (((split * tl.num_programs(1) + tile).to(tl.int64) * C + c) * KH + i) * KW * T
    tl.store(out + base + m * T + t[None, :], acc, mask=(m >= 0) & (m < KW))


@triton.jit(do_not_specialize=['A', 'B', 'A_PADDED', 'others'])
def transpose(
    source, to, A, B, A_PADDED, others, source_n, source_other, source_a, to_n, to_other, to_b, SIDE: tl.constexpr
):
    """``to[n, other, b, a] = source[n, other, a, b]``: b is contiguous in the source, a in the result.

    Entries from A up to A_PADDED become zero.
    """
    tiles_a = tl.cdiv(A_PADDED, SIDE)
    tiles_b = tl.cdiv(B, SIDE)
    tile = tl.program_id(0) % (tiles_a * tiles_b)
    batch = tl.program_id(0) // (tiles_a * tiles_b)
    n = (batch // others).to(tl.int64)
    other = batch % others
    a = tile // tiles_b * SIDE + tl.arange(0, SIDE)
    b = tile % tiles_b * SIDE + tl.arange(0, SIDE)
    read = source + n * source_n + other * source_other + a[:, None] * source_a + b[None, :]
    block = tl.load(read, mask=(a < A)[:, None] & (b < B)[None, :], other=0.0)
    write = to + n * to_n + other * to_other + b[:, None] * to_b + a[None, :]
    tl.store(write, tl.trans(block), mask=(b < B)[:, None] & (a < A_PADDED)[None, :])
