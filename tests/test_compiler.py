"""Compilers: those that are missing are named, flags that are known to miscompile are avoided."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from samples import TINY, MakeConfig
from storylab import compiler
from storylab.cli import main
from storylab.config import to_dict

pytestmark = [
    pytest.mark.slow,
    # torch's own, while it looks at the tensors of a block.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
NEEDS_COMPILER = pytest.mark.skipif(
    compiler.missing_for_compiling("cpu") is not None, reason="nothing here compiles C++"
)


def test_what_compiling_lacks_is_said(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Machines that lack one thing after another.
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    lacking = compiler.missing_for_compiling
    assert lacking("cpu") == "a C++ compiler"
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    assert lacking("cuda") == "the package triton"
    monkeypatch.setattr(compiler, "find_spec", lambda name: name)
    assert lacking("cuda") == "a C compiler"
    monkeypatch.setattr(compiler.shutil, "which", lambda name: f"/usr/bin/{name}" if name else None)
    monkeypatch.setattr(compiler.sysconfig, "get_path", lambda *_: "/nowhere")
    for device in ("cpu", "cuda"):
        assert "/nowhere/Python.h" in str(lacking(device))
    assert main(["train", "--compile", "--device", "cpu"]) == 2
    assert "needs Python's header files" in capsys.readouterr().err


AVX512 = "avx512f avx512bw avx512cd avx512dq avx512vl"
GCC = """#!/bin/sh
echo "The following options are target specific:"
echo "  -march=                     		{march}"
echo "  -mtune=                     		{mtune}"
echo "  Known valid arguments for -march= option:"
"""


@pytest.mark.parametrize(
    ("march", "mtune", "flags", "expected"),
    [
        # Sapphire Rapids under gcc 12.2, which does not know it, and Zen 4, which it takes for Zen 3.
        ("cooperlake", "generic", "", "cooperlake"),
        ("znver3", "znver3", "", None),
        # Under a gcc that only sees instruction sets, the processor's own flags decide.
        ("x86-64-v4", "generic", f"avx2 fma bmi2 {AVX512}", "skylake-avx512"),
        ("x86-64-v3", "generic", "avx2 fma bmi2", "haswell"),
        ("x86-64", "generic", "sse4_2", None),
    ],
)  # fmt: skip
def test_tuning_is_named_where_gcc_would_tune_for_no_processor(
    march: str,
    mtune: str,
    flags: str,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gcc = tmp_path / "g++"
    gcc.write_text(GCC.format(march=march, mtune=mtune))
    gcc.chmod(0o755)
    monkeypatch.setenv("CXX", str(gcc))
    # A processor that this machine need not have.
    monkeypatch.setattr(compiler.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(compiler, "processor_flags", lambda: set(flags.split()))
    compiler.tuned_name.cache_clear()
    try:
        assert compiler.tuned_name() == expected
    finally:
        compiler.tuned_name.cache_clear()


@NEEDS_COMPILER
def test_inductor_gets_the_tuning_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The setting is inductor's own, which has no public name.
    from torch._inductor import config

    if not hasattr(config.cpp, "march"):
        pytest.skip("this torch has no such setting")
    # A name that inductor does not choose itself.
    monkeypatch.setattr(compiler, "tuned_name", lambda: "icelake-server")
    with config.patch({"cpp.march": None}):
        compiler.set_tuning()
        assert config.cpp.march == "icelake-server"
    with config.patch({"cpp.march": "native"}):
        compiler.set_tuning()
        assert config.cpp.march == "native"


# Two 32 x 32 bfloat16 transposes in one kernel: what gcc 12 gets wrong with generic tuning.
SMALLEST = """
import sys, torch
from torch._inductor import config
config.cpp.march = "x86-64-v4"
x, w = torch.randn(8, 64, 128).bfloat16(), torch.randn(128, 64)
def g(x, w):
    t = x.transpose(1, 2)
    halves = (t[..., :32] * w[:, :32]).bfloat16(), (t[..., 32:] * w[:, 32:]).bfloat16()
    return torch.cat(halves, -1)
print("wrong" if not torch.equal(torch.compile(g, dynamic=False)(x, w), g(x, w)) else "right")
"""
MODEL = """
import dataclasses, json, sys, torch
from torch._inductor import config
from storylab.config import from_dict
from storylab.training.compile_check import check_compiled
from storylab.training.state import TrainState
from storylab.training.setup import resolve_device
if sys.argv[2] == "miscompiling":
    config.cpp.march = "x86-64-v4"
run, precision = resolve_device(from_dict(json.loads(sys.argv[1])))
windows = torch.randint(300, (run.batch_size, run.block_size + 1))
print(json.dumps(check_compiled(TrainState(run, 300, precision), windows).to_dict()))
"""


@NEEDS_COMPILER
def test_the_known_miscompile_is_caught_and_avoided(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    """With the flags that are known to be wrong, built here, and with those that storylab chooses."""

    def run(script: str, *args: str) -> str:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-W", "ignore", "-c", script, *args]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True)
        return answer.stdout.strip()

    shape = dataclasses.replace(TINY, n_layer=1, n_head=2, n_kv_head=1, n_embd=128)
    config = tiny_config(model=shape, dtype="bfloat16", block_size=128, compile=True)
    arguments = json.dumps(to_dict(config))
    assert json.loads(run(MODEL, arguments, "as chosen"))["passed"]
    if run(SMALLEST) != "wrong":
        pytest.skip("this compiler and processor get the known case right, or cannot run it")
    assert not json.loads(run(MODEL, arguments, "miscompiling"))["passed"]
