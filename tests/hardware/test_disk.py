"""Folders that cannot be written to, and disks that are too small, are found before step 1."""

import errno
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import pytest

import train
from pocketlm.errors import UserError
from pocketlm.hardware import disk
from pocketlm.hardware.disk import require_room, require_writable

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
def test_a_folder_that_cannot_be_written_to_is_named_with_the_reason(tmp_path, monkeypatch, call):
    """A full disk accepts the name of a file, and fails when its content is written."""

    fsync = os.fsync

    def fail(*arguments: object, **__: object) -> None:
        if call == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
            return fsync(arguments[0])  # it is the file's content that finds no room
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path if call == "mkdir" else os, call, fail)
    with pytest.raises(UserError, match=f"cannot write logs to {tmp_path}/logs: Read-only file"):
        require_writable(tmp_path / "logs", "logs")
    monkeypatch.undo()
    assert not list(tmp_path.glob("logs/.*"))


def test_the_owner_of_a_foreign_folder_is_named(tmp_path, monkeypatch):
    owner = disk.user_name(os.getuid())
    monkeypatch.setattr(os, "getuid", lambda: 999_999)
    text = disk.foreign_owner(tmp_path / "checkpoints")
    assert text == f" ({tmp_path} belongs to {owner}, and you are user 999999)"


def test_a_disk_without_room_for_all_files_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 25_000_000))
    require_room(tmp_path, [5_000_000] * 5, "checkpoints")
    expected = f"checkpoints need 30 MB in {tmp_path}, where 25 MB are free"
    with pytest.raises(UserError, match=expected):
        require_room(tmp_path, [5_000_000] * 6, "checkpoints")


def test_the_files_of_the_run_itself_are_room_and_links_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 0))
    (tmp_path / "step-1.ckpt").write_bytes(bytes(1000))
    os.link(tmp_path / "step-1.ckpt", tmp_path / "last.ckpt")
    require_room(tmp_path, [1000], "checkpoints")
    with pytest.raises(UserError, match="beside 0.00 MB of this run"):
        require_room(tmp_path, [1000, 1000], "checkpoints")


def test_a_limit_of_the_size_of_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "file_size_limit", lambda: 1_000_000)
    require_room(tmp_path, [1_000_000], "checkpoints")
    with pytest.raises(UserError, match="has 2.00 MB, .* at most 1.00 MB; raise the limit: ulimit"):
        require_room(tmp_path, [2_000_000], "checkpoints")


def test_a_run_without_room_is_refused_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("one line\n" * 200)
    Path("config.yaml").write_text("model: {d_model: 16, n_layers: 1, n_heads: 2}\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 1000))
    monkeypatch.setattr(train, "fit", None)
    command = ["--config", "config.yaml", "data.path=text.txt", "data.tokenizer=byte"]
    sizes = ["training.max_steps=3", "training.seq_len=16", "hardware.accelerator=cpu"]
    with pytest.raises(
        UserError, match="the checkpoints of this run need .* MB in .*, where 0.00 MB"
    ):
        train.main([*command, *sizes])
