"""Let the frameworks' inferencers find this package's models by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from mmengine.infer.infer import BaseInferencer

from slak_mm.bases import own_folder
from slak_mm.checkpoints import ZOO
from slak_mm.checkpoints.zoo import ZOO_SCHEME

_of_frameworks = BaseInferencer._get_models_from_metafile


def own_models() -> Iterator[dict[str, Any]]:
    """Entries of this package's metafiles, with the path of the config and weights that mmengine can load.

    ``Weights`` is None where none were published: the inferencer then says that its weights are random.
    """
    folder = own_folder()
    published = {info.config: f'{ZOO_SCHEME}{info.name}' for info in ZOO.values() if info.config and info.url}
    for metafile in yaml.safe_load((folder / 'model-index.yml').read_text())['Import']:
        for entry in yaml.safe_load((folder / metafile).read_text())['Models']:
            config = folder / entry['Config']
            # By name, not by address: it is kept under a name of its own and read with this package's reader.
            yield {**entry, 'Config': str(config), 'Weights': published.get(config.name)}


def _models(dir: str) -> Iterator[dict[str, Any]]:
    yield from own_models()
    yield from _of_frameworks(dir)


def register_models() -> None:
    """Add this package's models to those that ``MMSegInferencer`` and ``DetInferencer`` know by name.

    mmengine looks in the one package of the inferencer's scope and has no registry for others. That scope cannot be
    this package, since modules are looked up in the same scope. Called when the package is imported; a name of the
    frameworks is found as before.
    """
    BaseInferencer._get_models_from_metafile = staticmethod(_models)
