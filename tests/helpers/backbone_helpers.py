"""What the tests of all backbones use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slak_mm.models import RepLKNet, ShiftWise, SLaK, UniRepLKNet

DIMS = (8, 12, 16, 20)
SMALL = dict(arch=dict(depths=(1, 1, 2, 1), dims=DIMS), kernel_sizes=(13, 11, 9, 7), width_factor=1.0)
SMALL |= dict(norm_cfg=dict(type='BN'))  # the default is for GPUs where there are some
BACKBONES = dict(
    slak=(SLaK, dict(small_kernel=3)),
    shiftwise1=(ShiftWise, dict(version=1)),
    shiftwise2=(ShiftWise, {}),
    unireplknet=(UniRepLKNet, dict(kernel_sizes=(13, 3, 9, 7))),
    replknet=(RepLKNet, dict(small_kernel=3, out_norm=True)),
)


def build(name: str, **options) -> nn.Module:
    """A small backbone of each kind."""
    cls, fixed = BACKBONES[name]
    return cls(**{**SMALL, **fixed, **options})


def random_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and running statistics which leave no branch without effect."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if name.endswith('running_var'):
                t.copy_(1 + torch.rand(t.shape, generator=g))
            elif t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=g) * (0.2 if t.ndim > 1 else 0.5))
    return model


def images(n: int = 2, h: int = 64, w: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal images, the same in every call."""
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(1)).to(dtype)


def forward_with_stages(model: nn.Module, x: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Results of a backbone, and the outputs of its stages before the output norms."""
    stages: list[Tensor] = []
    hooks = [s.register_forward_hook(lambda m, i, o: stages.append(o)) for s in model.stages]
    with torch.no_grad():
        outs = model(x)
    for hook in hooks:
        hook.remove()
    return outs, stages
