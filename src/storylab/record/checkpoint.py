"""Checkpoints: one safetensors file each, with its own hash, written whole or not at all.

``best.safetensors`` holds the weights alone. ``last.safetensors`` holds the weights, their moving average
if the run has one, the optimizers' state and, in its header, everything else that a run needs to go on to
the same bits. There is no random state to keep: batches are a function of the iteration, and the model has
no dropout.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from storylab.decode import decode
from storylab.errors import UserError
from storylab.files import atomic_path, exists, open_file

MODEL_PREFIX, AVERAGE_PREFIX, OPTIMIZER_PREFIX = "model.", "average.", "optimizer."
# The library reads no longer one.
LARGEST_HEADER = 100_000_000
HISTORIES = ("amax_history", "amax_iteration")


def weights_sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(
    path: Path,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    previous: Path | None = None,
    point: Path | None = None,
) -> None:
    """Write tensors and JSON ``state`` to ``path``; until it is complete the old file stays.

    Args:
        path: the checkpoint.
        tensors: by name.
        state: everything else.
        previous: keeps the old file from then on.
        point: keeps the new file, also when a later one is written to ``path``.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(state)
    metadata = {"format": "pt", "sha256": _sha256(tensors, text), "state": text}
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:
            # The library wraps the system's message, such as "No space left on device".
            raise OSError(None, str(error)) from error
        temporary.chmod(0o644)  # the library leaves it readable by its owner alone
        if previous is not None and exists(path):
            keep(path, previous)
    if point is not None:
        keep(path, point)


def keep(path: Path, name: Path) -> None:
    """Give the file ``path`` the name ``name`` as well.

    Raises:
        UserError: the folder cannot be written.
    """
    with atomic_path(name) as link:
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint, on the CPU.

    Raises:
        UserError: the file is missing, truncated or altered.
    """
    if not exists(path):
        raise UserError(f"{path} is missing: the run has no such checkpoint (yet)")
    header = _header(path)  # the library reports any file that it cannot open as missing
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, MemoryError) as error:  # from the library alone
        raise UserError(f"{path} is not a whole storylab checkpoint ({error})") from error
    text = metadata.get("state", "")
    if not text or "sha256" not in metadata:
        raise UserError(f"{path} is not a whole storylab checkpoint (its header has no state)")
    # The sum covers state and tensors; of the rest of the file nothing but this is possible.
    usual = metadata.keys() == {"format", "sha256", "state"} and metadata["format"] == "pt"
    closed = header.rstrip(b" ").endswith(b"}")
    if not (usual and closed) or _sha256(tensors, text) != metadata["sha256"]:
        raise UserError(f"{path} has been altered (its SHA-256 differs): restore it from a copy")
    return tensors, decode(dict[str, Any], text.encode(), str(path))


def _header(path: Path) -> bytes:
    """The JSON at the start of a safetensors file, with the spaces that fill it up."""
    with open_file(path) as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, LARGEST_HEADER))


def _sha256(tensors: dict[str, Tensor], state: str) -> str:
    return hashlib.sha256((weights_sha256(tensors) + state).encode()).hexdigest()


def training_tensors(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    average: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Weights, their average and optimizer state, under the names that :func:`restore` reads."""
    tensors = {MODEL_PREFIX + name: value for name, value in model.state_dict().items()}
    tensors |= {AVERAGE_PREFIX + name: value for name, value in average.items()}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{OPTIMIZER_PREFIX}{key}.{name}"] = value
    return tensors


def restore(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    average: dict[str, Tensor],
    tensors: dict[str, Tensor],
) -> None:
    """Load the tensors that :func:`training_tensors` returned into model, optimizers and average.

    Raises:
        UserError: the weights are not those of this model, or the averages or the optimizer state are not
            those that the config asks for.
    """
    own = {name: v for name, v in tensors.items() if not name.startswith(AVERAGE_PREFIX)}
    load_weights(model, own)
    if {AVERAGE_PREFIX + name for name in average} != tensors.keys() - own.keys():
        raise UserError(
            "the checkpoint's averages are not those that the ema_fraction in the run's config.json "
            "needs: one of the two has been altered"
        )
    for name, value in average.items():
        value.copy_(tensors[AVERAGE_PREFIX + name])
    parameters = dict(model.named_parameters())
    of = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        if full_name.startswith(OPTIMIZER_PREFIX):
            key, name = full_name.removeprefix(OPTIMIZER_PREFIX).split(".", 1)
            states.setdefault(name, {})[key] = value
    for name, state in states.items():
        if name not in parameters or state.keys() != _state_names(of[parameters[name]]):
            raise UserError(
                "the checkpoint's optimizer state is not that of the optimizer in the run's config.json: "
                "one of the two has been altered"
            )
        parameter = parameters[name]
        of[parameter].state[parameter].update(
            {key: value.to(parameter.device) for key, value in state.items()}
        )


def _state_names(optimizer: torch.optim.Optimizer) -> frozenset[str]:
    """Tensors that an optimizer keeps of every parameter that it has updated."""
    names: frozenset[str] = optimizer.state_names  # type: ignore[attr-defined]
    return names


def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the weights of either kind of checkpoint.

    Raises:
        UserError: they are not those of this model's shape.
    """
    try:
        weights = model_weights(tensors)
        # Histories of delayed scales belong to the training state, not to the model.
        known = model.state_dict().keys()
        extra = [n for n in weights if n.rpartition(".")[2] in HISTORIES and n not in known]
        model.load_state_dict({k: v for k, v in weights.items() if k not in extra})
    except RuntimeError as error:
        raise UserError(
            "the checkpoint's weights do not fit the shape in the run's config.json: "
            "one of the two has been altered"
        ) from error


def model_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of either kind of checkpoint: their average if it has one."""
    weights, averages = {}, {}
    for name, value in tensors.items():
        if name.startswith(AVERAGE_PREFIX):
            averages[name.removeprefix(AVERAGE_PREFIX)] = value
        elif not name.startswith(OPTIMIZER_PREFIX):
            weights[name.removeprefix(MODEL_PREFIX)] = value
    return weights | averages
