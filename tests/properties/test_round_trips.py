"""A model that leaves and comes back is the same model, in evaluation and in further training."""

import json
from pathlib import Path

import pytest

import convert
import evaluate_checkpoints
from pocketlm.checkpoint.loading import load_checkpoint
from tests.support.exports import (
    GPT2,
    a_checkpoint,
    exported,
    quick_check,  # noqa: F401  a fixture
)
from tests.support.training import read_rows, run, write_text_and_config

CASES = """
- {name: fox, prompt: The quick, target: ' brown fox'}
- {name: sum, prompt: '2 + 2 =', target: ' 4'}
"""
pytestmark = pytest.mark.usefixtures("quick_check")


def there_and_back(checkpoint: Path, output_format: str, folder: Path) -> Path:
    """Convert to a format and back; return the new checkpoint."""
    output = exported(checkpoint, output_format, folder / f"{output_format}.{output_format}")
    again = folder / f"{output_format}.ckpt"
    assert convert.main([str(output), "--to", "ckpt", str(again)]) == 0
    return again


def evaluated(checkpoint: Path, cases: Path, capsys: pytest.CaptureFixture) -> dict[str, object]:
    """Return the JSON of the evaluation, without what names the file and its run."""
    capsys.readouterr()
    arguments = ["--checkpoints", str(checkpoint), "--cases", str(cases), "--json"]
    assert evaluate_checkpoints.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    for entry in result["checkpoints"]:
        # the state of the run does not travel, and bytes come back as a tokenizer.json
        for key in ("names", "step", "tokens", "val_loss", "tokenizer_sha256"):
            del entry[key]
    return result


@pytest.mark.parametrize("output_format", ["hf", "gguf"])
@pytest.mark.parametrize("sizes", [{}, GPT2], ids=["llama", "gpt2"])
def test_weights_and_evaluation_are_the_same_after_the_way_there_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture, output_format: str, sizes: dict
) -> None:
    (tmp_path / "cases.yaml").write_text(CASES)
    first = a_checkpoint(tmp_path, **sizes)
    again = there_and_back(first, output_format, tmp_path)
    assert load_checkpoint(again).weights_sha256 == load_checkpoint(first).weights_sha256
    results = [evaluated(each, tmp_path / "cases.yaml", capsys) for each in (first, again)]
    assert results[0] == results[1]


def losses_of_a_run(start: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Train further on a new text; return the losses of steps and of validations as written."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_text_and_config(folder)
    steps = ("training.max_steps=6", "training.val_every_steps=3", "training.optimizer=adamw")
    run(f"training.init_from={start}", *steps)
    return [[row[name] for row in read_rows() if row[name]] for name in ("train/loss", "val/loss")]


def test_a_model_that_came_back_is_trained_further_on_a_new_text_as_the_first_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = a_checkpoint(tmp_path, n_layers=3, d_model=24)
    expected = losses_of_a_run(first, tmp_path / "first", monkeypatch)
    validations = [float(loss) for loss in expected[1]]
    assert len(expected[0]) > 1 and validations[0] > validations[-1]
    again = {name: there_and_back(first, name, tmp_path) for name in ("hf", "gguf")}
    again["safetensors"] = exported(first, "safetensors", tmp_path / "model.safetensors")
    for name, start in again.items():
        assert losses_of_a_run(start, tmp_path / f"run of {name}", monkeypatch) == expected
        trained = load_checkpoint("checkpoints/final.ckpt")
        assert trained.config.model.n_layers == 3  # the file's, where TINY says 2
        assert trained.tokenizer.fingerprint == load_checkpoint(start).tokenizer.fingerprint
