"""Suites are read with all their fields, and mistakes are refused with their line."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from pocketlm.errors import UserError
from pocketlm.evaluation.cases import Case, load_suite, merge_suites
from tests.support.probes import read_suite

EVERY_TYPE = """\
schema: 1
name: all
license: CC0-1.0
defaults: {category: of all, scoring: byte, max_new_tokens: 8}
cases:
  - {id: capital, group: france, source: "France is", prompt: "The capital of France is",
     answers: [" Paris"], pmi_prompt: "It is"}
  - id: choice
    type: choice
    negative: true
    echo: true
    joined: true
    scoring: pmi
    prompt: "Paris is not"
    answers: [" Rome", " Lima"]
    distractors: [" Paris"]
  - {id: agreement, type: minimal_pair, category: grammar,
     good: "The dogs bark.", bad: "The dogs barks."}
  - {id: rain, type: schema, contexts: ["It rains, so", "It shines, so"],
     continuation: " we swim.", gold: 1}
  - {id: counting, type: generate, prompt: "1, 2, 3,", match: '^\\s*4', forbid: "3, 4, 3"}
  - {id: some, type: text, text: "Some text."}
  - {id: whole, type: text, file: data/val.txt}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- reading ----


def test_every_type_of_case_is_read_with_its_fields_the_suite_s_defaults_and_its_line():
    suite = read_suite(EVERY_TYPE)
    of_all = dict(category="of all", scoring="byte", max_new_tokens=8)
    assert suite.cases == (
        Case(
            "capital",
            group="france",
            source="France is",
            prompt="The capital of France is",
            answers=(" Paris",),
            pmi_prompt="It is",
            **of_all,
        ),
        Case(
            "choice",
            "choice",
            "of all",
            "choice",
            negative=True,
            echo=True,
            joined=True,
            scoring="pmi",
            prompt="Paris is not",
            answers=(" Rome", " Lima"),
            distractors=(" Paris",),
            max_new_tokens=8,
        ),
        Case(
            "agreement",
            "minimal_pair",
            group="agreement",
            good="The dogs bark.",
            bad="The dogs barks.",
            **of_all | {"category": "grammar"},
        ),
        Case(
            "rain",
            "schema",
            group="rain",
            contexts=("It rains, so", "It shines, so"),
            continuation=" we swim.",
            gold=1,
            **of_all,
        ),
        Case(
            "counting",
            "generate",
            group="counting",
            prompt="1, 2, 3,",
            match=r"^\s*4",
            forbid="3, 4, 3",
            **of_all,
        ),
        Case("some", "text", group="some", text="Some text.", **of_all),
        Case("whole", "text", group="whole", file="data/val.txt", **of_all),
    )
    assert suite.name == "all"
    assert suite.positions == tuple(f"s.yaml:{line}" for line in (6, 8, 17, 19, 21, 22, 23))
    assert suite.sha256 == sha256(EVERY_TYPE.encode()).hexdigest()


def test_the_bare_list_of_names_prompts_and_targets_is_a_suite():
    text = """\
- {name: a, prompt: p, target: " t"}
- name: b
  prompt: q
  target: [" t", " u"]
  category: other
  distractors: [" v"]
"""
    suite = read_suite(text, "short.yaml")
    assert suite.cases == (
        Case("a", category="short", group="a", prompt="p", answers=(" t",)),
        Case(
            "b", category="other", group="b", prompt="q", answers=(" t", " u"), distractors=(" v",)
        ),
    )
    assert (suite.name, suite.positions) == ("short", ("short.yaml:1", "short.yaml:2"))
    named = read_suite(
        "schema: 1\ncases:\n- {name: a, prompt: p, target: ' t'}\n",
        "named.yaml",
    )
    assert named.cases == (Case("a", category="named", group="a", prompt="p", answers=(" t",)),)


def test_a_suite_may_be_json():
    cases = [
        {"id": "a", "prompt": 'say "é" \\ one', "answers": [" t"]},
        {"id": "b", "type": "minimal_pair", "good": "x\ty", "bad": "x\nz/"},
    ]
    plain = read_suite(json.dumps({"schema": 1, "name": "j", "cases": cases}), "s.json")
    spread = read_suite(
        json.dumps({"schema": 1, "name": "j", "cases": cases}, indent=2, ensure_ascii=False),
        "t.json",
    )
    assert plain.cases == spread.cases
    assert [case.prompt or case.good for case in plain.cases] == ['say "é" \\ one', "x\ty"]
    assert plain.cases[1].bad == "x\nz/"
    assert spread.positions[1] == "t.json:12"
    with pytest.raises(UserError, match="u.json:3: 'b' is of type minimal_pair, which needs bad"):
        read_suite(
            '[{"name": "a", "prompt": "p", "target": " t"},\n\n'
            '{"id": "b", "type": "minimal_pair", "good": "g"}]',
            "u.json",
        )


def test_the_candidates_are_the_right_ones_first():
    case = Case("x", "schema", contexts=("a", "b", "c"), continuation=" d", gold=1)
    assert case.candidates == (("b", " d"), ("a", " d"), ("c", " d"))
    case = Case("x", prompt="p", answers=(" a", " b"), distractors=(" c",))
    assert (case.candidates, case.n_right) == ((("p", " a"), ("p", " b"), ("p", " c")), 2)
    assert Case("x", "minimal_pair", good="g", bad="b").candidates == (("", "g"), ("", "b"))
    assert (
        Case("x", "generate", prompt="p", match="m").candidates
        == Case("x", "text", text="t").candidates
        == ()
    )


# of three lines; the next case is in the fourth
SUITE = "schema: 1\ncases:\n- {id: z, prompt: z, answers: [' z']}\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "s.yaml: a suite is a list of cases"),
        ("[]", "a suite is a list of cases"),
        ("a: 1", "a suite is a list of cases"),
        ("schema: 1\ncases: []", "a suite is a list of cases"),
        ("- 3", "s.yaml:1: a case is {id, type, ...} or {name, prompt, target}, not 3"),
        (
            "cases: [{id: a, prompt: p, answers: [' t']}]",
            "s.yaml: schema is None; this program reads schema 1",
        ),
        (
            "schema: 2\ncases: [{id: a, prompt: p, answers: [' t']}]",
            "schema is 2; this program reads schema 1",
        ),
        (
            "schema: 1\nauthor: me\ncases: [{id: a}]",
            "s.yaml:2: a suite has no key 'author'; the choices are schema, name, license",
        ),
        (
            "schema: 1\ndefaults: [a]\ncases: [{id: a, prompt: p, answers: [' t']}]",
            "s.yaml:2: defaults are fields of a case",
        ),
        (
            "schema: 1\ndefaults: {scorng: sum}\ncases:\n- {id: a, prompt: p, answers: [' t']}",
            "did you mean scoring?",
        ),
        (
            "schema: 1\ndefaults: {scoring: best}\ncases:\n- {id: a, prompt: p, answers: [' t']}",
            "scoring is 'best'; it should be 'sum'",
        ),
        (
            '- {name: a, prompt: p, target: " t"}\n- {name: a, prompt: q, target: " u"}',
            "s.yaml:2: the id of 'a' is already at s.yaml:1; change or remove one",
        ),
        (
            '- {name: a, prompt: p, target: " t"}\n'
            '- {name: b, prompt: p, target: " t", category: c}',
            "s.yaml:2: the question of 'b' is already at s.yaml:1; change or remove one",
        ),
        ('- {name: a, prompt: "", target: " t"}', "s.yaml:1: 'a' has an empty text"),
        ("- {name: a, prompt: p, target: ' '}", "'a' has an empty text"),
        ("- {name: a, prompt: p, target: []}", "'a' has an empty text"),
        ("- {name: a, prompt: p, target: [' t', '']}", "'a' has an empty text"),
        ("- {name: a, prompt: p}", "s.yaml:1: the case has no id"),
        ("- {prompt: p, target: ' t'}", "s.yaml:1: the case has no name"),
        ("- {id: a, prompt: p}", "s.yaml:1: 'a' is of type cloze, which needs answers"),
        ("- {name: a, prompt: p, target: 12}", "s.yaml:1: 0.answers is [12]"),
        (
            "- {name: a, prompt: 12, target: ' t'}",
            "s.yaml:1: 0.prompt is 12; it should be a valid string",
        ),
        ("- name: a\n  target: ' t'\n  prompt: 12", "s.yaml:3: 0.prompt is 12"),
        ("- {id: 12, prompt: p, answers: [' t']}", "0.id is 12; it should be a valid string"),
        (
            '- {name: a, promt: p, target: " t"}',
            "s.yaml:1: 0 has no key 'promt'; did you mean prompt?",
        ),
        ("- {name: a, name: b}", "s.yaml:1: 0.name is already set at s.yaml:1"),
        ("- {name: [", "not valid YAML"),
        (
            SUITE + "- {id: b, type: text, text: t}\n- {id: z, type: text, text: u}",
            "s.yaml:5: the id of 'z' is already at s.yaml:3",
        ),
        (
            SUITE + "- {id: b, type: riddle}",
            "s.yaml:4: cases.1.type is 'riddle'; it should be 'cloze', 'choice'",
        ),
        (
            SUITE + "- {id: b, type: choice, prompt: p, answers: [' t']}",
            "s.yaml:4: 'b' is of type choice, which needs distractors",
        ),
        (
            SUITE + "- {id: b, type: choice, prompt: p, answers: [' t'], distractors: []}",
            "s.yaml:4: 'b' has an empty text",
        ),
        (
            SUITE + "- {id: b, type: choice}",
            "'b' is of type choice, which needs answers and distractors and prompt",
        ),
        (
            SUITE + "- {id: b, type: minimal_pair, good: g, bad: b, prompt: p}",
            "'b' is of type minimal_pair, which has no prompt",
        ),
        (
            SUITE + "- {id: b, type: generate, prompt: p, match: m, answers: [a]}",
            "'b' is of type generate, which has no answers",
        ),
        (
            SUITE + "- {id: b, type: generate, prompt: p, match: '('}",
            "'b' has the pattern '(', which is not a regular expression",
        ),
        (
            SUITE + "- {id: b, type: generate, prompt: p, match: m, forbid: '*'}",
            "has the pattern '*'",
        ),
        (
            SUITE + "- {id: b, type: generate, prompt: p, match: m, max_new_tokens: 0}",
            "s.yaml:4: cases.1.max_new_tokens is 0",
        ),
        (
            SUITE + "- {id: b, type: schema, contexts: [c], continuation: d}",
            "s.yaml:4: 'b' needs two contexts or more",
        ),
        (
            SUITE + "- {id: b, type: schema, contexts: [c, d], continuation: e, gold: 2}",
            "'b' needs two contexts or more, and gold",
        ),
        (
            SUITE + "- {id: b, type: schema, contexts: [c, d], continuation: e, gold: -1}",
            "'b' needs two contexts or more, and gold",
        ),
        (
            SUITE + "- {id: b, type: schema, contexts: [c, d], continuation: e, gold: true}",
            "cases.1.gold is True",
        ),
        (
            SUITE + "- {id: b, type: text}",
            "s.yaml:4: 'b' is of type text, which needs either text or file",
        ),
        (
            SUITE + "- {id: b, type: text, text: t, file: f}",
            "'b' is of type text, which needs either text or file",
        ),
        (
            SUITE + "- {id: b, type: text, text: t, scoring: sum}",
            "'b' is of type text, which has no scoring",
        ),
        (
            SUITE + "- {id: b, type: minimal_pair, good: g, bad: b, scoring: pmi}",
            "'b' is of type minimal_pair, which is not scored by pmi",
        ),
        (
            SUITE + "- {id: b, type: schema, contexts: [c, d], continuation: e, scoring: pmi}",
            "of type schema, which is not scored by pmi",
        ),
        (
            SUITE + "- {id: b, prompt: p, answers: [' t'], negative: 1}",
            "cases.1.negative is 1; it should be a valid boolean",
        ),
        (SUITE + "- {id: b, prompt: p, answers: ' t'}", "cases.1.answers is ' t'; it should be"),
    ],
)
def test_a_wrong_suite_is_refused_with_its_line(text, message):
    with pytest.raises(UserError) as error:
        read_suite(text)
    assert message in str(error.value)
    assert str(error.value).startswith("s.yaml")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read the cases .*none.yaml: .*No such file"):
        load_suite(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("- é".encode("latin-1"))
    with pytest.raises(UserError, match="cannot read the cases .*latin.yaml"):
        load_suite(tmp_path / "latin.yaml")


def test_a_default_that_a_type_does_not_have_is_ignored():
    text = """\
schema: 1
defaults: {scoring: pmi}
cases:
- {id: a, type: text, text: t}
- {id: b, type: generate, prompt: p, match: m}
"""
    assert len(read_suite(text).cases) == 2


# ---- several suites ----


def test_suites_are_joined_in_their_order():
    first = read_suite('- {name: a, prompt: p, target: " t"}', "one.yaml")
    second = read_suite('- {name: b, prompt: q, target: " t"}', "two.yaml")
    assert merge_suites([first]) is first
    both = merge_suites([first, second])
    assert (both.name, [case.id for case in both.cases], both.positions) == (
        "one + two",
        ["a", "b"],
        ("one.yaml:1", "two.yaml:1"),
    )
    assert (
        merge_suites([first, second]).sha256 == both.sha256 != merge_suites([second, first]).sha256
    )


def test_an_id_or_a_question_that_stands_in_two_suites_is_refused_with_both_places():
    first = read_suite('\n- {name: a, prompt: p, target: " t"}', "one.yaml")
    same_id = read_suite('- {name: a, prompt: q, target: " t"}', "two.yaml")
    same_question = read_suite('- {name: b, prompt: p, target: " t"}', "three.yaml")
    with pytest.raises(
        UserError,
        match="two.yaml:1: the id of 'a' is already at one.yaml:2; change or remove one",
    ):
        merge_suites([first, same_id])
    with pytest.raises(
        UserError, match="three.yaml:1: the question of 'b' is already at one.yaml:2"
    ):
        merge_suites([first, same_question])
    between = read_suite('- {name: c, prompt: r, target: " t"}', "four.yaml")
    with pytest.raises(
        UserError, match="three.yaml:1: the question of 'b' is already at one.yaml:2"
    ):
        merge_suites([first, between, same_question])
