"""Peak memory of one pass, measured in a process of its own.

A module that measures memory has a function ``peak_step(**case)``, which returns the pass as a
callable after having run a small one like it, so that what is loaded at first use does not count.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .common import BenchmarkError, synchronize


def measure_peak(module: str, case: dict[str, Any]) -> float | None:
    """Peak memory of a pass above what was there before it, in MiB; None where the system does not tell.

    Args:
        module: Full name of the module that has ``peak_step``.
        case: Its keyword arguments, all JSON; ``device`` among them.

    Raises:
        BenchmarkError: The process failed, with its last line.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()), PYTHONPATH=paths)
    # Freed blocks go back to the system at once, so that the resident size is what is in use.
    environment.update(MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536')
    for name in ('MALLOC_MMAP_MAX_', 'MALLOC_TOP_PAD_'):  # which would keep them
        environment.pop(name, None)
    command = [sys.executable, '-W', 'ignore', '-m', __name__, module, json.dumps(case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or 'killed').splitlines()[-1]
        raise BenchmarkError(f'the memory measurement of {case} failed: {why}')
    return json.loads(done.stdout.splitlines()[-1])


def peak_of(step: Callable[[], Any], device: str) -> float | None:
    """Peak memory of a call in this process, in MiB; None where the system does not tell."""
    if device != 'cpu':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronize(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path('/proc/self/clear_refs').write_text('5')  # sets the peak to the present size
        before = _status('VmRSS')
        step()
        return (_status('VmHWM') - before) / 2**10
    except (OSError, KeyError):
        return None


def _status(name: str) -> int:
    """An entry of /proc/self/status in KiB."""
    lines = (line.split() for line in Path('/proc/self/status').read_text().splitlines())
    return {words[0].rstrip(':'): int(words[1]) for words in lines if words[-1:] == ['kB']}[name]


def main() -> None:
    """Write the peak of ``MODULE CASE`` to stdout."""
    module, case = sys.argv[1], json.loads(sys.argv[2])
    step = importlib.import_module(module).peak_step(**case)
    sys.stdout.write(json.dumps(peak_of(step, case['device'])) + '\n')


if __name__ == '__main__':
    main()
