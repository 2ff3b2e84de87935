"""Presets and methods are named for what they are."""

from __future__ import annotations

import dataclasses

import pytest

from storylab.config import (
    PRESETS,
    TrainConfig,
    preset_config,
)
from storylab.errors import UserError
from storylab.experiments.factors import changed_fields, factor_fields
from storylab.flags import default_for, parse


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "nano"])
def test_a_preset_is_named_for_its_parameter_count(name: str) -> None:
    preset = PRESETS[name]  # type: ignore[index]
    named = int(name.removesuffix("m")) * 1_000_000
    assert abs(preset.model.parameter_count(preset.vocab_size) / named - 1) < 0.03
    assert preset.model.head_size == 64


def test_the_defaults_are_those_of_the_original_log() -> None:
    config = TrainConfig()
    assert config.tokens_per_iteration == 131_072
    assert (config.learning_rate, config.min_lr, config.warmup_iters) == (1e-4, 5e-5, 1000)
    assert (config.beta1, config.beta2, config.weight_decay) == (0.9, 0.999, 0.1)
    assert (config.grad_clip, config.eval_interval, config.eval_iters) == (1.0, 500, 100)


def test_a_method_is_a_start_for_the_other_flags() -> None:
    fast = preset_config("3m", "fast")
    assert fast.optimizer == "normuon" and fast.model.qk_norm and fast.model.n_embd == 192
    assert dataclasses.replace(fast, **{
        f.name: getattr(TrainConfig(), f.name) for f in dataclasses.fields(TrainConfig)
    }) == TrainConfig()  # fmt: skip
    args = ["--method", "fast", "--preset=3m", "--muon_lr", "0.01", "--no_qk_norm"]
    parsed = parse(TrainConfig, args, "", default_for(args))
    assert parsed.muon_lr == 0.01 and parsed.min_lr == 8e-3 and not parsed.model.qk_norm
    with pytest.raises(UserError, match="unknown method 'quick': choose one of record, fast"):
        default_for(["--method", "quick"])
    # The name alone is no difference between two runs, and the factor of that name covers the rest.
    assert changed_fields(fast, dataclasses.replace(fast, method="record")) == {}
    assert set(changed_fields(fast, preset_config("3m"))) <= factor_fields("method")
