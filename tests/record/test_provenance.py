"""The version of the code in the record of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

import storylab
from damage import change
from record_folders import folders
from storylab.experiments.compare import compare_arms
from storylab.experiments.comparison import Arm
from storylab.record import provenance
from storylab.record.provenance import NON_NUMERIC_MODULES, bare_source, representative
from storylab.record.run import load_run


def test_the_code_version_is_that_of_what_python_runs() -> None:
    source = '''"""A module."""

# A remark.
X = "# no comment"  # a comment


class Thing:
    """A thing, über alles."""

    size: int = 3
    """Its size."""

    def grow(self) -> str:
        """Docstring
        of two lines.
        """
        return """no docstring"""
'''
    bare = bare_source(source)
    assert bare == (
        'X = "# no comment"\nclass Thing:\n    size: int = 3\n    def grow(self) -> str:\n'
        '        return """no docstring"""'
    )
    other = (
        source.replace("A remark", "Another").replace("Its size", "How large").replace("\n\n", "\n")
    )
    assert bare_source(other) == bare
    assert bare_source(source.replace("= 3", "= 4")) != bare


def test_modules_that_decide_no_numbers_exist() -> None:
    """A file that was renamed would count as numeric code again, without a word."""
    root = Path(storylab.__file__).parent
    assert all((root / name).exists() for name in NON_NUMERIC_MODULES)


def test_a_new_check_makes_no_new_code_version() -> None:
    decides = provenance._decides_numbers
    assert decides("training/loop.py") and decides("model/head.py") and decides("config/train.py")
    assert not decides("training/checks/another.py") and not decides("training/recorder.py")
    assert not decides("reporting/html.py") and decides("training/checks_of_another_name.py")


def test_code_versions_that_give_equal_bits_are_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = folders(place)[0], folders(place)[2]
    path = a / "environment.json"
    old = "0" * 64
    change(path, code_sha256=old)

    def confounds() -> str:
        arms = [Arm(folder.name, (load_run(folder),)) for folder in (a, b)]
        allowed = frozenset({"learning_rate", "seed", "data_seed"})
        return " ".join(compare_arms(*arms, allowed).confounds)

    assert "code: 2 versions (00000000" in confounds()
    now = load_run(b).environment.code_sha256
    table = {old: "middle", "middle": now}
    # The real table has versions of the past only.
    monkeypatch.setattr(provenance, "EQUIVALENT_CODE", table)
    assert "code" not in confounds()


def test_a_code_version_represents_itself() -> None:
    assert representative("a", {}) == "a"
    assert representative("a", {"a": "b", "b": "c"}) == representative("c", {"a": "b"}) == "c"
    with pytest.raises(AssertionError, match="circle"):
        representative("a", {"a": "b", "b": "a"})


def test_the_table_of_code_versions_is_well_formed() -> None:
    for code in provenance.EQUIVALENT_CODE:
        assert len(code) == len(representative(code)) == 64


def test_modules_that_decide_numbers_exist() -> None:
    root = Path(storylab.__file__).parent
    for name in (*provenance.NUMERIC_CODE, *provenance.NON_NUMERIC_MODULES):
        assert (root / name).exists(), name
