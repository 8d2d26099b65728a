"""Triton kernels of the steps between a block's matrix products, each in one pass over its maps.

Maps (N, C, H, W) are NCHW or, with ``LAST``, channels-last; rows (pixels, channels) have their channels padded with
zeros to a multiple of 8. A program takes ``T`` pixels of one image, of which there are HW, by ``CB`` channels at a
time. Sums are in float32: of each program first, into an array of its own, and of the programs in a fixed order
later, so that every run gives the same bits.

``coefficients`` of B branches with batch norms are float32 (3 B + 2, C): B means, B reciprocal standard deviations, B
scales, the sum of the shifts, and the reciprocal of the number of values.
"""
# Kernels are written in Triton's language; annotations other than constexpr mean nothing there.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _at(n, p, c, C, HW, LAST: tl.constexpr):
    """Where the values (T, CB) of an image are in a map."""
    start = n.to(tl.int64) * C * HW
    if LAST:
        at = start + p[:, None] * C + c[None, :]
    else:
        at = start + c[None, :] * HW + p[:, None]
    return at


@triton.jit
def _vector(source, c, C):
    """Values of channels, (1, CB)."""
    return tl.load(source + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _row(rows, row, ok, c, eighths):
    """Values (T, CB) of rows of ``8 * eighths`` channels, the padding too: no vector is cut in two."""
    at = row.to(tl.int64)[:, None] * (eighths * 8) + c[None, :]
    return tl.load(rows + at, mask=ok[:, None] & (c < eighths * 8)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _choose(a, b, c, i):
    """One of three pointers of one kind. Loops over ``i`` are unrolled late, so that they compile quickly."""
    return tl.where(i == 0, a, tl.where(i == 1, b, c))


@triton.jit
def _added_up(parts, number, stride, c, C, R: tl.constexpr):
    """Sum of ``number`` rows of partial sums, which start ``stride`` values apart, (CB,)."""
    total = tl.zeros((R, c.shape[0]), tl.float32)
    for start in range(0, number, R):
        r = start + tl.arange(0, R)
        at = r.to(tl.int64)[:, None] * stride + c[None, :]
        total += tl.load(parts + at, mask=(r < number)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    return tl.sum(total, 0)


# ---------------------------------------------------------------------------- batch statistics


@triton.jit
def _of_tiles(y, tile, c, images, C, HW, tiles, LAST: tl.constexpr, T: tl.constexpr):
    """Values (U * T, CB) of U tiles, and which of them there are."""
    n = tile // tiles
    p = tile % tiles * T + tl.arange(0, tile.shape[0]) % T
    ok = ((p < HW) & (n < images))[:, None] & (c < C)[None, :]
    return tl.load(y + _at(n[:, None], p, c, C, HW, LAST), mask=ok, other=0.0).to(tl.float32), ok


@triton.jit(do_not_specialize=['images', 'tiles', 'steps'])
def branch_moments(
    y0,
    y1,
    y2,
    counter0,
    counter1,
    counter2,
    out,
    images,
    C,
    HW,
    tiles,
    steps,
    COUNTED: tl.constexpr,
    LAST: tl.constexpr,
    U: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Count, mean and sum of squared deviations of B maps into ``out[split, branch]``, (splits, B, 3, C).

    A program takes U tiles of T pixels at a time, of one image or several. It sums up the differences from the mean of
    the first ones, so that nothing cancels. ``COUNTED`` adds one to the counters of the batches.
    """
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    split = tl.program_id(1)
    i = tl.program_id(2)
    y = _choose(y0, y1, y2, i)
    tile = split * steps * U + tl.arange(0, U * T) // T
    v, ok = _of_tiles(y, tile, c, images, C, HW, tiles, LAST, T)
    origin = tl.sum(v, 0) / tl.maximum(tl.sum(ok.to(tl.float32), 0), 1.0)
    count = tl.zeros((U * T, CB), tl.float32)
    total = tl.zeros((U * T, CB), tl.float32)
    squares = tl.zeros((U * T, CB), tl.float32)
    for step in range(steps):
        v, ok = _of_tiles(y, tile + step * U, c, images, C, HW, tiles, LAST, T)
        d = tl.where(ok, v - origin[None, :], 0.0)
        count += ok.to(tl.float32)
        total += d
        squares += d * d
    number = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.maximum(number, 1.0)
    to = out + (split * tl.num_programs(2) + i) * 3 * C + c
    tl.store(to, number, mask=c < C)
    tl.store(to + C, origin + mean, mask=c < C)
    tl.store(to + 2 * C, tl.maximum(tl.sum(squares, 0) - number * mean * mean, 0.0), mask=c < C)
    if COUNTED:
        if (tl.program_id(0) == 0) & (split == 0):
            counter = _choose(counter0, counter1, counter2, i)
            tl.store(counter, tl.load(counter) + 1)


@triton.jit
def _merged(moments, splits, i, branches, C, c, S: tl.constexpr):
    """Moments of branch i of all splits together (Chan et al., 1979); S is a power of two not below ``splits``."""
    s = tl.arange(0, S)
    ok = (s < splits)[:, None] & (c < C)[None, :]
    at = moments + (s[:, None] * branches + i) * 3 * C + c[None, :]
    numbers = tl.load(at, mask=ok, other=0.0)
    means = tl.load(at + C, mask=ok, other=0.0)
    number = tl.sum(numbers, 0)
    mean = tl.sum(numbers * means, 0) / tl.maximum(number, 1.0)
    d = means - mean[None, :]
    return number, mean, tl.sum(tl.load(at + 2 * C, mask=ok, other=0.0) + numbers * d * d, 0)


@triton.jit(do_not_specialize=['splits'])
def merge_moments(moments, out, splits, C, S: tl.constexpr, CB: tl.constexpr):
    """Moments (splits, B, 3, C) into (B, 3, C)."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    i = tl.program_id(1)
    number, mean, squares = _merged(moments, splits, i, tl.num_programs(1), C, c, S)
    to = out + i * 3 * C + c
    tl.store(to, number, mask=c < C)
    tl.store(to + C, mean, mask=c < C)
    tl.store(to + 2 * C, squares, mask=c < C)


@triton.jit(do_not_specialize=['splits', 'branches', 'momentum', 'eps'])
def batch_norm_coefficients(
    moments,
    weight0,
    weight1,
    weight2,
    bias0,
    bias1,
    bias2,
    mean0,
    mean1,
    mean2,
    var0,
    var1,
    var2,
    counter,
    out,
    splits,
    branches,
    C,
    momentum,
    eps,
    TRAINING: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    S: tl.constexpr,
    CB: tl.constexpr,
):
    """Coefficients of one to three batch norms.

    In training of the moments (splits, branches, 3, C), which the running statistics follow with the momentum or, with
    ``CUMULATIVE``, the reciprocal of the counter; else of the running statistics.
    """
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    cok = c < C
    total = tl.zeros((CB,), tl.float32)
    for i in range(branches):
        running_mean = _choose(mean0, mean1, mean2, i) + c
        running_var = _choose(var0, var1, var2, i) + c
        mean = tl.load(running_mean, mask=cok, other=0.0).to(tl.float32)
        var = tl.load(running_var, mask=cok, other=0.0).to(tl.float32)
        if TRAINING:
            factor = momentum
            if CUMULATIVE:
                factor = 1.0 / tl.load(counter).to(tl.float32)
            number, batch_mean, squares = _merged(moments, splits, i, branches, C, c, S)
            unbiased = squares / tl.maximum(number - 1.0, 1.0)
            tl.store(running_mean, (1.0 - factor) * mean + factor * batch_mean, mask=cok)
            tl.store(running_var, (1.0 - factor) * var + factor * unbiased, mask=cok)
            mean = batch_mean
            var = squares / tl.maximum(number, 1.0)
            tl.store(out + (3 * branches + 1) * C + c, 1.0 / tl.maximum(number, 1.0), mask=cok)
        rstd = 1.0 / tl.sqrt(var + eps)
        weight = tl.load(_choose(weight0, weight1, weight2, i) + c, mask=cok, other=0.0).to(tl.float32)
        bias = tl.load(_choose(bias0, bias1, bias2, i) + c, mask=cok, other=0.0).to(tl.float32)
        tl.store(out + i * C + c, mean, mask=cok)
        tl.store(out + (branches + i) * C + c, rstd, mask=cok)
        tl.store(out + (2 * branches + i) * C + c, weight * rstd, mask=cok)
        total += bias - mean * weight * rstd
    tl.store(out + 3 * branches * C + c, total, mask=cok)


# ------------------------------------------ norms, sum and LayerNorm, into rows or another map


@triton.jit
def _summed(y0, y1, y2, at, ok, coefficients, c, C, B: tl.constexpr, NORMED: tl.constexpr):
    """Sum of the branches, each normalized, (T, CB); zero outside."""
    v = tl.zeros(ok.shape, tl.float32)
    for i in range(B):
        more = tl.load(_choose(y0, y1, y2, i) + at, mask=ok, other=0.0).to(tl.float32)
        if NORMED:
            more *= _vector(coefficients + (2 * B + i) * C, c, C)
        v += more
    if NORMED:
        v += _vector(coefficients + 3 * B * C, c, C)
    return tl.where(ok, v, 0.0)


@triton.jit
def _hat(y, at, ok, coefficients, i, c, C, B: tl.constexpr):
    """Branch i without the mean of each channel and divided by its standard deviation, (T, CB)."""
    v = tl.load(y + at, mask=ok, other=0.0).to(tl.float32) - _vector(coefficients + i * C, c, C)
    return v * _vector(coefficients + (B + i) * C, c, C)


@triton.jit
def _gradient(grad, row, at, pok, ok, c, eighths, ROWS: tl.constexpr):
    """Gradients (T, CB) of rows or of a map."""
    if ROWS:
        return _row(grad, row, pok, c, eighths)
    else:
        return tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=['tiles', 'eighths', 'eps'])
def norm_rows(
    y0,
    y1,
    y2,
    coefficients,
    weight,
    bias,
    out,
    pixels,
    C,
    HW,
    tiles,
    eighths,
    eps,
    B: tl.constexpr,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """LayerNorm over the channels of the sum of B branches, into ``ROWS`` of ``8 * eighths`` channels or a map.

    Mean and reciprocal standard deviation of each pixel go to ``pixels``, (2, pixels). Squares are taken of the
    differences from the first channel, of which none is above C times the variance.
    """
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    pok = p < HW
    number = tl.num_programs(0) // tiles * HW
    row = n * HW + p
    zero = tl.arange(0, 1)
    origin = _summed(y0, y1, y2, _at(n, p, zero, C, HW, LAST), pok[:, None], coefficients, zero, C, B, NORMED)
    total = tl.zeros((T, CB), tl.float32)
    squares = tl.zeros((T, CB), tl.float32)
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        ok = pok[:, None] & (c < C)[None, :]
        v = _summed(y0, y1, y2, _at(n, p, c, C, HW, LAST), ok, coefficients, c, C, B, NORMED)
        d = tl.where(ok, v - origin, 0.0)
        total += d
        squares += d * d
    shift = (tl.sum(total, 1) / C)[:, None]
    mean = origin + shift
    variance = tl.maximum((tl.sum(squares, 1) / C)[:, None] - shift * shift, 0.0)
    rstd = 1.0 / tl.sqrt(variance + eps)
    tl.store(pixels + row[:, None], mean, mask=pok[:, None])
    tl.store(pixels + number + row[:, None], rstd, mask=pok[:, None])
    for start in range(0, eighths * 8, CB):
        c = start + tl.arange(0, CB)
        ok = pok[:, None] & (c < C)[None, :]
        at = _at(n, p, c, C, HW, LAST)
        v = _summed(y0, y1, y2, at, ok, coefficients, c, C, B, NORMED)
        v = (v - mean) * rstd * _vector(weight, c, C) + _vector(bias, c, C)
        if ROWS:
            at = row.to(tl.int64)[:, None] * (eighths * 8) + c[None, :]
            ok = pok[:, None] & (c < eighths * 8)[None, :]
        tl.store(out + at, v.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=['tiles', 'eighths'])
def norm_rows_sums(
    y0,
    y1,
    y2,
    coefficients,
    weight,
    grad,
    pixels,
    of_pixels,
    sums,
    grad_y,
    C,
    HW,
    tiles,
    eighths,
    B: tl.constexpr,
    NORMED: tl.constexpr,
    TRAINING: tl.constexpr,
    ROWS: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Sums of the backward pass over the pixels of each program, into ``sums[program]``, (programs, K, C).

    They are the gradients of the LayerNorm's weight and bias and, with ``NORMED``, the sums of the gradient ``d`` of
    the branches' sum and of ``d`` times each normalized branch. In ``TRAINING`` the gradients of the branches depend on
    them, and two means over the channels of each pixel go to ``of_pixels``, (2, pixels); else the gradients go to
    ``grad_y``: B maps, or a single one without norms.
    """
    K: tl.constexpr = 3 + B if NORMED else 2
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    pok = p < HW
    images = tl.num_programs(0) // tiles
    row = n * HW + p
    mean = tl.load(pixels + row, mask=pok, other=0.0)[:, None]
    rstd = tl.load(pixels + images * HW + row, mask=pok, other=0.0)[:, None]
    first = tl.zeros((T, CB), tl.float32)
    second = tl.zeros((T, CB), tl.float32)
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        ok = pok[:, None] & (c < C)[None, :]
        at = _at(n, p, c, C, HW, LAST)
        v = _summed(y0, y1, y2, at, ok, coefficients, c, C, B, NORMED)
        g = _gradient(grad, row, at, pok, ok, c, eighths, ROWS) * _vector(weight, c, C)
        first += g
        second += g * (v - mean) * rstd
    c1 = (tl.sum(first, 1) / C)[:, None]
    c2 = (tl.sum(second, 1) / C)[:, None]
    if TRAINING:
        tl.store(of_pixels + row[:, None], c1, mask=pok[:, None])
        tl.store(of_pixels + images * HW + row[:, None], c2, mask=pok[:, None])
    to = sums + tl.program_id(0).to(tl.int64) * K * C
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        ok = pok[:, None] & (c < C)[None, :]
        at = _at(n, p, c, C, HW, LAST)
        v = _summed(y0, y1, y2, at, ok, coefficients, c, C, B, NORMED)
        g = _gradient(grad, row, at, pok, ok, c, eighths, ROWS)
        hat = tl.where(ok, (v - mean) * rstd, 0.0)
        d = tl.where(ok, rstd * (g * _vector(weight, c, C) - c1 - hat * c2), 0.0)
        tl.store(to + c, tl.sum(g * hat, 0), mask=c < C)
        tl.store(to + C + c, tl.sum(g, 0), mask=c < C)
        if NORMED:
            tl.store(to + 2 * C + c, tl.sum(d, 0), mask=c < C)
            for i in range(B):
                y = _hat(_choose(y0, y1, y2, i), at, ok, coefficients, i, c, C, B)
                tl.store(to + (3 + i) * C + c, tl.sum(d * y, 0), mask=c < C)
                if not TRAINING:
                    own = d * _vector(coefficients + (2 * B + i) * C, c, C)
                    to_y = grad_y + i * images.to(tl.int64) * C * HW + at
                    tl.store(to_y, own.to(grad_y.dtype.element_ty), mask=ok)
        else:
            tl.store(grad_y + at, d.to(grad_y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=['tiles', 'eighths'])
def norm_rows_gradients(
    y0,
    y1,
    y2,
    coefficients,
    weight,
    grad,
    pixels,
    of_pixels,
    sums,
    grad_y,
    C,
    HW,
    tiles,
    eighths,
    B: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Gradients of B branches in training into as many maps, from the sums of all pixels, (3 + B, C), and of each."""
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    pok = p < HW
    images = tl.num_programs(0) // tiles
    row = n * HW + p
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    ok = pok[:, None] & (c < C)[None, :]
    at = _at(n, p, c, C, HW, LAST)
    mean = tl.load(pixels + row, mask=pok, other=0.0)[:, None]
    rstd = tl.load(pixels + images * HW + row, mask=pok, other=0.0)[:, None]
    c1 = tl.load(of_pixels + row, mask=pok, other=0.0)[:, None]
    c2 = tl.load(of_pixels + images * HW + row, mask=pok, other=0.0)[:, None]
    v = _summed(y0, y1, y2, at, ok, coefficients, c, C, B, True)
    g = _row(grad, row, pok, c, eighths)
    part = _vector(coefficients + (3 * B + 1) * C, c, C)
    d = rstd * (g * _vector(weight, c, C) - c1 - (v - mean) * rstd * c2) - part * _vector(sums + 2 * C, c, C)
    for i in range(B):
        y = _hat(_choose(y0, y1, y2, i), at, ok, coefficients, i, c, C, B)
        own = (d - y * part * _vector(sums + (3 + i) * C, c, C)) * _vector(coefficients + (2 * B + i) * C, c, C)
        tl.store(grad_y + i * images.to(tl.int64) * C * HW + at, own.to(grad_y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=['number'])
def norm_gradients(
    parts,
    sums,
    of_weight,
    of_bias,
    of_weight0,
    of_weight1,
    of_weight2,
    of_bias0,
    of_bias1,
    of_bias2,
    number,
    C,
    R: tl.constexpr,
    CB: tl.constexpr,
):
    """Add up ``number`` partial sums of :func:`norm_rows_sums`, (number, K, C), and give each parameter its own."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    k = tl.program_id(1)
    K = tl.num_programs(1)
    total = _added_up(parts + k * C, number, K * C, c, C, R)
    ok = c < C
    tl.store(sums + k * C + c, total, mask=ok)
    if k == 0:
        tl.store(of_weight + c, total.to(of_weight.dtype.element_ty), mask=ok)
    elif k == 1:
        tl.store(of_bias + c, total.to(of_bias.dtype.element_ty), mask=ok)
    elif k == 2:
        for i in range(K - 3):
            tl.store(_choose(of_bias0, of_bias1, of_bias2, i) + c, total.to(of_bias0.dtype.element_ty), mask=ok)
    else:
        to = _choose(of_weight0, of_weight1, of_weight2, k - 3)
        tl.store(to + c, total.to(of_weight0.dtype.element_ty), mask=ok)


# --------------------------------------------------- layer scale, drop path and residual, from rows


@triton.jit
def _factor(scale, kept, n, c, C, share, HAS_SCALE: tl.constexpr):
    """Layer scale times what drop path makes of an image, (1, CB); a ``share`` of 1 keeps all of them."""
    factor = tl.full((1, c.shape[0]), 1.0, tl.float32)
    if HAS_SCALE:
        factor = _vector(scale, c, C)
    return factor * tl.load(kept + n, mask=share != 1.0, other=1.0).to(tl.float32) * share


@triton.jit(do_not_specialize=['tiles', 'eighths', 'share'])
def scaled_residual(
    rows,
    coefficients,
    scale,
    kept,
    residual,
    out,
    C,
    HW,
    tiles,
    eighths,
    share,
    NORMED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """``residual + scale * kept * share * rows``; ``kept`` has a value for each image.

    With ``NORMED`` the rows pass a batch norm, whose ``coefficients`` are (5, C), before.
    """
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    ok = (p < HW)[:, None] & (c < C)[None, :]
    at = _at(n, p, c, C, HW, LAST)
    v = _row(rows, n * HW + p, p < HW, c, eighths)
    if NORMED:
        v = v * _vector(coefficients + 2 * C, c, C) + _vector(coefficients + 3 * C, c, C)
    v *= _factor(scale, kept, n, c, C, share, HAS_SCALE)
    v += tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + at, v.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=['tiles', 'eighths', 'share'])
def scaled_residual_gradients(
    rows,
    scale,
    kept,
    grad,
    grad_rows,
    sums,
    C,
    HW,
    tiles,
    eighths,
    share,
    HAS_SCALE: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Gradient of the rows, and sums of the pixels of each program, of it and of the scale's.

    Sums are (programs, 1 or 2, 8 * eighths).
    """
    K: tl.constexpr = 2 if NEEDS_SCALE else 1
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    ok = (p < HW)[:, None] & (c < C)[None, :]
    row = (n * HW + p).to(tl.int64)[:, None] * (eighths * 8) + c[None, :]
    g = tl.load(grad + _at(n, p, c, C, HW, LAST), mask=ok, other=0.0).to(tl.float32)
    to = sums + tl.program_id(0).to(tl.int64) * K * eighths * 8 + c
    own = g * _factor(scale, kept, n, c, C, share, HAS_SCALE)
    tl.store(grad_rows + row, own.to(grad_rows.dtype.element_ty), mask=(p < HW)[:, None] & (c < eighths * 8)[None, :])
    tl.store(to, tl.sum(own, 0), mask=c < eighths * 8)
    if NEEDS_SCALE:
        y = _row(rows, n * HW + p, p < HW, c, eighths)
        y *= _factor(scale, kept, n, c, C, share, False)
        tl.store(to + eighths * 8, tl.sum(g * y, 0), mask=c < eighths * 8)


# ------------------------------------------------------------------------- GELU and weights


@triton.jit(do_not_specialize=['number', 'eighths'])
def gelu_gradients(hidden, grad, activation, sums, number, eighths, T: tl.constexpr, CB: tl.constexpr):
    """Make GELU(hidden), and in place of its gradient that of ``hidden``, whose sums are (programs, D)."""
    D = eighths * 8
    p = tl.program_id(0) * T + tl.arange(0, T)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    ok = (p < number)[:, None] & (c < D)[None, :]
    at = p.to(tl.int64)[:, None] * D + c[None, :]
    h = tl.load(hidden + at, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    g *= below + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    tl.store(activation + at, (h * below).to(activation.dtype.element_ty), mask=ok)
    tl.store(grad + at, g.to(grad.dtype.element_ty), mask=ok)
    tl.store(sums + tl.program_id(0).to(tl.int64) * D + c, tl.sum(g, 0), mask=c < D)


@triton.jit
def _resized_row(source, to, columns, to_columns, ROW: tl.constexpr):
    """Copy a row of so many columns, cut or filled with zeros."""
    for start in range(0, to_columns, ROW):
        i = start + tl.arange(0, ROW)
        v = tl.load(source + i, mask=i < columns, other=0.0)
        tl.store(to + i, v.to(to.dtype.element_ty), mask=i < to_columns)


@triton.jit(do_not_specialize=['c', 'd', 'e', 'to_c', 'to_d', 'to_e', 'rows', 'number1', 'number2', 'stride2'])
def resize_weights(
    weight1,
    weight2,
    bias1,
    bias2,
    to1,
    to2,
    to_bias1,
    to_bias2,
    to_scale,
    c,
    d,
    e,
    to_c,
    to_d,
    to_e,
    rows,
    number1,
    number2,
    stride2,
    ROW: tl.constexpr,
    R: tl.constexpr,
    CB: tl.constexpr,
):
    """Copy weights (d, c) and (e, d), and biases and layer scale, to other sizes: cut, or filled with zeros.

    Biases (d,) and (e,) are ``number1`` and ``number2`` rows that are added up, the latter ``stride2`` values apart;
    those of the scale, which has programs or has none, are between. ``rows`` is ``to_d + to_e``, or 0 where no weights
    are copied.
    """
    r = tl.program_id(0)
    if r < rows:
        is_first = r < to_d
        r = tl.where(is_first, r, r - to_d)
        columns = tl.where(is_first, c, d)
        to_columns = tl.where(is_first, to_c, to_d)
        source = tl.where(is_first, weight1, weight2) + r * columns
        to = tl.where(is_first, to1, to2) + r * to_columns
        _resized_row(source, to, tl.where(r < tl.where(is_first, d, e), columns, 0), to_columns, ROW)
    else:
        block = r - rows
        blocks1 = tl.cdiv(to_d, CB)
        blocks2 = tl.cdiv(to_e, CB)
        is_first = block < blocks1
        is_scale = block >= blocks1 + blocks2
        i = tl.where(is_first, block, (block - blocks1) % blocks2) * CB + tl.arange(0, CB)
        parts = tl.where(is_first, bias1, tl.where(is_scale, bias2 + e, bias2))
        number = tl.where(is_first, number1, number2)
        v = _added_up(parts, number, tl.where(is_first, d, stride2), i, tl.where(is_first, d, e), R)
        ok = i < tl.where(is_first, to_d, to_e)
        to = tl.where(is_first, to_bias1, to_bias2)
        tl.store(to + i, v.to(to.dtype.element_ty), mask=ok & ~is_scale)
        tl.store(to_scale + i, v.to(to_scale.dtype.element_ty), mask=ok & is_scale)


# ----------------------------------------------------------------------- kernels made of filters


@triton.jit(do_not_specialize=['first', 'before', 'length', 'NK'])
def assemble(
    filters,
    shifts,
    picks,
    tall,
    wide,
    small,
    first,
    before,
    length,
    NK,
    S: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
):
    """Kernels of one channel of its NK filters, of G orders each, behind ``before`` zero taps; ``length`` in all.

    The filter of shift z stands at tap ``first - z``. E is a power of two not below ``length * S``.
    """
    c = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E)
    ok = e < length * S
    along = e // S - before  # the tap and, across, the column of an entry of the tall kernel
    across = e % S
    of_tall = tl.zeros((E,), tl.float32)
    of_wide = tl.zeros((E,), tl.float32)
    for p in range(NK):
        for g in tl.static_range(G):
            z = shifts + (c * NK + p) * 2 * G + g
            tap = along - (first - tl.load(z + G))
            here = ok & (tap >= 0) & (tap < S)
            of_tall += tl.load(filters + ((c * NK + p) * S + tap) * S + across, mask=here, other=0.0).to(tl.float32)
            tap = along - (first - tl.load(z))
            here = ok & (tap >= 0) & (tap < S)
            of_wide += tl.load(filters + ((c * NK + p) * S + across) * S + tap, mask=here, other=0.0).to(tl.float32)
    tl.store(tall + c * length * S + e, of_tall.to(tall.dtype.element_ty), mask=ok)
    tl.store(wide + (c * S + across) * length + e // S, of_wide.to(wide.dtype.element_ty), mask=ok)
    of_small = tl.zeros((E,), tl.float32)
    for g in tl.static_range(G):
        pick = tl.load(picks + c * G + g).to(tl.int64)
        of_small += tl.load(filters + pick * S * S + e, mask=e < S * S, other=0.0).to(tl.float32)
    tl.store(small + c * S * S + e, of_small.to(small.dtype.element_ty), mask=e < S * S)


@triton.jit(do_not_specialize=['first', 'before', 'length', 'NK'])
def assemble_gradient(
    tall, wide, small, shifts, picks, out, first, before, length, NK, S: tl.constexpr, G: tl.constexpr, E: tl.constexpr
):
    """Gradient of the filters of one channel, of those of its kernels; E is a power of two not below ``NK * S * S``."""
    c = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E)
    ok = e < NK * S * S
    p = c * NK + e // (S * S)
    row = e % (S * S) // S
    column = e % S
    total = tl.zeros((E,), tl.float32)
    for g in tl.static_range(G):
        z = shifts + p * 2 * G + g
        at = before + first - tl.load(z + G, mask=ok, other=0) + row
        total += tl.load(tall + (c * length + at) * S + column, mask=ok, other=0.0).to(tl.float32)
        at = before + first - tl.load(z, mask=ok, other=0) + column
        total += tl.load(wide + (c * S + row) * length + at, mask=ok, other=0.0).to(tl.float32)
        picked = ok & (p == tl.load(picks + c * G + g))
        total += tl.load(small + c * S * S + row * S + column, mask=picked, other=0.0).to(tl.float32)
    tl.store(out + c * NK * S * S + e, total.to(out.dtype.element_ty), mask=ok)
