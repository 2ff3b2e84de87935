"""Recovery from a loss or gradients that are not finite: skip the step, or rewind and pass over the data.

``on_divergence`` in the config chooses. ``stop`` needs nothing of this module.
"""

from __future__ import annotations

from storylab.record import checkpoint
from storylab.record.folder import RunFolder
from storylab.record.schema import Rewind
from storylab.record.stages import drop_rows_from
from storylab.training.checkpointing import Checkpoints
from storylab.training.run_progress import RunProgress
from storylab.training.setup import TrainingSetup
from storylab.training.step import NonFiniteError

# After so many skipped steps in a row, or rewinds to one checkpoint, a run has diverged.
MOST_SKIPPED, MOST_REWINDS = 10, 5


class Recovery:
    """Applies the policy of a run. All processes of the run call each method together.

    A rewind goes to the last evaluation, whose iteration does not depend on the clock, so that a resumed
    run rewinds to the same bits.

    Args:
        setup: the run.
        run: its folder.
        checkpoints: saves its checkpoints.
    """

    def __init__(self, setup: TrainingSetup, run: RunFolder, checkpoints: Checkpoints) -> None:
        self.setup, self.run, self.checkpoints = setup, run, checkpoints
        self.progress = setup.progress
        self.rewinds = setup.config.on_divergence == "rewind"

    def skips(self, iteration: int) -> bool:
        """Whether the step of ``iteration``, which was not finite, is left out; counts it."""
        progress = self.progress
        if self.setup.config.on_divergence != "skip":
            return False
        in_a_row = iteration == progress.last_skipped + 1 and progress.skipped > 0
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if in_a_row else 1
        if progress.skipped_in_a_row > MOST_SKIPPED:
            return False
        progress.skipped, progress.last_skipped = progress.skipped + 1, iteration
        return True

    def rewind(self, error: NonFiniteError) -> Rewind:
        """Go back to the last evaluation, and past the batches that have been read since.

        The folder can be resumed at every moment in between: the checkpoint goes back before the rows do,
        and a run that is resumed from it comes to the same fault again.

        Raises:
            NonFiniteError: ``error``, where the run has gone back to that point often enough, or has none.
            UserError: the checkpoint is damaged, or the folder cannot be written.
        """
        self.checkpoints.saver.wait()
        ranks, progress = self.setup.state.ranks, self.progress
        ranks.any(False)  # the process that leads has written it
        tensors, values = checkpoint.load(self.run.checkpoint("rewind"))
        point = RunProgress.from_dict(values)
        back_to, fault = point.next_iteration, progress.next_iteration
        earlier = [rewind.back_to for rewind in progress.rewinds[-MOST_REWINDS:]]
        if back_to > fault or earlier == [back_to] * MOST_REWINDS:
            raise error
        ranks.any(False)  # all have read it before it changes
        rewind = Rewind(fault, back_to, fault + 1 - back_to, str(error))
        self.checkpoints.go_back()
        drop_rows_from(self.run, back_to)
        progress.go_back(point, rewind)
        self.setup.load(tensors, point)
        self.checkpoints.save_last()
        return rewind
