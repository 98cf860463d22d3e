"""Tokenizers by their name in a config, and from the state in a checkpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pocketlm.errors import UserError
from pocketlm.hub.tokenizers import hub_tokenizer
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer, SeenBytesTokenizer
from pocketlm.tokenizer.characters import CharTokenizer


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from its `state()`. Raises UserError for an unknown kind."""
    # the first checkpoints lack both keys, and always had eos
    bos, eos = state.get("bos", False), state.get("eos", True)
    match state["kind"]:
        case "byte":
            return ByteTokenizer(bos, eos)
        case "seen-bytes":
            return SeenBytesTokenizer(bytes(state["seen"]), bos, eos)
        case "char":
            note = state.get("note", "")
            return CharTokenizer(state["symbols"], bos, eos, state["name"], note)
        case "json":
            return JsonTokenizer(state["json"], state["name"], state["bos_id"], state["eos_id"])
    raise UserError(f"unknown kind of tokenizer {state['kind']!r}; was it made by a newer version?")


def is_trained(name: str) -> bool:
    """Return whether the tokenizer of this name is trained on the training documents."""
    return name in ("char", "seen-bytes") or name.startswith(("char:", "bpe:"))


def build_tokenizer(
    name: str,
    data_dir: str | Path,
    train_texts: Iterable[str] = (),
    bos: bool | None = None,
    eos: bool | None = None,
) -> Tokenizer:
    """Return the tokenizer of a name; one that is trained reads `train_texts`. Raises UserError.

    The name is `byte`, `seen-bytes`, `char`, `char:SIZE`, `bpe:SIZE`, `gpt2`, a path, or a name on
    the Hugging Face hub. `bos` and `eos` choose the special tokens around a document; None keeps
    those that the tokenizer has, which is only eos for byte, char and bpe.
    """
    with_bos, with_eos = bool(bos), eos is not False
    kind, colon, size = name.partition(":")
    if colon and kind in ("char", "bpe"):
        n_special = with_bos + with_eos
        min_size = n_special + (2 if kind == "char" else 256)  # <unk> and a character, or all bytes
        if not size.isdecimal() or int(size) < min_size:
            raise UserError(
                f"data.tokenizer {name!r}: write {kind}:SIZE with a size of {min_size} or more, "
                f"for example {kind}:4096"
            )
        if kind == "bpe":
            return JsonTokenizer.train_bpe(train_texts, int(size), with_bos, with_eos)
        return CharTokenizer.train(train_texts, with_bos, with_eos, int(size))
    if name == "byte":
        return ByteTokenizer(with_bos, with_eos)
    if name == "seen-bytes":
        return SeenBytesTokenizer.train(train_texts, with_bos, with_eos)
    if name == "char":
        return CharTokenizer.train(train_texts, with_bos, with_eos)
    if name == "gpt2":
        tokenizer = JsonTokenizer.gpt2(data_dir)
    elif Path(name).exists():
        tokenizer = JsonTokenizer.from_file(Path(name))
    else:
        tokenizer = from_hub(name)
    if bos is None and eos is None:
        return tokenizer
    return tokenizer.with_bos_eos(bos, eos)


def from_hub(name: str) -> JsonTokenizer:
    """Return a fast tokenizer of the Hugging Face hub, or its copy on this machine."""
    try:
        tokenizer = hub_tokenizer(name)
    except UserError as error:
        raise UserError(
            f"{error} (without the hub there are byte, seen-bytes, char, char:SIZE, bpe:SIZE, "
            "gpt2 and the path of a tokenizer)"
        ) from error.__cause__
    return JsonTokenizer(
        tokenizer.backend_tokenizer.to_str(), name, tokenizer.bos_token_id, tokenizer.eos_token_id
    )
