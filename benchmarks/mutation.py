"""Mutation testing: change one operator, number or keyword of a module, and see whether its tests notice.

    python benchmarks/mutation.py [GROUP ...] [--sample 100] [--results mutants.jsonl] [--again]

The changes are those of Cosmic Ray (``pip install cosmic-ray``). Its own way to run them starts Python and
torch for each; here a child of this process, which has loaded torch already, imports the changed module
in place of the file and runs the tests. No file is changed. POSIX alone.

A change is killed if a test fails, the module cannot be imported, or the tests take five times the
processor time that they take without it. Not tried are changes that Python never evaluates (annotations of
functions) and those between ``==`` and ``is``. ``--sample`` draws that many changes a module, always the
same ones. Results are added to a file, and what it has is not tried again, except with ``--again``
the changes that survived.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "storylab"
# Modules by group, each with the tests that are to notice its changes, the quickest first.
GROUPS: dict[str, dict[str, list[str]]] = {
    "schedules": {"optim/schedule.py": ["optim/test_schedule.py"]},
    "batch order": {"data/batches.py": ["data/test_batches.py"]},
    "formats": {
        "precision/formats.py": ["precision/test_rounding.py", "precision/test_quantize.py"],
        "precision/rounding.py": ["precision/test_rounding.py", "precision/test_quantize.py"],
    },
    "statistics": {
        "experiments/statistics.py": ["experiments/test_statistics.py"],
        "experiments/variance.py": ["experiments/test_variance.py", "experiments/test_family.py"],
        "experiments/family.py": ["experiments/test_family.py", "experiments/test_looks.py"],
        "experiments/looks.py": ["experiments/test_looks.py", "experiments/test_family.py"],
    },
    "verdicts": {
        "experiments/comparison.py": ["experiments/test_comparison.py"],
        "experiments/verdicts.py": [
            "experiments/test_verdicts.py",
            "experiments/test_comparison.py",
        ],
        "experiments/effects.py": ["experiments/test_effects.py"],
    },
    "record": {
        "checksums.py": ["record/test_values.py", "verify/test_verify.py"],
        "decode.py": ["record/test_values.py"],
        "record/arrays.py": ["record/test_values.py"],
        "record/checkpoint.py": ["training/test_checkpointing.py"],
        "record/folder.py": ["record/test_run.py", "record/test_damaged_files.py"],
        "record/run.py": ["record/test_run.py", "record/test_damaged_values.py"],
        "record/stages.py": ["record/test_stages.py"],
    },
}
SAME = {"Eq_Is", "Is_Eq", "NotEq_IsNot", "IsNot_NotEq"}
MEMORY = 16 << 30


@dataclass(frozen=True)
class Mutant:
    """A change of a module: an operator of Cosmic Ray and the place that it is applied to."""

    module: str
    sha256: str
    operator: str
    occurrence: int
    line: int


@dataclass(frozen=True)
class Tried:
    """A mutant with its outcome, and the change as lines of a diff."""

    mutant: Mutant
    killed: bool
    by: str
    diff: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "groups", nargs="*", default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS)
    )
    parser.add_argument("--sample", type=int, default=100, help="changes tried of each module")
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--again", action="store_true", help="try survivors again")
    args = parser.parse_args()
    preload()
    for group in args.groups:
        for module, tests in GROUPS[group].items():
            if (SOURCE / module).is_file():
                try_module(module, [str(ROOT / "tests" / t) for t in tests], args)


def preload() -> None:
    """Load the libraries that every child needs, but nothing of storylab."""
    for name in ("torch", "scipy.stats", "pytest", "hypothesis", "msgspec", "tyro", "rich.console"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)  # a child of a process with threads of torch may hang


def try_module(module: str, tests: Sequence[str], args: argparse.Namespace) -> None:
    """Try a sample of a module's changes, and print the share that the tests notice."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (SOURCE / module).read_text(encoding="utf-8")
    every = sorted(mutants_of(module, source), key=lambda m: (m.operator, m.occurrence))
    chosen = random.Random(module).sample(every, min(args.sample, len(every)))
    known = read_results(args.results)
    run_tests(module, source, tests, 1e6)  # the first time, caches are cold
    outcome, seconds = run_tests(module, source, tests, 1e6)
    if outcome:
        raise SystemExit(f"{module}: the tests fail without a change (exit code {outcome})")
    found: list[Tried] = []
    for mutant in chosen:
        tried = known.get(mutant)
        if tried is None or (args.again and not tried.killed):
            try:
                changed = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
            except AttributeError:
                continue  # Cosmic Ray cannot replace an exception whose name has a dot
            code, _ = run_tests(module, changed, tests, 5 * seconds + 10)
            diff = difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0, lineterm="")
            tried = Tried(mutant, code != 0, str(code), "\n".join([*diff][3:]))
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(tried)) + "\n")
        found.append(tried)
    killed = sum(t.killed for t in found)
    print(
        f"{module}: {killed} of {len(found)} killed ({killed / max(len(found), 1):.0%}), "
        f"{len(found)} of {len(every)} changes tried, tests take {seconds:.1f} s",
        flush=True,
    )
    for tried in found:
        if not tried.killed:
            print(f"  line {tried.mutant.line} {tried.mutant.operator}\n    ", end="")
            print(tried.diff.replace("\n", "\n    "), flush=True)


def read_results(path: Path) -> dict[Mutant, Tried]:
    """The mutants that have been tried, by mutant; of several trials the last."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        values = json.loads(line)
        mutant = Mutant(**values.pop("mutant"))
        found[mutant] = Tried(mutant, **values)
    return found


def mutants_of(module: str, source: str) -> Iterator[Mutant]:
    """Every change of a module that Python would see."""
    import parso.tree  # noqa: F401 - before cosmic_ray, whose own imports of it go in a circle
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    digest, tree = hashlib.sha256(source.encode()).hexdigest(), get_ast(source)
    silent = list(annotation_places(source))
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments() or "NoOp" in name or any(name.endswith(s) for s in SAME):
            continue
        change = operator()
        places = (p for node in ast_nodes(tree) for p in change.mutation_positions(node))
        for occurrence, (start, _) in enumerate(places):
            if not any(first <= start < last for first, last in silent):
                yield Mutant(module, digest, name, occurrence, start[0])


def annotation_places(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Begin and end of every annotation that belongs to a function, as line and column."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        arguments = [a for a in ast.walk(function.args) if isinstance(a, ast.arg)]
        inside = [n for n in ast.walk(function) if isinstance(n, ast.AnnAssign)]
        nodes = [a.annotation for a in arguments] + [n.annotation for n in inside]
        for node in (*nodes, function.returns):
            if node is not None and node.end_lineno and node.end_col_offset:
                first = (node.lineno, node.col_offset)
                yield first, (node.end_lineno, node.end_col_offset)


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from ``changed`` instead of from its file."""

    changed = ""

    def get_code(self, fullname: str) -> CodeType:
        """See :class:`importlib.abc.InspectLoader`."""
        return compile(self.changed, self.path, "exec", dont_inherit=True)


class Finder:
    """Finds the changed module before Python finds its file."""

    def __init__(self, module: str, source: str) -> None:
        self.name = "storylab." + module.removesuffix(".py").replace("/", ".")
        self.path, self.source = str(SOURCE / module), source

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See :class:`importlib.abc.MetaPathFinder`."""
        if name != self.name:
            return None
        loader = Loader(name, self.path)
        loader.changed = self.source
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


def run_tests(module: str, source: str, tests: Sequence[str], limit: float) -> tuple[int, float]:
    """Run tests with ``source`` as the module's code: exit code, or minus the signal that ended them, and
    seconds of processor time. ``limit`` is the most of those; five times as long by the clock."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    child = os.fork()
    if child == 0:
        os._exit(test_here(Finder(module, source), tests, folder, limit))
    end = time.monotonic() + 5 * limit + 60
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def test_here(finder: Finder, tests: Sequence[str], folder: Path, limit: float) -> int:
    """Run tests in this process, silently; returns pytest's exit code."""
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CPU, (min(int(limit), 10**6), 2 * 10**6))
    # What is written to: the engine that draws pictures reserves far more addresses.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
    sys.meta_path.insert(0, finder)
    os.chdir(ROOT)
    import pytest

    options = ["-x", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    options += ["--import-mode", "importlib", "--basetemp", str(folder / "tests")]
    return int(pytest.main([*options, *tests]))


if __name__ == "__main__":
    main()
