"""Working directories for tiny runs, and a run that many tests look at."""

import contextlib

import pytest
import torch

from tests.support.training import run, write_text_and_config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a text that one epoch of 7 steps reads, and a config."""
    monkeypatch.chdir(tmp_path)
    write_text_and_config(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished_folder(tmp_path_factory):
    """The working directory of a finished, uninterrupted run. Tests only read it."""
    path = tmp_path_factory.mktemp("finished")
    write_text_and_config(path)
    with contextlib.chdir(path):
        run("training.keep_checkpoints=2")
    return path


@pytest.fixture
def finished(finished_folder, monkeypatch):
    """The finished run's folder as the working directory."""
    monkeypatch.chdir(finished_folder)
    return finished_folder


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
