"""A small model with data and a runner, for tests of sparse training."""

from __future__ import annotations

import uuid

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

from slak_mm.cli import leave_process_group
from slak_mm.engine import SparsityHook

NAMES = ('backbone.0.weight', 'backbone.2.weight', 'backbone.4.weight')


class Images(Dataset):
    """Random images with labels; remembers which were taken."""

    metainfo: dict = {}

    def __init__(self, number: int = 64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(number, 3, 6, 6, generator=generator)
        self.labels = torch.randint(0, 4, (number,), generator=generator)
        self.taken: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        self.taken.append(int(index))
        return dict(inputs=self.images[index], labels=self.labels[index])


class Toy(BaseModel):
    """Three convolutions and a head; smooth, so that no gradient is exactly zero."""

    def __init__(self, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8) if norm else nn.Tanh(),
            nn.Conv2d(8, 10, 3),
            nn.Sequential(nn.Dropout(dropout), nn.Tanh()),
            nn.Conv2d(10, 6, (2, 1)),
        )
        self.head = nn.Linear(6, 4)
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, inputs, labels, mode='tensor'):
        logits = self.head(self.backbone(inputs).mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, labels))
        # What is validated, for the tests to look at.
        self.seen.append({name: dict(self.named_parameters())[name].detach().clone() for name in NAMES})
        return [logits]


class NoMetric(BaseMetric):
    """Counts."""

    default_prefix = 'toy'

    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(count=len(results))


class ScaledWrapper(OptimWrapper):
    """What mmengine's AmpOptimWrapper does, on the CPU, with infinite gradients at will.

    Args:
        inf_at: Numbers of the backward passes, from 1, that overflow.
    """

    def __init__(self, inf_at=(), **kwargs) -> None:
        super().__init__(**kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=2.0**8, growth_interval=5)
        self.inf_at = inf_at

    def backward(self, loss, **kwargs):
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1
        if self._inner_count in self.inf_at:
            self.optimizer.param_groups[0]['params'][0].grad.view(-1)[0] = float('inf')

    def step(self, **kwargs):
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()

    def state_dict(self):
        return dict(super().state_dict(), loss_scaler=self.loss_scaler.state_dict())

    def load_state_dict(self, state_dict):
        self.loss_scaler.load_state_dict(state_dict.pop('loss_scaler'))
        super().load_state_dict(state_dict)


class Probe(Hook):
    """Calls a function after every iteration, after all other hooks."""

    priority = 'LOWEST'

    def __init__(self, function) -> None:
        self.function = function

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.function(runner)


def make_runner(
    work_dir,
    hooks=(),
    iters=8,
    optimizer='AdamW',
    wrapper=None,
    batch_size=4,
    model=None,
    checkpoint_interval=1000,
    val_interval=1000,
    resume=False,
    load_from=None,
    log_level='WARNING',
    checkpoint=None,
    train_cfg=None,
    metric=None,
    schedulers=None,
    **wrapper_options,
) -> Runner:
    """A runner over the toy model, ready to train.

    ``optimizer`` may end in '-fused'; ``checkpoint`` has arguments of the checkpoint hook.
    """
    kind, _, fused = optimizer.partition('-')
    options = dict(AdamW=dict(lr=0.01, weight_decay=0.05), SGD=dict(lr=0.1, momentum=0.9))[kind]
    optim_wrapper = dict(
        type=wrapper or OptimWrapper,
        **wrapper_options,
        optimizer=dict(options, type=kind, **(dict(fused=True) if fused else {})),
    )
    epochs = 'max_epochs' in (train_cfg or {})
    loader = dict(dataset=Images(), batch_size=batch_size, num_workers=0, collate_fn=dict(type='default_collate'))
    return Runner(
        model=model or Toy(),
        work_dir=str(work_dir),
        resume=resume,
        load_from=load_from,
        experiment_name=f'toy{uuid.uuid4().hex}',
        train_dataloader=dict(
            loader, sampler=dict(type='DefaultSampler' if epochs else 'InfiniteSampler', shuffle=epochs)
        ),
        val_dataloader=dict(loader, dataset=Images(8), sampler=dict(type='DefaultSampler', shuffle=False)),
        val_cfg=dict(),
        val_evaluator=[metric or NoMetric()],
        train_cfg=train_cfg or dict(by_epoch=False, max_iters=iters, val_interval=val_interval),
        param_scheduler=schedulers,
        optim_wrapper=optim_wrapper,
        custom_hooks=list(hooks),
        default_hooks=dict(
            checkpoint=dict(
                dict(type='AtomicCheckpointHook', by_epoch=False, interval=checkpoint_interval), **(checkpoint or {})
            ),
            logger=dict(type='LoggerHook', interval=1),
        ),
        log_processor=dict(by_epoch=False),
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        randomness=dict(seed=0),
        log_level=log_level,
    )


def process(rank: int, out: str, *variants: str) -> None:
    """Train in one of two processes, and save what came out; a variant is ``distribution:mode`` or ``two-parts``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{out}/store', rank=rank, world_size=2)
    for variant in variants:
        (train_in_two_parts if variant == 'two-parts' else train_variant)(out, rank, *variant.split(':'))
    torch.distributed.barrier()
    leave_process_group()


def train_variant(out: str, rank: int, distribution: str, mode: str) -> None:
    hook = SparsityHook(mode=mode, distribution=distribution, sparsity=0.4, update_interval=2)
    # Wrapped here, because mmengine's launcher takes a GPU for granted.
    model = MMDistributedDataParallel(Toy())
    runner = make_runner(f'{out}/{rank}', [hook], model=model, batch_size=2)
    runner.train()
    torch.save(
        dict(
            masks=hook.masks,
            state=model.module.state_dict(),
            hash=hook.training.hash(),
            updates=hook.training.updates,
            taken=runner.train_dataloader.dataset.taken,
        ),
        f'{out}/{distribution}{rank}.pth',
    )


def train_in_two_parts(out: str, rank: int, _: str) -> None:
    """A whole run, and one that goes on from a checkpoint inside an accumulation."""
    options = dict(iters=8, batch_size=2, accumulative_counts=3, checkpoint_interval=1)
    for name, last in (('whole', None), ('resumed', f'{out}/whole/iter_4.pth')):
        model = MMDistributedDataParallel(Toy())
        runner = make_runner(f'{out}/{name}', model=model, resume=bool(last), load_from=last, **options)
        runner.train()
        torch.save(model.module.state_dict(), f'{out}/{name}{rank}.pth')
        torch.distributed.barrier()
