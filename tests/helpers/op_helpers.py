"""What the tests of the operator share."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F


def lay_out(x, layout):
    """The same values in another memory layout."""
    if layout == 'channels_last':
        return x.contiguous(memory_format=torch.channels_last)
    if layout == 'transposed':
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == 'strided':
        return torch.stack([x, torch.full_like(x, float('nan'))], dim=-1)[..., 0]
    return x


def convolution(x, kernel):
    """Depthwise with a kernel (C, kh, kw), by PyTorch; the size stays."""
    padding = (kernel.shape[1] // 2, kernel.shape[2] // 2)
    return F.conv2d(x, kernel.unsqueeze(1), padding=padding, groups=x.shape[1])


def relative_error(got, want):
    """The largest difference as a fraction of the largest value."""
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)) if want.numel() else 0.0


def run_program(folder, program, *arguments, **environment):
    """Run it in a process of its own, from a file, as Triton reads the source of its functions."""
    file = folder / 'program.py'
    file.write_text(program)
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(paths), **environment}
    command = [sys.executable, '-W', 'ignore', str(file), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def run_tests_in_interpreter(file):
    """Run the tests of a file in Triton's interpreter, which must be chosen before Triton is imported."""
    command = [sys.executable, '-W', 'ignore', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', file]
    environment = dict(os.environ, TRITON_INTERPRET='1')
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(file).parents[2])
    assert done.returncode == 0, done.stdout[-5000:]
    assert ' passed' in done.stdout
