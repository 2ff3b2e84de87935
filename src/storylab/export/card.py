"""The model card of an export, from the run's record and the template ``card.md.j2``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

import storylab
from storylab.config import FULL, PRESENTATION_FIELDS, flags_of
from storylab.data.sources import HUB_DATASETS
from storylab.export.classes import window_size
from storylab.export.consumers import ignorers
from storylab.export.exporter import Exporter, Source
from storylab.record.run import Run
from storylab.record.schema import SplitLoss
from storylab.reporting.templates import text_template
from storylab.training.log_format import format_duration, printable, windows_words

CARD = "README.md"
# Half the width of a 95 % interval, in standard errors.
Z95 = 1.96
# The licenses of data sets, by the repository whose card states it.
DATA_LICENSES = {"roneneldan/TinyStories": "CDLA-Sharing-1.0"}


def model_card(source: Source, exporter: Exporter, weights: str, findings: list[str]) -> str:
    """The card as Markdown with YAML metadata.

    Args:
        source: the exported model and the record of its run.
        exporter: the format.
        weights: type of the weights.
        findings: lines of the self-check.
    """
    run = source.run
    kind = exporter.class_name(source.config)
    has_windows = any(not p.covers(source.block_size) for p in source.config.layer_patterns)
    return text_template("storylab.export", "card.md.j2", {"plain": _plain}).render(
        metadata=_metadata(run, exporter).to_yaml(line_break="\n").strip(),
        name=run.folder.resolve().name,
        version=storylab.__version__,
        kind=kind,
        weights=weights.upper().replace("F32", "float32"),
        checkpoint=source.checkpoint,
        averaged=run.config.ema_fraction > 0,
        context=source.block_size,
        dtype=run.config.dtype,
        run=run,
        model=source.config,
        parameters=source.config.parameter_count(source.tokenizer.vocab_size),
        vocabulary=source.tokenizer.vocab_size,
        window=window_size(source.config) if has_windows else None,
        full_layers=[i for i, p in enumerate(source.config.layer_patterns, 1) if p == FULL],
        ignorers=ignorers(kind) if has_windows else [],
        low_precision=run.config.dtype not in ("float32", "bfloat16", "float16"),
        usage=exporter.usage(weights),
        findings=findings,
        data=list(_data_lines(run)),
        losses=list(_losses(run)),
        windows_words=windows_words(run.config.block_size),
        commands=[_prepare_command(run), train_command(run)],
        cost=list(_cost(run)),
        samples=list(_samples(run)),
    )


def _plain(text: Any) -> str:
    """A value of the record as one line of Markdown, its syntax escaped."""
    line = " ".join(printable(str(text)).split())
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", line)


def _origin(run: Run) -> dict[str, Any]:
    """The description of the data's source; empty if the record has none."""
    request = run.data.request
    origin = request.get("source") if isinstance(request, dict) else None
    return origin if isinstance(origin, dict) else {}


def _repository(run: Run) -> str | None:
    """The repository of the data set on the hub, if it is one that we know."""
    known = {dataset.repo for dataset in HUB_DATASETS.values()}
    repository = _origin(run).get("repo")
    return repository if repository in known else None


def _metadata(run: Run, exporter: Exporter) -> ModelCardData:
    repository = _repository(run)
    english = repository is not None or _origin(run).get("name") == "builtin"
    results = []
    if run.finished:
        name = {"builtin": "storylab's built-in stories", "files": "local files"}
        described = str(_origin(run).get("name", "unknown"))
        for metric, value in (
            ("cross-entropy loss (nats per token)", run.validation.loss),
            ("bits per byte", run.validation.bits_per_byte),
            ("perplexity", run.validation.perplexity),
        ):
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=repository or described,
                    dataset_name=repository or name.get(described, described),
                    dataset_split="validation",
                    metric_type=metric.split(" (")[0].replace(" ", "_").replace("-", "_"),
                    metric_name=metric,
                    metric_value=round(value, 5),
                )
            )
    return ModelCardData(
        language="en" if english else None,
        library_name=exporter.program if exporter.program == "transformers" else None,
        pipeline_tag="text-generation",
        tags=["storylab"],
        datasets=[repository] if repository else None,
        model_name=run.folder.resolve().name,
        eval_results=results or None,
    )


def _data_lines(run: Run) -> Iterator[str]:
    """The data set: where it comes from, its license if known, its size and fingerprint."""
    origin, repository, data = _origin(run), _repository(run), run.data
    if repository:
        revision = str(origin.get("revision", ""))[:12]
        yield (
            f"[{repository}](https://huggingface.co/datasets/{repository})"
            + (f" at revision {_plain(revision)}" if revision else "")
            + (
                f", licensed {DATA_LICENSES[repository]}"
                if repository in DATA_LICENSES
                else "; its card states the license"
            )
        )
    elif origin.get("name") == "builtin":
        yield "stories from storylab's built-in grammar, a test corpus of few words"
    else:
        yield "local files; storylab does not know their license"
    tokens = ", ".join(f"{count:,} {_plain(name)}" for name, count in data.tokens.items())
    yield f"{tokens} tokens, by the tokenizer {_plain(data.tokenizer.name)}"
    yield f"fingerprint {_plain(data.fingerprint)}"


def _losses(run: Run) -> Iterator[tuple[str, str, str, str]]:
    """Rows of the table of losses: name, nats per token, bits per byte, stories."""
    if not run.finished:
        return
    yield "validation, whole split", *_intervals(run.validation), f"{run.validation.stories:,}"
    own = run.results.validation_own_precision
    if own:
        name = f"validation, whole split, computed in {_plain(run.config.dtype)}"
        yield name, *_intervals(own), f"{own.stories:,}"


def _intervals(split: SplitLoss) -> tuple[str, str]:
    """Nats per token and bits per byte, each with its 95 % interval over stories if the record has one."""

    def with_interval(value: float, half: float | None) -> str:
        return f"{value:.4f}" + (
            "" if half is None else f" ({value - half:.4f} to {value + half:.4f})"
        )

    half = None if split.standard_error is None else Z95 * split.standard_error
    # Both are the same sum of nats, divided by tokens and by bytes.
    ratio = split.bits_per_byte / split.loss if split.loss else 0.0
    return (
        with_interval(split.loss, half),
        with_interval(split.bits_per_byte, None if half is None else half * ratio),
    )


def _cost(run: Run) -> Iterator[str]:
    """Time, energy and machine, as far as the record has them."""
    if run.summary is None:
        return
    environment, results = run.environment, run.results
    device = environment.gpu or f"{environment.processor} ({environment.threads} threads)"
    yield f"{format_duration(results.seconds)} on {_plain(device)}"
    yield f"{results.iterations:,} iterations, {results.tokens:,} tokens, {results.epochs:.2f} epochs"
    energy = results.energy_joules
    yield "energy: not measured" if energy is None else f"energy: {energy / 3600:.1f} Wh of the GPU"


def _samples(run: Run) -> Iterator[tuple[str, str]]:
    """The samples of the run's end as code, each with a fence longer than its runs of backticks."""
    for sample in run.summary.samples if run.summary else ():
        text = printable(sample.text)
        longest = max((len(run) for run in re.findall("`+", text)), default=0)
        yield "`" * max(3, longest + 1), text


def _prepare_command(run: Run) -> str:
    """The command that prepares the run's data, with placeholders for local files."""
    origin = _origin(run)
    words = ["storylab", "prepare", "--tokenizer", run.data.tokenizer.name]
    if origin.get("name") == "builtin":
        words += ["--source", "builtin"]
        words += ["--builtin_stories", str(origin.get("stories"))]
        words += ["--builtin_seed", str(origin.get("seed"))]
    elif origin.get("name") in HUB_DATASETS:
        words += ["--source", str(origin["name"])]
    else:
        words += ["--train", "FILES", "--validation", "FILES"]
    if isinstance(run.data.request, dict) and run.data.request.get("keep_overlap") is True:
        words.append("--keep_overlap")
    return printable(shlex.join(words))


def _data_folder(run: Run) -> str:
    """The folder that `storylab prepare` makes of such a source and tokenizer by default."""
    name = _origin(run).get("name")
    known = name if name in (*HUB_DATASETS, "builtin") else "files"
    return f"data/{known}-{run.data.tokenizer.name.replace(':', '')}"


def train_command(run: Run) -> str:
    """The command that trains the same model: the run's fields that differ from their defaults."""
    words = ["storylab", "train", *flags_of(run.config, PRESENTATION_FIELDS)]
    return printable(shlex.join([*words, "--data_dir", _data_folder(run)]))
