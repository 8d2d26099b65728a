"""Run a tool and leave its process."""

import gc
import os
import sys
import traceback
from collections.abc import Callable

import torch
import torch.distributed
from mmengine.dist import get_rank, is_distributed

from slak_mm.engine.samples import DataError

from .errors import explain


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a command line and leave the process with its exit code.

    What a user can cause (:class:`ConfigOverrideError`, ``CheckpointError``, and what
    :func:`explain` knows) ends in one sentence on stderr and exit code 1; with
    ``SLAK_MM_DEBUG=1`` or ``--debug`` the traceback is shown as well. Everything else is a
    defect and keeps its traceback. An interrupt ends with exit code 130.

    Args:
        main: Does the work; returns the exit code, None for 0.
    """
    code = 1
    try:
        code = main() or 0
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if os.environ.get('SLAK_MM_DEBUG', '0') != '0' or '--debug' in sys.argv:
            traceback.print_exc()
        # Each process has data of its own.
        if get_rank() == 0 or isinstance(error, DataError):
            print(f'error: {message}', file=sys.stderr)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        code = 130
    finally:
        sys.stdout.flush()
        leave_process_group()
    sys.exit(code)


def leave_process_group() -> None:
    """Leave the default process group, if there is one, for good.

    Threads of gloo keep the tensors of the last collectives until the group is gone, and what
    refers to the group, as a DistributedDataParallel model does, keeps it. A thread that frees a
    tensor while the interpreter shuts down aborts the process (PyTorch's pull request 179291).
    """
    if is_distributed():
        gc.collect()  # runners and their hooks refer to each other
        torch.distributed.destroy_process_group()
