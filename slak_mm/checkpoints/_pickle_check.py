"""Read the pickle of a checkpoint without building anything of it, and refuse what must not be built.

Real checkpoints hold tensors, plain containers and a little more: some official files an ``argparse.Namespace`` under
``args``, files written by mmengine log histories and numpy values under ``message_hub``. :class:`PickleCheck` knows
each function that these call and the arguments it may get. Whatever else a file asks for is refused by name. So is
what would cost more than the file is large: a size without the data for it, or parts that are used over and over.
"""

from __future__ import annotations

import _compat_pickle
import functools
import importlib
import math
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, BinaryIO, ClassVar, NoReturn

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer

from .errors import CheckpointUnreadable, UnsafeCheckpoint, shown

_HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
_HISTORY_STATISTICS = ('min', 'max', 'current', 'mean')
# numpy 2 renamed the module; a file written under one version must be readable under the other.
_NUMPY_CORES = ('numpy.core.multiarray', 'numpy._core.multiarray')

# Bytes per element of the storages that torch.save names.
_WIDTHS = dict(
    Untyped=1, Bool=1, Byte=1, Char=1, Short=2, Half=2, BFloat16=2, Int=4, Float=4, Long=8, Double=8, ComplexFloat=8,
    ComplexDouble=16,
)  # fmt: skip
_STORAGES = {f'torch.{name}Storage': width for name, width in _WIDTHS.items()} | {'torch.storage.UntypedStorage': 1}

# Tensors that are no dense block of numbers: what to do before they are saved.
_REMEDIES = {
    'sparse': 'save its .to_dense()',
    'quantized': 'save its .dequantize(), or the model before quantization',
    'nested': 'save its parts, as .unbind() gives them',
    'meta': 'it has a shape and no data: save the model after its weights were loaded',
    'distributed': 'save its .full_tensor() or .cpu()',
}
_TENSORS_REFUSED = {
    'torch._utils._rebuild_sparse_tensor': 'sparse',
    'torch._utils._rebuild_sparse_csr_tensor': 'sparse',
    'torch._utils._rebuild_qtensor': 'quantized',
    'torch._utils._rebuild_nested_tensor': 'nested',
    'torch.nested._internal.nested_tensor._rebuild_njt': 'nested',
    'torch._utils._rebuild_meta_tensor_no_storage': 'meta',
    'torch._utils._rebuild_wrapper_subclass': 'distributed',
    'torch._utils._rebuild_device_tensor_from_numpy': 'distributed',
    'torch._utils._rebuild_device_tensor_from_cpu_tensor': 'distributed',
    'torch.distributed.tensor.DTensor': 'distributed',
    'torch.distributed._tensor.api.DTensor': 'distributed',
}

# Numbers, booleans and strings; no objects, and nothing composed.
_DTYPE = re.compile(r'[biufcSU?]\d{0,9}')

# Looked up, but not called.
_PASSIVE = {'numpy.ndarray', 'torch.Tensor', 'torch.nn.parameter.Parameter', *_STORAGES}

# What torch.save writes and torch.load(weights_only=True) reads.
_OPCODES = {
    getattr(pickle, name)[0]
    for name in (
        'APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINUNICODE BUILD EMPTY_DICT '
        'EMPTY_LIST EMPTY_SET EMPTY_TUPLE GLOBAL LONG1 LONG_BINGET LONG_BINPUT MARK NEWFALSE NEWOBJ NEWTRUE NONE '
        'PROTO REDUCE SETITEM SETITEMS SHORT_BINSTRING STOP TUPLE TUPLE1 TUPLE2 TUPLE3'
    ).split()
}

# How many times its own size a file may unfold to, what the calls in a pickle may handle, and what the smallest may.
_UNFOLDING, _HANDLING, _FREE = 16, 4, 1_000_000
# What an entry of a container weighs beside a byte of text; a pickle spends as much on it.
_ENTRY = 8


def kind_of_tensor(tensor: torch.Tensor) -> str:
    """Kind of a tensor that is no dense block of numbers with data, else ''."""
    if tensor.is_nested:
        return 'nested'
    if tensor.layout is not torch.strided:
        return 'sparse'
    if tensor.is_quantized:
        return 'quantized'
    if tensor.device.type == 'meta':
        return 'meta'
    return '' if type(tensor) in (torch.Tensor, torch.nn.Parameter) else 'distributed'


def unusable(what: str, kind: str) -> CheckpointUnreadable:
    """The error for a tensor of a kind that no weight can have."""
    name = 'a tensor of a class of its own' if kind == 'distributed' else f'a {kind} tensor'
    return CheckpointUnreadable(f'{what} {name}, which is no weight of a network here: {_REMEDIES[kind]}.')


class _Name(str):
    """Stands for what a dotted name means."""


class _Made:
    """Stands for the result of a call: its kind, its bytes, and what it was given later."""

    def __init__(self, kind: str, nbytes: int = 0, parts: Any = (), width: int = 1) -> None:
        self.kind, self.nbytes, self.width = kind, nbytes, width
        self.parts = list(parts)


_Base: Any = pickle._Unpickler  # type: ignore[attr-defined]  # the one in Python: each step can be replaced


class PickleCheck(_Base):
    """Follows a pickle with stand-ins for all that it describes.

    Args:
        file: Where the pickle begins; afterwards, where it ended.
        name: The file's, for messages.
        size: Bytes of the whole file.
        storages: Bytes of each storage by its key; None where they follow the pickle.

    Attributes:
        needed: Bytes of each storage that the pickle refers to.
    """

    dispatch: ClassVar[dict[int, Callable]] = {}

    def __init__(self, file: BinaryIO, name: str, size: int, storages: Mapping[str, int] | None = None) -> None:
        # A file takes the memory for all that it is asked for, however little it has.
        bounded = SimpleNamespace(read=lambda count: file.read(min(count, size)), readline=file.readline)
        super().__init__(bounded, encoding='bytes')
        self.file, self.name, self.size, self.storages = file, name, size, storages
        self.needed: dict[str, int] = {}
        self.start, self.spent = file.tell(), 0

    def check(self) -> Any:
        """Follow the pickle to its end.

        Returns:
            What it describes, with stand-ins for all but plain containers and values.

        Raises:
            UnsafeCheckpoint: It asks for something that is not known to be harmless.
            CheckpointUnreadable: It is damaged, or unfolds to far more than the file holds.
        """
        try:
            content = self.load()
            if _unfolded(content, {}) > _UNFOLDING * self.size + _FREE:
                raise self.repeats()
        except (CheckpointUnreadable, UnsafeCheckpoint):
            raise
        except RecursionError as error:
            raise CheckpointUnreadable(f'{self.name} is damaged: it is nested without end. Get it again.') from error
        except MemoryError as error:
            raise CheckpointUnreadable(f'There is not enough memory to read {self.name}, or it is damaged.') from error
        except Exception as error:  # a damaged pickle can end in almost any exception
            reason = shown(str(error)) if str(error) else 'it ends in the middle'
            raise CheckpointUnreadable(f'{self.name} is truncated or damaged ({reason}). Get it again.') from error
        return content

    def unsafe(self, wanted: str) -> UnsafeCheckpoint:
        return UnsafeCheckpoint(
            f'{self.name} was refused: reading it would run code that it asks for ({shown(wanted)} is not on the list '
            'of safe names). If you trust its origin, read it once in an isolated environment with torch.load(..., '
            'weights_only=False) and save only its state dict with torch.save({"state_dict": ...}, new_file).',
            wanted,
        )

    def refuse_format(self) -> NoReturn:
        raise CheckpointUnreadable(
            f'{self.name} is damaged or in a pickle format that torch does not write. Get it again, or save it anew '
            'with torch.save.'
        )

    def repeats(self) -> CheckpointUnreadable:
        return CheckpointUnreadable(
            f'{self.name} was refused: it repeats its parts so often that reading it would take far more memory '
            f'than its {self.size} bytes. No training writes such a file; get it from another place.'
        )

    def require(self, condition: bool, reason: str) -> None:
        if not condition:
            raise CheckpointUnreadable(f'{self.name} is truncated or damaged: {reason}. Get it again.')

    def spend(self, *values: Any) -> None:
        """Count what a call copies; a few bytes of a pickle can call for a large part of it again."""
        self.spent += _extent(values, 3)
        if self.spent > _HANDLING * (self.file.tell() - self.start) + _FREE:
            raise self.repeats()

    # What the opcodes do.

    def find_class(self, module: str, name: str) -> Any:
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        full = f'{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}'
        if full in _TENSORS_REFUSED:
            raise unusable(f'{self.name} holds', _TENSORS_REFUSED[full])
        is_dtype = module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)
        if not (full in _CALLS or full in _PASSIVE or full in (_HISTORY, 'argparse.Namespace') or is_dtype):
            raise self.unsafe(full)
        return _Name(full)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def call(self, function: Any, args: Any) -> Any:
        if type(function) is not _Name or function not in _CALLS:
            raise self.unsafe(function if isinstance(function, str) else getattr(function, 'kind', 'a value'))
        self.require(type(args) is tuple, f'{function} is called without arguments')
        self.spend(args)
        return _CALLS[function](self, *args)

    def load_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not _Name or kind not in (_HISTORY, 'argparse.Namespace') or args != ():
            raise self.unsafe(kind if isinstance(kind, str) else 'a value')
        self.append(_Made(kind))

    def load_build(self) -> None:
        state = self.stack.pop()
        item = self.stack[-1]
        self.spend(state)
        kind = 'dict' if type(item) is OrderedDict else getattr(item, 'kind', '')
        if kind in ('dict', _HISTORY, 'argparse.Namespace'):
            self.require(type(state) is dict and all(type(key) is str for key in state), 'attributes without names')
        elif kind == 'array':
            self.require(type(state) is tuple and len(state) == 5, 'an array of numpy has another state')
            _, shape, dtype, _, data = state
            self.require(getattr(dtype, 'kind', '') == 'dtype', 'an array of numpy is without dtype')
            self.require(isinstance(data, (bytes, str)) or getattr(data, 'kind', '') == 'bytes', 'it has objects')
            self.require(math.prod(shape) <= _extent(data, 0), 'an array of numpy has a size without data')
        elif kind == 'dtype':
            is_plain = type(state) is tuple and all(part is None or type(part) in (int, str) for part in state)
            self.require(is_plain, 'a dtype of numpy has another state')
        else:
            raise self.unsafe(f'the state of {kind or "a value"}')
        if isinstance(item, _Made):
            item.parts.append(state)

    def persistent_load(self, pid: Any) -> _Made:
        length = 6 if self.storages is None else 5
        self.require(type(pid) is tuple and len(pid) == length and pid[0] in ('storage', b'storage'), 'foreign id')
        _, kind, key, _, count, *view = pid
        key = key.decode('ascii') if isinstance(key, bytes) else key
        self.require(kind in _STORAGES and type(key) is str and type(count) is int and count >= 0, 'a storage is odd')
        nbytes = count * _STORAGES[kind]
        room = self.size if self.storages is None else self.storages.get(key, -1)
        self.require(nbytes <= room, f'storage {shown(key)} has {max(room, 0)} bytes instead of {nbytes}')
        self.require(self.needed.setdefault(key, nbytes) == nbytes, f'storage {shown(key)} has two sizes')
        self.require(view in ([], [None]), 'it has views of storages, which torch wrote before 0.4')
        if self.storages is None and kind == 'torch.storage.UntypedStorage':
            raise CheckpointUnreadable(
                f'{self.name} has a type of numbers that torch cannot read from its older format: save it anew, '
                'without _use_new_zipfile_serialization=False.'
            )
        return _Made('storage', nbytes, width=_STORAGES[kind])

    # What the functions of a checkpoint make of their arguments.

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = None) -> _Made:
        self.require(getattr(storage, 'kind', '') == 'storage', 'a tensor is without storage')
        numbers = (offset, *size, *stride)
        self.require(len(size) == len(stride) and all(type(n) is int and n >= 0 for n in numbers), 'a shape is odd')
        width = storage.width if dtype is None else getattr(torch, dtype.removeprefix('torch.')).itemsize
        end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride)) if all(size) else 0
        count = math.prod(size)
        self.require(
            max(end, count) * width <= storage.nbytes,
            f'a tensor of shape {shown(list(size))} is larger than its storage of {storage.nbytes} bytes; a tensor '
            'that was expanded is saved as .clone()',
        )
        return _Made('tensor', count * width, rest)

    def parameter(self, tensor: Any, *rest: Any) -> _Made:
        self.require(getattr(tensor, 'kind', '') == 'tensor', 'a parameter is without tensor')
        return _Made('tensor', 0, (tensor, *rest))

    def tensor_with_attributes(self, function: Any, kind: Any, args: Any, state: Any) -> _Made:
        if kind not in ('torch.Tensor', 'torch.nn.parameter.Parameter'):
            raise unusable(f'{self.name} holds', 'distributed')
        return _Made('tensor', 0, (self.call(function, args), state))

    def tensor_of_dtype(self, *args: Any) -> _Made:
        self.require(len(args) >= 7 and type(args[6]) is _Name, 'a tensor is without dtype')
        return self.tensor(*args[:6], dtype=args[6])

    def encode(self, text: Any, codec: Any = '') -> _Made:
        self.require(type(text) is str and codec in ('latin1', 'latin-1'), 'bytes are written in another code')
        return _Made('bytes', len(text))

    def byte_array(self, *args: Any) -> _Made:
        self.require(all(type(a) is str or getattr(a, 'kind', '') == 'bytes' for a in args), 'a size without data')
        return _Made('bytes', sum(_extent(a, 0) for a in args))

    def array(self, kind: Any, shape: Any, code: Any) -> _Made:
        self.require(kind == 'numpy.ndarray' and shape == (0,), 'an array of numpy has a size without data')
        return _Made('array')

    def scalar(self, dtype: Any, data: Any) -> _Made:
        kinds = getattr(dtype, 'kind', ''), getattr(data, 'kind', type(data).__name__)
        self.require(kinds[0] == 'dtype' and kinds[1] in ('bytes', 'str'), 'a number of numpy is without data')
        return _Made('scalar', parts=(data,))

    def dtype(self, code: Any, *flags: Any) -> _Made:
        self.require(
            type(code) is str and bool(_DTYPE.fullmatch(code)), f'arrays of numpy of dtype {shown(code)} are not read'
        )
        return _Made('dtype')

    def statistic(self, owner: Any, name: Any) -> _Made:
        if owner != _HISTORY or name not in _HISTORY_STATISTICS:
            raise self.unsafe('builtins.getattr')
        return _Made('method')


# Functions and classes that are called, and who looks at their arguments.
_CALLS: dict[str, Callable[..., Any]] = {
    'torch._utils._rebuild_tensor': PickleCheck.tensor,
    'torch._utils._rebuild_tensor_v2': PickleCheck.tensor,
    'torch._utils._rebuild_tensor_v3': PickleCheck.tensor_of_dtype,
    'torch._utils._rebuild_parameter': PickleCheck.parameter,
    'torch._utils._rebuild_parameter_with_state': PickleCheck.parameter,
    'torch._tensor._rebuild_from_type_v2': PickleCheck.tensor_with_attributes,
    'torch.device': lambda check, *args: _Made('device', parts=args),
    '_codecs.encode': PickleCheck.encode,
    'builtins.bytearray': PickleCheck.byte_array,
    'builtins.getattr': PickleCheck.statistic,
    'numpy.dtype': PickleCheck.dtype,
    **{f'{core}._reconstruct': PickleCheck.array for core in _NUMPY_CORES},
    **{f'{core}.scalar': PickleCheck.scalar for core in _NUMPY_CORES},
    **{
        name: lambda check, *args, kind=kind: kind(*args)
        for name, kind in {
            'collections.OrderedDict': OrderedDict,
            'collections.Counter': Counter,
            'torch.Size': tuple,
            'builtins.set': set,
            'builtins.complex': complex,
            'builtins.slice': slice,
        }.items()
    },
}


PickleCheck.dispatch.update(
    {code: _Base.dispatch[code] if code in _OPCODES else PickleCheck.refuse_format for code in range(256)}
    | {
        pickle.REDUCE[0]: PickleCheck.load_reduce,
        pickle.NEWOBJ[0]: PickleCheck.load_newobj,
        pickle.BUILD[0]: PickleCheck.load_build,
    }
)


def _extent(value: Any, depth: int) -> int:
    """How much a call with this value handles; what lies deeper is referred to only."""
    if isinstance(value, _Made):
        return value.nbytes if value.kind == 'bytes' else 1
    if not isinstance(value, (str, bytes, tuple, list, dict, set)):
        return 1
    inside = value if depth and isinstance(value, tuple) else ()
    return len(value) * (1 if isinstance(value, (str, bytes)) else _ENTRY) + sum(
        _extent(item, depth - 1) for item in inside
    )


def _unfolded(value: Any, known: dict[int, float]) -> float:
    """Size of a value if nothing in it was shared."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, (list, tuple, set, dict, _Made)):
        if id(value) not in known:
            known[id(value)] = math.inf  # within itself
            own, inside = (value.nbytes, value.parts) if isinstance(value, _Made) else (1, value)
            inside = (*value, *value.values()) if isinstance(value, dict) else inside
            known[id(value)] = own + sum(_unfolded(item, known) for item in inside)
        return known[id(value)]
    return 1


def _statistic(owner: Any, name: Any) -> Any:
    """Stand-in for ``getattr``, by which pickles name ``HistoryBuffer``'s own methods."""
    if owner is not HistoryBuffer:
        raise TypeError(f'getattr of {owner!r}')
    return {key: getattr(HistoryBuffer, key) for key in _HISTORY_STATISTICS}[name]


@functools.lru_cache(maxsize=1)
def safe_names() -> dict[str, Any]:
    """What a checkpoint that was checked may refer to by a dotted name, beyond torch's own list."""
    import argparse

    core: Any = importlib.import_module(_NUMPY_CORES[int(np.__version__.split('.')[0]) >= 2])
    # Counter: the milestones of a MultiStepLR, which torch's own list has only later. The classes of dtypes are not
    # named in files; torch sets the state of listed ones only.
    dtypes = [type(np.dtype(code)) for code in '?bBhHiIlLqQefdFDSU']
    functions = {f'{name}.{f}': getattr(core, f) for name in _NUMPY_CORES for f in ('_reconstruct', 'scalar')}
    return {
        'argparse.Namespace': argparse.Namespace,
        'collections.Counter': Counter,
        _HISTORY: HistoryBuffer,
        'builtins.slice': slice,
        'builtins.getattr': _statistic,
        'numpy.ndarray': np.ndarray,
        'numpy.dtype': np.dtype,
        **{f'numpy.dtypes.{kind.__name__}': kind for kind in dtypes},
        **functions,
    }
