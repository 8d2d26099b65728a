"""Register the models of :mod:`slak_mm.timm_models` as soon as timm is imported, without importing it."""

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def register_when_imported() -> None:
    """Register now if timm's models are there, else right behind their import."""
    if 'timm.models' in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds ``timm.models`` where it is, and has it followed by ours."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == 'timm.models' else None
        if spec is None or spec.loader is None:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        importlib.import_module('slak_mm.timm_models')
    except ImportError as error:  # whoever wants timm shall have it
        warnings.warn(f'The models of slak_mm are not in timm: {error}. They need timm 1.0 or later.', stacklevel=2)
