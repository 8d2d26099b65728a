"""Which Python objects a checkpoint may contain, and the reader for torch before 2.5.

``torch.load(weights_only=True)`` reads tensors and plain containers. Real checkpoints hold a
little more: official files an ``argparse.Namespace`` under ``args``, files written by
mmengine log histories and numpy values under ``message_hub``. :func:`safe_objects` lists what is
needed to read these and nothing else.

From torch 2.5 on the list is handed to ``torch.serialization.safe_globals``. Older versions
cannot extend their list for one call, so there :class:`RestrictedUnpickler` reads the pickle with
the same limits: it never looks a name up by importing it, calls nothing but listed functions and
sets the state of nothing but listed types.
"""

from __future__ import annotations

import argparse
import codecs
import functools
import importlib
import pickle
import types
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer

__all__ = ['RESTRICTED_PICKLE', 'RestrictedUnpickler', 'safe_objects']

# numpy 2 renamed the module in which pickles look for two functions. A file written under one
# version must be readable under the other.
_NUMPY_CORES = ('numpy.core.multiarray', 'numpy._core.multiarray')
_NUMPY_CORE = _NUMPY_CORES[int(np.__version__.split('.')[0]) >= 2]

# Numbers, booleans and strings; no object arrays.
_DTYPE_CHARS = '?bBhHiIlLqQefdFDSU'

_HISTORY_STATISTICS = ('min', 'max', 'current', 'mean')


def _history_statistic(owner: Any, name: Any) -> Any:
    """Stand-in for ``getattr``, which pickles use to name ``HistoryBuffer``'s own methods."""
    if owner is not HistoryBuffer or name not in _HISTORY_STATISTICS:
        raise pickle.UnpicklingError(f'Unsupported global: GLOBAL builtins.getattr was asked for {name!r} of {owner!r}')
    return getattr(HistoryBuffer, name)


def _named(function: Callable, module: str, name: str) -> Callable:
    """A copy of ``function`` that answers to another dotted name.

    torch keys its list by ``__module__`` and the name of the object. The form that gives the name
    apart from the object came only with torch 2.6.
    """

    def call(*args: Any) -> Any:
        return function(*args)

    call.__module__, call.__name__, call.__qualname__ = module, name, name
    return call


@functools.lru_cache(maxsize=1)
def safe_objects() -> tuple[Any, ...]:
    """Classes and functions that a checkpoint may refer to, beyond torch's own list.

    Returns:
        Objects in the form that ``torch.serialization.safe_globals`` takes.
    """
    core = importlib.import_module(_NUMPY_CORE)
    dtypes = {type(np.dtype(char)) for char in _DTYPE_CHARS}
    renamed = [
        _named(getattr(core, name), module, name) for module in _NUMPY_CORES for name in ('_reconstruct', 'scalar')
    ]
    # Counter: the milestones of a MultiStepLR, which torch's own list has only later.
    return (
        argparse.Namespace,
        Counter,
        HistoryBuffer,
        slice,
        np.ndarray,
        np.dtype,
        *dtypes,
        *renamed,
        _named(_history_statistic, 'builtins', 'getattr'),
    )


@functools.lru_cache(maxsize=1)
def _allowed() -> dict[str, Any]:
    """Dotted name -> object, torch's own list included."""
    from torch._weights_only_unpickler import _get_allowed_globals

    allowed = dict(_get_allowed_globals())
    for item in safe_objects():
        allowed[f'{item.__module__}.{item.__qualname__}'] = item
    allowed['_codecs.encode'] = codecs.encode  # of bytes, in pickles of protocol 2
    # Names under which pickles of protocol 2 know them.
    allowed['__builtin__.getattr'] = allowed['builtins.getattr']
    allowed['__builtin__.slice'] = slice
    allowed['__builtin__.set'] = set
    allowed['__builtin__.bytearray'] = bytearray
    return allowed


def _is_allowed(item: Any) -> bool:
    return any(item is allowed for allowed in _allowed().values())


_Base: Any = pickle._Unpickler  # type: ignore[attr-defined]  # the Python one: each step can be checked


class RestrictedUnpickler(_Base):
    """Reads a pickle without running anything that is not on the list.

    As strict as torch's own reader of weights: a name that is not listed, a call of anything
    else, a state for an unlisted type, and every opcode that could do these in another way end
    in ``pickle.UnpicklingError``.
    """

    dispatch: ClassVar[dict[int, Callable]] = dict(_Base.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        full_name = f'{module}.{name}'
        if full_name not in _allowed():
            raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {full_name} was not an allowed global by default')
        return _allowed()[full_name]

    def load_reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not _is_allowed(function):
            raise pickle.UnpicklingError(f'Trying to call reduce for unrecognized function {function!r}')
        self.stack[-1] = function(*args)

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self) -> None:
        args = self.stack.pop()
        cls = self.stack.pop()
        if not (isinstance(cls, type) and _is_allowed(cls)):
            raise pickle.UnpicklingError(f'Can only create new object for listed classes: {cls!r}')
        self.append(cls.__new__(cls, *args))

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_build(self) -> None:
        state = self.stack.pop()
        item = self.stack[-1]
        kind = type(item)
        if kind is torch.Tensor:
            item.set_(*state)
        elif kind in (OrderedDict, argparse.Namespace):
            item.__dict__.update(state)
        elif kind is torch.nn.Parameter or kind is HistoryBuffer or isinstance(item, (np.ndarray, np.dtype)):
            item.__setstate__(state)
        else:
            raise pickle.UnpicklingError(f'Can only build objects of listed types, got {kind!r}')

    dispatch[pickle.BUILD[0]] = load_build

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._check_type(list)
        self.stack[-1].extend(items)

    dispatch[pickle.APPENDS[0]] = load_appends

    def load_append(self) -> None:
        item = self.stack.pop()
        self._check_type(list)
        self.stack[-1].append(item)

    dispatch[pickle.APPEND[0]] = load_append

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._check_type(dict, OrderedDict, Counter)
        for i in range(0, len(items), 2):
            self.stack[-1][items[i]] = items[i + 1]

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._check_type(dict, OrderedDict, Counter)
        self.stack[-1][key] = value

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_additems(self) -> None:
        items = self.pop_mark()
        self._check_type(set)
        self.stack[-1].update(items)

    dispatch[pickle.ADDITEMS[0]] = load_additems

    def load_binpersid(self) -> None:
        pid = self.stack.pop()
        if not (isinstance(pid, tuple) and pid and pid[0] in ('storage', b'storage')):
            raise pickle.UnpicklingError('Only persistent_load of storage is allowed')
        self.append(self.persistent_load(pid))

    dispatch[pickle.BINPERSID[0]] = load_binpersid

    def _refuse(self) -> None:
        raise pickle.UnpicklingError('Unsupported operand')

    for _opcode in (
        pickle.INST,
        pickle.OBJ,
        pickle.NEWOBJ_EX,
        pickle.EXT1,
        pickle.EXT2,
        pickle.EXT4,
        pickle.PERSID,
        pickle.BYTEARRAY8,
        pickle.NEXT_BUFFER,
        pickle.READONLY_BUFFER,
    ):
        dispatch[_opcode[0]] = _refuse
    del _opcode

    def _check_type(self, *kinds: type) -> None:
        if type(self.stack[-1]) not in kinds:
            raise pickle.UnpicklingError(f'Cannot add items to {type(self.stack[-1])!r}')


def _load(file: Any, **kwargs: Any) -> Any:
    return RestrictedUnpickler(file, **kwargs).load()


#: What ``torch.load`` takes as ``pickle_module``.
RESTRICTED_PICKLE = types.ModuleType('slak_mm_restricted_pickle')
RESTRICTED_PICKLE.Unpickler = RestrictedUnpickler  # type: ignore[attr-defined]
RESTRICTED_PICKLE.load = _load  # type: ignore[attr-defined]
RESTRICTED_PICKLE.UnpicklingError = pickle.UnpicklingError  # type: ignore[attr-defined]
