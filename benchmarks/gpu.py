"""``gpu``: what a GPU makes of the package, in one run of a few minutes, the most important first.

Correctness of the operator against float64, whole networks beside timm's ConvNeXt-T in channels-last, the operator
beside the faster of PyTorch's layouts, the host's time of a call, the time from the first call to the first finished
step of a new process, and a training step of UperNet with mixed precision and masks. Each result is written to
``DIR/results.jsonl`` as soon as it is known; the table comes last. Weights and data are random.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slak_mm.models.slak import LargeKernelConv, SLaKBlock
from slak_mm.ops import cross_dwconv2d

from . import common, model, op

NETWORKS = ('ConvNeXt-T', 'SLaK-T', 'ShiftWise-T')
#: Name, form, height and width, batch.
WORKLOADS = (
    ('training step, bfloat16 autocast, 512x512, batch 16', 'train', (512, 512), 16),
    ('deployed, float16, 224x224, batch 128', 'deploy', (224, 224), 128),
    ('training step, bfloat16 autocast, 800x1344, batch 2', 'train', (800, 1344), 2),
)
OPERATOR_BATCHES = (16, 2)
IMAGE = (512, 512)


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = common.add_command(commands, globals(), 'everything that matters on a GPU, in some minutes')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder for results.jsonl and table.md')
    parser.add_argument('--config', default='upernet_slak_t_ade20k', help='of the segmentor')
    common.add_measurement_arguments(parser, dtypes=('bfloat16', 'float32'), batches=(), memory=False)
    parser.set_defaults(device='cuda')


def run(args: argparse.Namespace) -> Iterator[str]:
    """Measure, and yield the lines of the report.

    Raises:
        BenchmarkError: There is no such device, or the operator disagrees with float64.
    """
    common.check_arguments(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    machine = common.describe_machine(args.device, repeats=args.repeats)
    table = [f'{", ".join(f"{k} {v}" for k, v in machine.items())}\n', '| what | ratio or figure |', '|---|---|']
    yield table[0]
    with (out / 'results.jsonl').open('w') as file:
        for part in (correctness, networks, operator, host_time, start_up, segmentor):
            for row in part(args):
                file.write(json.dumps(dict(part=part.__name__, **row)) + '\n')
                file.flush()
                table.append(f'| {row["name"]} | {row["text"]} |')
                yield table[-1]
    (out / 'table.md').write_text('\n'.join(table) + '\n')


def correctness(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results and gradients of the operator at every stage, against float64 on the same device."""
    for dtype in ('bfloat16', 'float16', 'float32'):
        worst = 0.0
        for stage in range(4):
            options: dict[str, Any] = dict(family='slak', stage=stage, size=IMAGE, batch=2, device=args.device)
            got = op.Case(dtype=dtype, **options).step('ours', 'f+b')()
            exact = op.Case(dtype='float64', **options)
            # The inputs that the other saw, not those before they were rounded.
            rounded = op.Case(dtype=dtype, **options)
            exact.x, exact.grads = rounded.x.double(), [g.double() for g in rounded.grads]
            exact.weights = [w.detach().double().requires_grad_() for w in rounded.weights]
            worst = max(worst, common.worst_difference(got, exact.step('NCHW', 'f+b')()))
        if not worst <= common.TOLERANCE[common.DTYPES[dtype]]:
            raise common.BenchmarkError(f'cross_dwconv2d differs from float64 by {worst:.1e} in {dtype}.')
        yield dict(name=f'operator against float64, {dtype}', text=f'{worst:.1e}', difference=worst)
    worst = block_difference(args.device)
    if not worst <= 0.1:
        raise common.BenchmarkError(f'A block of SLaK differs from float64 by {worst:.1e} under autocast.')
    yield dict(name='block against float64, bfloat16 autocast', text=f'{worst:.1e}', difference=worst)


def block_difference(device: str) -> float:
    """The worst relative difference of a training block under autocast, forward and backward, from float64."""
    torch.manual_seed(0)
    branches = LargeKernelConv(124, 51, 5, True, True, False, dict(type='BN'))
    block = SLaKBlock(124, branches, drop_path=0.0, layer_scale_init_value=1.0).to(device)
    x = torch.randn(2, 124, 32, 32, device=device)
    results = []
    for network, dtype in ((copy.deepcopy(block).double(), torch.float64), (block, torch.float32)):
        image = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype is torch.float32):
            y = network(image)
        leaves = [image, *(p for p in network.parameters() if p.requires_grad)]
        results.append([y.detach(), *torch.autograd.grad(y, leaves, x.to(y.dtype))])
    # By the norm: some sums almost cancel, and are all rounding in half precision.
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*results))


def networks(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time, launches and peak memory of whole networks, and their ratios to ConvNeXt-T."""
    for name, form, size, batch in WORKLOADS:
        steps = {n: network_step(n, form, size, batch, args.device) for n in NETWORKS}
        seconds, _ = common.measure_times(steps, args.repeats, args.device)
        figures = {n: dict(seconds=seconds[n], **profile(steps[n], args.device)) for n in NETWORKS}
        base = figures[NETWORKS[0]]
        for other in NETWORKS[1:]:
            own = figures[other]
            ratios = {k: own[k] / base[k] for k in ('seconds', 'busy', 'launches', 'peak') if base.get(k)}
            text = ', '.join(f'{key} {value:.2f}x' for key, value in ratios.items())
            text += f' ({1e3 * own["seconds"]:.1f} ms, launches {own["launches"]})'
            yield dict(name=f'{other}: {name}', text=text, figures=own, baseline=base, ratios=ratios)


def network_step(name: str, form: str, size: tuple[int, int], batch: int, device: str) -> Callable[[], Any]:
    """A pass of a network: training under autocast, or deployed in half precision."""
    if form == 'deploy':
        dtype = 'float16' if device != 'cpu' else 'bfloat16'
        own = name if name == 'ConvNeXt-T' else f'{name} deploy'
        return model.Case(own, size, batch, dtype, device, False).step
    case = model.Case(name, size, batch, 'float32', device, True)

    def step() -> None:
        case.network.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = sum(y.float().square().mean() for y in case.network(case.images))
        loss.backward()

    return step


def profile(step: Callable[[], Any], device: str) -> dict[str, Any]:
    """Busy seconds and launches of the GPU, the host's seconds, and the peak above what is allocated in MiB."""
    if device == 'cpu':
        return dict(busy=None, launches=None, host=common.timed(step)[0], peak=None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, begin = torch.cuda.memory_allocated(), time.perf_counter()
    step()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.device_time_total for event in kernels) / 1e6
    return dict(busy=busy, launches=len(kernels), host=host, peak=peak)


def operator(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Forward and backward of three branches, beside the faster of PyTorch's layouts."""
    for batch in OPERATOR_BATCHES:
        for stage in range(4):
            case = op.Case('slak', stage, IMAGE, batch, args.dtype, args.device)
            steps = {n: case.step(n, 'f+b') for n in ('ours', *op.LAYOUTS)}
            seconds, _ = common.measure_times(steps, args.repeats, args.device)
            ratio = min(seconds[n] for n in op.LAYOUTS) / seconds['ours']
            name = f'operator forward and backward, {args.dtype}, batch {batch}, stage {stage + 1}'
            text = f'{ratio:.1f}x as fast as PyTorch ({1e3 * seconds["ours"]:.2f} ms)'
            yield dict(name=name, text=text, seconds=seconds, ratio=ratio)


def host_time(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time until a call returns, of a map so small that the GPU waits for the host."""
    dtype = common.DTYPES[args.dtype]
    operator: Any = cross_dwconv2d
    x, tall, wide, small = (
        torch.randn(*shape, device=args.device).to(dtype).requires_grad_()
        for shape in ((1, 8, 16, 16), (8, 13, 5), (8, 5, 13), (8, 5, 5))
    )

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return list(operator(x, tall, wide, small))

    def both() -> Any:
        return torch.autograd.grad(sum(y.sum() for y in operator(x, tall, wide, small)), (x, tall, wide, small))

    for name, call in (('forward', forward), ('forward and backward', both)):
        times = []
        for i in range(60):
            if i % 10 == 0 and args.device != 'cpu':
                torch.cuda.synchronize()  # or the queue of launches is full
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        middle = statistics.median(times[20:])
        yield dict(name=f"host's time of a call, {name}", text=f'{1e6 * middle:.0f} us', seconds=middle)


def start_up(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds from the first call to the first finished training step of a new process, with empty and full caches."""
    _, form, size, batch = WORKLOADS[0]
    with tempfile.TemporaryDirectory() as folder:
        variables = dict(TRITON_CACHE_DIR=f'{folder}/triton', SLAK_MM_CACHE=f'{folder}/slak_mm')
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)), **variables)
        for name in NETWORKS[1:]:
            for caches in ('empty', 'full'):
                case = json.dumps(dict(name=name, form=form, size=size, batch=batch, device=args.device))
                command = [sys.executable, '-W', 'ignore', '-m', __name__, case]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise common.BenchmarkError(f'step 1 of {name} failed: {done.stderr.strip().splitlines()[-1]}')
                seconds = float(done.stdout.split()[-1])
                yield dict(name=f'{name}: first step, {caches} caches', text=f'{seconds:.1f} s', seconds=seconds)


def segmentor(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A training step of UperNet under autocast, with masks on the backbone, beside the same without them."""
    from slak_mm.sparsity import SparseTraining, select_parameters

    from .segmentor import Training

    size, batch = WORKLOADS[0][2], min(WORKLOADS[0][3], 8)
    training = Training(argparse.Namespace(**vars(args), cfg_options=None))
    data = training.data(size, batch)
    masks = SparseTraining(select_parameters(training.backbone, 'all'), distribution='uniform', sparsity=0.4)
    masks.initialize()

    def autocast(step: Callable[[], Any]) -> Callable[[], Any]:
        def wrapped() -> Any:
            with torch.autocast(args.device, torch.bfloat16):
                return step()

        return wrapped

    contenders = dict(dense=(), masks=(masks.attach,))
    steps = {name: autocast(training.step(training.backbone, data, *attach)) for name, attach in contenders.items()}
    seconds, _ = common.measure_times(steps, args.repeats, args.device)
    text = f'{1e3 * seconds["masks"]:.1f} ms, {seconds["masks"] / seconds["dense"] - 1:+.1%} for the masks'
    yield dict(name=f'UperNet training step with masks, autocast, batch {batch}', text=text, seconds=seconds)


if __name__ == '__main__':
    first = network_step(**json.loads(sys.argv[1]))
    start = time.perf_counter()
    first()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    sys.stdout.write(f'{time.perf_counter() - start}\n')
