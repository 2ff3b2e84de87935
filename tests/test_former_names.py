"""A renamed field reads by its former name everywhere, and a run keeps its identity."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from storylab.cli import main
from storylab.cli.verbs.train import TrainCommand
from storylab.config import (
    FIELDS,
    FORMER_NAMES,
    REMOVED_FIELDS,
    TrainConfig,
    flat,
    from_dict,
    preset_config,
    recipe_digest,
    to_dict,
)
from storylab.errors import UserError
from storylab.experiments.factors import FACTORS
from storylab.experiments.spec import load_experiment
from storylab.flags import default_for, given_flags, parse

RENAMED = pytest.mark.parametrize(("former", "name"), FORMER_NAMES.items())
FACTORIAL = """
title = "T"
purpose = "P"
[config]
preset = "nano"
[factors.rate]
low = {{}}
high = {{ weight_decay = 0.3 }}
[factors.renamed]
factor = "{name}"
one = {{ {name} = {one} }}
other = {{ {name} = {other} }}
"""
PLAIN = """
title = "T"
purpose = "P"
factor = "{name}"
[config]
preset = "nano"
{name} = {one}
[arms]
one = {{}}
other = {{ {name} = {other} }}
[scales.laptop.config]
{name} = {one}
"""
CONDITIONS = """
title = "T"
purpose = "P"
factor = "weight_decay"
[config]
preset = "nano"
[arms]
one = {{}}
other = {{ weight_decay = 0.3 }}
[conditions]
a = {{ {name} = {one} }}
b = {{ {name} = {other} }}
"""


def values_of(name: str) -> tuple[Any, Any]:
    """Two values that a field can have, other than its default."""
    default = flat(TrainConfig())[name]
    assert type(default) in (int, float), f"give values of {name}"
    return (default + 1, default + 2) if isinstance(default, int) else (0.25, 0.5)


def changed(name: str) -> TrainConfig:
    return dataclasses.replace(preset_config("nano"), **{name: values_of(name)[0]})


def parsed(*args: str) -> TrainConfig:
    return parse(TrainCommand, args, "storylab train", TrainCommand(default_for(args))).config


def test_a_former_name_is_no_other_name() -> None:
    assert {"matrix_lr": "muon_lr", "average_share": "ema_fraction"}.items() <= FORMER_NAMES.items()
    assert not FORMER_NAMES.keys() & {*FIELDS, *FACTORS, *REMOVED_FIELDS, "model"}
    renamed = [marks.formerly for marks in FIELDS.values() if marks.formerly]
    assert len(set(renamed)) == len(renamed)


@RENAMED
def test_an_earlier_config_reads(former: str, name: str) -> None:
    config = changed(name)
    values = json.loads(json.dumps(to_dict(config)))
    assert former not in values
    earlier = {former if key == name else key: value for key, value in values.items()}
    assert from_dict(earlier) == config
    with pytest.raises(UserError, match=f"^{name} is given twice, as {former} and as {name}$"):
        from_dict(values | {former: values[name]})


def test_a_renamed_field_of_the_model_reads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset_config("nano")
    values = to_dict(config)
    before = recipe_digest(config, "f")
    monkeypatch.setitem(FORMER_NAMES, "depth", "n_layer")
    values["model"]["depth"] = values["model"].pop("n_layer")
    assert from_dict(values) == config
    assert recipe_digest(config, "f") != before  # of its former name
    values["model"]["n_layer"] = 3
    with pytest.raises(UserError, match=r"^model\.n_layer is given twice, as depth"):
        from_dict(values)


@pytest.mark.slow
@RENAMED
@pytest.mark.parametrize("text", [PLAIN, FACTORIAL, CONDITIONS])
def test_an_earlier_experiment_file_reads(
    tmp_path: Path, text: str, former: str, name: str
) -> None:
    one, other = values_of(name)
    path = tmp_path / "a.toml"
    path.write_text(text.format(name=name, one=one, other=other))
    experiment = load_experiment(path)
    for spelled in (former, former.replace("_", "-")):
        # The value of factor is a name, which has one spelling.
        earlier = text.replace('"{name}"', f'"{former}"')
        path.write_text(earlier.format(name=spelled, one=one, other=other))
        assert load_experiment(path) == experiment


@RENAMED
def test_an_arm_overrides_the_config_under_either_name(
    tmp_path: Path, former: str, name: str
) -> None:
    one, other = values_of(name)
    path = tmp_path / "a.toml"
    path.write_text(PLAIN.format(name=name, one=one, other=other))
    experiment = load_experiment(path)
    mixed = PLAIN.replace("{name} = {one}", f"{former} = {{one}}")
    path.write_text(mixed.format(name=name, one=one, other=other))
    assert load_experiment(path) == experiment


@RENAMED
def test_both_names_in_a_table_are_one_error(tmp_path: Path, former: str, name: str) -> None:
    one, other = values_of(name)
    path = tmp_path / "a.toml"
    text = PLAIN.format(name=name, one=one, other=other)
    path.write_text(text.replace("[arms]", f"{former} = {one}\n[arms]"))
    with pytest.raises(UserError, match=rf"{name} is given twice in \[config\], as {name} and as"):
        load_experiment(path)


@RENAMED
def test_the_flag_of_a_former_name_is_read_and_mentioned(
    capsys: pytest.CaptureFixture[str], former: str, name: str
) -> None:
    value = values_of(name)[0]
    wanted = parsed("--preset", "nano", f"--{name}", str(value))
    assert capsys.readouterr().err == ""
    assert flat(wanted)[name] == value
    for args in (
        (f"--{former}", str(value)),
        (f"--{former.replace('_', '-')}={value}",),
    ):
        assert parsed("--preset", "nano", *args) == wanted
        assert capsys.readouterr().err == f"storylab: --{former} is now --{name}\n"
        assert given_flags(args) == [name]
    assert main(["train", f"--{former}", str(value), f"--{name}", str(value)]) == 2
    line = f"storylab: --{name} is given twice, as --{former} and as --{name}\n"
    assert capsys.readouterr().err == line


def test_help_has_the_current_names_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for former, name in FORMER_NAMES.items():
        assert f"--{name}" in text and former not in text


def test_a_renamed_switch_has_all_its_forms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FORMER_NAMES, "query_norm", "qk_norm")
    assert parsed("--query-norm").model.qk_norm
    assert parsed("--query_norm", "true").model.qk_norm
    for args in (("--no-query-norm",), ("--no_query_norm",), ("--query_norm=False",)):
        assert not parsed("--method", "fast", *args).model.qk_norm
    assert capsys.readouterr().err.count("storylab: --query_norm is now --qk_norm\n") == 5


def test_a_verb_without_the_field_has_no_such_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--matrix_lr", "1"]) == 2
    assert capsys.readouterr().err.startswith("storylab: Unrecognized options: --matrix_lr")


def test_digests_are_those_of_the_former_names() -> None:
    """As commit 89edc12 had them, where the fields were matrix_lr and average_share."""
    for preset, method, changes, digest in (
        ("nano", "fast", {"muon_lr": 0.04, "ema_fraction": 0.05}, "73f2c7b17e"),
        ("nano", "record", {"optimizer": "muon", "muon_lr": 0.04}, "ba9c6c9f6a"),
        ("nano", "record", {"ema_fraction": 0.25}, "28c293f8ac"),
    ):
        config = dataclasses.replace(preset_config(preset, method), **changes)  # type: ignore[arg-type]
        assert recipe_digest(config, "f") == digest
