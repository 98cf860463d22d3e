"""A preparation that was killed or interrupted resumes, and ends in the same bytes."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketlm.config.sections import DataConfig
from pocketlm.data.prepare import prepare
from pocketlm.shards.builder import BuildSettings
from pocketlm.shards.format import ShardWriter
from tests.support.preparation import (
    CountingEncoder,
    byte_config,
    expected_content,
    only_shard,
    shard_content,
    shard_folders,
    write_jsonl,
    write_text,
)

ROOT = Path(__file__).parents[2]

# ---- in processes of their own ----


@pytest.fixture
def run_in_forks(tmp_path, monkeypatch, forked_commands) -> Callable[..., tuple[dict, str]]:
    """Run tests/programs/prepare_in_forks.py; return its results, and its stderr."""
    monkeypatch.chdir(tmp_path)

    def run_in_forks(scenario: str, keys: dict[str, object]) -> tuple[dict, str]:
        arguments = [scenario, json.dumps(keys), str(tmp_path)]
        done = forked_commands.run(*arguments, program="tests/programs/prepare_in_forks.py")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run_in_forks


def killed_documents(folder: Path, wiki: list[str]) -> dict[str, object]:
    path = write_jsonl(folder / "x.jsonl", wiki[:2000])
    return {"path": path, "tokenizer": "byte", "val_share": 0.3}


def killed_single_document(folder: Path, wiki: list[str]) -> dict[str, object]:
    path = write_text(folder / "x.txt", "\n".join(wiki[:700]))
    return {"path": path, "tokenizer": "byte", "val_share": 0.3, "bos": True}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is POSIX")
@pytest.mark.parametrize("make_keys", [killed_documents, killed_single_document])
def test_a_killed_preparation_resumes_and_ends_in_the_same_bytes(
    tmp_path, wiki, make_keys, run_in_forks
):
    """Each preparation is a process of its own, so that only the disk remembers."""
    results, _ = run_in_forks("kill", make_keys(tmp_path, wiki))
    undisturbed, complete = results.pop("undisturbed"), results.pop("nothing")
    assert undisturbed["calls"] >= 20
    assert set(undisturbed["files"]) == {"train.bin", "val.bin", "account.json"}
    assert (complete["status"], complete["calls"]) == (0, 0)
    assert len(results) == 10
    for name, result in results.items():
        assert result["status"] == -9, name
        assert result["files"] == undisturbed["files"], name
        assert result["folders"] == undisturbed["folders"], name
        assert result["calls"] == undisturbed["calls"] - result["batches"], name
    assert results["a written journal"]["batches"] == 12
    assert results["closing val"]["batches"] == undisturbed["calls"]
    assert results["the journal is gone"]["batches"] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is POSIX")
@pytest.mark.parametrize("make_keys", [killed_documents, killed_single_document])
def test_parts_prepared_side_by_side_of_which_one_is_killed_join_to_the_same_shards(
    tmp_path, wiki, make_keys, run_in_forks
):
    """The first part is prepared by two processes at once, of which one waits for the other."""
    results, _ = run_in_forks("parts", make_keys(tmp_path, wiki))
    parts, undisturbed = results["parts"], results["undisturbed"]
    assert parts["statuses"] == [0, -9, 0, 0, 0]
    assert parts["batches"] > 0
    assert 0 < parts["calls"][1] < undisturbed["calls"] / 3 - parts["batches"] + 2
    assert parts["sha256"] == results["sha256"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the limit on a file's size is POSIX")
def test_a_full_disk_is_one_sentence_and_the_same_command_resumes_later(
    tmp_path, wiki, run_in_forks
):
    path = write_jsonl(tmp_path / "x.jsonl", wiki[:1000])
    results, stderr = run_in_forks("full", {"path": path, "tokenizer": "byte"})
    undisturbed, full = results["undisturbed"], results["full"]
    assert full["status"] == 2
    (line,) = stderr.splitlines()
    shards = tmp_path / "full" / "shards"
    assert line.startswith(f"error: cannot write token shards to {shards}: File too large, with ")
    assert line.endswith(
        " MB free; make room, or set data.cache_dir, and run the same command again"
    )
    assert full["files"] == undisturbed["files"]
    assert 0 < full["calls"] < undisturbed["calls"]


def test_of_two_that_prepare_the_same_at_once_one_waits_and_both_succeed(tmp_path, wiki):
    path = write_jsonl(tmp_path / "x.jsonl", wiki[:200])
    keys = {"path": path, "tokenizer": "byte", "cache_dir": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tests.programs.prepare_once", json.dumps(keys)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([*command, "--wait"], stdin=subprocess.PIPE, **pipes) as first:
        assert first.stdout.readline() == "tokenising\n"
        with subprocess.Popen(command, **pipes) as second:
            message = "another process is preparing the same data; waiting for it\n"
            assert second.stderr.readline() == message
            made, _ = first.communicate("continue\n", timeout=60)
            found, more_messages = second.communicate(timeout=60)
    assert (first.returncode, second.returncode, more_messages) == (0, 0, "")
    made, found = json.loads(made), json.loads(found)
    assert made["calls"] > 0
    assert found == {"calls": 0, "key": made["key"]}


# ---- in this process ----

DOCUMENTS = [f"document {i} " * 3 for i in range(40)]
WHOLE = expected_content(DOCUMENTS, str.encode, None, 256)


@dataclasses.dataclass(frozen=True)
class Interrupted:
    """A preparation that was interrupted after 5 of 40 batches, of which the journal has 4."""

    config: DataConfig
    settings: BuildSettings
    encoder: CountingEncoder  # of `settings`; it counts from the interruption on
    folder: Path

    @property
    def journal(self) -> Path:
        return self.folder / "journal.json"


@pytest.fixture
def interrupted(tmp_path, small: Callable, monkeypatch) -> Interrupted:
    settings = dataclasses.replace(small(2**20, 30), journal_seconds=-1)
    path = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    config = byte_config(tmp_path, path=path, val_path=write_text(tmp_path / "val.txt", "x"))
    write, writes = ShardWriter.write, []

    def interrupt(self: ShardWriter, *arguments: object) -> None:
        write(self, *arguments)
        writes.append(1)
        if len(writes) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, settings)
    (folder,) = shard_folders(tmp_path / "cache")
    assert folder.name.startswith("unfinished-")
    encoder = CountingEncoder()
    return Interrupted(config, dataclasses.replace(settings, encode=encoder), encoder, folder)


def test_an_interrupted_preparation_resumes(interrupted):
    assert json.loads(interrupted.journal.read_text())["batches"] == 4
    data = prepare(interrupted.config, interrupted.settings)
    assert interrupted.encoder.calls == 40 - 4 + 1  # and one of the validation text
    assert shard_content(only_shard(data.train)) == WHOLE
    assert not interrupted.folder.exists()


def test_the_journal_has_the_format_that_every_version_resumes_from(interrupted):
    state = {"tokens": 4 * len(DOCUMENTS[0]) + 4, "documents": 4, "bytes": 4 * len(DOCUMENTS[0])}
    expected = {"batches": 4, "size": 30, "parts": {"train": state}}
    assert json.loads(interrupted.journal.read_text()) == expected


@pytest.mark.parametrize("journal", [
    None, "", "{", "[]", "{}", "null", '{"batches": 4, "size": 30}',
    '{"batches": 4, "size": 30, "parts": {"train": {}}}',
    '{"batches": 4, "size": 31, "parts": {"train": {"tokens": 0, "documents": 0, "bytes": 0}}}',
    '{"batches": 4, "size": 30, "parts": {"train": {"tokens": 9999, "documents": 4, "bytes": 0}}}',
    '{"batches": 4, "size": 30, "parts": {"train": {"tokens": 0, "documents": 9999, "bytes": 0}}}',
])  # fmt: skip
def test_without_a_journal_that_fits_a_preparation_starts_again(interrupted, journal):
    interrupted.journal.unlink()
    if journal is not None:
        interrupted.journal.write_text(journal)
    data = prepare(interrupted.config, interrupted.settings)
    assert shard_content(only_shard(data.train)) == WHOLE
    assert interrupted.encoder.calls == 40 + 1


@pytest.mark.parametrize("file", ["train.bin", "train.offsets"])
@pytest.mark.parametrize("damage", ["gone", "shorter"])
def test_without_the_files_of_the_journal_a_preparation_starts_again(interrupted, file, damage):
    path = interrupted.folder / file
    raw = path.read_bytes()
    path.unlink()
    if damage == "shorter":
        path.write_bytes(raw[: len(raw) // 2])
    data = prepare(interrupted.config, interrupted.settings)
    assert shard_content(only_shard(data.train)) == WHOLE
    assert interrupted.encoder.calls == 40 + 1
