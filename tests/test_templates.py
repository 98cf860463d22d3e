"""A chat template is a program of the model's author: whatever it does, rendering it ends."""

import sys

import jinja2
import pytest

from pocketlm import templates
from pocketlm.errors import UserError
from pocketlm.templates import MAX_STEPS, render
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
    "a joined text": LOOP.format("'ab'", "ns.x ~ ns.x"),
    "a doubled list": LOOP.format("['ab']", "[ns.x, ns.x]") + "{{ ns.x }}",
    "a doubled list as JSON": LOOP.format("['ab']", "[ns.x, ns.x]") + "{{ ns.x|tojson }}",
    "a doubled list as text": LOOP.format("['ab']", "[ns.x, ns.x]") + "{{ ns.x|string }}",
    "a doubled text": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}"
    + LOOP.format("'ab'", "f(ns.x)"),
    "the filter replace": LOOP.format("'ab'", "ns.x|replace('', ns.x)"),
    "the filter join": "{{ range(99999)|join('x' * 99999) }}",
    "joined filters": "{{ range(99999)|map('replace', '', 'x' * 99999)|join }}",
    "a list of filters": "{{ range(99999)|map('replace', '', 'x' * 99999)|list|length }}",
    "the filter center": "{{ 'a'|center(10**9) }}",
    "the filter indent": "{{ ('a\n' * 9999)|indent(99999) }}",
    "the filter format": "{{ '%999999999d'|format(1) }}",
    "the filter tojson": "{{ range(9)|list|tojson(indent=999999999) }}",
    "the filter batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "the filter round": "{{ 1.5|round(10**9, 'ceil') }}",
    "the method replace": LOOP.format("'ab'", "ns.x.replace('', ns.x)"),
    "the method join": "{{ ('x' * 99999).join(['a'] * 9999) }}",
    "the method ljust": "{{ 'a'.ljust(10**9) }}",
    "the method expandtabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "the method format": "{{ '{:>999999999}'.format(1) }}",
    "a width that is an argument": "{{ '{:{}}'.format(1, 999999999) }}",
    "the operator %": "{{ '%999999999d' % 1 }}",
    "the operator % with a star": "{{ '%*d' % (999999999, 1) }}",
    "words for nothing": "{{ lipsum(n=10**6) }}",
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
    monkeypatch.setattr(templates, "MAX_STEPS", 20_000)
    monkeypatch.setattr(templates, "MAX_RENDERED_CHARACTERS", 20_000)
    trace = sys.gettrace()
    with pytest.raises(UserError, match="^the chat template (rejects|makes)") as refused:
        render(template, MESSAGES)
    assert len(str(refused.value)) < 300
    assert "\n" not in str(refused.value)
    assert sys.gettrace() is trace


def test_what_chat_templates_use_is_what_jinja_makes_of_it() -> None:
    """A sum of texts is as long as they are, so that ~ and the filters keep their meaning."""
    template = (
        "{% for m in messages %}{{ '<' ~ m.role ~ 1 ~ none ~ '>' + m['content']|trim }}"
        "{{ m.content.replace('l', 'LL') }}{{ m.content.split('e')|join('+') }}"
        "{{ [1, 'a', {'b': none}]|list }}{{ messages|map(attribute='role')|list }}"
        "{{ messages|selectattr('role', 'eq', 'user')|list|length }}{{ 'a\nb'|indent(2) }}"
        "{{ '%s-%03d' % ('x', 7) }}{{ '{}:{:>3}'.format(1, 2) }}{{ '-'.join(['a', 'b']) }}"
        "{{ 7 % 4 }}{{ 2 ** 10 }}{% endfor %}"
    )
    expected = jinja2.Environment().from_string(template).render(messages=MESSAGES)
    assert render(template, MESSAGES) == expected
    assert '[\n "b"\n]' in render("{{ ['b']|tojson(indent=1) }}", MESSAGES)


def test_a_long_conversation_is_far_from_the_limit() -> None:
    """The longest that the server takes has 100,000 characters, here in messages of five."""
    messages = MESSAGES * 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "MAX_STEPS", MAX_STEPS // 20)
        text = render(CHATML, messages)
    assert text.count("hello") == 1000
