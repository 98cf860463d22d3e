"""Tokenizers by name, and from a checkpoint's state."""

from collections.abc import Iterable
from pathlib import Path

from pocketlm.errors import UserError
from pocketlm.hub import hub_tokenizer
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer, SeenBytesTokenizer
from pocketlm.tokenizer.characters import CharTokenizer


def from_state(state: dict) -> Tokenizer:
    ends = (state.get("bos", False), state.get("eos", True))  # the first checkpoints do not say
    match state["kind"]:
        case "byte":
            return ByteTokenizer(*ends)
        case "seen-bytes":
            return SeenBytesTokenizer(bytes(state["seen"]), *ends)
        case "char":
            return CharTokenizer(state["symbols"], *ends, state["name"], state.get("note", ""))
        case "json":
            return JsonTokenizer(state["json"], state["name"], state["bos_id"], state["eos_id"])
    raise UserError(f"unknown kind of tokenizer {state['kind']!r}; was it made by a newer version?")


def is_trained(name: str) -> bool:
    """Whether the tokenizer of this name has to see training documents first."""
    return name in ("char", "seen-bytes") or name.startswith(("char:", "bpe:"))


def build_tokenizer(
    name: str,
    data_dir: str | Path,
    train_texts: Iterable[str] = (),
    bos: bool | None = None,
    eos: bool | None = None,
) -> Tokenizer:
    """`byte`, `seen-bytes`, `char`, `char:SIZE`, `bpe:SIZE`, `gpt2`, a path, or a name on the hub. Those that are trained read the texts.

    `bos` and `eos` say what stands around a document; None is what the tokenizer has, which is eos for byte, char and bpe.
    """
    ends = (bool(bos), eos is not False)
    kind, sized, size = name.partition(":")
    if sized and kind in ("char", "bpe"):
        least = sum(ends) + (2 if kind == "char" else 256)
        if not size.isdecimal() or int(size) < least:
            raise UserError(
                f"data.tokenizer {name!r}: write {kind}:SIZE with a size of {least} or more, for example {kind}:4096"
            )
        if kind == "bpe":
            return JsonTokenizer.train_bpe(train_texts, int(size), *ends)
        return CharTokenizer.train(train_texts, *ends, int(size))
    if name == "byte":
        return ByteTokenizer(*ends)
    if name == "seen-bytes":
        return SeenBytesTokenizer.train(train_texts, *ends)
    if name == "char":
        return CharTokenizer.train(train_texts, *ends)
    if name == "gpt2":
        tokenizer = JsonTokenizer.gpt2(data_dir)
    elif Path(name).exists():
        tokenizer = JsonTokenizer.from_file(Path(name))
    else:
        tokenizer = from_hub(name)
    return tokenizer if bos is eos is None else tokenizer.with_ends(bos, eos)


def from_hub(name: str) -> JsonTokenizer:
    """A fast tokenizer by its name on the Hugging Face hub, or from the hub's cache on this machine."""
    try:
        tokenizer = hub_tokenizer(name)
    except UserError as error:
        raise UserError(
            f"{error} (without the hub there are byte, seen-bytes, char, char:SIZE, bpe:SIZE, gpt2 and the path of a tokenizer)"
        ) from error.__cause__
    return JsonTokenizer(
        tokenizer.backend_tokenizer.to_str(), name, tokenizer.bos_token_id, tokenizer.eos_token_id
    )
