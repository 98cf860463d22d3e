"""Sharded checkpoints: the tensors of a run whose processes have a part of each.

Such a checkpoint is two things beside each other: a small file `step-N.ckpt` with all that an
ordinary checkpoint has but the tensors, and the folder that its entry `shards` names, which torch's
distributed checkpoint writes: a file from each process. The small file is written last, so that
with it the checkpoint is complete. It has the size and the CRC-32 of each file. Any number of
processes reads the tensors back.

The names of the tensors are `state_dict.NAME` and `optimizer.NUMBER.KEY`.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.errors import UserError

SHARDS = "shards"  # in a checkpoint: the folder's name, and size and CRC-32 of each file in it
BLOCK = 2**22  # bytes that are read at a time


def describe_shards(folder: Path, checksums: dict[str, int]) -> dict[str, Any]:
    """Return the entry `shards` for a folder that is complete."""
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    return {"folder": folder.name, "files": files, "crc32": checksums}


def checksums_of(files: Iterable[Path]) -> dict[str, int]:
    """Return the CRC-32 of each file, by its name."""

    def checksum(path: Path) -> int:
        value = 0
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                value = zlib.crc32(block, value)
        return value

    files = list(files)
    with ThreadPoolExecutor() as pool:  # the checksums release Python's global lock
        return {
            path.name: value for path, value in zip(files, pool.map(checksum, files), strict=True)
        }


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


def changed_shard(state: Mapping[str, Any], path: Path) -> str | None:
    """Return what is wrong with the content of the shards, as a clause; None if nothing is.

    It reads all files, of which `shards_problem` has found that they are there.
    """
    folder, expected = path.parent / state[SHARDS]["folder"], state[SHARDS].get("crc32", {})
    found = checksums_of(folder / name for name in expected)
    changed = [folder / name for name, value in found.items() if value != expected[name]]
    return f"{changed[0]} has another checksum than when it was written" if changed else None


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
    with failures_as_sentences(f"the shards of {path} cannot be read"):
        read_shards(state, path, tensors, together=False)
    return join_tensors(state, tensors)


@contextmanager
def failures_as_sentences(what: str) -> Iterator[None]:
    """Turn what torch raises in all processes, if one of them fails, into a UserError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:  # no Exception, but a BaseException
        process, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise UserError(f"{what}: {reason.splitlines()[0]} (in process {process})") from error
