"""Incremental detokenisation."""

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from pocketlm.tokenizer.build import build_tokenizer
from pocketlm.tokenizer.streaming import stream_text
from tests.support.tokenizer_kinds import BYTE_LEVEL, DATA, WIDE, named


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@settings(max_examples=100, deadline=None)
@given(text=WIDE | st.text().filter(lambda text: "\ufffd" not in text))
def test_streamed_pieces_are_the_text_and_never_half_a_character(kind, text):
    pieces = list(stream_text(named(kind), iter(named(kind).encode(text))))
    assert "".join(pieces) == text
    assert all(piece and "\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize(
    "kind, highest", [("byte", 256), ("char", 12), ("bpe:300", 299), ("gpt2", 50_256)]
)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_streamed_pieces_of_any_ids_are_their_decoding(kind, highest, data):
    """A model can draw anything: broken UTF-8, eos in the middle, unknown characters."""
    ids = data.draw(
        st.lists(
            st.integers(0, highest)
            | st.sampled_from([0, 1, min(highest, 0xE4), min(highest, 0x80)])
        )
    )
    assert "".join(stream_text(named(kind), iter(ids))) == named(kind).decode(ids)


def test_a_piece_appears_with_the_id_that_completes_it(tokenizer):
    ids = tokenizer.encode("a b.\nabc")
    taken = []
    pieces = stream_text(tokenizer, (taken.append(i) or i for i in ids))
    for number, piece in enumerate(pieces, 1):
        assert piece == tokenizer.decode([ids[number - 1]])
        assert len(taken) == number
    assert number == len(ids)


def test_a_tokenizer_that_drops_the_first_space_streams_all_the_others(tmp_path):
    """SentencePiece's convention: ▁ is a space, except before a text's first word."""
    backend = hf.Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "▁a": 2, "b": 3}, merges=[("▁", "a")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(str(tmp_path), DATA)
    ids = tokenizer.encode("a ab a a")
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids) == "a ab a a"
