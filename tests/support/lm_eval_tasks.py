"""What the tests of lm-evaluation-harness share: random checkpoints and a suite of all types."""

from pathlib import Path
from typing import Any

import torch

from pocketlm.checkpoint.format import checkpoint_metadata, save_weights
from pocketlm.checkpoint.loading import Checkpoint, load_checkpoint
from pocketlm.config.sections import Config, DataConfig, TrainingConfig
from pocketlm.tokenizer.base import Tokenizer
from tests.support.models import random_model

OWN_SUITE = r"""
schema: 1
name: own suite
cases:
  - id: sea
    type: choice
    prompt: "the dogs ran to the"
    answers: [" sea"]
    distractors: [" mat", " cats and the dogs", " é"]
  - {id: four, prompt: "1 2 3", answers: [" 4", " four"], distractors: [" 5", " 3", " 2"]}
  - {id: merged, prompt: "xyz ab", answers: ["c"], distractors: ["d", "cb"], joined: true}
  - {id: line, type: choice, prompt: "the cat\n", answers: ["sat"], distractors: ["mat", "ran"]}
  - id: digits
    type: choice
    prompt: "1"
    answers: ["2"]
    distractors: [" 0", "{{prompt}}"]
    joined: true
  - id: bytes
    type: choice
    prompt: "the cat"
    answers: [" ran"]
    distractors: [" sat"]
    scoring: byte
  - {id: pair, type: minimal_pair, good: "the cat sat.", bad: "the sat cat."}
  - {id: other-pair, type: minimal_pair, good: "The dogs run, [0]", bad: "The dogs runs, [0]"}
  - id: which
    type: schema
    contexts: ["the cat", "the dogs", "xyz"]
    gold: 1
    continuation: " ran to the sea."
  - {id: what, type: schema, contexts: ["1", "0"], continuation: " 2"}
  - {id: next, prompt: "the cat sat on the", answers: [" mat"]}
  - {id: next-token, prompt: "PROMPT", answers: ["GREEDY"], joined: true}
  - {id: prose, type: text, text: "the cat sat on the mat."}
  - {id: any, prompt: "the dogs", answers: [" ran", " sat"]}
  - {id: free, type: generate, prompt: "the", match: "cat"}
"""


def save_random(path: Path, tokenizer: Tokenizer, **sizes: Any) -> Checkpoint:
    """Write a checkpoint of random weights, large enough that scores differ; load it."""
    model = random_model(vocab_size=tokenizer.vocab_size, **{"max_seq_len": 160} | sizes)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)  # larger biases would decide alone
    config = Config(
        model=model.config,
        data=DataConfig(tokenizer=tokenizer.name),
        training=TrainingConfig(seq_len=model.config.max_seq_len),
    )
    metadata = checkpoint_metadata(config, tokenizer.state(), tokens=10, val_loss=2.0)
    save_weights(model.state_dict(), 1, metadata, path)
    return load_checkpoint(path)
