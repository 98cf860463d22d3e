"""Tokens that begin and end a text, from everything that a model's files say about them.

The field's tools write it in many places; `read_special_tokens` knows them all, in this order:

    tokenizer_config.json     bos_token, eos_token, ... ; add_bos_token; added_tokens_decoder
    special_tokens_map.json   the same names, in folders of older tools
    added_tokens.json         tokens that tokenizer.json may lack, in folders of older tools
    tokenizer_class           GPT-2's and Llama's classes name tokens by themselves; without a
                              class, config.json's model_type decides, as in transformers
    generation_config.json    bos_token_id, and eos_token_id: an id or a list, each of which ends
    config.json               a text
    tokenizer.json            whether a template of its post-processor puts bos in front

A tokenizer.json without any of these has bos and eos if its vocabulary has their usual names.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketlm.errors import UserError

Values = dict[str, Any]

END_OF_TEXT = "<|endoftext|>"

NAMES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
LISTS = ("additional_special_tokens", "extra_special_tokens")  # of names without a role

GPT2_DEFAULTS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
LLAMA_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# by the beginning of a tokenizer_class or of a model_type, in lower case
CLASS_DEFAULTS = {"gpt2": GPT2_DEFAULTS, "llama": LLAMA_DEFAULTS, "codellama": LLAMA_DEFAULTS}
# of the keys that are read, the types that transformers writes
CONFIG_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(NAMES, (str, dict)),
    **dict.fromkeys(LISTS, (list, dict)),
    "added_tokens_decoder": (dict,),
    "add_bos_token": (bool,),
}
TYPE_NAMES = {str: "a text", dict: "an object", list: "a list", bool: "true or false"}
USUAL = {"bos_token": ("<s>",), "eos_token": ("</s>", END_OF_TEXT)}


@dataclass
class SpecialTokens:
    """The tokens that begin and end a text, and their spelling by the names in chat templates."""

    bos_id: int | None = None
    eos_id: int | None = None
    adds_bos: bool = True  # the model has learned texts with bos in front
    separator_id: int | None = None  # between documents, if it is not eos
    end_ids: tuple[int, ...] = ()  # that end a generated text, besides eos
    names: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...
    notes: list[str] = field(default_factory=list)  # for the user


def choose_special_tokens(
    ids: dict[str, int], names: dict[str, str], ends: Iterable[int], adds_bos: bool
) -> SpecialTokens:
    """Return the special tokens for ids by spelling, names by role, and ids that end a text.

    The eos of a chat model may end the turns of a conversation. If it puts no bos in front of a
    text, <|endoftext|> has separated its documents, provided that the vocabulary has it.
    """
    bos_id, eos_id = (ids.get(names.get(name, "")) for name in ("bos_token", "eos_token"))
    ends = list(ends)
    if eos_id is None and ends:
        eos_id = ends.pop(0)
    separator_id = None if adds_bos or eos_id is None else ids.get(END_OF_TEXT)
    if separator_id == eos_id:
        separator_id = None
    if separator_id is not None:
        ends.insert(0, separator_id)
    others = tuple(i for i in dict.fromkeys(ends) if i != eos_id)
    return SpecialTokens(bos_id, eos_id, adds_bos, separator_id, others, names)


def read_special_tokens(folder: Path, json_text: str) -> tuple[SpecialTokens, str | None]:
    """Return the special tokens of a folder with this tokenizer.json, which has every key.

    The other value is a tokenizer.json with the tokens that this one lacks, or None. Raises
    UserError for a file that is not a JSON object.
    """
    config = read_json_object(folder / "tokenizer_config.json")
    require_types(config, CONFIG_TYPES, folder / "tokenizer_config.json")
    model = read_json_object(folder / "config.json")
    generation = read_json_object(folder / "generation_config.json")
    names, extra = read_names(folder, config, model)
    spec = json.loads(json_text)
    before = json.dumps(spec["added_tokens"])
    notes = add_tokens(spec, folder, config, {*names.values(), *extra})
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    if missing := [name for name in names if names[name] not in ids]:
        listed = ", ".join(f"{name} {names[name]!r}" for name in missing)
        notes.append(f"the vocabulary of {folder} lacks the {listed}, which is ignored")
        names = {name: token for name, token in names.items() if name not in missing}
    ends, more = read_model_ids(spec, ids, names, folder, (generation, model))
    notes += more
    says_nothing = not names and not any(name in config for name in NAMES)
    if says_nothing:
        ids, names = usual_names(spec, ids)
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:
        adds_bos = post_processor_adds(spec["post_processor"], names.get("bos_token", ""))
    special = choose_special_tokens(ids, names, ends, bool(adds_bos))
    special.notes = notes
    if json.dumps(spec["added_tokens"]) == before:
        return special, None
    return special, json.dumps(spec, ensure_ascii=False)


def read_model_ids(
    spec: Values,
    ids: dict[str, int],
    names: dict[str, str],
    folder: Path,
    configs: tuple[Values, ...],
) -> tuple[list[int], list[str]]:
    """Return the ids that end a text, and notes on those of no token; complete the names."""
    notes = []
    spelling = {i: token for token, i in ids.items()}
    named = {"bos_token", "eos_token"} & names.keys()
    ends: list[int] = []
    ordinary: dict[int, None] = {}
    beyond: dict[int, None] = {}
    known_ids = {*vocabulary(spec).values(), *spelling}
    for name, i in model_ids(folder, *configs):
        if i in spelling:
            if not named:
                names.setdefault(name, spelling[i])
            ends += [i] * (name == "eos_token")
        elif name == "eos_token":
            ordinary[i] = None
        elif i not in known_ids:
            beyond[i] = None
    if beyond:
        notes.append(
            f"the config files of {folder} begin a text with id {', '.join(map(str, beyond))}, "
            "which is no token of tokenizer.json; it is ignored"
        )
    if ordinary:
        notes.append(
            f"the config files of {folder} end a text at id {', '.join(map(str, ordinary))}, "
            "which is no special token of tokenizer.json; it ends nothing here"
        )
    return ends, notes


def read_json_object(path: Path) -> Values:
    """Return the object in a JSON file; empty if there is no such file. Raises UserError."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    return values


def unique_keys(pairs: list[tuple[str, Any]]) -> Values:
    """Return a JSON object. Raises ValueError if it has a key twice, of which json takes one."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return values


def require_types(values: Values, types: dict[str, tuple[type, ...]], path: Path) -> None:
    """Raise UserError for the first key with a value of another type; null is as no value."""
    for key, kinds in types.items():
        if (value := values.get(key)) is not None and type(value) not in kinds:
            names = " or ".join(TYPE_NAMES[kind] for kind in kinds)
            raise UserError(
                f"{path}: {key} is {value!r}, which is not {names}; download the tokenizer again"
            )


def read_names(folder: Path, config: Values, model: Values) -> tuple[dict[str, str], list[str]]:
    """Return the spelling of tokens by their role, and that of others without a role."""
    older = read_json_object(folder / "special_tokens_map.json")
    require_types(older, CONFIG_TYPES, folder / "special_tokens_map.json")
    # as in transformers, which reads the map only beside a config of before added_tokens_decoder
    merged = config if "added_tokens_decoder" in config else config | older
    names = {name: spelling_of(merged[name]) for name in NAMES if merged.get(name)}
    extra = [spelling_of(token) for name in LISTS for token in listed(merged.get(name))]
    kind = str(config.get("tokenizer_class") or model.get("model_type") or "").lower()
    for beginning, defaults in CLASS_DEFAULTS.items():
        if kind.startswith(beginning):
            names = {name: token for name, token in defaults.items() if name not in merged} | names
    return names, extra


def listed(value: Any) -> list[Any]:
    """Return the tokens of a list, or of an object that names them."""
    return [*value.values()] if isinstance(value, dict) else [*(value or [])]


def spelling_of(token: Any) -> str:
    """Return the text of a token, which may be an object with the key `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise UserError(
            f"the files of the tokenizer have {token!r} in place of a token, which is a text or an "
            "object with `content`; download the tokenizer again"
        )
    return text


def add_tokens(spec: Values, folder: Path, config: Values, special: set[str]) -> list[str]:
    """Complete `added_tokens` of a tokenizer.json, as transformers does; return notes.

    Tokens come from tokenizer_config.json or added_tokens.json. Those in `special` are no text.
    """
    notes = []
    added = {token["content"]: token for token in spec["added_tokens"]}
    vocab = vocabulary(spec)
    older = read_json_object(folder / "added_tokens.json")
    wanted = {i: token for i, token in (config.get("added_tokens_decoder") or {}).items()}
    for token, i in older.items():
        wanted.setdefault(str(i), {"content": token, "normalized": token not in special})
    for i, token in wanted.items():
        if not i.isdecimal() or not isinstance(token, dict):
            raise UserError(
                f"{folder}: the added token {spelling_of(token)!r} has the id {i!r}, which is no "
                "id, or is no object; download the tokenizer again"
            )
    next_id = max([*vocab.values(), *(token["id"] for token in added.values())], default=-1) + 1
    for i, token in sorted((int(i), token) for i, token in wanted.items()):
        content = spelling_of(token)
        if content in added:
            added[content]["special"] |= bool(token.get("special"))
        elif vocab.get(content, next_id) == i:
            added[content] = new_token(content, i) | token
            next_id = max(next_id, i + 1)
        else:
            notes.append(f"{folder}: the added token {content!r} cannot have the id {i}; left out")
    for content in special:
        if content in added:
            added[content]["special"] = True
        elif content in vocab:
            added[content] = new_token(content, vocab[content], special=True)
    spec["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    return notes


def new_token(content: str, i: int, special: bool = False) -> Values:
    """Return an entry of `added_tokens`."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return {"id": i, "content": content, **flags, "special": special}


def vocabulary(spec: Values) -> dict[str, int]:
    """Return the ids of the vocabulary in a tokenizer.json; Unigram's is a list of pieces."""
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, list):
        return {piece: i for i, (piece, _) in enumerate(vocab)}
    return dict(vocab)


def model_ids(folder: Path, *configs: Values) -> Iterator[tuple[str, int]]:
    """Yield (name, id) of the ids that generation_config.json and config.json give."""
    for values in configs:
        for name in ("bos_token", "eos_token"):
            ids = values.get(f"{name}_id")
            for i in ids if isinstance(ids, list) else [ids] * (ids is not None):
                if type(i) is not int:
                    raise UserError(
                        f"{folder}: {name}_id of its config files is {ids!r}, which is no id and "
                        "no list of ids; download the model again"
                    )
                yield name, i


def usual_names(spec: Values, ids: dict[str, int]) -> tuple[dict[str, int], dict[str, str]]:
    """Return ids and names of the usual special tokens that a vocabulary has."""
    ids = vocabulary(spec) | ids
    names = {}
    for name, spellings in USUAL.items():
        if known := [token for token in spellings if token in ids]:
            names[name] = known[0]
    return ids, names


def post_processor_adds(processor: Values | None, bos: str) -> bool:
    """Return whether a tokenizer.json puts `bos` in front of a text.

    It does if it says nothing: transformers 5 saves a template without any special token for every
    tokenizer that has none.
    """
    parts = (processor or {}).get("processors", [processor])
    if processor is None or any(is_empty_template(part) for part in parts):
        return True
    first = [part["single"][0] for part in parts if part["type"] == "TemplateProcessing"]
    return any(piece.get("SpecialToken", {}).get("id") == bos for piece in first)


def is_empty_template(part: Values) -> bool:
    """Return whether a step of a post-processor is a template that adds no token."""
    pieces = part["single"] if part["type"] == "TemplateProcessing" else [{"SpecialToken": {}}]
    return not any("SpecialToken" in piece for piece in pieces)
