"""Sharded checkpoints: the tensors of a run whose processes have a part of each.

Such a checkpoint is two things beside each other: a small file `step-N.ckpt` with all that an
ordinary checkpoint has but the tensors, and the folder that its entry `shards` names, which torch's
distributed checkpoint writes: a file from each process. The small file is written last, so that
with it the checkpoint is complete. Any number of processes reads the tensors back.

The names of the tensors are `state_dict.NAME` and `optimizer.NUMBER.KEY`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.errors import UserError

SHARDS = "shards"  # in a checkpoint: the folder's name, and the size of each file in it


def describe_shards(folder: Path) -> dict[str, Any]:
    """Return the entry `shards` for a folder that is complete."""
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    return {"folder": folder.name, "files": files}


def shards_problem(state: Mapping[str, Any], path: Path) -> str | None:
    """Return what is wrong with the shards of a checkpoint, as a clause; None if nothing is."""
    folder = path.parent / state[SHARDS]["folder"]
    if not folder.is_dir():
        return f"its folder {folder} is missing"
    for name, size in state[SHARDS]["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size:,} of {size:,} bytes"
    return None


def stored_tensors(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the names, shapes and dtypes of a checkpoint's tensors, on the meta device."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(path.parent / state[SHARDS]["folder"]).read_metadata()
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)  # all of them
    }


def read_shards(
    state: Mapping[str, Any], path: Path, tensors: dict[str, Tensor], *, together: bool
) -> None:
    """Read tensors of a checkpoint into `tensors`, by their names in it.

    together: all processes read at once, and each tensor of theirs is a part of it or whole.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(path.parent / state[SHARDS]["folder"])
    load(tensors, storage_reader=reader, no_dist=not together)


def split_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Take the tensors out of the content of a checkpoint, and return them by their names."""
    tensors = {f"state_dict.{name}": each for name, each in state["state_dict"].items()}
    state["state_dict"] = {}
    for optimizer in state["optimizer_states"]:
        for number, values in optimizer["state"].items():
            tensors |= {f"optimizer.{number}.{key}": each for key, each in values.items()}
        optimizer["state"] = {}
    return tensors


def join_tensors(state: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint with tensors of these names in their places."""
    weights: dict[str, Tensor] = {}
    by_parameter: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "state_dict":
            weights[rest] = tensor
        else:
            number, _, key = rest.partition(".")
            by_parameter.setdefault(int(number), {})[key] = tensor
    [optimizer] = state["optimizer_states"]
    optimizer = {**optimizer, "state": dict(sorted(by_parameter.items()))}
    rest_of_state = {name: value for name, value in state.items() if name != SHARDS}
    return {**rest_of_state, "state_dict": weights, "optimizer_states": [optimizer]}


def with_whole_tensors(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the content of a sharded checkpoint as that of an ordinary one, on the CPU."""
    stored = stored_tensors(state, path)
    tensors = {name: torch.empty_like(each, device="cpu") for name, each in stored.items()}
    try:
        read_shards(state, path, tensors, together=False)
    except Exception as error:  # torch's own class for the failures of all processes
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"the shards of {path} cannot be read: {reason}") from error
    return join_tensors(state, tensors)
