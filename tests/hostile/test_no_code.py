"""Nothing that is read is unpickled or evaluated, and what listens does so for this machine alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import storylab

SOURCE = Path(storylab.__file__).parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
# Modules that make objects or run code from bytes.
MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "runpy",
    "code",
}
BUILTINS = {"eval", "exec", "compile", "__import__", "input"}
METHODS = {
    *("torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *(
        "np.load",
        "numpy.load",
        "np.loadtxt",
        "np.genfromtxt",
        "os.system",
        "os.popen",
        "pandas.read_pickle",
    ),
    *("dist.all_gather_object", "dist.broadcast_object_list", "dist.gather_object"),
}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an expression; empty if it is another."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(tree: ast.Module) -> list[str]:
    """Calls and imports by which data could become code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in BUILTINS | METHODS or name.endswith("_object_list"):
                found.append(name)
            found += [
                keyword.arg
                for keyword in node.keywords
                if keyword.arg in ("allow_pickle", "shell", "trust_remote_code", "weights_only")
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
    return found


@pytest.mark.parametrize("path", TREES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert not faults(TREES[path])


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from yaml import load", "eval(x)", "torch.load(x)", "np.load(x)"),
        *("np.save(x, y, allow_pickle=True)", "subprocess.run(x, shell=True)"),
        *(
            "torch.load(x, weights_only=flag)",
            "dist.broadcast_object_list(x)",
            "exec(open(x).read())",
        ),
    ],
)
def test_the_scan_finds_what_it_looks_for(code: str) -> None:
    assert faults(ast.parse(code))


def test_modules_that_are_imported_by_name_are_ours() -> None:
    """A name from a file never decides which module is imported."""
    places = {
        path.relative_to(SOURCE).as_posix()
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func).endswith("import_module")
    }
    assert places == {
        # Modules of a package, by the names of its files.
        *("optim/__init__.py", "training/checking.py", "cli/registry.py"),
        # Names from a table in the code.
        *("export/__init__.py", "export/exporter.py", "imported/__init__.py"),
        "execution/executors.py",
        # Processes that were started by this program, and read their work from a pipe to it.
        *("tracking/worker.py", "execution/worker.py"),
    }


def test_one_place_listens_and_on_this_machine_alone() -> None:
    """tests/ui checks the Host header, and that nothing is written."""
    listeners = {
        path.relative_to(SOURCE).as_posix()
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and dotted(node.func).endswith((".bind", ".listen", ".run_app"))
        and len(node.args) == 1
    }
    assert listeners == {"ui/server.py"}
    pytest.importorskip("uvicorn", reason="the page's packages are not installed")
    from storylab.ui.server import open_port

    with open_port(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
