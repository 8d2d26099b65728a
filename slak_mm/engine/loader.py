"""Let mmengine read every checkpoint with this package's reader."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

from mmengine import fileio
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import (
    _get_mmengine_home,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from slak_mm.checkpoints import CheckpointNotFound, read_checkpoint
from slak_mm.checkpoints.reader import HUB_SCHEME, SCHEMES, read_open_file
from slak_mm.checkpoints.zoo import ZOO_SCHEME

# torch.load refuses to run with both.
_SWITCHES = ('TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD')

_TABLES = {
    'torchvision': get_torchvision_models,
    'modelzoo': get_torchvision_models,
    'open-mmlab': get_external_models,
    'openmmlab': get_external_models,
    'mmcls': get_mmcls_models,
}


@contextlib.contextmanager
def safe_reader() -> Iterator[None]:
    """For a while, read with this package's reader whatever mmengine is asked to load.

    mmengine's own loaders run the code in a pickle when torch refuses it. ``torch.load`` of libraries that
    read files themselves is held to weights by torch's own switch, in processes that are started meanwhile
    too. The tools run within this context; importing the package changes nothing.
    """
    schemes, environment = dict(CheckpointLoader._schemes), {name: os.environ.pop(name, None) for name in _SWITCHES}
    for prefix in schemes:
        CheckpointLoader.register_scheme(prefix, load_from_safe_reader, force=True)
    os.environ[_SWITCHES[0]] = '1'
    try:
        yield
    finally:
        for prefix, loader in schemes.items():
            CheckpointLoader.register_scheme(prefix, loader, force=True)
        for name, value in environment.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def load_from_safe_reader(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint as :func:`slak_mm.checkpoints.read_checkpoint`, from mmengine's addresses as well.

    Args:
        filename: What :func:`read_checkpoint` takes, a name of mmengine's tables such as ``torchvision://resnet50``, or
            a file of a storage that ``mmengine.fileio`` knows.
        map_location: Not used: the tensors are on the CPU, and what takes them copies them.
    """
    filename = os.fspath(filename)
    scheme, _, name = filename.partition('://')
    if scheme in _TABLES:
        name = get_deprecated_model_names().get(name, name) if 'mmlab' in scheme else name
        address = _TABLES[scheme]().get(name)
        if address is None:
            raise CheckpointNotFound(f'mmengine has no address for {filename}: name a file or an http address.')
        # What users add to mmengine's table may be files in its folder.
        checkpoint = read_checkpoint(address if '://' in address else os.path.join(_get_mmengine_home(), address))
        if scheme == 'mmcls':  # of a classifier, for its backbone
            weights = checkpoint.get('state_dict', checkpoint)
            prefix = 'backbone.'
            checkpoint = dict(state_dict={k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)})
        return checkpoint
    if not name or filename.lower().startswith((*SCHEMES, ZOO_SCHEME)):
        return read_checkpoint(filename)
    try:
        content = fileio.get(filename)
    except Exception as error:  # whatever a backend raises
        raise CheckpointNotFound(f'{filename} cannot be read ({error}): name a file or an http address.') from error
    return read_open_file(io.BytesIO(content), filename)


def register_schemes() -> None:
    """Have mmengine load ``hf://owner/repo/file`` and ``slak_mm://<zoo name>`` wherever it takes a checkpoint."""
    CheckpointLoader.register_scheme((HUB_SCHEME, ZOO_SCHEME), load_from_safe_reader, force=True)
