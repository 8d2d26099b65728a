"""A training run that dies while it saves a checkpoint."""

import os
import signal
from pathlib import Path

import torch
from sparse_toy import make_runner

from slak_mm.engine.checkpoint_hook import AtomicLocalBackend


def kill_at(event):
    """Let the process die at one of the calls that change what is on the disk, counted from 0."""
    left = [event]

    def dying(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    def half(path, data):
        with open(path, 'wb') as file:
            file.write(data[: len(data) // 2])
            file.flush()
            dying(lambda: None)()
            file.write(data[len(data) // 2 :])

    Path.write_bytes, os.fsync, os.replace = half, dying(os.fsync), dying(os.replace)
    AtomicLocalBackend.remove = dying(AtomicLocalBackend.remove)


def run(event, threads, folder, hooks, options):
    """Train until an event kills the process, or to the end."""
    torch.set_num_threads(threads)  # sums depend on it
    kill_at(event)
    make_runner(folder, hooks, **options).train()
