"""Machine, software, data, models and optimizers of the runs in a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import UNSET

from storylab.experiments.outcome import Outcome
from storylab.optim import OPTIMIZERS, REST
from storylab.record.run import Run

# Values of a fact that are shown before "and N more".
MOST_VALUES = 6


def setup_facts(outcomes: Iterable[Outcome]) -> Iterator[tuple[str, str]]:
    """Machine, software, data, model and optimizer of all runs; each value once."""
    runs = {run.folder: run for outcome in outcomes for run in outcome.runs}
    facts: dict[str, list[str]] = {}
    for run in runs.values():
        for name, value in _facts(run):
            values = facts.setdefault(name, [])
            if value not in values:
                values.append(value)
    for name, values in facts.items():
        more = len(values) - MOST_VALUES
        yield name, "; ".join(values[:MOST_VALUES]) + (f"; and {more} more" if more > 0 else "")


def _facts(run: Run) -> Iterable[tuple[str, str]]:
    e, c, data = run.environment, run.config, run.data
    memory = f", {e.memory_bytes / 1e9:.0f} GB"
    yield "machine", f"{e.processor} ({e.cpu}), {e.cores} cores{memory}"
    yield "device", e.gpu or f"{e.device}, {e.threads} threads"
    yield "software", f"storylab {e.storylab}, torch {e.packages.torch}, Python {e.python}"
    commits = sorted({stage.git_commit[:12] for stage in run.stages if stage.git_commit})
    version = ", ".join(sorted({stage.code_sha256[:12] for stage in run.stages}))
    skipped = [stage.checks.skipped for stage in run.stages if stage.checks is not UNSET]
    if any(skipped):
        yield "checks", f"skipped in {run.folder.name} (--skip_checks)"
    yield "code", version + (f" (git {', '.join(commits)})" if commits else "")
    tokens = ", ".join(f"{count:,} {name} tokens" for name, count in data.tokens.items())
    yield (
        "data",
        f"{tokens}, {data.tokenizer.name} tokenizer of {data.tokenizer.vocab_size:,} ids, "
        f"fingerprint {data.fingerprint[:12]}",
    )
    m = c.model
    parameters = m.parameter_count(data.tokenizer.vocab_size)
    yield (
        "models",
        f"{c.preset}: {m.n_layer} layers, width {m.n_embd}, {m.n_head} query and {m.n_kv_head} "
        f"key/value heads, hidden {m.n_hidden}, {parameters:,} parameters",
    )
    yield "batch", f"{c.tokens_per_iteration:,} tokens an iteration, in windows of {c.block_size:,}"
    yield (
        "optimizer",
        ("" if c.method == "record" else f"method {c.method}: ")
        + _optimizers(c.optimizer)
        + f", betas ({c.beta1:g}, {c.beta2:g}), weight decay {c.weight_decay:g}, gradient norm "
        f"clipped at {c.grad_clip:g}"
        + (
            f"; weights averaged over about {c.ema_fraction:.0%} of the run"
            if c.ema_fraction
            else ""
        ),
    )


def _optimizers(name: str) -> str:
    entry = OPTIMIZERS[name]
    if entry.matrices_only:
        return f"{entry.label} for the blocks' matrices, else {REST.label}"
    return entry.label
