"""Backbones; importing this package registers them in mmengine's root registry."""

from .base import LargeKernelBackbone, switch_to_deploy
from .shiftwise import ShiftWise
from .slak import SLaK

__all__ = ['LargeKernelBackbone', 'SLaK', 'ShiftWise', 'switch_to_deploy']
