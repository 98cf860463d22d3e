"""Second names of files: replaced atomically, by hard links or by copies."""

import errno
import os
from pathlib import Path

import pytest

from pocketlm.errors import UserError
from pocketlm.files import link_or_copy


@pytest.fixture(params=[True, False], ids=["hard links", "copies"])
def links(request, tmp_path, monkeypatch) -> bool:
    """Return whether the file system has hard links; the new file is a, the old one is b."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not request.param:
        monkeypatch.setattr(os, "link", refuse)
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(b"new")
    Path("b").write_bytes(b"old")
    return request.param


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_a_second_name_replaces_the_old_file(links):
    link_or_copy(Path("a"), Path("b"))
    assert (Path("a").read_bytes(), Path("b").read_bytes()) == (b"new", b"new")
    assert os.path.samefile("a", "b") == links
    Path("a").unlink()
    assert Path("b").read_bytes() == b"new"
    assert names() == ["b"]


def test_a_second_name_is_replaced_in_one_step(links, monkeypatch):
    """Until the rename the old file has the name; a rename that fails changes nothing."""

    def refuse(source, target):
        assert (Path(source).read_bytes(), Path(target).read_bytes()) == (b"new", b"old")
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError):
        link_or_copy(Path("a"), Path("b"))
    assert (Path("a").read_bytes(), Path("b").read_bytes()) == (b"new", b"old")
    assert names() == ["a", "b"]


def test_giving_the_same_second_name_again_leaves_nothing_behind(links):
    """Renaming a file onto another name of itself does nothing and leaves both (POSIX rename)."""
    for _ in range(2):
        link_or_copy(Path("a"), Path("b"))
    assert names() == ["a", "b"]
