"""Whether the parts of a model fit each other and the images, found out on a blank image."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from slak_mm._config import datasets_of, framework, model_of, type_name, walk

from .errors import ConfigOverrideError
from .size import pair

_SIZE = 64  # pixels: the smallest that leaves every stage more than one pixel


class _Mismatch(Exception):
    """A layer was given another number of channels than it has weights for."""

    def __init__(self, layer: nn.Module, expected: int, got: int) -> None:
        self.layer, self.expected, self.got = layer, expected, got


def check_channels(model: nn.Module, cfg: Config) -> None:
    """Compare neck and heads with the backbone before anything is trained.

    One blank image goes through the parts of the model in their own order. Only what would fail
    in the first iteration is refused: a layer that gets other channels than it has weights for, or
    a part that fails and names another number of maps than it gets.

    Args:
        model: A segmentor or detector, built, not wrapped. It is not changed.
        cfg: Its whole config.

    Raises:
        ConfigOverrideError: Names what the part takes, what it gets, and the setting.
    """
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, nn.Module):
        return
    handle = register_module_forward_pre_hook(_compare)
    try:
        with _blank(model, _SIZE, _SIZE) as image:
            _follow(model, cfg, image)
    finally:
        handle.remove()


def check_crop(model: nn.Module, cfg: Config) -> None:
    """Refuse crops of semantic segmentation that the backbone cannot reduce to its last stage.

    Args:
        model: A segmentor, built, not wrapped. It is not changed.
        cfg: Its whole config.

    Raises:
        ConfigOverrideError: Names the crop and a size that works.
    """
    if framework(cfg) != 'mmseg':
        return
    node = model_of(cfg)
    pipelines = [dataset.get('pipeline') for _, dataset in datasets_of(cfg, ('train_dataloader',))]
    padded = pair((node.get('data_preprocessor') or {}).get('size') or 0)
    crops = [
        tuple(map(max, pair(t.crop_size), padded))
        for t in walk(pipelines)
        if type_name(t) == 'RandomCrop' and t.get('crop_size')
    ]
    test_cfg = node.get('test_cfg') or {}
    if test_cfg.get('mode') == 'slide':
        crops.append(pair(test_cfg['crop_size']))
    for height, width in crops:
        if not _works(model, height, width):
            least = next((side for side in (32, 64, 128) if _works(model, side, side)), None)
            if least:
                raise ConfigOverrideError(
                    f'A crop of {height}x{width} pixels is too small for the backbone {type_name(node.backbone)}: '
                    f'it needs {least}x{least} (--crop-size, or crop_size in the config).'
                )


def _works(model: Any, height: int, width: int) -> bool:
    with _blank(model, height, width) as image:
        try:
            model.backbone(image)
        except Exception:
            return False
    return True


@contextlib.contextmanager
def _blank(model: nn.Module, height: int, width: int) -> Iterator[Tensor]:
    """A blank image, while the model is in eval mode and nothing is recorded or drawn."""
    weight = next((p for p in model.parameters() if p.ndim == 4), torch.zeros(1, 3, 1, 1))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield weight.new_zeros(1, weight.shape[1], height, width)
    finally:
        for module in training:
            module.training = True


def _compare(layer: nn.Module, inputs: tuple) -> None:
    """Hook before every layer."""
    x = inputs[0] if inputs else None
    if not isinstance(x, Tensor):
        return
    if isinstance(layer, nn.modules.conv._ConvNd) and x.ndim == layer.weight.ndim:
        expected, got = layer.in_channels, x.shape[1]
    elif isinstance(layer, nn.Linear) and x.ndim:
        expected, got = layer.in_features, x.shape[-1]
    else:
        return
    if expected != got:
        raise _Mismatch(layer, expected, got)


def _follow(model: Any, cfg: Config, image: Tensor) -> None:
    """Run the parts one after the other."""
    try:
        maps = model.backbone(image)
    except Exception:  # a backbone of another kind; the run itself will tell
        return
    node = model_of(cfg)

    @contextlib.contextmanager
    def part(place: str, maps: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # what else fails here is not about channels
            _explain(error, model, node, place, [int(x.shape[1]) for x in maps])

    with part('neck', maps):
        maps = model.extract_feat(image)
    heads = {
        f'auxiliary_head.{index}' if isinstance(model.auxiliary_head, nn.ModuleList) else 'auxiliary_head': head
        for index, head in enumerate(_each(getattr(model, 'auxiliary_head', None)))
    }
    for place, head in heads.items():
        with part(place, maps):
            head(maps)
    if framework(cfg) == 'mmseg':
        with part('decode_head', maps):
            model(image, mode='tensor')
    elif framework(cfg) == 'mmdet':
        _follow_detector(model, image, maps, part)


def _follow_detector(model: Any, image: Tensor, maps: Any, part: Any) -> None:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    size = tuple(image.shape[-2:])
    shapes = dict.fromkeys(('img_shape', 'batch_input_shape', 'ori_shape', 'pad_shape'), size)
    samples = [DetDataSample(metainfo=dict(shapes, scale_factor=(1.0, 1.0)))]
    if getattr(model, 'roi_head', None) is None:
        place = next(
            (name for name in ('panoptic_head', 'bbox_head', 'mask_head') if hasattr(model, name)), 'bbox_head'
        )
        with part(place, maps):
            model(image, samples, mode='tensor')
        return
    with part('rpn_head', maps):
        model.rpn_head(maps)
    # One box, in place of the thousand that an untrained RPN finds.
    box = InstanceData(bboxes=image.new_tensor([[0.0, 0.0, 32.0, 32.0]]), scores=image.new_ones(1))
    with part('roi_head', maps):
        model.roi_head(maps, [box], samples)


def _each(heads: Any) -> list[nn.Module]:
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads] if isinstance(heads, nn.Module) else []


def _explain(error: Exception, model: nn.Module, node: ConfigDict, place: str, given: list[int]) -> None:
    """Raise a sentence about an error if it is one about channels."""
    layer = ''
    if isinstance(error, _Mismatch):
        place = next((name for name, module in model.named_modules() if module is error.layer), place)
        layer = f' ({place} has weights for {error.expected} channels and gets {error.got})'
    place, _, rest = place.partition('.')
    settings = node.get(place) or {}
    if isinstance(settings, (list, tuple)):
        index = rest.partition('.')[0] if rest[:1].isdigit() else '0'
        place, settings = f'{place}.{index}', settings[int(index)]
    declared: Any = settings.get('in_channels')
    chosen: Any = settings.get('in_index', range(len(given)))
    if isinstance(declared, int) and not isinstance(chosen, int):
        chosen = -1  # as the heads of mmsegmentation do
    last = chosen if isinstance(chosen, int) else max(chosen)
    if not layer and last < len(given) and (isinstance(declared, int) or len(declared or given) == len(given)):
        return
    fitting: Any = None
    if declared is not None:
        with contextlib.suppress(IndexError):
            fitting = given[chosen] if isinstance(chosen, int) else [given[i] for i in chosen]
    is_advice = fitting is not None and fitting != (declared if isinstance(declared, int) else list(declared))
    advice = f'in_channels={str(fitting).replace(" ", "")}' if is_advice else 'in_channels, in_index and the like'
    raise ConfigOverrideError(
        f'{place} does not fit the backbone {type_name(node.backbone)}: it takes maps of {declared} channels and is '
        f'given maps of {given}{layer}. In the config, set model.{place}.{advice}.'
    ) from error
