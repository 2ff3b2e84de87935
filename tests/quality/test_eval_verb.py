"""`storylab eval --tasks --samples`: the printed numbers, the document, refusals."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from storylab.cli import main
from storylab.documents import EvalDocument
from storylab.errors import UserError
from storylab.model.generate import Sampling
from storylab.quality.samples import write_samples
from storylab.record.folder import open_run
from storylab.record.run import Run
from storylab.training.sampling import load_story_model

COUNT, LIMIT = 70, 40


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_samples_are_measured(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(run.folder), "--samples", str(COUNT), "--max_new_tokens", str(LIMIT)]
    words += ["--device", "cpu"]
    assert main([*words, "--json"]) == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=EvalDocument)
    assert found.tasks == [] and found.samples is not None
    written, held_out = found.samples.written, found.samples.held_out
    assert written.stories == COUNT and written.tokens <= COUNT * LIMIT
    # The same stories again, from the texts of the sampler.
    model = load_story_model(open_run(run.folder), device="cpu")
    texts = []
    for seed, count in ((0, 64), (1, 6)):
        texts += model.sample("", Sampling(seed=seed), LIMIT, count)
    samples = write_samples(model, COUNT, LIMIT, Sampling())
    assert [model.tokenizer.decode(ids.tolist()) for ids in samples.stories] == texts
    assert written.tokens == sum(map(len, samples.stories))
    assert any(written.longest_copied_text in text for text in texts)
    assert found.samples.ended == samples.ended
    assert held_out.tokens == held_out.stories * LIMIT
    assert 0 < written.copied_tokens <= written.longest_copied_tokens <= LIMIT
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"ended          {samples.ended:.1%}" in out and f"{written.distinct_2:.4f}" in out


def test_the_share_that_ends_is_that_of_ends_before_the_limit(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_story_model(open_run(run.folder), device="cpu")
    end = model.tokenizer.end_of_text
    drawn = torch.tensor([[1, 2, 3], [1, end, 3], [end, 1, 2], [1, 2, end], [end, end, end]])
    monkeypatch.setattr("storylab.training.sampling.generate", lambda *args: iter(drawn.unbind(1)))
    samples = write_samples(model, 5, 3, Sampling())
    assert [ids.tolist() for ids in samples.stories] == [[1, 2, 3], [1], [], [1, 2], []]
    assert samples.ended == 4 / 5 and all(ids.dtype == np.int64 for ids in samples.stories)
    for count, most in ((0, 3), (5, 0), (1001, 3)):
        with pytest.raises(UserError, match=r"at (least 1|most 1,000)"):
            write_samples(model, count, most, Sampling())


def test_flags_that_cannot_be_used_are_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(run.folder)]
    assert "at least 0" in refused([*words, "--samples", "-1"], capsys)
    assert "at most 1,000" in refused([*words, "--samples", "1001"], capsys)
    assert "at least 1" in refused([*words, "--questions", "0"], capsys)
    assert "at least 1" in refused([*words, "--samples", "9", "--max_new_tokens", "0"], capsys)
    assert "twice" in refused([*words, "--tasks", "endings", "endings"], capsys)
    monkeypatch.setattr("storylab.cli.verbs.eval.find_spec", lambda name: None)
    err = refused([*words, "--tasks", "endings"], capsys)
    assert "pip install 'storylab[eval]'" in err


def test_a_document_without_the_new_fields_still_reads() -> None:
    """As an earlier version printed it."""
    new = msgspec.convert(
        dict.fromkeys(("run", "checkpoint", "split"), "x")
        | dict.fromkeys(("block_size", "stories", "tokens", "text_bytes"), 1)
        | {"schema": "storylab.eval/1", "aligned": False, "loss_nats_per_token": 1.0}
        | {"standard_error_nats_per_token": None, "perplexity": 2.7, "bits_per_byte": 1.0},
        EvalDocument,
    )
    plain: dict[str, Any] = json.loads(msgspec.json.encode(new))
    assert plain["tasks"] == [] and plain["samples"] is None
