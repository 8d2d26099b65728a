"""Show the whole way on a small generated data set.

Generates the data, trains UperNet + SLaK-T on it from random weights with ``slak-mm train``,
evaluates the result on held-out images with ``slak-mm test``, and writes pictures. It is made
for two CPU cores and takes some six minutes there.

Examples:
    slak-mm demo
    slak-mm demo --max-iters 20 --num-train 8 --num-val 4 --work-dir quick
"""

import argparse
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
from PIL import Image

from slak_mm import cli
from slak_mm._tables import table
from slak_mm.cli import ConfigOverrideError
from slak_mm.cli.demo_data import DEMO_CLASSES, write_demo_data
from slak_mm.cli.overlay import class_shares, colorize, panel, with_legend

CONFIG = 'upernet_slak_t_ade20k'

# What a run of minutes from random weights needs and one of days from ImageNet weights does not.
SHORT_RUN = {'optim_wrapper.optimizer.lr': '5e-4', 'model.backbone.drop_path_rate': '0.'}


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('--work-dir', type=cli.output_folder, default='work_dirs/demo', help='(default: %(default)s)')
    for name, kind, default, what in (
        ('--max-iters', cli.positive_int, 200, 'training iterations'),
        ('--batch-size', cli.positive_int, 4, 'images per iteration'),
        ('--num-workers', cli.non_negative_int, 0, 'data loading processes'),
        ('--num-train', cli.positive_int, 48, 'generated training images'),
        ('--num-val', cli.positive_int, 12, 'generated held-out images'),
        ('--seed', cli.non_negative_int, 0, 'of data and training'),
    ):
        add(name, type=kind, default=default, help=f'{what} (default: {default})')
    add('--crop-size', type=cli.crop_size, default=(96, 96), metavar='N', help='training crop (default: 96 pixels)')
    add('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='further overrides of the config')
    return parser.parse_args()


def run(title: str, command: list[str], log: Path, show: str) -> str:
    """Run a tool, show those of its lines that match, keep all of them in a file."""
    print(f'\n== {title}\n$ slak-mm {" ".join(command)}\n  (everything it says: {log})', flush=True)
    lines: list[str] = []
    wanted = re.compile(show)
    # The tool must not outlive this process.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    words, pipe = [sys.executable, '-u', '-m', 'slak_mm', *command], subprocess.PIPE
    process = subprocess.Popen(words, text=True, stdout=pipe, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    try:
        with log.open('w') as file:
            for line in process.stdout:
                file.write(line)
                lines.append(line)
                if wanted.search(line):
                    print('  ' + line.rstrip(), flush=True)
        code = process.wait()
    except BaseException:
        process.kill()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        last = ''.join(lines[-15:])
        raise ConfigOverrideError(f'"slak-mm {command[0]}" ended with exit code {code}; its last words:\n{last}')
    return ''.join(lines)


def load_labels(path: Path) -> np.ndarray:
    """An annotation with classes from 0, and 255 where nothing is labeled."""
    # 0 is "unlabeled" and wraps round to 255, which is what `reduce_zero_label` makes of it.
    return np.asarray(Image.open(path), np.uint8) - np.uint8(1)


def mean_iou(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean IoU in percent over the classes that occur in truth or prediction."""
    num_classes = 150
    joint = np.zeros((num_classes, num_classes))
    for truth, predicted in pairs:
        known = truth != 255
        np.add.at(joint, (truth[known], predicted[known]), 1)
    union = joint.sum(0) + joint.sum(1) - joint.diagonal()
    return float(100 * (joint.diagonal()[union > 0] / union[union > 0]).mean())


def trivial_prediction(data: Path) -> int:
    """The most frequent class of the training annotations."""
    counts = np.zeros(256, int)
    for path in (data / 'annotations' / 'training').glob('*.png'):
        counts += np.bincount(load_labels(path).ravel(), minlength=256)
    return int(counts[:255].argmax())


def write_pictures(data: Path, predictions: Path, out: Path) -> int:
    """Image, ground truth and prediction side by side, for every held-out image."""
    from mmseg.datasets import ADE20KDataset

    palette = ADE20KDataset.METAINFO['palette']
    names = ADE20KDataset.METAINFO['classes']
    out.mkdir(parents=True, exist_ok=True)
    paths = sorted((data / 'images' / 'validation').glob('*.jpg'))
    for path in paths:
        truth = load_labels(data / 'annotations' / 'validation' / f'{path.stem}.png')
        predicted = load_labels(predictions / f'{path.stem}.png')
        image = np.asarray(Image.open(path).convert('RGB'))
        pictures = [image, colorize(truth, palette), colorize(predicted, palette)]
        # Twice the size, so that the small scenes and their titles can be read.
        pictures = [np.repeat(np.repeat(picture, 2, 0), 2, 1) for picture in pictures]
        both = panel(pictures, ['image', 'ground truth (black: unlabeled)', 'prediction'])
        found = class_shares(np.stack([truth, predicted]), len(names))
        legend = [(names[index], palette[index]) for index, _ in found]
        Image.fromarray(with_legend(both, legend)).save(out / f'{path.stem}.png')
    return len(paths)


def main() -> int:
    args = parse_args()
    start = time.time()
    work_dir = Path(args.work_dir).resolve()
    data, predictions = work_dir / 'data', work_dir / 'predictions'
    work_dir.mkdir(parents=True, exist_ok=True)
    for old in (data, predictions, work_dir / 'pictures'):
        # Left over from a demo with other numbers.
        shutil.rmtree(old, ignore_errors=True)
    write_demo_data(data, args.num_train, args.num_val, seed=args.seed)
    print(
        f'Data: {args.num_train} training and {args.num_val} held-out scenes with '
        f'{len(DEMO_CLASSES)} of the 150 ADE20K classes, generated in {data}.'
    )
    print(
        'Model: the real UperNet + SLaK-T of the config. Changed for a run of minutes from '
        f'random weights: {", ".join(f"{key}={value}" for key, value in SHORT_RUN.items())}.'
    )

    size = 'x'.join(map(str, args.crop_size))
    common = ['--data-root', str(data), '--crop-size', size, '--num-workers', str(args.num_workers)]
    options = [f'{key}={value}' for key, value in SHORT_RUN.items()]
    options += [
        f'default_hooks.logger.interval={max(1, args.max_iters // 20)}',
        # The files are 1 GB with the optimizer: one at the end is enough.
        f'default_hooks.checkpoint.interval={args.max_iters}',
        'default_hooks.checkpoint.save_optimizer=False',
        f'train_cfg.val_interval={args.max_iters}',
        *args.cfg_options,
    ]
    arguments = ['train', CONFIG, '--from-scratch', *common, '--work-dir', str(work_dir)]
    arguments += f'--max-iters {args.max_iters} --batch-size {args.batch_size} --seed {args.seed} --cfg-options'.split()
    run('Training', [*arguments, *options], work_dir / 'train.log', r'Iter\(train\)|FROM SCRATCH|error:')
    trained = time.time()
    arguments = ['test', CONFIG, str(work_dir / f'iter_{args.max_iters}.pth'), *common]
    arguments += ['--out', str(predictions), '--work-dir', str(work_dir / 'test'), '--cfg-options', *args.cfg_options]
    arguments += ['default_hooks.logger.interval=50']
    log = run('Evaluation on held-out images', arguments, work_dir / 'test.log', r'mIoU: |error:')
    count = write_pictures(data, predictions, work_dir / 'pictures')

    truths = {path.stem: load_labels(path) for path in (data / 'annotations' / 'validation').glob('*.png')}
    constant = trivial_prediction(data)
    trivial = mean_iou([(truth, np.full_like(truth, constant)) for truth in truths.values()])
    mious = re.findall(r'mIoU: ([\d.]+)', log)
    if not mious:
        raise ConfigOverrideError(f'{work_dir / "test.log"} has no mIoU.')
    model = float(mious[-1])
    rows = [
        ('predictor', 'mIoU on held-out images'),
        ('UperNet + SLaK-T, from scratch', f'{model:.1f} %'),
        (f'always "{DEMO_CLASSES[constant + 1]}"', f'{trivial:.1f} %'),
    ]
    print('\n' + textwrap.indent(table(rows, markdown=False), '  '))
    print(
        f'\n{count} pictures: {work_dir / "pictures"}\n'
        f'Training took {trained - start:.0f} s, all of it {time.time() - start:.0f} s.'
    )
    if model < 2 * trivial:
        print('error: the model is not twice as good as the trivial predictor.', file=sys.stderr)
        return 1
    return 0
