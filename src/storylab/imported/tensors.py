"""Weights in safetensors files: one file, or several with an index.

https://github.com/huggingface/safetensors. The library checks headers and offsets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
from torch import Tensor

from storylab.decode import shown as shortened
from storylab.errors import UserError
from storylab.files import exists, open_file, read_json, shown
from storylab.imported.source import require_shapes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")
# Buffers that early versions of `transformers` saved; they follow from the config.
IGNORED = ".self_attn.rotary_emb.inv_freq"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model in ``folder``.

    Raises:
        UserError: there are none, or the index names a file elsewhere.
    """
    if exists(folder / WEIGHTS):
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not exists(index):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        raise UserError(
            f"{shown(folder)} has no {WEIGHTS}"
            + (
                f": {shown(pickles[0])} is a pickle, which can run code and is not read. Save the model "
                "with safetensors (save_pretrained of transformers does)"
                if pickles
                else " and no index of several: check the path"
            )
        )
    values = read_json(index)
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{shown(index)} has no weight_map")
    for name in names.values():
        # A name, no path: the index must not lead out of the folder.
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise UserError(
                f"{shown(index)}: weight_map: {shortened(name)} is not the name of a safetensors file "
                "in this folder"
            )
    return [folder / name for name in sorted(set(names.values()))]


def load_tensors(files: list[Path], expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read the tensors of ``files``; their shapes are compared before any is read.

    Args:
        files: safetensors files, of which no two have the same tensor.
        expected: shapes by name, all of them and no others.

    Raises:
        UserError: a file is damaged, or its tensors are not those expected.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        for name, shape in _shapes(path).items():
            if name in shapes:
                raise UserError(f"{shown(path)}: {shown(name)} is in an earlier file too")
            shapes[name] = shape
    require_shapes(shapes, expected, files[0].parent)
    found: dict[str, Tensor] = {}
    for path in files:
        with _opened(path) as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name in expected}  # noqa: SIM118
    return found


def tensor_names(files: list[Path]) -> set[str]:
    """Names of all tensors in ``files``.

    Raises:
        UserError: a file is damaged.
    """
    return {name for path in files for name in _shapes(path)}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name in one file, without buffers that follow from the config.

    Raises:
        UserError: the file is damaged, or a tensor has a dtype that holds no weights.
    """
    found: dict[str, tuple[int, ...]] = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            if name.endswith(IGNORED):
                continue
            if part.get_dtype() not in DTYPES:
                raise UserError(
                    f"{shown(path)}: {shown(name)} is {part.get_dtype()}: weights are {', '.join(DTYPES)}"
                )
            found[name] = tuple(part.get_shape())
    return found


@contextmanager
def _opened(path: Path) -> Iterator[safetensors.safe_open]:
    with open_file(path):
        pass  # the library reports any file that it cannot open as missing
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError, MemoryError) as error:
        raise UserError(f"{shown(path)} is not a whole safetensors file ({error})") from error
