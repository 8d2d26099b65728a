"""Run a tool and leave its process."""

import gc
import os
import select
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from mmengine.dist import get_rank, is_distributed

from slak_mm.checkpoints.errors import escaped
from slak_mm.engine.loader import safe_reader
from slak_mm.engine.samples import DataError
from slak_mm.ops.backends import forced_backend

from .errors import explain


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a command line, whose ``main`` gives None or an exit code, and leave the process with that.

    Whatever reads a checkpoint meanwhile, in mmengine and the libraries on it too, does so with this package's reader
    (:func:`slak_mm.engine.loader.safe_reader`).

    What a user can cause (:func:`slak_mm.cli.errors.explain` knows) ends in one sentence on stderr and exit code 1;
    with ``--debug`` or ``SLAK_MM_DEBUG=1`` the traceback is shown as well. Everything else is a defect and keeps its
    traceback. An interrupt ends with exit code 130, a reader of stdout that went away (``| head``) with 141.
    """
    code: Any = 1
    try:
        forced_backend()  # an unknown SLAK_MM_BACKEND is better refused now than in the first layer
        with safe_reader():
            code = main() or 0
    except Exception as error:
        message = explain(error)
        if isinstance(error, BrokenPipeError) and _has_lost_its_reader():
            code = 141
        elif message is None:
            raise
        else:
            if os.environ.get('SLAK_MM_DEBUG', '0') != '0' or '--debug' in sys.argv:
                traceback.print_exc()
            # Each process has data of its own.
            if get_rank() == 0 or isinstance(error, DataError):
                # Texts of files reach messages of other libraries too.
                print('error:', escaped(message, keep='\n'), file=sys.stderr)
    except SystemExit as leaving:  # argparse's
        code = leaving.code
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        code = 130
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            code = 141
        if code == 141:  # or the interpreter would try to write the rest, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave_process_group()
    sys.exit(code)


def _has_lost_its_reader() -> bool:
    """Whether nobody reads stdout any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def leave_process_group() -> None:
    """Leave the default process group, if there is one, for good.

    Threads of gloo keep the tensors of the last collectives until the group is gone, and what
    refers to the group, as a DistributedDataParallel model does, keeps it. A thread that frees a
    tensor while the interpreter shuts down aborts the process (PyTorch's pull request 179291).
    """
    if is_distributed():
        gc.collect()  # runners and their hooks refer to each other
        torch.distributed.destroy_process_group()
