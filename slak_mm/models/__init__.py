"""Backbones; importing this package registers them in mmengine's root registry."""

from .base import KernelCost, LargeKernelBackbone, LargeKernelLayer, registered_backbones, switch_to_deploy
from .replknet import RepLKNet
from .shiftwise import ShiftWise
from .slak import SLaK
from .unireplknet import UniRepLKNet

__all__ = [
    'KernelCost',
    'LargeKernelBackbone',
    'LargeKernelLayer',
    'RepLKNet',
    'SLaK',
    'ShiftWise',
    'UniRepLKNet',
    'registered_backbones',
    'switch_to_deploy',
]
