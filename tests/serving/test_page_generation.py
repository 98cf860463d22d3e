"""Text on the page: it is the API's text, and it stays text."""

import json
import subprocess

from playwright.sync_api import Page, expect

from tests.support.page import (
    BROWSER_TEST,
    HOSTILE_PROMPT,
    answer_text,
    api_choice,
    click,
    generate,
    last_body,
    main_button,
    prompt_field,
    wait_until_finished,
)
from tests.support.server import RunningServer, until

pytestmark = BROWSER_TEST

RECORD_LENGTHS = """() => {
    const answers = document.getElementById("answers");
    window.lengths = [];
    const record = () => lengths.push(answers.textContent.length);
    new MutationObserver(record).observe(answers, {childList: true, subtree: true});
}"""


def test_text_streams_after_the_prompt_and_is_the_text_of_the_api(
    page: Page, page_server: RunningServer
) -> None:
    prompt_field(page).fill(HOSTILE_PROMPT)
    page.locator("#max_tokens").fill("400")
    page.evaluate(RECORD_LENGTHS)
    page.locator("#max_tokens").press("Control+Enter")
    wait_until_finished(page)
    lengths = page.evaluate("lengths")
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 10
    body = last_body(page)
    assert (body["prompt"], body["max_tokens"]) == (HOSTILE_PROMPT, 400)
    choice = api_choice(page_server, body)
    assert answer_text(page) == choice["text"]
    assert page.locator(".token").count() == len(choice["logprobs"]["tokens"])


def test_typed_and_generated_html_stays_text(page: Page) -> None:
    text = generate(page, HOSTILE_PROMPT, max_tokens=300, seed=1)
    assert "<script>" in text
    assert "<img" in text
    click(page, "Tokens")
    for token in page.locator(".token", has_text="<img").all()[:3]:
        token.hover()
        spellings = page.locator("#panel .spelling")
        assert any("<" in spelling for spelling in spellings.all_text_contents())
        assert page.locator("#panel .spelling *").count() == 0
    message = "<img src=x onerror=document.title='said'>"
    click(page, "Chat")
    page.get_by_label("Message", exact=True).fill(message)
    page.keyboard.press("Enter")
    wait_until_finished(page)
    page.reload()
    expect(page.locator("#conversation .user")).to_contain_text(message)
    expect(page.locator("#name")).to_have_text("hostile")
    assert page.locator("img, .paper b, body script:not([type=module])").count() == 0
    assert page.title() == "hostile"


def test_keys_on_a_slider_change_the_request(page: Page, page_server: RunningServer) -> None:
    slider = page.get_by_role("slider", name="Temperature")
    slider.focus()
    slider.press("Home")
    text = generate(page, "Once", max_tokens=30)
    assert last_body(page)["temperature"] == 0
    greedy = {"model": "hostile", "prompt": "Once", "temperature": 0, "max_tokens": 30}
    assert text == api_choice(page_server, greedy)["text"]
    slider.press("ArrowRight")
    expect(page.get_by_label("Temperature", exact=True)).to_have_value("0.05")
    page.get_by_role("button", name="Reset").click()
    generate(page, "Once", max_tokens=5)
    assert last_body(page)["temperature"] == 1.25  # the checkpoint's default


def test_stop_frees_the_slot(page: Page, page_server: RunningServer) -> None:
    def n_running() -> float:
        return page_server.metrics()["serve_running_rows"]

    page.locator("#max_tokens").fill("4096")
    main_button(page).click()
    expect(page.locator(".token").nth(10)).to_be_attached()
    assert n_running() == 1
    page.keyboard.press("Escape")
    wait_until_finished(page)
    expect(page.locator("#stats")).to_contain_text("stopped")
    until(lambda: n_running() == 0)
    assert 10 < page.locator(".token").count() < 4096


def test_samples_are_shown_side_by_side(page: Page, page_server: RunningServer) -> None:
    generate(page, "Once", max_tokens=20, seed=3, n=3)
    texts = page.locator(".answer").all_text_contents()
    bodies = [last_body(page) | {"n": 1, "seed": seed} for seed in (3, 4, 5)]
    assert texts == [api_choice(page_server, body)["text"] for body in bodies]
    page.locator("#answers").get_by_role("button", name="Keep").nth(1).click()
    expect(prompt_field(page)).to_have_value("Once" + texts[1])


def test_the_shown_command_gives_the_shown_text(page: Page) -> None:
    text = generate(page, 'It\'s "so":\n$HOME \\n', max_tokens=20, seed=4)
    page.get_by_text("As a curl command").click()
    expect(page.locator("#snippet")).to_contain_text("curl")
    command = page.locator("#snippet").text_content()
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["choices"][0]["text"] == text


def test_the_text_is_copied_with_its_prompt(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = generate(page, "Once", max_tokens=20)
    click(page, "Copy")
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "Once" + text


def test_prompt_settings_and_text_survive_a_reload(page: Page) -> None:
    text = generate(page, "Once", max_tokens=20, top_k=7)
    page.reload()
    expect(prompt_field(page)).to_have_value("Once")
    expect(page.get_by_label("Top-k", exact=True)).to_have_value("7")
    assert answer_text(page) == text
