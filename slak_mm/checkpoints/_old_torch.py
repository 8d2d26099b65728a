"""Reading pickles with torch before 2.6, whose own reader of weights cannot be told of further names for one call.

This file goes with the support for these versions. :class:`PickleCheck` has looked at each call and its
arguments before; here every name is looked up in a list again, and nothing is imported.
"""

from __future__ import annotations

import codecs
import pickle
import types
from typing import Any

from torch._weights_only_unpickler import _get_allowed_globals

from ._safe_names import safe_names

__all__ = ['LISTED_NAMES_ONLY']

_Base: Any = pickle._Unpickler  # type: ignore[attr-defined]  # torch derives a class from it and gives it storages


class _Unpickler(_Base):
    def find_class(self, module: str, name: str) -> Any:
        module = {'__builtin__': 'builtins'}.get(module, module)
        allowed = {**_get_allowed_globals(), '_codecs.encode': codecs.encode, 'builtins.set': set, **safe_names()}
        try:
            return allowed[f'{module}.{name}']
        except KeyError:
            raise pickle.UnpicklingError(f'{module}.{name} is not on the list of safe names') from None


#: What ``torch.load`` takes as ``pickle_module``.
LISTED_NAMES_ONLY = types.ModuleType('slak_mm_listed_names_only')
LISTED_NAMES_ONLY.Unpickler = _Unpickler  # type: ignore[attr-defined]
LISTED_NAMES_ONLY.load = lambda file, **kwargs: _Unpickler(file, **kwargs).load()  # type: ignore[attr-defined]
LISTED_NAMES_ONLY.UnpicklingError = pickle.UnpicklingError  # type: ignore[attr-defined]
