"""Suites are read as they are meant, and what cannot be meant is refused with its line."""

import csv
import io
import json
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

import evaluate_checkpoints
from pocketlm.errors import UserError
from pocketlm.evaluation.cases import (
    FEWEST,
    Case,
    Suite,
    lint,
    load_suite,
    merge_suites,
    read_blimp,
)
from tests.support.bigrams import make_checkpoint

ROOT = Path(__file__).parents[2]
SUITES = sorted((ROOT / "cases").glob("*.yaml"))
WIKI_BASICS = ROOT / "cases/wiki_basics.yaml"

EVERY_TYPE = """\
schema: 1
name: all
license: CC0-1.0
defaults: {category: of all, scoring: byte, max_new_tokens: 8}
cases:
  - {id: capital, group: france, source: "France is", prompt: "The capital of France is", answers: [" Paris"], pmi_prompt: "It is"}
  - id: choice
    type: choice
    negative: true
    echo: true
    joined: true
    scoring: pmi
    prompt: "Paris is not"
    answers: [" Rome", " Lima"]
    distractors: [" Paris"]
  - {id: agreement, type: minimal_pair, category: grammar, good: "The dogs bark.", bad: "The dogs barks."}
  - {id: rain, type: schema, contexts: ["It rains, so", "It shines, so"], continuation: " we swim.", gold: 1}
  - {id: counting, type: generate, prompt: "1, 2, 3,", match: '^\\s*4', forbid: "3, 4, 3"}
  - {id: some, type: text, text: "Some text."}
  - {id: whole, type: text, file: data/val.txt}
"""


def read(tmp_path: Path, monkeypatch, text: str, name: str = "s.yaml") -> Suite:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text, encoding="utf-8")
    return load_suite(name)


# ---- reading ----


def test_every_type_of_case_is_read_with_its_fields_the_suite_s_defaults_and_its_line(
    tmp_path, monkeypatch
):
    suite = read(tmp_path, monkeypatch, EVERY_TYPE)
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
    assert suite.places == tuple(f"s.yaml:{line}" for line in (6, 7, 16, 17, 18, 19, 20))
    assert suite.sha256 == sha256(EVERY_TYPE.encode()).hexdigest()


def test_the_bare_list_of_names_prompts_and_targets_is_a_suite(tmp_path, monkeypatch):
    text = '- {name: a, prompt: p, target: " t"}\n- name: b\n  prompt: q\n  target: [" t", " u"]\n  category: other\n  distractors: [" v"]\n'
    suite = read(tmp_path, monkeypatch, text, "short.yaml")
    assert suite.cases == (
        Case("a", category="short", group="a", prompt="p", answers=(" t",)),
        Case(
            "b", category="other", group="b", prompt="q", answers=(" t", " u"), distractors=(" v",)
        ),
    )
    assert (suite.name, suite.places) == ("short", ("short.yaml:1", "short.yaml:2"))
    named = read(
        tmp_path,
        monkeypatch,
        "schema: 1\ncases:\n- {name: a, prompt: p, target: ' t'}\n",
        "named.yaml",
    )
    assert named.cases == (Case("a", category="named", group="a", prompt="p", answers=(" t",)),)


def test_a_suite_may_be_json(tmp_path, monkeypatch):
    cases = [
        {"id": "a", "prompt": 'say "é" \\ one', "answers": [" t"]},
        {"id": "b", "type": "minimal_pair", "good": "x\ty", "bad": "x\nz/"},
    ]
    plain = read(
        tmp_path, monkeypatch, json.dumps({"schema": 1, "name": "j", "cases": cases}), "s.json"
    )
    spread = read(
        tmp_path,
        monkeypatch,
        json.dumps({"schema": 1, "name": "j", "cases": cases}, indent=2, ensure_ascii=False),
        "t.json",
    )
    assert plain.cases == spread.cases
    assert [case.prompt or case.good for case in plain.cases] == ['say "é" \\ one', "x\ty"]
    assert plain.cases[1].bad == "x\nz/"
    assert spread.places[1] == "t.json:12"
    with pytest.raises(UserError, match="u.json:3: 'b' is of type minimal_pair, which needs bad"):
        read(
            tmp_path,
            monkeypatch,
            '[{"name": "a", "prompt": "p", "target": " t"},\n\n{"id": "b", "type": "minimal_pair", "good": "g"}]',
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


SUITE = "schema: 1\ncases:\n- {id: z, prompt: z, answers: [' z']}\n"  # three lines, and the next case stands in the fourth


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
            "a suite has schema, name, license, defaults and cases, but no author",
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
            "s.yaml:2: the id of 'a' stands already at s.yaml:1; change or remove one",
        ),
        (
            '- {name: a, prompt: p, target: " t"}\n- {name: b, prompt: p, target: " t", category: c}',
            "s.yaml:2: the question of 'b' stands already at s.yaml:1; change or remove one",
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
        ("- {name: a, name: b}", "stands already"),
        ("- {name: [", "not valid YAML"),
        (
            SUITE + "- {id: b, type: text, text: t}\n- {id: z, type: text, text: u}",
            "s.yaml:5: the id of 'z' stands already at s.yaml:3",
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
def test_a_wrong_suite_is_refused_with_its_line(tmp_path, monkeypatch, text, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, monkeypatch, text)
    assert message in str(error.value)
    assert str(error.value).startswith("s.yaml")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read the cases .*none.yaml: .*No such file"):
        load_suite(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("- é".encode("latin-1"))
    with pytest.raises(UserError, match="cannot read the cases .*latin.yaml"):
        load_suite(tmp_path / "latin.yaml")


def test_a_default_that_a_type_has_no_use_for_is_not_held_against_it(tmp_path, monkeypatch):
    text = "schema: 1\ndefaults: {scoring: pmi}\ncases:\n- {id: a, type: text, text: t}\n- {id: b, type: generate, prompt: p, match: m}\n"
    assert len(read(tmp_path, monkeypatch, text).cases) == 2


# ---- several suites ----


def test_suites_are_joined_in_their_order(tmp_path, monkeypatch):
    first = read(tmp_path, monkeypatch, '- {name: a, prompt: p, target: " t"}', "one.yaml")
    second = read(tmp_path, monkeypatch, '- {name: b, prompt: q, target: " t"}', "two.yaml")
    assert merge_suites([first]) is first
    both = merge_suites([first, second])
    assert (both.name, [case.id for case in both.cases], both.places) == (
        "one + two",
        ["a", "b"],
        ("one.yaml:1", "two.yaml:1"),
    )
    assert (
        merge_suites([first, second]).sha256 == both.sha256 != merge_suites([second, first]).sha256
    )


def test_an_id_or_a_question_that_stands_in_two_suites_is_refused_with_both_places(
    tmp_path, monkeypatch
):
    first = read(tmp_path, monkeypatch, '\n- {name: a, prompt: p, target: " t"}', "one.yaml")
    same_id = read(tmp_path, monkeypatch, '- {name: a, prompt: q, target: " t"}', "two.yaml")
    same_question = read(
        tmp_path, monkeypatch, '- {name: b, prompt: p, target: " t"}', "three.yaml"
    )
    with pytest.raises(
        UserError,
        match="two.yaml:1: the id of 'a' stands already at one.yaml:2; change or remove one",
    ):
        merge_suites([first, same_id])
    with pytest.raises(
        UserError, match="three.yaml:1: the question of 'b' stands already at one.yaml:2"
    ):
        merge_suites([first, same_question])
    between = read(tmp_path, monkeypatch, '- {name: c, prompt: r, target: " t"}', "four.yaml")
    with pytest.raises(
        UserError, match="three.yaml:1: the question of 'b' stands already at one.yaml:2"
    ):
        merge_suites([first, between, same_question])


# ---- what is wrong with a suite ----

CLEAN = "".join(
    f"- {{id: c{i}, prompt: 'Number {i} is', answers: [' good'], distractors: [' bad']}}\n"
    for i in range(FEWEST)
)


@pytest.mark.parametrize(
    "case, problem",
    [
        (
            "prompt: 'ab ', answers: ['c']",
            "the prompt 'ab ' ends in a space, which belongs to the answer",
        ),
        (
            "prompt: 'ab', answers: ['c']",
            "the answer 'c' has no leading space; write ' c', or joined: true where none is meant",
        ),
        (
            "prompt: 'ab', answers: [' c'], distractors: ['d']",
            "the answer 'd' has no leading space",
        ),
        (
            "prompt: 'It is ab or c:', answers: [' ab']",
            "the answer ' ab' stands in the prompt, where it can be copied from",
        ),
        ("prompt: 'It is Ab.', answers: [' aB']", "the answer ' aB' stands in the prompt"),
        (
            "prompt: 'By', answers: [' Rome'], distractors: [' Romeo']",
            "' Rome' and ' Romeo' begin alike, and the shorter one",
        ),
        (
            "prompt: 'By', answers: [' Romeo'], distractors: [' Rome']",
            "' Romeo' and ' Rome' begin alike",
        ),
        (
            "prompt: 'By', answers: [' a'], distractors: [' b', ' b']",
            "two of its candidates are the same",
        ),
        ("type: minimal_pair, good: 'A b.', bad: 'A b.'", "two of its candidates are the same"),
        (
            "type: schema, contexts: ['a', 'b '], continuation: ' c'",
            "the prompt 'b ' ends in a space",
        ),
        (
            "type: schema, contexts: ['a', 'b'], continuation: 'c'",
            "the answer 'c' has no leading space",
        ),
        ("type: generate, prompt: 'a ', match: 'b'", "the prompt 'a ' ends in a space"),
    ],
)
def test_a_suite_is_validated_line_by_line(tmp_path, monkeypatch, capsys, case, problem):
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(f"{CLEAN}- {{id: it, {case}}}\n")
    assert evaluate_checkpoints.main(["--cases", "s.yaml", "--validate-only"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"s.yaml:{FEWEST + 1}: it: {problem}") for line in lines), lines
    assert lines[-1] == f"{FEWEST + 1} cases, {len(lines) - 1} problems"
    assert all(line.startswith(f"s.yaml:{FEWEST + 1}: it: ") for line in lines[:-1])


@pytest.mark.parametrize(
    "case",
    [
        "prompt: 'ab-', answers: ['c'], joined: true",
        "prompt: 'He said \"', answers: ['c']",
        "prompt: '2 + 2 (', answers: ['four']",
        'prompt: "line\\n", answers: ["c"]',
        "prompt: 'ab', answers: ['.']",
        "prompt: 'ab ab', answers: [' ab'], echo: true",
        "prompt: 'Berlin is', answers: [' in']",
        "prompt: 'By', answers: [' Rome.'], distractors: [' Romeo.']",
        "type: minimal_pair, good: 'A b.', bad: 'A c.'",
        "type: text, text: 'Some text. '",
        "type: text, category: texts, text: 'Some text.'",
    ],
)
def test_what_is_meant_is_no_problem(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(f"{CLEAN}- {{id: it, {case}}}\n")
    assert evaluate_checkpoints.main(["--cases", "s.yaml", "--validate-only"]) == 0
    assert capsys.readouterr().out == f"{FEWEST + 1} cases, 0 problems\n"


def test_a_category_of_few_cases_is_a_problem_unless_another_suite_adds_to_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    lines = CLEAN.splitlines(keepends=True)
    Path("few.yaml").write_text("# a comment\nschema: 1\nname: s\ncases:\n" + "".join(lines[:4]))
    Path("more.yaml").write_text("schema: 1\nname: s\ncases:\n" + "".join(lines[4:]))
    assert evaluate_checkpoints.main(["--cases", "few.yaml", "--validate-only"]) == 2
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "few.yaml:5: the category 's' has 4 cases; of fewer than 10 no interval says anything",
        "4 cases, 1 problems",
    ]
    assert evaluate_checkpoints.main(["--cases", "few.yaml", "more.yaml", "--validate-only"]) == 0
    assert capsys.readouterr().out == "10 cases, 0 problems\n"


# ---- BLiMP ----


def line(number: int, uid: str = "anaphor_agreement", **changes) -> str:
    """A line as BLiMP's own files have it."""
    row = {
        "sentence_good": f"Many girls insulted themselves {number}.",
        "sentence_bad": f"Many girls insulted herself {number}.",
        "field": "morphology",
        "linguistics_term": "anaphor_agreement",
        "UID": uid,
        "simple_LM_method": True,
        "one_prefix_method": True,
        "two_prefix_method": False,
        "lexically_identical": False,
        "pairID": str(number),
    }
    return (
        json.dumps({key: value for key, value in (row | changes).items() if value is not None})
        + "\n"
    )


def write_blimp(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data/b.jsonl").write_text(line(0) + line(1), encoding="utf-8")
    accented = line(
        0, "wh_island", sentence_good="Un café\u2028 noir.", sentence_bad="Un café."
    )  # a line's end in Unicode, not here
    (folder / "data/a.jsonl").write_text(
        json.dumps(json.loads(accented), ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / "data/._a.jsonl").write_bytes(b"\x00\x05\x16\x07\xb0")  # what a Mac puts into a zip
    with zipfile.ZipFile(folder / "BLiMP.zip", "w") as archive:
        for name in ("b.jsonl", "a.jsonl", "._a.jsonl"):
            archive.write(folder / "data" / name, f"data/{name}")
        archive.writestr("__MACOSX/data/._b.jsonl", b"\x00\x05\x16\x07\xb0")
        archive.writestr("data/readme.txt", "no line of BLiMP")


def test_blimp_is_read_from_its_folder_and_from_its_zip(tmp_path):
    write_blimp(tmp_path)
    folder, archive = read_blimp(tmp_path / "data"), read_blimp(tmp_path / "BLiMP.zip")
    pairs = [
        (f"Many girls insulted themselves {i}.", f"Many girls insulted herself {i}.")
        for i in range(2)
    ]
    expected = [("wh_island-0", "wh_island", "Un café\u2028 noir.", "Un café.")]
    expected += [
        (f"anaphor_agreement-{i}", "anaphor_agreement", *pair) for i, pair in enumerate(pairs)
    ]
    assert folder.cases == archive.cases
    assert list(folder.cases) == [
        Case(name, "minimal_pair", uid, name, good=good, bad=bad)
        for name, uid, good, bad in expected
    ]
    assert archive.places == ("data/a.jsonl:1", "data/b.jsonl:1", "data/b.jsonl:2")
    assert folder.sha256 == archive.sha256
    assert all(case.chance == 0.5 for case in folder.cases)


@pytest.mark.parametrize(
    "wrong", [line(1, sentence_bad=None), line(1, UID=None), "{\n", "[1]\n", "3\n", "\n"]
)
def test_a_line_that_is_not_blimp_s_is_refused_with_its_number(tmp_path, wrong):
    (tmp_path / "x.jsonl").write_text(line(0) + wrong)
    with pytest.raises(
        UserError,
        match="x.jsonl:2: not a line of BLiMP: it has sentence_good, sentence_bad, UID and pairID",
    ):
        read_blimp(tmp_path)
    (tmp_path / "x.jsonl").write_bytes(line(0).encode() + b'{"UID": "\xb0"}\n')
    with pytest.raises(UserError, match="x.jsonl:2: not a line of BLiMP"):
        read_blimp(tmp_path)


def test_a_place_without_blimp_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="--blimp .* holds no .jsonl file; give BLiMP's folder data/, or its zip"
    ):
        read_blimp(tmp_path)
    for path in (tmp_path / "none", Path(__file__)):
        with pytest.raises(
            UserError, match="--blimp .* is not a folder or a zip file that can be read"
        ):
            read_blimp(path)


def test_blimp_repeats_itself_and_stands_beside_other_suites_all_the_same(tmp_path, monkeypatch):
    """A pair of the real one stands in two paradigms; what stands in another suite as well is still refused."""
    twin = dict(sentence_good="The men dig.", sentence_bad="The men digs.")
    (tmp_path / "x.jsonl").write_text(line(0, "regular", **twin) + line(1, "irregular", **twin))
    own = read(tmp_path, monkeypatch, '- {name: a, prompt: p, target: " t"}')
    assert len(merge_suites([own, read_blimp(tmp_path)]).cases) == 3
    pair = read(
        tmp_path,
        monkeypatch,
        "- {id: a, type: minimal_pair, good: The men dig., bad: The men digs.}",
    )
    with pytest.raises(
        UserError, match=r"x.jsonl:1: the question of 'regular-0' stands already at s.yaml:1"
    ):
        merge_suites([pair, read_blimp(tmp_path)])


def test_blimp_is_scored_paradigm_by_paradigm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_blimp(tmp_path)
    make_checkpoint("a.ckpt", "", context=40)
    assert (
        evaluate_checkpoints.main(["--checkpoints", "a.ckpt", "--blimp", "BLiMP.zip", "--csv"]) == 0
    )
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["case"], row["category"]) for row in rows] == [
        ("wh_island-0", "wh_island"),
        ("anaphor_agreement-0", "anaphor_agreement"),
        ("anaphor_agreement-1", "anaphor_agreement"),
    ]


# ---- the suites that are shipped ----


@pytest.fixture(scope="module")
def wiki() -> list[str]:
    from pocketlm.corpus.named import CORPORA

    return list(CORPORA["wiki"](str(ROOT / "data")))


def stated(suite: Suite, documents: list[str]) -> list[tuple[Case, str]]:
    """Each case that names a source, and the one document that begins with it."""
    found = []
    for case in suite.cases:
        if case.source:
            [document] = [d for d in documents if d.startswith(case.source)]
            found.append((case, document))
    return found


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_shipped_suite_has_no_problem_and_its_sources_state_its_answers(path, wiki):
    """Each source begins exactly one document of the corpus, and that document holds the answer."""
    suite = load_suite(path)
    if path != WIKI_BASICS:
        assert list(lint(suite)) == []
    for case, document in stated(suite, wiki):
        if case.answers and not case.negative:
            assert any(answer.strip() in document for answer in case.answers), case.id


def test_the_shipped_cases_are_all_different():
    assert merge_suites(load_suite(path) for path in SUITES).cases


def test_the_shipped_cases_on_wikipedia_are_of_documents_that_are_trained_on(wiki):
    from pocketlm.corpus.chunks import is_validation

    suite = load_suite(WIKI_BASICS)
    found = stated(suite, wiki)
    assert len(found) == len(suite.cases) >= 24
    for case, document in found:
        [answer] = case.answers
        assert not is_validation(document, 0.05), case.id
        assert answer.startswith(" ")
        assert not case.prompt.endswith(" ")
        assert answer not in case.prompt
