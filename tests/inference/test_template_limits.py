"""A chat template is a program of the model's author: whatever it does, rendering it ends."""

import sys

import pytest

from pocketlm.errors import UserError
from pocketlm.inference import conversation
from pocketlm.inference.conversation import MAX_TEMPLATE_STEPS, render
from tests.support.chat import CHATML

MESSAGES = [{"role": "user", "content": "hello"}]
LOOP = (
    "{{% set ns = namespace(x={0}) %}}{{% for i in range(99) %}}{{% set ns.x = {1} %}}"
    "{{% endfor %}}"
)
NESTED = "{{% for a in {0} %}}{{% for b in {0} %}}{1}{{% endfor %}}{{% endfor %}}"
ENDLESS = {
    "nested loops": "{% set r = range(99999) %}" + NESTED.format("r", ""),
    "calls": NESTED.format("range(99999)", "x"),
    "filters": "{{ (range(99999)|list)|map('upper')|map('lower')|list|length }}",
    "a macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "a growing number": LOOP.format("7", "ns.x * ns.x"),
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a growing text": LOOP.format("'ab'", "ns.x + ns.x"),
    "a long text": "{{ 'ab' * 10**9 }}",
    "a long list": "{{ [1] * 10**9 }}",
    "a long result": "{% for i in range(99999) %}twelve letters{% endfor %}",
}
FAILING = {
    "a division": "{{ 1 // 0 }}",
    "types": "{{ 1 + 'a' }}",
    "a missing attribute": "{{ messages[0].content.a.b }}",
    "a range": "{% for a in range(10**9) %}{% endfor %}",
    "deep brackets": "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "syntax": "{% for %}",
    "its own reason": "{{ raise_exception('no\n\nsystem message' + 'x' * 1000) }}",
}


@pytest.mark.parametrize(
    "template", [*ENDLESS.values(), *FAILING.values()], ids=[*ENDLESS, *FAILING]
)
def test_a_template_that_does_not_end_or_fails_is_one_sentence(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "MAX_TEMPLATE_STEPS", 100_000)
    trace = sys.gettrace()
    with pytest.raises(UserError, match="^the chat template (rejects|makes)") as refused:
        render(template, MESSAGES)
    assert len(str(refused.value)) < 300
    assert "\n" not in str(refused.value)
    assert sys.gettrace() is trace


def test_a_long_conversation_is_far_from_the_limit() -> None:
    """The longest that the server takes has 100,000 characters, here in messages of five."""
    messages = MESSAGES * 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversation, "MAX_TEMPLATE_STEPS", MAX_TEMPLATE_STEPS // 20)
        text = render(CHATML, messages)
    assert text.count("hello") == 1000
