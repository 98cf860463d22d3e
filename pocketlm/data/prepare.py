"""From documents to token shards: split, fit a tokenizer, tokenise on all cores, keep the result under a key of its content.

    open_source -> pieces -> split -> batches -> Tokenizer on a pool of threads -> ShardWriter -> data/shards/<key>/

A preparation that was killed goes on: a journal beside the unfinished shards says how many batches are in them.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from filelock import FileLock

from pocketlm.config.sections import DataConfig
from pocketlm.corpus.chunks import single_document_bytes, split_source
from pocketlm.corpus.pieces import Head, Source
from pocketlm.corpus.sources import open_source
from pocketlm.data.shard_builder import Preparation, is_tokens, waited_for
from pocketlm.data.shards import TokenShard
from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.build import build_tokenizer, from_state, is_trained

# ---- everything ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The shards to train on, one a source, or those to validate on."""

    shards: tuple[TokenShard, ...]

    @property
    def n_tokens(self) -> int:
        return sum(shard.header.tokens for shard in self.shards)

    @property
    def n_targets(self) -> int:
        """All tokens but the first of each shard."""
        return self.n_tokens - len(self.shards)

    @property
    def n_documents(self) -> int:
        return sum(shard.header.documents for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        return sum(shard.header.bytes for shard in self.shards)


@dataclass(frozen=True)
class PreparedData:
    """A corpus ready to train on. Where it is streamed, `train` is the first documents of `stream` only."""

    sources: tuple[str, ...]
    weights: tuple[float, ...]
    tokenizer: Tokenizer
    train: Part
    val: Part
    stream: Source | None = None

    @property
    def name(self) -> str:
        return " + ".join(self.sources)

    @cached_property
    def sha256(self) -> str:
        """Of the tokens to train on."""
        digests = [shard.header.sha256 for shard in self.train.shards]
        return (
            digests[0]
            if len(digests) == 1
            else hashlib.sha256(json.dumps([digests, self.weights]).encode()).hexdigest()
        )


def prepare(data: DataConfig) -> PreparedData:
    """Shards of the corpus under `data.cache_dir`, made unless the same text, split and tokenizer made them before."""
    shares, sources, val_sources = [], [], []
    for config in data.sources:
        sources.append(open_source(config, data.cache_dir, streaming=data.streaming))
        own = config.val_path or config.val_split
        shares.append(0.0 if own else data.val_share)
        val_sources.append(open_source(config, data.cache_dir, validation=True) if own else None)
    stream = None
    if data.streaming:
        stream = sources[0]
        if is_tokens(stream):
            raise UserError(f"{stream.name} is tokens already; set data.streaming to false")
        sources = [Head(stream)]
        if single_document_bytes(stream.pieces()):
            raise UserError(
                f"data.streaming deals out documents, and {stream.name} is a single one; set data.separator"
            )
    if is_trained(data.tokenizer) and (
        held := next((s.name for s in [*sources, *val_sources] if s and is_tokens(s)), None)
    ):
        raise UserError(
            f"{held} holds tokens, from which no tokenizer {data.tokenizer!r} can be trained; name the one that made them"
        )
    if data.tokenizer == "seen-bytes":  # which has no id for a byte that it has not seen
        if stream:
            raise UserError(
                f"data.streaming does not read {stream.name} beforehand, as the tokenizer seen-bytes has to; take byte"
            )
        everything = [*sources, *filter(None, val_sources)]
        tokenizer = fitted_tokenizer(data, everything, [0.0] * len(everything))
    else:
        tokenizer = fitted_tokenizer(data, sources, shares)
    shards = Path(data.cache_dir) / "shards"
    train, val = [], []
    for source, share, val_source in zip(sources, shares, val_sources, strict=True):
        made = Preparation(source, tokenizer, share, shards).run()
        train.append(made[False])
        val.append(
            Preparation(val_source, tokenizer, 1.0, shards).run()[True]
            if val_source
            else made[True]
        )
    weights = tuple(getattr(config, "weight", 1.0) for config in data.sources)
    names = tuple((stream or source).name for source in sources)
    return PreparedData(names, weights, tokenizer, Part(tuple(train)), Part(tuple(val)), stream)


def fitted_tokenizer(data: DataConfig, sources: list[Source], shares: list[float]) -> Tokenizer:
    """The tokenizer; one that is trained is so on the training documents, once for the same ones."""
    if not is_trained(data.tokenizer):
        return build_tokenizer(data.tokenizer, data.cache_dir, bos=data.bos, eos=data.eos)
    key = [data.tokenizer, data.bos, data.eos, shares, [source.digest() for source in sources]]
    path = (
        Path(data.cache_dir)
        / "tokenizers"
        / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with waited_for(FileLock(path.with_suffix(".lock"))):
            if not path.exists():  # another process may have made it meanwhile
                chunks = chain.from_iterable(map(split_source, sources, shares))
                texts = (chunk.text for chunk in chunks if not chunk.validation)
                tokenizer = build_tokenizer(
                    data.tokenizer, data.cache_dir, texts, data.bos, data.eos
                )
                unfinished = path.with_suffix(".unfinished")
                unfinished.write_text(
                    json.dumps({"fingerprint": tokenizer.fingerprint} | tokenizer.state())
                )
                os.replace(unfinished, path)
    try:
        state = json.loads(path.read_text())
        tokenizer = from_state(state)
        whole = tokenizer.fingerprint == state["fingerprint"]
    except Exception:  # the library raises the bare class
        whole = False
    if not whole:
        raise UserError(f"the tokenizer {path} is damaged; delete it to train it again")
    return tokenizer
