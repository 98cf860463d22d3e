"""Named corpora: what they hold, to the byte."""

import hashlib
import re
import unicodedata
from functools import cache
from pathlib import Path

import pytest

from pocketlm import wheels
from pocketlm.corpus import named
from pocketlm.corpus.named import CORPORA, SHIPPED

DATA = Path(__file__).parents[2] / "data"


@cache
def corpus(name: str) -> list[str]:
    return list(CORPORA[name](str(DATA)))


@pytest.fixture
def wiki() -> list[str]:
    return corpus("wiki")


@pytest.fixture
def plays() -> list[str]:
    return corpus("shakespeare")


@pytest.fixture
def names() -> list[str]:
    return corpus("names")


@pytest.fixture
def korean_names() -> list[str]:
    return corpus("korean_names")


@pytest.fixture
def chats() -> list[str]:
    return corpus("dialogue")


@pytest.fixture
def messages() -> list[str]:
    return corpus("sotu")


SIZES = {  # documents, bytes, and the SHA-256 of the documents, each ended by a zero byte
    "wiki": (9_777, 4_768_710, "4a83345c12ba8d8b1b6b78cdb83529291bea9994663fd43be57461b9f96be37d"),
    "shakespeare": (
        38,
        4_785_304,
        "ba57dba206879a677481df8930bd61cdebe246c675c184c479e9d0fd4a3da1c0",
    ),
    "names": (29_910, 184_854, "0a18e2ac7176d1cf6450a2a8787f33244712097f3a93355b0b1c2917287f582d"),
    "korean_names": (
        1_692,
        10_101,
        "f9cedd926b8afd447a5b9d359f8d436c44a8b6bbcc81a95c41e6d703d735c89f",
    ),
    "dialogue": (
        3_242,
        12_305_771,
        "663b808706ca5a0aaca50ce746265e7e630d4febff51e7143d0247715eb6206b",
    ),
    "sotu": (249, 12_184_330, "a93bac667c207f2d819faf9d9dcdaa1101148f30910d2b392d253c0a2a0f70c8"),
}


def test_every_named_corpus_is_measured_here():
    assert list(SIZES) == list(CORPORA)


@pytest.mark.parametrize("name", SIZES)
def test_a_corpus_is_the_same_everywhere(name):
    documents = [document.encode() for document in corpus(name)]
    digest = hashlib.sha256(b"".join(document + b"\0" for document in documents)).hexdigest()
    assert (len(documents), sum(map(len, documents)), digest) == SIZES[name]
    assert len(set(documents)) == len(documents)
    assert all(document.strip() for document in documents)


@pytest.mark.parametrize("name", SIZES)
def test_the_docstring_states_documents_size_licence_and_origin(name):
    documents, size, _ = SIZES[name]
    text = CORPORA[name].__doc__
    number, unit = re.search(r"([\d.]+) ([kM]B)", text).groups()
    decimals = len(number.partition(".")[2])
    assert text.startswith(f"Yield {documents:,} ")
    assert f"{size / {'kB': 1e3, 'MB': 1e6}[unit]:.{decimals}f}" == number
    assert "Licence: " in text
    assert "Origin: " in text


def test_wiki_has_only_plain_spaces(wiki):
    assert not set("\u00a0\u2009\u200a\u202f\u200d\u2060") & set().union(*wiki)


def test_shakespeare_is_38_plays(plays):
    assert len(plays) == len(set(plays)) == 38
    assert all(play.splitlines()[0].endswith(":") and play.endswith("\n") for play in plays)
    assert "\n\nHAMLET:\nTo be, or not to be: that is the question:\n" in "".join(plays)


def test_shakespeare_keeps_no_markdown(plays):
    """A speaker may be on the second line of a paragraph, after a stage direction."""
    lines = [line for play in plays for line in play.splitlines()]
    assert len(lines) > 100_000
    assert [line for line in lines if "**" in line or line.startswith("#") or "\\" in line] == []
    assert [line for line in lines if "_" in line or "*" in line] == []


def test_shakespeare_keeps_no_stage_directions(plays):
    lines = [line for play in plays for line in play.splitlines()]
    assert len(lines) > 100_000
    assert [line for line in lines if line.startswith("[") and line.endswith("]")] == []


def test_a_name_is_one_lower_case_word_and_occurs_once(names):
    assert len(set(names)) == len(names) == 29_910
    assert [name for name in names if not re.fullmatch("[a-z]{2,16}", name)] == []


def test_the_names_begin_with_the_girls_and_the_most_given(names):
    """Emma and Liam led the year; Zyrie was given to five boys, the fewest that are published."""
    assert names[:3] == ["emma", "olivia", "ava"]
    assert names[-1] == "zyrie"
    assert names.index("liam") > names.index("zoe")


def test_a_korean_name_is_one_or_two_whole_syllables_and_occurs_once(korean_names):
    """Syllables are precomposed (U+AC00 to U+D7A3), and there are no single letters."""
    assert len(set(korean_names)) == len(korean_names) >= 300
    assert [name for name in korean_names if not re.fullmatch("[\uac00-\ud7a3]{1,2}", name)] == []
    assert [name for name in korean_names if not unicodedata.is_normalized("NFC", name)] == []
    assert sum(len(name) == 2 for name in korean_names) > 0.98 * len(korean_names)


def test_the_korean_names_are_sorted_and_hold_the_best_known_ones(korean_names):
    """The order of the code points is the order of a Korean dictionary."""
    assert korean_names == sorted(korean_names)
    assert {"서연", "지우", "민준", "하윤", "도윤", "은별", "준"} <= set(korean_names)


def test_the_korean_names_are_the_lines_of_a_file_beside_the_code(korean_names):
    assert SHIPPED["korean_names"] == Path(named.__file__).parent / "korean_names.txt"
    assert (
        SHIPPED["korean_names"].read_bytes()
        == "".join(f"{name}\n" for name in korean_names).encode()
    )


def test_a_shipped_corpus_needs_no_wheel_and_no_data_folder(tmp_path, monkeypatch, korean_names):
    def open_wheel(name: str, data_dir: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(named, "open_wheel", open_wheel)
    monkeypatch.chdir(tmp_path)
    assert list(CORPORA["korean_names"]("nowhere")) == korean_names
    assert list(tmp_path.iterdir()) == []


def test_every_corpus_is_shipped_or_in_a_wheel():
    assert SHIPPED.keys() | wheels.WHEELS.keys() == {*CORPORA, "gpt2", "smollm2-135m"}
    assert not SHIPPED.keys() & wheels.WHEELS.keys()


def test_a_conversation_alternates_between_two():
    assert named.format_dialogue(["Hi!", "Hello.", "Bye."]) == "A: Hi!\nB: Hello.\nA: Bye.\n"
    assert named.format_dialogue(["Alone."]) == "A: Alone.\n"
    assert named.format_dialogue([]) == ""


def test_a_chat_alternates_from_a_to_b_for_four_lines_or_more(chats):
    assert min(chat.count("\n") for chat in chats) == 4
    for chat in chats:
        assert chat.endswith("\n")
        for i, line in enumerate(chat.split("\n")[:-1]):
            speaker, words = line[:3], line[3:]
            assert speaker == "AB"[i % 2] + ": "
            assert words and words == " ".join(words.split())


def test_the_utterances_of_a_turn_are_one_line(chats):
    assert chats[0].startswith(
        "A: Hello How are you doing today?\n"
        "B: whats up MD im doing good how are you doing?\n"
        "A: Im alright, "
    )


def test_a_chat_names_no_address(chats):
    text = "".join(chats)
    assert re.findall(r"\S+@\w\S*|@\w+", text) == []
    assert re.findall(r"\S*(?:\w://|www\.\w)\S*", text, re.IGNORECASE) == []
    url = r"\S+\.(?:com|edu|gov|htm|html|io|net|org|tv)\b\S*"
    assert re.findall(url, text, re.IGNORECASE) == []
    assert re.findall(r"\d{3}\D{1,2}\d{3}-\d{4}", text) == []


def test_the_words_around_an_address_stay(chats):
    text = "".join(chats)
    # The chat has "Check ratemyprofessor.com for reviews".
    assert ": Check for reviews, and it shouldn't be a problem" in text


def test_a_turn_of_an_address_alone_joins_the_turns_around_it(chats):
    text = "".join(chats)
    # Between the two sentences of A is B's turn "chitchat@byu.edu".
    assert ": yeah What is their email again? I found flappy bird in app histor y it was" in text


def test_the_messages_run_from_1790_to_2026(messages):
    assert messages[0].startswith(
        "Fellow-Citizens of the Senate and House of Representatives:\n\n"
        "I embrace with great satisfaction"
    )
    assert messages[-1].startswith("The President. Well, thank you very much, everybody.")


@pytest.mark.parametrize(
    "words",
    [
        "are henceforth not to be considered as subjects for future colonization "
        "by any European power",
        "Fellow-citizens, we can not escape history.",
        "a world founded upon four essential human freedoms.",
        "constitute an axis of evil, arming to threaten the peace of the world.",
    ],
)
def test_the_messages_hold_their_famous_sentences(words, messages):
    assert any(words in message for message in messages)


def test_the_messages_hold_no_note_of_the_archive(messages):
    """Brackets that are part of the speech are kept, and so is the applause."""
    text = "\n".join(messages)
    note = r"\[[^]]*(?:APP|in person|joint session|p\.\d|Released|broadcast)[^]]*\]|Jump to.*"
    assert re.findall(note, text) == []
    assert "Circumstances, fellow citizens, which seriously threatened the peace" in text
    bracket = "[On the Anti-Trust Statute.] To the Senate"
    assert sum(message.startswith(bracket) for message in messages) == 1
    assert sum("[Applause]" in message for message in messages) == 26
