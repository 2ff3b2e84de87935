"""Config and presets: named for what they are, refused when they make no sense, all of it used."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest

from storylab import config as configs
from storylab.config import (
    PRESENTATION_FIELDS,
    PRESETS,
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
from storylab.config.marks import mark, marks_of
from storylab.errors import UserError
from storylab.experiments.factors import changed_fields, factor_fields
from storylab.flags import default_for, parse
from storylab.model.transformer import Transformer
from storylab.training.setup import resolve

SOURCE = Path(configs.__file__).parents[1]


def test_the_record_model_has_its_parameters() -> None:
    assert ModelConfig().parameter_count(50257) == 112_934_400


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "nano"])
def test_a_preset_is_named_for_its_parameter_count(name: str) -> None:
    preset = PRESETS[name]  # type: ignore[index]
    named = int(name.removesuffix("m")) * 1_000_000
    assert abs(preset.model.parameter_count(preset.vocab_size) / named - 1) < 0.03
    assert preset.model.head_size == 64


@pytest.mark.parametrize("name", ["nano", "3m", "10m"])
def test_the_counted_parameters_are_those_of_the_module(name: str) -> None:
    preset = PRESETS[name]  # type: ignore[index]
    model = Transformer(preset.model, preset.vocab_size)
    count = sum(p.numel() for p in model.parameters())
    assert count == preset.model.parameter_count(preset.vocab_size)


def test_the_matrices_are_those_of_the_module() -> None:
    config = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=40)
    model = Transformer(config, 50)
    found = {name: p for name, p in model.blocks[1].named_parameters() if p.dim() == 2}
    stated = {f"{m.name}.weight": (m.n_out, m.n_in) for m in config.matrices()}
    assert {name: tuple(p.shape) for name, p in found.items()} == stated
    assert list(found) == list(stated)
    parts = [m.parts for m in config.matrices()]
    assert [rows for _, rows in model.block_matrices()] == parts * 2
    assert all(sum(m.parts) == m.n_out for m in config.matrices())


def test_the_defaults_are_the_record() -> None:
    config = TrainConfig()
    assert config.tokens_per_iteration == 131_072
    assert (config.learning_rate, config.min_lr, config.warmup_iters) == (1e-4, 5e-5, 1000)
    assert (config.beta1, config.beta2, config.weight_decay) == (0.9, 0.999, 0.1)
    assert (config.grad_clip, config.eval_interval, config.eval_iters) == (1.0, 500, 100)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"grad_clip": float("inf")},
        {"beta1": 1.0},
        {"max_iters": -1},
        {"log_interval": 0},
        {"max_iters": 10**16},
        {"learning_rate": 1e39},
        {"matrix_lr": 1e308},
    ],
)
def test_values_without_sense_are_refused_by_name(changes: dict[str, float]) -> None:
    (name,) = changes
    with pytest.raises(UserError, match=name):
        TrainConfig(**changes)  # type: ignore[arg-type]


def test_a_rate_that_would_rise_after_its_warm_up_is_refused() -> None:
    rising = TrainConfig(max_iters=2000, learning_rate=2e-5)
    with pytest.raises(UserError, match="min_lr 5e-05 is above learning_rate 2e-05"):
        rising.require_no_rise()
    with pytest.raises(UserError, match="min_lr 5e-05 is above learning_rate 2e-05"):
        resolve(rising)
    # Where min_lr is never read it is of no matter.
    TrainConfig(learning_rate=2e-5).require_no_rise()
    dataclasses.replace(rising, schedule="constant").require_no_rise()
    # A run from before there was such a check can still be read.
    assert from_dict(to_dict(rising)) == rising


@pytest.mark.parametrize(
    "shape",
    [
        *({"n_embd": 100}, {"n_kv_head": 5}, {"n_layer": 0}, {"n_embd": 12}),
        *({"n_layer": 10**8}, {"n_hidden": 10**16}),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: dict[str, int]) -> None:
    with pytest.raises(UserError):
        ModelConfig(**shape)  # type: ignore[arg-type]


def test_a_method_is_a_start_for_the_other_flags() -> None:
    fast = preset_config("3m", "fast")
    assert fast.optimizer == "normuon" and fast.model.qk_norm and fast.model.n_embd == 192
    assert dataclasses.replace(fast, **{
        f.name: getattr(TrainConfig(), f.name) for f in dataclasses.fields(TrainConfig)
    }) == TrainConfig()  # fmt: skip
    args = ["--method", "fast", "--preset=3m", "--matrix_lr", "0.01", "--no_qk_norm"]
    parsed = parse(TrainConfig, args, "", default_for(args))
    assert parsed.matrix_lr == 0.01 and parsed.min_lr == 8e-3 and not parsed.model.qk_norm
    with pytest.raises(UserError, match="unknown method 'quick': choose one of record, fast"):
        default_for(["--method", "quick"])
    # The name alone is no difference between two runs, and the factor of that name covers the rest.
    assert changed_fields(fast, dataclasses.replace(fast, method="record")) == {}
    assert set(changed_fields(fast, preset_config("3m"))) <= factor_fields("method")


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
    del values["model"]["qk_norm"], values["average_share"]
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


@pytest.mark.parametrize("name", [*REMOVED, "softcap", "zero_init"])
def test_a_removed_flag_says_where_it_went(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name}.*; commit e30b07b is the last that had it"):
        parse(TrainConfig, [f"--{name}=1"], "storylab train")


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


def test_a_field_without_marks_is_an_error() -> None:
    @dataclasses.dataclass
    class Forgetful:
        known: Annotated[int, mark("size")] = 1
        forgotten: int = 2

    # Annotations are text here, and names of a function's are not found from its text.
    Forgetful.__annotations__ = {"known": Annotated[int, mark("size")], "forgotten": int}
    with pytest.raises(TypeError, match=r"Forgetful\.forgotten has no mark"):
        marks_of(Forgetful)


def test_every_field_is_read_somewhere() -> None:
    """As an attribute of something called a config, a model or, in config.py, self."""
    read: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        owners = {"config", "model", "preset", "stored", "wanted"}
        owners |= {"self"} if path.parent.name == "config" else set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = getattr(owner, "attr", getattr(owner, "id", None))
                if name in owners:
                    read.add(node.attr)
    for kind in (TrainConfig, ModelConfig):
        fields = {f.name for f in dataclasses.fields(kind)}
        assert fields <= read, fields - read


def test_flags_are_parsed_before_torch_is_imported() -> None:
    """The module of every verb is imported, as for --help."""
    script = "import sys; from storylab.cli.registry import all_verbs; all_verbs(); "
    script += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
