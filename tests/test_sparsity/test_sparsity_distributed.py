"""Two processes agree about masks, and train like one with the joint batch."""

import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
from sparse_processes import make_net, process, train

from slak_mm.sparsity import average_, broadcast_masks, same_on_all_ranks


def test_two_processes():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (folder,), nprocs=2)
        first, second = (torch.load(Path(folder) / f'{rank}.pt') for rank in (0, 1))
    for found in (first, second):
        assert found['mean'].tolist() == [0.5] * 3
        assert torch.equal(found['masks'][0], torch.arange(11) % 2 == 0)
        assert torch.equal(found['masks'][1], torch.arange(6).view(2, 3) % 3 == 0)
        assert found['same'] and not found['differ']
        assert 'masks of the processes differ' in found['disagreement']
    for mode in ('static', 'set', 'rigl'):
        assert first[mode]['hash'] == second[mode]['hash']
        for name, tensor in first[mode]['weights'].items():
            assert torch.equal(tensor, second[mode]['weights'][name])
        net = make_net()
        _, alone = train(net, net, mode, 0, slice(None))
        if mode != 'set':  # only rank 0 draws like the single process
            assert alone['hash'] == first[mode]['hash']
        for name, tensor in alone['weights'].items():
            torch.testing.assert_close(first[mode]['weights'][name], tensor, rtol=1e-9, atol=1e-12)


def test_without_processes_nothing_happens():
    tensor, mask = torch.ones(2), torch.ones(3, dtype=torch.bool)
    average_([tensor])
    broadcast_masks([mask])
    assert same_on_all_ranks('f' * 64) and bool(mask.all()) and bool((tensor == 1).all())
