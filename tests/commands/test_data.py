"""The command data.py: its report, its exports, and its errors."""

import json
from pathlib import Path

import numpy as np
import pytest

import data
from pocketlm.data.report import build_report
from pocketlm.errors import UserError
from tests.support.corpora import LINES, LINES_CONFIG, TRAIN, VAL, prepare_config

COMMAND = ("--config", "config.yaml")


@pytest.fixture(autouse=True)
def lines_folder(tmp_path, monkeypatch) -> Path:
    """Return a working directory with a small config, and a text of 100 documents."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("training: {seq_len: 16, micro_batch_size: 4}\n")
    (tmp_path / "lines.txt").write_text("".join(f"{line}\n" for line in LINES))
    return tmp_path


def test_the_root_file_offers_both_datasets():
    assert data.PackedLMDataset.__name__ == "PackedLMDataset"
    assert data.StreamingPackedLMDataset.__name__ == "StreamingPackedLMDataset"


def test_the_command_prints_the_report_and_as_json_the_same_numbers(capsys, forked_commands):
    done = forked_commands.run(*COMMAND, *LINES_CONFIG, "--json", program="data.py")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads(json.dumps(build_report(*prepare_config(*LINES_CONFIG)).as_json()))
    assert data.main(["--config", "config.yaml", *LINES_CONFIG]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    train, val = report["train"], report["validation"]
    for name in ("documents", "bytes", "tokens"):
        assert f"{name} {train[name]:,} {val[name]:,}" in lines
    assert f"duplicate documents {train['duplicates']} {val['duplicates']}" in lines
    assert "documents in both train and validation: 0" in lines
    assert lines[0] == "lines.txt"
    assert not Path("checkpoints").exists()
    assert not Path("logs").exists()


def test_parts_say_what_is_left_and_the_report_of_joined_parts_is_that_of_one_process(capsys):
    expected = json.loads(json.dumps(build_report(*prepare_config(*LINES_CONFIG)).as_json()))
    parts = [*COMMAND, *LINES_CONFIG, "data.cache_dir=parts"]
    assert data.main([*parts, "--part", "2/2"]) == 0
    assert "not prepared yet: 1/2" in capsys.readouterr().out
    with pytest.raises(UserError, match="run python data.py --part 1/2 with the same config"):
        data.main(parts)
    assert data.main([*parts, "--part", "1/2", "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)
    assert (part["source"], part["missing"], part["complete"]) == ("lines.txt", [], False)
    assert data.main([*parts, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert data.main([*parts, "--part", "1/2"]) == 0
    assert "all of it is prepared" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["0/4", "5/4", "3", "1/0", "-1/4", "1/99999", "a/b", "1/4/2", ""])
def test_a_part_that_cannot_be_is_one_sentence(part):
    with pytest.raises(UserError, match="--part .*: name one of up to 10,000 parts, from 1"):
        data.main([*COMMAND, *LINES_CONFIG, f"--part={part}"])


def test_a_part_is_not_exported():
    with pytest.raises(UserError, match="leave --part out once all are prepared"):
        data.main([*COMMAND, *LINES_CONFIG, "--part", "1/2", "--export", "nanogpt"])


@pytest.mark.parametrize("program", ["nanogpt", "llmc"])
def test_an_export_holds_the_tokens_of_both_splits(program, capsys):
    arguments = [*LINES_CONFIG, "--export", program, "--to", "out/here"]
    assert data.main(["--config", "config.yaml", *arguments]) == 0
    assert "documents in both" in capsys.readouterr().out
    for name, documents in (("train", TRAIN), ("val", VAL)):
        tokens = [256, *(i for document in documents for i in [*document.encode(), 256])]
        header = np.array([20240520, 1, len(tokens)] + [0] * 253, "<i4").tobytes()
        expected = np.array(tokens, "<u2").tobytes()
        if program == "llmc":
            expected = header + expected
        assert Path(f"out/here/{name}.bin").read_bytes() == expected
    assert sorted(path.name for path in Path("out/here").iterdir()) == ["train.bin", "val.bin"]


@pytest.mark.parametrize("arguments, message", [
    (["data.path=missing.txt"], "error: missing.txt is not a file, a folder or a pattern that"),
    ([*LINES_CONFIG, "--export", "llmc", "--to", "lines.txt"], "error: lines.txt"),
    ([*LINES_CONFIG, "data.streaming=true", "--export", "llmc"],
     "error: a stream keeps no tokens to export; set data.streaming to false"),
    (["data.mixture=[{path: lines.txt}]", "--export", "llmc"],
     "error: a mixture is drawn row by row while training; export its sources"),
])  # fmt: skip
def test_a_mistake_is_one_sentence_and_status_2(tmp_path, forked_commands, arguments, message):
    done = forked_commands.run(*COMMAND, *arguments, program="data.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("*.bin"))
