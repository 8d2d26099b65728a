"""Triton kernels of :mod:`slak_mm.ops.backends.triton`.

A map is a set of planes, one for each image and channel, whose rows are contiguous and padded to a multiple of 8
entries with zeros, so that loads are 16 bytes wide for half precision. Those of a tall kernel are transposed: columns
of the map lie in their rows. The rows of all images lie below each other: a program takes ``R`` of them at a time. One
row of a kernel of ``KW`` taps is a banded matrix of ``U`` inputs by ``T`` outputs; a branch is the sum of the products
of row-shifted blocks with the bands of its ``KH`` rows.

All branches run in one launch. Those whose kernel is tall come first; what belongs to branch i has the number i in its
name, and is chosen at run time. ``channels`` of a map are those of the larger one that it may be a slice of.
"""
# Kernels are written in Triton's language; annotations other than constexpr mean nothing there.
# mypy: ignore-errors

import functools
import inspect

import triton
import triton.language as tl


@triton.jit
def _eights(n):
    """Round up to a multiple of 8."""
    return tl.cdiv(n, 8) * 8


@triton.jit
def _pick(i, a, b, c):
    """One of three numbers or pointers, known at run time."""
    return tl.where(i == 0, a, tl.where(i == 1, b, c))


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """Add a matrix product; Triton's interpreter multiplies half precision as float32."""
    if PRECISION == 'float32':
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision='ieee')
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _band(taps, u, t, U: tl.constexpr, L: tl.constexpr):
    """Toeplitz matrix (U, T) of a kernel row from its table of :func:`lay_out_taps`, in vectors of 8 entries."""
    e = (t // 8 * 8)[None, :] - u[:, None] + U
    return tl.load(taps + e % 8 * L + e // 8 * 8 + (t % 8)[None, :])


@triton.jit
def _shifted(x, plane, h, ok, shift, u, uok, H, stride):
    """Block (R, U) of the rows ``h + shift``; zeros outside of the image."""
    row = h + shift
    mask = (ok & (row >= 0) & (row < H))[:, None] & uok[None, :]
    return tl.load(x + (plane + row * stride)[:, None] + u[None, :], mask=mask, other=0.0)


@triton.jit
def _store(y, acc, r, c, at, N, C, H, W, TALL: tl.constexpr):
    """Store a block (R, T) of channel c into a map: rows r of all images from column ``at`` on, or the transpose."""
    if TALL:
        n = (r // W)[None, :]
        row = at[:, None]
        column = (r % W)[None, :]
        acc = tl.trans(acc)
    else:
        n = (r // H)[:, None]
        row = (r % H)[:, None]
        column = at[None, :]
    to = (n.to(tl.int64) * C + c) * H * W + (row * W + column)
    tl.store(y + to, acc.to(y.dtype.element_ty), mask=(n < N) & (row < H) & (column < W))


@triton.jit(do_not_specialize=['C', 'KH', 'KW0', 'KW1', 'KW2', 'talls', 'flipped', 'eighths', 'last'])
def lay_out_taps(k0, k1, k2, table, C, KH, KW0, KW1, KW2, talls, flipped, eighths, last, B: tl.constexpr):
    """Tables (branches, C, KH, 8, L) of kernel rows, flipped or not, L being ``8 * eighths``.

    Entry (s, j) is the tap ``last + KW // 2 - (j + s)`` of the row, or zero where there is none: eight entries of a row
    of the banded matrix are contiguous in one of the eight. A program makes B entries; the grid is (blocks, branches).
    The entries of a branch are below 2 ** 31.
    """
    branch = tl.program_id(1)
    k = _pick(branch, k0, k1, k2)
    KW = _pick(branch, KW0, KW1, KW2)
    L = eighths * 8
    at = tl.program_id(0) * B + tl.arange(0, B)
    entry = at % (8 * L)
    row = at // (8 * L)
    i = row % KH
    tap = last + KW // 2 - entry % L - entry // L
    ok = (row < C * KH) & (tap >= 0) & (tap < KW)
    if flipped != 0:
        i = KH - 1 - i
        tap = KW - 1 - tap
    source = row // KH * (KH * KW) + tl.where(branch < talls, tap * KH + i, i * KW + tap)
    v = tl.load(k + source, mask=ok, other=0.0)
    tl.store(table + branch.to(tl.int64) * C * KH * 8 * L + at, v, mask=row < C * KH)


# Sizes are not specialized: each kind would be compiled again for every network and image.
_SIZES = ['N', 'C', 'H', 'W', 'KW0', 'KW1', 'KW2', 'talls', 'tiles', 'steps']
_CHANNELS = ['channels0', 'channels1', 'channels2']


@triton.jit(do_not_specialize=['N', 'C', 'H', 'W', 'talls', 'tiles', 'steps', *_CHANNELS, 'has_bias'])
def convolve_rows(
    x0,
    x1,
    x2,
    channels0,
    channels1,
    channels2,
    y0,
    y1,
    y2,
    table,
    bias,
    N,
    C,
    H,
    W,
    talls,
    tiles,
    steps,
    has_bias,
    KH: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    U: tl.constexpr,
    OFF: tl.constexpr,
    KEEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y = x * k``, the first branch plus a bias (C,) if ``has_bias``; ``table`` is that of :func:`lay_out_taps`.

    Results are NCHW, in the dtype of ``y``. ``KEEP`` (at most five kernel rows) holds all bands for the whole program.
    ``ALIGNED`` if W is a multiple of 8: whole vectors are stored. The grid is (C, branches * tiles, splits); each split
    takes ``steps`` blocks of rows.
    """
    if ALIGNED:  # the compiler sees the factor
        W = W // 8 * 8
    c = tl.program_id(0)
    branch = tl.program_id(1) // tiles
    w0 = tl.program_id(1) % tiles * T
    tall = branch < talls
    x = _pick(branch, x0, x1, x2)
    channels = _pick(branch, channels0, channels1, channels2)
    y = _pick(branch, y0, y1, y2)
    rows = tl.where(tall, W, H)
    length = tl.where(tall, H, W)
    L: tl.constexpr = T + U
    taps = table + (branch * C + c).to(tl.int64) * (KH * 8 * L)
    t = tl.arange(0, T)
    ul = tl.arange(0, U)
    u = w0 - OFF + ul
    stride = _eights(length)
    uok = (u >= 0) & (u < stride)
    start = tl.load(bias + c, mask=(has_bias != 0) & (branch == 0), other=0.0).to(tl.float32)
    if KEEP:
        band0 = _band(taps, ul, t, U, L)
        if KH > 1:
            band1 = _band(taps + 8 * L, ul, t, U, L)
            band2 = _band(taps + 2 * 8 * L, ul, t, U, L)
        if KH > 3:
            band3 = _band(taps + 3 * 8 * L, ul, t, U, L)
            band4 = _band(taps + 4 * 8 * L, ul, t, U, L)
    first = tl.program_id(2) * steps
    # A branch of shorter or fewer rows than another has nothing to do at the end.
    last = tl.where(w0 < length, tl.minimum(first + steps, tl.cdiv(N * rows, R)), first)
    # What does not change is computed again, which is cheaper than the registers to keep it for both kinds of stores.
    for step in tl.range(first, last, num_stages=1, disable_licm=True):
        r = step * R + tl.arange(0, R)
        ok = r < N * rows
        h = r % rows
        plane = ((r // rows).to(tl.int64) * channels + c) * rows * stride
        acc = tl.zeros((R, T), tl.float32) + start
        if KEEP:
            acc = _dot(_shifted(x, plane, h, ok, -(KH // 2), u, uok, rows, stride), band0, acc, PRECISION)
            if KH > 1:
                acc = _dot(_shifted(x, plane, h, ok, 1 - KH // 2, u, uok, rows, stride), band1, acc, PRECISION)
                acc = _dot(_shifted(x, plane, h, ok, 2 - KH // 2, u, uok, rows, stride), band2, acc, PRECISION)
            if KH > 3:
                acc = _dot(_shifted(x, plane, h, ok, 3 - KH // 2, u, uok, rows, stride), band3, acc, PRECISION)
                acc = _dot(_shifted(x, plane, h, ok, 4 - KH // 2, u, uok, rows, stride), band4, acc, PRECISION)
        else:
            for i in tl.range(0, KH, disable_licm=True):
                band = _band(taps + i * 8 * L, ul, t, U, L)
                acc = _dot(_shifted(x, plane, h, ok, i - KH // 2, u, uok, rows, stride), band, acc, PRECISION)
        if tall:
            _store(y, acc, r, c, w0 + t, N, C, H, W, True)
        else:
            _store(y, acc, r, c, w0 + t, N, C, H, W, False)


if 'disable_licm' not in inspect.signature(tl.range.__init__).parameters:  # older Triton; more registers are used
    getattr(convolve_rows, '_unsafe_update_src', functools.partial(setattr, convolve_rows, 'src'))(
        convolve_rows.src.replace(', disable_licm=True', '')
    )


@triton.jit(do_not_specialize=[*_SIZES, *_CHANNELS, 'of_g0', 'of_g1', 'of_g2'])
def kernel_gradient_rows(
    x0,
    x1,
    x2,
    channels0,
    channels1,
    channels2,
    g0,
    g1,
    g2,
    of_g0,
    of_g1,
    of_g2,
    out,
    N,
    C,
    H,
    W,
    KW0,
    KW1,
    KW2,
    talls,
    tiles,
    steps,
    KH: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    U: tl.constexpr,
    OFF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum ``g[r, w0 + t] * x[r + i - KH // 2, w0 + t + m - KW // 2]`` over rows into ``out[split, tile, c, i, m, t]``.

    ``out`` has one such array for each branch, one behind the other. The gradient of tap (i, m) is the sum over split,
    tile and t. Entries whose input lies outside of the block are not written. The channels of g's larger maps are
    ``of_g``. The grid is (C * KH, branches * tiles, splits).
    """
    c = tl.program_id(0) // KH
    i = tl.program_id(0) % KH
    branch = tl.program_id(1) // tiles
    tile = tl.program_id(1) % tiles
    split = tl.program_id(2)
    tall = branch < talls
    x = _pick(branch, x0, x1, x2)
    channels = _pick(branch, channels0, channels1, channels2)
    g = _pick(branch, g0, g1, g2)
    of_g = _pick(branch, of_g0, of_g1, of_g2)
    KW = _pick(branch, KW0, KW1, KW2)
    before = _pick(branch, 0, KW0, KW0 + KW1)
    rows = tl.where(tall, W, H)
    stride = _eights(tl.where(tall, H, W))
    t = tl.arange(0, T)
    u = tile * T - OFF + tl.arange(0, U)
    w = tile * T + t
    uok = (u >= 0) & (u < stride)
    acc = tl.zeros((U, T), tl.float32)
    for step in tl.range(split * steps, tl.minimum(split * steps + steps, tl.cdiv(N * rows, R)), num_stages=2):
        r = step * R + tl.arange(0, R)
        ok = r < N * rows
        h = r % rows
        n = (r // rows).to(tl.int64)
        a = _shifted(x, (n * channels + c) * rows * stride, h, ok, i - KH // 2, u, uok, rows, stride)
        b = _shifted(g, (n * of_g + c) * rows * stride, h, ok, 0, w, w < stride, rows, stride)
        acc = _dot(tl.trans(a), b, acc, PRECISION)
    m = u[:, None] - w[None, :] + KW // 2
    parts = tl.num_programs(2) * tiles
    base = ((parts * before + (split * tiles + tile) * KW).to(tl.int64) * C * KH + (c * KH + i) * KW) * T
    tl.store(out + base + m * T + t[None, :], acc, mask=(m >= 0) & (m < KW))


@triton.jit(do_not_specialize=['C', 'KH', 'KW0', 'KW1', 'KW2', 'talls', 'parts', 'eighths', 'U', 'OFF'])
def sum_diagonals(out, k0, k1, k2, C, KH, KW0, KW1, KW2, talls, parts, eighths, U, OFF, B: tl.constexpr):
    """Gradients of kernels from ``out`` of :func:`kernel_gradient_rows`, whose T is ``8 * eighths``, at most 64.

    A program takes B taps, and adds the parts (splits and tiles) in their order. The grid is (blocks of B, branches).
    """
    branch = tl.program_id(1)
    k = _pick(branch, k0, k1, k2)
    KW = _pick(branch, KW0, KW1, KW2)
    T = eighths * 8
    taps = C * KH * KW
    j = tl.program_id(0) * B + tl.arange(0, B)
    m = j % KW
    t = tl.arange(0, 64)
    u = m[:, None] - KW // 2 + OFF + t[None, :]
    mask = (j < taps)[:, None] & (t < T)[None, :] & (u >= 0) & (u < U)
    read = out + (parts * _pick(branch, 0, KW0, KW0 + KW1)).to(tl.int64) * C * KH * T + (j[:, None] * T + t[None, :])
    acc = tl.zeros((B, 64), tl.float32)
    for _ in range(parts):
        acc += tl.load(read, mask=mask, other=0.0)
        read += taps * T
    to = tl.where(branch < talls, (j // (KH * KW) * KW + m) * KH + j // KW % KH, j)
    tl.store(k + to, tl.sum(acc, 1).to(k.dtype.element_ty), mask=j < taps)


@triton.jit(do_not_specialize=['N', 'C', 'H', 'W', 'columns', *[f'channels{i}' for i in range(5)]])
def stage(
    x0,
    x1,
    x2,
    x3,
    x4,
    channels0,
    channels1,
    channels2,
    channels3,
    channels4,
    y0,
    y1,
    y2,
    y3,
    y4,
    N,
    C,
    H,
    W,
    columns,
    LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """Lay out maps as planes: the first ``columns`` of them transposed, the others not.

    The maps are NCHW or, with ``LAST``, channels-last; ``ALIGNED`` if runs of W, or C and ``channels``, are multiples
    of 8; of NCHW maps all are then transposed. A program takes ``R`` entries of the planes' rows by ``B`` entries that
    are contiguous in the map. The grid is (blocks, maps); N * max(C, W) * eights(H) and N * H * eights(W) are below
    2 ** 31.
    """
    job = tl.program_id(1)
    x = _pick(job, x0, x1, _pick(job - 2, x2, x3, x4))
    channels = _pick(job, channels0, channels1, _pick(job - 2, channels2, channels3, channels4))
    y = _pick(job, y0, y1, _pick(job - 2, y2, y3, y4))
    is_column = job < columns
    # q counts along the rows of planes, o the rows of an image, and b what is contiguous in the map.
    if LAST:
        if ALIGNED:  # the compiler sees the factor
            channels = channels // 8 * 8
            C = C // 8 * 8
        q_end = tl.where(is_column, H, W)
        q_padded = _eights(q_end)
        others = tl.where(is_column, W, H)
        b_end = C
        b_padded = C
        x_q = tl.where(is_column, W, 1) * channels
        x_o = tl.where(is_column, 1, W) * channels
        y_o = q_padded
        y_b = others * q_padded
        y_n = C * y_b.to(tl.int64)
    else:
        if ALIGNED:
            W = W // 8 * 8
        q_end = H  # rows are copied, if not transposed, and the last of them left out
        q_padded = _eights(H)
        others = C
        b_end = W
        b_padded = _eights(W)
        x_q = W
        x_o = H * W
        y_o = tl.where(is_column, W * q_padded, H * b_padded)
        y_b = q_padded
        y_n = C * y_o.to(tl.int64)
    blocks = tl.cdiv(b_padded, B)
    b = tl.program_id(0) % blocks * B + tl.arange(0, B)
    v = (tl.program_id(0) // blocks) * R + tl.arange(0, R)
    outer = v // q_padded
    q = (v % q_padded).to(tl.int64)
    n = (outer // others).to(tl.int64)
    o = (outer % others).to(tl.int64)
    ok = outer < N * others
    read = x + (n * channels * H * W + o * x_o + q * x_q)[:, None] + b[None, :]
    block = tl.load(read, mask=(ok & (q < q_end))[:, None] & (b < b_end)[None, :], other=0.0)
    at = y + n * y_n + o * y_o
    is_copied = job >= columns
    if LAST or ALIGNED:
        is_copied = False  # known when it is compiled
    if is_copied:
        mask = (ok & (q < H))[:, None] & (b < b_padded)[None, :]
        tl.store((at + q * b_padded)[:, None] + b[None, :], block, mask=mask)
    else:
        write = (at + q)[None, :] + b.to(tl.int64)[:, None] * y_b
        tl.store(write, tl.trans(block), mask=ok[None, :] & (b < b_end)[:, None])


@triton.jit
def add_up(p0, p1, p2, y, total, B: tl.constexpr, T: tl.constexpr):
    """Add up ``B`` arrays of ``total`` float32 entries each."""
    i = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    ok = i < total
    acc = tl.load(p0 + i, mask=ok, other=0.0)
    if B > 1:
        acc += tl.load(p1 + i, mask=ok, other=0.0)
    if B > 2:
        acc += tl.load(p2 + i, mask=ok, other=0.0)
    tl.store(y + i, acc.to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=['tiles'])
def unstage(p0, p1, p2, y0, y1, y2, C, HW, tiles, B: tl.constexpr, T: tl.constexpr, CB: tl.constexpr):
    """Store NCHW maps of HW pixels channels-last: the sum of ``B`` of them, or with 1 each that the grid has.

    The grid is (images * tiles, blocks of channels, maps); ``tiles`` blocks of T pixels are an image.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * T + tl.arange(0, T)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    i = tl.program_id(2)
    at = (n * C + c)[:, None] * HW + pixel[None, :]
    ok = (c < C)[:, None] & (pixel < HW)[None, :]
    acc = tl.load(_pick(i, p0, p1, p2) + at, mask=ok, other=0.0)
    if B > 1:
        acc += tl.load(p1 + at, mask=ok, other=0.0)
    if B > 2:
        acc += tl.load(p2 + at, mask=ok, other=0.0)
    y = _pick(i, y0, y1, y2)
    to = (n * HW + pixel)[:, None] * C + c[None, :]
    tl.store(y + to, tl.trans(acc).to(y.dtype.element_ty), mask=tl.trans(ok))
