"""Files in DailyDialog's layout to dialogues."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.corpus.pieces import PIECE_CHARACTERS, hash_files
from tests.support.sources import (
    SUFFIXES,
    documents_of,
    not_blank,
    open_path,
    read_path,
    refusal,
    small_pieces,
    write_file,
)

LAYOUT = """\
The kitchen stinks . __eou__ I'll throw out the garbage . __eou__
So Dick , how about getting some coffee for tonight ? __eou__ \
Coffee ? I don ’ t honestly like that kind of stuff . __eou__ \
Come on , you can at least try a little , besides your cigarette . __eou__

Good luck ! __eou__
  __eou__   Hello ? __eou____eou__ Yes .  Who is it ?\t__eou__ No one __eou__ behind the last sign
"""
TALKS = [
    "A: The kitchen stinks .\nB: I'll throw out the garbage .\n",
    "A: So Dick , how about getting some coffee for tonight ?\n"
    "B: Coffee ? I don ’ t honestly like that kind of stuff .\n"
    "A: Come on , you can at least try a little , besides your cigarette .\n",
    "A: Good luck !\n",
    "A: Hello ?\nB: Yes .  Who is it ?\nA: No one\nB: behind the last sign\n",
]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("end", ["\n", "", "\n\n", "\n \n\t\n", "\n __eou__ \n"])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_a_file_in_dailydialogs_layout_is_a_conversation_a_line(tmp_path, suffix, end, line):
    text = (LAYOUT.removesuffix("\n") + end).replace("\n", line)
    source = open_path(write_file(tmp_path, f"dialogues_text.txt{suffix}", text.encode(), (9, 300)))
    assert source.name == f"{tmp_path}/dialogues_text.txt{suffix} (DailyDialog's layout)"
    for same in (source, source, pickle.loads(pickle.dumps(source))):
        assert documents_of(same) == TALKS
    assert source.position == source.size


UTTERANCE = (
    st.text(alphabet="ab .é’😀_\t\u2028", min_size=1, max_size=12)
    .map(lambda text: text.strip(" \t\u2028_"))
    .filter(bool)
)


@settings(max_examples=200, deadline=None)
@given(
    talks=st.lists(st.lists(UTTERANCE, max_size=5), max_size=6),
    size=st.integers(1, 40),
    suffix=st.sampled_from(SUFFIXES),
    byte_order_mark=st.booleans(),
)
def test_the_documents_of_dialogues_are_the_turns_that_were_written(
    folder, talks, size, suffix, byte_order_mark
):
    talks = [["first"], *talks]
    lines = ["".join(f"{turn} __eou__ " for turn in talk) + "\n" for talk in talks]
    text = "\ufeff" * byte_order_mark + "".join(lines)
    source = open_path(write_file(folder, f"x.txt{suffix}", text.encode(), (5,)))
    expected = [
        "".join(f"{speaker}: {turn}\n" for speaker, turn in zip("ABABA", talk, strict=False))
        for talk in talks
    ]
    with small_pieces(size):
        assert documents_of(source) == [text for text in expected if text]


def test_a_separator_wins_over_the_layout_of_dialogues(tmp_path):
    path = write_file(tmp_path, "x.txt", LAYOUT.encode())
    assert read_path(path, separator="line") == not_blank(LAYOUT.split("\n"))
    assert read_path(path, separator="__eou__") == not_blank(LAYOUT.split("__eou__"))
    assert open_path(path, separator="line").name == str(path)


@pytest.mark.parametrize("name, raw", [
    ("x.txt", "No sign in the first line\n" + LAYOUT),
    ("x.txt", "\n" + LAYOUT),
    ("x.txt", "x" * PIECE_CHARACTERS + LAYOUT),
    ("x.txt", LAYOUT.replace("__eou__", "_eou_")),
    ("x.txt", "3 4 1\n2 2\n"),
    ("x.md", LAYOUT), ("x.txt.old", LAYOUT), ("x", LAYOUT),
])  # fmt: skip
def test_a_file_without_the_layout_of_dialogues_is_one_document(tmp_path, name, raw):
    path = write_file(tmp_path, name, raw.encode())
    assert read_path(path) == [raw]
    assert open_path(path).name == str(path)


def test_the_layout_of_dialogues_is_recognised_in_the_first_megabyte(tmp_path):
    turn = "x" * (PIECE_CHARACTERS - 8)
    path = write_file(tmp_path, "x.txt", f"{turn} __eou__\n".encode())
    assert read_path(path) == [f"A: {turn}\n"]
    path = write_file(tmp_path, "x.txt", f"x{turn} __eou__\n".encode())
    assert read_path(path) == [f"x{turn} __eou__\n"]


def test_a_folder_of_dialogues_and_other_texts_names_one_of_each(tmp_path, monkeypatch):
    """DailyDialog's own folder is one: it also has files of numbers."""
    monkeypatch.chdir(tmp_path)
    Path("train").mkdir()
    write_file(Path("train"), "dialogues_act_train.txt", b"3 4 \n2 2 \n")
    write_file(Path("train"), "dialogues_emotion_train.txt", b"0 0 \n0 1 \n")
    write_file(Path("train"), "dialogues_train.txt", LAYOUT.encode())
    message = (
        "train/dialogues_train.txt has DailyDialog's layout, in which __eou__ ends an utterance, "
        "and train/dialogues_act_train.txt does not; "
        "name the files to use, for example train/dialogues_train.txt"
    )
    assert refusal("train") == f"train: {message}"
    assert refusal("train/dialogues_*.txt") == f"train/dialogues_*.txt: {message}"
    assert len(read_path("train", separator="line")) == 8
    assert read_path("train/dialogues_train.txt") == TALKS
    assert read_path("train/dialogues_[ae]*.txt") == ["3 4 \n2 2 \n", "0 0 \n0 1 \n"]


def test_files_of_dialogues_and_of_other_kinds_are_read_one_after_another(tmp_path):
    for part in ("train", "validation"):
        (tmp_path / part).mkdir()
        write_file(tmp_path / part, f"dialogues_{part}.txt", LAYOUT.encode())
    write_file(tmp_path, "more.txt.gz", b"A sentence . __eou__")
    write_file(tmp_path, "notes.md", b"Notes on __eou__.")
    write_file(tmp_path, "rows.jsonl", b'{"text": "A row __eou__"}\n')
    expected = ["A: A sentence .\n", "Notes on __eou__.", "A row __eou__", *TALKS, *TALKS]
    assert read_path(tmp_path) == expected
    assert open_path(tmp_path).name == f"{tmp_path} (DailyDialog's layout)"
    assert read_path(f"{tmp_path}/*/dialogues_*.txt") == TALKS * 2


def test_dialogues_of_bytes_that_are_not_utf_8_are_refused_or_replaced(tmp_path):
    path = write_file(tmp_path, "x.txt", b"a __eou__ b\xff __eou__\n")
    assert "byte 11 is 0xff" in refusal(path)
    assert read_path(path, errors="replace") == ["A: a\nB: b\ufffd\n"]


def test_only_dialogues_have_their_layout_in_the_digest(tmp_path):
    """The digest of every other file is the one from before this layout was known."""
    path = write_file(tmp_path, "x.txt", b"text")
    options = [1, None, "text", "strict", [("text", None)]]
    assert open_path(path).digest() == hash_files([path], options)
    talks = write_file(tmp_path, "talks.txt", LAYOUT.encode())
    copy = write_file(tmp_path, "talks.md", LAYOUT.encode())
    assert open_path(copy).digest() == hash_files([talks], options)
    assert open_path(talks).digest() != open_path(copy).digest()
    assert open_path(talks, separator="line").digest() == open_path(copy, separator="line").digest()
