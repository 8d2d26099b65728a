"""Large-kernel backbones for OpenMMLab's segmentors and detectors.

Importing this package registers everything:
``custom_imports = dict(imports=['slak_mm'], allow_failed_imports=False)``.
"""

from . import _with_timm, engine, models
from .checkpoints import CheckpointMismatch, LoadReport, load_pretrained
from .models import switch_to_deploy
from .version import __version__

__all__ = ['CheckpointMismatch', 'LoadReport', '__version__', 'engine', 'load_pretrained', 'models', 'switch_to_deploy']

_with_timm.register_when_imported()
