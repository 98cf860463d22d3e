"""Probe suites: cases, reading them from YAML, JSON and BLiMP, and linting.

A suite is `{schema: 1, name, license, defaults, cases}`, or a list of `{name, prompt, target}`.
A case of each type is right if:

    cloze, choice   prompt, answers [, distractors]  an answer is the most likely candidate; without
                                                     distractors, if greedy decoding writes it
    minimal_pair    good, bad                        the good text is more likely than the bad one
    schema          contexts, continuation, gold     it is most likely after contexts[gold]
    generate        prompt, match [, forbid]         the text decoded greedily matches the pattern,
                                                     and does not match the forbidden one
    text            text or file                     (never right or wrong: has bits per byte)
"""

import glob
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, Literal

from pocketlm.config.strict_yaml import Positions, build_dataclass, check_key, parse_yaml
from pocketlm.corpus.encodings import decode_text
from pocketlm.errors import FieldError, UserError
from pocketlm.limits import MAX_CASES_CHARACTERS

MIN_CASES = 10  # in a category; with fewer, an interval is too wide to be useful
SUITE_FIELDS = ("schema", "name", "license", "defaults", "cases")


@dataclass(frozen=True)
class Case:
    """One probe. FIELDS lists the fields of each type."""

    id: str
    type: Literal["cloze", "choice", "minimal_pair", "schema", "generate", "text"] = "cloze"
    category: str = ""  # default: the suite's name
    group: str = ""  # shared by dependent cases, such as paraphrases of a fact; default: the id
    source: str = ""  # start of the document that states the fact
    negative: bool = False  # the prompt contains a negation
    echo: bool = False  # the answer occurs in the prompt on purpose
    joined: bool = False  # the answer has no leading space on purpose
    scoring: Literal["sum", "token", "byte", "pmi"] = "sum"  # how candidates are compared
    prompt: str = ""
    answers: tuple[str, ...] = ()  # all are right; each starts with its leading space
    distractors: tuple[str, ...] = ()
    pmi_prompt: str = ""  # context of the answers' own likelihood for pmi; default: document start
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
        """The (context, continuation) pairs to compare, the right ones first."""
        match self.type:
            case "cloze" | "choice":
                return tuple((self.prompt, answer) for answer in (*self.answers, *self.distractors))
            case "minimal_pair":
                return ("", self.good), ("", self.bad)
            case "schema":
                wrong = [c for i, c in enumerate(self.contexts) if i != self.gold]
                ordered = (self.contexts[self.gold], *wrong)
                return tuple((context, self.continuation) for context in ordered)
        return ()

    @property
    def n_right(self) -> int:
        """Number of right candidates."""
        return len(self.answers) or 1

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing; None if all candidates are right or there are none."""
        n = len(self.candidates)
        return self.n_right / n if n > self.n_right else None


@dataclass(frozen=True)
class Suite:
    """Cases that belong together, with the position of each (`file:line`) for messages."""

    name: str
    cases: tuple[Case, ...]
    positions: tuple[str, ...]
    sha256: str  # of the file


def known_suites() -> str:
    """Return a sentence that lists the suites in cases/, for messages."""
    return f"in cases/ there are {', '.join(sorted(glob.glob('cases/*'))) or 'none'}"


def load_suite(path: str | Path) -> Suite:
    """Read a suite from a YAML or JSON file. Raise UserError, with the line, for a mistake."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the cases {path}: {error}") from None
    text = decode_text(raw, f"cannot read the cases {path}: it")
    values, positions = parse_yaml(text, str(path), MAX_CASES_CHARACTERS)
    is_list = isinstance(values, list)
    suite = {"schema": 1, "cases": values} if is_list else values
    check_suite(suite, positions, str(path))
    name, defaults = str(suite.get("name") or Path(path).stem), suite.get("defaults") or {}
    cases, case_positions = [], []
    for i, value in enumerate(suite["cases"]):
        key_path = (str(i),) if is_list else ("cases", str(i))
        case = read_case(value, defaults, key_path, positions)
        cases.append(replace(case, category=case.category or name, group=case.group or case.id))
        case_positions.append(positions[key_path])
    check_duplicates([pair] for pair in zip(cases, case_positions, strict=True))
    return Suite(name, tuple(cases), tuple(case_positions), sha256(raw).hexdigest())


def check_suite(suite: Any, positions: Positions, path: str) -> None:
    """Raise UserError unless `suite` has a list of cases and no unknown fields."""
    listed = suite.get("cases") if isinstance(suite, dict) else None
    if not isinstance(listed, list) or not listed:
        form = "a list of cases, each {name, prompt, target}, or {schema: 1, name, cases}"
        raise UserError(f"{path}: a suite is {form}")
    for key in suite:
        check_key(key, SUITE_FIELDS, positions.get((key,), path), "a suite has no key")
    if suite.get("schema") != 1:
        raise UserError(f"{path}: schema is {suite.get('schema')!r}; this program reads schema 1")
    defaults = suite.get("defaults") or {}
    if not isinstance(defaults, dict):
        position = positions[("defaults",)]
        raise UserError(f"{position}: defaults are fields of a case, not {defaults!r}")


def read_case(
    value: Any, defaults: dict[str, Any], path: tuple[str, ...], positions: Positions
) -> Case:
    """Return the case at a key path of the file. Raise UserError, with its line, for a mistake."""
    position = positions[path]
    if not isinstance(value, dict):
        raise UserError(
            f"{position}: a case is {{id, type, ...}} or {{name, prompt, target}}, not {value!r}"
        )
    fields = expand_short_form(value)
    if not fields.get("id"):
        raise UserError(f"{position}: the case has no {'name' if 'target' in value else 'id'}")
    case = build_dataclass(Case, {**defaults, **fields}, path, positions, position)
    problems = [*field_problems(case, fields, defaults), *value_problems(case)]
    if problems:
        raise UserError(f"{position}: {case.id!r} {problems[0]}")
    return case


def expand_short_form(value: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a case; `name` and `target` become `id` and `answers`."""
    if "target" not in value:
        return value
    fields = {key: field for key, field in value.items() if key not in ("name", "target")}
    target = value["target"]
    answers = target if isinstance(target, list) else [target]
    return fields | {"id": value.get("name"), "answers": answers}


COMMON_FIELDS = {"id", "type", "category", "group", "source", "negative", "echo", "joined"}
FIELDS: dict[str, tuple[set[str], set[str]]] = {  # type: required fields, optional fields
    "cloze": ({"prompt", "answers"}, {"distractors", "scoring", "pmi_prompt"}),
    "choice": ({"prompt", "answers", "distractors"}, {"scoring", "pmi_prompt"}),
    "minimal_pair": ({"good", "bad"}, {"scoring"}),
    "schema": ({"contexts", "continuation"}, {"gold", "scoring"}),
    "generate": ({"prompt", "match"}, {"forbid", "max_new_tokens"}),
    "text": (set(), {"text", "file"}),
}


def field_problems(case: Case, fields: dict[str, Any], defaults: dict[str, Any]) -> Iterator[str]:
    """Yield which fields are missing, which the type does not have, and whether texts are empty.

    A default that the type does not have is ignored. Only a pmi_prompt may be white space.
    """
    required, optional = FIELDS[case.type]
    if missing := sorted(required - fields.keys() - defaults.keys()):
        yield f"is of type {case.type}, which needs {' and '.join(missing)}"
    if extra := sorted(fields.keys() - required - optional - COMMON_FIELDS):
        yield f"is of type {case.type}, which has no {' and no '.join(extra)}"
    texts: list[Any] = []
    for value in fields.values():
        texts += value if isinstance(value, list) else [value]
    blank = [text for text in texts if isinstance(text, str) and not text.strip()]
    empty_list = any(fields.get(key) == [] for key in required)
    if empty_list or any(text != fields.get("pmi_prompt") for text in blank):
        yield "has an empty text; fill it in"


def value_problems(case: Case) -> Iterator[str]:
    """Yield what is wrong with the values of a case."""
    gold_exists = 0 <= case.gold < len(case.contexts)
    if case.type == "schema" and not (gold_exists and len(case.contexts) > 1):
        yield "needs two contexts or more, and gold to be the index of one, from 0"
    if case.scoring == "pmi" and case.type in ("minimal_pair", "schema"):
        yield f"is of type {case.type}, which is not scored by pmi"
    if case.type == "text" and bool(case.text) == bool(case.file):
        yield "is of type text, which needs either text or file"
    for pattern in (case.match, case.forbid):
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"has the pattern {pattern!r}, which is not a regular expression: {error}"


def check_duplicates(parts: Iterable[Iterable[tuple[Case, str]]]) -> None:
    """Raise UserError if a case has the id or the question of a case in an earlier part.

    A part is a list of cases with their positions; cases within a part may repeat each other.
    """
    seen: dict[Any, str] = {}
    for part in parts:
        new: dict[Any, str] = {}
        for case, position in part:
            question = (case.type, case.candidates, case.prompt, case.match, case.text, case.file)
            for what, key in (("id", case.id), ("question", question)):
                if key in seen:
                    raise UserError(
                        f"{position}: the {what} of {case.id!r} is already at {seen[key]}; "
                        "change or remove one"
                    )
                new[key] = position
        seen |= new


def merge_suites(suites: Iterable[Suite]) -> Suite:
    """Join suites to one. Raise UserError if an id or a question occurs in two of them."""
    suites = list(suites)
    if len(suites) == 1:
        return suites[0]
    cases = tuple(chain.from_iterable(suite.cases for suite in suites))
    positions = tuple(chain.from_iterable(suite.positions for suite in suites))
    name = " + ".join(suite.name for suite in suites)
    digest = sha256("".join(suite.sha256 for suite in suites).encode()).hexdigest()
    check_duplicates(zip(suite.cases, suite.positions, strict=True) for suite in suites)
    return Suite(name, cases, positions, digest)


# BLiMP's own zip holds ._* files of macOS, which are no text
BLIMP_FILES = ("[!.]*.jsonl", "[!.]*.parquet")


def read_blimp(path: str | Path) -> Suite:
    """Read BLiMP from a folder or a zip (Warstadt et al. 2020, arXiv 1912.00582).

    Its files are the authors' JSONL or those of the Hugging Face hub, whose field for the pair is
    pair_id. Each paradigm becomes a category. Raises UserError if there is no such file.
    """
    files = read_blimp_files(Path(path))
    cases, positions = [], []
    for name, raw in files.items():
        for number, line in blimp_rows(name, raw):
            position = f"{name}:{number}"
            cases.append(read_blimp_row(line, position))
            positions.append(position)
    if not cases:
        raise UserError(
            f"--blimp {path} holds no .jsonl file; give BLiMP's folder data/, or its zip, or the "
            "hub's .parquet files"
        )
    digest = sha256(b"".join(files.values())).hexdigest()
    return Suite("blimp", tuple(cases), tuple(positions), digest)


def read_blimp_files(path: Path) -> dict[str, bytes]:
    """Return the content of the files by name, in sorted order."""

    def matches(name: str) -> bool:
        return any(PurePath(name).match(pattern) for pattern in BLIMP_FILES)

    try:
        if path.is_dir():
            paths = [file for file in sorted(path.rglob("*")) if matches(file.name)]
            return {str(file): file.read_bytes() for file in paths}
        with zipfile.ZipFile(path) as archive:
            return {
                name: archive.read(name) for name in sorted(archive.namelist()) if matches(name)
            }
    except (OSError, zipfile.BadZipFile) as error:
        message = f"--blimp {path} is not a folder or a zip file that can be read: {error}"
        raise UserError(message) from None


def blimp_rows(name: str, raw: bytes) -> Iterator[tuple[int, Any]]:
    """Yield each row of a file with its number; a line of JSON as bytes, but no blank one."""
    if not name.endswith(".parquet"):
        lines = enumerate(raw.splitlines(), 1)
        yield from ((number, line) for number, line in lines if line.strip())
        return
    import pyarrow as pa  # type: ignore[import-untyped]  # no stubs; takes 0.2 s
    from pyarrow import parquet

    try:
        yield from enumerate(parquet.read_table(io.BytesIO(raw)).to_pylist(), 1)
    except pa.ArrowInvalid as error:
        raise UserError(f"{name} is not a parquet file that can be read: {error}") from None


def read_blimp_row(row: Any, position: str) -> Case:
    """Return the minimal pair in a line of JSON or in a row of a table."""
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
        good, bad = str(row["sentence_good"]), str(row["sentence_bad"])
        paradigm, pair = str(row["UID"]), str(row["pair_id" if "pair_id" in row else "pairID"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{position}: not a line of BLiMP: it has sentence_good, sentence_bad, UID and pairID"
        ) from None
    name = f"{paradigm}-{pair}"
    return Case(name, "minimal_pair", paradigm, group=name, good=good, bad=bad)


def lint(suite: Suite) -> Iterator[str]:
    """Yield what is probably a mistake in a suite, with its position."""
    first_position: dict[str, str] = {}
    for case, position in zip(suite.cases, suite.positions, strict=True):
        for problem in lint_case(case):
            yield f"{position}: {case.id}: {problem}"
        first_position.setdefault(case.category, position)
    counts = Counter(case.category for case in suite.cases if case.type != "text")
    for category, n in counts.items():
        if n < MIN_CASES:
            yield (
                f"{first_position[category]}: the category {category!r} has {n} cases; "
                f"an interval needs {MIN_CASES} or more"
            )


def lint_case(case: Case) -> Iterator[str]:
    """Yield what is probably a mistake in a case."""
    if len(set(case.candidates)) < len(case.candidates):
        yield "two of its candidates are the same, so no model can tell them apart"
    prompts = case.contexts or (case.prompt,)
    for prompt in prompts:
        if prompt.endswith(" "):
            yield f"the prompt {prompt[-20:]!r} ends with a space; move it to the answer"
    continuations = (*case.answers, *case.distractors)
    if case.type == "schema":
        continuations = (case.continuation,)
    for text in continuations:
        if not case.joined and text[:1].isalnum() and not prompts[0].endswith(("\n", '"', "(")):
            remedy = f"write {' ' + text!r}, or joined: true if there is none"
            yield f"the answer {text!r} has no leading space; {remedy}"
    for answer in case.answers:
        if not case.echo and contains_word(answer.strip(), case.prompt):
            yield (
                f"the answer {answer!r} can be copied from the prompt; "
                "change the prompt, or write echo: true"
            )
        for other in case.distractors:
            shorter, longer = sorted((answer, other), key=len)
            if longer.startswith(shorter):
                yield f"{shorter!r} begins {longer!r} and so includes its probability; change one"


def contains_word(word: str, text: str) -> bool:
    """Return True if the text contains the word, in upper or lower case."""
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
    return bool(word) and re.search(pattern, text, re.IGNORECASE) is not None
