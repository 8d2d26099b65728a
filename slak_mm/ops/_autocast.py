"""Autocast state, for torch 2.1 up."""

from __future__ import annotations

import torch


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type, such as ``'cpu'`` or ``'cuda'``."""
    if device_type == 'meta':
        return False
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # torch < 2.4 takes no device type
        return torch.is_autocast_cpu_enabled() if device_type == 'cpu' else (
            torch.is_autocast_enabled())


def autocast_dtype(device_type: str) -> torch.dtype:
    """The dtype that autocast computes in on a device type."""
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.get_autocast_dtype(device_type)
    return torch.get_autocast_cpu_dtype() if device_type == 'cpu' else (  # torch < 2.4
        torch.get_autocast_gpu_dtype())
