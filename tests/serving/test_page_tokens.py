"""Tokens on the page: their probabilities, their alternatives, and the token view."""

import re

from playwright.sync_api import Page, expect

from tests.support.page import (
    BROWSER_TEST,
    answer_text,
    api_choice,
    api_choices,
    api_probabilities,
    approximately,
    click,
    generate,
    last_body,
    shown_probabilities,
    wait_until_finished,
)
from tests.support.server import RunningServer

pytestmark = BROWSER_TEST


def test_the_panel_shows_the_probabilities_of_the_api(
    page: Page, page_server: RunningServer
) -> None:
    generate(page, "Once", max_tokens=60, seed=5)
    choice = api_choice(page_server, last_body(page))
    for i in (0, 7, 30):
        token = page.locator(".token").nth(i)
        token.hover()
        expect(token).to_have_class(re.compile("selected"))
        assert shown_probabilities(page) == approximately(api_probabilities(choice, i))
    page.mouse.move(5, 5)
    expect(page.locator("#panel")).to_be_hidden()
    page.locator(".answer").focus()
    last = len(choice["logprobs"]["tokens"]) - 1
    for key, i in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("End", last)):
        page.keyboard.press(key)
        assert shown_probabilities(page) == approximately(api_probabilities(choice, i))


def test_text_continues_from_another_token(page: Page, page_server: RunningServer) -> None:
    text = generate(page, "Once", max_tokens=40, seed=5)
    choice = api_choice(page_server, last_body(page))
    kept = text[: choice["logprobs"]["text_offset"][20]]
    page.locator(".token").nth(20).hover()
    other = page.locator("#panel button:enabled").first
    kept += other.locator(".spelling").text_content().replace("\u00b7", " ")
    other.click()
    expect(page.locator(".token").nth(40)).to_be_attached()
    wait_until_finished(page)
    assert last_body(page)["prompt"] == "Once" + kept
    assert answer_text(page) == kept + api_choice(page_server, last_body(page))["text"]


def seed_of_a_text_with(characters: str, server: RunningServer, body: dict) -> int:
    """Return the first seed whose text contains all of these characters."""
    for seed in range(0, 800, 16):
        choices = api_choices(server, body | {"n": 16, "seed": seed})
        for sample, choice in enumerate(choices):
            if set(characters) <= set(choice["text"]):
                return seed + sample
    raise AssertionError("there is no such text")


def test_every_character_is_visible_in_the_token_view(
    page: Page, page_server: RunningServer
) -> None:
    settings = {"max_tokens": 100, "temperature": 2, "top_p": 1}
    body = {"model": "hostile", "prompt": "Once"} | settings
    settings["seed"] = seed_of_a_text_with("\né\ufffd", page_server, body)
    text = generate(page, "Once", **settings)
    tokens = page.locator(".token").all_text_contents()
    click(page, "Tokens")
    shown = page.locator(".token").all_text_contents()
    shown = [spelling.replace("\u200b", "") for spelling in shown]
    for token, spelling in zip(tokens, shown, strict=True):
        if token and token.isascii():
            assert spelling == token.replace(" ", "\u00b7").replace("\n", "\u21b5\n")
        if "\ufffd" in token:
            assert spelling in ("\u27e8c3\u27e9", "\u27e8a9\u27e9")
    second_byte = tokens.index("é")  # the token that completes the character
    assert tokens[second_byte - 1] == ""
    assert shown[second_byte - 1 : second_byte + 1] == ["\u27e8c3\u27e9", "é"]
    click(page, "Tokens")
    assert answer_text(page) == text
