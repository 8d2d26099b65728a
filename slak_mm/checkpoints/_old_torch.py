"""Reading pickles with torch before 2.6, whose own reader of weights cannot be told of further names for one call.

This file goes with the support for these versions. :class:`PickleCheck` has looked at each call and its
arguments before; here every name is looked up in a list again, and nothing is imported.
"""

from __future__ import annotations

import codecs
import os
import pickle
import types
from typing import Any, BinaryIO

import torch
from torch._weights_only_unpickler import _get_allowed_globals

from ._pickle_check import safe_names

_Base: Any = pickle._Unpickler  # type: ignore[attr-defined]  # torch derives a class from it and gives it storages


class _Unpickler(_Base):
    def find_class(self, module: str, name: str) -> Any:
        module = {'__builtin__': 'builtins'}.get(module, module)
        allowed = {**_get_allowed_globals(), '_codecs.encode': codecs.encode, 'builtins.set': set, **safe_names()}
        try:
            return allowed[f'{module}.{name}']
        except KeyError:
            raise pickle.UnpicklingError(f'{module}.{name} is not on the list of safe names') from None


_PICKLE: Any = types.ModuleType('slak_mm_listed_names')
_PICKLE.Unpickler = _Unpickler
_PICKLE.load = lambda file, **kwargs: _Unpickler(file, **kwargs).load()


def load(file: BinaryIO) -> Any:
    """Load a checkpoint with the list of names instead of Python's import."""
    # The tools forbid torch.load all but weights, which in torch's sense includes other lists.
    forced = os.environ.pop('TORCH_FORCE_WEIGHTS_ONLY_LOAD', None)
    try:
        return torch.load(file, map_location='cpu', pickle_module=_PICKLE, weights_only=False)
    finally:
        if forced is not None:
            os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = forced
