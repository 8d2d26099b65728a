"""Condense the reference results of the official code into {name}_goldens.npz for each family, sparsity and ERF.

Usage: python tests/data/make_goldens.py REFERENCE_FOLDER REFERENCE_FOLDER_2

The reference folders hold outputs of the official implementations (github.com/VITA-Group/SLaK at
44b4aab, github.com/lidc54/shift-wiseConv at 2202e6b; in the second github.com/AILab-CVC/UniRepLKNet
at b5677d8, github.com/DingXiaoH/RepLKNet-pytorch at b76808a), run in float64 with weights and inputs
given by formula (tests/helpers/reference.py). Of each array this keeps at most LIMIT values at equal
distances, and the mean and standard deviation of all of them; of the index tables of ShiftWise and of
the names and shapes of networks a hash. The results of sparse training and JSON files are small and kept
whole. The second folder also has the results of RepLKNet's script for effective receptive fields, on
synthetic maps and on networks.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

LIMIT = 300
WHOLE = ('out', 'kernel', 'bias')  # arrays that are not strided in the reference


def condense(reference: Path, *patterns: str) -> dict[str, np.ndarray]:
    """The kept values of every array, and stride, mean and deviation under ``…/stats``."""
    condensed: dict[str, np.ndarray] = {}
    for file in sorted(f for p in patterns for f in (reference / 'goldens').glob(p)):
        source = np.load(file)
        names = [
            n
            for n in source.files
            if f'{n}_stride' in source.files or n.startswith(('buf:', 'kernel_', 'scale_', 'shift_')) or n in WHOLE
        ]
        for name in names:
            values = source[name].reshape(-1)
            step = max(1, -(-values.size // LIMIT))
            stride = int(source.get(f'{name}_stride', 1))
            key = f'{file.stem}/{name}'
            condensed[key] = values[::step].astype(np.float32)
            condensed[f'{key}/stats'] = np.array(
                [stride * step, source.get(f'{name}_mean', values.mean()), source.get(f'{name}_std', values.std())],
                np.float64,
            )
    return condensed


def shiftwise_hashes(reference: Path) -> dict[str, np.ndarray]:
    """Hashes of index tables and ghost channels."""
    condensed: dict[str, np.ndarray] = {}
    tables = json.loads((reference / 'goldens' / 'tables.json').read_text())
    condensed['tables'] = np.array(
        [
            f'{t["big_kernel"]} {t["small_kernel"]} {t["c_out"]} {t["N_rep"]} '
            f'{t["sha256_pad_hv"][:16]} {t["sha256_idx_identit"][:16]}'
            for t in tables['addshift']
        ]
    )
    condensed['ghosts'] = np.array(
        [
            f'{t["version"]} {t["channels"]} {t["ghost_ratio"]} {t["n_ghost"]} '
            f'{t["sha256_ghost"][:16]} {t["sha256_rep"][:16]}'
            for t in tables['ghost']
        ]
    )
    return condensed


def manifests(reference: Path, pattern: str) -> dict[str, np.ndarray]:
    """Hashes of names and shapes of whole networks."""
    condensed: dict[str, np.ndarray] = {}
    for file in sorted((reference / 'manifests').glob(pattern)):
        manifest = json.loads(file.read_text())
        lines = sorted(f'{key} {shape}' for key, shape, _ in manifest['state_dict'])
        condensed[f'manifest/{file.stem}'] = np.array(hashlib.sha256('\n'.join(lines).encode()).hexdigest())
    return condensed


def entries(reference: Path, name: str, family: str) -> np.ndarray:
    """The entries of a JSON file that begin with the name of a family, as bytes."""
    content = json.loads((reference / 'goldens' / f'{name}.json').read_text())
    content = content.get('groups', content)
    kept = {key: value for key, value in content.items() if key.startswith(family)}
    return np.frombuffer(json.dumps(kept).encode(), np.uint8)


def sparse_training(reference: Path) -> dict[str, np.ndarray]:
    """All arrays of sparse training, and its densities, logs and settings as JSON."""
    goldens = reference / 'goldens'
    arrays = dict(np.load(goldens / 'sparse.npz'))
    report = json.loads((goldens / 'sparse.json').read_text())
    arrays['report'] = np.frombuffer(json.dumps(report).encode(), np.uint8)
    return arrays


def receptive_fields(reference: Path) -> dict[str, np.ndarray]:
    """Contributions of networks, their sum, and sides and ratios by RepLKNet's rule, -1 where there is none."""
    condensed = condense(reference, 'erf_*.npz')
    for file in sorted((reference / 'goldens').glob('erf_*.npz')):
        source = np.load(file)
        condensed[f'{file.stem}/total'] = source['total']
        condensed[f'{file.stem}/squares'] = np.stack([source['side:replknet'], source['ratio:replknet']], 1)
    synthetic = json.loads((reference / 'goldens' / 'erf_synthetic.json').read_text())['maps']
    for name, entry in synthetic.items():
        # (height, width, offset of the center, kind, amplitude, deviations, noise, seed)
        condensed[f'{name}/formula'] = np.array([str(value) for value in entry['params']])
        squares = [square or (-1, -1) for square in entry['side_and_ratio']['replknet']]
        condensed[f'{name}/squares'] = np.array(squares, np.float64)
    return condensed


def main(reference: Path, reference2: Path) -> None:
    arrays = {
        'slak': condense(reference, 'feat_slak*', 'logits_slak*', 'block_train_slak*'),
        'shiftwise': {
            **condense(
                reference,
                'feat_shiftwise*',
                'logits_shiftwise*',
                'block_train_shiftwise*',
                'addshift_*',
                'equivalent_conv_*',
            ),
            **shiftwise_hashes(reference),
            **manifests(reference, 'shiftwise_*.json'),
        },
        'sparse': sparse_training(reference),
        'unireplknet': {
            **condense(
                reference2, 'feat_unireplknet*', 'logits_unireplknet*', 'block_train_unireplknet*', 'merged_dilated_*'
            ),
            **manifests(reference2, 'unireplknet_*.json'),
            **{name: entries(reference2, name, 'unireplknet') for name in ('layer_ids', 'merged_stats')},
        },
        'replknet': {
            **condense(reference2, 'feat_replknet*', 'block_train_replknet*'),
            **manifests(reference2, 'replknet_*.json'),
            'merged_stats': entries(reference2, 'merged_stats', 'replknet'),
        },
        'erf': receptive_fields(reference2),
    }
    for family, condensed in arrays.items():
        path = Path(__file__).with_name(f'{family}_goldens.npz')
        np.savez_compressed(path, **condensed)


if __name__ == '__main__':
    main(*map(Path, sys.argv[1:]))
