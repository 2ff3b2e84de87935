"""Configs in JSON: read again, of other versions, and their digests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from storylab import config as configs
from storylab.config import (
    PRESENTATION_FIELDS,
    SEED_FIELDS,
    ModelConfig,
    TrainConfig,
    differences,
    flat,
    from_dict,
    preset_config,
    recipe_digest,
    timing_key,
    to_dict,
)
from storylab.errors import UserError


def test_a_config_survives_its_json() -> None:
    config = dataclasses.replace(configs.preset_config("10m"), out_dir=Path("a/b"), data_seed=3)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_config_of_another_version_is_refused() -> None:
    values = to_dict(TrainConfig())
    with pytest.raises(UserError, match="novelty"):
        from_dict(values | {"novelty": 1})
    del values["beta1"]
    with pytest.raises(UserError, match="beta1"):
        from_dict(values)


def test_values_of_another_type_are_refused_by_name() -> None:
    values = to_dict(TrainConfig())
    for change, message in (
        ({"batch_size": "64"}, "batch_size: expected `int`, got `str`"),
        ({"learning_rate": None}, "learning_rate: expected `float`, got `null`"),
        ({"compile": 1}, r"compile: expected `bool \\| null`, got `int`"),
        ({"optimizer": "sgd"}, "optimizer: invalid enum value 'sgd'"),
        ({"model": 3}, "its model is not an object"),
        (
            {"model": values["model"] | {"n_embd": 768.0}},
            r"model\.n_embd: expected `int`, got `float`",
        ),
        ({"model": values["model"] | {"depth": 3}}, r"fields: model\.depth"),
        ({"model": {k: v for k, v in values["model"].items() if k != "n_embd"}}, r"model\.n_embd"),
    ):
        with pytest.raises(UserError, match=message):
            from_dict(values | change)
    # A field that the first runs did not have may be missing.
    del values["model"]["qk_norm"], values["ema_fraction"]
    assert from_dict(values) == TrainConfig()


REMOVED = {"cautious_decay": (False, True), "short_share": (0.0, 0.33)}
REMOVED_OF_THE_MODEL = {
    "zero_init": (False, True),
    "softcap": (0.0, 15.0),
    "embedding_norm": (False, True),
    "bigram_rows": (0, 4096),
    "value_residual": ("none", "token_table"),
}


def test_a_config_with_a_removed_field_reads_where_the_field_did_nothing() -> None:
    values = to_dict(TrainConfig())
    values["model"] |= {name: neutral for name, (neutral, _) in REMOVED_OF_THE_MODEL.items()}
    values |= {name: neutral for name, (neutral, _) in REMOVED.items()}
    assert from_dict(values) == TrainConfig()
    for name, (_, value) in REMOVED.items():
        with pytest.raises(UserError, match=f"^{name} is {value}, .*commit e30b07b is the last"):
            from_dict(values | {name: value})
    for name, (_, value) in REMOVED_OF_THE_MODEL.items():
        with pytest.raises(UserError, match=rf"^model\.{name} is .*commit e30b07b is the last"):
            from_dict(values | {"model": values["model"] | {name: value}})


def test_differences_name_what_changes_the_result_only() -> None:
    a = TrainConfig()
    b = dataclasses.replace(
        a, out_dir=Path("x"), log_interval=1, beta1=0.8, model=ModelConfig(n_layer=2)
    )
    assert differences(a, b) == {"beta1": (0.9, 0.8), "n_layer": (12, 2)}
    assert differences(a, dataclasses.replace(a, data_seed=a.seed)) == {}


def test_digests_are_those_of_earlier_versions() -> None:
    """As commit e30b07b had them, which had more fields: runs are found by their folders' names."""
    nvfp4 = {"dtype": "nvfp4", "recipe": "hadamard=false", "backend": "emulated"}
    for config, digest in (
        (TrainConfig(), "d950f9b7a8"),
        (preset_config("nano"), "5e9ef6d6ae"),
        (preset_config("3m", "fast"), "256fcb7be6"),
        (dataclasses.replace(preset_config("10m"), block_size=256, **nvfp4), "4d7248bcd0"),  # type: ignore[arg-type]
    ):
        assert recipe_digest(config, "f") == digest


def test_a_digest_leaves_out_what_changes_no_result() -> None:
    config = TrainConfig()
    values = flat(config)
    assert "model" not in values and values["n_layer"] == 12
    for name in PRESENTATION_FIELDS | SEED_FIELDS:
        changed = {bool: True, int: 7, float: 7.0}.get(type(values[name]), Path("elsewhere"))
        changed = 7 if name == "data_seed" else changed
        other = dataclasses.replace(config, **{name: changed})
        assert flat(other)[name] != values[name]
        assert recipe_digest(other, "f") == recipe_digest(config, "f"), name
    # The same batch in other micro-batches is the same run; its time is another.
    split = dataclasses.replace(config, batch_size=32, gradient_accumulation_steps=32)
    assert recipe_digest(split, "f") == recipe_digest(config, "f")
    assert timing_key(split) != timing_key(config)
    assert timing_key(dataclasses.replace(config, learning_rate=1.0)) == timing_key(config)
