"""Results of the official code, and the weights and inputs by formula that led to them.

The formula of the weights: for a state-dict key of the official code draw a standard normal array ``z`` from
``RandomState(crc32(salt + key))``; norm weights are ``1 + 0.1 z``, running variances ``1 + 0.1 |z|``, biases, running
means and GRN's parameters ``0.1 z``, layer scales ``0.5 + 0.1 z``, convolution and linear weights ``z / sqrt(fan_in)``,
a tenth of it for the filters of ShiftWise, of which many are summed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from backbone_helpers import forward_with_stages
from torch import Tensor

from slak_mm.checkpoints import convert_state_dict, to_official

SLAK_GOLDENS = Path(__file__).parents[1] / 'data' / 'slak_goldens.npz'
REPLKNET_GOLDENS = Path(__file__).parents[1] / 'data' / 'replknet_goldens.npz'
SHIFTWISE_GOLDENS = Path(__file__).parents[1] / 'data' / 'shiftwise_goldens.npz'
UNIREPLKNET_GOLDENS = Path(__file__).parents[1] / 'data' / 'unireplknet_goldens.npz'


def weight_for(key: str, shape: Iterable[int], salt: str = '') -> Tensor:
    """The value of an official state-dict key."""
    shape = tuple(shape)
    last = key.rsplit('.', 1)[-1]
    if last == 'num_batches_tracked':
        return torch.zeros(shape, dtype=torch.int64)
    random = np.random.RandomState(zlib.crc32((salt + key).encode()))
    z = np.asarray(random.standard_normal(shape)).astype(np.float32)
    tenth = np.float32(0.1)
    if last in ('running_mean', 'bias') or last in ('gamma', 'beta') and len(shape) == 4:
        value = tenth * z
    elif last == 'running_var':
        value = 1 + tenth * np.abs(z)
    elif last == 'gamma':
        value = np.float32(0.5) + tenth * z
    elif len(shape) == 1:
        value = 1 + tenth * z
    else:
        scale = np.sqrt(1 / np.prod(shape[1:]))
        if {'LoRA', 'LoRAs'} & set(key.split('.')):
            scale *= 0.1
        value = z * np.float32(scale)
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def official_weights(module: torch.nn.Module, family: str, salt: str = '', prefix: str = '') -> dict[str, Tensor]:
    """Weights by formula under official names, of a backbone or the part of one that ``prefix`` names."""
    keys = to_official({prefix + k: v for k, v in module.state_dict().items()}, family=family)
    return {k: weight_for(k.removeprefix(prefix), v.shape, salt) for k, v in keys.items()}


def load_part(module: torch.nn.Module, family: str, salt: str, prefix: str = 'stages.0.0.') -> dict[str, str]:
    """Fill a part of a backbone by formula, but for what has no official name; returns our names by official ones."""
    official = official_weights(module, family, salt, prefix)
    ours, notes = convert_state_dict(official, family=family)
    module.load_state_dict({**module.state_dict(), **{k.removeprefix(prefix): v for k, v in ours.items()}})
    return {k.removeprefix(prefix): notes.renamed.get(k, k).removeprefix(prefix) for k in official}


def input_for(shape: Iterable[int], seed: int) -> Tensor:
    """Standard normal input of a seed, float32."""
    values = np.random.RandomState(seed).standard_normal(tuple(shape))
    return torch.from_numpy(values.astype(np.float32))


class Goldens:
    """Condensed arrays of a golden file; see tests/data/make_goldens.py."""

    def __init__(self, path: Path) -> None:
        self._arrays = np.load(path)

    def cases(self, prefix: str) -> list[str]:
        """Names of the original files that start with a prefix."""
        return sorted({k.split('/')[0] for k in self._arrays.files if k.startswith(prefix)})

    def names(self, case: str) -> list[str]:
        """Names of the arrays of one file."""
        return [k.split('/')[1] for k in self._arrays.files if k.startswith(case + '/') and not k.endswith('/stats')]

    def assert_close(self, case: str, name: str, got: Tensor, tolerance: float, least_scale: float = 0.0) -> None:
        """Compare the kept values, the mean and the deviation of all values.

        ``tolerance`` is a fraction of the array's standard deviation, or of ``least_scale`` if that is larger.
        """
        want = self._arrays[f'{case}/{name}'].astype(np.float64)
        stride, mean, std = self._arrays[f'{case}/{name}/stats']
        values = got.detach().double().contiguous().numpy().reshape(-1)
        scale = max(std if std > 0 else max(abs(mean), 1.0), least_scale)
        sample = values[:: int(stride)][: want.size]
        assert sample.shape == want.shape, f'{case}/{name}: {got.shape} has too few values'
        error = np.abs(sample - want).max() / scale
        assert error <= tolerance, f'{case}/{name}: relative error {error:.2e}'
        assert abs(values.mean() - mean) <= tolerance * scale, f'{case}/{name}: mean'
        assert abs(values.std() - std) <= tolerance * scale, f'{case}/{name}: deviation'


def block_input(dtype: torch.dtype) -> Tensor:
    """The input of the golden training steps of one block."""
    return input_for((2, 16, 20, 24), 11).to(dtype)


def training_step(
    goldens: Goldens, case: str, block: torch.nn.Module, names: dict[str, str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Run a golden training step: forward, and backward from the golden output gradient.

    ``names`` are ours of the block's tensors by official ones.

    Yields:
        Name of a golden array and our tensor, for output, gradients and buffers.
    """
    block.to(dtype).train()
    x = block_input(dtype).requires_grad_()
    y = block(x)
    y.backward(input_for(x.shape, 12).to(dtype))
    params, buffers = dict(block.named_parameters()), dict(block.named_buffers())
    for name in goldens.names(case):
        kind, _, key = name.partition(':')
        if name == 'out':
            yield name, y
        elif name == 'grad_in':
            yield name, x.grad
        elif kind == 'grad':
            yield name, params[names[key]].grad
        elif kind == 'buf':
            yield name, buffers[names[key]]


def check_features(goldens: Goldens, case: str, model: torch.nn.Module, dtype: torch.dtype, tolerance: float) -> int:
    """Compare the maps of a whole backbone, and those before its output norms; returns their number."""
    shape = tuple(map(int, case.split('__')[1].split('x')))
    outs, stages = forward_with_stages(model, input_for(shape, {64: 1, 96: 2}[shape[2]]).to(dtype))
    names = goldens.names(case)
    for name in names:
        goldens.assert_close(case, name, (outs if name.startswith('out') else stages)[int(name[3:])], tolerance)
    return len(names)


def check_logits(goldens: Goldens, case: str, model: torch.nn.Module) -> None:
    """Compare what the official classifier makes of a backbone: LayerNorm of the average, then a linear layer."""
    _, stages = forward_with_stages(model.double(), input_for((1, 3, 224, 224), 3).double())
    shapes = {'norm.weight': (), 'norm.bias': (), 'head.weight': (1000,), 'head.bias': (1000,)}
    channels = model.dims[-1]
    weights = {k: weight_for(k, (*s, channels) if k != 'head.bias' else s).double() for k, s in shapes.items()}
    pooled = stages[3].mean((2, 3))
    pooled = F.layer_norm(pooled, (channels,), weights['norm.weight'], weights['norm.bias'], eps=1e-6)
    goldens.assert_close(case, 'pre_head', pooled, 1e-6)
    goldens.assert_close(case, 'logits', F.linear(pooled, weights['head.weight'], weights['head.bias']), 1e-6)
