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
def _pick(a, b, c, i: tl.constexpr):
    """One of three."""
    if i == 0:
        return a
    elif i == 1:
        return b
    else:
        return c


# ---------------------------------------------------------------------------- batch statistics


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
    B: tl.constexpr,
    COUNTED: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Count, mean and sum of squared deviations of B maps into ``out[split, branch]``, (splits, B, 3, C).

    A program sums up the differences from the mean of its first tile, so that nothing cancels. ``COUNTED`` adds one to
    the counters of the batches.
    """
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    split = tl.program_id(1)
    first = split * steps
    for i in tl.static_range(B):
        y = _pick(y0, y1, y2, i)
        n = first // tiles
        p = first % tiles * T + tl.arange(0, T)
        ok = ((p < HW) & (n < images))[:, None] & (c < C)[None, :]
        v = tl.load(y + _at(n, p, c, C, HW, LAST), mask=ok, other=0.0).to(tl.float32)
        origin = tl.sum(v, 0) / tl.maximum(tl.sum(ok.to(tl.float32), 0), 1.0)
        count = tl.zeros((T, CB), tl.float32)
        total = tl.zeros((T, CB), tl.float32)
        squares = tl.zeros((T, CB), tl.float32)
        for step in range(steps):
            n = (first + step) // tiles
            p = (first + step) % tiles * T + tl.arange(0, T)
            ok = ((p < HW) & (n < images))[:, None] & (c < C)[None, :]
            v = tl.load(y + _at(n, p, c, C, HW, LAST), mask=ok, other=0.0).to(tl.float32)
            d = tl.where(ok, v - origin[None, :], 0.0)
            count += ok.to(tl.float32)
            total += d
            squares += d * d
        number = tl.sum(count, 0)
        mean = tl.sum(total, 0) / tl.maximum(number, 1.0)
        to = out + (split * B + i) * 3 * C + c
        tl.store(to, number, mask=c < C)
        tl.store(to + C, origin + mean, mask=c < C)
        tl.store(to + 2 * C, tl.maximum(tl.sum(squares, 0) - number * mean * mean, 0.0), mask=c < C)
        if COUNTED:
            counter = _pick(counter0, counter1, counter2, i)
            if (tl.program_id(0) == 0) & (split == 0):
                tl.store(counter, tl.load(counter) + 1)


@triton.jit
def _merged(moments, splits, i, C, c, B: tl.constexpr, S: tl.constexpr):
    """Moments of branch i of all splits together (Chan et al., 1979); S is a power of two not below ``splits``."""
    s = tl.arange(0, S)
    ok = (s < splits)[:, None] & (c < C)[None, :]
    at = moments + (s[:, None] * B + i) * 3 * C + c[None, :]
    numbers = tl.load(at, mask=ok, other=0.0)
    means = tl.load(at + C, mask=ok, other=0.0)
    number = tl.sum(numbers, 0)
    mean = tl.sum(numbers * means, 0) / tl.maximum(number, 1.0)
    d = means - mean[None, :]
    return number, mean, tl.sum(tl.load(at + 2 * C, mask=ok, other=0.0) + numbers * d * d, 0)


@triton.jit(do_not_specialize=['splits'])
def merge_moments(moments, out, splits, C, B: tl.constexpr, S: tl.constexpr, CB: tl.constexpr):
    """Moments (splits, B, 3, C) into (B, 3, C)."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    for i in tl.static_range(B):
        number, mean, squares = _merged(moments, splits, i, C, c, B, S)
        to = out + i * 3 * C + c
        tl.store(to, number, mask=c < C)
        tl.store(to + C, mean, mask=c < C)
        tl.store(to + 2 * C, squares, mask=c < C)


@triton.jit(do_not_specialize=['splits', 'momentum', 'eps'])
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
    C,
    momentum,
    eps,
    B: tl.constexpr,
    TRAINING: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    S: tl.constexpr,
    CB: tl.constexpr,
):
    """Coefficients of B batch norms.

    In training of the moments (splits, B, 3, C), which the running statistics follow with the momentum or, with
    ``CUMULATIVE``, the reciprocal of the counter; else of the running statistics.
    """
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    cok = c < C
    total = tl.zeros((CB,), tl.float32)
    for i in tl.static_range(B):
        running_mean = _pick(mean0, mean1, mean2, i) + c
        running_var = _pick(var0, var1, var2, i) + c
        mean = tl.load(running_mean, mask=cok, other=0.0).to(tl.float32)
        var = tl.load(running_var, mask=cok, other=0.0).to(tl.float32)
        if TRAINING:
            factor = momentum
            if CUMULATIVE:
                factor = 1.0 / tl.load(counter).to(tl.float32)
            number, batch_mean, squares = _merged(moments, splits, i, C, c, B, S)
            unbiased = squares / tl.maximum(number - 1.0, 1.0)
            tl.store(running_mean, (1.0 - factor) * mean + factor * batch_mean, mask=cok)
            tl.store(running_var, (1.0 - factor) * var + factor * unbiased, mask=cok)
            mean = batch_mean
            var = squares / tl.maximum(number, 1.0)
            tl.store(out + (3 * B + 1) * C + c, 1.0 / tl.maximum(number, 1.0), mask=cok)
        rstd = 1.0 / tl.sqrt(var + eps)
        weight = tl.load(_pick(weight0, weight1, weight2, i) + c, mask=cok, other=0.0).to(tl.float32)
        bias = tl.load(_pick(bias0, bias1, bias2, i) + c, mask=cok, other=0.0).to(tl.float32)
        tl.store(out + i * C + c, mean, mask=cok)
        tl.store(out + (B + i) * C + c, rstd, mask=cok)
        tl.store(out + (2 * B + i) * C + c, weight * rstd, mask=cok)
        total += bias - mean * weight * rstd
    tl.store(out + 3 * B * C + c, total, mask=cok)


# ----------------------------------------------------------- norms, sum and LayerNorm, into rows


@triton.jit
def _summed(y0, y1, y2, at, ok, coefficients, c, C, B: tl.constexpr, NORMED: tl.constexpr):
    """Sum of the branches, each normalized, (T, CB); zero outside."""
    v = tl.load(y0 + at, mask=ok, other=0.0).to(tl.float32)
    if NORMED:
        v *= _vector(coefficients + 2 * B * C, c, C)
    for i in tl.static_range(1, B):
        more = tl.load(_pick(y0, y1, y2, i) + at, mask=ok, other=0.0).to(tl.float32)
        if NORMED:
            more *= _vector(coefficients + (2 * B + i) * C, c, C)
        v += more
    if NORMED:
        v += _vector(coefficients + 3 * B * C, c, C)
    return tl.where(ok, v, 0.0)


@triton.jit(do_not_specialize=['tiles', 'eighths', 'eps'])
def norm_rows(
    y0,
    y1,
    y2,
    coefficients,
    weight,
    bias,
    rows,
    pixels,
    C,
    HW,
    tiles,
    eighths,
    eps,
    B: tl.constexpr,
    NORMED: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """LayerNorm over the channels of the sum of B branches, into rows of ``8 * eighths`` channels.

    Mean and reciprocal standard deviation of each pixel go to ``pixels``, (2, pixels).
    """
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    pok = p < HW
    number = tl.num_programs(0) // tiles * HW
    row = n * HW + p
    c = tl.arange(0, CB)
    ok = pok[:, None] & (c < C)[None, :]
    v = _summed(y0, y1, y2, _at(n, p, c, C, HW, LAST), ok, coefficients, c, C, B, NORMED)
    origin = tl.sum(v, 1) / tl.minimum(C, CB)
    total = tl.zeros((T, CB), tl.float32)
    squares = tl.zeros((T, CB), tl.float32)
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        ok = pok[:, None] & (c < C)[None, :]
        v = _summed(y0, y1, y2, _at(n, p, c, C, HW, LAST), ok, coefficients, c, C, B, NORMED)
        d = tl.where(ok, v - origin[:, None], 0.0)
        total += d
        squares += d * d
    shift = tl.sum(total, 1) / C
    mean = origin + shift
    rstd = 1.0 / tl.sqrt(tl.maximum(tl.sum(squares, 1) / C - shift * shift, 0.0) + eps)
    tl.store(pixels + row, mean, mask=pok)
    tl.store(pixels + number + row, rstd, mask=pok)
    for start in range(0, eighths * 8, CB):
        c = start + tl.arange(0, CB)
        ok = pok[:, None] & (c < C)[None, :]
        v = _summed(y0, y1, y2, _at(n, p, c, C, HW, LAST), ok, coefficients, c, C, B, NORMED)
        v = (v - mean[:, None]) * rstd[:, None] * _vector(weight, c, C) + _vector(bias, c, C)
        to = rows + row.to(tl.int64)[:, None] * (eighths * 8) + c[None, :]
        tl.store(to, v.to(rows.dtype.element_ty), mask=pok[:, None] & (c < eighths * 8)[None, :])


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
    C,
    HW,
    tiles,
    eighths,
    B: tl.constexpr,
    NORMED: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Sums of the backward pass over the pixels of each program, into ``sums[program]``, (programs, rows, C).

    Rows: the gradients of the LayerNorm's weight and bias and, with ``NORMED``, of the sum ``v`` of the branches and of
    ``v`` times each normalized branch. Two means over the channels of each pixel go to ``of_pixels``, (2, pixels).
    """
    K: tl.constexpr = 3 + B if NORMED else 2
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    pok = p < HW
    number = tl.num_programs(0) // tiles * HW
    row = n * HW + p
    mean = tl.load(pixels + row, mask=pok, other=0.0)[:, None]
    rstd = tl.load(pixels + number + row, mask=pok, other=0.0)[:, None]
    first = tl.zeros((T, CB), tl.float32)
    second = tl.zeros((T, CB), tl.float32)
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        ok = pok[:, None] & (c < C)[None, :]
        v = _summed(y0, y1, y2, _at(n, p, c, C, HW, LAST), ok, coefficients, c, C, B, NORMED)
        g = _row(grad, row, pok, c, eighths)
        g *= _vector(weight, c, C)
        first += g
        second += g * (v - mean) * rstd
    c1 = (tl.sum(first, 1) / C)[:, None]
    c2 = (tl.sum(second, 1) / C)[:, None]
    tl.store(of_pixels + row[:, None], c1, mask=pok[:, None])
    tl.store(of_pixels + number + row[:, None], c2, mask=pok[:, None])
    to = sums + tl.program_id(0).to(tl.int64) * K * C
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        ok = pok[:, None] & (c < C)[None, :]
        at = _at(n, p, c, C, HW, LAST)
        v = _summed(y0, y1, y2, at, ok, coefficients, c, C, B, NORMED)
        g = _row(grad, row, pok, c, eighths)
        hat = tl.where(ok, (v - mean) * rstd, 0.0)
        tl.store(to + c, tl.sum(g * hat, 0), mask=c < C)
        tl.store(to + C + c, tl.sum(g, 0), mask=c < C)
        if NORMED:
            d = tl.where(ok, rstd * (g * _vector(weight, c, C) - c1 - hat * c2), 0.0)
            tl.store(to + 2 * C + c, tl.sum(d, 0), mask=c < C)
            for i in tl.static_range(B):
                y = tl.load(_pick(y0, y1, y2, i) + at, mask=ok, other=0.0).to(tl.float32)
                y = (y - _vector(coefficients + i * C, c, C)) * _vector(coefficients + (B + i) * C, c, C)
                tl.store(to + (3 + i) * C + c, tl.sum(d * y, 0), mask=c < C)


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
    NORMED: tl.constexpr,
    TRAINING: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Gradients of the branches into ``grad_y``, B maps or without norms a single one, from sums (rows, C)."""
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
    v = _summed(y0, y1, y2, at, ok, coefficients, c, C, B, NORMED)
    g = _row(grad, row, pok, c, eighths)
    d = rstd * (g * _vector(weight, c, C) - c1 - (v - mean) * rstd * c2)
    if NORMED:
        if TRAINING:
            part = _vector(coefficients + (3 * B + 1) * C, c, C)
            d -= part * _vector(sums + 2 * C, c, C)
        for i in tl.static_range(B):
            own = d
            if TRAINING:
                y = tl.load(_pick(y0, y1, y2, i) + at, mask=ok, other=0.0).to(tl.float32)
                y = (y - _vector(coefficients + i * C, c, C)) * _vector(coefficients + (B + i) * C, c, C)
                own -= y * part * _vector(sums + (3 + i) * C, c, C)
            own *= _vector(coefficients + (2 * B + i) * C, c, C)
            to = grad_y + i * images.to(tl.int64) * C * HW + at
            tl.store(to, own.to(grad_y.dtype.element_ty), mask=ok)
    else:
        tl.store(grad_y + at, d.to(grad_y.dtype.element_ty), mask=ok)


# --------------------------------------------------- layer scale, drop path and residual, from rows


@triton.jit
def _factor(scale, kept, n, c, C, share, HAS_SCALE: tl.constexpr, HAS_KEPT: tl.constexpr):
    """Layer scale times what drop path makes of an image, (1, CB)."""
    factor = tl.full((1, c.shape[0]), 1.0, tl.float32)
    if HAS_SCALE:
        factor = _vector(scale, c, C)
    if HAS_KEPT:
        factor *= tl.load(kept + n).to(tl.float32) * share
    return factor


@triton.jit(do_not_specialize=['tiles', 'eighths', 'share'])
def scaled_residual(
    rows,
    scale,
    kept,
    residual,
    out,
    C,
    HW,
    tiles,
    eighths,
    share,
    HAS_SCALE: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """``residual + scale * kept * share * rows``; ``kept`` has a value for each image."""
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    ok = (p < HW)[:, None] & (c < C)[None, :]
    at = _at(n, p, c, C, HW, LAST)
    v = _row(rows, n * HW + p, p < HW, c, eighths)
    v *= _factor(scale, kept, n, c, C, share, HAS_SCALE, HAS_KEPT)
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
    HAS_KEPT: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Gradient of the rows, and sums over the pixels of each program, (programs, 1 or 2, C): of it, of the scale's."""
    K: tl.constexpr = 2 if NEEDS_SCALE else 1
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    ok = (p < HW)[:, None] & (c < C)[None, :]
    row = (n * HW + p).to(tl.int64)[:, None] * (eighths * 8) + c[None, :]
    g = tl.load(grad + _at(n, p, c, C, HW, LAST), mask=ok, other=0.0).to(tl.float32)
    to = sums + tl.program_id(0).to(tl.int64) * K * C + c
    own = g * _factor(scale, kept, n, c, C, share, HAS_SCALE, HAS_KEPT)
    tl.store(grad_rows + row, own.to(grad_rows.dtype.element_ty), mask=(p < HW)[:, None] & (c < eighths * 8)[None, :])
    tl.store(to, tl.sum(own, 0), mask=c < C)
    if NEEDS_SCALE:
        y = _row(rows, n * HW + p, p < HW, c, eighths)
        y *= _factor(scale, kept, n, c, C, share, False, HAS_KEPT)
        tl.store(to + C, tl.sum(g * y, 0), mask=c < C)


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
def _resized_row(source, to, r, rows, columns, to_columns, CB: tl.constexpr):
    for start in range(0, to_columns, CB):
        c = start + tl.arange(0, CB)
        v = tl.load(source + r * columns + c, mask=(r < rows) & (c < columns), other=0.0)
        tl.store(to + r * to_columns + c, v.to(to.dtype.element_ty), mask=c < to_columns)


@triton.jit(do_not_specialize=['c', 'd', 'e', 'to_c', 'to_d', 'to_e'])
def resize_weights(
    weight1, bias1, weight2, bias2, to1, to_bias1, to2, to_bias2, c, d, e, to_c, to_d, to_e, CB: tl.constexpr
):
    """Copy weights (d, c) and (e, d) and biases (d,) and (e,) to other sizes: cut, or filled with zeros."""
    r = tl.program_id(0)
    if r < to_d:
        _resized_row(weight1, to1, r, d, c, to_c, CB)
    elif r < to_d + to_e:
        _resized_row(weight2, to2, r - to_d, e, d, to_d, CB)
    elif r == to_d + to_e:
        _resized_row(bias1, to_bias1, 0, 1, d, to_d, CB)
    else:
        _resized_row(bias2, to_bias2, 0, 1, e, to_e, CB)


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
