"""Operators: functions of tensors, with interchangeable backends."""

from .backends import BACKENDS, choose_backend, use_backend
from .cross_dwconv import cross_dwconv2d

__all__ = ['BACKENDS', 'choose_backend', 'cross_dwconv2d', 'use_backend']
