"""The tokenizer of a GGUF file, which its keys `tokenizer.ggml.*` describe."""

import re
from typing import Any

import gguf
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pocketlm.conversion.layout import Values, require_key
from pocketlm.errors import UserError
from pocketlm.hub.special_tokens import SpecialTokens, choose_special_tokens
from pocketlm.tokenizer.bpe import JsonTokenizer, byte_level_backend

KEY_PREFIX = "tokenizer.ggml."

# types of tokens in a vocabulary
NORMAL = gguf.TokenType.NORMAL
CONTROL = gguf.TokenType.CONTROL
USER_DEFINED = gguf.TokenType.USER_DEFINED
BYTE = gguf.TokenType.BYTE

# KEY in KEY_token_id -> its name in chat templates
TOKEN_KEYS = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "separator": "sep_token",
    "seperator": "sep_token",  # as llama.cpp spelt it
    "cls": "cls_token",
    "mask": "mask_token",
}
END_KEYS = ("eot_token_id", "eom_token_id")  # end of a turn, end of a message
# llama.cpp's defaults
SENTENCEPIECE_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}

TOKENIZER_KEYS = {
    f"{KEY_PREFIX}{key}"
    for key in (
        *("model", "pre", "tokens", "token_type", "scores", "merges"),
        *("add_bos_token", "add_eos_token", "add_space_prefix"),
        *(f"{name}_token_id" for name in TOKEN_KEYS),
        *END_KEYS,
    )
}

SPACE = "\u2581"  # SentencePiece's sign for a space

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")

# llama.cpp's name -> the splitting of a text before the merges
SPLITTERS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(hf.Regex(LLAMA3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(hf.Regex(QWEN2_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
# what these tokenizers normalise first, which llama.cpp does not
NORMALIZERS: dict[str, Any] = {"qwen2": normalizers.NFC()}


def read_tokenizer(values: Values, name: str, origin: str) -> JsonTokenizer:
    """Return the tokenizer of a file with these keys. Raises UserError."""
    keys = {
        key.removeprefix(KEY_PREFIX): value
        for key, value in values.items()
        if key.startswith(KEY_PREFIX)
    }
    tokens = require_key(keys, "tokens", list, origin)
    model = keys.get("model")
    if model == "llama":
        keys = SENTENCEPIECE_DEFAULTS | keys
    require_vocabulary(keys, len(tokens), origin)
    types = keys.get("token_type") or guess_types(keys, tokens)
    if model == "gpt2":
        backend = byte_level_bpe(keys, tokens, origin)
    elif model == "llama":
        backend = sentencepiece_bpe(keys, tokens, types, origin)
    else:
        raise UserError(
            f"{origin} has a tokenizer of type {model!r}; only gpt2 and llama can be converted"
        )
    backend.add_special_tokens(added_tokens(tokens, types, CONTROL))
    backend.add_tokens(added_tokens(tokens, types, USER_DEFINED))
    special = read_special_tokens(keys, tokens, types, origin)
    note = "; ".join(special.notes)
    return JsonTokenizer(backend.to_str(), name, special.bos_id, special.eos_id, note, special)


def require_vocabulary(keys: Values, n_tokens: int, origin: str) -> None:
    """Raise UserError for a key or a token that makes no sense, or a list that lacks one."""
    for name in ("add_bos_token", "add_space_prefix"):
        require_key({name: True} | keys, name, bool, origin)
    for name, kinds in (("tokens", str), ("token_type", int), ("scores", (int, float))):
        values = keys.get(name, [])
        if values and (
            not isinstance(values, list)
            or len(values) != n_tokens
            or not all(isinstance(each, kinds) and each == each for each in values)  # NaN differs
        ):
            raise UserError(
                f"{origin}: {KEY_PREFIX}{name} has no value of the right type for each of the "
                f"{n_tokens:,} tokens; download it again"
            )
    known = [kind.value for kind in gguf.TokenType]
    for i, kind in enumerate(keys.get("token_type", [])):
        if kind not in known:
            raise UserError(
                f"{origin}: the token {keys['tokens'][i]!r} has the type {kind}, which is none of "
                f"{min(known)} to {max(known)}; download it again"
            )
    vocab = {token: i for i, token in enumerate(keys["tokens"])}
    if len(vocab) < n_tokens:
        twice = next(token for i, token in enumerate(keys["tokens"]) if vocab[token] != i)
        raise UserError(f"{origin} has the token {twice!r} twice; download it again")
    unknown = keys.get("unknown_token_id", 0)
    if keys.get("model") == "llama" and not 0 <= unknown < n_tokens:
        raise UserError(
            f"{origin}: {KEY_PREFIX}unknown_token_id is {unknown}, beyond the vocabulary of "
            f"{n_tokens:,} tokens, which needs one for unknown characters; download it again"
        )


def read_special_tokens(
    keys: Values, tokens: list[str], types: list[int], origin: str
) -> SpecialTokens:
    """Return the special tokens that the keys name."""
    names, notes, ends = {}, [], []
    ids = {token: i for i, token in enumerate(tokens) if types[i] != NORMAL}
    for key in (*(f"{key}_token_id" for key in TOKEN_KEYS), *END_KEYS):
        i = keys.get(key)
        if i is not None and not 0 <= i < len(tokens):
            notes.append(f"{origin}: {key} is {i}, beyond the vocabulary; it is ignored")
        elif i is not None and key in END_KEYS:
            ends.append(i)
        elif i is not None:
            names[TOKEN_KEYS[key.removesuffix("_token_id")]] = tokens[i]
            ids[tokens[i]] = i
    special = choose_special_tokens(ids, names, ends, keys.get("add_bos_token", True))
    special.notes = notes
    return special


def guess_types(keys: Values, tokens: list[str]) -> list[int]:
    """Return the types of tokens in a file without them, by their spelling and the keys."""
    types: list[int] = [
        BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL for token in tokens
    ]
    for key in (*(f"{key}_token_id" for key in TOKEN_KEYS), *END_KEYS):
        if 0 <= keys.get(key, -1) < len(tokens):
            types[keys[key]] = CONTROL
    return types


def added_tokens(tokens: list[str], types: list[int], wanted: int) -> list[hf.AddedToken]:
    """Return the tokens of one type."""
    return [
        hf.AddedToken(token, normalized=False)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type == wanted
    ]


def byte_level_bpe(keys: Values, tokens: list[str], origin: str) -> hf.Tokenizer:
    """Return a BPE as GPT-2's, with the splitting that the file names."""
    splitter = keys.get("pre")
    if splitter not in SPLITTERS:
        raise UserError(
            f"{origin} splits text by the method {splitter!r}; "
            f"only {', '.join(SPLITTERS)} can be converted"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for merge in require_key(keys, "merges", list, origin):
        left, right = merge.split(" ")
        if {left, right, left + right} <= vocab.keys():  # another never applies
            merges.append((left, right))
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=splitter == "llama-bpe")
    backend = byte_level_backend(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(SPLITTERS[splitter])
    if splitter in NORMALIZERS:
        backend.normalizer = NORMALIZERS[splitter]
    return backend


def sentencepiece_bpe(
    keys: Values, tokens: list[str], types: list[int], origin: str
) -> hf.Tokenizer:
    """Return a BPE with a list of merges that is equivalent to SentencePiece's BPE.

    SentencePiece joins any two neighbours that make a token, the highest score first.
    """
    scores = require_key(keys, "scores", list, origin)
    pieces = {
        token: score
        for token, score, token_type in zip(tokens, scores, types, strict=True)
        if token_type == NORMAL
    }
    merges = []
    for token in sorted(pieces, key=lambda token: pieces[token], reverse=True):
        for middle in range(1, len(token)):
            left, right = token[:middle], token[middle:]
            if left in pieces and right in pieces:
                merges.append((left, right))
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        unk_token=tokens[keys.get("unknown_token_id", 0)],
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = hf.Tokenizer(model)
    to_signs: list[Any] = [normalizers.Replace(" ", SPACE)]
    to_text: list[Any] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if keys.get("add_space_prefix", True):
        to_signs.insert(0, normalizers.Prepend(SPACE))
        to_text.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(to_signs)
    backend.decoder = decoders.Sequence(to_text)
    return backend
