"""The numbers a run prints about itself."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import Transformer
from pocketlm.config.loading import config_from_dict
from pocketlm.config.sections import DataConfig
from pocketlm.data.prepare import prepare
from pocketlm.hardware.devices import Hardware
from pocketlm.training import plan, verdict


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(
        "the cat sat on the mat. the dog sat on the log. " * 20 + "a zebra!"
    )
    return prepare(DataConfig(path="text.txt", tokenizer="byte", val_share=0.1))


def test_baselines_equal_plain_counting(data):
    """The same three models written again with dictionaries, a token at a time."""
    train, val = (part.shards[0].tokens.tolist() for part in (data.train, data.val))
    vocab, unigrams, pairs, histories = (
        257,
        Counter(train),
        Counter(zip(train, train[1:], strict=False)),
        Counter(train[:-1]),
    )
    kinds = Counter(a for a, _ in pairs)
    bits = dict.fromkeys(("uniform", "unigram", "bigram"), 0.0)
    for a, b in zip(val, val[1:], strict=False):
        p1 = (unigrams[b] + 1) / (len(train) + vocab)
        p2 = (
            max(pairs[a, b] - 0.75, 0) / histories[a] + 0.75 * kinds[a] / histories[a] * p1
            if histories[a]
            else p1
        )
        for name, p in (("uniform", 1 / vocab), ("unigram", p1), ("bigram", p2)):
            bits[name] -= math.log2(p)
    assert verdict.baselines(data) == pytest.approx(
        {name: value / data.val.n_bytes for name, value in bits.items()}, rel=1e-9
    )


def test_the_bigram_baseline_is_a_probability_distribution(data):
    """Its probabilities over the vocabulary sum to one after every history, seen or not."""
    train = data.train.shards[0].tokens
    for history in (ord("t"), ord("z"), ord("Q")):
        total = 0.0
        for target in range(257):
            data.val.shards[0].__dict__["tokens"] = np.array([history, target])
            total += 2 ** (
                -verdict.baselines(data)["bigram"] * data.val.n_bytes / data.val.n_targets
            )
        assert total == pytest.approx(1, abs=1e-9), (history, len(train))


@pytest.mark.parametrize(
    "train, val, best, word",
    [
        (3.0, 3.1, 3.1, "underfitting"),
        (2.0, 3.0, 3.0, "Beginning to overfit"),
        (1.0, 3.5, 3.0, "Overfitting"),
    ],
)
def test_the_verdict_tells_under_from_overfitting(train, val, best, word):
    assert word in verdict.fit_sentence(train, val, best, 1.0)


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("devices, accumulated", [(1, 1), (1, 3), (2, 1)])
def test_the_seconds_outside_the_head_are_those_of_the_operations_that_a_step_does_there(
    monkeypatch, tie_embeddings, devices, accumulated
):
    """A pass over all but the head, whose operations torch counts: weights' matmuls, and of attention's the half that is not future.

    A device takes `micro_batch_size` rows a pass, and reaches half of the rate that a single matmul has been measured at.
    """
    sections = {
        "model": {"n_layers": 3, "d_model": 48, "tie_embeddings": tie_embeddings},
        "training": {
            "seq_len": 20,
            "micro_batch_size": 5,
            "grad_accum_steps": accumulated,
            "max_steps": 7,
        },
        "hardware": {"devices": devices},
    }
    config = config_from_dict(sections).with_vocab_size(1000)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Transformer(config.model).hidden(torch.zeros(5, 20, dtype=torch.long)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    matmuls, of_all_pairs = counts.pop(torch.ops.aten.mm), counts.pop(torch.ops.aten.bmm)
    assert not counts
    asked = []
    monkeypatch.setattr(plan, "matmul_rate", lambda *of: asked.append(of) or 1e9)
    seconds = plan.seconds_outside_head(config, Hardware("cpu", "bf16-mixed", False, {}))
    assert asked == [("cpu", "bf16-mixed")]
    assert seconds == pytest.approx(
        7 * accumulated * (matmuls + of_all_pairs / 2) / 0.5e9, rel=1e-12
    )


def test_the_plan_states_counts_and_reasons(data):
    config = config_from_dict({"data": {"tokenizer": "byte"}}).with_vocab_size(257)
    hardware = Hardware(
        "cpu", "32-true", False, {"accelerator": "why-a", "precision": "why-p", "compile": "why-c"}
    )
    table = plan.plan(config, data, hardware)
    text = " ".join(str(cell) for column in table.columns for cell in column.cells)
    for part in (
        f"{config.model.n_parameters:,}",
        f"{data.train.n_tokens:,} and {data.val.n_tokens:,}",
        "why-a",
        "why-p",
        "why-c",
        "GB",
        "minutes",
    ):
        assert part in text
