"""Learning-rate decay over the depth of a large-kernel backbone."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Sequence
from typing import Any

from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
from torch import nn

from slak_mm._config import walk
from slak_mm._tables import table
from slak_mm.models import LargeKernelBackbone

_DECAY_TYPES = ('layer_wise', 'stage_wise')
_OWN_KEYS = ('decay_rate', 'decay_type', 'num_layers')
_MMENGINE_KEYS = (
    'custom_keys',
    'bias_lr_mult',
    'bias_decay_mult',
    'norm_decay_mult',
    'dwconv_decay_mult',
    'flat_decay_mult',
    'dcn_offset_lr_mult',
    'bypass_duplicate',
)


def _check_keys(place: str, given: dict, known: Sequence[str]) -> None:
    for key in set(given) - set(known):
        close = difflib.get_close_matches(key, known, 1)
        raise ValueError(
            f'{place} has the unknown key {key!r}; '
            + (f'did you mean {close[0]!r}?' if close else f'it takes {", ".join(known)}')
        )


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LargeKernelLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Smaller learning rates for the layers nearer to the image.

    The learning rate of a parameter with layer number ``id`` is the base rate times
    ``decay_rate ** (num_layers + 1 - id)``, and its layer number is

    ================== ====================== ==============
    parameter          layer_wise             stage_wise
    ================== ====================== ==============
    downsampling 0     0                      0
    stage 0            1                      1
    downsampling 1     2                      0
    stage 1            2                      2
    downsampling 2     3                      0
    stage 2, block j   3 + j // 3             3
    downsampling 3     num_layers             0
    stage 3            num_layers             4
    output norms, rest num_layers + 1         num_layers + 1
    ================== ====================== ==============

    as in the official downstream code; a family may number its layers in another way, see
    :meth:`slak_mm.models.LargeKernelBackbone.layer_id`. Weight decay is off for one-dimensional
    parameters and biases, unless the options of mmengine's ``DefaultOptimWrapperConstructor`` say
    otherwise, all of which work here too: its factors multiply the decayed rate.
    ``custom_keys=dict(decode_head=dict(lr_mult=10))`` trains the decoder ten times as fast and leaves
    its weight decay alone; ``decay_mult`` changes that.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper, with ``optimizer.lr``.
        paramwise_cfg: ``decay_rate`` in (0, 1]; ``decay_type``, 'layer_wise' (default) or
            'stage_wise'; ``num_layers``, by default 3 plus a third of the depth of stage 2,
            rounded up (6, 9, 12 for the depths 9, 18, 27); and the options of
            ``DefaultOptimWrapperConstructor``.

    Raises:
        ValueError: An option is unknown or out of its range, or the learning rate, or a weight
            decay to multiply, is missing.
        TypeError: The model does not contain exactly one backbone of this package.
    """

    optimizer_cfg: dict[str, Any]

    def _validate_cfg(self) -> None:
        cfg = self.paramwise_cfg
        _check_keys('paramwise_cfg', cfg, (*_OWN_KEYS, *_MMENGINE_KEYS))
        kind = self.optimizer_cfg['type']
        if isinstance(kind, str):
            kind = OPTIMIZERS.get(kind)
        settings = list(inspect.signature(kind).parameters) if kind is not None else []
        for name, custom in cfg.get('custom_keys', {}).items():
            _check_keys(f'paramwise_cfg.custom_keys.{name}', custom, ('lr_mult', 'decay_mult', *settings))
        if not 0 < cfg.get('decay_rate', 0) <= 1:
            raise ValueError(f'paramwise_cfg.decay_rate must lie in (0, 1], got {cfg.get("decay_rate")}')
        if cfg.get('decay_type', 'layer_wise') not in _DECAY_TYPES:
            raise ValueError(
                f'paramwise_cfg.decay_type must be one of {", ".join(_DECAY_TYPES)}, got {cfg["decay_type"]!r}'
            )
        if self.base_lr is None:
            raise ValueError('optimizer.lr must be given: the decay multiplies it')
        multiplied = [key for node in walk(dict(cfg)) for key in node if str(key).endswith('decay_mult')]
        if multiplied and self.base_wd is None:
            raise ValueError(f'optimizer.weight_decay must be given: {multiplied[0]} multiplies it')
        # Plain dicts, which the optimizer's groups then are as well: torch.compile cannot trace others.
        self.optimizer_cfg = dict(self.optimizer_cfg)

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Append the parameter groups of a model.

        Args:
            params: Receives the groups.
            module: The model, which contains a backbone of this package.
            **kwargs: What mmengine hands to nested calls; not used.
        """
        found = [(n, m) for n, m in module.named_modules() if isinstance(m, LargeKernelBackbone)]
        if len(found) != 1:
            raise TypeError(
                f'{type(self).__name__} needs a model with exactly one backbone of slak_mm, but '
                f'{type(module).__name__} has {len(found)}; choose another optim_wrapper.constructor'
            )
        name, backbone = found[0]
        prefix = name + '.' if name else ''
        num_layers = self._num_layers(backbone)
        decay_type = self.paramwise_cfg.get('decay_type', 'layer_wise')
        decay_rate = self.paramwise_cfg['decay_rate']

        ruled = self._mmengine_groups(module)
        groups: dict[tuple, dict] = {}
        for param_name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            own_name = param_name[len(prefix) :] if param_name.startswith(prefix) else ''
            layer = backbone.layer_id(own_name, num_layers, decay_type)
            settings, custom = dict(ruled[param]), self._custom_key(param_name)
            if custom and 'decay_mult' not in settings:  # mmengine would turn it on
                settings.pop('weight_decay', None)
            decayed = param.ndim > 1 and not param_name.endswith('.bias')
            if not decayed:
                settings.setdefault('weight_decay', 0.0)
            decayed = bool(settings.get('weight_decay', 1))
            lr, scale = settings.get('lr', self.base_lr), decay_rate ** (num_layers + 1 - layer)
            settings.update(lr=lr * scale, lr_scale=lr / self.base_lr * scale if self.base_lr else scale)
            key = (layer, decayed, custom, repr(settings))
            if key not in groups:
                name = f'layer_{layer}_{"decay" if decayed else "no_decay"}' + (f'_{custom}' if custom else '')
                groups[key] = dict(settings, params=[], param_names=[], group_name=name)
            groups[key]['params'].append(param)
            groups[key]['param_names'].append(param_name)
        ordered = [groups[key] for key in sorted(groups)]
        params.extend(ordered)
        print_log(
            f'{decay_type} learning-rate decay {decay_rate}, num_layers {num_layers}:\n{self._table(ordered)}',
            logger='current',
        )

    def _mmengine_groups(self, module: nn.Module) -> dict[nn.Parameter, dict]:
        """Settings of each parameter by the rules of mmengine's own constructor."""
        rules = dict.fromkeys(('norm_decay_mult', 'bias_decay_mult', 'flat_decay_mult'), 0.0)
        rules.update({key: value for key, value in self.paramwise_cfg.items() if key not in _OWN_KEYS})
        optimizer = dict(self.optimizer_cfg, weight_decay=self.base_wd or 0.0)
        groups: list[dict] = []
        logger = MMLogger.get_current_instance()
        level = logger.level
        logger.setLevel(logging.ERROR)  # it has a line for each parameter, where a table follows here
        try:
            DefaultOptimWrapperConstructor(dict(optimizer=optimizer), rules).add_params(groups, module)
        finally:
            logger.setLevel(level)
        return {group.pop('params')[0]: group for group in groups}

    def _custom_key(self, name: str) -> str:
        """The key of ``custom_keys`` that a parameter's name contains, the longest; '' without any."""
        keys = sorted(self.paramwise_cfg.get('custom_keys', {}))
        return max((key for key in keys if key in name), key=len, default='')

    def _num_layers(self, backbone: LargeKernelBackbone) -> int:
        least = backbone.num_layers()
        num_layers = self.paramwise_cfg.get('num_layers', least)
        layer_wise = self.paramwise_cfg.get('decay_type', 'layer_wise') == 'layer_wise'
        if num_layers < (least if layer_wise else 4):
            raise ValueError(
                f'paramwise_cfg.num_layers is {num_layers}, but a stage 2 of {backbone.depths[2]} blocks '
                f'needs at least {least if layer_wise else 4}'
            )
        return num_layers

    def _table(self, groups: list[dict]) -> str:
        rows = [('group', 'lr', 'lr scale', 'weight decay', 'tensors', 'parameters')]
        for group in groups:
            rate, decay = f'{group["lr"]:.3g}', f'{group.get("weight_decay", self.base_wd or 0):g}'
            counts = str(len(group['params'])), f'{sum(p.numel() for p in group["params"]):,}'
            rows.append((group['group_name'], rate, f'{group["lr_scale"]:.4f}', decay, *counts))
        return table(rows, markdown=False)
