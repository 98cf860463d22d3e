"""What a checkpoint holds, writing one so that it is never half there, and reading one so that damage is noticed.

A checkpoint is a Lightning checkpoint (`torch.load`s with `weights_only=True`) with one more entry, `kit`: the format's
number, the config, the tokenizer's state and the run's counters, all in plain types. It is enough by itself.
No Lightning here: inference must not wait for it.
"""

import hashlib
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from config import Config
from config_file import config_from_dict
from errors import UserError
from model import Transformer
from tokenizer import Tokenizer, build_tokenizer, from_state

FORMAT = 1


@dataclass
class Checkpoint:
    """A trained model and all that belongs to it."""

    path: Path
    model: Transformer  # in evaluation mode
    tokenizer: Tokenizer
    config: Config
    step: int  # optimizer steps
    tokens: int  # targets trained on
    val_loss: float | None  # nats per token when it was last measured
    quantized: str | None = None  # int8 or int4, where the weights are
    chat_template: str | None = None  # Jinja, of a model that was taught to answer

    @cached_property
    def weights_sha256(self) -> str:
        return hash_weights(self.model.state_dict())


def kit_entry(config: Config, tokenizer_state: dict, **counters: Any) -> dict[str, Any]:
    """The `kit` entry of a checkpoint."""
    return {"format": FORMAT, "config": config.to_dict(), "tokenizer": tokenizer_state, **counters}


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name `path` only when all of it is on the disk.

    Raises UserError where the disk refuses; what stood at `path` is then untouched.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.unlink(missing_ok=True)
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free / 1e6
        reason = error.strerror or error if isinstance(error, OSError) else "it was not written whole"
        raise UserError(
            f"cannot write the checkpoint {path}: {reason}, with {free:,.0f} MB free; what stood there is untouched. "
            "Make room or choose another folder, then run the same command again"
        ) from error
    finally:  # also where `path` is the same file already, which a rename leaves with both names
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path` so that after a crash the file is the old one or the new one, never a part."""
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        torch.save(state, file)


def link_or_copy(source: Path, path: Path) -> None:
    """Give the finished file `source` the second name `path`, replacing what had that name in one step."""
    with whole_file(path) as unfinished:
        try:
            os.link(source, unfinished)
        except OSError:  # no hard links on this file system
            shutil.copyfile(source, unfinished)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut, where the system allows it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


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
        raise UserError(f"{path} is not a checkpoint of this program: it holds more than tensors and plain types") from None
    except Exception as error:  # unpicklers fail in a dozen ways, and every one means the same here
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a checkpoint of this program, or damaged: {reason}") from error
    kit = state.get("kit") if isinstance(state, dict) else None
    if not isinstance(kit, dict) or not isinstance(kit.get("format"), int) or "state_dict" not in state:
        raise UserError(f"{path} is not a checkpoint of this program: it carries no config and tokenizer")
    if kit["format"] > FORMAT:
        raise UserError(f"{path} has format {kit['format']}; this program reads up to {FORMAT}: update it")
    return state


def load_checkpoint(path: str | Path, tokenizer_name: str | None = None) -> Checkpoint:
    """The model (float32 or quantised, CPU, evaluation mode) and what belongs to it; `tokenizer_name` is checked against its own."""
    state = read_checkpoint(path)
    kit = state["kit"]
    tokenizer = from_state(kit["tokenizer"])
    config = config_from_dict(kit["config"], origin=str(path))
    if tokenizer_name is not None and not tokenizer_name == tokenizer.name == "gpt2":  # which need not be fetched for this
        other = build_tokenizer(tokenizer_name, config.data.cache_dir)
        if other.fingerprint != tokenizer.fingerprint:
            raise UserError(f"{path} was trained with the tokenizer {tokenizer.name!r}, not {tokenizer_name!r}; leave --tokenizer out")
    weights = {name.removeprefix("model."): tensor for name, tensor in state["state_dict"].items()}
    model = Transformer(config.model)  # on the meta device it would not draw weights, and take 0.8 s to import what that needs
    if quantized := kit.get("quantized"):
        from quantize import quantize  # few are

        model = quantize(model, quantized)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights of {path} do not fit its config: {' '.join(str(error).split())[:300]}") from None
    counters = state["global_step"], kit["tokens"], kit["val_loss"]
    return Checkpoint(Path(path), model.eval(), tokenizer, config, *counters, quantized, kit.get("chat_template"))


def hash_weights(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and numbers: two files with the same weights have the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def known_checkpoints() -> str:
    """A sentence that names the checkpoints there are, for messages."""
    named = (p for p in Path("checkpoints").glob("*/*.ckpt") if not p.parent.name.startswith("old-"))
    found = sorted(str(p) for p in [*Path("checkpoints").glob("*.ckpt"), *named])
    return f"here are {', '.join(found)}" if found else "train one with: python train.py --config config.yaml"


def best_checkpoint() -> Path:
    """checkpoints/best.ckpt (last.ckpt, if none is validated yet), else the named run's with the lowest validation loss."""
    for unnamed in (Path("checkpoints/best.ckpt"), Path("checkpoints/last.ckpt")):
        if unnamed.is_file():
            return unnamed
    runs = [p for p in sorted(Path("checkpoints").glob("*/best.ckpt")) if not p.parent.name.startswith("old-")]
    if not runs:
        raise UserError(f"there is no checkpoint yet in {unnamed.parent}; {known_checkpoints()}")
    losses = {path: read_checkpoint(path)["kit"]["val_loss"] for path in runs}
    return min(runs, key=lambda path: math.inf if losses[path] is None else losses[path])
