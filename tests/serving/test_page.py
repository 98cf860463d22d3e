"""The page in a real browser, in front of a real server: what it shows is what the API says."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers as hf
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from tokenizers import models

from model import Transformer
from pocketlm.checkpoint.format import checkpoint_metadata, save_checkpoint
from pocketlm.config.loading import config_from_dict
from pocketlm.tokenizer.bpe import JsonTokenizer, byte_letters, byte_level

ROOT = Path(__file__).parents[2]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = [f"<img src=x onerror=document.title='{n}'>" for n in range(5)] + [
    f"<script>document.title='{n}'</script>" for n in range(5)
]
PROMPT = "The <b>ox</b> and <script>document.title='typed'</script>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium or chrome on PATH"),
]


def hostile_tokenizer() -> JsonTokenizer:
    """ASCII and the two bytes of an é, each a token; and tokens that would do harm as HTML."""
    letters = byte_letters()
    vocab = {letters[byte]: i for i, byte in enumerate([*range(32, 127), 10, 0xC3, 0xA9])}
    backend = byte_level(models.BPE(vocab=vocab, merges=[]))
    backend.add_tokens([hf.AddedToken(text, normalized=False) for text in HOSTILE])
    backend.add_special_tokens(["<|begin|>"])
    return JsonTokenizer(backend.to_str(), "hostile", backend.token_to_id("<|begin|>"), None)


def write_checkpoint(path: Path) -> None:
    """A random model of 5 million parameters: some milliseconds a token, so that it can be stopped."""
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
    model.lm_head.weight.data[tokenizer.encode("é")] *= (
        1.5  # oftener there, so that they come together too
    )
    weights = {f"model.{name}": p for name, p in model.state_dict().items()}
    kit = checkpoint_metadata(config, tokenizer.state(), tokens=12_345_678, val_loss=2.0)
    save_checkpoint({"state_dict": weights, "global_step": 600, "kit": kit}, path)


@contextmanager
def serve(path: Path, **environment: str) -> Iterator[str]:
    """The address of `python serve.py`."""
    command = [sys.executable, "serve.py", "--ckpt", str(path), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True
    )
    try:
        told = []
        for line in process.stderr:
            told.append(line)
            if found := re.match(r"http://\S+", line):
                break
        else:
            pytest.fail("".join(told))
        yield found[0]
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "hostile.ckpt"
    write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    with serve(checkpoint) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, **settings: Any) -> Iterator[Page]:
    """The page, with its requests as `sent`; at the end, that nothing went wrong unseen and nothing left for elsewhere."""
    context: BrowserContext = browser.new_context(**settings)
    page, wrong = context.new_page(), []
    page.sent = []
    page.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    page.on("request", lambda request: page.sent.append(request))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console",
        lambda message: (
            wrong.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    page.goto(url)
    try:
        yield page
        assert [
            text for text in wrong if not text.startswith("Failed to load resource")
        ] == []  # an answer that is an error
        assert {request.url.removeprefix(url).split("/")[1] for request in page.sent} <= {
            "",
            "v1",
            "health",
        }
    finally:
        context.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with opened(browser, url, viewport={"width": 1280, "height": 800}) as page:
        expect(go(page)).to_be_enabled()
        yield page


def go(page: Page):
    return page.locator("#go")


def finished(page: Page) -> None:
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^\d+ tokens\."))


def generate(page: Page, prompt: str, **settings: float) -> str:
    """The text behind the prompt, and its request."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for name, value in settings.items():
        page.locator(f"#{name}").fill(str(value))
        page.locator(f"#{name}").press("Tab")
    go(page).click()
    finished(page)
    return text_of(page)


def text_of(page: Page) -> str:
    return page.locator(".answer").last.text_content()


def body(page: Page) -> dict:
    """What the page asked for last."""
    return next(
        json.loads(request.post_data) for request in reversed(page.sent) if request.method == "POST"
    )


def choices(url: str, asked: dict, path: str = "completions", key: str = "") -> list[dict]:
    """The same, asked without a page and without a stream."""
    whole = {name: value for name, value in asked.items() if name != "stream"}
    answer = httpx.post(
        f"{url}/v1/{path}",
        json=whole,
        timeout=60,
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def api(*args: Any, **more: Any) -> dict:
    """The one there is."""
    [choice] = choices(*args, **more)
    return choice


def weighed(page: Page) -> list[float]:
    """The probabilities that are shown."""
    expect(page.locator("#weighed")).to_be_visible()
    return [
        float(text.removesuffix("%")) / 100
        for text in page.locator("#weighed .share").all_text_contents()
    ]


def likeliest(choice: dict, i: int) -> list[float]:
    """Those the API tells of token i: of the five likeliest, and of the one drawn."""
    told = choice["logprobs"]
    nats = told["top_logprobs"][i] | {told["tokens"][i]: told["token_logprobs"][i]}
    return sorted(map(math.exp, nats.values()), reverse=True)


def same(shown: list[float], told: list[float]) -> bool:
    return shown == pytest.approx(told, rel=0.006)  # three digits are shown


def test_text_streams_behind_the_prompt_and_is_the_text_of_the_api(page, url):
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.locator("#max_tokens").fill("400")
    page.evaluate("""() => {
        const answers = document.getElementById("answers");
        window.lengths = [];
        new MutationObserver(() => lengths.push(answers.textContent.length)).observe(answers, {childList: true, subtree: true});
    }""")
    page.locator("#max_tokens").press("Control+Enter")
    finished(page)
    lengths = page.evaluate("lengths")
    assert lengths == sorted(lengths) and len(set(lengths)) > 10
    choice = api(url, body(page))
    assert text_of(page) == choice["text"]
    assert page.locator(".token").count() == len(choice["logprobs"]["tokens"])
    assert body(page)["prompt"] == PROMPT and body(page)["max_tokens"] == 400


def test_what_was_typed_and_generated_stays_text(page):
    text = generate(page, PROMPT, max_tokens=300, seed=1)
    assert "<script>" in text and "<img" in text
    page.get_by_role("button", name="Tokens").click()
    for token in page.locator(".token", has_text="<img").all()[:3]:
        token.hover()
        assert any("<" in spelt for spelt in page.locator("#weighed .spelt").all_text_contents())
        assert page.locator("#weighed .spelt *").count() == 0
    page.get_by_role("button", name="Chat", exact=True).click()
    page.get_by_label("Message", exact=True).fill("<img src=x onerror=document.title='said'>")
    page.keyboard.press("Enter")
    finished(page)
    page.reload()
    expect(page.locator("#talk .user")).to_contain_text("<img src=x onerror=document.title='said'>")
    expect(page.locator("#name")).to_have_text("hostile")
    assert page.locator("img, .paper b, body script:not([type=module])").count() == 0
    assert page.title() == "hostile"


def test_keys_on_a_slider_change_what_is_asked(page, url):
    slider = page.get_by_role("slider", name="Temperature")
    slider.focus()
    slider.press("Home")
    text = generate(page, "Once", max_tokens=30)
    assert body(page)["temperature"] == 0
    assert (
        text
        == api(url, {"model": "hostile", "prompt": "Once", "temperature": 0, "max_tokens": 30})[
            "text"
        ]
    )
    slider.press("ArrowRight")
    expect(page.get_by_label("Temperature", exact=True)).to_have_value("0.05")
    page.get_by_role("button", name="Reset").click()
    generate(page, "Once", max_tokens=5)
    assert body(page)["temperature"] == 1.25  # the checkpoint's own


def test_stop_frees_the_row(page, url):
    def running() -> float:
        return float(
            re.search(r"^serve_running_rows (\S+)", httpx.get(f"{url}/metrics").text, re.MULTILINE)[
                1
            ]
        )

    page.locator("#max_tokens").fill("4096")
    go(page).click()
    expect(page.locator(".token").nth(10)).to_be_attached()
    assert running() == 1
    page.keyboard.press("Escape")
    finished(page)
    expect(page.locator("#went")).to_contain_text("stopped")
    for _ in range(100):
        if running() == 0:
            break
        page.wait_for_timeout(20)
    assert running() == 0
    assert 10 < page.locator(".token").count() < 4096


def test_tokens_tell_what_the_api_tells(page, url):
    generate(page, "Once", max_tokens=60, seed=5)
    choice = api(url, body(page))
    for i in (0, 7, 30):
        page.locator(".token").nth(i).hover()
        expect(page.locator(".token").nth(i)).to_have_class(re.compile("chosen"))
        assert same(weighed(page), likeliest(choice, i))
    page.mouse.move(5, 5)
    expect(page.locator("#weighed")).to_be_hidden()
    page.locator(".answer").focus()
    for i, key in enumerate(["Home", "ArrowRight", "ArrowRight"]):
        page.keyboard.press(key)
        assert same(weighed(page), likeliest(choice, i))
    page.keyboard.press("End")
    assert same(weighed(page), likeliest(choice, len(choice["logprobs"]["tokens"]) - 1))


def test_text_goes_on_from_another_token(page, url):
    text = generate(page, "Once", max_tokens=40, seed=5)
    choice = api(url, body(page))
    offset = choice["logprobs"]["text_offset"][20]
    page.locator(".token").nth(20).hover()
    other = page.locator("#weighed button:enabled").first
    spelt = other.locator(".spelt").text_content().replace("\u00b7", " ")
    other.click()
    expect(page.locator(".token").nth(40)).to_be_attached()
    finished(page)
    assert body(page)["prompt"] == "Once" + text[:offset] + spelt
    assert text_of(page) == text[:offset] + spelt + api(url, body(page))["text"]


def test_every_character_can_be_seen_in_the_view_of_tokens(page, url):
    asked = {
        "model": "hostile",
        "prompt": "Once",
        "max_tokens": 100,
        "n": 16,
        "temperature": 2,
        "top_p": 1,
    }
    found = (
        (seed + k, choice["text"])
        for seed in range(0, 800, 16)
        for k, choice in enumerate(choices(url, asked | {"seed": seed}))
    )
    seed = next(seed for seed, text in found if set("\né\ufffd") <= set(text))
    text = generate(page, "Once", max_tokens=100, seed=seed, temperature=2, top_p=1)
    tokens = page.locator(".token").all_text_contents()
    page.get_by_role("button", name="Tokens").click()
    seen = [shown.replace("\u200b", "") for shown in page.locator(".token").all_text_contents()]
    pairs = set(zip(tokens, seen, strict=True))
    assert all(
        seen == text.replace(" ", "\u00b7").replace("\n", "\u21b5\n")
        for text, seen in pairs
        if text.isascii() and text
    )
    assert {seen for text, seen in pairs if "\ufffd" in text} <= {
        "\u27e8c3\u27e9",
        "\u27e8a9\u27e9",
    }
    whole = tokens.index("é")  # the second of its two bytes, which makes it whole
    assert (tokens[whole - 1], seen[whole - 1 : whole + 1]) == ("", ["\u27e8c3\u27e9", "é"])
    page.get_by_role("button", name="Tokens").click()
    assert text_of(page) == text


def test_samples_stand_side_by_side(page, url):
    generate(page, "Once", max_tokens=20, seed=3, n=3)
    texts = page.locator(".answer").all_text_contents()
    assert texts == [api(url, body(page) | {"n": 1, "seed": 3 + k})["text"] for k in range(3)]
    page.locator("#answers").get_by_role("button", name="Keep").nth(1).click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("Once" + texts[1])


def test_a_conversation_is_answered_remembered_and_answered_anew(page, url):
    page.get_by_role("button", name="Chat", exact=True).click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.locator("#max_tokens").fill("30")
    page.locator("#max_tokens").press("Tab")
    page.get_by_label("Message", exact=True).fill("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    finished(page)
    asked = body(page)
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello\nthere"},
    ]
    choice = api(url, asked, "chat/completions")
    assert text_of(page) == choice["message"]["content"]
    page.locator(".token").nth(0).hover()
    assert same(
        weighed(page)[:1],
        [
            math.exp(
                max(each["logprob"] for each in choice["logprobs"]["content"][0]["top_logprobs"])
            )
        ],
    )
    page.reload()
    expect(page.locator("#talk li")).to_have_count(2)
    assert text_of(page) == choice["message"]["content"]
    expect(go(page)).to_be_enabled()
    page.get_by_role("button", name="Regenerate").click()
    finished(page)
    assert body(page)["messages"] == asked["messages"] and body(page)["seed"] != asked["seed"]
    page.get_by_role("button", name="New").click()
    expect(page.locator("#talk li")).to_have_count(0)


def test_the_command_that_is_shown_gives_the_text_that_is_shown(page):
    text = generate(page, 'It\'s "so":\n$HOME \\n', max_tokens=20, seed=4)
    page.get_by_text("As a curl command").click()
    expect(page.locator("#snippet")).to_contain_text("curl")
    done = subprocess.run(
        ["bash", "-c", page.locator("#snippet").text_content()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["choices"][0]["text"] == text


def test_the_text_is_copied_with_its_prompt(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = generate(page, "Once", max_tokens=20)
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "Once" + text


def test_prompt_settings_and_text_survive_a_reload(page):
    text = generate(page, "Once", max_tokens=20, top_k=7)
    page.reload()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("Once")
    expect(page.get_by_label("Top-k", exact=True)).to_have_value("7")
    assert text_of(page) == text


def test_what_the_server_refuses_is_said(page):
    page.locator("#top_p").fill("7")
    page.locator("#top_p").press("Tab")
    go(page).click()
    expect(page.get_by_role("alert")).to_contain_text("top_p is 7")
    page.sent.clear()
    page.reload()


def test_the_models_numbers_are_shown(page):
    facts = dict(
        zip(
            page.locator("#facts dt").all_text_contents(),
            page.locator("#facts dd").all_text_contents(),
            strict=True,
        )
    )
    assert (facts["step"], facts["tokens seen"], facts["perplexity"]) == ("600", "12.3M", "7.39")
    assert (facts["validation loss"], facts["bits per token"]) == ("2.000 nats", "2.89")


def test_a_server_that_is_away_is_waited_for(browser, url):
    with opened(browser, url) as page:
        expect(go(page)).to_be_enabled()
        page.context.set_offline(True)
        go(page).click()
        expect(page.get_by_role("alert")).to_contain_text("does not answer")
        page.context.set_offline(False)
        expect(page.locator("#wrong")).to_be_empty()
        page.locator("#max_tokens").fill("5")
        go(page).click()
        finished(page)


def test_a_key_is_asked_for_once_and_kept_for_the_tab(browser, checkpoint):
    with serve(checkpoint, SERVE_API_KEY="sesame") as url, opened(browser, url) as page:
        for key, said in (("wrong", ""), ("sesame", "That key was refused; try another.")):
            expect(page.locator("#refusal")).to_have_text(said)
            expect(page.get_by_role("dialog")).to_be_visible()
            page.get_by_role("textbox", name="API key").fill(key)
            page.keyboard.press("Enter")
        expect(go(page)).to_be_enabled()
        text = generate(page, "Once", max_tokens=10)
        assert text == api(url, body(page), key="sesame")["text"]
        page.reload()
        expect(page.locator("#name")).to_have_text("hostile")
        expect(page.get_by_role("dialog")).to_be_hidden()
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")


@pytest.mark.parametrize("width, scheme", [(360, "dark"), (1280, "light")])
def test_it_is_accessible_and_fits(browser, url, width, scheme):
    """By axe's rules of WCAG 2.2 AA, with names and contrast among them."""
    with opened(
        browser,
        url,
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        reduced_motion="reduce",
    ) as page:
        expect(go(page)).to_be_enabled()
        if width == 360:
            page.get_by_text("Sampling", exact=True).click()
        page.get_by_text("As a curl command").click()
        page.locator("#n").fill("2")
        generate(page, "Once", max_tokens=40)
        for mode in ("Continue text", "Chat"):
            page.get_by_role("button", name=mode, exact=True).click()
            page.get_by_role("button", name="Tokens").click()
            if mode == "Continue text":
                page.locator(".token").first.click()
                expect(page.locator("#weighed")).to_be_visible()
            found = Axe().run(
                page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa"]}
            )
            assert found.violations_count == 0, found.generate_report()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            if width == 360:
                targets = page.locator(
                    "button:visible, input:visible, textarea:visible, summary:visible"
                )
                small = [
                    (each.get_attribute("id"), box)
                    for each in targets.all()
                    if (box := each.bounding_box())["height"] < 40
                ]
                assert small == []
            page.keyboard.press("Escape")


def test_dark_and_light_differ_and_can_be_chosen(browser, url):
    def background(page: Page) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    seen = []
    for scheme in ("light", "dark"):
        with opened(browser, url, color_scheme=scheme) as page:
            seen.append(background(page))
            page.get_by_role("button", name="Dark or light").click()
            seen.append(background(page))
            page.reload()
            assert background(page) == seen[-1]
    assert seen[0] == seen[3] != seen[1] == seen[2]
