"""Preparation: a data config to token shards, kept under a key of their content.

    plan_sources -> prepare_tokenizer -> ShardBuilder for each source -> PreparedData

The tokenizer is trained first if it is one that is trained. Shards and trained tokenizers are kept
in `data.cache_dir` and found again by everything that decides their content.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from pocketlm.checkpoint.initial import checkpoint_tokenizer, is_checkpoint
from pocketlm.config.sections import DataConfig, SourceConfig
from pocketlm.corpus.chunks import Split, single_document_bytes, split_source
from pocketlm.corpus.pieces import FirstDocuments, Part, Source
from pocketlm.corpus.readers import SEPARATORS, FileSource
from pocketlm.corpus.sources import open_source
from pocketlm.errors import UserError
from pocketlm.shards.bin_files import write_bin
from pocketlm.shards.builder import (
    BuildSettings,
    ShardBuilder,
    SourceAccount,
    bytes_of,
    call_in_daemon,
    hold_lock,
    holds_tokens,
    most_common,
)
from pocketlm.shards.format import TokenShard
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.build import build_tokenizer, from_state, is_trained

# ---- the result ----


@dataclass(frozen=True)
class PreparedSplit:
    """The shards to train on, or those to validate on: one for each source."""

    shards: tuple[TokenShard, ...]

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return sum(shard.header.tokens for shard in self.shards)

    @property
    def n_targets(self) -> int:
        """Number of tokens that packed rows predict: all but the first of each shard."""
        return self.n_tokens - len(self.shards)

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return sum(shard.header.documents for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the documents' text."""
        return sum(shard.header.bytes for shard in self.shards)


@dataclass(frozen=True)
class PreparedData:
    """A corpus ready to train on.

    If it is streamed, `train` and `val` hold the first documents of `stream` only, and there are no
    accounts. `remarks` are sentences for the user on what is not read or not encoded.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...]
    tokenizer: Tokenizer
    train: PreparedSplit
    val: PreparedSplit
    stream: Source | None = None
    accounts: tuple[SourceAccount, ...] = ()  # of the sources, and of their val_path or val_split
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Names of all sources."""
        return " + ".join(self.sources)

    def split(self, split: Split) -> PreparedSplit:
        """Return the shards of a split."""
        return self.train if split == "train" else self.val

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the tokens to train on and, of a mixture, of its weights."""
        digests = [shard.header.sha256 for shard in self.train.shards]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256(json.dumps([digests, self.weights]).encode()).hexdigest()


# ---- the plan ----


@dataclass(frozen=True)
class SourcePlan:
    """One source of the config, and where its validation documents come from.

    Either `val_source` holds all of them, or `val_share` of the source's own documents are.
    """

    source: Source
    weight: float  # in a mixture
    val_share: float
    val_source: Source | None = None


def prepare(data: DataConfig, settings: BuildSettings | None = None) -> PreparedData:
    """Return the shards of the corpus, and make those that are not in `data.cache_dir` yet.

    Raises UserError if the config names no text, or text that cannot be split or tokenised.
    """
    settings = settings or BuildSettings()
    stream = open_stream(data) if data.streaming else None
    plans = [plan_source(config, data, stream) for config in data.sources]
    tokenizer = prepare_tokenizer(data, plans)
    shards = Path(data.cache_dir) / "shards"
    train, val, builders = [], [], []
    for plan in plans:
        builders.append(ShardBuilder(plan.source, tokenizer, plan.val_share, shards, settings))
        made = builders[-1].run()
        train.append(made["train"])
        if plan.val_source:
            builders.append(ShardBuilder(plan.val_source, tokenizer, 1.0, shards, settings))
            made = builders[-1].run()
        val.append(made["val"])
        check_targets(train[-1], "train", plan.source.name, data, tokenizer)
        check_targets(val[-1], "validation", builders[-1].source.name, data, tokenizer)
    accounts = [source_account(builder) for builder in builders]
    sources = [builder.source for builder in builders]
    return PreparedData(
        sources=(stream.name,) if stream else tuple(plan.source.name for plan in plans),
        weights=tuple(plan.weight for plan in plans),
        tokenizer=tokenizer,
        train=PreparedSplit(tuple(train)),
        val=PreparedSplit(tuple(val)),
        stream=stream,
        accounts=() if stream else tuple(accounts),
        remarks=tuple(dict.fromkeys(remarks(sources, accounts, tokenizer.name))),
    )


@dataclass(frozen=True)
class PreparedPart:
    """A part of one source, prepared."""

    source: str
    documents: int
    tokens: int
    complete: bool  # whether the whole source is prepared: it is small, or its parts are joined
    missing: tuple[str, ...]  # parts that are not prepared yet

    def __str__(self) -> str:
        counts = f"{self.documents:,} documents, {self.tokens:,} tokens"
        if self.complete:
            return f"{self.source}: {counts}; all of it is prepared"
        if self.missing:
            return f"{self.source}: {counts}; not prepared yet: {', '.join(self.missing)}"
        return f"{self.source}: {counts}; all parts are prepared, and the next command joins them"


def prepare_part(
    data: DataConfig, part: Part, settings: BuildSettings | None = None
) -> list[PreparedPart]:
    """Prepare a part of each source, so that several processes share the work.

    `prepare` joins the parts. A source that cannot be divided is prepared whole. Raises UserError
    for a stream, and as `prepare` does.
    """
    if data.streaming:
        raise UserError("a stream is not prepared, so that it has no parts; leave --part out")
    plans = [plan_source(config, data, None) for config in data.sources]
    tokenizer = prepare_tokenizer(data, plans)
    shards = Path(data.cache_dir) / "shards"
    prepared = []
    for plan in plans:
        for source, val_share in ((plan.source, plan.val_share), (plan.val_source, 1.0)):
            if source is None:
                continue
            builder = ShardBuilder(
                source, tokenizer, val_share, shards, settings or BuildSettings(), part
            )
            made = builder.run().values()
            complete = builder.folder == builder.whole
            prepared.append(
                PreparedPart(
                    source.name,
                    sum(shard.header.documents for shard in made),
                    sum(shard.header.tokens for shard in made),
                    complete,
                    () if complete else tuple(map(str, builder.parts.missing())),
                )
            )
    return prepared


def check_targets(
    shard: TokenShard, part: str, name: str, data: DataConfig, tokenizer: Tokenizer
) -> None:
    """Raise UserError for a shard in which nothing can be predicted."""
    if data.packing == "padded":
        if (shard.row_lengths(bool(tokenizer.corpus_suffix)) > 1).any():
            return
        problem = "no document of two tokens or more, so that a padded row has nothing to predict"
    else:
        if shard.header.tokens > 1:
            return
        problem = "a single token, and nothing comes before it from which to predict it"
    raise UserError(
        f"the {part} part of {name} has {problem}; "
        "give more text, change data.val_share, or set data.eos to true"
    )


def source_account(builder: ShardBuilder) -> SourceAccount:
    """Return where the bytes of a source went, those of the files that are not read included."""
    account, source = builder.account(), builder.source
    if not isinstance(source, FileSource):
        return account
    sizes = {
        reason: sum(file.lstat().st_size for file in files if file.is_file())
        for reason, files in source.not_read.items()
    }
    total = account.bytes + sum(sizes.values())
    return replace(account, bytes=total, left_out=account.left_out | sizes)


def remarks(sources: list[Source], accounts: list[SourceAccount], tokenizer: str) -> Iterator[str]:
    """Yield a sentence on everything that is not read or not encoded, and that may be a mistake."""
    for source, account in zip(sources, accounts, strict=True):
        yield from source.remarks
        spaces = Counter({one: n for one, n in account.characters.items() if one.isspace()})
        if spaces:
            yield (
                f"the tokenizer {tokenizer!r} leaves out {spaces.total():,} white-space characters "
                f"of {source.name}"
            )
        if characters := Counter(account.characters) - spaces:
            yield (
                f"the tokenizer {tokenizer!r} leaves out {characters.total():,} characters of "
                f"{source.name}, {bytes_of(characters):,} bytes, because it has no entry for them: "
                f"{most_common(characters)}"
            )
        if isinstance(source, FileSource) and source.has_text_files and account.bytes:
            separator = source.config.separator
            if separator and SEPARATORS not in account.left_out:
                yield f"data.separator {separator!r} does not occur in {source.name}"


def plan_source(config: SourceConfig, data: DataConfig, stream: Source | None) -> SourcePlan:
    """Open a source of the config. Of a stream, the first documents are prepared only."""
    if stream:
        source: Source = FirstDocuments(stream)
    else:
        source = open_source(config, data.cache_dir)
    weight = getattr(config, "weight", 1.0)
    if config.val_path or config.val_split:
        val_source = open_source(config, data.cache_dir, validation=True)
        return SourcePlan(source, weight, 0.0, val_source)
    return SourcePlan(source, weight, data.val_share)


def open_stream(data: DataConfig) -> Source:
    """Return the source that is streamed. Raises UserError if it cannot be."""
    stream = open_source(data, data.cache_dir, streaming=True)
    if holds_tokens(stream):
        raise UserError(f"{stream.name} is tokens already; set data.streaming to false")
    if single_document_bytes(stream.pieces()):
        raise UserError(
            f"data.streaming deals out documents, and {stream.name} is a single one; "
            "set data.separator"
        )
    return stream


# ---- the tokenizer ----


def prepare_tokenizer(data: DataConfig, plans: list[SourcePlan]) -> Tokenizer:
    """Return the tokenizer of the config, trained on the training documents if it is trained.

    `seen-bytes` is trained on all documents, because it has no id for a byte that it has not seen.
    """
    if is_checkpoint(data.tokenizer):
        return checkpoint_tokenizer(data)
    if not is_trained(data.tokenizer):
        return build_tokenizer(data.tokenizer, data.cache_dir, bos=data.bos, eos=data.eos)
    val_sources = [plan.val_source for plan in plans if plan.val_source]
    everything = [*(plan.source for plan in plans), *val_sources]
    for source in everything:
        if holds_tokens(source):
            raise UserError(
                f"{source.name} holds tokens, from which no tokenizer {data.tokenizer!r} can be "
                "trained; name the one that made them"
            )
    if data.tokenizer != "seen-bytes":
        sources = [plan.source for plan in plans]
        return trained_tokenizer(data, sources, [plan.val_share for plan in plans])
    if data.streaming:
        raise UserError(
            f"data.streaming does not read all of {plans[0].source.name} first, "
            "which the tokenizer seen-bytes needs; set data.tokenizer to byte"
        )
    return trained_tokenizer(data, everything, [0.0] * len(everything))


def trained_tokenizer(
    data: DataConfig, sources: list[Source], val_shares: list[float]
) -> Tokenizer:
    """Return the tokenizer trained on the training documents of the sources.

    It is kept in a file, so that the same documents train it once. Raises UserError if the file is
    damaged.
    """
    digests = [source.digest() for source in sources]
    key: list[Any] = [data.tokenizer, data.bos, data.eos, val_shares, digests]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = Path(data.cache_dir) / "tokenizers" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(FileLock(path.with_suffix(".lock"))):
            if not path.exists():  # another process may have made it meanwhile
                texts = training_texts(sources, val_shares)
                build = partial(build_tokenizer, data.tokenizer, data.cache_dir, texts)
                write_tokenizer(path, call_in_daemon(partial(build, data.bos, data.eos)))
    return read_tokenizer(path)


def training_texts(sources: list[Source], val_shares: list[float]) -> Iterator[str]:
    """Yield the text of all training documents."""
    for source, val_share in zip(sources, val_shares, strict=True):
        for chunk in split_source(source, val_share):
            if chunk.split == "train":
                yield chunk.text


def write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer's state with its fingerprint. The file appears once it is complete."""
    unfinished = path.with_suffix(".unfinished")
    state = {"fingerprint": tokenizer.fingerprint} | tokenizer.state()
    unfinished.write_text(json.dumps(state))
    os.replace(unfinished, path)


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in a file. Raises UserError if its fingerprint is another."""
    try:
        state = json.loads(path.read_text())
        tokenizer = from_state(state)
        if tokenizer.fingerprint == state["fingerprint"]:
            return tokenizer
    except Exception:  # the tokenizers library raises the bare class
        pass
    raise UserError(f"the tokenizer {path} is damaged; delete it to train it again")


def prepare_and_export(data: DataConfig, program: str | None, folder: Path) -> PreparedData:
    """Prepare the data, and write train.bin and val.bin for a program, nanogpt or llmc, if any.

    Raises UserError, before anything is prepared, for data that has no single file of tokens.
    """
    if program and data.mixture:
        raise UserError(
            "a mixture is drawn row by row while training; export its sources one at a time"
        )
    if program and data.streaming:
        raise UserError("a stream keeps no tokens to export; set data.streaming to false")
    prepared = prepare(data)
    if program:
        write_bin(folder / "train.bin", prepared.train.shards[0], program)
        write_bin(folder / "val.bin", prepared.val.shards[0], program)
    return prepared
