"""The lock of a run: who holds it, and what happens to it when folders are moved."""

import os
import shutil
from pathlib import Path

import pytest

from pocketlm.checkpoint.runs import Run
from pocketlm.errors import UserError


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def assert_refused(name: str) -> None:
    expected = f"process {os.getpid()} on .* is training"
    with pytest.raises(UserError, match=expected), Run(name).lock():
        pass


@pytest.mark.parametrize("name", ["", "named"])
def test_a_second_run_is_refused_with_the_first_ones_process(name):
    with Run(name).lock():
        assert_refused(name)
    with Run(name).lock():  # the files of an ended run hold nobody up
        pass


def test_removing_the_folder_under_a_run_does_not_let_another_one_in():
    """The lock was in the folder: two runs then wrote into one."""
    with Run("").lock():
        shutil.rmtree("checkpoints")
        assert_refused("")


def test_renaming_the_folder_under_a_run_does_not_let_another_one_in():
    with Run("").lock():
        Path("checkpoints").rename("other")
        assert_refused("")


def test_a_folder_with_two_paths_has_one_lock(tmp_path, monkeypatch):
    with Run("").lock():
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere/checkpoints").symlink_to(tmp_path / "checkpoints")
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert_refused("")


def test_runs_of_other_names_do_not_wait_for_each_other():
    with Run("").lock(), Run("a").lock(), Run("b").lock():
        for name in ("", "a", "b"):  # each is held, and by itself
            assert_refused(name)


@pytest.mark.parametrize("folder", ["checkpoints", "logs"])
def test_a_folder_that_cannot_be_written_to_is_refused_with_the_lock(folder):
    Path(folder).write_text("a file")
    with pytest.raises(UserError, match=f"cannot write {folder} to"), Run("").lock():
        pass


def test_what_a_killed_save_left_is_removed():
    Path("checkpoints").mkdir()
    leftover = Path("checkpoints/.last.ckpt.7.unfinished")
    leftover.touch()
    with Run("").lock():
        assert not leftover.exists()
