"""Presets and methods are named for what they are."""

from __future__ import annotations

import dataclasses

import pytest

from storylab.cli.verbs.train import TrainCommand
from storylab.config import (
    METHODS,
    PRESETS,
    TrainConfig,
    flags_of,
    flat,
    preset_config,
)
from storylab.errors import UserError
from storylab.experiments.factors import changed_fields, factor_fields
from storylab.export.classes import model_class
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
    with pytest.raises(
        UserError, match="unknown method 'quick': choose one of record, fast, portable"
    ):
        default_for(["--method", "quick"])
    # The name alone is no difference between two runs, and the factor of that name covers the rest.
    assert changed_fields(fast, dataclasses.replace(fast, method="record")) == {}
    assert set(changed_fields(fast, preset_config("3m"))) <= factor_fields("method")


def test_portable_is_fast_without_the_parts_that_cannot_be_exported() -> None:
    fast, portable = preset_config("3m", "fast"), preset_config("3m", "portable")
    assert model_class(portable.model).architecture == "Qwen3ForCausalLM"
    with pytest.raises(UserError, match="--method portable"):
        model_class(fast.model)
    changed = changed_fields(fast, portable)
    assert set(changed) == {"method", "value_residual", "embedding_residual"}
    # Neither part can be exported alone, so the price is not paid for less.
    for name in ("value_residual", "embedding_residual"):
        kept = dataclasses.replace(portable.model, **{name: getattr(fast.model, name)})
        with pytest.raises(UserError, match=name):
            model_class(kept)


@pytest.mark.parametrize("method", METHODS)
def test_flags_of_a_config_make_it_again(method: str) -> None:
    default = preset_config("nano", method)
    config = dataclasses.replace(
        default,
        dtype="nvfp4",
        recipe="hadamard=false *.weight.square=false",
        compile=False,
        beta2=0.1 + 0.2,
        data_seed=7,
        model=dataclasses.replace(
            default.model, attention="window:8*2,full", qk_norm=not default.model.qk_norm
        ),
    )
    words = flags_of(config)
    assert parse(TrainCommand, words, "x", TrainCommand(default_for(words))).config == config
    shorter = flags_of(config, {"recipe", "data_seed"})
    assert len(words) - len(shorter) == 4 and set(shorter) < set(words)
    assert "--dtype" in flags_of(default) and "--compile" not in flags_of(default)
    assert flat(default)["method"] == method
