"""Which parameters are sparse."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .errors import FrozenWeights, SparsityError

#: Names that each selection keeps, among the weights of convolutions and linear layers. Families of
#: backbones add their own.
SELECTIONS: dict[str, str] = {
    'all': '',
    # Liu et al. call it `only_L`: the rectangular kernels without the small square one beside them.
    'large_kernel': r'large_kernel\.((tall|wide|square|large)\.conv|filters\.\d+)\.weight$',
}

_BLOCK = re.compile(r'^(?P<root>.*?)stages\.\d+\.\d+\.large_kernel\.')
_PATH = re.compile(r'^(?P<layer>.*large_kernel\.filters)\.(?P<path>\d+)\.weight$')


def select_parameters(
    model: nn.Module,
    preset: str | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> dict[str, nn.Parameter]:
    """Choose the parameters that masks may be made for.

    Only the weights of convolutions and linear layers can be chosen, and only trainable ones.
    Norms, biases, layer scales and GRN's ``gamma`` and ``beta`` never are, whatever their number
    of dimensions: a mask made from the zeros of a fresh GRN would hold it at zero for ever.

    Args:
        model: The network. Names are those of its ``named_parameters()``.
        preset: ``'all'``, ``'backbone'`` (all within the large-kernel backbones of the model, the choice of the
            official downstream code), ``'large_kernel'`` (tall, wide and square kernels without the small ones beside
            them, and the filters that kernels are made up of) or another of :data:`SELECTIONS`. Default: ``'all'``.
        include: Regular expressions; a parameter is kept if one is found in its name, or is the
            name of its module's type, such as ``'Linear'``. Default: all are kept.
        exclude: The same, to leave parameters out.

    Returns:
        The parameters by name, in the model's order.

    Raises:
        SparsityError: Nothing is left, the preset is unknown, or an expression is invalid.
        FrozenWeights: What is left does not require gradients.
    """
    modules = {
        f'{name}.weight' if name else 'weight': module
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear))
    }
    chosen = {name: parameter for name, parameter in model.named_parameters() if name in modules}
    if not chosen:
        raise SparsityError(
            f'{type(model).__name__} has no trainable weight of a convolution or linear layer that could be sparse'
        )
    if preset == 'backbone':
        roots = tuple({found.group('root') for found in map(_BLOCK.match, chosen) if found})
        chosen = {
            name: parameter
            for name, parameter in chosen.items()
            if any(name.startswith((f'{root}stages.', f'{root}downsample_layers.')) for root in roots)
        }
    elif preset is not None and preset not in SELECTIONS:
        raise SparsityError(f'unknown selection {preset!r}: choose from backbone, {", ".join(SELECTIONS)}')
    else:
        pattern = SELECTIONS[preset or 'all']
        chosen = {name: p for name, p in chosen.items() if re.search(pattern, name)}
    for patterns, wanted in ((include, True), (exclude, False)):
        if patterns is not None:
            chosen = {
                name: parameter
                for name, parameter in chosen.items()
                if _matches(name, type(modules[name]).__name__, patterns) == wanted
            }
    if not chosen:
        raise SparsityError(
            f'no weight of {type(model).__name__} is selected by preset={preset!r}, '
            f'include={include!r}, exclude={exclude!r}; look at the names of '
            'model.named_parameters()'
        )
    trainable = {name: parameter for name, parameter in chosen.items() if parameter.requires_grad}
    if not trainable:
        raise FrozenWeights(
            f'no weight of {type(model).__name__} is selected: the {len(chosen)} candidates are all frozen'
        )
    return trainable


def _matches(name: str, type_name: str, patterns: str | Sequence[str]) -> bool:
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            if re.search(pattern, name) or re.fullmatch(pattern, type_name):
                return True
        except re.error as error:
            raise SparsityError(f'{pattern!r} is no regular expression: {error}') from error
    return False


def path_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Group the names of the filters that large kernels are made up of by operator.

    Args:
        names: Parameter names.

    Returns:
        By the common part of the name (``….large_kernel.filters``) the names of its paths, in
        the order of their numbers. Other names are left out.
    """
    groups: dict[str, dict[int, str]] = {}
    for name in names:
        found = _PATH.match(name)
        if found:
            groups.setdefault(found.group('layer'), {})[int(found.group('path'))] = name
    return {layer: [paths[number] for number in sorted(paths)] for layer, paths in groups.items()}
