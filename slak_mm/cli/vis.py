"""Logging to TensorBoard and the like, by mmengine's own backends."""

import argparse
import importlib.util
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from slak_mm._config import type_name

from .errors import ConfigOverrideError

#: Backends by the name of the package that they need.
VIS_BACKENDS = dict(
    tensorboard='TensorboardVisBackend', wandb='WandbVisBackend', mlflow='MLflowVisBackend', clearml='ClearMLVisBackend'
)


def vis_backends(text: str) -> list[str]:
    """Argument type: names of :data:`VIS_BACKENDS`, separated by commas."""
    names = text.split(',')
    if not set(names) <= set(VIS_BACKENDS):
        raise argparse.ArgumentTypeError(f'must be of {", ".join(VIS_BACKENDS)}, got {text}')
    return names


def set_vis(cfg: Config, names: Sequence[str]) -> None:
    """Add backends to the config's visualizer, beside those that it has.

    Raises:
        ConfigOverrideError: The package of one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigOverrideError(f'--vis {name} needs the package "{name}": pip install {name}')
    visualizer = cfg.get('visualizer') or ConfigDict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
    backends = visualizer.get('vis_backends') or []
    backends = [backends] if isinstance(backends, dict) else list(backends)
    known = {type_name(backend) for backend in backends}
    kinds = dict.fromkeys(VIS_BACKENDS[name] for name in names)
    visualizer.vis_backends = backends + [ConfigDict(type=kind) for kind in kinds if kind not in known]
    cfg.visualizer = visualizer


def place_vis(cfg: Config, resumed: bool) -> None:
    """Let the backends of :func:`set_vis` write to a folder of the work dir, a resumed run to that of the run before.

    What the config says of a backend stays. Weights & Biases and ClearML go on with the run itself; TensorBoard sees
    one run in one folder; MLflow, whose runs have fixed parameters, gets another run in the same experiment.
    """
    folder = Path(cfg.work_dir, 'vis')
    earlier = sorted(path for path in folder.glob('*') if path.is_dir()) if resumed else []
    run = earlier[-1] if earlier else folder / time.strftime('%Y%m%d_%H%M%S')
    work = Path(cfg.work_dir).absolute().name
    name = f'{work}_{run.name}'
    server = os.environ.get('MLFLOW_TRACKING_URI')
    place = dict(tracking_uri=f'sqlite:///{run.absolute()}/mlflow.db', artifact_location=str(run.absolute()))
    settings: dict[str, dict[str, Any]] = dict(
        TensorboardVisBackend={},
        # mmengine's default, a folder of files, is refused by MLflow from version 3.
        MLflowVisBackend=dict(exp_name=work, **(dict(tracking_uri=server) if server else place)),
        # The config of a resumed run says so, which is another config.
        WandbVisBackend=dict(init_kwargs=dict(id=name, name=name, resume='allow', allow_val_change=True)),
        # 0: iterations count on from where the checkpoint is.
        ClearMLVisBackend=dict(init_kwargs=dict(task_name=name, continue_last_task=0 if earlier else False)),
    )
    for backend in cfg.visualizer.vis_backends:
        if type_name(backend) in settings:
            for key, value in dict(settings[type_name(backend)], save_dir=str(run)).items():
                theirs = backend.get(key)
                backend[key] = {**value, **(theirs or {})} if isinstance(value, dict) else theirs or value
