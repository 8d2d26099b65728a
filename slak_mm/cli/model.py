"""Whether the parts of a model fit each other and the images, found out on a blank image."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from slak_mm._config import datasets_of, framework, model_of, type_name, walk

from .errors import ConfigOverrideError
from .size import pair

_SIZE = 64  # pixels: the smallest that leaves every stage more than one pixel


def check_channels(model: nn.Module, cfg: Config) -> None:
    """Compare neck and heads of a segmentor or detector with the backbone before anything is trained.

    One blank image goes through the parts of the model in their own order. Only what would fail in the first iteration
    is refused: a layer that gets other channels than it has weights for, or a part that fails and names another number
    of maps than it gets. The model is not changed.

    Raises:
        ConfigOverrideError: Names what the part takes, what it gets, and the setting.
    """
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, nn.Module):
        return
    parts = _Parts(model, model_of(cfg))
    handle = register_module_forward_pre_hook(parts.compare)
    try:
        with _blank(model, _SIZE, _SIZE) as image:
            _follow(model, framework(cfg), image, parts)
    finally:
        handle.remove()


def check_crop(model: nn.Module, cfg: Config) -> None:
    """Refuse crops of semantic segmentation that the backbone cannot reduce to its last stage.

    Raises:
        ConfigOverrideError: Names the crop and a size that works.
    """
    if framework(cfg) != 'mmseg':
        return
    node = model_of(cfg)
    pipelines = [dataset.get('pipeline') for _, dataset in datasets_of(cfg, ('train_dataloader',))]
    padded = pair((node.get('data_preprocessor') or {}).get('size') or 0)
    cuts = [t for t in walk(pipelines) if type_name(t) == 'RandomCrop' and t.get('crop_size')]
    crops = [tuple(map(max, pair(t.crop_size), padded)) for t in cuts]
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


class _Parts:
    """Runs parts of a model with this config, and says of those that fail whether the channels are why."""

    def __init__(self, model: nn.Module, node: ConfigDict) -> None:
        self.model, self.node = model, node
        #: The layer that was called last, the channels that it has weights for and those it got, if they differ.
        self.misfit: tuple[nn.Module, int, int] | None = None

    def compare(self, layer: nn.Module, inputs: tuple) -> None:
        """Look at what a layer is given; a hook before every layer."""
        self.misfit = None
        x = inputs[0] if inputs else None
        if isinstance(x, Tensor) and isinstance(layer, nn.modules.conv._ConvNd) and x.ndim == layer.weight.ndim:
            expected, got = layer.in_channels, x.shape[1]
        elif isinstance(x, Tensor) and isinstance(layer, nn.Linear) and x.ndim:
            expected, got = layer.in_features, x.shape[-1]
        else:
            return
        if expected != got:
            self.misfit = layer, expected, got

    def run(self, place: str, maps: Any, part: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a part that is given these maps; None if it fails for reasons of its own."""
        self.misfit = None
        try:
            return part(*arguments, **options)
        except Exception as error:
            self._explain(error, place, [int(x.shape[1]) for x in maps])
        return None

    def _explain(self, error: Exception, place: str, given: list[int]) -> None:
        """Raise a sentence about an error if it is one about channels."""
        layer = ''
        if self.misfit is not None:
            wrong, expected, got = self.misfit
            place = next((name for name, module in self.model.named_modules() if module is wrong), place)
            layer = f' ({place} has weights for {expected} channels and gets {got})'
        place, _, rest = place.partition('.')
        settings = self.node.get(place) or {}
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
            f'{place} does not fit the backbone {type_name(self.node.backbone)}: it takes maps of {declared} '
            f'channels and is given maps of {given}{layer}. In the config, set model.{place}.{advice}.'
        ) from error


def _follow(model: Any, scope: str, image: Tensor, parts: _Parts) -> None:
    """Run the parts one after the other."""
    try:
        maps = model.backbone(image)
    except Exception:  # a backbone of another kind; the run itself will tell
        return
    maps = parts.run('neck', maps, model.extract_feat, image)
    if maps is None:
        return
    auxiliary = getattr(model, 'auxiliary_head', None)
    heads = list(auxiliary) if isinstance(auxiliary, nn.ModuleList) else [auxiliary] if auxiliary is not None else []
    for index, head in enumerate(heads):
        parts.run(f'auxiliary_head.{index}', maps, head, maps)
    if scope == 'mmseg':
        parts.run('decode_head', maps, model, image, mode='tensor')
    elif scope == 'mmdet':
        _follow_detector(model, image, maps, parts)


def _follow_detector(model: Any, image: Tensor, maps: Any, parts: _Parts) -> None:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    size = tuple(image.shape[-2:])
    shapes = dict.fromkeys(('img_shape', 'batch_input_shape', 'ori_shape', 'pad_shape'), size)
    samples = [DetDataSample(metainfo=dict(shapes, scale_factor=(1.0, 1.0)))]
    if getattr(model, 'roi_head', None) is None:
        place = 'panoptic_head' if hasattr(model, 'panoptic_head') else 'bbox_head'
        parts.run(place, maps, model, image, samples, mode='tensor')
    elif parts.run('rpn_head', maps, model.rpn_head, maps) is not None:
        # One box, in place of the thousand that an untrained RPN finds.
        box = InstanceData(bboxes=image.new_tensor([[0.0, 0.0, 32.0, 32.0]]), scores=image.new_ones(1))
        parts.run('roi_head', maps, model.roi_head, maps, [box], samples)
