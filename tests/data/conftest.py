"""Fixtures of the tests of data."""

from pathlib import Path

import pytest

from tests.support.corpora import LINES
from tests.support.preparation import DATA, small, wiki

__all__ = ["small", "wiki"]


@pytest.fixture
def wheels_only(tmp_path) -> None:
    """Make the wheels of the real data folder available in the cache of the test."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "wheels").symlink_to(DATA / "wheels")


@pytest.fixture
def lines_folder(tmp_path, monkeypatch) -> Path:
    """Return a working directory with a small config, and a text of 100 documents."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("training: {seq_len: 16, micro_batch_size: 4}\n")
    (tmp_path / "lines.txt").write_text("".join(f"{line}\n" for line in LINES))
    return tmp_path
