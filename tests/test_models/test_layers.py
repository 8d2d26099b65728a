"""Modules whose tensors an operator reads: whatever looks at them or takes their place is seen."""

import copy

import pytest
import torch
from backbone_helpers import images, random_
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from slak_mm import switch_to_deploy
from slak_mm.models import ShiftWise, SLaK, UniRepLKNet

COMMON = dict(arch=dict(depths=(1, 2), dims=(8, 12)), kernel_sizes=(9, 7), out_indices=(0, 1), norm_cfg=dict(type='BN'))
NETWORKS = {
    'slak': lambda: SLaK(**COMMON, small_kernel=3, width_factor=1.0, drop_path_rate=0.1),
    'square': lambda: SLaK(**COMMON, small_kernel=3, decomposed=False, conv_bias=True),
    'convnext': lambda: SLaK(**COMMON, small_kernel=None, decomposed=False, branch_norm=False, conv_bias=True),
    'shiftwise1': lambda: ShiftWise(**COMMON, version=1, drop_path_rate=0.1),
    'shiftwise2': lambda: ShiftWise(**COMMON, num_paths=2),
    'one path without norms': lambda: ShiftWise(**COMMON, num_paths=1, branch_norm=False, small_kernel=5),
    'unireplknet': lambda: UniRepLKNet(**{**COMMON, 'kernel_sizes': (9, (7, 3))}, drop_path_rate=0.1),
}
every_network = pytest.mark.parametrize('name', NETWORKS)
every_form = pytest.mark.parametrize('form', ['training', 'deployed'])


def build(name, form='training'):
    model = random_(NETWORKS[name]()).double().eval()
    return switch_to_deploy(model) if form == 'deployed' else model


def called_modules(model):
    return {name: module for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}


def results(model, x=None):
    """Maps without autograd, and with it maps and gradients."""
    x = images(2, 20, 24, torch.float64) if x is None else x
    with torch.no_grad():
        maps = model(x)
    model.zero_grad()
    with_grad = model(x)
    sum(y.square().mean() for y in with_grad).backward()
    return [*maps, *(y.detach() for y in with_grad), *(p.grad.clone() for p in model.parameters())]


def assert_close(got, want, tolerance=1e-10):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.abs().max())))


def subclass(module, note):
    """An instance of a class of its own, as an adapter makes."""

    def forward(self, *args, **kwargs):
        note()
        return super(type(self), self).forward(*args, **kwargs)

    module.__class__ = type(f'My{type(module).__name__}', (type(module),), dict(forward=forward))


def own_forward(module, note):
    forward = module.forward
    module.forward = lambda *args, **kwargs: (note(), forward(*args, **kwargs))[1]


LOOKS = {
    'forward hook': lambda module, note: module.register_forward_hook(lambda *_: note()),
    'forward pre-hook': lambda module, note: module.register_forward_pre_hook(lambda *_: note()),
    'backward hook': lambda module, note: module.register_full_backward_hook(lambda *_: note()),
    'backward pre-hook': lambda module, note: module.register_full_backward_pre_hook(lambda *_: note()),
    'subclass': subclass,
    'forward of its own': own_forward,
}


@every_form
@every_network
@pytest.mark.parametrize('look', LOOKS)
@pytest.mark.filterwarnings('ignore:Full backward hook')
def test_each_module_is_called(name, form, look):
    """All at once, and each alone beside plain ones; results and gradients are those of the operators."""
    model = build(name, form)
    want = results(model)
    passes = 1 if 'backward' in look else 2
    seen: list[str] = []
    for wanted in [list(called_modules(model)), *([one] for one in called_modules(model) if look == 'subclass')]:
        seen.clear()
        looked_at = copy.deepcopy(model)
        for key in wanted:
            LOOKS[look](looked_at.get_submodule(key), lambda key=key: seen.append(key))
        assert_close(results(looked_at), want)
        assert sorted(seen) == sorted(wanted * passes)


@every_network
@pytest.mark.parametrize('kind', ['forward', 'forward_pre', 'full_backward', 'full_backward_pre'])
@pytest.mark.filterwarnings('ignore:Full backward hook')
def test_hooks_for_all_modules_see_each(name, kind):
    model = build(name)
    want = results(model)
    seen = set()
    handle = getattr(nn.modules.module, f'register_module_{kind}_hook')(lambda module, *_: seen.add(module))
    try:
        assert_close(results(model), want)
    finally:
        handle.remove()
    assert set(called_modules(model).values()) <= seen


# ------------------------------------------------------------------- weights that are computed


def pruned(module, tensor):
    prune.l1_unstructured(module, tensor, 0.4)


def parametrized(module, tensor):
    parametrize.register_parametrization(module, tensor, Clamped())


class Clamped(nn.Module):
    def forward(self, weight):
        return weight.clamp(min=-0.1)


REPARAMETRIZATIONS = {
    'pruned': pruned,
    'parametrized': parametrized,
    'weight_norm': lambda module, tensor: weight_norm(module, tensor),
    'weight_norm by a hook': lambda module, tensor: nn.utils.weight_norm(module, tensor),
}


def recompute(model, kind):
    """Module and name of each tensor of the blocks that is now computed from others."""
    chosen = [
        (module, tensor)
        for name, module in model.named_modules()
        for tensor, value in module.named_parameters(recurse=False)
        if name.startswith('stages') and tensor in ('weight', 'gamma', 'tall', 'wide')
        if 'weight_norm' not in kind or value.dim() > 1
    ]
    for module, tensor in chosen:
        REPARAMETRIZATIONS[kind](module, tensor)
    return chosen


@every_form
@every_network
@pytest.mark.parametrize('kind', REPARAMETRIZATIONS)
@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated')
def test_computed_weights_are_used(name, form, kind):
    """After steps of an optimizer as well, the network computes what a plain one with these weights does."""
    model = build(name, form)
    chosen = recompute(model, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = images(2, 20, 24, torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        sum(y.square().mean() for y in model(x)).backward()
        optimizer.step()
    with torch.no_grad():
        got = model(x)  # brings what hooks compute up to date
        plain = build(name, form)
        names = {module: key for key, module in model.named_modules()}
        state = {key: value for key, value in model.state_dict().items() if key in plain.state_dict()}
        state |= {f'{names[module]}.{tensor}': getattr(module, tensor) for module, tensor in chosen}
        plain.load_state_dict(state)
        assert_close(got, plain(x), 1e-9)


@every_network
@pytest.mark.parametrize('kind', REPARAMETRIZATIONS)
@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated')
@torch.no_grad()
def test_computed_weights_are_folded(name, kind):
    """As they are after a change, not as they were in the last pass."""
    x = images(2, 20, 24, torch.float64)
    model, deployed = build(name), build(name)
    for network in (model, deployed):
        recompute(network, kind)
        network(x)
        for parameter in network.parameters():
            parameter.add_(0.05)
    switch_to_deploy(deployed)
    assert_close(deployed(x), model(x), 1e-9)
    assert not any('conv.weight_orig' in key or 'filters' in key for key in deployed.state_dict() if 'large' in key)


# ------------------------------------------------------------- other modules in their places


class LowRank(nn.Module):
    """A layer and a trainable update of it, as LoRA's adapters."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        update = 0.1 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.update = nn.Parameter(update)

    def forward(self, x):
        return torch.func.functional_call(self.layer, dict(weight=self.layer.weight + self.update), (x,))


@every_form
@every_network
@pytest.mark.parametrize('kind', [nn.Conv2d, nn.Linear])
def test_adapters(name, form, kind):
    """Also in a network that is folded as far as possible afterwards, which names what is not."""
    model, merged = build(name, form), build(name, form)
    keys = [key for key, module in model.named_modules() if key.startswith('stages') and type(module) is kind]
    for key in keys:
        parent, _, child = key.rpartition('.')
        adapter = LowRank(model.get_submodule(key))
        setattr(model.get_submodule(parent), child, adapter)
        merged.get_submodule(key).weight.data += adapter.update.data
    x = images(2, 20, 24, torch.float64)
    with torch.no_grad():
        want = merged(x)
        assert_close(model(x), want)
        assert_close(switch_to_deploy(model)(x), want)
        assert_close(model.switch_to_deploy() or model(x), want)
    maps = model(x)
    sum(y.square().mean() for y in maps).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_cannot_be_folded_is_named(caplog):
    from mmengine.logging import MMLogger

    model = build('slak')
    branch = model.stages[1][0].large_kernel.wide
    branch.conv = LowRank(branch.conv)
    MMLogger.get_instance('fold', logger_name='fold').addHandler(caplog.handler)
    switch_to_deploy(model)
    # A set: the root logger may hand the record on a second time.
    (message,) = {record.getMessage() for record in caplog.records if record.levelname == 'WARNING'}
    assert message.startswith('stages.1.0.large_kernel stays in training form')


CHANGES = {
    'circular': lambda conv: setattr(conv, 'padding_mode', 'circular'),
    'reflect': lambda conv: setattr(conv, 'padding_mode', 'reflect'),
    'dilated': lambda conv: vars(conv).update(dilation=(2, 2), padding=tuple(2 * p for p in conv.padding)),
}


@pytest.mark.parametrize('change', CHANGES)
def test_convolutions_with_other_settings(change):
    """As people set them for images that wrap around."""
    model = build('slak')
    layer = model.stages[0][0].large_kernel
    for name in layer.branch_names:
        CHANGES[change](getattr(layer, name).conv)
    x = torch.randn(2, 8, 19, 23, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    want = sum(branch.bn(branch.conv(x)) for branch in (layer.tall, layer.wide, layer.small))
    assert_close([layer(x)], [want])
    layer.switch_to_deploy()
    assert_close([layer(x)], [want])


def test_dynamically_quantized_layers():
    """int8 weights change results a little; without the rule they would not at all, or not run."""
    model = build('slak').float()
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    x = images(2, 20, 24)
    with torch.no_grad():
        for got, want in zip(quantized(x), model(x)):
            error = float((got - want).norm() / want.norm())
            assert 1e-5 < error < 0.1


# ------------------------------------------------------------------------------------- the rest


@every_form
@pytest.mark.parametrize('name', ['slak', 'square', 'convnext', 'unireplknet'])
def test_counting_by_hooks_finds_all_flops(name, form):
    model = build(name, form).float()
    found = []

    def note(module, inputs, output):
        found.append(2 * output.numel() // output.shape[1] * module.weight.numel())

    def note_linear(module, inputs, output):
        found.append(2 * output.numel() * module.in_features)

    x = images(1, 20, 24)
    with FlopCounterMode(display=False) as counter:
        model(x)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(note if isinstance(module, nn.Conv2d) else note_linear)
    model(x)
    assert sum(found) == counter.get_total_flops()


@pytest.mark.skipif(not hasattr(torch.library, 'register_autograd'), reason='graphs need torch 2.4')
@pytest.mark.parametrize('name', ['slak', 'shiftwise2', 'unireplknet'])
def test_computed_weights_in_one_graph(name):
    torch._dynamo.reset()
    model = build(name)
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            parametrized(module, 'weight')
    eager = copy.deepcopy(model)
    x = images(2, 20, 24, torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    assert_close(compiled(x), eager(x))


@pytest.mark.parametrize('name', ['slak', 'shiftwise1', 'shiftwise2', 'unireplknet'])
def test_pruned_and_recomputed(name):
    """Activation checkpointing: a pruned network has the gradients that it has without."""
    model, other = build(name), build(name)
    for network in (model, other):
        recompute(network, 'pruned')
    for block in (block for stage in model.stages for block in stage):
        block.with_cp = True
    assert_close(results(model), results(other))


CHANGED = {
    'data': lambda p: p.data.mul_(-0.5),
    'new data': lambda p: setattr(p, 'data', -0.5 * p.data),
    'detached': lambda p: p.detach().mul_(-0.5),
    'in place': lambda p: p.mul_(-0.5),
    'numpy': lambda p: p.detach().numpy().__imul__(-0.5),
    'EMA hook': lambda p: p.data.copy_(-0.5 * p.data),
}


@every_form
@pytest.mark.parametrize('name', ['slak', 'shiftwise1', 'shiftwise2', 'unireplknet'])
@pytest.mark.parametrize('change', CHANGED)
@torch.no_grad()
def test_results_follow_however_weights_are_changed(name, form, change):
    model = build(name, form).float()
    x = images(2, 68, 72)
    for _ in range(3):
        before = model(x)
    for parameter in model.parameters():
        CHANGED[change](parameter)
    fresh = build(name, form).float()
    fresh.load_state_dict(model.state_dict())
    for got, want, old in zip(model(x), fresh(x), before, strict=True):
        assert torch.equal(got, want) and not torch.equal(got, old)
