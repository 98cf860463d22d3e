"""Loading a checkpoint for inference: the model, its tokenizer and its config.

    checkpoint = load_checkpoint(best_checkpoint())
    logits = checkpoint.model(ids)

pocketlm/checkpoint/format.py describes the files.
"""

import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from model import ModelConfig, Transformer
from pocketlm.checkpoint.format import (
    WEIGHT_PREFIX,
    DamagedCheckpoint,
    hash_weights,
    known_checkpoints,
    read_checkpoint,
    save_weights,
)
from pocketlm.checkpoint.validation import sizes_problem, tokenizer_problem
from pocketlm.config.loading import config_from_dict
from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.model.initialization import SkipInitialization
from pocketlm.model.quantization import quantize
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import GPT2_SIZE
from pocketlm.tokenizer.build import build_tokenizer, from_state, is_trained


@dataclass
class Checkpoint:
    """A trained model with its tokenizer, its config and the counters of its training."""

    path: Path
    model: Transformer  # in evaluation mode
    tokenizer: Tokenizer
    config: Config
    step: int  # optimizer steps
    tokens: int  # targets trained on
    val_loss: float | None  # nats per token at the last validation; None before the first
    quantized: str | None = None  # int8 or int4 if the weights are quantised
    chat_template: str | None = None  # Jinja template of a model that was trained to chat

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 that identifies the weights."""
        return hash_weights(self.model.state_dict())

    def free_weights(self) -> None:
        """Free the memory of the weights; of the model, sizes and config remain."""
        self.model.to("meta")


def load_checkpoint(
    path: str | Path, tokenizer_name: str | None = None, *, mapped: bool = False
) -> Checkpoint:
    """Load a checkpoint: the model is on the CPU, in float32 or quantised, in evaluation mode.

    mapped: the weights are the file's, which must not change; they take no memory of their own.
    Raises UserError if it cannot be read, or if `tokenizer_name` is not the tokenizer that the
    model was trained with.
    """
    state = read_checkpoint(path)
    metadata = state["kit"]
    config = config_from_dict(metadata["config"], origin=str(path))
    tokenizer = load_tokenizer(metadata["tokenizer"], config.model, path)
    if tokenizer_name is not None:
        check_tokenizer(tokenizer, tokenizer_name, config.data.cache_dir, path)
    quantized = metadata.get("quantized")
    return Checkpoint(
        Path(path),
        load_model(config.model, quantized, state["state_dict"], path, assign=mapped),
        tokenizer,
        config,
        state["global_step"],
        metadata["tokens"],
        metadata["val_loss"],
        quantized,
        metadata.get("chat_template"),
    )


def load_tokenizer(state: dict[str, Any], config: ModelConfig, path: str | Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint. Raises UserError if its state is none.

    Its ids must be the model's: the tables of a vocabulary of billions would fill the memory.
    """
    if not (problem := tokenizer_problem(state)):
        try:
            tokenizer = from_state(state)
        except UserError:
            raise
        except Exception as error:  # the tokenizers library raises the bare class
            problem = f"its tokenizer cannot be built: {error or type(error).__name__}"
        else:
            if tokenizer.vocab_size <= (config.vocab_size or 0):
                return tokenizer
            problem = f"its tokenizer has {tokenizer.vocab_size} ids, its model {config.vocab_size}"
    raise DamagedCheckpoint(f"the checkpoint {path} is damaged: {problem}")


def load_model(
    config: ModelConfig,
    quantized: str | None,
    weights: dict[str, Tensor],
    path: str | Path,
    *,
    assign: bool = False,
) -> Transformer:
    """Return the model with these weights, or, with `assign`, of these tensors themselves.

    Raises UserError if they do not fit the config.
    """
    if problem := sizes_problem(config, weights):
        raise DamagedCheckpoint(f"the weights of {path} do not fit its config: {problem}")
    with SkipInitialization():
        model = Transformer(config)
    if quantized:
        model = quantize(model, quantized)
    try:
        named = {k.removeprefix(WEIGHT_PREFIX): v for k, v in weights.items()}
        model.load_state_dict(named, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the weights of {path} do not fit its config: {reason}") from None
    return model.eval()


def check_tokenizer(tokenizer: Tokenizer, name: str, cache_dir: str, path: str | Path) -> None:
    """Raise UserError if the tokenizer called `name` is not the checkpoint's own.

    `gpt2` also stands for a trimmed one, `gpt2:SIZE`, and a line on stderr then says which it is.
    """
    if name == "gpt2" and tokenizer.name.startswith("gpt2:"):
        print(
            f"{path}: the tokenizer is {tokenizer.name}, "
            f"GPT-2's vocabulary trimmed to {tokenizer.vocab_size:,} of {GPT2_SIZE:,} tokens",
            file=sys.stderr,
        )
        return
    # gpt2 need not be fetched; a trained one cannot be made again without its corpus
    if name == tokenizer.name and (name == "gpt2" or is_trained(name)):
        return
    if is_trained(name) or build_tokenizer(name, cache_dir).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{path} was trained with the tokenizer {tokenizer.name!r}, not {name!r}; "
            "leave --tokenizer out"
        )


def best_checkpoint() -> Path:
    """Return the checkpoint that a command uses if none is given.

    It is checkpoints/best.ckpt, or last.ckpt if that run has no validation yet, or else the best of
    the named runs by validation loss. Raises UserError if there is none.
    """
    folder = Path("checkpoints")
    for unnamed in (folder / "best.ckpt", folder / "last.ckpt"):
        if unnamed.is_file():
            return unnamed
    named = sorted(folder.glob("*/best.ckpt"))
    current = [path for path in named if not path.parent.name.startswith("old-")]
    if not current:
        raise UserError(f"there is no checkpoint yet in {folder}; {known_checkpoints()}")
    losses = {
        path: read_checkpoint(path, metadata_only=True)["kit"]["val_loss"] for path in current
    }
    return min(current, key=lambda path: math.inf if losses[path] is None else losses[path])


def write_quantized(source: Path, target: Path, dtype: str) -> Transformer:
    """Write the checkpoint `source` with quantised weights to `target`; return the quantised model.

    The state of the training run is left out.
    """
    model = quantize(load_checkpoint(source).model, dtype)
    state = read_checkpoint(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    metadata = state["kit"] | {"quantized": dtype}
    save_weights(model.state_dict(), state["global_step"], metadata, target)
    return model
