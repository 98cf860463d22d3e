"""Tokenizers by their name in a config, and from the state in a checkpoint."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pocketlm.errors import UserError
from pocketlm.hub.special_tokens import SpecialTokens, post_processor_adds
from pocketlm.hub.tokenizers import hub_tokenizer
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import GPT2_SIZE, JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer, SeenBytesTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from pocketlm.tokenizer.trimming import trim_vocabulary

SIZED = ("char", "bpe", "gpt2")  # a name of these kinds may have a size: bpe:4096


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from its `state()`. Raises UserError for an unknown kind."""
    # the first checkpoints lack both keys, and always had eos
    bos, eos = state.get("bos", False), state.get("eos", True)
    note = state.get("note", "")
    match state["kind"]:
        case "byte":
            return ByteTokenizer(bos, eos)
        case "seen-bytes":
            return SeenBytesTokenizer(bytes(state["seen"]), bos, eos)
        case "char":
            return CharTokenizer(state["symbols"], bos, eos, state["name"], note)
        case "json":
            bos_id, eos_id = state["bos_id"], state["eos_id"]
            special = SpecialTokens(
                bos_id,
                eos_id,
                adds_bos=not state.get("no_bos_in_front", False),
                separator_id=state.get("separator_id"),
                end_ids=tuple(state.get("end_ids", ())),
                names=state.get("special_tokens", {}),
            )
            return JsonTokenizer(state["json"], state["name"], bos_id, eos_id, note, special)
    raise UserError(f"unknown kind of tokenizer {state['kind']!r}; was it made by a newer version?")


def is_trained(name: str) -> bool:
    """Return whether the tokenizer of this name depends on the training documents."""
    return name in ("char", "seen-bytes") or name.startswith(tuple(f"{kind}:" for kind in SIZED))


def declared_size(name: str) -> int | None:
    """Return the size of the vocabulary that a tokenizer's name tells; None if it tells none.

    >>> [declared_size(name) for name in ("gpt2", "bpe:4096", "char", "tokenizer.json")]
    [50257, 4096, None, None]
    """
    kind, colon, size = name.partition(":")
    if colon and kind in SIZED and size.isdecimal():
        return int(size)
    return GPT2_SIZE if name == "gpt2" else None


def build_tokenizer(
    name: str,
    data_dir: str | Path,
    train_texts: Iterable[str] = (),
    bos: bool | None = None,
    eos: bool | None = None,
) -> Tokenizer:
    """Return the tokenizer of a name; one that is trained reads `train_texts`. Raises UserError.

    The name is `byte`, `seen-bytes`, `char`, `char:SIZE`, `bpe:SIZE`, `gpt2`, `gpt2:SIZE`, a path,
    or a name on the Hugging Face hub. `bos` and `eos` choose the special tokens around a document;
    None keeps those that the tokenizer has, which is only eos for byte, char, bpe and gpt2.
    """
    with_bos, with_eos = bool(bos), eos is not False
    kind, colon, _ = name.partition(":")
    if colon and kind in SIZED:
        size = parse_size(name, with_bos + with_eos)
        if kind == "gpt2":
            gpt2 = JsonTokenizer.gpt2(data_dir).with_bos_eos(bos, eos)
            return trim_vocabulary(gpt2, train_texts, size)
        if kind == "bpe":
            return JsonTokenizer.train_bpe(train_texts, size, with_bos, with_eos)
        return CharTokenizer.train(train_texts, with_bos, with_eos, size)
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
    return tokenizer.with_bos_eos(bos, eos)


def parse_size(name: str, n_special: int) -> int:
    """Return the SIZE of `kind:SIZE`; `n_special` is the number of bos and eos. Raises UserError.

    It is at least 256 bytes and <|endoftext|> for gpt2, <unk> and a character for char.
    """
    kind, _, size = name.partition(":")
    least = {"gpt2": 257, "bpe": 256 + n_special, "char": 2 + n_special}[kind]
    if size.isdecimal() and least <= int(size) and (kind != "gpt2" or int(size) <= GPT2_SIZE):
        return int(size)
    if kind == "gpt2":
        wanted = f"from {least} to {GPT2_SIZE:,}, for example gpt2:16384"
    else:
        wanted = f"of {least} or more, for example {kind}:4096"
    raise UserError(f"data.tokenizer {name!r}: write {kind}:SIZE with a size {wanted}")


def from_hub(name: str) -> JsonTokenizer:
    """Return a fast tokenizer of the Hugging Face hub, or its copy on this machine."""
    try:
        tokenizer = hub_tokenizer(name)
    except UserError as error:
        raise UserError(
            f"{error} (without the hub there are byte, seen-bytes, char, char:SIZE, bpe:SIZE, "
            "gpt2, gpt2:SIZE and the path of a tokenizer)"
        ) from error.__cause__
    json_text = tokenizer.backend_tokenizer.to_str()
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    bos = "" if bos_id is None else tokenizer.backend_tokenizer.id_to_token(bos_id)
    adds_bos = post_processor_adds(json.loads(json_text)["post_processor"], bos)
    return JsonTokenizer(json_text, name, bos_id, eos_id, special=SpecialTokens(adds_bos=adds_bos))
