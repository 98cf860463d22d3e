"""The web page in a real browser, and the same requests without a browser."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
import torch
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect
from tokenizers import models

from model import Transformer
from pocketlm.checkpoint.format import checkpoint_metadata, save_checkpoint
from pocketlm.config.loading import config_from_dict
from pocketlm.tokenizer.bpe import JsonTokenizer, byte_level_backend
from pocketlm.tokenizer.streaming import byte_letters
from tests.support.server import RunningServer

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
BROWSER_TEST = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium or chrome on PATH"),
]
IMAGES = [f"<img src=x onerror=document.title='{n}'>" for n in range(5)]
SCRIPTS = [f"<script>document.title='{n}'</script>" for n in range(5)]
HOSTILE_PROMPT = "The <b>ox</b> and <script>document.title='typed'</script>"


def hostile_tokenizer() -> JsonTokenizer:
    """Return a tokenizer with tokens that would do harm as HTML.

    Its other tokens are the characters of ASCII and the two bytes of an é.
    """
    letters = byte_letters()
    vocab = {letters[byte]: i for i, byte in enumerate([*range(32, 127), 10, 0xC3, 0xA9])}
    backend = byte_level_backend(models.BPE(vocab=vocab, merges=[]))
    backend.add_tokens([hf.AddedToken(text, normalized=False) for text in IMAGES + SCRIPTS])
    backend.add_special_tokens(["<|begin|>"])
    return JsonTokenizer(backend.to_str(), "hostile", backend.token_to_id("<|begin|>"), None)


def write_hostile_checkpoint(path: Path) -> Path:
    """Write a random model that takes some milliseconds per token, so that it can be stopped."""
    tokenizer = hostile_tokenizer()
    sizes = dict(
        vocab_size=tokenizer.vocab_size,
        n_layers=6,
        d_model=256,
        n_heads=4,
        n_kv_heads=2,
        max_seq_len=256,
        tie_embeddings=False,
    )
    config = config_from_dict(
        {
            "model": sizes,
            "data": {"tokenizer": "byte"},
            "training": {"seq_len": 256},
            "sampling": {"temperature": 1.25},
        }
    )
    torch.manual_seed(0)
    model = Transformer(config.model)
    torch.nn.init.normal_(model.lm_head.weight, std=0.15)
    # more frequent bytes of é, so that they also occur together
    model.lm_head.weight.data[tokenizer.encode("é")] *= 1.5
    weights = {f"model.{name}": p for name, p in model.state_dict().items()}
    kit = checkpoint_metadata(config, tokenizer.state(), tokens=12_345_678, val_loss=2.0)
    save_checkpoint({"state_dict": weights, "global_step": 600, "kit": kit}, path)
    return path


@contextmanager
def open_page(browser: Browser, url: str, **settings: Any) -> Iterator[Page]:
    """Open the page, with its requests as `page.sent`.

    At the end, assert that there was no error in the console and no request to elsewhere.
    """
    context: BrowserContext = browser.new_context(**settings)
    page, messages = context.new_page(), []
    page.sent = []
    page.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    page.on("request", lambda request: page.sent.append(request))
    page.on("pageerror", lambda error: messages.append(f"error: {error}"))
    page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
    page.goto(url)
    try:
        yield page
        problems = [text for text in messages if text.startswith(("error:", "warning:"))]
        # the browser also reports responses with an error status
        assert [text for text in problems if "Failed to load resource" not in text] == []
        folders = {request.url.removeprefix(url).split("/")[1] for request in page.sent}
        assert folders <= {"", "v1", "health"}
    finally:
        context.close()


def main_button(page: Page) -> Locator:
    """Return the button Generate, Send or Stop."""
    return page.locator("#go")


def prompt_field(page: Page) -> Locator:
    return page.get_by_label("Prompt", exact=True)


def click(page: Page, name: str) -> None:
    """Click the button with exactly this name."""
    page.get_by_role("button", name=name, exact=True).click()


def wait_until_finished(page: Page) -> None:
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^\d+ tokens\."))


def generate(page: Page, prompt: str, **settings: float) -> str:
    """Type a prompt and settings, generate, and return the text after the prompt."""
    prompt_field(page).fill(prompt)
    for name, value in settings.items():
        page.locator(f"#{name}").fill(str(value))
        page.locator(f"#{name}").press("Tab")
    main_button(page).click()
    wait_until_finished(page)
    return answer_text(page)


def answer_text(page: Page) -> str:
    return page.locator(".answer").last.text_content()


def last_body(page: Page) -> dict[str, Any]:
    """Return the body of the page's last POST request."""
    posts = [request for request in page.sent if request.method == "POST"]
    return json.loads(posts[-1].post_data)


def api_choices(
    server: RunningServer, body: dict[str, Any], path: str = "completions"
) -> list[dict[str, Any]]:
    """Return the choices of a request, sent without a page and without a stream."""
    whole = {name: value for name, value in body.items() if name != "stream"}
    response = server.post(f"/v1/{path}", json=whole)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def api_choice(
    server: RunningServer, body: dict[str, Any], path: str = "completions"
) -> dict[str, Any]:
    """Return the only choice of a request."""
    [choice] = api_choices(server, body, path)
    return choice


def shown_probabilities(page: Page) -> list[float]:
    """Return the probabilities in the panel of alternatives."""
    expect(page.locator("#panel")).to_be_visible()
    texts = page.locator("#panel .probability").all_text_contents()
    return [float(text.removesuffix("%")) / 100 for text in texts]


def api_probabilities(choice: dict[str, Any], i: int) -> list[float]:
    """Return the probabilities of token i and its alternatives, in descending order."""
    logprobs = choice["logprobs"]
    by_token = dict(logprobs["top_logprobs"][i])
    by_token[logprobs["tokens"][i]] = logprobs["token_logprobs"][i]
    return sorted(map(math.exp, by_token.values()), reverse=True)


def approximately(probabilities: list[float]) -> Any:
    """Return what equals these probabilities rounded to three digits, as the page shows them."""
    return pytest.approx(probabilities, rel=0.006)
