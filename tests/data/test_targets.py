"""What can be predicted: nothing is refused, and bytes are those that tokens stand for."""

import json
from pathlib import Path

import pytest
import tokenizers as hf
from tokenizers import models, pre_tokenizers

from pocketlm.data.loaders import build_loaders, validation_target_bytes
from pocketlm.data.report import build_report, print_report
from pocketlm.errors import UserError
from pocketlm.model.loss import IGNORE_INDEX
from tests.support.corpora import prepare_config
from tests.support.preparation import shard_folders

pytestmark = pytest.mark.usefixtures("lines_folder")

NO_ENDS = ["data.bos=false", "data.eos=false"]
LETTERS = "abcdefghijklmnopqrstuvwxyz."


def write_lines(name: str, lines: list[str]) -> str:
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return f"data.path={name}"


@pytest.fixture
def letters_only() -> str:
    """Write a BPE of Latin letters without an unknown token, and return the key that names it."""
    vocab = {letter: i for i, letter in enumerate(LETTERS)}
    backend = hf.Tokenizer(models.BPE(vocab | {"</s>": len(vocab)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    Path("letters").mkdir()
    backend.save("letters/tokenizer.json")
    return "data.tokenizer=letters"


# ---- nothing to predict ----


@pytest.mark.parametrize("options, message", [
    (["data.path=twenty.txt", "data.tokenizer=char"], "validation part of twenty.txt has a single"),
    (["data.path=lines.txt", "data.tokenizer=byte", "data.val_path=one.txt"],
     "the validation part of one.txt has a single token, and nothing comes before it"),
    (["data.path=one.txt", "data.tokenizer=byte", "data.val_path=lines.txt"],
     "the train part of one.txt has a single token"),
    (["data.mixture=[{path: lines.txt}, {path: one.txt, val_path: lines.txt}]",
      "data.tokenizer=byte"], "the train part of one.txt has a single token"),
    (["data.path=letters.txt", "data.separator=line", "data.tokenizer=char", "data.val_share=0.3",
      "data.packing=padded"], "letters.txt has no document of two tokens or more"),
])  # fmt: skip
def test_a_part_without_a_target_is_refused_before_the_run(options, message):
    """It divided by zero, or was skipped, and the run ended without a checkpoint."""
    Path("one.txt").write_text("a")
    Path("twenty.txt").write_text("abcdefghijklmnopqrst")
    write_lines("letters.txt", [chr(97 + i % 26) for i in range(60)])
    with pytest.raises(UserError, match=message):
        prepare_config(*options, *NO_ENDS)
    prepare_config(*options)  # an eos is predicted, or predicts


@pytest.mark.parametrize("streaming", [False, True])
def test_a_padded_batch_has_a_target_in_every_row(streaming):
    """A batch without one divides by zero, which was reported as too high a learning rate."""
    names = [f"name {i}" if i % 2 else chr(97 + i % 26) for i in range(200)]
    options = [write_lines("names.txt", names), "data.separator=line", "data.tokenizer=char"]
    options += ["data.packing=padded", f"data.streaming={json.dumps(streaming)}"]
    config, data = prepare_config(*options, *NO_ENDS, "training.micro_batch_size=1")
    train_loader, val_loader = build_loaders(config, data)
    batches = [batch for batch, _ in zip(train_loader, range(300), strict=False)]
    for batch in [*batches, *val_loader]:
        assert int((batch["targets"] != IGNORE_INDEX).sum()) > 0


# ---- bytes ----


def test_the_first_packed_token_is_no_target_unless_it_opens_a_document():
    Path("text.txt").write_text("é" * 100)
    options = ["data.path=text.txt", "data.tokenizer=char", "data.val_share=0.1"]
    assert validation_target_bytes(*prepare_config(*options)) == 20
    assert validation_target_bytes(*prepare_config(*options, *NO_ENDS)) == 18


def test_characters_without_an_entry_are_not_in_the_bytes_that_are_predicted(letters_only):
    """They vanish, and bits per byte divided by them all the same."""
    lines = [f"the river {i:03} {'река' * (i % 3)}" for i in range(100)]
    options = [write_lines("half.txt", lines), "data.separator=line", "data.val_share=0.2"]
    config, data = prepare_config(*options, letters_only)
    letters = [sum(c in LETTERS for c in line) for line in lines]
    assert data.train.n_bytes + data.val.n_bytes == sum(letters)
    assert validation_target_bytes(config, data) == data.val.n_bytes
    assert data.val.n_tokens == data.val.n_bytes + data.val.n_documents + 1
    (account,) = data.accounts
    assert account.left_out == {
        "white space that the tokenizer leaves out": 300,
        "characters that the tokenizer has no entry for": 300 + 8 * sum(i % 3 for i in range(100)),
        "separators between documents": 100,
    }
    spaces, characters = data.remarks
    assert spaces == "the tokenizer 'letters' leaves out 300 white-space characters of half.txt"
    assert "because it has no entry for them: " in characters and "'р' 99 times" in characters


def test_a_text_that_vanishes_is_refused_with_its_characters(letters_only):
    options = [write_lines("korean.txt", ["강은 흐른다"] * 50), "data.separator=line"]
    for ends in ([], NO_ENDS):
        with pytest.raises(UserError) as error:
            prepare_config(*options, letters_only, *ends)
        assert "'letters' has no entry for any character of the " in str(error.value)
        assert "'강' " in str(error.value)
    assert shard_folders(Path("data")) == []


# ---- the report ----


def test_the_report_accounts_for_every_byte_of_all_files(letters_only, capsys):
    """Bytes to train on and to validate on, and those left out, are the bytes of the files."""
    folder = Path("texts")
    folder.mkdir()
    (folder / "a.txt").write_text("the river 1\n\n \nfish, река\n" * 30, encoding="utf-8")
    (folder / "b.jsonl").write_text('{"id": 1, "text": "old \\u0441 house"}\n' * 20)
    (folder / "c.csv").write_text('text,n\n"bread, ""fresh""",1\n' * 1)
    (folder / "d.md").write_text("wide text\nmore", encoding="utf-16")
    (folder / "e.html").write_text("<p>not read</p>")
    (folder / ".f.txt").write_text("hidden")
    options = ["data.path=texts", "data.separator=line", "data.val_share=0.4", letters_only]
    report = build_report(*prepare_config(*options))
    (source,) = report.as_json()["sources"]
    assert source["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    in_text = report.train.bytes + report.validation.bytes
    assert in_text + sum(source["left_out"].values()) == source["bytes"]
    assert source["left_out"]["files of other kinds"] == 15
    assert source["left_out"]["hidden files"] == 6
    assert source["left_out"]["documents of white space"] == 30
    print_report(report)
    printed = capsys.readouterr().out
    assert f"bytes of texts: {source['bytes']:,}\n" in printed
    assert "    not in the text above: 15 of files of other kinds\n" in printed
    assert "note: not read in the folder texts: files of other kinds (1 .html)" in printed


def test_a_separator_that_does_not_occur_is_said():
    options = ["data.path=lines.txt", "data.tokenizer=byte"]
    _, data = prepare_config(*options, "data.separator=###")
    assert data.remarks == ("data.separator '###' does not occur in lines.txt",)
    assert prepare_config(*options, "data.separator=line")[1].remarks == ()


def test_the_account_of_a_val_path_is_beside_that_of_the_path():
    Path("val.txt").write_text("held out\n")
    options = ["data.path=lines.txt", "data.val_path=val.txt", "data.tokenizer=byte"]
    _, data = prepare_config(*options, "data.separator=line")
    assert [(account.name, account.bytes) for account in data.accounts] == [
        ("lines.txt", Path("lines.txt").stat().st_size), ("val.txt", 9),
    ]  # fmt: skip
    for folder in shard_folders(Path("data")):
        (folder / "account.json").write_text("[]")
    with pytest.raises(UserError, match=r"account.json is missing or damaged; delete its folder"):
        prepare_config(*options, "data.separator=line")
