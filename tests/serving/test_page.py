"""The page: chat, errors, the API key, accessibility and themes."""

import math

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.support.page import (
    BROWSER_TEST,
    answer_text,
    api_choice,
    approximately,
    click,
    generate,
    last_body,
    main_button,
    open_page,
    shown_probabilities,
    wait_until_finished,
)
from tests.support.server import KEY, RunningServer, serving

pytestmark = BROWSER_TEST


def test_a_conversation_is_answered_saved_and_regenerated(
    page: Page, page_server: RunningServer
) -> None:
    click(page, "Chat")
    page.get_by_label("System prompt").fill("Be brief.")
    page.locator("#max_tokens").fill("30")
    page.locator("#max_tokens").press("Tab")
    page.get_by_label("Message", exact=True).fill("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    wait_until_finished(page)
    body = last_body(page)
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello\nthere"},
    ]
    choice = api_choice(page_server, body, "chat/completions")
    assert answer_text(page) == choice["message"]["content"]
    page.locator(".token").nth(0).hover()
    top = choice["logprobs"]["content"][0]["top_logprobs"]
    best = math.exp(max(entry["logprob"] for entry in top))
    assert shown_probabilities(page)[:1] == approximately([best])
    page.reload()
    expect(page.locator("#conversation li")).to_have_count(2)
    assert answer_text(page) == choice["message"]["content"]
    expect(main_button(page)).to_be_enabled()
    click(page, "Regenerate")
    wait_until_finished(page)
    regenerated = last_body(page)
    assert regenerated["messages"] == body["messages"]
    assert regenerated["seed"] != body["seed"]
    click(page, "New")
    expect(page.locator("#conversation li")).to_have_count(0)


def test_an_error_of_the_server_is_shown(page: Page) -> None:
    page.locator("#top_p").fill("7")
    page.locator("#top_p").press("Tab")
    main_button(page).click()
    expect(page.get_by_role("alert")).to_contain_text("top_p is 7")


def test_facts_about_the_model_are_shown(page: Page) -> None:
    names = page.locator("#facts dt").all_text_contents()
    values = page.locator("#facts dd").all_text_contents()
    facts = dict(zip(names, values, strict=True))
    expected = {
        "step": "600",
        "tokens seen": "12.3M",
        "perplexity": "7.39",
        "validation loss": "2.000 nats",
        "bits per token": "2.89",
    }
    assert {name: facts[name] for name in expected} == expected


def test_the_page_reconnects_to_the_server(browser: Browser, page_server: RunningServer) -> None:
    with open_page(browser, page_server.url) as page:
        expect(main_button(page)).to_be_enabled()
        page.context.set_offline(True)
        main_button(page).click()
        expect(page.get_by_role("alert")).to_contain_text("does not answer")
        page.context.set_offline(False)
        expect(page.locator("#error")).to_be_empty()
        page.locator("#max_tokens").fill("5")
        main_button(page).click()
        wait_until_finished(page)


def test_the_key_is_asked_for_once_and_kept_for_the_tab(
    browser: Browser, hostile_checkpoint
) -> None:
    with (
        serving(hostile_checkpoint, "--device", "cpu", SERVE_API_KEY=KEY) as server,
        open_page(browser, server.url) as page,
    ):
        for key, refusal in (("wrong", ""), (KEY, "That key was refused; try another.")):
            expect(page.locator("#refusal")).to_have_text(refusal)
            expect(page.get_by_role("dialog")).to_be_visible()
            page.get_by_role("textbox", name="API key").fill(key)
            page.keyboard.press("Enter")
        expect(main_button(page)).to_be_enabled()
        text = generate(page, "Once", max_tokens=10)
        assert text == api_choice(server, last_body(page))["text"]
        page.reload()
        expect(page.locator("#name")).to_have_text("hostile")
        expect(page.get_by_role("dialog")).to_be_hidden()
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")


WCAG = ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa"]
CONTROLS = "button:visible, input:visible, textarea:visible, summary:visible"


def check_accessibility(page: Page, width: int) -> None:
    """Assert axe's rules, that nothing is wider than the page, and room for a finger."""
    results = Axe().run(page, options={"runOnly": WCAG})
    assert results.violations_count == 0, results.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width < 860:
        heights = {
            control.get_attribute("id"): control.bounding_box()["height"]
            for control in page.locator(CONTROLS).all()
        }
        assert min(heights.values()) >= 40, heights


@pytest.mark.parametrize("width, scheme", [(360, "dark"), (1280, "light")])
def test_the_page_is_accessible_and_fits(
    browser: Browser, page_server: RunningServer, width: int, scheme: str
) -> None:
    """The rules are axe's for WCAG 2.2 AA, which include names and contrast."""
    with open_page(
        browser,
        page_server.url,
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        reduced_motion="reduce",
    ) as page:
        expect(main_button(page)).to_be_enabled()
        if width == 360:
            page.get_by_text("Sampling", exact=True).click()
        page.get_by_text("As a curl command").click()
        page.locator("#n").fill("2")
        generate(page, "Once", max_tokens=40)
        for mode in ("Continue text", "Chat"):
            click(page, mode)
            page.get_by_role("button", name="Tokens").click()
            if mode == "Continue text":
                page.locator(".token").first.click()
                expect(page.locator("#panel")).to_be_visible()
            check_accessibility(page, width)
            page.keyboard.press("Escape")


def test_dark_and_light_differ_and_can_be_chosen(
    browser: Browser, page_server: RunningServer
) -> None:
    def background(page: Page) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    seen = {}
    for scheme in ("light", "dark"):
        with open_page(browser, page_server.url, color_scheme=scheme) as page:
            seen[scheme, "default"] = background(page)
            click(page, "Switch between dark and light")
            seen[scheme, "switched"] = background(page)
            page.reload()
            assert background(page) == seen[scheme, "switched"]
    assert seen["light", "default"] == seen["dark", "switched"]
    assert seen["light", "switched"] == seen["dark", "default"]
    assert seen["light", "default"] != seen["dark", "default"]
