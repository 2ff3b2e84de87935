"""``storylab resume``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from storylab.cli.arguments import RunFolder, Track
from storylab.cli.registry import MORE_MEMORY, Call, Verb


@dataclass(frozen=True)
class ResumeCommand:
    """Continue a run that was stopped or killed. It ends with the same bits as an uninterrupted run.

    Examples: storylab resume runs/a | storylab resume runs/a --max_iters 2000
    """

    run: RunFolder
    """Run folder."""
    max_iters: int | None = None
    """New last iteration. The learning rates so far must stay the same (warm-up, constant), and
    nothing else may depend on the length of the run."""
    data_dir: Path | None = None
    """New place of the run's data set, if it has moved."""
    skip_checks: bool = False
    """Go on without the checks of this machine; the run records it."""
    track: Track = ()


def run(call: Call) -> int:
    """Continue a run."""
    command = call.parse(ResumeCommand)
    from storylab.cli.training import show_training
    from storylab.record.folder import open_run
    from storylab.training.parallel import joined
    from storylab.training.resume import resume

    config = open_run(command.run).read_config()
    changes: dict[str, Any] = {}
    if command.max_iters is not None:
        changes["max_iters"] = command.max_iters
    if command.data_dir is not None:
        changes["data_dir"] = command.data_dir
    if command.skip_checks:
        changes["skip_checks"] = True
    wanted = dataclasses.replace(config, **changes)
    with joined(config.device) as ranks:
        work = partial(resume, command.run, wanted, ranks=ranks)
        return show_training(work, command.track, prints=ranks.leads)


VERB = Verb(
    "resume",
    "continue a run that was stopped, to the same bits",
    "runs",
    run,
    ResumeCommand,
    position=3,
    memory_remedy=MORE_MEMORY,
)
