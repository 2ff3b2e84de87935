"""The first loss of a run against the one that its initial weights give, and the original log's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from storylab.config import PRESETS
from storylab.data.prepare import PrepareConfig, prepare
from storylab.model.transformer import Transformer
from storylab.training.evaluation import window_losses
from storylab.training.precision import choose_device, choose_precision

TOKENS = 131_072


def test_initial_loss_is_that_of_the_expected_logits() -> None:
    """Logits of a normed state with N(0, 0.02) rows have variance 0.02^2 * width."""
    preset = PRESETS["3m"]
    model = Transformer(preset.model, preset.vocab_size, seed=1)
    tokens = torch.randint(preset.vocab_size, (4, 65), generator=torch.Generator().manual_seed(0))
    expected = math.log(preset.vocab_size) + 0.02**2 * preset.model.n_embd / 2
    assert float(model.token_losses(tokens[:, :-1], tokens[:, 1:]).mean()) == pytest.approx(
        expected, abs=0.03
    )


def test_first_loss_of_the_original_log_on_real_stories(real_stories: Path, tmp_path: Path) -> None:
    """The original log's first line is 10.9652 on 131,072 tokens; a part of a batch is near enough."""
    validation = (real_stories / "v1-validation-00000-of-00001.parquet",)
    data = prepare(PrepareConfig(train=validation, validation=validation, out=tmp_path / "data",
                                 keep_overlap=True))  # fmt: skip
    assert data.splits["train"].stories[-1, 1] == 186_782  # bytes, from the data's own table
    assert len(data.splits["train"]) == 46_664 + 220  # its tokens and an end of text a story
    model = Transformer(PRESETS["113m"].model, data.vocab_size, seed=1337)
    precision = choose_precision(choose_device("cpu"), "bfloat16")
    starts = np.arange(16) * 128
    losses = window_losses(model, data.splits["train"], starts, 128, precision)
    assert 10.90 <= losses.mean() <= 11.05
