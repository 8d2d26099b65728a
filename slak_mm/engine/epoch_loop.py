"""Training by epochs that can go on inside one."""

from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's loop over epochs, which can go on inside an epoch.

    Attributes:
        done: Iterations of the coming epoch that an earlier run has done; their data is read and dropped.
    """

    done = 0

    def run_epoch(self) -> None:
        """Train for one epoch, or for the rest of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        done, self.done = self.done, 0
        for index, batch in enumerate(self.dataloader):
            if index >= done:
                self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
