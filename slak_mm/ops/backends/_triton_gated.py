"""Triton kernels of the passes around squeeze-excite: the sum of the branches, a batch norm, and gates, into rows.

See :mod:`slak_mm.ops.gated_rows` for what they compute, and :mod:`slak_mm.ops.backends._triton_passes` for maps, rows,
tiles and coefficients. ``z`` (N, C, H, W) is the sum of an ``extra`` map and, in its first CN channels, of B branches
(N, CN, H, W) behind their norms; it is never stored. Passes that add up take ``steps`` tiles of one of ``parts`` parts
of an image. ``of_z`` are the coefficients (5, C) of the norm of ``z``.
"""
# Kernels are written in Triton's language; annotations other than constexpr mean nothing there.
# mypy: ignore-errors

import triton
import triton.language as tl

from ._triton_passes import _at, _choose, _hat, _row, _summed, _vector


@triton.jit
def _index(rep, ghost, c, C, CN):
    """Where channel c comes from."""
    first = tl.load(rep + c, mask=c < CN, other=0)
    last = tl.load(ghost + (c - CN), mask=(c >= CN) & (c < C), other=0)
    return tl.where(c < CN, first, last)


@triton.jit(do_not_specialize=['CN', 'tiles'])
def permute_channels(
    x,
    first,
    whole,
    rep,
    ghost,
    scale,
    bias,
    out,
    C,
    CN,
    HW,
    tiles,
    BACKWARD: tl.constexpr,
    SCALED: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Channels in the order (rep, ghost); ``BACKWARD`` puts them back, with ``first`` (N, CN, H, W) added.

    To what was put back ``whole`` is added. ``SCALED`` multiplies the ghosts with a scale and adds a bias.
    """
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    ok = (p < HW)[:, None] & (c < C)[None, :]
    at = _at(n, p, c, C, HW, LAST)
    origin = _at(n, p, _index(rep, ghost, c, C, CN), C, HW, LAST)
    if BACKWARD:
        v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        v += tl.load(first + _at(n, p, c, CN, HW, LAST), mask=ok & (c < CN)[None, :], other=0.0).to(tl.float32)
        v += tl.load(whole + origin, mask=ok, other=0.0).to(tl.float32)
        tl.store(out + origin, v.to(out.dtype.element_ty), mask=ok)
    else:
        v = tl.load(x + origin, mask=ok, other=0.0)
        if SCALED:
            behind = ((c >= CN) & (c < C))[None, :]
            v = v.to(tl.float32) * tl.load(scale + (c - CN)[None, :], mask=behind, other=1.0).to(tl.float32)
            v += tl.load(bias + (c - CN)[None, :], mask=behind, other=0.0).to(tl.float32)
        tl.store(out + at, v.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _z(y0, y1, y2, extra, coefficients, n, p, c, pok, C, CN, HW, B: tl.constexpr, NORMED: tl.constexpr,
       ADDED: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """Values (T, CB) of ``z``; without ``ADDED`` the extra map stands behind the branches only. Zero outside."""
    ok = pok[:, None] & (c < C)[None, :]
    v = tl.load(extra + _at(n, p, c, C, HW, LAST), mask=ok if ADDED else ok & (c >= CN)[None, :], other=0.0)
    v = v.to(tl.float32)
    if B > 0:
        ok = pok[:, None] & (c < CN)[None, :]
        v += _summed(y0, y1, y2, _at(n, p, c, CN, HW, LAST), ok, coefficients, c, CN, B, NORMED)
    return v


@triton.jit(do_not_specialize=['CN', 'parts', 'steps'])
def sum_moments(
    y0,
    y1,
    y2,
    extra,
    coefficients,
    counter,
    out,
    C,
    CN,
    HW,
    parts,
    steps,
    B: tl.constexpr,
    NORMED: tl.constexpr,
    ADDED: tl.constexpr,
    COUNTED: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Count, mean and sum of squared deviations of ``z`` in each part of an image, (N * parts, 3, C).

    Differences from the mean of the part's first tile are summed up, so that nothing cancels. ``COUNTED`` adds one to
    the counter of the batches.
    """
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    n = tl.program_id(1) // parts
    first = tl.program_id(1) % parts * steps
    p = first * T + tl.arange(0, T)
    v = _z(y0, y1, y2, extra, coefficients, n, p, c, p < HW, C, CN, HW, B, NORMED, ADDED, LAST)
    origin = tl.sum(v, 0) / tl.maximum(tl.sum((p < HW).to(tl.float32), 0), 1.0)
    total = tl.zeros((T, CB), tl.float32)
    squares = tl.zeros((T, CB), tl.float32)
    for step in range(steps):
        p = (first + step) * T + tl.arange(0, T)
        v = _z(y0, y1, y2, extra, coefficients, n, p, c, p < HW, C, CN, HW, B, NORMED, ADDED, LAST)
        d = tl.where((p < HW)[:, None], v - origin[None, :], 0.0)
        total += d
        squares += d * d
    number = tl.maximum(tl.minimum(HW - first * T, steps * T), 0).to(tl.float32)
    mean = tl.sum(total, 0) / tl.maximum(number, 1.0)
    to = out + tl.program_id(1) * 3 * C + c
    tl.store(to, tl.zeros((CB,), tl.float32) + number, mask=c < C)
    tl.store(to + C, origin + mean, mask=c < C)
    tl.store(to + 2 * C, tl.maximum(tl.sum(squares, 0) - number * mean * mean, 0.0), mask=c < C)
    if COUNTED:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(counter, tl.load(counter) + 1)


@triton.jit(do_not_specialize=['parts'])
def image_means(moments, affine, out, C, parts, AFFINE: tl.constexpr, S: tl.constexpr, CB: tl.constexpr):
    """Mean over each image of ``affine[0] * z + affine[1]``, (N, C); S is not below ``parts``."""
    n = tl.program_id(0)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    s = tl.arange(0, S)
    at = moments + (n * parts + s)[:, None] * 3 * C + c[None, :]
    ok = (s < parts)[:, None] & (c < C)[None, :]
    numbers = tl.load(at, mask=ok, other=0.0)
    total = tl.sum(numbers * tl.load(at + C, mask=ok, other=0.0), 0)[None, :]
    mean = total / tl.sum(numbers, 0)[None, :]
    if AFFINE:
        mean = mean * _vector(affine, c, C) + _vector(affine + C, c, C)
    tl.store(out + n * C + c[None, :], mean.to(out.dtype.element_ty), mask=(c < C)[None, :])


@triton.jit
def _gate(logits, n, c, C):
    """What the channels of an image are multiplied with, (1, CB)."""
    return 1.0 / (1.0 + tl.exp(-_vector(logits + n * C, c, C)))


@triton.jit(do_not_specialize=['CN', 'tiles', 'eighths'])
def gated_rows(
    y0,
    y1,
    y2,
    extra,
    coefficients,
    affine,
    logits,
    rows,
    C,
    CN,
    HW,
    tiles,
    eighths,
    B: tl.constexpr,
    NORMED: tl.constexpr,
    ADDED: tl.constexpr,
    AFFINE: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """``(affine[0] * z + affine[1]) * sigmoid(logits)`` into rows of ``8 * eighths`` channels; ``logits`` (N, C)."""
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    v = _z(y0, y1, y2, extra, coefficients, n, p, c, p < HW, C, CN, HW, B, NORMED, ADDED, LAST)
    if AFFINE:
        v = v * _vector(affine, c, C) + _vector(affine + C, c, C)
    v *= _gate(logits, n, c, C)
    to = rows + (n * HW + p).to(tl.int64)[:, None] * (eighths * 8) + c[None, :]
    tl.store(to, v.to(rows.dtype.element_ty), mask=(p < HW)[:, None] & (c < eighths * 8)[None, :])


@triton.jit
def _store_three(to, first, second, third, c, C):
    """Three rows of sums."""
    tl.store(to + c, first, mask=c < C)
    tl.store(to + C + c, second, mask=c < C)
    tl.store(to + 2 * C + c, third, mask=c < C)


@triton.jit(do_not_specialize=['CN', 'parts', 'steps', 'eighths'])
def gated_sums(
    y0,
    y1,
    y2,
    extra,
    coefficients,
    of_z,
    grad,
    out,
    C,
    CN,
    HW,
    parts,
    steps,
    eighths,
    B: tl.constexpr,
    NORMED: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Sums over the pixels of each part of an image, (N * parts, 3 or 3 + 3 B, C).

    Of the gradient g of the rows, of g times normalized z, and of the latter; with ``NORMED`` for each branch of g
    times it, of it, and of normalized z times it, the branch being normalized.
    """
    K: tl.constexpr = 3 + 3 * B if NORMED else 3
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    n = tl.program_id(1) // parts
    first = tl.program_id(1) % parts * steps
    to = out + tl.program_id(1) * K * C
    of_grad = tl.zeros((CB,), tl.float32)
    of_product = tl.zeros((CB,), tl.float32)
    of_hat = tl.zeros((CB,), tl.float32)
    a0 = tl.zeros((CB,), tl.float32)
    a1 = tl.zeros((CB,), tl.float32)
    a2 = tl.zeros((CB,), tl.float32)
    b0 = tl.zeros((CB,), tl.float32)
    b1 = tl.zeros((CB,), tl.float32)
    b2 = tl.zeros((CB,), tl.float32)
    c0 = tl.zeros((CB,), tl.float32)
    c1 = tl.zeros((CB,), tl.float32)
    c2 = tl.zeros((CB,), tl.float32)
    for step in range(steps):
        p = (first + step) * T + tl.arange(0, T)
        pok = p < HW
        ok = pok[:, None] & (c < C)[None, :]
        v = _z(y0, y1, y2, extra, coefficients, n, p, c, pok, C, CN, HW, B, NORMED, True, LAST)
        hat = tl.where(ok, (v - _vector(of_z, c, C)) * _vector(of_z + C, c, C), 0.0)
        g = _row(grad, n * HW + p, pok, c, eighths)
        of_grad += tl.sum(g, 0)
        of_product += tl.sum(g * hat, 0)
        of_hat += tl.sum(hat, 0)
        if NORMED:
            at = _at(n, p, c, CN, HW, LAST)
            ok = pok[:, None] & (c < CN)[None, :]
            y = tl.where(ok, _hat(y0, at, ok, coefficients, 0, c, CN, B), 0.0)
            a0 += tl.sum(g * y, 0)
            b0 += tl.sum(y, 0)
            c0 += tl.sum(hat * y, 0)
            if B > 1:
                y = tl.where(ok, _hat(y1, at, ok, coefficients, 1, c, CN, B), 0.0)
                a1 += tl.sum(g * y, 0)
                b1 += tl.sum(y, 0)
                c1 += tl.sum(hat * y, 0)
            if B > 2:
                y = tl.where(ok, _hat(y2, at, ok, coefficients, 2, c, CN, B), 0.0)
                a2 += tl.sum(g * y, 0)
                b2 += tl.sum(y, 0)
                c2 += tl.sum(hat * y, 0)
    _store_three(to, of_grad, of_product, of_hat, c, C)
    if NORMED:
        _store_three(to + 3 * C, a0, b0, c0, c, C)
        if B > 1:
            _store_three(to + 6 * C, a1, b1, c1, c, C)
        if B > 2:
            _store_three(to + 9 * C, a2, b2, c2, c, C)


@triton.jit(do_not_specialize=['parts', 'K'])
def gate_gradients(sums, weight, bias, logits, out, of_logits, C, parts, K, S: tl.constexpr, CB: tl.constexpr):
    """Sums of each image, (N, K, C), of those of its parts; and the gradient of ``logits`` (N, C).

    ``weight`` and ``bias`` (C,) are those of the norm of z.
    """
    n = tl.program_id(0)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    s = tl.arange(0, S)
    of_gate = tl.zeros((1, CB), tl.float32)
    for k in range(K):
        at = sums + ((n * parts + s)[:, None] * K + k) * C + c[None, :]
        v = tl.sum(tl.load(at, mask=(s < parts)[:, None] & (c < C)[None, :], other=0.0), 0)[None, :]
        tl.store(out + (n * K + k) * C + c[None, :], v, mask=(c < C)[None, :])
        if k == 0:
            of_gate += v * _vector(bias, c, C)
        if k == 1:
            of_gate += v * _vector(weight, c, C)
    gate = _gate(logits, n, c, C)
    of_gate *= gate * (1.0 - gate)
    tl.store(of_logits + n * C + c[None, :], of_gate.to(of_logits.dtype.element_ty), mask=(c < C)[None, :])


@triton.jit
def _over_images(sums, k, n, c, ok, K, C):
    return tl.load(sums + (n[:, None] * K + k) * C + c[None, :], mask=ok, other=0.0)


@triton.jit(do_not_specialize=['N', 'K', 'share'])
def batch_sums(sums, logits, of_means, of_z, out, N, C, K, share, NB: tl.constexpr, CB: tl.constexpr):
    """Sums over all images, (K, C), of sums (N, K, C) of each image; ``share`` is one divided by its pixels.

    With g the gradient behind the gates and of the means, which is that of normalized z before its norm's means are
    subtracted: the sums of g, of g times normalized z, and of the latter; and for each branch, times the scale of z's
    norm, of g times it, of it, and of normalized z times it.
    """
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    scale = _vector(of_z + 2 * C, c, C)
    k = 0
    while k < K:  # in threes: g times something, something, normalized z times it
        a = tl.zeros((CB,), tl.float32)
        b = tl.zeros((CB,), tl.float32)
        d = tl.zeros((CB,), tl.float32)
        for start in range(0, N, NB):
            n = start + tl.arange(0, NB)
            ok = (n < N)[:, None] & (c < C)[None, :]
            gate = 1.0 / (
                1.0 + tl.exp(-tl.load(logits + n[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32))
            )
            mean = tl.load(of_means + n[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
            first = _over_images(sums, k, n, c, ok, K, C) * gate
            second = _over_images(sums, k + 1, n, c, ok, K, C)
            third = _over_images(sums, k + 2, n, c, ok, K, C)
            if k == 0:
                a += tl.sum(first + mean, 0)
                b += tl.sum(second * gate + mean * share * third, 0)
                d += tl.sum(third, 0)
            else:
                a += tl.sum(first + mean * share * second, 0)
                b += tl.sum(second, 0)
                d += tl.sum(third, 0)
        factor = tl.where(k == 0, 1.0, tl.sum(scale, 0))
        _store_three(out + k * C, a * factor, b * factor, d * factor, c, C)
        k += 3


@triton.jit
def _means(total, of_z, c, C, TRAINING: tl.constexpr):
    """Means over the batch that the norm of z subtracts, of the gradient and of it times normalized z, (1, CB)."""
    first = tl.zeros((1, c.shape[0]), tl.float32)
    second = tl.zeros((1, c.shape[0]), tl.float32)
    if TRAINING:
        part = _vector(of_z + 4 * C, c, C)
        first = part * _vector(total, c, C)
        second = part * _vector(total + C, c, C)
    return first, second


@triton.jit
def _product(total, i, first, second, c, C):
    """Sum over the batch of the gradient of z times normalized branch i, (1, CB)."""
    at = total + (3 + 3 * i) * C
    return _vector(at, c, C) - first * _vector(at + C, c, C) - second * _vector(at + 2 * C, c, C)


@triton.jit(do_not_specialize=['CN', 'tiles', 'eighths', 'share'])
def gated_gradients(
    y0,
    y1,
    y2,
    extra,
    coefficients,
    of_z,
    logits,
    grad,
    of_means,
    total,
    of_maps,
    of_extra,
    C,
    CN,
    HW,
    tiles,
    eighths,
    share,
    B: tl.constexpr,
    NORMED: tl.constexpr,
    TRAINING: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Gradients of the extra map, and of the branches, (B, N, CN, H, W) or without norms a single one.

    ``total`` (K, C) are the sums of :func:`batch_sums` over all processes.
    """
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    pok = p < HW
    images = tl.num_programs(0) // tiles
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    v = _z(y0, y1, y2, extra, coefficients, n, p, c, pok, C, CN, HW, B, NORMED, True, LAST)
    hat = (v - _vector(of_z, c, C)) * _vector(of_z + C, c, C)
    first, second = _means(total, of_z, c, C, TRAINING)
    d = _row(grad, n * HW + p, pok, c, eighths) * _gate(logits, n, c, C)
    d += _vector(of_means + n * C, c, C) * share - first - hat * second
    d *= _vector(of_z + 2 * C, c, C)
    to = of_extra + _at(n, p, c, C, HW, LAST)
    tl.store(to, d.to(of_extra.dtype.element_ty), mask=pok[:, None] & (c < C)[None, :])
    if B > 0:
        at = _at(n, p, c, CN, HW, LAST)
        ok = pok[:, None] & (c < CN)[None, :]
        for i in range(B if NORMED else 1):
            own = d
            if NORMED:
                if TRAINING:
                    y = _hat(_choose(y0, y1, y2, i), at, ok, coefficients, i, c, CN, B)
                    part = _vector(coefficients + (3 * B + 1) * CN, c, CN)
                    own -= y * part * _product(total, i, first, second, c, C)
                own *= _vector(coefficients + (2 * B + i) * CN, c, CN)
            to = of_maps + i * images.to(tl.int64) * CN * HW + at
            tl.store(to, own.to(of_maps.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=['CN', 'number'])
def branch_norm_gradients(
    total,
    own,
    of_z,
    weight,
    bias,
    weight0,
    weight1,
    weight2,
    bias0,
    bias1,
    bias2,
    C,
    CN,
    number,
    B: tl.constexpr,
    TRAINING: tl.constexpr,
    CB: tl.constexpr,
):
    """Gradients of the norms' weights and biases of the sums ``own`` of this process, which has ``number`` pixels."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    first, second = _means(total, of_z, c, C, TRAINING)
    tl.store(bias + c[None, :], _vector(own, c, C).to(bias.dtype.element_ty), mask=(c < C)[None, :])
    tl.store(weight + c[None, :], _vector(own + C, c, C).to(weight.dtype.element_ty), mask=(c < C)[None, :])
    ok = (c < CN)[None, :]
    shift = _vector(own, c, C) - first * number - second * _vector(own + 2 * C, c, C)
    shift *= _vector(of_z + 2 * C, c, C)
    for i in range(B):
        to = _choose(weight0, weight1, weight2, i) + c[None, :]
        tl.store(to, _product(own, i, first, second, c, C).to(weight.dtype.element_ty), mask=ok)
        tl.store(_choose(bias0, bias1, bias2, i) + c[None, :], shift.to(bias.dtype.element_ty), mask=ok)
