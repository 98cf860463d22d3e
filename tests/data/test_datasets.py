"""Datasets: packed rows, padded rows, the rows of several shards, and the mask of documents."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import ModelConfig, Transformer
from pocketlm.data.datasets import JoinedDataset, PackedLMDataset, PaddedLMDataset
from pocketlm.model.loss import IGNORE_INDEX
from pocketlm.tokenizer.bytes import ByteTokenizer
from tests.support.rows import write_shard

texts = st.text(alphabet="abé😀\n", min_size=1, max_size=12)


def lists(batch: dict[str, torch.Tensor]) -> dict[str, list]:
    return {name: rows.tolist() for name, rows in batch.items()}


# ---- packed rows ----


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(1, 12))
def test_every_token_but_the_first_is_a_target_once(n, seq_len):
    tokens = np.arange(100, 100 + n)
    dataset = PackedLMDataset(tokens, seq_len)
    items = [dataset[i] for i in range(len(dataset))]
    pairs = []
    for item in items:
        inputs, targets = item["input_ids"], item["targets"]
        counts = targets != IGNORE_INDEX
        pairs += list(zip(inputs[counts].tolist(), targets[counts].tolist(), strict=True))
        assert inputs.shape == targets.shape == (seq_len,)
        assert torch.equal(inputs[1:][counts[1:]], targets[:-1][counts[1:]])
        assert (inputs[~counts] == 0).all()
    # Each token is predicted from the token before it.
    assert pairs == list(zip(tokens.tolist(), tokens.tolist()[1:], strict=False))
    assert all((item["targets"] != IGNORE_INDEX).all() for item in items[:-1])


def plain_row(window: list[int], seq_len: int) -> tuple[list[int], list[int]]:
    """Return the inputs and targets of a window of up to T + 1 tokens."""
    missing = seq_len + 1 - max(1, len(window))
    return window[:-1] + [0] * missing, window[1:] + [IGNORE_INDEX] * missing


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 65_535), min_size=2, max_size=60), st.integers(1, 12), st.data())
def test_a_batch_of_an_array_is_what_a_plain_loop_makes(tokens, seq_len, data):
    dataset = PackedLMDataset(np.array(tokens, "<u2"), seq_len)
    indices = data.draw(st.lists(st.integers(-1, len(dataset) - 1), min_size=1, max_size=8))
    expected = [
        plain_row(tokens[i * seq_len : i * seq_len + seq_len + 1] if i >= 0 else [], seq_len)
        for i in indices
    ]
    batch = dataset.__getitems__(indices)
    assert lists(batch) == {
        "input_ids": [x for x, _ in expected],
        "targets": [y for _, y in expected],
    }
    assert {rows.dtype for rows in batch.values()} == {torch.int64}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(texts, min_size=1, max_size=6),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_a_batch_of_a_shard_is_what_a_plain_loop_makes(documents, seq_len, bos, eos, data):
    """The document ids too: the loop that joins the documents counts them."""
    tokenizer = ByteTokenizer(bos, eos)
    tokens, owners = [], []
    for number, document in enumerate(documents):
        tokens += [*tokenizer.document_prefix, *document.encode(), *tokenizer.document_suffix]
        owners += [number] * (len(tokens) - len(owners))
    tokens += tokenizer.corpus_suffix
    with tempfile.TemporaryDirectory() as folder:
        dataset = PackedLMDataset(
            write_shard(Path(folder) / "x.bin", tokenizer, documents), seq_len, document_mask=True
        )
        assert len(dataset) == len(range(0, len(tokens) - 1, seq_len))
        indices = data.draw(st.lists(st.integers(-1, len(dataset) - 1), min_size=1, max_size=8))
        batch = dataset.__getitems__(indices)
    expected = [
        plain_row(tokens[i * seq_len : i * seq_len + seq_len + 1] if i >= 0 else [], seq_len)
        for i in indices
    ]
    assert (batch["input_ids"].tolist(), batch["targets"].tolist()) == (
        [x for x, _ in expected],
        [y for _, y in expected],
    )
    assert batch["doc_ids"].dtype == torch.int64
    for index, ids, targets in zip(indices, batch["doc_ids"], batch["targets"], strict=True):
        counted = ids[targets != IGNORE_INDEX].tolist()
        assert [i - 1 for i in counted] == owners[index * seq_len :][: len(counted)]


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path / "x.bin", ByteTokenizer(), ["abc", "d", "efghijk", "lm"])


def test_document_ids_change_where_a_document_begins(shard):
    """Each of abc, d, efghijk and lm starts with 256, and the last 256 is a target only."""
    dataset = PackedLMDataset(shard, 4, document_mask=True)
    batch = dataset.__getitems__(range(len(dataset)))
    counts = batch["targets"].flatten() != IGNORE_INDEX
    expected = [256, *b"abc", 256, *b"d", 256, *b"efghijk", 256, *b"lm"]
    assert batch["input_ids"].flatten()[counts].tolist() == expected
    ids = batch["doc_ids"].flatten()[counts].tolist()
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
    assert batch["targets"][1].tolist() == [IGNORE_INDEX] * 3
    assert all(tensor.shape == (2, 3) for tensor in batch.values())


# ---- padded rows ----


@settings(max_examples=100, deadline=None)
@given(st.lists(texts, min_size=1, max_size=6), st.integers(1, 30), st.booleans(), st.booleans())
def test_a_padded_row_is_one_document_with_its_special_tokens(documents, seq_len, bos, eos):
    """Each document is whole up to T + 1 tokens, and no token of another document has a loss.

    A document of a single token has no row: a batch of such rows would divide by no targets.
    """
    tokenizer = ByteTokenizer(bos, eos)
    before = [256] * bos or [256] * eos  # an eos starts a document if there is no bos
    after = [256 + bos] * eos
    windows = [[*before, *document.encode(), *after][: seq_len + 1] for document in documents]
    with tempfile.TemporaryDirectory() as folder:
        dataset = PaddedLMDataset(
            write_shard(Path(folder) / "x.bin", tokenizer, documents),
            seq_len,
            bool(tokenizer.corpus_suffix),
        )
        windows = [window for window in windows if len(window) > 1]
        assert len(dataset) == len(windows)
        if not windows:
            return
        batch = lists(dataset.__getitems__([*range(len(windows)), -1]))
    expected = [plain_row(window, seq_len) for window in [*windows, []]]
    assert batch == {"input_ids": [x for x, _ in expected], "targets": [y for _, y in expected]}


@pytest.mark.parametrize("bos, eos, inputs, targets", [
    (False, False, [97, 98], [98, 99]),
    (True, False, [256, 97, 98], [97, 98, 99]),
    (False, True, [256, 97, 98, 99], [97, 98, 99, 256]),
    (True, True, [256, 97, 98, 99], [97, 98, 99, 257]),
])  # fmt: skip
def test_a_padded_document_spelled_out(tmp_path, bos, eos, inputs, targets):
    tokenizer = ByteTokenizer(bos, eos)
    dataset = PaddedLMDataset(
        write_shard(tmp_path / "x.bin", tokenizer, ["abc", "de"]), 6, bool(tokenizer.corpus_suffix)
    )
    row, missing = lists(dataset[0]), 6 - len(inputs)
    assert row == {
        "input_ids": inputs + [0] * missing,
        "targets": targets + [IGNORE_INDEX] * missing,
    }


# ---- several shards ----


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=4), st.integers(1, 7), st.data())
def test_joined_rows_are_the_rows_of_the_datasets_in_any_order(sizes, seq_len, data):
    parts = [
        PackedLMDataset(np.arange(1000 * number, 1000 * number + size), seq_len)
        for number, size in enumerate(sizes)
    ]
    joined = JoinedDataset(parts)
    every = [part[i] for part in parts for i in range(len(part))]
    assert len(joined) == len(every)
    indices = data.draw(st.lists(st.integers(-1, len(every) - 1), min_size=1, max_size=10))
    batch = joined.__getitems__(indices)
    blank = {
        "input_ids": torch.zeros(seq_len, dtype=torch.long),
        "targets": torch.full((seq_len,), IGNORE_INDEX),
    }
    for name in ("input_ids", "targets"):
        assert torch.equal(
            batch[name], torch.stack([every[i][name] if i >= 0 else blank[name] for i in indices])
        )


def test_joined_rows_keep_their_document_ids(tmp_path):
    sources = {"one": ["ab", "cdef"], "two": ["g", "h", "i"]}
    shards = (
        write_shard(tmp_path / name, ByteTokenizer(), documents)
        for name, documents in sources.items()
    )
    parts = [PackedLMDataset(shard, 5, document_mask=True) for shard in shards]
    batch = JoinedDataset(parts).__getitems__([3, 0, 2])
    assert batch["doc_ids"].tolist() == [
        parts[i][j]["doc_ids"].tolist() for i, j in ((1, 1), (0, 0), (1, 0))
    ]


# ---- the mask of documents, in the model ----


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=257, max_seq_len=32, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1
    )
    model = Transformer(config).eval()
    for parameter in model.parameters():  # the initial ones are too small for attention to matter
        parameter.data.mul_(10)
    return model


def logits_of(model: Transformer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(batch["input_ids"], doc_ids=batch.get("doc_ids"))


def row_of(folder: Path, documents: list[str], document_mask: bool) -> dict[str, torch.Tensor]:
    shard = write_shard(folder / "x.bin", ByteTokenizer(), documents)
    return PackedLMDataset(shard, 32, document_mask).__getitems__([0])


@torch.no_grad()
def test_under_document_mask_no_document_sees_another(model, tmp_path):
    """A change of one of three documents changes no bit of the others' logits.

    Without the mask, it changes those of later documents.
    """
    documents = ["abcdefgh", "ijklmnop", "qrstuvwx"]
    spans = [slice(0, 9), slice(9, 18), slice(18, 27)]  # each starts with an eos
    for mask in (True, False):
        before = logits_of(model, row_of(tmp_path, documents, mask))
        for changed in range(3):
            others = documents.copy()
            others[changed] = documents[changed].upper()
            after = logits_of(model, row_of(tmp_path, others, mask))
            same = [torch.equal(before[:, span], after[:, span]) for span in spans]
            assert same == [number != changed if mask else number < changed for number in range(3)]


@torch.no_grad()
def test_under_document_mask_a_document_is_read_as_if_it_were_alone(model, tmp_path):
    """Anywhere in a row, its logits are those of a row that it starts."""
    together = row_of(tmp_path, ["abcde", "fghijklm"], True)
    alone = row_of(tmp_path, ["fghijklm"], False)
    logits = model(together["input_ids"], doc_ids=together["doc_ids"])[0, 6:15]
    torch.testing.assert_close(logits, model(alone["input_ids"])[0, :9], atol=1e-5, rtol=1e-5)
    unmasked = model(together["input_ids"])[0, 6:15]
    assert (unmasked - logits).abs().max() > 0.01


@torch.no_grad()
def test_under_document_mask_positions_restart(model, tmp_path):
    """RoPE is relative, so that only the last bits differ if positions do not restart."""
    row = row_of(tmp_path, ["abcde", "fghijklm"], True)
    ids, doc_ids = row["input_ids"], row["doc_ids"]
    restarting, continued = torch.tensor([[*range(6), *range(26)]]), torch.arange(32)[None]
    logits = model(ids, doc_ids=doc_ids)[0, :15]
    assert torch.equal(logits, model(ids, doc_ids=doc_ids, positions=restarting)[0, :15])
    assert not torch.equal(logits, model(ids, doc_ids=doc_ids, positions=continued)[0, :15])
