"""Sparse training: masks, where they come from, how they change, and how they are kept.

:class:`SparseTraining` is what a training loop needs; the functions it consists of are here too.
Nothing in this package knows mmengine.

Masks are boolean and keyed by parameter name; True is a weight that exists. Liu et al. (ICLR 2023, section 4.2) and Li
et al. (CVPR 2025) train with masks that change: every so many steps the smallest weights go and as many others start
from zero, as in SET (Mocanu et al., Nature Communications 2018) and RigL (Evci et al., ICML 2020).
"""

from .distributed import average_, broadcast_masks, same_on_all_ranks
from .distributions import (
    SAMPLINGS,
    draw_mask,
    erk_densities,
    require_zeros,
    snip_densities,
    snip_gradients,
    snip_scores,
    uniform_densities,
)
from .errors import DenseWeights, FrozenWeights, SparsityError
from .masks import masks_from_state, masks_hash, pack_mask, unpack_mask, zero_pruned_
from .rules import gradient_grow, magnitude_prune, random_grow
from .schedule import PRESETS, UpdateSchedule, cosine_prune_rate
from .select import SELECTIONS, path_groups, select_parameters
from .statistics import LayerStatistics, Statistics, format_table
from .training import DISTRIBUTIONS, MODES, SparseTraining

__all__ = [
    'DISTRIBUTIONS',
    'MODES',
    'PRESETS',
    'SAMPLINGS',
    'SELECTIONS',
    'DenseWeights',
    'FrozenWeights',
    'LayerStatistics',
    'SparseTraining',
    'SparsityError',
    'Statistics',
    'UpdateSchedule',
    'average_',
    'broadcast_masks',
    'cosine_prune_rate',
    'draw_mask',
    'erk_densities',
    'format_table',
    'gradient_grow',
    'magnitude_prune',
    'masks_from_state',
    'masks_hash',
    'pack_mask',
    'path_groups',
    'random_grow',
    'require_zeros',
    'same_on_all_ranks',
    'select_parameters',
    'snip_densities',
    'snip_gradients',
    'snip_scores',
    'uniform_densities',
    'unpack_mask',
    'zero_pruned_',
]
