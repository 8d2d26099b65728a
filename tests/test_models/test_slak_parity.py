"""SLaK against the official code's results: features, logits, gradients, running statistics."""

import pytest
import torch
from reference import (
    SLAK_GOLDENS,
    Goldens,
    block_input,
    check_features,
    check_logits,
    input_for,
    load_part,
    official_weights,
    training_step,
)

from slak_mm import load_pretrained, switch_to_deploy
from slak_mm.checkpoints import convert_state_dict, to_official
from slak_mm.models import SLaK
from slak_mm.models.slak import LargeKernelConv, SLaKBlock

GOLDENS = Goldens(SLAK_GOLDENS)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}

NOT_DECOMPOSED = dict(decomposed=False, width_factor=1.0)
VARIANTS = {
    'slak_tiny_k31_w1.3': dict(kernel_sizes=(31, 29, 27, 13)),
    'slak_tiny_k51_w1.3': dict(),
    'slak_tiny_k61_w1.3': dict(kernel_sizes=(61, 59, 57, 13)),
    'slak_tiny_k51_w1.3_nobn': dict(branch_norm=False),
    'slak_tiny_k31_lkb_w1.0': dict(kernel_sizes=(31, 29, 27, 13), **NOT_DECOMPOSED),
    'slak_tiny_convnext_w1.0': dict(kernel_sizes=(7, 7, 7, 7), small_kernel=None, **NOT_DECOMPOSED),
    'slak_base_k51_w1.3': dict(arch='base'),
}


def build(variant: str) -> SLaK:
    model = SLaK(**VARIANTS[variant])
    load_pretrained(model, official_weights(model, 'slak'))
    return model.eval()


@pytest.mark.parametrize('case', GOLDENS.cases('feat_'))
@pytest.mark.parametrize('form', ['training', 'deployed'])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_features(case, form, dtype):
    variant = case.removeprefix('feat_').split('__')[0]
    model = build(variant).to(dtype)
    if form == 'deployed':
        switch_to_deploy(model)
    checked = check_features(GOLDENS, case, model, dtype, TOLERANCE[dtype])
    assert checked == (4 if variant.endswith('nobn') else 8)


@pytest.mark.parametrize('case', GOLDENS.cases('logits_'))
def test_logits(case):
    check_logits(GOLDENS, case, build(case.removeprefix('logits_').split('__')[0]))


BLOCKS = {
    'decom': dict(small_kernel=5, decomposed=True, branch_norm=True, kernel_size=13),
    'decom_nobn': dict(small_kernel=5, decomposed=True, branch_norm=False, kernel_size=13),
    'lkb': dict(small_kernel=5, decomposed=False, branch_norm=True, kernel_size=13),
    'convnext': dict(small_kernel=None, decomposed=False, branch_norm=True, kernel_size=7),
}


@pytest.mark.parametrize('with_cp', [False, True], ids=['stored', 'recomputed'])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('case', GOLDENS.cases('block_train_'))
def test_block_in_training(case, dtype, with_cp):
    """Output, all gradients and running statistics; the same with activation checkpointing."""
    options = BLOCKS[case.removeprefix('block_train_slak_').rsplit('_c16', 1)[0]]
    operator = LargeKernelConv(16, conv_bias=False, norm_cfg=dict(type='BN'), **options)
    block = SLaKBlock(16, operator, drop_path=0, layer_scale_init_value=1.0, with_cp=with_cp)
    ours = load_part(block, 'slak', 'block/')
    for name, got in training_step(GOLDENS, case, block, ours, dtype):
        # Variances near 1 deviate little; the goldens themselves are rounded to float32.
        least_scale = 1.0 if name.endswith('running_var') else 0.0
        GOLDENS.assert_close(case, name, got, TOLERANCE[dtype], least_scale)

    load_part(block, 'slak', 'block/')
    block.eval()
    x = block_input(dtype)
    with torch.no_grad():
        GOLDENS.assert_close(case, 'out_eval', block(x), TOLERANCE[dtype])
        operator.switch_to_deploy()
        GOLDENS.assert_close(case, 'out_eval', block(x), TOLERANCE[dtype])


def test_convnext_mode_is_timms_convnext():
    """Without branch norms and with a bias the ConvNeXt mode equals timm's convnext_tiny."""
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    theirs = timm.create_model('convnext_tiny', features_only=True).eval()
    for p in theirs.parameters():  # layer scale starts at 1e-6, which would hide the blocks
        torch.nn.init.normal_(p, std=0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
    options = VARIANTS['slak_tiny_convnext_w1.0']
    ours = SLaK(**options, branch_norm=False, conv_bias=True, out_norm=False)
    whole = {
        k.replace('_', '.', 1) if k.startswith(('stem_', 'stages_')) else k: v for k, v in theirs.state_dict().items()
    }
    load_pretrained(ours, whole)
    ours.double().eval()
    theirs.double()
    x = input_for((1, 3, 70, 97), 5).double()
    with torch.no_grad():
        for got, want in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10 * float(want.std()))


def test_names_convert_both_ways():
    model = SLaK(dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)))
    state = model.state_dict()
    back, _ = convert_state_dict(to_official(state), family='slak')
    assert list(back) == list(state)
