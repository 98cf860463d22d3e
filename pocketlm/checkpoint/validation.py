"""Validation of what stands in a checkpoint, before any of its values is used.

The checksums of a file say that it is as it was written, not that a training run wrote it: another
program, or a program's mistake, can have left a key out, or a number where a text belongs.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig

MAX_COUNT = 2**53  # of steps, tokens and batches; larger ones are no counts
MAX_DEPTH = 20  # of lists and mappings within each other

Check = Callable[[Any], bool]


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_optional(check: Check) -> Check:
    """Return a check that allows None too."""
    return lambda value: value is None or check(value)


def is_a(kind: type) -> Check:
    return lambda value: isinstance(value, kind)


def is_plain(value: Any, depth: int = 0) -> bool:
    """Return whether the value is what JSON can hold, and not nested deeply."""
    if isinstance(value, dict):
        keys_fit = all(isinstance(key, str) for key in value)
        return keys_fit and is_plain([*value.values()], depth)
    if isinstance(value, list | tuple):
        return depth < MAX_DEPTH and all(is_plain(each, depth + 1) for each in value)
    return value is None or type(value) in (bool, int, float, str)


def are_distinct_bytes(value: Any) -> bool:
    bytes_only = isinstance(value, list) and all(is_count(each) and each < 256 for each in value)
    return bytes_only and len(set(value)) == len(value)


def are_distinct_characters(value: Any) -> bool:
    return isinstance(value, str) and len(set(value)) == len(value)


CONTENT: dict[str, Check] = {"state_dict": is_a(dict), "global_step": is_count, "kit": is_a(dict)}
METADATA: dict[str, Check] = {  # of the entry `kit`
    "format": is_count,
    "config": lambda value: isinstance(value, dict) and is_plain(value),
    "tokenizer": lambda value: isinstance(value, dict) and is_plain(value),
    "tokens": is_count,
    "val_loss": is_optional(is_number),
}
OPTIONAL_METADATA: dict[str, Check] = {
    "quantized": lambda value: value in (None, "int8", "int4"),
    "chat_template": is_optional(is_a(str)),
    "data_sha256": is_optional(is_a(str)),
    "hardware": is_optional(is_a(dict)),
    "history": is_a(list),
    "waited": is_count,
}
TRAINING: dict[str, Check] = {  # what a run resumes from
    "loops": is_a(dict),
    "callbacks": is_a(dict),
    "optimizer_states": lambda value: isinstance(value, list) and len(value) == 1,
    "interval": is_a(dict),
}
INTERVAL: dict[str, Check] = {
    "nats": is_number,
    "targets": is_count,
    "tokens_seen": is_count,
    "validation": lambda value: isinstance(value, dict) and all(map(is_number, value.values())),
}


TOKENIZER: dict[str, dict[str, Check]] = {  # by kind
    "byte": {},
    "seen-bytes": {"seen": are_distinct_bytes},
    "char": {"name": is_a(str), "symbols": are_distinct_characters},
    "json": {
        "name": is_a(str),
        "json": is_a(str),
        "bos_id": is_optional(is_count),
        "eos_id": is_optional(is_count),
    },
}
OPTIONAL_TOKENIZER: dict[str, Check] = {
    "bos": is_a(bool),
    "eos": is_a(bool),
    "note": is_a(str),
    "end_ids": lambda value: isinstance(value, list | tuple) and all(map(is_count, value)),
    "special_tokens": lambda value: (
        isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
    ),
}


def content_problem(state: dict[str, Any]) -> str | None:
    """Return what is wrong with the content of a checkpoint, as a clause; None if nothing is."""
    for values, checks, required in (
        (state, CONTENT, True),
        (state.get("kit"), METADATA, True),
        (state.get("kit"), OPTIONAL_METADATA, False),
    ):
        if problem := first_wrong_key(values, checks, required=required):
            return problem
    for name, tensor in state["state_dict"].items():
        if not isinstance(name, str) or not is_plain_tensor(tensor):
            return f"the weight {name!r} is not a plain tensor"
    for place, value in leaves(state.get("optimizer_states")):
        if isinstance(value, Tensor) and not is_plain_tensor(value):
            return f"{place} of the optimizer is not a plain tensor"
    return None


def training_problem(state: dict[str, Any]) -> str | None:
    """Return why a run cannot resume from this content, as a clause; None if it can.

    The content has no problem of `content_problem`.
    """
    problem = first_wrong_key(state, TRAINING) or first_wrong_key(state["interval"], INTERVAL)
    problem = problem or random_state_problem(state["callbacks"])
    if problem:
        return problem
    if not are_counts(state["loops"]):
        return "a counter of its loops is not a count"
    if optimizer_steps(state["loops"]) != state["global_step"]:
        return f"its loops have not taken {state['global_step']} steps"
    return None


def non_finite_problem(state: dict[str, Any]) -> str | None:
    """Return which weight or optimizer state is not finite, as a clause; None if none is."""
    tensors = [*state["state_dict"].items(), *leaves(state.get("optimizer_states"))]
    for name, tensor in tensors:
        floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if floating and not torch.isfinite(tensor).all():
            return f"{name} is not finite"
    return None


def tokenizer_problem(state: dict[str, Any]) -> str | None:
    """Return what is wrong with the state of a tokenizer, as a clause; None if nothing is.

    A kind that is not known has no problem here: a newer version may know it.
    """
    kind = state.get("kind")
    checks = {"kind": is_a(str)} | TOKENIZER.get(kind if isinstance(kind, str) else "", {})
    problem = first_wrong_key(state, checks)
    return problem or first_wrong_key(state, OPTIONAL_TOKENIZER, required=False)


def first_wrong_key(values: Any, checks: dict[str, Check], *, required: bool = True) -> str | None:
    """Return a clause about the first key that is missing, if it is required, or wrong."""
    for key, check in checks.items():
        if key not in values:
            if required:
                return f"it has no {key!r}"
        elif not check(values[key]):
            return f"its {key!r} has a value that it cannot have"
    return None


def is_plain_tensor(value: Any) -> bool:
    """Return whether the value is a dense tensor whose every element is in the file.

    Of a tensor with a stride of 0, a few bytes would stand for any number of elements.
    """
    if not (isinstance(value, Tensor) and value.layout == torch.strided):
        return False
    stored = value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    return value.device.type == "cpu" and not value.is_quantized and stored


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of everything in nested dicts and lists that is neither."""
    pending = [(place, value)]  # and no recursion: a file may nest as deep as it likes
    while pending:
        place, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{place}.{key}".lstrip("."), item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(f"{place}[{i}]", item) for i, item in enumerate(value)]
        else:
            yield place, value


def are_counts(loops: dict[str, Any]) -> bool:
    """Return whether all numbers in the state of Lightning's loops are counts."""
    return all(is_count(value) for _, value in leaves(loops) if is_number(value))


def optimizer_steps(loops: dict[str, Any]) -> Any:
    """Return the optimizer steps in the state of Lightning's loops; None if they are not there."""
    value: Any = loops
    for key in (
        "fit_loop",
        "epoch_loop.automatic_optimization.optim_progress",
        "optimizer",
        "step",
        "total",
        "completed",
    ):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def random_state_problem(callbacks: dict[str, Any]) -> str | None:
    """Return a clause if the random state is missing or none; checkpoints on MPS have one more."""
    state, best = callbacks.get("RandomState"), callbacks.get("Checkpoints")
    if not isinstance(best, dict) or not is_optional(is_number)(best.get("best")):
        return "it has no lowest validation loss"
    try:
        assert isinstance(state, dict)
        for process in (state, *state.get("ranks", ())):
            random.Random().setstate(process["python"])
            torch.Generator().set_state(process["torch"])
    except (AssertionError, TypeError, LookupError, ValueError, RuntimeError, OverflowError):
        return "it has no random state"
    return None


def sizes_problem(config: ModelConfig, weights: dict[str, Tensor]) -> str | None:
    """Return which size of the config is not that of the weights, as a clause; None if all fit.

    Before the model is built: building one of a billion layers would not end.
    """
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    if len(layers) != config.n_layers:
        return f"its config has {config.n_layers} layers, and its weights {len(layers)}"
    embedding = weights.get("model.embed_tokens.weight", torch.empty(0))
    rows, width = embedding.shape if embedding.dim() == 2 else (0, 0)
    # an int4 weight has four values in a word
    if rows != config.vocab_size or config.d_model not in (width, 4 * width):
        return f"its embeddings are not {config.vocab_size} of {config.d_model} values"
    assert config.d_ff is not None and config.head_dim is not None
    largest = 4 * max(tensor.numel() for tensor in weights.values())
    if config.d_ff * config.d_model > largest:
        return f"its weights are smaller than d_ff {config.d_ff} says"
    if config.n_heads * config.head_dim * config.d_model > largest:
        return (
            f"its weights are smaller than n_heads {config.n_heads} of head_dim "
            f"{config.head_dim} say"
        )
    return None
