"""What a checkpoint holds, writing one so that it is never half there, and reading one so that damage is noticed.

A checkpoint is a Lightning checkpoint (`torch.load`s with `weights_only=True`) with one more entry, `kit`: the format's
number, the config, the tokenizer's state and the run's counters, all in plain types. It is enough by itself.
No Lightning here: inference must not wait for it.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from model import Transformer
from pocketlm.checkpoint.format import (
    hash_weights,
    known_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from pocketlm.config.loading import config_from_dict
from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.model.quantization import quantize
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.build import build_tokenizer, from_state


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


def load_checkpoint(path: str | Path, tokenizer_name: str | None = None) -> Checkpoint:
    """The model (float32 or quantised, CPU, evaluation mode) and what belongs to it; `tokenizer_name` is checked against its own."""
    state = read_checkpoint(path)
    kit = state["kit"]
    tokenizer = from_state(kit["tokenizer"])
    config = config_from_dict(kit["config"], origin=str(path))
    if (
        tokenizer_name is not None and not tokenizer_name == tokenizer.name == "gpt2"
    ):  # which need not be fetched for this
        other = build_tokenizer(tokenizer_name, config.data.cache_dir)
        if other.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{path} was trained with the tokenizer {tokenizer.name!r}, not {tokenizer_name!r}; leave --tokenizer out"
            )
    weights = {name.removeprefix("model."): tensor for name, tensor in state["state_dict"].items()}
    model = Transformer(
        config.model
    )  # on the meta device it would not draw weights, and take 0.8 s to import what that needs
    if quantized := kit.get("quantized"):
        model = quantize(model, quantized)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"the weights of {path} do not fit its config: {' '.join(str(error).split())[:300]}"
        ) from None
    counters = state["global_step"], kit["tokens"], kit["val_loss"]
    return Checkpoint(
        Path(path), model.eval(), tokenizer, config, *counters, quantized, kit.get("chat_template")
    )


def best_checkpoint() -> Path:
    """checkpoints/best.ckpt (last.ckpt, if none is validated yet), else the named run's with the lowest validation loss."""
    for unnamed in (Path("checkpoints/best.ckpt"), Path("checkpoints/last.ckpt")):
        if unnamed.is_file():
            return unnamed
    runs = [
        p
        for p in sorted(Path("checkpoints").glob("*/best.ckpt"))
        if not p.parent.name.startswith("old-")
    ]
    if not runs:
        raise UserError(f"there is no checkpoint yet in {unnamed.parent}; {known_checkpoints()}")
    losses = {path: read_checkpoint(path)["kit"]["val_loss"] for path in runs}
    return min(runs, key=lambda path: math.inf if losses[path] is None else losses[path])


# ---- the command -----------------------------------------------------------------------------------------------------


def write_quantized(source: Path, target: Path, dtype: str) -> Transformer:
    """The checkpoint `source` with quantised weights, for `load_checkpoint`; optimizer state is left out."""
    model, state = quantize(load_checkpoint(source).model, dtype), read_checkpoint(source)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        {
            "state_dict": weights,
            "global_step": state["global_step"],
            "kit": state["kit"] | {"quantized": dtype},
        },
        target,
    )
    return model
