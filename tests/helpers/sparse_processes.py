"""Sparse training in one of two processes, which import it by this name."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from slak_mm.sparsity import SparseTraining, average_, broadcast_masks, same_on_all_ranks, select_parameters

STEPS = 6


def make_net():
    net = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 3)).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return net


def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=g).double(), torch.randint(0, 3, (8,), generator=g)) for _ in range(STEPS)]


def train(net, model, mode, seed, part):
    schedule = dict(total_steps=STEPS, update_interval=2, stop_fraction=1.0)
    options = dict(mode=mode, distribution='uniform', sparsity=0.5, seed=seed)
    sparse = SparseTraining(select_parameters(net), **schedule, **options)
    sparse.initialize()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    sparse.attach(optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    return sparse, dict(weights=net.state_dict(), hash=sparse.hash())


def process(rank, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    torch.set_num_threads(1)
    mean = torch.full((3,), float(rank))
    average_([mean])
    mask = torch.arange(11) % 2 == rank
    other = torch.arange(6).view(2, 3) % 3 == rank
    broadcast_masks([mask, other])
    found = dict(
        mean=mean, masks=(mask, other), same=same_on_all_ranks('ab' * 32), differ=same_on_all_ranks(f'{rank}b' * 32)
    )
    for mode in ('static', 'set', 'rigl'):
        net = make_net()
        half = slice(4 * rank, 4 * rank + 4)
        # Different generators, as if the processes had drawn differently.
        sparse, found[mode] = train(net, DistributedDataParallel(net), mode, rank, half)
        sparse.check_agreement()
    next(iter(sparse.masks.values())).view(-1)[0] ^= rank == 1
    try:
        sparse.check_agreement()
        found['disagreement'] = ''
    except RuntimeError as error:
        found['disagreement'] = str(error)
    torch.save(found, f'{folder}/{rank}.pt')
    dist.destroy_process_group()
