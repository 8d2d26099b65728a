"""The ``SparsityHook`` of a config."""

from mmengine.config import Config, ConfigDict

from slak_mm._config import type_name
from slak_mm.sparsity import MODES, PRESETS

from .errors import ConfigOverrideError

#: What ``--sparse`` takes: no sparsity, a mode of ``SparsityHook``, or one of its presets.
SPARSE_CHOICES = ('off', *MODES, *PRESETS)


def sparsity_hooks(cfg: Config) -> list[ConfigDict]:
    """The ``SparsityHook`` of a config, or several."""
    return [hook for hook in cfg.get('custom_hooks') or [] if type_name(hook) == 'SparsityHook']


def set_sparse(cfg: Config, choice: str) -> None:
    """Add, change or remove the ``SparsityHook`` of a config.

    Masks come from the zeros of the weights that the config names, and with ``--from-scratch``
    from what the hook of the config says under ``from_scratch``, else from ERK at a sparsity of
    0.4, or for a preset from its own distribution.
    """
    present = sparsity_hooks(cfg)
    hooks = [hook for hook in cfg.get('custom_hooks') or [] if hook not in present]
    if choice in PRESETS:
        drawn = {key: PRESETS[choice][key] for key in ('distribution', 'sparsity')}
        hook = ConfigDict(type='SparsityHook', preset=choice, distribution='from_weights', from_scratch=drawn)
        hooks.append(hook)
    elif choice != 'off':
        drawn = dict(distribution='erk', sparsity=0.4)
        new = ConfigDict(type='SparsityHook', distribution='from_weights', from_scratch=drawn)
        hook = present[0] if present else new
        hooks.append(ConfigDict(hook, mode=choice))
    cfg.custom_hooks = hooks


def set_sparsity(cfg: Config, sparsity: float) -> None:
    """Let the ``SparsityHook`` of a config draw masks of a sparsity in (0, 1), whatever the weights are.

    Raises:
        ConfigOverrideError: The config has no such hook.
    """
    hooks = sparsity_hooks(cfg)
    if not hooks:
        raise ConfigOverrideError(
            f'--sparsity needs a SparsityHook; add one with --sparse {"|".join(SPARSE_CHOICES[1:])}.'
        )
    for hook in hooks:
        own = hook.get('distribution', 'from_weights')
        drawn = dict(distribution='erk' if own == 'from_weights' else own)
        hook.from_scratch = dict(hook.get('from_scratch') or drawn, sparsity=sparsity)
    masks_from_scratch(cfg)


def masks_from_scratch(cfg: Config) -> None:
    """Let the ``SparsityHook`` of a config draw masks, for weights without zeros.

    What the hook has under ``from_scratch`` replaces its arguments of the same names.

    Raises:
        ConfigOverrideError: The hook has nothing under ``from_scratch`` and takes its masks from
            the weights, which would be random.
    """
    for hook in sparsity_hooks(cfg):
        if hook.get('from_scratch'):
            hook.update(hook.pop('from_scratch'))
        elif hook.get('distribution', 'from_weights') == 'from_weights' and not hook.get('preset'):
            raise ConfigOverrideError(
                'The SparsityHook of this config takes its masks from the zeros of pretrained '
                'weights, which a run from scratch has not: add --sparse off to train densely, '
                'or --sparsity 0.4 to draw masks.'
            )
