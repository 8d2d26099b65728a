"""Arguments that the command lines share."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from mmengine.config import DictAction

from .errors import ConfigOverrideError

EXIT_CODES = """Exit codes:
    0    done
    1    what the last line on stderr says
    2    wrong usage
    130  interrupted
    141  nobody reads the output any more, as after "| head"
"""


class _Commands(argparse._SubParsersAction):
    """Sub-commands, each with its lines of the examples in the help of all."""

    examples = ''

    def add_parser(self, name: str, **arguments: Any) -> Any:
        """Add a sub-command."""
        arguments.setdefault('description', arguments.get('help'))
        own = [line for line in self.examples.splitlines() if f' {name} ' in f'{line} ']
        return super().add_parser(name, examples='\n'.join(own), **arguments)


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose help reads like a manual page.

    It has ``--debug``, which :func:`slak_mm.cli.run_tool` looks for; so have its sub-commands.

    Args:
        description: Docstring of a module; what follows "Examples:" goes behind the options.
        examples: Lines of examples.
        **arguments: Those of argparse.
    """

    def __init__(self, description: str | None = None, examples: str = '', **arguments: Any) -> None:
        arguments.setdefault('formatter_class', argparse.RawDescriptionHelpFormatter)
        text, _, more = (description or '').replace('``', '').partition('Examples:\n')
        self.examples = (examples or more).rstrip()
        epilog = f'Examples:\n{self.examples}\n\n' if self.examples else ''
        super().__init__(description=text, epilog=epilog + EXIT_CODES, **arguments)
        self.register('action', 'parsers', _Commands)
        self.add_argument('--debug', action='store_true', help='show tracebacks (also: SLAK_MM_DEBUG=1)')

    def add_subparsers(self, **arguments: Any) -> Any:
        """Add sub-commands."""
        commands: Any = super().add_subparsers(**arguments)
        commands.examples = self.examples
        return commands


class KeyValuePairs(DictAction):
    """mmengine's ``key=value`` pairs, with a usage message for what is not one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Parse the pairs into the namespace."""
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError, RecursionError):
            # It has no syntax for dicts, and recurses without end on one.
            parser.error(
                f'{option_string} takes key=value pairs with numbers, words, lists or tuples as values '
                f'(a dict is set by its keys, a.b=1 a.c=2), got: {" ".join(values)}'
            )


CONFIG_HELP = "config file, or the name of one of this package's"


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
        wanted = f'must be like 400 (shorter side) or 667x400 (longer x shorter side), got {text}'
        raise argparse.ArgumentTypeError(wanted) from None
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


def check_output(path: str, is_folder: bool) -> None:
    """Check that a file can be written, or files into a folder; what is missing of its path can be made.

    Raises:
        ConfigOverrideError: Something else is there, or the place cannot be written to.
    """
    target = Path(path).absolute()
    try:
        if not is_folder:
            if target.is_dir() or path.endswith(os.sep):
                raise ConfigOverrideError(f'"{path}" is a folder: name a file in it.')
            target = target.parent
        existing = next(place for place in (target, *target.parents) if os.path.lexists(place))
        if not existing.is_dir():
            raise ConfigOverrideError(f'"{path}" cannot be written: "{existing}" is no folder.')
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigOverrideError(f'"{path}" cannot be written: {error.strerror}.') from error


def output_file(text: str) -> str:
    """Argument type: a file to write, checked by :func:`check_output`."""
    return _checked_output(text, is_folder=False)


def output_folder(text: str) -> str:
    """Argument type: a folder to write into, checked by :func:`check_output`."""
    return _checked_output(text, is_folder=True)


def _checked_output(text: str, is_folder: bool) -> str:
    try:
        check_output(text, is_folder)
    except ConfigOverrideError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def add_cfg_options(parser: argparse._ActionsContainer) -> None:
    """Add ``--cfg-options``."""
    what = 'override any key of the config, e.g. model.backbone.drop_path_rate=0.2'
    parser.add_argument('--cfg-options', nargs='+', action=KeyValuePairs, metavar='KEY=VALUE', help=what)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what training and testing take: the config, its options, the work dir, the launcher, compilation."""
    add = parser.add_argument
    add('config', help=CONFIG_HELP)
    add('--work-dir', type=output_folder, help='for logs and results (default: ./work_dirs/<name of the config>)')
    add_cfg_options(parser)
    launchers = ['none', 'pytorch', 'slurm', 'mpi']
    add('--launcher', choices=launchers, default='none', help='what starts the processes (pytorch: torchrun)')
    # torch.distributed.launch passes this; torchrun sets the environment variable instead.
    add('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    add('--compile', action='store_true', help='compile the model with torch.compile; the first iterations are slow')


def add_override_arguments(parser: argparse.ArgumentParser, training: bool) -> None:
    """Add the overrides of :mod:`slak_mm.cli`; some concern training alone."""
    group = parser.add_argument_group('changes to the config')
    add = group.add_argument
    add('--data-root', metavar='DIR', help='folder with the data set')
    if training:
        add('--max-iters', type=positive_int, metavar='N', help='iterations; the schedule keeps its proportions')
        add('--batch-size', type=positive_int, metavar='N', help='training images per process')
    add('--num-workers', type=non_negative_int, metavar='N', help='data loading processes per process')
    add_size_arguments(group)


def add_size_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the overrides that concern the size of images."""
    crop = 'training crop (semantic segmentation); image scales, sliding window and its stride follow in proportion'
    scale = 'shorter, or longer and shorter side of test images (detection); training scales and crops follow'
    parser.add_argument('--crop-size', type=crop_size, metavar='N or HxW', help=crop)
    parser.add_argument('--img-scale', type=img_scale, metavar='S or LxS', help=scale)
