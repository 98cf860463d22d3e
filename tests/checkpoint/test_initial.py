"""Runs that begin with the model and the tokenizer of a checkpoint."""

from pathlib import Path

import pytest
import torch

from model import ModelConfig, Transformer
from pocketlm.checkpoint.initial import (
    checkpoint_tokenizer,
    is_checkpoint,
    load_initial_weights,
    with_initial_model,
)
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.sections import Config, DataConfig, TrainingConfig
from pocketlm.errors import UserError
from tests.support.checkpoints import write_checkpoint


def config(path: Path, **training: object) -> Config:
    section = TrainingConfig(init_from=str(path), **{"seq_len": 32} | training)
    return Config(model=ModelConfig(d_model=64, dropout=0.1), training=section)


def test_the_sizes_weights_and_tokenizer_are_the_checkpoints(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "first.ckpt", n_layers=3, max_seq_len=48)
    first = load_checkpoint(path)
    begun = with_initial_model(config(path))
    assert begun.model.n_layers == 3 and begun.model.max_seq_len == 48
    assert begun.model.dropout == 0.1  # the new run's
    assert checkpoint_tokenizer(begun.data).fingerprint == first.tokenizer.fingerprint
    model = Transformer(begun.model)
    load_initial_weights(model, str(path))
    for name, weight in first.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    with torch.no_grad():  # training changes the model and not the file
        model.norm.weight += 1
    assert load_checkpoint(path).weights_sha256 == first.weights_sha256


def test_without_the_key_nothing_changes() -> None:
    unchanged = Config()
    assert with_initial_model(unchanged) is unchanged


def test_what_cannot_be_continued_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "first.ckpt", max_seq_len=48)
    with pytest.raises(UserError, match="context of 48 tokens; set training.seq_len to that"):
        with_initial_model(config(path, seq_len=64))
    with pytest.raises(UserError, match="there is no checkpoint"):
        with_initial_model(config(tmp_path / "none.ckpt"))
    with pytest.raises(UserError, match="has its own bos and eos; leave data.bos and data.eos"):
        checkpoint_tokenizer(DataConfig(tokenizer=str(path), eos=False))


def test_only_files_of_checkpoints_are_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    assert is_checkpoint(str(write_checkpoint(tmp_path / "first.ckpt")))
    assert not is_checkpoint(str(tmp_path / "tokenizer.json"))
    assert not is_checkpoint(str(tmp_path)) and not is_checkpoint("gpt2")
