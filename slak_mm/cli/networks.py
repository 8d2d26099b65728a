"""Networks named on a command line: backbones of this package, of timm, and of configs."""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS
from torch import Tensor, nn

from slak_mm._config import config_names, framework, model_of
from slak_mm.checkpoints import ZOO, CheckpointNotFound, find_backbones, load_pretrained, read_checkpoint
from slak_mm.engine.hooks import load_whole_model
from slak_mm.models import registered_backbones

from .config import load_config
from .device import adapt_to_device
from .errors import ConfigOverrideError, reason
from .launch import build_model

SYNTAX = (
    '[NAME=]NETWORK[@WEIGHTS]: a zoo name, a config, a registered backbone with its arguments ("TYPE arch=small") or '
    'timm:MODEL with arguments; weights are a file, an address, a zoo name, "random", or "pretrained" for those of a '
    'zoo name or timm'
)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Network:
    """A backbone in eval mode, and how its images are normalized.

    Mean and standard deviation are of values 0 to 1, in the order of the ``channels`` that the network takes of RGB.
    """

    name: str
    model: nn.Module
    weights: str = 'random'
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    channels: tuple[int, ...] = field(default=(0, 1, 2))

    def normalize(self, image: Tensor) -> Tensor:
        """Normalize RGB images (..., 3, H, W) of values 0 to 1."""
        mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (image[..., list(self.channels), :, :] - mean) / std

    def digest(self) -> str:
        """SHA-256 of the network's layers, weights and normalization."""
        digest = hashlib.sha256(repr((self.model, self.mean, self.std, self.channels)).encode())
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def build_network(text: str, seed: int = 0) -> Network:
    """Build what :data:`SYNTAX` describes; random weights are those of the seed.

    A zoo name stands for its weights; everything else has random weights unless some are named.

    Raises:
        ConfigOverrideError: There is no such network, or an argument does not fit it.
        CheckpointError: The weights are missing or do not fit.
    """
    name, label = text, ''
    if (match := re.match(r'([^\s=@]+)=(.+)', text)) and not Path(text).exists():
        label, name = match.groups()
    spec, _, weights = name.partition('@')
    kind, *words = spec.split()
    options = _options(words, text)
    is_config = kind.endswith('.py') or (kind in config_names() and kind not in ZOO)
    if kind in ZOO and not weights:
        weights = 'pretrained'
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind.startswith('timm:'):
            network = _of_timm(kind.removeprefix('timm:'), options, weights)
        elif is_config:
            network = _of_config(kind, options, weights)
        else:
            network = _of_registry(kind, options, weights)
    network.name = label or (Path(kind).stem if is_config else spec.removeprefix('timm:'))
    network.weights = weights or 'random'
    network.model.eval()
    return network


def _options(words: list[str], text: str) -> dict[str, Any]:
    """Nested arguments of ``key=value`` words."""
    wrong = [word for word in words if not re.match(r'[\w.]+=', word)]
    if wrong:
        raise ConfigOverrideError(
            f'"{wrong[0]}" of the network "{text}" is no key=value; lists are written without spaces.'
        )
    pairs = (word.split('=', 1) for word in words)
    options = Config()
    options.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in pairs})
    return options.to_dict()


def _build(kind: str, build: Any) -> nn.Module:
    try:
        return build()
    except (ConfigOverrideError, KeyboardInterrupt):
        raise
    except Exception as error:  # constructors raise whatever they like
        raise ConfigOverrideError(f'{kind} cannot be built: {reason(error)}') from error


def _of_registry(kind: str, options: dict[str, Any], weights: str) -> Network:
    """A backbone by its zoo name or type."""
    if kind in ZOO:
        options = {**ZOO[kind].backbone, **options}
        weights = kind if weights == 'pretrained' else weights
    elif kind in registered_backbones():
        options = dict(options, type=kind)
    else:
        names = [*registered_backbones(), *ZOO]
        hint = difflib.get_close_matches(kind, names, 3, 0.5) or list(registered_backbones())
        raise ConfigOverrideError(
            f'There is no network "{kind}": did you mean {" or ".join(hint)}? Configs end in .py, and models of timm '
            'begin with "timm:".'
        )
    options.setdefault('norm_cfg', dict(type='BN'))
    model = _build(kind, lambda: MODELS.build(options))
    if weights in ('', 'random'):
        model.init_weights()  # type: ignore[operator]
    elif weights == 'pretrained':
        raise ConfigOverrideError(
            f'{kind} has no weights of its own: name a file, an address or a zoo name behind "@".'
        )
    else:
        load_pretrained(model, weights)
    return Network(kind, model)


def _of_config(path: str, options: dict[str, Any], weights: str) -> Network:
    """The backbone of a config's model."""
    cfg = load_config(path)
    cfg.merge_from_dict(options)
    cfg.pop('optim_wrapper', None)  # mixed precision is none of its business here
    adapt_to_device(cfg, has_gpu=lambda: False)
    node = model_of(cfg)
    if not node.get('backbone'):
        raise ConfigOverrideError(f'{path} describes a {node.get("type")}, which has no backbone.')
    if weights == 'pretrained':
        raise ConfigOverrideError(f'{path}: name a file, an address or a zoo name behind "@".')
    preprocessor = node.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    backbone = build_model(cfg, node.backbone)
    if weights in ('', 'random'):
        backbone.init_weights()  # type: ignore[operator]
    elif find_backbones(backbone):
        load_pretrained(backbone, weights)
    else:
        model = build_model(cfg, node)
        load_whole_model(model, read_checkpoint(weights), weights)
        backbone = model.backbone  # type: ignore[assignment]
    network = Network(framework(cfg), backbone)
    if preprocessor.get('mean') is not None:
        network.mean, network.std = (tuple(v / 255 for v in preprocessor[key]) for key in ('mean', 'std'))
    if len(network.mean) == 3 and not (preprocessor.get('bgr_to_rgb') or not preprocessor):
        network.channels = (2, 1, 0)
    return network


class _LastMap(nn.Module):
    """A network of timm that gives its last map in the order (N, C, H, W)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.num_channels = model.feature_info.channels()[-1]

    def forward(self, image: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, C, h, w)."""
        features = self.model(image)[-1]
        is_channels_last = features.shape[1] != self.num_channels and features.shape[-1] == self.num_channels
        return features.permute(0, 3, 1, 2) if is_channels_last else features


def _of_timm(kind: str, options: dict[str, Any], weights: str) -> Network:
    """A model of timm, whose weights go through timm's own conversion."""
    try:
        import timm
    except ImportError as error:
        raise ConfigOverrideError(f'{kind} is a model of timm, which is not installed: pip install timm.') from error

    if not timm.is_model(kind):
        close = difflib.get_close_matches(kind, timm.list_models(), 3)
        hint = f' Did you mean {" or ".join(close)}?' if close else ''
        raise ConfigOverrideError(f'timm {timm.__version__} has no model "{kind}".{hint}')
    options = dict(options, features_only=True, pretrained=weights not in ('', 'random'))
    if weights not in ('', 'random', 'pretrained'):
        if not Path(weights).is_file():
            raise CheckpointNotFound(f'There is no file "{weights}".')
        options.update(pretrained_cfg_overlay=dict(file=weights))
    model: Any = _build(f'timm:{kind}', lambda: timm.create_model(kind, **options))
    settings = getattr(model, 'pretrained_cfg', None) or {}
    return Network(kind, _LastMap(model), mean=settings.get('mean', _MEAN), std=settings.get('std', _STD))
