"""Checkpoints that a killed process or a full disk cannot spoil, and that a run goes on from exactly."""

import hashlib
import logging
import os.path as osp
import pickle
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import gather_object, get_rank, is_main_process, master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, save_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint
from torch import Tensor

from slak_mm._files import replacing
from slak_mm.checkpoints import unwrap_model

from .epoch_loop import ResumableEpochLoop
from .resume import GRADIENTS_KEY, RUN_KEY, describe_run, wrappers_of

_ATOMIC = 'slak_mm.atomic'


@register_backend(_ATOMIC, force=True)
class AtomicLocalBackend(LocalBackend):
    """Local files that are written whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a temporary file, have the disk hold it, and rename it."""
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        with replacing(filepath) as part:
            part.write_bytes(obj)


def checkpoint_pattern(template: str) -> re.Pattern[str]:
    """Matches the names that a template such as ``iter_{}.pth`` makes; group ``step`` is the number."""
    before, after = re.split(r'\{[^}]*\}', template, maxsplit=1)
    return re.compile(rf'{re.escape(before)}(?P<step>\d+){re.escape(after)}')


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, with nothing lost when a save is cut off.

    A checkpoint is written to a temporary file, which takes the checkpoint's name once the disk holds it. Then
    ``last_checkpoint`` moves in the same way, and only then checkpoints that are not kept any more are deleted, so
    that for a moment there is one more than ``max_keep_ckpts``. The same holds for the best checkpoints and the
    published ones. Storage other than local files works as with mmengine's hook.

    Checkpoints that an earlier run left in the folder, and that this run would overwrite or that lie
    beyond the one it goes on from, are moved to a folder ``earlier_<time>`` beside them.

    A checkpoint inside a gradient accumulation has the gradients so far of each process, one inside
    an epoch the place in it (see :class:`ResumableEpochLoop`), so that a resumed run is the same run.

    Arguments are those of mmengine's hook.
    """

    file_backend: Any
    keep_ckpt_ids: deque
    best_ckpt_path: str | None
    best_ckpt_path_dict: dict[str, str | None]
    _gradients: list[dict[str, Tensor]] | None = None
    _in_epoch = 0

    def before_train(self, runner: Any) -> None:
        """Find the folder, tidy it, and put back what the checkpoint to resume had."""
        super().before_train(runner)
        if self.file_client_args is None and isinstance(self.file_backend, LocalBackend):
            self.file_backend = AtomicLocalBackend()
            self.backend_args = dict(backend=_ATOMIC)
            # The folder may have been moved or copied since these paths were saved.
            self._exchange_best([path and str(Path(self.out_dir, Path(path).name)) for path in self._exchange_best([])])
            if is_main_process():
                self._tidy(runner)
        own = self._gradients[get_rank()] if self._gradients else {}
        for name, parameter in unwrap_model(runner.model).named_parameters():
            if name in own:
                parameter.grad = own[name].to(parameter.device)
        self._gradients = None
        if isinstance(runner.train_loop, ResumableEpochLoop):
            runner.train_loop.done = self._in_epoch

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Keep what is put back when training begins."""
        if getattr(runner, '_resume', False):
            self._gradients = checkpoint.get(GRADIENTS_KEY)
            self._in_epoch = checkpoint['meta'].get(RUN_KEY, {}).get('in_epoch', 0)

    def _tidy(self, runner: Any) -> None:
        """Remove what killed saves left, and move away what this run did not save and would overwrite."""
        folder = Path(self.out_dir)
        step = runner.epoch if self.by_epoch else runner.iter
        pattern = re.compile(rf'(best_.+_)?{checkpoint_pattern(self.filename_tmpl).pattern}|last_checkpoint')
        for path in folder.glob('.*.part'):
            if pattern.fullmatch(path.name[1:].rsplit('.', 2)[0]):
                path.unlink()
        found = [(path, pattern.fullmatch(path.name)) for path in sorted(folder.glob('*'))]
        later = [path for path, match in found if match and int(match['step'] or 0) > step]
        if later:
            aside = folder / f'earlier_{runner.timestamp}'
            aside.mkdir(exist_ok=True)
            for path in (*later, *folder.glob('last_checkpoint')):
                path.rename(aside / path.name)
            print_log(
                f'{folder} has checkpoints of an earlier run that this run would overwrite or that are beyond its '
                f'start, so they were moved to {aside}: {", ".join(path.name for path in later)}. '
                'To go on with that run, resume from one of them.',
                logger='current',
                level=logging.WARNING,
            )

    # Saving

    def after_train_iter(self, runner: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Save where it is due, knowing the place in the epoch."""
        self._in_epoch = batch_idx + 1
        super().after_train_iter(runner, batch_idx, *args, **kwargs)

    def after_train_epoch(self, runner: Any) -> None:
        """Save where it is due, at the end of the epoch."""
        self._in_epoch = 0
        super().after_train_epoch(runner)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        """Save, move the pointer, and only then delete what is not kept."""
        outdated = []
        if self.max_keep_ckpts > 0:
            kept = [*(kept for kept in self.keep_ckpt_ids if kept != step), step]
            outdated, kept = kept[: -self.max_keep_ckpts], kept[-self.max_keep_ckpts :]
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        if not all(wrapper.should_update() for wrapper in wrappers_of(runner.optim_wrapper).values()):
            parameters = unwrap_model(runner.model).named_parameters()
            # Processes have gradients of their own until the accumulation ends.
            self._gradients = gather_object({n: p.grad.cpu() for n, p in parameters if p.grad is not None})
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self._gradients = None
        if is_main_process():
            with replacing(Path(runner.work_dir, 'last_checkpoint')) as part:
                part.write_text(self.last_ckpt)
            for old in outdated:
                self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)))

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Add what only an exact continuation needs."""
        if 'optimizer' in checkpoint:
            epochs = isinstance(runner.train_loop, EpochBasedTrainLoop)
            checkpoint['meta'][RUN_KEY] = dict(describe_run(runner), in_epoch=self._in_epoch if epochs else 0)
            if self._gradients:
                checkpoint[GRADIENTS_KEY] = self._gradients

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        """Save what is better than before, and only then delete what was best."""
        if not self.save_best:
            return
        # mmengine deletes the best one so far before it saves a better one, where it knows of it.
        earlier = self._exchange_best([])
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            better = self._exchange_best([])
            self._exchange_best([new or old for new, old in zip(better, earlier)])
        for new, old in zip(better, earlier):
            if new and old and new != old and is_main_process():
                self._remove(old)

    def _exchange_best(self, paths: Sequence[str | None]) -> list[str | None]:
        """Have mmengine know these paths of the best checkpoints, by metric; returns those it knew."""
        if not self.save_best:
            return []
        paths = list(paths) or [None] * len(self.key_indicators)
        if len(self.key_indicators) == 1:
            before, self.best_ckpt_path = [self.best_ckpt_path], paths[0]
        else:
            before = [self.best_ckpt_path_dict.get(key) for key in self.key_indicators]
            self.best_ckpt_path_dict = dict(zip(self.key_indicators, paths))
        return before

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # as DeepSpeed saves
            self.file_backend.rmtree(path)

    @master_only
    def _publish_model(self, runner: Any, ckpt_path: str) -> None:
        """Write the entries to publish of a checkpoint to a file that is named after their hash."""
        checkpoint = _load_checkpoint(ckpt_path)
        published = {key: value for key, value in checkpoint.items() if key in self.published_keys}
        digest = hashlib.sha256(pickle.dumps(published)).hexdigest()[:8]
        path = f'{osp.splitext(ckpt_path)[0]}-{digest}.pth'
        save_checkpoint(published, path, backend_args=self.backend_args)
        print_log(f'{", ".join(published)} of {ckpt_path} are published as {path}.', logger='current')
