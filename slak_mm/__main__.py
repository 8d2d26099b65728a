"""The command line ``slak-mm``, also ``python -m slak_mm``."""

import difflib
import importlib
import sys
import textwrap

from . import __version__, cli
from ._config import config_names

# Commands by topic: the module in `slak_mm.cli.commands` and what it does.
COMMANDS = {
    'Train and test': {
        'train': ('train', 'train a segmentor or detector'),
        'test': ('test', 'evaluate a checkpoint'),
        'infer': ('infer', 'draw what a model sees in images'),
        'curves': ('curves', 'draw the curves of training runs'),
    },
    'Data and weights': {
        'data': ('prepare_data', 'download, unpack and verify data sets'),
        'imagenet': ('imagenet', 'measure the ImageNet accuracy of a checkpoint, beside the published one'),
        'checkpoint': ('checkpoint', 'look into checkpoints, convert their names, list the published ones'),
        'export': ('export', 'write ONNX, TorchScript or an exported program'),
    },
    'Measure': {
        'cost': ('cost', 'parameters and FLOPs, beside the published ones'),
        'erf': ('erf', 'effective receptive fields, as pictures and area ratios'),
        'benchmark': ('benchmark', 'time and memory beside what this package replaces'),
    },
    'Try': {'demo': ('demo', 'train, test and draw on a small generated data set')},
}
MODULES = {name: module for commands in COMMANDS.values() for name, (module, _) in commands.items()}


def manual() -> str:
    """The help of the command line."""
    lines = ['usage: slak-mm COMMAND [ARGUMENT ...]', '', 'Large-kernel backbones for OpenMMLab.']
    for topic, commands in COMMANDS.items():
        lines += ['', f'{topic}:', *(f'  {name:<12}{what}' for name, (_, what) in commands.items())]
    names = ', '.join(config_names())
    lines += ['', 'Configs by name:', textwrap.fill(names, 100, initial_indent='  ', subsequent_indent='  ')]
    lines += ['', '"slak-mm COMMAND --help" says more; "slak-mm --version" gives the version. In several processes:']
    lines += ['  torchrun --nproc_per_node N -m slak_mm train CONFIG --launcher pytorch']
    return '\n'.join([*lines, '', cli.EXIT_CODES])


def main() -> None:
    """Run a command."""
    name, *arguments = sys.argv[1:] or ['--help']
    if name == 'help' and arguments:
        name, arguments = arguments[0], ['--help']
    if name in ('help', '-h', '--help'):
        cli.run_tool(lambda: print(manual()))
    elif name == '--version':
        print(__version__)
    elif name not in MODULES:
        close = difflib.get_close_matches(name, MODULES, 1)
        hint = f'did you mean {close[0]}?' if close else '"slak-mm --help" lists them.'
        print(f'error: there is no command "{name}"; {hint}', file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = [f'slak-mm {name}', *arguments]
        cli.run_tool(importlib.import_module(f'slak_mm.cli.commands.{MODULES[name]}').main)


if __name__ == '__main__':
    main()
