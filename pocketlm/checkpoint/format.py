"""The file format of checkpoints: the only place that writes them, and reads and checks them.

A checkpoint is a Lightning checkpoint in plain types, which `torch.load` reads with
`weights_only=True`:

    state_dict     weights; their names begin with "model."
    global_step    optimizer steps
    kit            metadata: format number, config, tokenizer state, counters of the run
    ...            in checkpoints of a training run: the state of optimizer, data and callbacks

It is complete by itself: the model, its tokenizer and its config need no other file. This module
does not import Lightning, which would slow down the start of inference.

The same without the state of a run may be a safetensors file, which `convert.py` writes. Its
metadata has the two other entries as JSON, and the SHA-256 of the weights.
"""

import errno
import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pocketlm.checkpoint.sharded import (
    SHARDS,
    changed_shard,
    shards_problem,
    with_whole_tensors,
)
from pocketlm.checkpoint.validation import content_problem
from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.files import atomic_write

FORMAT = 1  # number of this format; a program that reads it refuses checkpoints of later ones
WEIGHT_PREFIX = "model."
STATE_KEY, HASH_KEY = "pocketlm", "weights_sha256"  # in the metadata of a safetensors file


class DamagedCheckpoint(UserError):
    """A file that is not a whole checkpoint, and will not become one: an older one may do."""


def checkpoint_metadata(
    config: Config, tokenizer_state: dict[str, Any], **counters: Any
) -> dict[str, Any]:
    """Return the `kit` entry of a checkpoint.

    counters: `tokens` (targets trained on), `val_loss` (None before the first validation) and, of a
    training run, `data_sha256`, `hardware` (from `describe_hardware`), `history`
    (the steps at which its config was changed) and `waited` (validations without a new best).
    """
    return {"format": FORMAT, "config": config.to_dict(), "tokenizer": tokenizer_state, **counters}


def save_weights(
    weights: Mapping[str, Tensor], step: int, metadata: dict[str, Any], path: Path
) -> None:
    """Write a checkpoint for inference, without the state of a training run.

    weights: by their names in `Transformer`. metadata: from `checkpoint_metadata`.
    """
    state_dict = {WEIGHT_PREFIX + name: tensor for name, tensor in weights.items()}
    save_checkpoint({"state_dict": state_dict, "global_step": step, "kit": metadata}, path)


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path` atomically: after a crash, the file is the old one or the new one."""
    with atomic_write(path) as unfinished, unfinished.open("wb") as file:
        torch.save(state, file)


def read_checkpoint(
    path: str | Path, *, metadata_only: bool = False, whole: bool = True
) -> dict[str, Any]:
    """Return the checked content of a checkpoint, on the CPU.

    With `metadata_only`, the tensors are neither read nor checked, which takes milliseconds. Those
    of a sharded checkpoint are put together, unless `whole` is false: they are then left out.
    Raises UserError if the file is missing, cannot be read or is of a later format, and
    DamagedCheckpoint if it is damaged or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; {known_checkpoints()}")
    load = load_safetensors if is_safetensors(path) else load_undamaged
    state = load(path, metadata_only=metadata_only)
    metadata = state.get("kit") if isinstance(state, dict) else None
    has_format = isinstance(metadata, dict) and isinstance(metadata.get("format"), int)
    if not has_format or "state_dict" not in state:
        raise DamagedCheckpoint(
            f"{path} is not a checkpoint of this program: it has no config and tokenizer"
        )
    if state["kit"]["format"] > FORMAT:
        raise UserError(
            f"{path} has format {state['kit']['format']}; this program reads up to {FORMAT}: "
            "update it"
        )
    if problem := content_problem(state):
        raise DamagedCheckpoint(f"the checkpoint {path} is damaged: {problem}; use another")
    checkpoint: dict[str, Any] = state
    if SHARDS in state and not metadata_only:
        problem = shards_problem(state, path) or (changed_shard(state, path) if whole else None)
        if problem:
            raise DamagedCheckpoint(f"the checkpoint {path} is not whole: {problem}; use another")
        return with_whole_tensors(checkpoint, path) if whole else checkpoint
    return checkpoint


def sharded_checkpoint(path: Path) -> Path | None:
    """Return the file of a sharded checkpoint, of which `path` is the file or the folder.

    None if it is anything else.
    """
    candidates = path.parent.glob("*.ckpt") if path.is_dir() else [path] * path.is_file()
    for candidate in candidates:
        try:
            state = read_checkpoint(candidate, metadata_only=True)
        except UserError:
            continue
        if SHARDS in state and (candidate == path or state[SHARDS]["folder"] == path.name):
            return candidate
    return None


def write_whole(path: Path, output: Path) -> int:
    """Write a sharded checkpoint as an ordinary one; return its step.

    It has the state of the run, too, which resumes from it.
    """
    state = read_checkpoint(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(state, output)
    step: int = state["global_step"]
    return step


def load_undamaged(path: Path, *, metadata_only: bool = False) -> Any:
    """Return the content of a file that torch.save has written.

    Raises DamagedCheckpoint if it is not one. The checksums of the archive are checked first, as
    torch.load ignores them; with `metadata_only`, only that of the record without the tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if metadata_only:
                names = [name for name in names if name.endswith("/data.pkl")]
            damaged_record = first_damaged_record(archive, names)
        if damaged_record:
            raise DamagedCheckpoint(
                f"the checkpoint {path} is damaged at {damaged_record}; use another"
            )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except zipfile.BadZipFile:
        raise DamagedCheckpoint(f"{path} is truncated or not a checkpoint; use another") from None
    except pickle.UnpicklingError:
        raise DamagedCheckpoint(
            f"{path} is not a checkpoint of this program: it has more than tensors and plain types"
        ) from None
    except MemoryError:
        raise UserError(f"there is not enough memory to read the checkpoint {path}") from None
    except Exception as error:  # unpickling fails in a dozen ways, and all mean the same here
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, OSError) and error.errno in UNREADABLE:
            raise UserError(f"the checkpoint {path} cannot be read: {reason}") from error
        raise DamagedCheckpoint(
            f"{path} is not a checkpoint of this program, or damaged: {reason}"
        ) from error


def safetensors_metadata(state: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata of a safetensors file with these weights, by their names in a model."""
    entries = {name: state[name] for name in ("global_step", "kit")}
    return {STATE_KEY: json.dumps(entries), HASH_KEY: hash_weights(dict(weights))}


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors: the length of a JSON object, and the object."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def load_safetensors(path: Path, *, metadata_only: bool = False) -> dict[str, Any]:
    """Return the content of a safetensors file that `convert.py` has written.

    Raises DamagedCheckpoint if it is none, or if its weights have another SHA-256.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = json.loads(metadata.get(STATE_KEY, "{}"))
            names = [] if metadata_only else file.keys()
            weights = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, OSError) as error:
        raise DamagedCheckpoint(f"{path} is damaged or not a safetensors file: {error}") from None
    if not state:
        raise DamagedCheckpoint(
            f"{path} has weights only, without our config and tokenizer; convert the folder that "
            "it is in: python convert.py FOLDER --to ckpt FILE"
        )
    unprefixed = {name.removeprefix(WEIGHT_PREFIX): each for name, each in weights.items()}
    if not metadata_only and hash_weights(unprefixed) != metadata.get(HASH_KEY):
        raise DamagedCheckpoint(f"the weights of {path} are damaged; use another copy of it")
    return {**state, "state_dict": weights}


# The file may be whole all the same: going back to an older one would lose steps.
UNREADABLE = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT}


def first_damaged_record(archive: zipfile.ZipFile, names: list[str]) -> str | None:
    """Return the name of the first record with a wrong checksum; None if all are right."""
    for name in names:
        try:
            with archive.open(name) as record:
                while record.read(2**20):
                    pass
        except zipfile.BadZipFile:
            return name
    return None


def hash_weights(weights: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values, which identifies the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def known_checkpoints() -> str:
    """Return a sentence that names the checkpoints in checkpoints/, for error messages."""
    folder = Path("checkpoints")
    of_named_runs = folder.glob("*/*.ckpt")
    current = [p for p in of_named_runs if not p.parent.name.startswith("old-")]
    paths = sorted(str(p) for p in [*folder.glob("*.ckpt"), *current])
    if not paths:
        return "train one with: python train.py --config config.yaml"
    return f"here are {', '.join(paths)}"
