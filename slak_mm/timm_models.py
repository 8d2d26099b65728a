"""Classifiers for timm: ``timm.create_model('<family>_<arch>')`` for every registered backbone.

Imported as soon as timm is (:mod:`slak_mm._with_timm`), and not before.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.model import initialize
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._features_fx import register_notrace_function, register_notrace_module
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn

from .checkpoints import convert_state_dict, join_head, load_pretrained, read_checkpoint, unwrap
from .models import LargeKernelBackbone, registered_backbones
from .models.base import prepare_images, prepare_map
from .models.layers import LayerNorm2d, RecomputableBlock

#: Defaults of each model as timm's ``register_model`` looks for them, by the model's name.
default_cfgs: dict[str, Any] = {}
#: Class and arguments of each network, by its name in timm without a tag.
NETWORKS: dict[str, tuple[type[Classifier], Mapping[str, Any]]] = {}
#: Names in timm of the published checkpoints, by their zoo names.
NAMES: dict[str, str] = {}
__all__ = ['Classifier', 'checkpoint_filter_fn', 'register']

for _layer in (RecomputableBlock, LayerNorm2d):
    register_notrace_module(_layer)
for _function in (prepare_images, prepare_map):
    register_notrace_function(_function)


class Classifier(LargeKernelBackbone):
    """A backbone with the head of its family: what timm expects of a model, by the names of official checkpoints.

    :func:`register` mixes it with the class of a backbone, whose arguments its constructor takes as well.

    Args:
        num_classes: Classes; 0 for none, which leaves the pooled and normalized features. Default: 1000.
        in_chans: Channels of the image. Default: 3.
        global_pool: 'avg', 'max', 'avgmax', 'catavgmax', or '' to keep the map. Default: 'avg'.
        drop_rate: Dropout before the linear layer. Default: 0.
        norm_cfg: Batch norms. Default: ``dict(type='BN')``, which timm itself turns into others.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        norm_cfg: dict | None = None,
        **backbone: Any,
    ) -> None:
        super().__init__(
            **backbone, in_channels=in_chans, norm_cfg=norm_cfg or dict(type='BN'), out_indices=(-1,), out_norm=False
        )
        self.num_features = self.dims[-1]
        self.in_chans = in_chans
        self.feature_info = [
            dict(num_chs=channels, reduction=4 * 2**stage, module=f'stages.{stage}')
            for stage, channels in enumerate(self.dims)
        ]
        norms = {'pool, norm': LayerNorm2d, 'norm, pool': nn.BatchNorm2d, 'pool': nn.Identity}
        self.norm = norms[self.family.head](self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        initialize(self, self.init_cfg)  # init_weights would log a line for each tensor

    # What timm asks of a model

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the parameters' names that timm's layer-wise learning rates count from the image on."""
        blocks: list[tuple[str, tuple[int, ...] | None]]
        blocks = [(r'^downsample_layers\.(\d+)', (0,)), (r'^stages\.(\d+)\.(\d+)', None)]
        if self.family.head == 'norm, pool':
            blocks.append((r'^norm', MATCH_PREV_GROUP))  # else it counts as the head
        return dict(stem=r'^downsample_layers\.0', blocks=r'^(?:stages|downsample_layers)\.(\d+)' if coarse else blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass to save memory."""
        for block in self.modules():
            if hasattr(block, 'with_cp'):
                block.with_cp = enable

    def get_classifier(self) -> nn.Module:
        """The linear layer, or an identity if there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Put a new linear layer in place.

        Args:
            num_classes: Classes; 0 for none.
            global_pool: Another pooling. Default: the one that there is.
            reset_other: Remove the norm as well. Default: False.
        """
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=False)
            if self.global_pool.feat_mult() != 1:
                raise ValueError(f'global_pool {global_pool!r} joins two poolings; choose from avg, max, avgmax and ""')
        if reset_other:
            self.norm = nn.Identity()
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            like = next(self.parameters())
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            initialize(self.head, self.init_cfg)

    @property
    def head_hidden_size(self) -> int:
        """Width of the features that the linear layer gets."""
        return self.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of stages, and what :meth:`forward_features` gives.

        Args:
            x: Images of shape (N, in_chans, H, W).
            indices: Stages; the last n for a number, None for all.
            norm: Normalize the map of the last stage where the classifier does so. Default: False.
            stop_early: Leave out the stages behind the last one of ``indices``. Default: False.
            output_fmt: 'NCHW', the only one.
            intermediates_only: Return the maps alone. Default: False.

        Returns:
            The last map and a list of those asked for, or the list alone.
        """
        assert output_fmt == 'NCHW', 'maps are NCHW'
        taken, last = feature_take_indices(len(self.stages), indices)
        x = prepare_images(x, self._smallest_image(), len(self.stages) - 1)
        maps = []
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            if stop_early and i > last:
                break
            x = stage(prepare_map(downsample(x)))
            is_normed = i == len(self.depths) - 1 and self.family.head == 'norm, pool'
            normed = self.norm(x) if is_normed and (norm or not intermediates_only) else x
            if i in taken:
                maps.append(normed if norm else x)
        return maps if intermediates_only else (normed, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages behind the last one of ``indices``, and the head; returns the numbers of the stages."""
        taken, last = feature_take_indices(len(self.stages), indices)
        is_cut = last < len(self.stages) - 1
        self.stages, self.downsample_layers = self.stages[: last + 1], self.downsample_layers[: last + 1]
        self.out_indices = (last,)
        self.num_features = self.dims[last]
        if prune_norm or is_cut:
            self.norm = nn.Identity()
        if prune_head or is_cut:
            self.reset_classifier(0, '')
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to the map that is pooled."""
        return self.forward_intermediates(x, 1)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (N, C, H, W) to logits (N, num_classes), or with ``pre_logits`` to the features before them."""
        x = self.global_pool(x)
        if self.family.head == 'pool, norm':
            x = self.norm(x)
        x = self.head_drop(x.flatten(1) if self.global_pool.pool_type else x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def complete_state_dict(self, state_dict: dict[str, Any], prefix: str = '') -> list[str]:
        """As of the backbone; and the norm of the last stage becomes ``norm``, which mmpretrain calls so."""
        remarks = super().complete_state_dict(state_dict, prefix)
        last = f'{prefix}norm{len(self.depths) - 1}.'
        if f'{prefix}head.weight' in state_dict and f'{prefix}norm.weight' not in state_dict:
            for key in [key for key in state_dict if key.startswith(last)]:
                state_dict[f'{prefix}norm.' + key[len(last) :]] = state_dict.pop(key)
        return remarks

    def load_pretrained(self, source: Any) -> None:
        """Load weights strictly; a head of other classes keeps its new values, as everywhere in timm.

        Args:
            source: A zoo name, a path or an address, see :func:`slak_mm.load_pretrained`.

        Raises:
            CheckpointError: The weights are missing, unreadable or do not fit.
        """
        if self.num_classes not in (0, self.default_cfg['num_classes']):
            weights = checkpoint_filter_fn(read_checkpoint(source))
            print_log(f'The head for {self.num_classes} classes is new: {source} has another.', 'current')
            source = {**weights, **{f'head.{key}': value for key, value in self.head.state_dict().items()}}
        load_pretrained(self, source)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of the backbone; and mmpretrain's classifiers, whose head stands beside the backbone."""
        return super().load_state_dict(join_head(state_dict), strict, assign)


class _Features(FeatureGetterNet):
    """timm's ``features_only``, which takes official files as ``checkpoint_path`` too."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors by the names of this module, of the classifier or of official checkpoints."""
        if any(key.startswith('model.') for key in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        own = self.model.state_dict()
        weights = checkpoint_filter_fn(state_dict, self.model)
        weights = {k: v for k, v in weights.items() if k in own or not k.startswith(('norm.', 'head.'))}
        return self.model.load_state_dict(weights, strict, assign)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
    """Turn an official or own checkpoint, wrapped or not, into a state dict by the names of :class:`Classifier`."""
    return convert_state_dict(join_head(unwrap(checkpoint).state_dict))[0]


def register(backbone: type[LargeKernelBackbone]) -> None:
    """Make the networks of a backbone known to timm: its named architectures, and those that have weights."""
    family = backbone.family
    kind = type(f'{backbone.__name__}Classifier', (Classifier, backbone), {'__module__': __name__})
    globals()[kind.__name__] = kind  # where pickle looks for it
    networks: dict[str, dict[str, Any]] = {
        f'{family.name}_{arch}'.lower(): dict(arch=arch) for arch in backbone.arch_settings
    }
    cfgs = {}
    for info in family.models:
        if info.task != 'classification' or info.backbone['type'] != backbone.__name__:
            continue
        name, tag = re.fullmatch(r'(.+?)_(in\d+k.*|[^_]*)', info.name).groups()  # type: ignore[union-attr]
        arguments = _beyond_defaults(backbone, info.backbone)
        if arguments.keys() == {'arch'}:
            name = f'{family.name}_{arguments["arch"]}'.lower()
        networks[name] = arguments
        NAMES[info.name] = f'{name}.{tag}'
        cfgs[f'{name}.{tag}'] = _cfg(file=info.name, custom_load=True, origin_url=info.url, **info.evaluation)
    weighted = {name.partition('.')[0] for name in cfgs}
    default_cfgs.update(generate_default_cfgs({**cfgs, **{n: _cfg() for n in networks.keys() - weighted}}))
    for name, arguments in networks.items():
        NETWORKS[name] = kind, {**family.imagenet, **arguments}
        _register(name)


def _beyond_defaults(backbone: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arch``, and the arguments of a zoo entry that are not the backbone's defaults."""
    own, common = (inspect.signature(kind).parameters for kind in (backbone, LargeKernelBackbone))
    defaults = {name: parameter.default for name, parameter in {**common, **own}.items()}
    given = {'arch': defaults['arch'], **arguments}
    return {name: v for name, v in given.items() if name == 'arch' or (name != 'type' and v != defaults[name])}


def _cfg(**entries: Any) -> dict[str, Any]:
    """The ``pretrained_cfg`` of a model; images of 224 pixels unless a checkpoint says otherwise."""
    size = entries.setdefault('input_size', (3, 224, 224))
    recipe = dict(crop_pct=0.875, interpolation='bicubic', num_classes=1000, pool_size=(size[1] // 32, size[2] // 32))
    return {**recipe, 'first_conv': 'downsample_layers.0.0', 'classifier': 'head', **entries}


def _register(name: str) -> None:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        kind, arguments = NETWORKS[name]
        return build_model_with_cfg(
            kind,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls=_Features),
            **{**arguments, **options},
        )

    create.__name__, create.__module__ = name, __name__
    create.__doc__ = f'{NETWORKS[name][0].__name__} with {NETWORKS[name][1]}.'
    register_model(create)


for _backbone in registered_backbones().values():
    register(_backbone)
