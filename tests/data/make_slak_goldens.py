"""Condense the reference results of the official SLaK code into slak_goldens.npz.

Usage: python tests/data/make_slak_goldens.py REFERENCE_FOLDER

The reference folder holds outputs of the official implementation (github.com/VITA-Group/SLaK at
44b4aab), run in float64 with weights and inputs given by formula (tests/reference.py). Of each
array this keeps at most LIMIT values at equal distances, and the mean and standard deviation of
all of them.
"""

import sys
from pathlib import Path

import numpy as np

LIMIT = 400


def main(reference: Path) -> None:
    condensed: dict[str, np.ndarray] = {}
    files = sorted(
        f for pattern in ('feat_slak*', 'logits_slak*', 'block_train_slak*')
        for f in (reference / 'goldens').glob(pattern))  # fmt: skip
    for file in files:
        source = np.load(file)
        names = [n[: -len('_stride')] for n in source.files if n.endswith('_stride')]
        names += [n for n in source.files if n.startswith('buf:') and source[n].ndim == 0]
        for name in names:
            values = source[name].reshape(-1)
            step = max(1, -(-values.size // LIMIT))
            stride = int(source.get(f'{name}_stride', 1))
            key = f'{file.stem}/{name}'
            condensed[key] = values[::step].astype(np.float32)
            condensed[f'{key}/stats'] = np.array(
                [stride * step, source.get(f'{name}_mean', values.mean()),
                 source.get(f'{name}_std', values.std())], np.float64)  # fmt: skip
    np.savez_compressed(Path(__file__).with_name('slak_goldens.npz'), **condensed)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
