"""The model that a run begins with, if `training.init_from` names a checkpoint.

Its sizes, weights and tokenizer are the checkpoint's. Data, optimizer and schedule are those of the
new run.
"""

import zipfile
from dataclasses import replace
from pathlib import Path

import torch.nn as nn

from pocketlm.checkpoint.format import is_safetensors, read_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint, load_tokenizer
from pocketlm.config.loading import config_from_dict
from pocketlm.config.sections import Config, DataConfig
from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer

# fields of a model that the new run chooses: they change no weight
CHOSEN = ("dropout", "gradient_checkpointing")


def with_initial_model(config: Config) -> Config:
    """Return the config with the sizes and the tokenizer of `training.init_from`, if it is set.

    Raises UserError if it is quantised, or if its context is shorter than the rows.
    """
    path = config.training.init_from
    if path is None:
        return config
    metadata = read_checkpoint(path, metadata_only=True)["kit"]
    if metadata.get("quantized"):
        raise UserError(
            f"training.init_from: {path} is {metadata['quantized']}; name the checkpoint it was "
            "made from"
        )
    model = config_from_dict(metadata["config"], origin=path).model
    if (model.max_seq_len or 0) < config.training.seq_len:
        raise UserError(
            f"training.seq_len is {config.training.seq_len}, and the model of {path} has a context "
            f"of {model.max_seq_len} tokens; set training.seq_len to that, or less"
        )
    model = replace(model, **{name: getattr(config.model, name) for name in CHOSEN})
    return replace(config, model=model, data=replace(config.data, tokenizer=path))


def load_initial_weights(model: nn.Module, path: str) -> None:
    """Load the weights of a checkpoint into the model of its sizes. Raises UserError."""
    model.load_state_dict(load_checkpoint(path, mapped=True).model.state_dict())


def is_checkpoint(name: str) -> bool:
    """Return whether `name` is a file that begins as a checkpoint does."""
    path = Path(name)
    return path.is_file() and (zipfile.is_zipfile(path) or is_safetensors(path))


def checkpoint_tokenizer(data: DataConfig) -> Tokenizer:
    """Return the tokenizer of the checkpoint `data.tokenizer`. Raises UserError."""
    path = data.tokenizer
    if data.bos is not None or data.eos is not None:
        raise UserError(
            f"the tokenizer of {path} has its own bos and eos; leave data.bos and data.eos null"
        )
    metadata = read_checkpoint(path, metadata_only=True)["kit"]
    model = config_from_dict(metadata["config"], origin=path).model
    return load_tokenizer(metadata["tokenizer"], model, path)
