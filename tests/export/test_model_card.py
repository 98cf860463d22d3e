"""The model card of an exported folder."""

from dataclasses import replace
from pathlib import Path

from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.export.model_card import model_card, without_folders
from tests.support.exports import a_checkpoint, changed_checkpoint


def test_the_card_has_data_recipe_and_loss_beside_the_uniform_guess(tmp_path: Path) -> None:
    path = changed_checkpoint(a_checkpoint(tmp_path), tokens=1_234, val_loss=2.5)
    card = model_card(load_checkpoint(path), "LlamaForCausalLM", "my-model")
    assert "1,234 tokens of training" in card
    assert "| **this model** | 2.500 | 12.2 |" in card  # e^2.5
    assert "| uniform | 5.549 | 257.0 |" in card  # of 257 tokens
    assert "AutoModelForCausalLM.from_pretrained('my-model')" in card


def test_the_card_says_that_the_weights_are_an_average(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(changed_checkpoint(a_checkpoint(tmp_path), tokens=1))
    assert "moving average" not in model_card(checkpoint, "LlamaForCausalLM", "my-model")
    training = replace(checkpoint.config.training, ema_decay=0.99)
    checkpoint.config = replace(checkpoint.config, training=training)
    card = model_card(checkpoint, "LlamaForCausalLM", "my-model")
    assert "The weights are their moving average (`ema_decay` 0.99), which was validated." in card


def test_the_card_has_no_folders_of_the_computer_that_trained_the_model(tmp_path: Path) -> None:
    path = changed_checkpoint(a_checkpoint(tmp_path), tokens=1, val_loss=2.5)
    checkpoint = load_checkpoint(path)
    data = replace(checkpoint.config.data, path="/home/me/private/text.jsonl", val_path="~/v.txt")
    checkpoint.config = replace(checkpoint.config, data=data)
    checkpoint.tokenizer.name = str(tmp_path / "model.gguf")
    checkpoint.tokenizer.note = "the vocabulary of /home/me/model lacks the bos_token"
    card = model_card(checkpoint, "LlamaForCausalLM", "my-model")
    assert "/home" not in card and "~" not in card and str(tmp_path) not in card
    assert "- `text.jsonl`" in card and "path: text.jsonl" in card and "val_path: v.txt" in card
    assert "(`model.gguf`)" in card and "- the vocabulary of model lacks the bos_token" in card


def test_what_is_no_absolute_path_is_kept() -> None:
    values = {"a": ["data/x.txt", "/y/*.txt", 3, None], "b": {"c": "OWNER/NAME"}}
    expected = {"a": ["data/x.txt", "*.txt", 3, None], "b": {"c": "OWNER/NAME"}}
    assert without_folders(values) == expected
