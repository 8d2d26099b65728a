"""Adapt a config to the device."""

from collections.abc import Callable

import mmengine
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.runner import Runner

from slak_mm._config import model_of, type_name, walk
from slak_mm.models import registered_backbones

from .errors import ConfigOverrideError


def adapt_to_device(cfg: Config, has_gpu: Callable[[], bool] = torch.cuda.is_available) -> None:
    """Make a config run where there is no GPU; without effect where there is one.

    SyncBN becomes BN (it exists for GPUs only; in a distributed run each process then has its
    own statistics), processes talk through gloo instead of nccl, and the model wrapper is told
    that there is no device to put the model on.

    Raises:
        ConfigOverrideError: Mixed precision was asked for, which mmengine has for GPUs only.
    """
    if has_gpu():
        return
    wrapper = cfg.get('optim_wrapper') or {}
    if type_name(wrapper) == 'AmpOptimWrapper':
        raise ConfigOverrideError(
            "Mixed precision (--amp, AmpOptimWrapper) needs a GPU: mmengine's wrapper does not "
            'work on the CPU. Run without it.'
        )
    changed = 0
    for node in walk(model_of(cfg)):
        if type_name(node) in registered_backbones():  # whose norm_cfg is SyncBN by default
            node.setdefault('norm_cfg', ConfigDict(type='SyncBN', requires_grad=True))
    for node in walk([cfg.model, cfg.get('norm_cfg')]):
        if type_name(node) in ('SyncBN', 'MMSyncBN'):
            node['type'] = 'BN'
            changed += 1
    if changed:
        print_log(f'No GPU here: SyncBN is replaced by BN in {changed} places of the config.', logger='current')
    env_cfg = cfg.get('env_cfg') or {}
    if (env_cfg.get('dist_cfg') or {}).get('backend', 'nccl') == 'nccl':
        cfg.merge_from_dict({'env_cfg.dist_cfg.backend': 'gloo'})
    if cfg.get('launcher', 'none') != 'none':
        plain = dict(type='MMDistributedDataParallel', broadcast_buffers=False)
        plain.update(find_unused_parameters=cfg.get('find_unused_parameters', False))
        wrapper_cfg = ConfigDict(cfg.get('model_wrapper_cfg') or plain)
        wrapper_cfg.device_ids = None
        cfg.model_wrapper_cfg = wrapper_cfg


def usable_device(name: str) -> torch.device:
    """A device by its name.

    Raises:
        ConfigOverrideError: It cannot be used here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ConfigOverrideError(f'The device "{name}" cannot be used here: {why}') from error
    return device


def set_amp(cfg: Config) -> None:
    """Train in mixed precision.

    Raises:
        ConfigOverrideError: The optimizer wrapper is not one of mmengine's two.
    """
    wrapper = cfg.get('optim_wrapper') or ConfigDict()
    if type_name(wrapper) not in ('', 'OptimWrapper', 'AmpOptimWrapper'):
        raise ConfigOverrideError(f'--amp cannot be used with the optimizer wrapper "{type_name(wrapper)}".')
    wrapper.type = 'AmpOptimWrapper'
    wrapper.setdefault('loss_scale', 'dynamic')
    cfg.optim_wrapper = wrapper


def set_compile(cfg: Config) -> None:
    """Compile the model by mmengine's ``compile``, whose options stay if the config has some.

    Raises:
        ConfigOverrideError: PyTorch or mmengine is too old for that.
    """
    if not hasattr(torch, 'compile'):
        raise ConfigOverrideError(f'--compile needs PyTorch 2.0 or later, and this is {torch.__version__}.')
    if not hasattr(Runner, '_maybe_compile'):
        raise ConfigOverrideError(f'--compile needs mmengine 0.7.0 or later, and this is {mmengine.__version__}.')
    cfg.compile = cfg.get('compile') or True
