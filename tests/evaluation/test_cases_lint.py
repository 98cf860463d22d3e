"""Linting: probable mistakes are listed with their line, and the shipped suites have none."""

from pathlib import Path

import pytest

import evaluate_checkpoints
from pocketlm.corpus.chunks import is_validation
from pocketlm.corpus.named import CORPORA
from pocketlm.evaluation.cases import MIN_CASES, Case, Suite, load_suite, merge_suites

ROOT = Path(__file__).parents[2]
SUITES = sorted((ROOT / "cases").glob("*.yaml"))
WIKI_BASICS = ROOT / "cases/wiki_basics.yaml"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def validate(*paths: str) -> int:
    """Return the exit status of --validate-only."""
    return evaluate_checkpoints.main(["--cases", *paths, "--validate-only"])


# ---- linting ----

CLEAN = "".join(
    f"- {{id: c{i}, prompt: 'Number {i} is', answers: [' good'], distractors: [' bad']}}\n"
    for i in range(MIN_CASES)
)
SAME = "two of its candidates are the same, so no model can tell them apart"
NO_SPACE = "has no leading space; write"
COPIED = "can be copied from the prompt; change the prompt, or write echo: true"
PREFIX = "' Rome' begins ' Romeo' and so includes its probability; change one"


@pytest.mark.parametrize(
    "case, problem",
    [
        ("prompt: 'ab ', answers: ['c']", "the prompt 'ab ' ends with a space; move it"),
        ("prompt: 'ab', answers: ['c']", f"the answer 'c' {NO_SPACE} ' c', or joined: true"),
        ("prompt: 'ab', answers: [' c'], distractors: ['d']", f"the answer 'd' {NO_SPACE}"),
        ("prompt: 'It is ab or c:', answers: [' ab']", f"the answer ' ab' {COPIED}"),
        ("prompt: 'It is Ab.', answers: [' aB']", f"the answer ' aB' {COPIED}"),
        ("prompt: 'By', answers: [' Rome'], distractors: [' Romeo']", PREFIX),
        ("prompt: 'By', answers: [' Romeo'], distractors: [' Rome']", PREFIX),
        ("prompt: 'By', answers: [' a'], distractors: [' b', ' b']", SAME),
        ("type: minimal_pair, good: 'A b.', bad: 'A b.'", SAME),
        (
            "type: schema, contexts: ['a', 'b '], continuation: ' c'",
            "the prompt 'b ' ends with a space",
        ),
        (
            "type: schema, contexts: ['a', 'b'], continuation: 'c'",
            f"the answer 'c' {NO_SPACE}",
        ),
        ("type: generate, prompt: 'a ', match: 'b'", "the prompt 'a ' ends with a space"),
    ],
)
def test_a_probable_mistake_is_listed_with_its_line(capsys, case, problem):
    Path("s.yaml").write_text(f"{CLEAN}- {{id: it, {case}}}\n")
    assert validate("s.yaml") == evaluate_checkpoints.INVALID
    *lines, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"s.yaml:{MIN_CASES + 1}: it: {problem}") for line in lines), lines
    assert last == f"{MIN_CASES + 1} cases, {len(lines)} problems"
    assert all(line.startswith(f"s.yaml:{MIN_CASES + 1}: it: ") for line in lines)


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
def test_what_is_intended_is_no_problem(capsys, case):
    Path("s.yaml").write_text(f"{CLEAN}- {{id: it, {case}}}\n")
    assert validate("s.yaml") == 0
    assert capsys.readouterr().out == f"{MIN_CASES + 1} cases, 0 problems\n"


def test_a_category_of_few_cases_is_a_problem_unless_another_suite_adds_to_it(capsys):
    lines = CLEAN.splitlines(keepends=True)
    Path("few.yaml").write_text("# a comment\nschema: 1\nname: s\ncases:\n" + "".join(lines[:4]))
    Path("more.yaml").write_text("schema: 1\nname: s\ncases:\n" + "".join(lines[4:]))
    assert validate("few.yaml") == evaluate_checkpoints.INVALID
    assert capsys.readouterr().out.splitlines() == [
        "few.yaml:5: the category 's' has 4 cases; an interval needs 10 or more",
        "4 cases, 1 problems",
    ]
    assert validate("few.yaml", "more.yaml") == 0
    assert capsys.readouterr().out == "10 cases, 0 problems\n"


# ---- the shipped suites ----


@pytest.fixture(scope="module")
def wiki() -> list[str]:
    """The documents of the default corpus."""
    return list(CORPORA["wiki"](str(ROOT / "data")))


def sources(suite: Suite, documents: list[str]) -> list[tuple[Case, str]]:
    """Return each case that names a source with the one document that starts with it."""
    pairs = []
    for case in suite.cases:
        if case.source:
            [document] = [d for d in documents if d.startswith(case.source)]
            pairs.append((case, document))
    return pairs


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_shipped_suite_has_no_problem(path, capsys):
    assert validate(str(path)) == 0
    assert capsys.readouterr().out == f"{len(load_suite(path).cases)} cases, 0 problems\n"


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_sources_of_a_shipped_suite_state_its_answers(path, wiki):
    """Each source starts exactly one document of the corpus, which contains the answer."""
    for case, document in sources(load_suite(path), wiki):
        if case.answers and not case.negative:
            assert any(answer.strip() in document for answer in case.answers), case.id


def test_the_shipped_cases_are_all_different():
    assert merge_suites(load_suite(path) for path in SUITES).cases


def test_the_facts_of_wiki_basics_are_all_stated_in_training_documents(wiki):
    suite = load_suite(WIKI_BASICS)
    pairs = sources(suite, wiki)
    assert len(pairs) == len(suite.cases) == 60
    for case, document in pairs:
        [answer] = case.answers
        assert not is_validation(document, 0.05), case.id
        assert answer.startswith(" ")
        assert answer not in case.prompt
