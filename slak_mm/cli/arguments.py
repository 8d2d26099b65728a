"""Arguments that the command lines share."""

import argparse
from typing import Any

from mmengine.config import DictAction


class KeyValuePairs(DictAction):
    """mmengine's ``key=value`` pairs, with a usage message for what is not one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Parse the pairs into the namespace."""
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError, RecursionError):
            # It has no syntax for dicts, and recurses without end on one.
            parser.error(
                f'{option_string} takes key=value pairs with numbers, words, lists or '
                f'tuples as values (a dict is set by its keys, a.b=1 a.c=2), got: '
                f'{" ".join(values)}'
            )


def positive_int(text: str) -> int:
    """Argument type: an integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {text}')
    return value


def non_negative_int(text: str) -> int:
    """Argument type: an integer from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f'must not be negative, got {text}')
    return value


def crop_size(text: str) -> tuple[int, int]:
    """Argument type: ``128`` or ``128x192``, height and width."""
    try:
        sides = [positive_int(side) for side in text.lower().replace(',', 'x').split('x')]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f'must be like 128 or 128x192 (HxW), got {text}')
    return sides[0], sides[-1]


def img_scale(text: str) -> tuple[int, int]:
    """Argument type: ``400`` or ``667x400``; longer (0 where not given) and shorter side."""
    try:
        sides = crop_size(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f'must be like 400 (shorter side) or 667x400 (longer x shorter side), got {text}'
        ) from None
    return (max(sides) if 'x' in text.lower().replace(',', 'x') else 0), min(sides)


def image_size(text: str) -> tuple[int, int]:
    """Argument type: ``HxW``, height and width of at least 32 pixels."""
    try:
        height, width = map(int, text.split('x'))
    except ValueError:
        raise argparse.ArgumentTypeError(f'a size is HxW, such as 512x512, got {text}') from None
    if min(height, width) < 32:
        raise argparse.ArgumentTypeError(f'a size must be at least 32x32, got {text}')
    return height, width


def share(text: str) -> float:
    """Argument type: a number between 0 and 1, both excluded."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f'must lie between 0 and 1, got {text}')
    return value


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every tool takes: the config, its options, the work dir, the launcher."""
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='where logs and results go (default: ./work_dirs/<name of the config>)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=KeyValuePairs,
        metavar='KEY=VALUE',
        help='override any key of the config, e.g. model.backbone.drop_path_rate=0.2',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed run were started (pytorch: torchrun)',
    )
    # torch.distributed.launch passes this; torchrun sets the environment variable instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        '--debug', action='store_true', help='show the traceback of every error (also: SLAK_MM_DEBUG=1)'
    )


def add_override_arguments(parser: argparse.ArgumentParser, training: bool) -> None:
    """Add the overrides of :mod:`slak_mm.cli`.

    Args:
        parser: The parser.
        training: Whether to add those that only concern training.
    """
    group = parser.add_argument_group('changes to the config')
    group.add_argument('--data-root', metavar='DIR', help='folder with the data set')
    if training:
        group.add_argument(
            '--max-iters',
            type=positive_int,
            metavar='N',
            help='train for N iterations; the schedule keeps its proportions',
        )
        group.add_argument('--batch-size', type=positive_int, metavar='N', help='training images per process')
    group.add_argument('--num-workers', type=non_negative_int, metavar='N', help='data loading processes per process')
    add_size_arguments(group)


def add_size_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the overrides that concern the size of images."""
    parser.add_argument(
        '--crop-size',
        type=crop_size,
        metavar='N or HxW',
        help='training crop (semantic segmentation); image scales, sliding window and its stride follow in proportion',
    )
    parser.add_argument(
        '--img-scale',
        type=img_scale,
        metavar='S or LxS',
        help='shorter, or longer and shorter side of test images (detection); '
        'training scales and crops follow in proportion',
    )
