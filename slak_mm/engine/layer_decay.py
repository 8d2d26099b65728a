"""Learning-rate decay over the depth of a large-kernel backbone."""

from __future__ import annotations

from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from slak_mm.models import LargeKernelBackbone

_DECAY_TYPES = ('layer_wise', 'stage_wise')


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
    parameters and biases.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper, with ``optimizer.lr``.
        paramwise_cfg: ``decay_rate`` in (0, 1]; ``decay_type``, 'layer_wise' (default) or
            'stage_wise'; ``num_layers``, by default 3 plus a third of the depth of stage 2,
            rounded up (6, 9, 12 for the depths 9, 18, 27).

    Raises:
        ValueError: An option is unknown or out of its range, or the learning rate is missing.
        TypeError: The model does not contain exactly one backbone of this package.
    """

    def _validate_cfg(self) -> None:
        cfg = self.paramwise_cfg
        unknown = set(cfg) - {'decay_rate', 'decay_type', 'num_layers'}
        if unknown:
            raise ValueError(
                f'paramwise_cfg of {type(self).__name__} has the unknown keys {sorted(unknown)}; '
                'it takes decay_rate, decay_type and num_layers'
            )
        if not 0 < cfg.get('decay_rate', 0) <= 1:
            raise ValueError(f'paramwise_cfg.decay_rate must lie in (0, 1], got {cfg.get("decay_rate")}')
        if cfg.get('decay_type', 'layer_wise') not in _DECAY_TYPES:
            raise ValueError(
                f'paramwise_cfg.decay_type must be one of {", ".join(_DECAY_TYPES)}, got {cfg["decay_type"]!r}'
            )
        if self.base_lr is None:
            raise ValueError('optimizer.lr must be given: the decay multiplies it')

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

        groups: dict[tuple[int, bool], dict] = {}
        for param_name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            own_name = param_name[len(prefix) :] if param_name.startswith(prefix) else ''
            layer = backbone.layer_id(own_name, num_layers, decay_type)
            decayed = param.ndim > 1 and not param_name.endswith('.bias')
            if (layer, decayed) not in groups:
                scale = decay_rate ** (num_layers + 1 - layer)
                groups[layer, decayed] = dict(
                    params=[],
                    param_names=[],
                    lr=self.base_lr * scale,
                    lr_scale=scale,
                    group_name=f'layer_{layer}_{"decay" if decayed else "no_decay"}',
                )
                if not decayed:
                    groups[layer, decayed]['weight_decay'] = 0.0
            groups[layer, decayed]['params'].append(param)
            groups[layer, decayed]['param_names'].append(param_name)
        ordered = [groups[key] for key in sorted(groups)]
        params.extend(ordered)
        print_log(
            f'{decay_type} learning-rate decay {decay_rate}, num_layers {num_layers}:\n{self._table(ordered)}',
            logger='current',
        )

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
            rows.append(
                (
                    group['group_name'],
                    f'{group["lr"]:.3g}',
                    f'{group["lr_scale"]:.4f}',
                    f'{group.get("weight_decay", self.base_wd or 0):g}',
                    str(len(group['params'])),
                    f'{sum(p.numel() for p in group["params"]):,}',
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return '\n'.join(
            '  '.join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in rows
        )
