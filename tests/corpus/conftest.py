"""Fixtures of the tests of corpora."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder that the examples of a property write into, again and again."""
    return tmp_path_factory.mktemp("sources")
