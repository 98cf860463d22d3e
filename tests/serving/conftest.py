"""Servers and a browser, started once for all tests of a process.

The browser's library is imported only by the fixtures that need it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pocketlm.tokenizer.bytes import ByteTokenizer
from tests.support.chat import CHATML, chat_tokenizer
from tests.support.server import KEY, RunningServer, serving, write_checkpoint

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a BPE tokenizer and a chat template, without an API key."""
    path = tmp_path_factory.mktemp("serve") / "small.ckpt"
    with serving(write_checkpoint(path, chat_tokenizer(), CHATML)) as server:
        yield server
        assert "Traceback" not in server.stop()


@pytest.fixture(scope="session")
def protected_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of bytes without a template, with an API key, two slots and a queue of two.

    The context is long, so that a text takes a while.
    """
    path = tmp_path_factory.mktemp("serve") / "protected.ckpt"
    write_checkpoint(path, ByteTokenizer(), context=4096)
    options = ["--rows", "2", "--queue", "2", "--deadline", "3"]
    with serving(path, *options, SERVE_API_KEY=KEY) as server:
        yield server
        assert "Traceback" not in server.stop()


@pytest.fixture(scope="session")
def hostile_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose texts would do harm as HTML."""
    from tests.support.page import write_hostile_checkpoint

    return write_hostile_checkpoint(tmp_path_factory.mktemp("page") / "hostile.ckpt")


@pytest.fixture(scope="session")
def page_server(hostile_checkpoint: Path) -> Iterator[RunningServer]:
    with serving(hostile_checkpoint, "--device", "cpu") as server:
        yield server


@pytest.fixture(scope="module")  # asyncio.run fails in this thread while the browser is open
def browser() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    from tests.support.page import CHROMIUM, FLAGS

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: "Browser", page_server: RunningServer) -> Iterator["Page"]:
    """The page, ready to generate."""
    from playwright.sync_api import expect

    from tests.support.page import main_button, open_page

    size = {"width": 1280, "height": 800}
    with open_page(browser, page_server.url, viewport=size) as page:
        expect(main_button(page)).to_be_enabled()
        yield page
