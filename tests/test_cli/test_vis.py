"""``--vis``: the backends that a config gets, and where they write."""

import importlib.util

import pytest
from mmengine.config import Config
from mmengine.registry import VISBACKENDS

from slak_mm import cli
from slak_mm.cli.vis import set_vis


@pytest.fixture(autouse=True)
def all_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)


def kinds(cfg):
    return [backend.type for backend in cfg.visualizer.vis_backends]


@pytest.mark.parametrize('name', cli.VIS_BACKENDS)
def test_missing_package(name, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(cli.ConfigOverrideError, match=f'--vis {name} needs the package "{name}": pip install {name}$'):
        set_vis(Config(), [name])


def test_backends_are_those_of_mmengine():
    assert all(VISBACKENDS.get(kind).__name__ == kind for kind in cli.VIS_BACKENDS.values())


def test_backends_come_beside_those_of_the_config():
    cfg = Config(dict(visualizer=dict(type='SegLocalVisualizer', vis_backends=[dict(type='TensorboardVisBackend')])))
    set_vis(cfg, ['mlflow', 'tensorboard', 'mlflow'])
    assert cfg.visualizer.type == 'SegLocalVisualizer'
    assert kinds(cfg) == ['TensorboardVisBackend', 'MLflowVisBackend']
    bare = Config()
    set_vis(bare, ['wandb'])
    assert kinds(bare) == ['LocalVisBackend', 'WandbVisBackend']  # the former is mmengine's default


def test_names_are_separated_by_commas_or_options(call_tool, monkeypatch):
    monkeypatch.setattr('sys.argv', ['train', 'config', '--vis', 'wandb,mlflow', '--vis', 'clearml'])
    from slak_mm.cli.commands.train import parse_args

    assert parse_args().vis == ['wandb', 'mlflow', 'clearml']
    result = call_tool('train', 'config', '--vis', 'wandb,tensorflow', code=2)
    assert 'must be of tensorboard, wandb, mlflow, clearml, got wandb,tensorflow' in result.err


def test_a_resumed_run_goes_on_in_the_folder_of_the_run_before(tmp_path):
    def place(name, resumed, **settings):
        monkey.setattr('time.strftime', lambda _: name)
        cfg = Config(dict(work_dir=str(tmp_path / 'work')))
        set_vis(cfg, ['tensorboard', 'wandb', 'clearml'])
        cfg.visualizer.vis_backends[2].init_kwargs = settings
        cli.place_vis(cfg, resumed)
        _, board, wandb, clearml = cfg.visualizer.vis_backends
        (tmp_path / 'work' / 'vis' / name).mkdir(parents=True, exist_ok=True)
        assert board == dict(type='TensorboardVisBackend', save_dir=wandb.save_dir)
        return board.save_dir, wandb.init_kwargs, clearml.init_kwargs

    with pytest.MonkeyPatch.context() as monkey:
        first, wandb, clearml = place('1', resumed=True)  # nothing is there to go on with
        assert first == str(tmp_path / 'work' / 'vis' / '1')
        assert (wandb['id'], clearml['continue_last_task']) == ('work_1', False)
        second, wandb, clearml = place('2', resumed=False, project='mine')
        assert second != first and wandb['id'] == 'work_2' and wandb['project'] == 'mine'
        third, again, clearml = place('3', resumed=True, project='mine')
        assert (third, again) == (second, wandb)
        assert (clearml['task_name'], clearml['continue_last_task']) == ('work_2', 0)


@pytest.mark.parametrize('server', ['', 'http://server:5000'])
def test_mlflow_writes_a_data_base_or_to_the_server_of_its_variable(server, tmp_path, monkeypatch):
    monkeypatch.setenv('MLFLOW_TRACKING_URI', server)
    cfg = Config(dict(work_dir=str(tmp_path / 'work')))
    set_vis(cfg, ['mlflow'])
    cli.place_vis(cfg, resumed=False)
    backend = cfg.visualizer.vis_backends[1]
    assert backend.exp_name == 'work'
    assert backend.tracking_uri == (server or f'sqlite:///{backend.save_dir}/mlflow.db')
    assert backend.get('artifact_location') == (None if server else backend.save_dir)
