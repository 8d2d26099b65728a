"""Objects that real checkpoints refer to, beyond torch's own list of those that may be read.

``torch.load(weights_only=True)`` reads tensors and plain containers. Some official files hold an
``argparse.Namespace`` as well, files of mmengine log histories and numpy values.
"""

from __future__ import annotations

import argparse
import functools
import importlib
from collections import Counter
from typing import Any

import numpy as np
from mmengine.logging.history_buffer import HistoryBuffer

from ._pickle_check import HISTORY, HISTORY_STATISTICS, NUMPY_CORES

__all__ = ['safe_names']


def _statistic(owner: Any, name: Any) -> Any:
    """Stand-in for ``getattr``, by which pickles name ``HistoryBuffer``'s own methods."""
    if owner is not HistoryBuffer:
        raise TypeError(f'getattr of {owner!r}')
    return {key: getattr(HistoryBuffer, key) for key in HISTORY_STATISTICS}[name]


@functools.lru_cache(maxsize=1)
def safe_names() -> dict[str, Any]:
    """Classes and functions that a checkpoint may refer to, by their dotted names."""
    core: Any = importlib.import_module(NUMPY_CORES[int(np.__version__.split('.')[0]) >= 2])
    # Counter: the milestones of a MultiStepLR, which torch's own list has only later. The classes of
    # dtypes (numbers, booleans, strings) are not named in files; torch sets the state of listed ones only.
    return {
        'argparse.Namespace': argparse.Namespace,
        'collections.Counter': Counter,
        HISTORY: HistoryBuffer,
        'builtins.slice': slice,
        'builtins.getattr': _statistic,
        'numpy.ndarray': np.ndarray,
        'numpy.dtype': np.dtype,
        **{f'numpy.dtypes.{type(np.dtype(code)).__name__}': type(np.dtype(code)) for code in '?bBhHiIlLqQefdFDSU'},
        **{
            f'{name}.{function}': getattr(core, function)
            for name in NUMPY_CORES
            for function in ('_reconstruct', 'scalar')
        },
    }
