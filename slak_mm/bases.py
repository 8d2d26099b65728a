"""Where an installed OpenMMLab framework keeps its base configs, and this package its own."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def own_folder() -> Path:
    """The folder with this package's ``model-index.yml`` and ``configs``.

    In an installed package that is ``slak_mm/.mim``, where OpenMMLab's packages have theirs; in a checkout, the
    checkout.
    """
    package = Path(__file__).resolve().parent
    index = package / '.mim' / 'model-index.yml'  # in an editable install, a link to that of the checkout
    return index.resolve().parent if index.is_file() else package.parent


def benchmark(name: str) -> ModuleType:
    """Import a module of ``benchmarks``, which is beside the configs."""
    if str(own_folder()) not in sys.path:
        sys.path.insert(0, str(own_folder()))
    return importlib.import_module(f'benchmarks.{name}')


def framework_configs(package: str, *names: str) -> list[str]:
    """Absolute paths of base configs that an installed framework, 'mmseg' or 'mmdet', ships in ``configs/_base_``.

    ``_base_ = ['mmseg::_base_/...']`` asks for a *distribution* called ``mmsegmentation`` and so fails beside the
    ``onedl-mmsegmentation`` build, whose import name is the same. This function asks the import system instead and
    works with both. In a config::

        _base_ = __import__('slak_mm.bases', fromlist=['_']).framework_configs(
            'mmseg', 'datasets/ade20k.py', 'default_runtime.py')

    Raises:
        ImportError: The package is not installed.
        FileNotFoundError: It is installed but has no such base config.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f'This config inherits from the configs of "{package}", which is not installed in '
            f'this Python environment; install it (see "Set-up" in the README).'
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    # A wheel carries its configs in <package>/.mim, a development install in <checkout>/configs.
    folders = [root / '.mim' / 'configs' / '_base_', root.parent / 'configs' / '_base_']
    paths = []
    for name in names:
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f'The installed "{package}" ({root}) has no base config "{name}" '
                f'(looked in {" and ".join(str(folder) for folder in folders)}).'
            )
        paths.append(str(found))
    return paths
