"""The file format of a checkpoint: writing it whole, reading and checking it."""

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.files import atomic_write

FORMAT = 1


def checkpoint_metadata(config: Config, tokenizer_state: dict, **counters: Any) -> dict[str, Any]:
    """The `kit` entry of a checkpoint."""
    return {"format": FORMAT, "config": config.to_dict(), "tokenizer": tokenizer_state, **counters}


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path` so that after a crash the file is the old one or the new one, never a part."""
    with atomic_write(path) as unfinished, unfinished.open("wb") as file:
        torch.save(state, file)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checked content of a checkpoint, on the CPU. Raises UserError for one that is missing, damaged, foreign or newer."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; {known_checkpoints()}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"the checkpoint {path} is damaged at {damaged}; take another one")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except zipfile.BadZipFile:
        raise UserError(f"{path} is truncated or not a checkpoint; take another one") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not a checkpoint of this program: it holds more than tensors and plain types"
        ) from None
    except Exception as error:  # unpicklers fail in a dozen ways, and every one means the same here
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is not a checkpoint of this program, or damaged: {reason}"
        ) from error
    kit = state.get("kit") if isinstance(state, dict) else None
    if (
        not isinstance(kit, dict)
        or not isinstance(kit.get("format"), int)
        or "state_dict" not in state
    ):
        raise UserError(
            f"{path} is not a checkpoint of this program: it carries no config and tokenizer"
        )
    if kit["format"] > FORMAT:
        raise UserError(
            f"{path} has format {kit['format']}; this program reads up to {FORMAT}: update it"
        )
    return state


def hash_weights(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and numbers: two files with the same weights have the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def known_checkpoints() -> str:
    """A sentence that names the checkpoints there are, for messages."""
    named = (
        p for p in Path("checkpoints").glob("*/*.ckpt") if not p.parent.name.startswith("old-")
    )
    found = sorted(str(p) for p in [*Path("checkpoints").glob("*.ckpt"), *named])
    return (
        f"here are {', '.join(found)}"
        if found
        else "train one with: python train.py --config config.yaml"
    )
