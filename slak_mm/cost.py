"""Parameters and FLOPs of backbones, segmentors and detectors, beside the published ones.

FLOPs are multiply-adds of convolutions and linear layers, as the papers count them. They are
counted by PyTorch's ``FlopCounterMode`` on the meta device, which computes shapes and no values.

Detectors with region heads are counted with 1000 proposals and, for masks, 100 boxes, as
``get_flops`` of mmdet 2 did: this gives the figures that Liu et al. publish (CVPR 2022).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from slak_mm import cli
from slak_mm._config import config_names, framework, type_name
from slak_mm.checkpoints import CONVENTIONS, PUBLISHED, ZOO, Published, prepare_checkpoint, read_checkpoint
from slak_mm.cli import ConfigOverrideError
from slak_mm.models import LargeKernelBackbone, LargeKernelLayer, switch_to_deploy
from slak_mm.models.base import num_masked
from slak_mm.ops import use_backend

__all__ = ['DEFAULT_SIZES', 'Cost', 'count', 'count_backbone', 'saved_for_backward']

#: Height and width of the image by task, as published.
DEFAULT_SIZES = dict(classification=(224, 224), segmentation=(512, 2048), detection=(800, 1280))
_PROPOSALS = dict(bbox=1000, mask=100)


@dataclass
class Cost:
    """What one network costs.

    ``flops`` are multiply-adds of one image, ``large_…`` those of the large depthwise kernels, ``masked_…`` those with
    masked weights, ``deployed_…`` those of the deployed form where the published figures count it. ``path_parameters``
    belong to parallel paths beyond the first of each large-kernel layer;
    ``filter_flops`` are those of the large kernels if the small filters that they are made up of were applied to the
    map instead, 0 for networks without them. ``parts`` are backbone, neck and heads; ``masks`` says where the masks
    are from; ``published`` is there if there are figures for this ``size`` (height, width).
    """

    name: str
    size: tuple[int, int]
    parameters: int = 0
    flops: int = 0
    masked_parameters: int = 0
    masked_large_parameters: int = 0
    masked_flops: int = 0
    large_flops: int = 0
    masked_large_flops: int = 0
    deployed_parameters: int = 0
    deployed_flops: int = 0
    path_parameters: int = 0
    filter_flops: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    masks: str = ''
    published: Published | None = None

    def as_published(self) -> tuple[int, int]:
        """Parameters and FLOPs counted in the way of :attr:`published`."""
        return CONVENTIONS[self.published.counted if self.published else 'all'].count(self)


# ---------------------------------------------------------------------------------- counting


def _count(run: Callable[[], Any]) -> tuple[int, Any]:
    """Multiply-adds of a call, and what it returned."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        result = run()
    return counter.get_total_flops() // 2, result


def _run_parts(model: Any, image: Tensor) -> Iterator[tuple[str, int]]:
    """Name and multiply-adds of each part of a model."""
    backbone, _ = _count(lambda: model.backbone(image))
    yield 'backbone', backbone
    flops, features = _count(lambda: model.extract_feat(image))
    if flops > backbone:
        yield 'neck', flops - backbone
    for name in ('decode_head', 'head', 'rpn_head', 'bbox_head'):
        head = getattr(model, name, None)
        if isinstance(head, nn.Module):
            yield name, _count(lambda head=head: head(features))[0]  # type: ignore[misc]
    for kind, num_rois in _PROPOSALS.items():
        head = getattr(getattr(model, 'roi_head', None), f'{kind}_head', None)
        if head is None:
            continue
        extractor = (
            getattr(model.roi_head, f'{kind}_roi_extractor', None) or model.roi_head.bbox_roi_extractor
        )  # shared with the boxes
        heads, extractors = (list(each) if isinstance(each, nn.ModuleList) else [each] for each in (head, extractor))
        total = 0
        for stage, head in enumerate(heads):
            source: Any = extractors[min(stage, len(extractors) - 1)]
            # Pooling has no multiply-adds that the counter knows, and cannot run without values.
            rois = torch.empty(num_rois, source.out_channels, *source.roi_layers[0].output_size, device='meta')
            total += _count(lambda head=head, rois=rois: head(rois))[0]  # type: ignore[misc]
        yield f'{kind}_head', total


def _uses(backbone: nn.Module, image: Tensor) -> dict[str, int]:
    """How often each weight is used for an image: the pixels of its layer's result, by name."""
    found: dict[str, int] = {}

    def hook(names: list[str]) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            channels = output.shape[-1 if isinstance(module, nn.Linear) else 1]
            for name in names:
                found[name] = found.get(name, 0) + output.numel() // channels

        return note

    handles = []
    inside: set[nn.Module] = set()
    for name, module in backbone.named_modules():
        names = [f'{name}.weight']
        if isinstance(module, LargeKernelLayer):
            inside.update(module.modules())
            names = [f'{name}.{own}' for own, parameter in module.named_parameters() if parameter.dim() > 2]
        elif not isinstance(module, (_ConvNd, nn.Linear)) or module in inside:
            continue
        handles.append(module.register_forward_hook(hook(names)))
    try:
        _count(lambda: backbone(image))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _measure(cost: Cost, model: Any, masked: Mapping[str, int | Tensor]) -> Cost:
    """Fill in the cost of a model on the meta device, in eval mode.

    ``masked`` has the number of zeros of weights of the backbone; for filters that large kernels are made up of,
    tensors that are zero where they are masked.
    """
    channels = next((layer.in_channels for layer in model.backbone.modules() if isinstance(layer, nn.Conv2d)), 3)
    image = torch.empty(1, channels, *cost.size, device='meta')
    cost.parts = dict(_run_parts(model, image))
    cost.flops = sum(cost.parts.values())
    cost.parameters = sum(p.numel() for p in model.parameters())
    uses = _uses(model.backbone, image)
    zeros = {name: num_masked(masked[name]) for name in uses if name in masked}
    cost.masked_parameters = sum(zeros.values())
    for name, layer in model.backbone.named_modules():
        if isinstance(layer, LargeKernelLayer):
            names = [own for own in uses if own.startswith(f'{name}.')]
            pixels = uses[names[0]]
            own_masks = {own.removeprefix(f'{name}.'): masked[own] for own in names if own in masked}
            kernel = layer.cost(own_masks)
            cost.large_flops += pixels * kernel.elements
            cost.masked_large_flops += pixels * kernel.masked_elements
            cost.filter_flops += pixels * kernel.filter_elements
            cost.path_parameters += kernel.path_parameters
            cost.masked_large_parameters += sum(zeros.pop(own, 0) for own in names)
    cost.masked_flops = cost.masked_large_flops + sum(count * uses[name] for name, count in zeros.items())
    if cost.published and CONVENTIONS[cost.published.counted].needs_deploy:
        switch_to_deploy(model)
        cost.deployed_flops = sum(flops for _, flops in _run_parts(model, image))
        cost.deployed_parameters = sum(p.numel() for p in model.parameters())
    return cost


# ------------------------------------------------------------------------------------- models


class _Classifier(nn.Module):
    """A backbone with the head that ImageNet classification puts behind it."""

    def __init__(self, backbone: Mapping[str, Any], num_classes: int = 1000) -> None:
        super().__init__()
        self.backbone = MODELS.build(dict(backbone, out_indices=(3,), out_norm=False))
        width = self.backbone.dims[-1]
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))

    def extract_feat(self, image: Tensor) -> Tensor:
        return self.backbone(image)[0].mean((2, 3))


def count(
    name: str,
    size: tuple[int, int] | None = None,
    *,
    checkpoint: str | os.PathLike | None = None,
    sparsity: float | None = None,
    distribution: str = 'uniform',
) -> Cost:
    """Count one network.

    Args:
        name: Path of a config of mmsegmentation or mmdetection, or the zoo name of an
            ImageNet checkpoint, which stands for its network.
        size: Height and width of the image. Default: that of :data:`DEFAULT_SIZES`.
        checkpoint: Take the masks from its zeros.
        sparsity: Fraction of masked weights. Default: what the config's ``SparsityHook`` says, else that of the
            published weights; 0 for networks that were trained densely and foreign backbones.
        distribution: 'uniform', the same in every layer, or 'erk' (Evci et al., ICML 2020). Default: 'uniform'.

    Returns:
        The count. ``published`` is set where there are figures for this size.

    Raises:
        ConfigOverrideError: There is no such config or zoo name, the model is of a kind that
            cannot be counted, or the sparsity does not fit it.
        CheckpointError: The checkpoint is missing or does not fit.
    """
    cfg = None
    # Checkpoints are fitted to a model that has values.
    device = torch.device('meta' if checkpoint is None else 'cpu')
    info = ZOO.get(name)
    # Some checkpoints are called like their config.
    if info is not None and info.task != 'classification' and name not in config_names():
        config = f', {Path(info.config).stem}' if info.config else ''
        raise ConfigOverrideError(f'{name} is the checkpoint of a whole model: give its config instead{config}.')
    if info is not None and info.task == 'classification':
        task, key = 'classification', name
        with device:
            model: Any = _Classifier(dict(info.backbone, norm_cfg=dict(type='BN')))
    else:
        cfg = cli.load_config(name)
        scope = framework(cfg)
        task, key = 'detection' if scope == 'mmdet' else 'segmentation', Path(name).stem
        cli.remove_weights(cfg)
        cli.adapt_to_device(cfg, has_gpu=lambda: False)
        with DefaultScope.overwrite_default_scope(scope), device:
            model = MODELS.build(cli.model_of(cfg))
    if not hasattr(model, 'backbone') or not hasattr(model, 'extract_feat'):
        raise ConfigOverrideError(f'{name} describes a {type(model).__name__}, which has no backbone to be counted.')
    model.eval()
    # Variants of a config, such as another schedule, have the figures of the config.
    published = next((PUBLISHED[stem] for stem in (key, key.rpartition('_')[0]) if stem in PUBLISHED), None)
    usual = published.size if published and published.size else DEFAULT_SIZES[task]
    cost = Cost(name, size or usual)
    cost.published = published if cost.size == usual else None
    if checkpoint is not None:
        masked = _zeros_of(model, checkpoint)
        cost.masks = f'zeros of {checkpoint}'
    else:
        if sparsity is None:
            sparsity = _usual_sparsity(model.backbone, cfg)
        masked = _drawn_masks(model.backbone, sparsity, distribution)
        cost.masks = f'sparsity {sparsity:g}, {distribution}' if sparsity else 'none'
    try:
        return _measure(cost, model.to('meta'), masked)
    except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
        raise ConfigOverrideError(
            f'{name} cannot be counted on an image of {cost.size[0]}x{cost.size[1]}: its '
            f'{type(model).__name__} does not compute its heads from the features alone, or '
            f'needs values ({cli.reason(error)}).'
        ) from error


def count_backbone(
    backbone: Mapping[str, Any], size: tuple[int, int] = DEFAULT_SIZES['classification'], *, sparsity: float = 0.0
) -> Cost:
    """Count a backbone of this package by its arguments, with the head of ImageNet classification.

    Args:
        backbone: Arguments and ``type``.
        size: Height and width of the image. Default: (224, 224).
        sparsity: Fraction of masked weights, the same in every layer. Default: 0.

    Raises:
        ConfigOverrideError: The sparsity is not from 0 to below 1.
    """
    with torch.device('meta'):
        model = _Classifier(dict(backbone, norm_cfg=dict(type='BN'))).eval()
    masks = f'sparsity {sparsity:g}, uniform' if sparsity else 'none'
    return _measure(Cost(backbone['type'], size, masks=masks), model, _drawn_masks(model.backbone, sparsity, 'uniform'))


def saved_for_backward(model: nn.Module, image: Tensor) -> int:
    """Bytes of the tensors that a forward pass in training mode keeps for the backward pass, without the weights.

    By PyTorch's functions, also for tensors without data; the fused passes on GPUs keep other ones.
    """
    own = {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}
    kept: dict[int, torch.UntypedStorage] = {}  # references, or an address could be another storage's later on

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.enable_grad(), hooks, use_backend('reference'):
        result = model.train()(image)
        del result
    return sum(storage.nbytes() for storage in kept.values())


def _zeros_of(model: nn.Module, source: str | os.PathLike) -> dict[str, int | Tensor]:
    """Zeros of the backbone's weights in a checkpoint, by the backbone's names."""
    checkpoint = read_checkpoint(source)
    report = prepare_checkpoint(model, checkpoint, source=os.fspath(source))
    state_dict = checkpoint['state_dict']
    masked: dict[str, int | Tensor] = {}
    for name, (zeros, _) in report.zeros.items():
        own = name.removeprefix('backbone.')
        masked[own] = state_dict[name] if '.filters.' in own else zeros
    return masked


def _usual_sparsity(backbone: nn.Module, cfg: Config | None) -> float:
    """The sparsity that a config's hook names, or that of the published weights."""
    for hook in cfg.get('custom_hooks') or [] if cfg is not None else []:
        if type_name(hook) == 'SparsityHook':
            named = hook.get('sparsity', (hook.get('from_scratch') or {}).get('sparsity'))
            if named is not None:
                return float(named)
    recipe = backbone.recipe if isinstance(backbone, LargeKernelBackbone) else None
    return recipe['sparsity'] if recipe else 0.0


def _drawn_masks(backbone: nn.Module, sparsity: float, distribution: str) -> dict[str, int | Tensor]:
    """As many zeros as masks of that sparsity have; whole filters where the published ones do."""
    if not 0 <= sparsity < 1:
        raise ConfigOverrideError(f'--sparsity must be from 0 to below 1, got {sparsity:g}.')
    if sparsity == 0:
        return {}
    from slak_mm import sparsity as sparse

    recipe = (backbone.recipe if isinstance(backbone, LargeKernelBackbone) else None) or {}
    chosen = sparse.select_parameters(backbone, recipe.get('selection', 'all'))
    shapes = {name: tuple(parameter.shape) for name, parameter in chosen.items()}
    densities = (
        dict.fromkeys(shapes, 1 - sparsity) if distribution == 'uniform' else sparse.erk_densities(shapes, sparsity)
    )
    if not recipe.get('per_filter'):
        return {name: round((1 - density) * chosen[name].numel()) for name, density in densities.items()}
    generator = torch.Generator().manual_seed(0)
    masked: dict[str, int | Tensor] = {}
    for names in sparse.path_groups(chosen).values():
        # All paths of a layer share the mask, which keeps or removes whole filters.
        first = shapes[names[0]]
        keep = torch.rand(first[0], 1, 1, 1, generator=generator) < densities[names[0]]
        masked.update(dict.fromkeys(names, keep.expand(first)))
    return masked
