"""Operators: functions of tensors, with interchangeable backends."""

from .backends import BACKENDS, choose_backend, use_backend
from .cross_dwconv import cross_dwconv2d
from .pointwise import pointwise_mlp

__all__ = ['BACKENDS', 'choose_backend', 'cross_dwconv2d', 'pointwise_mlp', 'use_backend']
