"""``slak-mm``: commands by name, their help, configs by name."""

import importlib
import re
import sys

import pytest
from conftest import ROOT
from mmengine.config import Config

import slak_mm
from slak_mm import __main__ as console
from slak_mm import cli

COMMANDS = sorted(console.MODULES)


@pytest.fixture
def call(monkeypatch, capsys):
    """Gives the exit code and what went to stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', ['slak-mm', *arguments])
        code = None
        try:
            console.main()
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    return call


def test_every_tool_is_a_command_and_every_command_a_tool():
    tools = {path.stem for path in (ROOT / 'tools').glob('*.py')} - {'setup_env'}
    modules = {path.stem for path in (ROOT / 'slak_mm' / 'cli' / 'commands').glob('*.py')} - {'__init__'}
    assert set(console.MODULES.values()) == tools == modules
    for tool in tools:
        assert f'slak_mm.cli.commands.{tool} import main' in (ROOT / 'tools' / f'{tool}.py').read_text()


def test_help_has_a_line_for_each_command_and_names_the_configs(call):
    code, out, _ = call('--help')
    assert code == 0 and call()[1] == call('help')[1] == out
    assert [len(re.findall(f'^  {name} +[a-z].{{10}}', out, re.MULTILINE)) for name in COMMANDS] == [1] * len(COMMANDS)
    assert max(map(len, out.splitlines())) <= 100
    assert {path.stem for path in (ROOT / 'configs').glob('*.py')} <= set(re.findall(r'\w+', out))


@pytest.mark.parametrize('name', COMMANDS)
def test_help_of_a_command_reads_like_a_manual_page(call, name):
    code, out, _ = call(name, '--help')
    parts = [f'usage: slak-mm {name} ', '\noptions:\n', '\nExamples:\n    ', '\nExit codes:\n    0 ']
    places = [out.find(part) for part in parts]
    assert code == 0 and -1 not in places and places == sorted(places)
    assert call('help', name)[1] == out
    docstring = importlib.import_module(f'slak_mm.cli.commands.{console.MODULES[name]}').__doc__
    assert docstring.splitlines()[0] in out and '``' not in out


@pytest.mark.parametrize('name, command', [('checkpoint', 'convert'), ('benchmark', 'op')])
def test_help_of_a_subcommand_has_its_own_examples(call, name, command):
    examples = call(name, command, '--help')[1].partition('Examples:\n')[2].partition('\n\n')[0].splitlines()
    assert examples and all(line.startswith(f'    slak-mm {name} {command}') for line in examples)


def test_examples_of_the_help_can_be_parsed(call, monkeypatch):
    for name in COMMANDS:
        module = importlib.import_module(f'slak_mm.cli.commands.{console.MODULES[name]}')
        for line in module.__doc__.partition('Examples:\n')[2].splitlines():
            words = line.partition('#')[0].replace('"', '').split()
            start = next(index for index, word in enumerate(words) if word in ('slak-mm', 'slak_mm')) + 1
            assert words[start] == name
            monkeypatch.setattr(sys, 'argv', words[start:])
            module.parse_args()


@pytest.mark.parametrize(
    'arguments, code, message',
    [
        (['trian'], 2, 'there is no command "trian"; did you mean train?'),
        (['xyz'], 2, '"slak-mm --help" lists them'),
        (['train'], 2, 'slak-mm train: error: the following arguments are required: config'),
        (['train', 'upernet_slak_x_ade20k'], 1, 'Did you mean upernet_slak_'),
        (['train', 'x'], 1, f'Its configs are in {ROOT / "configs"}.'),
    ],
)
def test_mistakes(call, arguments, code, message):
    result, out, err = call(*arguments)
    assert (result, out) == (code, '') and message in err


def test_version(call):
    assert call('--version') == (None, f'{slak_mm.__version__}\n', '')


@pytest.mark.parametrize('name', ['upernet_slak_t_ade20k', 'upernet_slak_t_ade20k.py'])
def test_a_config_by_name(config_path, name, tmp_path, monkeypatch):
    assert slak_mm.config_path(name) == cli.load_config(name).filename == config_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text('model = dict(type="Mine")')
    # A file of that name comes first.
    cfg = cli.load_config(name) if name.endswith('.py') else None
    assert cfg is None or cfg.model.type == 'Mine'


def test_a_config_inherits_from_one_by_name(config_path, tmp_path):
    theirs = Config.fromfile(config_path)
    path = tmp_path / 'mine.py'
    change = 'model = dict(decode_head=dict(num_classes=7))\nscale = _base_.crop_size'
    path.write_text(f"_base_ = 'slak_mm::upernet_slak_t_ade20k.py'\n{change}")
    by_name = cli.load_config(str(path))
    assert by_name.model.decode_head.num_classes == 7 and by_name.scale == theirs.crop_size
    assert by_name.model.backbone == theirs.model.backbone
    # Without this package's reader, in tools of the frameworks:
    path.write_text(f"_base_ = __import__('slak_mm').config_path('upernet_slak_t_ade20k')\n{change}")
    assert Config.fromfile(path).to_dict() == by_name.to_dict()
    path.write_text("_base_ = ['slak_mm::upernet_slak_x']")
    with pytest.raises(cli.ConfigOverrideError, match='slak_mm has no config "upernet_slak_x".*Did you mean'):
        cli.load_config(str(path))
    path.write_text(
        "_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'"
    )  # the framework's own spelling goes on working
    assert cli.load_config(str(path)).model.type == 'RetinaNet'
