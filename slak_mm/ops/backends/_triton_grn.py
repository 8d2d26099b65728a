"""Triton kernels between the matrix products of a feed-forward layer with GRN and batch norm.

Arrays and programs are those of :mod:`slak_mm.ops.backends._triton_passes`. In kernels that add up over pixels a
program takes ``steps`` tiles of one image, which ``splits`` programs share.

GRN knows of each image n its responses G (N, D), the norms of the channels of ``g = GELU(hidden)`` over the pixels, and
``reciprocals`` (N,), 1 / (mean of G over the channels + 1e-6).
"""
# Kernels are written in Triton's language; annotations other than constexpr mean nothing there.
# mypy: ignore-errors

import triton
import triton.language as tl

from ._triton_passes import _added_up, _at, _resized_row, _row, _vector


@triton.jit
def _below(h):
    """The normal distribution function, which GELU multiplies by."""
    return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
def _kept(kept, n, ok, share):
    """What drop path makes of images: ``share`` times their value in ``kept``, which is not read where it is 1."""
    return tl.load(kept + n, mask=ok & (share != 1.0), other=1.0).to(tl.float32) * share


# ------------------------------------------------------------------------------ GELU and GRN


@triton.jit(do_not_specialize=['HW', 'splits', 'steps', 'eighths'])
def gelu_squares(hidden, sums, HW, splits, steps, eighths, T: tl.constexpr, CB: tl.constexpr):
    """Sums of the squares of GELU(hidden) over the pixels of each program, (programs, D)."""
    n = tl.program_id(0) // splits
    first = tl.program_id(0) % splits * steps
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    total = tl.zeros((T, CB), tl.float32)
    for step in range(steps):
        p = (first + step) * T + tl.arange(0, T)
        h = _row(hidden, n * HW + p, p < HW, c, eighths)
        g = h * _below(h)
        total += g * g
    tl.store(sums + tl.program_id(0) * (eighths * 8) + c, tl.sum(total, 0), mask=c < eighths * 8)


@triton.jit(do_not_specialize=['D', 'splits', 'eighths'])
def grn_responses(sums, responses, reciprocals, D, splits, eighths, R: tl.constexpr, CB: tl.constexpr):
    """Responses of an image, and the reciprocal of their mean, of sums of squares (N, splits, D)."""
    n = tl.program_id(0)
    total = tl.zeros((CB,), tl.float32)
    for start in range(0, eighths * 8, CB):
        c = start + tl.arange(0, CB)
        own = tl.sqrt(_added_up(sums + n * splits * (eighths * 8), splits, eighths * 8, c, eighths * 8, R))
        tl.store(responses + n * (eighths * 8) + c, own, mask=c < eighths * 8)
        total += own
    tl.store(reciprocals + n, 1.0 / (tl.sum(total, 0) / D + 1e-6))


@triton.jit
def _grn_factor(responses, reciprocals, gamma, n, c, D, eighths):
    """What GRN multiplies the channels of an image by, (1, CB)."""
    normalized = _vector(responses + n * (eighths * 8), c, eighths * 8) * tl.load(reciprocals + n)
    return _vector(gamma, c, D) * normalized + 1.0


@triton.jit(do_not_specialize=['D', 'HW', 'tiles', 'eighths'])
def grn_rows(
    hidden,
    responses,
    reciprocals,
    gamma,
    beta,
    activation,
    D,
    HW,
    tiles,
    eighths,
    HAS_BETA: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """GRN(GELU(hidden)), rows of ``8 * eighths`` channels, of which D are not padding."""
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    h = _row(hidden, n * HW + p, p < HW, c, eighths)
    v = h * _below(h) * _grn_factor(responses, reciprocals, gamma, n, c, D, eighths)
    if HAS_BETA:
        v += _vector(beta, c, D)
    to = activation + (n * HW + p).to(tl.int64)[:, None] * (eighths * 8) + c[None, :]
    tl.store(to, v.to(activation.dtype.element_ty), mask=(p < HW)[:, None] & (c < eighths * 8)[None, :])


@triton.jit(do_not_specialize=['HW', 'splits', 'steps', 'eighths'])
def grn_sums(hidden, grad, sums, HW, splits, steps, eighths, T: tl.constexpr, CB: tl.constexpr):
    """Sums of ``grad * GELU(hidden)`` and ``grad`` over the pixels of each program, (programs, 2, D)."""
    n = tl.program_id(0) // splits
    first = tl.program_id(0) % splits * steps
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    products = tl.zeros((T, CB), tl.float32)
    total = tl.zeros((T, CB), tl.float32)
    for step in range(steps):
        p = (first + step) * T + tl.arange(0, T)
        h = _row(hidden, n * HW + p, p < HW, c, eighths)
        g = _row(grad, n * HW + p, p < HW, c, eighths)
        products += g * h * _below(h)
        total += g
    to = sums + tl.program_id(0) * (eighths * 16) + c
    tl.store(to, tl.sum(products, 0), mask=c < eighths * 8)
    tl.store(to + eighths * 8, tl.sum(total, 0), mask=c < eighths * 8)


@triton.jit(do_not_specialize=['D', 'splits', 'eighths'])
def grn_totals(
    sums, responses, reciprocals, gamma, totals, means, D, splits, eighths, R: tl.constexpr, CB: tl.constexpr
):
    """Sums (N, splits, 2, D) of an image into ``totals`` (N, 2, D), and the part in its gradients of the mean of G."""
    n = tl.program_id(0)
    rest = tl.zeros((CB,), tl.float32)
    for start in range(0, eighths * 8, CB):
        c = start + tl.arange(0, CB)
        own = sums + n * splits * (eighths * 16)
        products = _added_up(own, splits, eighths * 16, c, eighths * 8, R)
        total = _added_up(own + eighths * 8, splits, eighths * 16, c, eighths * 8, R)
        to = totals + n * (eighths * 16) + c
        tl.store(to, products, mask=c < eighths * 8)
        tl.store(to + eighths * 8, total, mask=c < eighths * 8)
        factor = tl.load(gamma + c, mask=c < D, other=0.0).to(tl.float32)
        rest += factor * products * tl.load(responses + n * (eighths * 8) + c, mask=c < eighths * 8, other=0.0)
    reciprocal = tl.load(reciprocals + n)
    tl.store(means + n, tl.sum(rest, 0) * reciprocal * reciprocal / D)


@triton.jit(do_not_specialize=['D', 'HW', 'splits', 'steps', 'eighths'])
def grn_gradients(
    hidden,
    grad,
    responses,
    reciprocals,
    totals,
    means,
    gamma,
    beta,
    activation,
    sums,
    D,
    HW,
    splits,
    steps,
    eighths,
    HAS_BETA: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Make GRN(GELU(hidden)), and in place of its gradient that of ``hidden``, whose sums are (programs, D).

    ``totals`` and ``means`` are those of :func:`grn_totals`.
    """
    n = tl.program_id(0) // splits
    first = tl.program_id(0) % splits * steps
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    own = _vector(responses + n * (eighths * 8), c, eighths * 8)
    of_own = _vector(gamma, c, D) * _vector(totals + n * (eighths * 16), c, eighths * 8) * tl.load(reciprocals + n)
    of_own = (of_own - tl.load(means + n)) / tl.where(own > 0.0, own, 1.0)  # times GELU(hidden), which is 0 there
    factor = _grn_factor(responses, reciprocals, gamma, n, c, D, eighths)
    total = tl.zeros((T, CB), tl.float32)
    for step in range(steps):
        p = (first + step) * T + tl.arange(0, T)
        ok = (p < HW)[:, None] & (c < eighths * 8)[None, :]
        at = (n * HW + p).to(tl.int64)[:, None] * (eighths * 8) + c[None, :]
        h = tl.load(hidden + at, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
        below = _below(h)
        g = (g * factor + h * below * of_own) * (below + h * 0.3989422804014327 * tl.exp(-0.5 * h * h))
        v = h * below * factor
        if HAS_BETA:
            v += _vector(beta, c, D)
        tl.store(activation + at, v.to(activation.dtype.element_ty), mask=ok)
        tl.store(grad + at, g.to(grad.dtype.element_ty), mask=ok)
        total += g
    tl.store(sums + tl.program_id(0) * (eighths * 8) + c, tl.sum(total, 0), mask=c < eighths * 8)


@triton.jit(do_not_specialize=['rows1', 'C', 'eighths_c', 'D', 'eighths', 'programs', 'images'])
def parameter_gradients(
    sums,
    totals,
    responses,
    reciprocals,
    product1,
    product2,
    of_bias,
    of_gamma,
    of_beta,
    of_weight1,
    of_weight2,
    rows1,
    C,
    eighths_c,
    D,
    eighths,
    programs,
    images,
    HAS_BETA: tl.constexpr,
    R: tl.constexpr,
    KB: tl.constexpr,
    CB: tl.constexpr,
):
    """Gradients of the first bias, ``gamma`` and ``beta``, KB channels a program, and of the weights.

    Rows of the products (D, C), ``rows1`` of them, and (E, D), whose columns are padded, are copied, one a program.
    """
    columns = eighths * 8
    blocks = tl.cdiv(D, KB)
    i = tl.program_id(0)
    if i < blocks:
        c = i * KB + tl.arange(0, KB)
        tl.store(
            of_bias + c, _added_up(sums, programs, columns, c, columns, R).to(of_bias.dtype.element_ty), mask=c < D
        )
        if HAS_BETA:
            total = _added_up(totals + columns, images, 2 * columns, c, columns, R)
            tl.store(of_beta + c, total.to(of_beta.dtype.element_ty), mask=c < D)
        total = tl.zeros((R, KB), tl.float32)
        for start in range(0, images, R):
            n = start + tl.arange(0, R)
            ok = (n < images)[:, None] & (c < columns)[None, :]
            normalized = tl.load(responses + n[:, None] * columns + c[None, :], mask=ok, other=0.0)
            normalized *= tl.load(reciprocals + n, mask=n < images, other=0.0)[:, None]
            total += normalized * tl.load(totals + n[:, None] * (2 * columns) + c[None, :], mask=ok, other=0.0)
        tl.store(of_gamma + c, tl.sum(total, 0).to(of_gamma.dtype.element_ty), mask=c < D)
    elif i < blocks + rows1:
        r = i - blocks
        _resized_row(product1 + r * (eighths_c * 8), of_weight1 + r * C, eighths_c * 8, C, CB)
    else:
        r = i - blocks - rows1
        _resized_row(product2 + r * columns, of_weight2 + r * D, columns, D, CB)


# ------------------------------------ batch norm, layer scale, drop path and residual, from rows


@triton.jit(do_not_specialize=['splits', 'steps', 'eighths'])
def norm_sums(
    rows, coefficients, grad, sums, C, HW, splits, steps, eighths, LAST: tl.constexpr, T: tl.constexpr, CB: tl.constexpr
):
    """Sums of ``grad`` and of it times the normalized rows over the pixels of each program, (programs, 2, E)."""
    n = tl.program_id(0) // splits
    first = tl.program_id(0) % splits * steps
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    mean = _vector(coefficients, c, C)
    rstd = _vector(coefficients + C, c, C)
    total = tl.zeros((T, CB), tl.float32)
    products = tl.zeros((T, CB), tl.float32)
    for step in range(steps):
        p = (first + step) * T + tl.arange(0, T)
        ok = (p < HW)[:, None] & (c < C)[None, :]
        g = tl.load(grad + _at(n, p, c, C, HW, LAST), mask=ok, other=0.0).to(tl.float32)
        total += g
        products += g * (_row(rows, n * HW + p, p < HW, c, eighths) - mean) * rstd
    to = sums + tl.program_id(0) * 2 * C + c
    tl.store(to, tl.sum(total, 0), mask=c < C)
    tl.store(to + C, tl.sum(products, 0), mask=c < C)


@triton.jit(do_not_specialize=['images', 'splits', 'C', 'share'])
def norm_totals(
    sums,
    coefficients,
    weight,
    bias,
    scale,
    kept,
    totals,
    factors,
    of_weight,
    of_bias,
    of_scale,
    images,
    splits,
    C,
    share,
    HAS_SCALE: tl.constexpr,
    R: tl.constexpr,
    CB: tl.constexpr,
):
    """Gradients of the norm's weight and bias and of the layer scale, of sums (N, splits, 2, E).

    What the gradients of the rows depend on: ``totals`` (2, E) are those of bias and weight in float32, ``factors``
    (N, E) are ``kept * share * scale`` times the scale of the norm.
    """
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    r = tl.arange(0, R)
    total = tl.zeros((R, CB), tl.float32)
    products = tl.zeros((R, CB), tl.float32)
    for start in range(0, images * splits, R):
        row = start + r
        ok = (row < images * splits)[:, None] & (c < C)[None, :]
        k = _kept(kept, row // splits, row < images * splits, share)[:, None]
        at = sums + row[:, None] * (2 * C) + c[None, :]
        total += k * tl.load(at, mask=ok, other=0.0)
        products += k * tl.load(at + C, mask=ok, other=0.0)
    of_sum = tl.sum(total, 0)
    of_product = tl.sum(products, 0)
    factor = tl.load(coefficients + 2 * C + c, mask=c < C, other=0.0)
    if HAS_SCALE:
        of_own = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32) * of_product
        of_own += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32) * of_sum
        tl.store(of_scale + c, of_own.to(of_scale.dtype.element_ty), mask=c < C)
        own = tl.load(scale + c, mask=c < C, other=0.0).to(tl.float32)
        of_sum *= own
        of_product *= own
        factor *= own
    tl.store(totals + c, of_sum, mask=c < C)
    tl.store(totals + C + c, of_product, mask=c < C)
    tl.store(of_bias + c, of_sum.to(of_bias.dtype.element_ty), mask=c < C)
    tl.store(of_weight + c, of_product.to(of_weight.dtype.element_ty), mask=c < C)
    for start in range(0, images, R):
        n = start + r
        ok = (n < images)[:, None] & (c < C)[None, :]
        v = factor[None, :] * _kept(kept, n, n < images, share)[:, None]
        tl.store(factors + n[:, None] * C + c[None, :], v, mask=ok)


@triton.jit(do_not_specialize=['tiles', 'eighths', 'training'])
def normed_residual_gradients(
    rows,
    coefficients,
    grad,
    totals,
    factors,
    grad_rows,
    C,
    HW,
    tiles,
    eighths,
    training,
    LAST: tl.constexpr,
    T: tl.constexpr,
    CB: tl.constexpr,
):
    """Gradients of the rows, their padding too, from what :func:`norm_totals` made."""
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * T + tl.arange(0, T)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    ok = (p < HW)[:, None] & (c < C)[None, :]
    g = tl.load(grad + _at(n, p, c, C, HW, LAST), mask=ok, other=0.0).to(tl.float32)
    hat = _row(rows, n * HW + p, p < HW, c, eighths)
    hat = (hat - _vector(coefficients, c, C)) * _vector(coefficients + C, c, C)
    # In evaluation there is no reciprocal number of values, and what it multiplies is left out.
    part = tl.load(coefficients + 4 * C + c, mask=(c < C) & (training != 0), other=0.0)[None, :]
    part *= _vector(coefficients + 2 * C, c, C)
    g = g * _vector(factors + n * C, c, C) - part * (_vector(totals, c, C) + hat * _vector(totals + C, c, C))
    to = grad_rows + (n * HW + p).to(tl.int64)[:, None] * (eighths * 8) + c[None, :]
    tl.store(to, g.to(grad_rows.dtype.element_ty), mask=(p < HW)[:, None] & (c < eighths * 8)[None, :])
