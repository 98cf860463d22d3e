"""Values in a checkpoint: a wrong value of any kind is refused in a sentence, never used.

The file itself is whole, with the right checksums: another program wrote it.
"""

import copy
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketlm.checkpoint import loading
from pocketlm.checkpoint.format import DamagedCheckpoint, read_checkpoint, save_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.checkpoint.validation import content_problem
from pocketlm.errors import UserError
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import SeenBytesTokenizer
from tests.support.checkpoints import tiny_checkpoint

MISSING = "(missing)"
WRONG = [MISSING, None, True, -1, 10**30, 0.5, float("nan"), "x", [], [[]], {}, b"x", torch.ones(2)]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value in nested dicts."""
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from places(inner, (*path, key))


def replaced(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return state


def json_state() -> dict[str, Any]:
    return JsonTokenizer.train_bpe(["abc abd"], 260).state()


def checkpoints() -> dict[str, dict[str, Any]]:
    """Return a checkpoint with each kind of tokenizer state."""
    base = tiny_checkpoint()[1]
    states = {"char": base["kit"]["tokenizer"], "bytes": SeenBytesTokenizer(b"abc").state()}
    large = tiny_checkpoint(vocab_size=300)[1]
    kinds = {kind: replaced(base, ("kit", "tokenizer"), state) for kind, state in states.items()}
    return kinds | {"json": replaced(large, ("kit", "tokenizer"), json_state())}


@pytest.mark.parametrize("kind", ["char", "bytes", "json"])
def test_a_wrong_value_anywhere_is_refused_in_a_sentence_or_harmless(kind):
    """Two of the wrong values at every place, drawn anew for each kind of tokenizer."""
    state, generator = checkpoints()[kind], random.Random(kind)
    tried = accepted = 0
    for path in places(state):
        if path[:2] == ("kit", "config") and len(path) > 2 and kind != "char":
            continue
        for value in generator.sample(WRONG, 2):
            save_checkpoint(replaced(state, path, value), Path("x.ckpt"))
            with suppress(UserError):
                load_checkpoint("x.ckpt").tokenizer.encode("abc")
                accepted += 1
            tried += 1
    assert accepted < tried / 2


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("n_layers", 9_000, "its config has 9000 layers, and its weights 1"),
        ("d_model", 2**16, "its embeddings are not 16 of 65536"),
        ("vocab_size", 2**20, "its embeddings are not 1048576 of"),
        ("d_ff", 2**18, "smaller than d_ff"),
        ("head_dim", 2**17, "smaller than n_heads 2 of head_dim 131072"),
    ],
    ids=str,
)
def test_a_size_that_the_weights_do_not_have_is_refused_before_the_model_is_built(
    key, value, message, monkeypatch
):
    """Building it would take minutes, or all memory."""
    monkeypatch.setattr(loading, "Transformer", None)
    state = replaced(tiny_checkpoint()[1], ("kit", "config", "model", key), value)
    save_checkpoint(state, Path("x.ckpt"))
    with pytest.raises(DamagedCheckpoint, match=message):
        load_checkpoint("x.ckpt")


def test_a_tensor_of_more_elements_than_the_file_has_is_refused():
    """A stride of 0 makes a thousand million elements of four bytes."""
    state = tiny_checkpoint()[1]
    state["state_dict"]["model.norm.weight"] = torch.zeros(1).expand(10**9)
    save_checkpoint(state, Path("x.ckpt"))
    with pytest.raises(DamagedCheckpoint, match="norm.weight' is not a plain tensor"):
        read_checkpoint("x.ckpt")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"kind": "json", "json": "{", "name": "x", "bos_id": None, "eos_id": 0},
            "cannot be built",
        ),
        ({"json": json_state()["json"].replace('"!":1', '"!":4000000000')}, "has 4000000001 ids"),
        ({"kind": "morse"}, "unknown kind of tokenizer 'morse'"),
        ({"kind": "seen-bytes", "seen": [1, 300]}, "'seen' has a value that it cannot have"),
        ({"kind": "char", "symbols": "aa"}, "'symbols' has a value that it cannot have"),
    ],
    ids=["no JSON", "huge id", "unknown kind", "no byte", "twice"],
)
def test_a_tokenizer_that_cannot_be_is_refused_in_a_sentence(change, message):
    state = replaced(checkpoints()["json"], ("kit", "tokenizer"), json_state() | change)
    save_checkpoint(state, Path("x.ckpt"))
    with pytest.raises(UserError, match=message):
        load_checkpoint("x.ckpt")


def test_a_file_that_may_not_be_read_is_not_taken_for_a_damaged_one(monkeypatch):
    """A run would otherwise go back to an older checkpoint, and lose steps."""
    save_checkpoint(tiny_checkpoint()[1], Path("x.ckpt"))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UserError, match="x.ckpt cannot be read") as error:
        read_checkpoint("x.ckpt")
    assert not isinstance(error.value, DamagedCheckpoint)


def test_values_that_are_nested_too_deeply_are_refused():
    """Python's recursion ends at a thousand levels, with an exception that names no file."""
    value: object = 1
    for _ in range(25):
        value = [value]
    state = replaced(tiny_checkpoint()[1], ("kit", "tokenizer", "note"), value)
    assert "'tokenizer' has a value that it cannot have" in str(content_problem(state))
