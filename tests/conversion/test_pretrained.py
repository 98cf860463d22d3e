"""The convert command: its result in other commands, and mistakes in its arguments."""

from pathlib import Path

import pytest

import evaluate_checkpoints
import infer
from tests.support.pretrained import converted, gpt2, refusal, save


def test_infer_and_evaluate_take_a_converted_model(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    converted(save(gpt2(), tmp_path / "gpt2"))
    file = str(tmp_path / "new" / "model.ckpt")
    assert (
        infer.main(
            ["--ckpt", file, "--prompt", "The fox", "--temperature", "0", "--max-new-tokens", "60"]
        )
        == 0
    )
    (tmp_path / "cases.yaml").write_text("- {name: fox, prompt: The quick, target: ' brown fox'}\n")
    assert (
        evaluate_checkpoints.main(
            ["--checkpoints", file, "--cases", str(tmp_path / "cases.yaml"), "--csv"]
        )
        == 0
    )
    assert ",0,0,fox," in capsys.readouterr().out


def test_a_path_that_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty.gguf").touch()
    assert "has no config.json; give the folder" in refusal(capsys, tmp_path / "empty")
    assert "is not a GGUF file, and no checkpoint of nanoGPT or of the starter; give one" in (
        refusal(capsys, tmp_path / "notes.txt")
    )
    assert "is not a GGUF file" in refusal(capsys, tmp_path / "empty.gguf")
    assert refusal(capsys, tmp_path / "nowhere").endswith(
        "give a Hugging Face folder, a GGUF file, or a name: smollm2-135m"
    )


def test_a_target_that_exists_or_has_an_unknown_format_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "old.ckpt").write_text("precious")
    assert "old.ckpt exists already" in refusal(
        capsys, "smollm2-135m", "ckpt", str(tmp_path / "old.ckpt")
    )
    assert (
        refusal(capsys, "smollm2-135m", "xml", str(tmp_path / "new/x.xml"))
        == "--to xml is not a format; the formats are: ckpt, hf, gguf, onnx, safetensors"
    )
