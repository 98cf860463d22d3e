"""The file format of checkpoints: the only place that writes them, and reads and checks them.

A checkpoint is a Lightning checkpoint in plain types, which `torch.load` reads with
`weights_only=True`:

    state_dict     weights; their names begin with "model."
    global_step    optimizer steps
    kit            metadata: format number, config, tokenizer state, counters of the run
    ...            in checkpoints of a training run: the state of optimizer, data and callbacks

It is complete by itself: the model, its tokenizer and its config need no other file. This module
does not import Lightning, which would slow down the start of inference.
"""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.files import atomic_write

FORMAT = 1  # number of this format; a program that reads it refuses checkpoints of later ones
WEIGHT_PREFIX = "model."


def checkpoint_metadata(
    config: Config, tokenizer_state: dict[str, Any], **counters: Any
) -> dict[str, Any]:
    """Return the `kit` entry of a checkpoint.

    counters: `tokens` (targets trained on), `val_loss` (None before the first validation) and, of a
    training run, `data_sha256`.
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


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the checked content of a checkpoint, on the CPU.

    Raises UserError if the file is missing, damaged, not a checkpoint, or of a later format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; {known_checkpoints()}")
    state = load_undamaged(path)
    metadata = state.get("kit") if isinstance(state, dict) else None
    has_format = isinstance(metadata, dict) and isinstance(metadata.get("format"), int)
    if not has_format or "state_dict" not in state:
        raise UserError(
            f"{path} is not a checkpoint of this program: it has no config and tokenizer"
        )
    if state["kit"]["format"] > FORMAT:
        raise UserError(
            f"{path} has format {state['kit']['format']}; this program reads up to {FORMAT}: "
            "update it"
        )
    checkpoint: dict[str, Any] = state
    return checkpoint


def load_undamaged(path: Path) -> Any:
    """Return the content of a file that torch.save has written. Raises UserError if it is not one.

    The checksums of the archive are checked first, as torch.load ignores them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged_record = archive.testzip()
        if damaged_record:
            raise UserError(f"the checkpoint {path} is damaged at {damaged_record}; use another")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except zipfile.BadZipFile:
        raise UserError(f"{path} is truncated or not a checkpoint; use another") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not a checkpoint of this program: it has more than tensors and plain types"
        ) from None
    except Exception as error:  # unpickling fails in a dozen ways, and all mean the same here
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is not a checkpoint of this program, or damaged: {reason}"
        ) from error


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
