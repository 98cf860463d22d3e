"""The verdict of a run: baselines, and the diagnosis of under- or overfitting."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pocketlm.config.sections import DataConfig
from pocketlm.data.prepare import prepare
from pocketlm.training import verdict


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "the cat sat on the mat. the dog sat on the log. " * 20 + "a zebra!"
    Path("text.txt").write_text(text)
    return prepare(DataConfig(path="text.txt", tokenizer="byte", val_share=0.1))


def test_baselines_equal_plain_counting(data):
    """The same three models written again with dictionaries, a token at a time."""
    train, val = (split.shards[0].tokens.tolist() for split in (data.train, data.val))
    vocab, unigrams = 257, Counter(train)
    pairs = Counter(zip(train, train[1:], strict=False))
    histories = Counter(train[:-1])
    followers = Counter(a for a, _ in pairs)
    bits = dict.fromkeys(("uniform", "unigram", "bigram"), 0.0)
    for a, b in zip(val, val[1:], strict=False):
        unigram = bigram = (unigrams[b] + 1) / (len(train) + vocab)
        if histories[a]:
            discounted = max(pairs[a, b] - 0.75, 0) / histories[a]
            bigram = discounted + 0.75 * followers[a] / histories[a] * unigram
        bits["uniform"] -= math.log2(1 / vocab)
        bits["unigram"] -= math.log2(unigram)
        bits["bigram"] -= math.log2(bigram)
    expected = {name: value / data.val.n_bytes for name, value in bits.items()}
    assert verdict.baselines(data) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("history", "tzQ")
def test_the_bigram_baseline_is_a_probability_distribution(data, monkeypatch, history):
    """Its probabilities over the vocabulary sum to one after every history, seen or not."""
    train = verdict.first_tokens(data.train)
    bytes_per_target = data.val.n_bytes / data.val.n_targets
    total = 0.0
    for target in range(257):
        pair = np.array([ord(history), target])
        tokens = {id(data.train): train, id(data.val): pair}
        monkeypatch.setattr(verdict, "first_tokens", lambda split, of=tokens: of[id(split)])
        total += 2 ** (-verdict.baselines(data)["bigram"] * bytes_per_target)
    assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    "train, val, best, word",
    [
        (3.0, 3.1, 3.1, "underfitting"),
        (2.0, 3.0, 3.0, "Beginning to overfit"),
        (1.0, 3.5, 3.0, "Overfitting"),
    ],
)
def test_the_verdict_tells_under_from_overfitting(train, val, best, word):
    assert word in verdict.diagnosis(train, val, best, 1.0)
