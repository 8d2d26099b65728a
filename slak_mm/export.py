"""Write a network as an ONNX file, a TorchScript file or an exported program.

All three contain PyTorch's or ONNX's own operators only: they run without this package. Each file
is loaded again and compared with the network before it takes its place.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slak_mm.ops import use_backend

SUFFIXES = {'onnx': '.onnx', 'torchscript': '.pt', 'exported-program': '.pt2'}
"""Formats and the suffix of their files."""

TOLERANCE = 1e-4
"""Largest difference to the network, as a fraction of the largest value of each result."""

_ONNX_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')


class ExportError(RuntimeError):
    """The network cannot be exported, or the file does not compute the same."""


class SegmentationScores(nn.Module):
    """Class scores of an ``EncoderDecoder`` of mmsegmentation, at the size of the image.

    Normalized images (N, C, H, W) to scores (N, classes, H, W), as in its whole-image mode.

    Args:
        model: The segmentor.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Compute the scores."""
        head: Any = self.model.decode_head
        scores = head(self.model.extract_feat(images))  # type: ignore[operator]
        return F.interpolate(scores, size=images.shape[2:], mode='bilinear', align_corners=head.align_corners)


def export(
    model: nn.Module,
    path: str | Path,
    file_format: str,
    size: tuple[int, int] = (512, 512),
    dynamic: str = 'batch',
    stride: int = 32,
) -> float:
    """Export a network in eval mode, and compare the file with it.

    Args:
        model: Takes images (N, C, H, W), C being the channels of its first convolution, and
            returns a tensor or a tuple of tensors. Its weights are float32 and on the CPU.
        path: File to write; it is replaced once the new one is known to be right.
        file_format: A key of :data:`SUFFIXES`.
        size: Height and width of the images, in pixels. Default: (512, 512).
        dynamic: Which sides of the input may vary later: 'none', 'batch' or 'size' (batch,
            height and width, which must be multiples of ``stride``). Default: 'batch'.
        stride: See ``dynamic``. Default: 32.

    Returns:
        The largest difference that was found, as a fraction of the largest value.

    Raises:
        ExportError: A package is missing, the network cannot be expressed in this format, or the
            file computes something else. No file is left then, and an old one is kept.
    """
    if file_format not in SUFFIXES:
        raise ExportError(f'There is no format {file_format!r}; choose from {", ".join(SUFFIXES)}.')
    if dynamic == 'size' and (size[0] % stride or size[1] % stride or min(size) < 2 * stride):
        raise ExportError(
            f'Images of variable size must have sides that are multiples of {stride}, from '
            f'{2 * stride} on; {size[0]}x{size[1]} is not.'
        )
    write, load = _WRITERS[file_format]
    if file_format == 'onnx':
        _check_onnx()
    model.eval()
    # Two images, since a batch of one is taken for a constant by some exporters.
    channels = next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), 3)
    example = _images(1 if dynamic == 'none' else 2, channels, *size)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.export-') as folder:
        draft = os.path.join(folder, f'network{SUFFIXES[file_format]}')
        # Autograd is switched off, not the gradients of the weights: they stay parameters.
        with torch.no_grad(), use_backend('reference'):
            try:
                write(model, example, draft, dynamic, stride)
            except Exception as error:  # exporters raise what they like
                raise ExportError(
                    f'{type(model).__name__} cannot be exported as {file_format}: {_first_line(error)}{_hint(dynamic)}'
                ) from error
            difference = _worst_difference(model, load(draft), example, dynamic, stride)
        if not difference <= TOLERANCE:
            raise ExportError(
                f'The {file_format} file differs from the network by {difference:.1e} of the '
                f'largest value, more than {TOLERANCE:g}; it was not kept.{_hint(dynamic)}'
            )
        os.replace(draft, path)
    return difference


def _hint(dynamic: str) -> str:
    # Pooling to a fixed size, as in UperNet's head, is exported for one size of the image.
    return {
        'size': ' Sides that vary may be the cause: try dynamic "batch".',
        'batch': ' The varying batch may be the cause: try dynamic "none".',
    }.get(dynamic, '')


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    # torch.onnx puts the cause last, behind the steps it has gone through.
    line = lines[-1] if type(error).__module__.startswith('torch.onnx') and lines else (lines[0] if lines else '')
    return f'{type(error).__name__}: {re.sub(r"^[^A-Za-z]*", "", line)}'


def _images(n: int, channels: int, height: int, width: int) -> Tensor:
    """Standard normal images, the same in every call."""
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(0))


def _worst_difference(
    model: nn.Module, loaded: Callable[[Tensor], Sequence[Tensor]], example: Tensor, dynamic: str, stride: int
) -> float:
    """Compare on the example, and on other batches and sizes where these may vary."""
    inputs = [example]
    channels, height, width = example.shape[1:]
    if dynamic == 'batch':
        inputs = [_images(1, channels, height, width), _images(3, channels, height, width)]
    elif dynamic == 'size':
        inputs = [_images(1, channels, height, width), _images(3, channels, height + stride, width + 2 * stride)]
    worst = 0.0
    for images in inputs:
        want = model(images)
        want = (want,) if isinstance(want, Tensor) else want
        for a, b in zip(loaded(images), want, strict=True):
            if a.shape != b.shape:
                raise ExportError(
                    f'The file gives a result of shape {tuple(a.shape)} instead of '
                    f'{tuple(b.shape)} for images of {tuple(images.shape)}; it was not kept.'
                )
            difference = float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30))
            worst = difference if difference != difference else max(worst, difference)
    return worst


def _dynamic_shapes(dynamic: str, stride: int) -> tuple[dict[int, Any]] | None:
    if dynamic == 'none':
        return None
    sides: dict[int, Any] = {0: torch.export.Dim('batch', min=1, max=1024)}
    if dynamic == 'size':
        for axis, name in ((2, 'rows'), (3, 'columns')):
            sides[axis] = stride * torch.export.Dim(name, min=2, max=256)
    return (sides,)


# ------------------------------------------------------------------------------------- formats


def _check_onnx() -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f'ONNX export needs {" and ".join(missing)}: pip install {" ".join(missing)}')
    if tuple(int(part) for part in torch.__version__.split('.')[:2]) < (2, 6):
        raise ExportError(f'ONNX export needs torch 2.6 or later, this is {torch.__version__}.')


def _write_onnx(model: nn.Module, example: Tensor, path: str, dynamic: str, stride: int) -> None:
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=['images'],
        dynamic_shapes=_dynamic_shapes(dynamic, stride),
    )
    assert program is not None
    program.save(path, external_data=False)


def _load_onnx(path: str) -> Callable[[Tensor], Sequence[Tensor]]:
    runtime = importlib.import_module('onnxruntime')
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: [torch.from_numpy(y) for y in session.run(None, {'images': images.numpy()})]


def _write_torchscript(model: nn.Module, example: Tensor, path: str, dynamic: str, stride: int) -> None:
    # The comparison that follows is stricter than the one of the tracer.
    traced = torch.jit.trace(model, (example,), check_trace=False)
    torch.jit.save(torch.jit.freeze(traced), path)


def _load_torchscript(path: str) -> Callable[[Tensor], Sequence[Tensor]]:
    return _as_sequence(torch.jit.load(path))


def _write_program(model: nn.Module, example: Tensor, path: str, dynamic: str, stride: int) -> None:
    program = torch.export.export(model, (example,), dynamic_shapes=_dynamic_shapes(dynamic, stride))
    torch.export.save(program, path)


def _load_program(path: str) -> Callable[[Tensor], Sequence[Tensor]]:
    return _as_sequence(torch.export.load(path).module())


def _as_sequence(model: Callable[[Tensor], Any]) -> Callable[[Tensor], Sequence[Tensor]]:
    def run(images: Tensor) -> Sequence[Tensor]:
        results = model(images)
        return (results,) if isinstance(results, Tensor) else results

    return run


_WRITERS: dict[str, tuple[Callable[..., None], Callable[[str], Callable]]] = {
    'onnx': (_write_onnx, _load_onnx),
    'torchscript': (_write_torchscript, _load_torchscript),
    'exported-program': (_write_program, _load_program),
}
