"""Incremental detokenisation: what is streamed is what the whole text has after its prompt."""

from functools import cache

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.build import build_tokenizer
from pocketlm.tokenizer.bytes import SeenBytesTokenizer
from pocketlm.tokenizer.streaming import TextStream, complete_text, stream_text
from tests.support.tokenizer_kinds import BYTE_LEVEL, DATA, WIDE, named

# ---- tokenizers of other makers, by what decodes them ----

SPACE = decoders.Replace("▁", " ")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # the byte b has the id b + 3
PIECES = ["<unk>", "<s>", "</s>", *BYTES, "▁", "▁Paris", "a", "b", "é", "▁▁", "\ufffd", "中", "▁a"]
WORDS = ["[UNK]", "the", "##ly", "##s", ".", ",", "river", "'", "s", "n't", "do"]
DECODERS = {
    "llama": (
        PIECES,
        decoders.Sequence(
            [SPACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    ),
    "gemma": (PIECES, decoders.Sequence([SPACE, decoders.ByteFallback(), decoders.Fuse()])),
    "t5": (PIECES, decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "metaspace": (PIECES, decoders.Metaspace()),
    "metaspace first": (PIECES, decoders.Metaspace(prepend_scheme="first")),
    "metaspace never": (PIECES, decoders.Metaspace(prepend_scheme="never")),
    "word pieces": (WORDS, decoders.WordPiece()),
    "word pieces, no cleanup": (WORDS, decoders.WordPiece(cleanup=False)),
    "end of word": (["a", "b</w>", "ab</w>", ",</w>", "c"], decoders.BPEDecoder()),
    "ctc": (["<pad>", "|", "a", "b"], decoders.CTC()),
    "none": (WORDS, None),
}
WHOLE = ["😀", "中", "é", " ", "a", "\n", "\ufffd"]  # that byte tokens spell


@cache
def foreign(kind: str) -> JsonTokenizer:
    pieces, decoder = DECODERS[kind]
    backend = hf.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.decoder = decoder
    backend.add_tokens(["<|user|>", " x é"])
    return JsonTokenizer(backend.to_str(), kind, None, None)


def whole_characters(kind: str) -> st.SearchStrategy[list[int]]:
    """Ids of any tokens, byte tokens only where they make a character."""
    tokenizer = foreign(kind)
    backend, n = tokenizer.backend, tokenizer.vocab_size
    units = [[i] for i in range(n) if backend.id_to_token(i) not in BYTES]
    if kind in ("llama", "gemma", "t5"):
        units += [[3 + byte for byte in character.encode()] for character in WHOLE]
    return st.lists(st.sampled_from(units), max_size=6)


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_answer_is_the_librarys_text_of_prompt_and_answer_without_the_prompts(kind, data):
    tokenizer, units = foreign(kind), data.draw(whole_characters(kind))
    cut = data.draw(st.integers(0, len(units)))
    prompt, answer = sum(units[:cut], []), sum(units[cut:], [])

    def decode(ids: list[int]) -> str:
        return tokenizer.backend.decode(ids, skip_special_tokens=False)

    pieces = list(stream_text(tokenizer, answer, prompt))
    assert "".join(pieces) == decode(prompt + answer)[len(decode(prompt)) :]
    assert all(pieces)
    assert tokenizer.decode(prompt + answer) == decode(prompt + answer)


@pytest.mark.parametrize("kind", ["llama", "gemma", "t5"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_character_comes_with_its_last_byte(kind, data):
    text = data.draw(st.text(st.sampled_from("😀中éa"), min_size=1, max_size=5))
    stream = TextStream(foreign(kind), [PIECES.index("b")])
    for character in text:
        *first, last = [stream.push(3 + byte) for byte in character.encode()]
        assert not any(first) and last == character


def test_byte_fallback_has_a_replacement_character_for_each_byte_of_a_character_that_is_cut():
    """As in the library; whole characters beside it stay, as in SentencePiece."""
    tokenizer = foreign("llama")
    cut = [3 + byte for byte in "😀".encode()[:3]]
    b, zhong = PIECES.index("b"), [3 + byte for byte in "中".encode()]
    assert "".join(stream_text(tokenizer, [b, *cut])) == "b\ufffd\ufffd\ufffd"
    assert tokenizer.backend.decode([b, *cut]) == "b\ufffd\ufffd\ufffd"
    assert "".join(stream_text(tokenizer, [*zhong, *cut, b])) == "中\ufffd\ufffd\ufffdb"


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "llama", "char"])
def test_a_replacement_character_of_the_text_itself_is_not_held_back(kind):
    tokenizer = foreign(kind) if kind in DECODERS else named(kind)
    ids = (
        [3 + byte for byte in "\ufffd".encode()] if kind == "llama" else tokenizer.encode("\ufffd")
    )
    stream = TextStream(tokenizer, tokenizer.encode("a"))
    assert "".join([stream.push(i) for i in ids]) == "\ufffd"
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", ["byte", "gpt2", "llama", "seen-bytes"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("a é中😀"), max_size=6), data=st.data())
def test_a_character_that_the_prompt_began_belongs_to_the_answer(kind, text, data):
    """The complete text of any prompt, and the answer, are the whole text."""
    if kind == "llama":
        tokenizer: Tokenizer = foreign(kind)
        ids = [PIECES.index("b"), *(3 + byte for byte in text.encode())]
    else:
        seen = SeenBytesTokenizer.train(["a é中😀"])
        tokenizer = seen if kind == "seen-bytes" else named(kind)
        ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    before = complete_text(tokenizer, ids[:cut])
    assert before + "".join(stream_text(tokenizer, ids[cut:], ids[:cut])) == tokenizer.decode(ids)
    assert "\ufffd" not in before


# ---- tokenizers made here ----


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
