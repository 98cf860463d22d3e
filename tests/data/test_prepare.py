"""Preparation: the tokens of a file, of its two splits, of pieces, and what is refused."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pocketlm.corpus.chunks import SPLITS, is_validation
from pocketlm.data.loaders import build_rows
from pocketlm.data.prepare import prepare
from pocketlm.errors import UserError
from pocketlm.tokenizer.build import build_tokenizer
from tests.support.preparation import (
    byte_config,
    expected_content,
    only_shard,
    shard_content,
    shard_folders,
    split_texts,
    use_small_sizes,
    write_jsonl,
    write_text,
)

DATA = Path(__file__).parents[2] / "data"


# ---- one file, two splits ----

SINGLE = "aé€😀\nb€€a😀"


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 100])
def test_wherever_pieces_end_a_single_document_is_its_two_splits(tmp_path, small, piece):
    """The cut is at and inside each character, and so are the ends of blocks."""
    settings = small(piece, 4)
    path, raw = write_text(tmp_path / "text.txt", SINGLE), SINGLE.encode()
    for cut in range(1, len(raw)):
        share = 1 - (cut + 0.5) / len(raw)
        data = prepare(byte_config(tmp_path, path=path, val_share=share), settings)
        start = len(raw[:cut].decode(errors="ignore").encode())
        assert only_shard(data.train).tokens.tolist() == [256, *raw[:start], 256]
        assert only_shard(data.val).tokens.tolist() == [256, *raw[start:], 256]
        assert only_shard(data.train).offsets.tolist() == [0]
        assert only_shard(data.val).offsets.tolist() == [0]
        assert (data.train.n_bytes, data.val.n_bytes) == (start, len(raw) - start)


@pytest.mark.parametrize("kind", ["char", "bpe:300"])
def test_a_trained_tokenizer_sees_the_training_documents_only(kind, tmp_path):
    documents = [f"word {i} and more" for i in range(60)]
    rare = (f"{i} ßß ßß ßß" for i in range(1000))
    secret = next(document for document in rare if is_validation(document, 0.2))
    path = write_jsonl(tmp_path / "text.jsonl", [*documents, *[secret] * 30])
    data = prepare(byte_config(tmp_path, path=path, tokenizer=kind, val_share=0.2))
    seen = "".join(document for document in documents if not is_validation(document, 0.2))
    if kind == "char":
        assert set(data.tokenizer.symbols) == set(seen)
        assert 0 in only_shard(data.val).tokens
        assert 0 not in only_shard(data.train).tokens
    else:
        # There is no merge of its two bytes, although the 30 documents would have made it first.
        assert len(data.tokenizer.encode("ß")) == 2
        assert len(data.tokenizer.encode(" and more")) < len(" and more")


# ---- the tokens ----


DOCUMENTS = st.lists(st.text(alphabet="ab é😀\n", max_size=12), max_size=12)


def expected_splits(documents: list[str], piece: int) -> tuple[list[str], list[str]]:
    """Return the documents of train and of validation, half of each, by a plain loop."""
    if len(documents) == 1:
        raw = documents[0].encode()
        cut = len(raw[: len(raw) // 2].decode(errors="ignore").encode())
        train, val = raw[:cut].decode(), raw[cut:].decode()
        return [train] if train else [], [val] if val else []
    splits: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        digest = hashlib.sha256(document[:piece].encode()).digest()  # of the first piece
        splits[int.from_bytes(digest[:8], "big") / 2**64 < 0.5].append(document)
    return splits


@settings(max_examples=60, deadline=None)
@given(
    documents=DOCUMENTS,
    bos=st.booleans(),
    eos=st.booleans(),
    piece=st.integers(1, 9),
    batch=st.integers(1, 30),
)
@example(documents=[" ", "\n"], bos=False, eos=True, piece=4, batch=9)
def test_shards_are_what_a_plain_loop_makes(tmp_path_factory, documents, bos, eos, piece, batch):
    folder = tmp_path_factory.mktemp("plain")
    path = write_jsonl(folder / "x.jsonl", documents)
    not_blank = [document for document in documents if document.strip()]
    train, val = expected_splits(not_blank, piece)
    config = byte_config(folder, path=path, bos=bos, eos=eos, val_share=0.5)
    with pytest.MonkeyPatch.context() as patch:
        settings = use_small_sizes(patch, piece, batch)
        if not train or not val:
            message = "leaves nothing" if not_blank else "holds no text"
            with pytest.raises(UserError, match=message):
                prepare(config, settings)
            return
        ids = (256 if bos else None, 256 + bos if eos else None)
        expected = [expected_content(part, str.encode, *ids) for part in (train, val)]
        if min(len(tokens) for tokens, *_ in expected) < 2:
            with pytest.raises(UserError, match="a single token"):
                prepare(config, settings)
            return
        data = prepare(config, settings)
    assert [shard_content(only_shard(part)) for part in (data.train, data.val)] == expected
    assert data.train.n_targets == data.train.n_tokens - 1


@pytest.mark.usefixtures("wheels_only")
@pytest.mark.parametrize("kind", ["byte", "char", "bpe:300", "gpt2"])
@pytest.mark.parametrize("piece, batch", [(150, 100), (997, 4000), (2**20, 2**20)])
def test_documents_in_pieces_have_the_ids_that_they_have_whole(
    tmp_path, small, wiki, kind, piece, batch
):
    settings = small(piece, batch)
    odd = "Spaces   and\n\n\ttabs, 12 345,  naïve café 中文字 😀😀 end   " * 40
    documents = ["\n\n".join(wiki[:15]), odd, "short", "\n\n".join(wiki[15:30])]
    assert max(map(len, documents)) > 4 * piece or piece == 2**20
    val_path = write_jsonl(tmp_path / "val.jsonl", ["x"])
    path = write_jsonl(tmp_path / "x.jsonl", documents)
    config = byte_config(tmp_path, path=path, val_path=val_path, tokenizer=kind)
    data = prepare(config, settings)
    tokenizer = data.tokenizer
    expected = expected_content(documents, tokenizer.encode, None, tokenizer.eos_id)
    assert shard_content(only_shard(data.train)) == expected


@pytest.mark.usefixtures("wheels_only")
def test_a_single_document_in_pieces_has_the_ids_of_its_two_splits(tmp_path, small, wiki):
    settings = small(200, 300)
    text = "\n\n".join(wiki[:40])
    path = write_text(tmp_path / "x.txt", text)
    data = prepare(byte_config(tmp_path, path=path, tokenizer="gpt2", val_share=0.3), settings)
    gpt2, raw = build_tokenizer("gpt2", DATA), text.encode()
    train = raw[: int(len(raw) * 0.7)].decode(errors="ignore")
    val = text.removeprefix(train)
    for split, part in ((data.train, train), (data.val, val)):
        expected = expected_content([part], gpt2.encode, None, 50_256)
        assert shard_content(only_shard(split)) == expected


def test_a_text_file_is_its_bytes(tmp_path):
    """Line ends of Windows are kept, so that bits per byte count the bytes of the file."""
    path = write_text(tmp_path / "text.txt", b"one\r\ntwo\rthree\n")
    texts = split_texts(prepare(byte_config(tmp_path, path=path, val_share=0.4)))
    assert "".join(texts).encode() == b"one\r\ntwo\rthree\n"


def test_a_word_of_megabytes_is_cut_anyway(tmp_path, small):
    settings = small(7, 10)
    path = write_text(tmp_path / "x.txt", "x" * 1000)
    config = byte_config(tmp_path, path=path, tokenizer="bpe:300", val_share=0.1)
    data = prepare(config, settings)
    assert split_texts(data) == ["x" * 900, "x" * 100]
    assert len(only_shard(data.train).tokens) > len(data.tokenizer.encode("x" * 900)) + 2


def test_a_corpus_shorter_than_a_row_is_a_row(tmp_path):
    path = write_text(tmp_path / "x.txt", "ab")
    data = prepare(byte_config(tmp_path, path=path, val_share=0.5))
    assert shard_content(only_shard(data.train)) == ([256, 97, 256], [0], 1)
    assert shard_content(only_shard(data.val)) == ([256, 98, 256], [0], 1)
    config = SimpleNamespace(data=byte_config(tmp_path), training=SimpleNamespace(seq_len=256))
    assert [len(build_rows(config, data, split)) for split in SPLITS] == [1, 1]


# ---- what is refused ----


@pytest.mark.parametrize("raw, share, message", [
    (b"", 0.1, "text.txt holds no text"),
    (b" \n\n", 0.1, "text.txt holds no text"),
    (b"abcde\xff", 0.1, "text.txt is not UTF-8: byte 5 is 0xff"),
    (b"a", 0.1, "val_share 0.1 leaves nothing for the train part of"),
    ("é".encode() * 3, 0.9, "leaves nothing for the train part"),
    (b"a" * 10, 1e-17, "leaves nothing for the val part"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["byte", "char"])
def test_a_text_that_cannot_be_split_says_why(tmp_path, raw, share, message, kind):
    path = write_text(tmp_path / "text.txt", raw)
    with pytest.raises(UserError) as error:
        prepare(byte_config(tmp_path, path=path, val_share=share, tokenizer=kind))
    assert message in str(error.value)
    assert not (tmp_path / "cache" / "shards").exists() or shard_folders(tmp_path / "cache") == []


@pytest.mark.parametrize("val, empty", [(False, "val"), (True, "train")])
def test_documents_that_are_all_in_one_split_are_refused(tmp_path, val, empty):
    documents = [str(i) for i in range(400) if is_validation(str(i), 0.5) == val]
    path = write_jsonl(tmp_path / "x.jsonl", documents)
    message = (
        rf"val_share 0.5 leaves nothing for the {empty} part of {path} "
        rf"\(documents: {len(documents)}\); change it, or give more text"
    )
    with pytest.raises(UserError, match=message):
        prepare(byte_config(tmp_path, path=path, val_share=0.5))
    assert shard_folders(tmp_path / "cache") == []


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_an_empty_val_path_is_named(tmp_path, kind):
    path, val_path = write_text(tmp_path / "x.txt", "text"), write_text(tmp_path / "y.txt", "\n")
    with pytest.raises(UserError, match="y.txt holds no text"):
        prepare(byte_config(tmp_path, path=path, val_path=val_path, tokenizer=kind))


def test_a_corpus_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.txt is not a file"):
        prepare(byte_config(tmp_path, path="gone.txt"))
    with pytest.raises(UserError, match="'wikii'.*did you mean wiki?"):
        prepare(byte_config(tmp_path, source="wikii"))
