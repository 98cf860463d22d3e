"""Probe suites: what a case is, reading YAML, JSON and BLiMP, and finding what is wrong with a suite.

A suite is `{schema: 1, name, license, defaults, cases: [...]}`, or a bare list of `{name, prompt, target}`. The types of case:

    cloze, choice   prompt, answers [, distractors]    an accepted answer is the likeliest of the candidates, or is what greedy
                                                       generation writes where there are no distractors
    minimal_pair    good, bad                          the good text is likelier than the bad one
    schema          contexts, continuation, gold       the continuation is likelier after contexts[gold] than after the others
    generate        prompt, match [, forbid]           the text generated greedily matches one pattern and not the other
    text            text or file                       no right and wrong: its bits per byte
"""

import glob
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any, Literal

from pocketlm.config.strict_yaml import build, parse_yaml
from pocketlm.errors import FieldError, UserError

FEWEST = 10  # cases in a category, below which an interval says nothing


@dataclass(frozen=True)
class Case:
    """One probe. Which fields a type has, FIELDS says."""

    id: str
    type: Literal["cloze", "choice", "minimal_pair", "schema", "generate", "text"] = "cloze"
    category: str = ""  # empty: the suite's name
    group: str = ""  # cases about the same thing, which are not independent of each other; empty: the case by itself
    source: str = ""  # where the fact is stated
    negative: bool = False  # the prompt negates
    echo: bool = False  # the answer stands in the prompt, and is meant to
    joined: bool = False  # the answer goes on without a space, and is meant to
    scoring: Literal["sum", "token", "byte", "pmi"] = "sum"  # what makes a candidate the likeliest
    prompt: str = ""
    answers: tuple[str, ...] = ()  # any of them is right; with their leading space
    distractors: tuple[str, ...] = ()
    pmi_prompt: str = ""  # for pmi: what the answers' likelihood by themselves is taken after; empty: the begin of a document
    good: str = ""
    bad: str = ""
    contexts: tuple[str, ...] = ()
    continuation: str = ""
    gold: int = 0
    match: str = ""
    forbid: str = ""
    max_new_tokens: int = 20
    text: str = ""
    file: str = ""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise FieldError("max_new_tokens", f"is {self.max_new_tokens}; it must be 1 or more")

    @property
    def candidates(self) -> tuple[tuple[str, str], ...]:
        """(context, continuation) of each thing to compare, the right ones first."""
        match self.type:
            case "cloze" | "choice":
                return tuple((self.prompt, answer) for answer in (*self.answers, *self.distractors))
            case "minimal_pair":
                return ("", self.good), ("", self.bad)
            case "schema":
                wrong = [c for i, c in enumerate(self.contexts) if i != self.gold]
                return tuple(
                    (context, self.continuation) for context in (self.contexts[self.gold], *wrong)
                )
        return ()

    @property
    def n_right(self) -> int:
        """How many of the candidates are right."""
        return len(self.answers) or 1

    @property
    def chance(self) -> float | None:
        """What guessing scores; None where there is nothing to choose from."""
        n = len(self.candidates)
        return self.n_right / n if n > self.n_right else None


ANY = {"id", "type", "category", "group", "source", "negative", "echo", "joined"}


FIELDS: dict[str, tuple[set[str], set[str]]] = {  # type: fields it must have, fields it may have
    "cloze": ({"prompt", "answers"}, {"distractors", "scoring", "pmi_prompt"}),
    "choice": ({"prompt", "answers", "distractors"}, {"scoring", "pmi_prompt"}),
    "minimal_pair": ({"good", "bad"}, {"scoring"}),
    "schema": ({"contexts", "continuation"}, {"gold", "scoring"}),
    "generate": ({"prompt", "match"}, {"forbid", "max_new_tokens"}),
    "text": (set(), {"text", "file"}),
}


@dataclass(frozen=True)
class Suite:
    """Cases that belong together, and the place of each for messages."""

    name: str
    cases: tuple[Case, ...]
    places: tuple[str, ...]
    sha256: str  # of the file


# ---- reading ---------------------------------------------------------------------------------------------------------


def known_suites() -> str:
    """A sentence that names the suites in cases/, for messages."""
    return f"in cases/ there are {', '.join(sorted(glob.glob('cases/*'))) or 'none'}"


def load_suite(path: str | Path) -> Suite:
    """A suite of a YAML or JSON file. Raises UserError with the line for a case that cannot be meant."""
    try:
        raw = Path(path).read_bytes()
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the cases {path}: {error}") from None
    values, places = parse_yaml(text, str(path))
    bare = isinstance(values, list)
    suite = {"cases": values} if bare else values
    if (
        not isinstance(suite, dict)
        or not isinstance(listed := suite.get("cases"), list)
        or not listed
    ):
        raise UserError(
            f"{path}: a suite is a list of cases, each {{name, prompt, target}}, or {{schema: 1, name, cases}}"
        )
    if unknown := suite.keys() - {"schema", "name", "license", "defaults", "cases"}:
        raise UserError(
            f"{path}: a suite has schema, name, license, defaults and cases, but no {', '.join(sorted(map(str, unknown)))}"
        )
    if not bare and suite.get("schema") != 1:
        raise UserError(f"{path}: schema is {suite.get('schema')!r}; this program reads schema 1")
    if not isinstance(suite.get("defaults") or {}, dict):
        raise UserError(
            f"{places['defaults',]}: defaults are fields of a case with their values, not {suite['defaults']!r}"
        )
    name, defaults = str(suite.get("name") or Path(path).stem), suite.get("defaults") or {}
    cases, where = [], []
    for index, value in enumerate(listed):
        at = (str(index),) if bare else ("cases", str(index))
        cases.append(read_case(value, defaults, name, at, places, str(path)))
        where.append(places[at])
    suite = Suite(name, tuple(cases), tuple(where), sha256(raw).hexdigest())
    check_duplicates([(case, place)] for case, place in zip(cases, where, strict=True))
    return suite


def read_case(
    value: Any,
    defaults: dict[str, Any],
    suite: str,
    at: tuple[str, ...],
    places: dict[tuple[str, ...], str],
    path: str,
) -> Case:
    """The case that stands at `at` of the file. Raises UserError with its line."""
    place = places[at]
    if not isinstance(value, dict):
        raise UserError(
            f"{place}: a case is {{id, type, ...}} or {{name, prompt, target}}, not {value!r}"
        )
    given = dict(value)
    if "target" in given:  # the short form
        target = given.pop("target")
        given |= {
            "id": given.pop("name", None),
            "answers": target if isinstance(target, list) else [target],
        }
    if not given.get("id"):
        raise UserError(f"{place}: the case has no {'name' if 'target' in value else 'id'}")
    case = build(Case, {**defaults, **given}, at, places, path)
    required, optional = FIELDS[case.type]
    if missing := sorted(required - given.keys() - defaults.keys()):
        raise UserError(
            f"{place}: {case.id!r} is of type {case.type}, which needs {' and '.join(missing)}"
        )
    if extra := sorted(given.keys() - required - optional - ANY):
        raise UserError(
            f"{place}: {case.id!r} is of type {case.type}, which has no {' and no '.join(extra)}"
        )
    texts = [
        t
        for key in given
        for t in (given[key] if isinstance(given[key], list) else [given[key]])
        if isinstance(t, str)
    ]
    if not all(t.strip() or t == given.get("pmi_prompt") for t in texts) or any(
        given.get(key) == [] for key in required
    ):
        raise UserError(f"{place}: {case.id!r} has an empty text; every one says something")
    if case.type == "schema" and not (
        len(case.contexts) > 1 and 0 <= case.gold < len(case.contexts)
    ):
        raise UserError(
            f"{place}: {case.id!r} needs two contexts or more, and gold to be the number of one, from 0"
        )
    if case.scoring == "pmi" and "scoring" in optional and "pmi_prompt" not in optional:
        raise UserError(f"{place}: {case.id!r} is of type {case.type}, which is not scored by pmi")
    if case.type == "text" and bool(case.text) == bool(case.file):
        raise UserError(f"{place}: {case.id!r} is of type text, which needs either text or file")
    for pattern in (case.match, case.forbid):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{place}: {case.id!r} has the pattern {pattern!r}, which is not a regular expression: {error}"
            ) from None
    return replace(case, category=case.category or suite, group=case.group or case.id)


def check_duplicates(parts: Iterable[Iterable[tuple[Case, str]]]) -> None:
    """Raise UserError where a case, here with its place, has the id of one in an earlier part, or asks the same."""
    seen: dict[Any, str] = {}
    for part in parts:
        new: dict[Any, str] = {}
        for case, place in part:
            asked = (case.type, case.candidates, case.prompt, case.match, case.text, case.file)
            for what, key in (("id", case.id), ("question", asked)):
                if key in seen:
                    raise UserError(
                        f"{place}: the {what} of {case.id!r} stands already at {seen[key]}; change or remove one"
                    )
                new[key] = place
        seen |= new


LINES = "[!.]*.jsonl"  # BLiMP's own zip holds ._* beside them, which are no text


def read_blimp(path: str | Path) -> Suite:
    """BLiMP's own JSONL files (Warstadt et al. 2020, arXiv 1912.00582), of a folder or a zip: a category a paradigm."""
    where = Path(path)
    try:
        if where.is_dir():
            files = {str(file): file.read_bytes() for file in sorted(where.rglob(LINES))}
        else:
            with zipfile.ZipFile(where) as archive:
                files = {
                    name: archive.read(name)
                    for name in sorted(archive.namelist())
                    if PurePath(name).match(LINES)
                }
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--blimp {path} is not a folder or a zip file that can be read: {error}"
        ) from None
    cases, places = [], []
    for name, raw in files.items():
        for number, line in enumerate(raw.splitlines(), 1):
            try:
                row = json.loads(line)
                good, bad, paradigm, pair = (
                    str(row[key]) for key in ("sentence_good", "sentence_bad", "UID", "pairID")
                )
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{name}:{number}: not a line of BLiMP: it has sentence_good, sentence_bad, UID and pairID"
                ) from None
            cases.append(
                Case(
                    f"{paradigm}-{pair}",
                    "minimal_pair",
                    paradigm,
                    f"{paradigm}-{pair}",
                    good=good,
                    bad=bad,
                )
            )
            places.append(f"{name}:{number}")
    if not cases:
        raise UserError(
            f"--blimp {path} holds no .jsonl file; give BLiMP's folder data/, or its zip"
        )
    digest = sha256(b"".join(files.values())).hexdigest()
    return Suite("blimp", tuple(cases), tuple(places), digest)


# ---- what is wrong with a suite --------------------------------------------------------------------------------------


def lint(suite: Suite) -> Iterator[str]:
    """What makes a case say something else than it seems to, each with its line."""
    for case, place in zip(suite.cases, suite.places, strict=True):
        for problem in lint_case(case):
            yield f"{place}: {case.id}: {problem}"
    counts = Counter(case.category for case in suite.cases if case.type != "text")
    first = {
        case.category: place
        for case, place in zip(reversed(suite.cases), reversed(suite.places), strict=True)
    }
    for category, n in counts.items():
        if n < FEWEST:
            yield f"{first[category]}: the category {category!r} has {n} cases; of fewer than {FEWEST} no interval says anything"


def lint_case(case: Case) -> Iterator[str]:
    if len(set(case.candidates)) < len(case.candidates):
        yield "two of its candidates are the same, which no model can tell apart"
    prompts = case.contexts or (case.prompt,)
    for prompt in prompts:
        if prompt.endswith(" "):
            yield f"the prompt {prompt[-20:]!r} ends in a space, which belongs to the answer"
    continuations = (
        (case.continuation,) if case.type == "schema" else (*case.answers, *case.distractors)
    )
    for text in continuations:
        if not case.joined and text[:1].isalnum() and not prompts[0].endswith(("\n", '"', "(")):
            yield f"the answer {text!r} has no leading space; write {' ' + text!r}, or joined: true where none is meant"
    for answer in case.answers:
        if not case.echo and contains_word(answer.strip(), case.prompt):
            yield f"the answer {answer!r} stands in the prompt, where it can be copied from; echo: true where that is meant"
        for other in case.distractors:
            if other.startswith(answer) or answer.startswith(other):
                yield f"{answer!r} and {other!r} begin alike, and the shorter one gets the longer one's probability as well"


def contains_word(word: str, text: str) -> bool:
    return (
        bool(word)
        and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None
    )


def merge_suites(suites: Iterable[Suite]) -> Suite:
    """Several suites as one. Raises UserError where an id or a question stands in two."""
    suites = list(suites)
    if len(suites) == 1:
        return suites[0]
    whole = Suite(
        " + ".join(suite.name for suite in suites),
        tuple(case for suite in suites for case in suite.cases),
        tuple(place for suite in suites for place in suite.places),
        sha256("".join(suite.sha256 for suite in suites).encode()).hexdigest(),
    )
    check_duplicates(zip(suite.cases, suite.places, strict=True) for suite in suites)
    return whole
