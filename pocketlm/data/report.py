"""What is in prepared data: counts, lengths, duplicates, overlap, and a row as the model will see it."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pocketlm.config.sections import Config
from pocketlm.data.loaders import document_ends, loaders, rows_in_run, rows_of, training_order
from pocketlm.data.prepare import Part, PreparedData
from pocketlm.data.samplers import MixtureBatchSampler
from pocketlm.data.shards import TokenShard
from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer

BLOCK = 2**22  # tokens looked at together


BINS = [
    0,
    16,
    32,
    64,
    128,
    256,
    512,
    1024,
    2048,
    4096,
    2**63,
]  # tokens a document, the ids around it included


def build_report(config: Config, data: PreparedData) -> dict[str, Any]:
    """The facts as plain types. Reads every token once."""
    train, val = (document_digests(data, part) for part in (data.train, data.val))
    found: dict[str, Any] = {
        "source": data.name,
        "tokenizer": {
            "name": data.tokenizer.name,
            "entries": data.tokenizer.vocab_size,
            "bos": data.tokenizer.bos_id,
            "eos": data.tokenizer.eos_id,
            "fingerprint": data.tokenizer.fingerprint,
            "note": data.tokenizer.note,
        },
        "train": part_stats(config, data, data.train, train),
        "validation": part_stats(config, data, data.val, val),
        "overlap": int(np.isin(np.unique(val), train).sum()),
        "row": first_row(config, data),
    }
    if data.stream:
        found["streamed"] = "the counts are those of the first documents"
    if isinstance(order := training_order(config, data), MixtureBatchSampler):
        rows, parts = rows_in_run(config), rows_of(data, config, validation=False).parts
        drawn = zip(data.sources, data.weights, order.rows_per_dataset(rows), parts, strict=True)
        found["mixture"] = [
            {
                "source": name,
                "weight": weight / sum(data.weights),
                "rows": count,
                "share": count / rows,
                "epochs": count / len(part),
            }
            for name, weight, count, part in drawn
        ]
    return found


def part_stats(
    config: Config, data: PreparedData, part: Part, digests: np.ndarray
) -> dict[str, Any]:
    used = np.zeros(data.tokenizer.vocab_size, np.int64)
    for shard in part.shards:
        for start in range(0, shard.header.tokens, BLOCK):
            used += np.bincount(shard.tokens[start : start + BLOCK], minlength=len(used))
    lengths = np.concatenate([document_ends(data, shard) - shard.offsets for shard in part.shards])
    facts = {
        "documents": part.n_documents,
        "bytes": part.n_bytes,
        "tokens": part.n_tokens,
        "bytes_per_token": part.n_bytes / part.n_tokens,
        "entries_used": int((used > 0).sum()),
        "unknown": 0 if data.tokenizer.unk_id is None else int(used[data.tokenizer.unk_id]),
        "duplicates": len(digests) - len(np.unique(digests)),
        "lengths": {
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "longest": int(lengths.max()),
        },
        "histogram": [
            {"from": low, "below": high if high < 2**63 else None, "documents": int(n)}
            for low, high, n in zip(BINS, BINS[1:], np.histogram(lengths, BINS)[0], strict=False)
        ],
    }
    if nul := count_of_nul(data.tokenizer, used):
        facts["nul"] = nul
    if config.data.packing == "padded":
        row = config.training.seq_len + 1 - len(data.tokenizer.final)
        facts["cut_off"] = int((lengths > row).sum())
    return facts


def count_of_nul(tokenizer: Tokenizer, used: np.ndarray) -> int:
    """How often the character NUL occurs, where it has an entry of its own."""
    try:
        nul = tokenizer.encode("\0")
    except UserError:  # the vocabulary was made of bytes that occur, and it does not
        return 0
    return int(used[nul[0]]) if len(nul) == 1 and nul[0] != tokenizer.unk_id else 0


def document_digests(data: PreparedData, part: Part) -> np.ndarray:
    """(documents,) 64 bits of a hash of each document's ids: 8 bytes a document, whatever the corpus."""
    return np.fromiter(
        (digest for shard in part.shards for digest in digests_of(data, shard)),
        np.uint64,
        part.n_documents,
    )


def digests_of(data: PreparedData, shard: TokenShard) -> Iterator[int]:
    for start, end in zip(shard.offsets.tolist(), document_ends(data, shard).tolist(), strict=True):
        digest = hashlib.blake2b(digest_size=8)
        for begin in range(start, end, BLOCK):
            digest.update(shard.tokens[begin : min(begin + BLOCK, end)].data)
        yield int.from_bytes(digest.digest(), "big")


def first_row(config: Config, data: PreparedData) -> list[str]:
    """The first row that training reads, decoded: a text for each stretch of one document."""
    batch = next(iter(loaders(config, data)[0]))
    ids = batch["input_ids"][0].numpy()
    count = int((batch["targets"][0] != -100).sum())
    opening = data.tokenizer.prefix
    begins = [i for i in range(1, count) if opening and ids[i] == opening[0]]
    return [data.tokenizer.decode(part.tolist()) for part in np.split(ids[:count], begins)]


# ---- on paper --------------------------------------------------------------------------------------------------------


def print_report(found: dict[str, Any], as_json: bool) -> None:
    """To stdout, as tables or as JSON."""
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    out = Console(highlight=False, emoji=False, soft_wrap=True)
    train, val = found["train"], found["validation"]
    table = Table(
        box=None,
        title=found["source"] + (f"\n{found['streamed']}" if "streamed" in found else ""),
        title_justify="left",
    )
    for column in ("", "train", "validation"):
        table.add_column(column, justify="right" if column else "left")
    rows = [
        ("documents", "{documents:,}"),
        ("bytes", "{bytes:,}"),
        ("tokens", "{tokens:,}"),
        ("bytes per token", "{bytes_per_token:.3f}"),
        (f"of {found['tokenizer']['entries']:,} entries used", "{entries_used:,}"),
        ("unknown tokens", "{unknown:,} ({unknown_share:.3%})"),
        ("duplicate documents", "{duplicates:,}"),
        ("tokens a document: shortest", "{lengths[shortest]:,}"),
        ("    median", "{lengths[median]:,.0f}"),
        ("    longest", "{lengths[longest]:,}"),
        ("cut off at the row's end", "{cut_off:,}"),
        ("NUL characters: is this text?", "{nul:,}"),
    ]
    for name, form in rows:
        if all(key not in form or key in train or key in val for key in ("cut_off", "nul")):
            columns = (
                {"nul": 0, "unknown_share": part["unknown"] / part["tokens"]} | part
                for part in (train, val)
            )
            table.add_row(name, *(form.format(**part) for part in columns))
    out.print(table)
    ends = {key: found["tokenizer"][key] for key in ("bos", "eos")}
    around = ", ".join(
        f"{key} is id {value}" if value is not None else f"no {key}" for key, value in ends.items()
    )
    out.print(f"\ntokenizer: {found['tokenizer']['name']}; {around}")
    if found["tokenizer"]["note"]:
        out.print(found["tokenizer"]["note"], markup=False)
    out.print(f"documents in both train and validation: {found['overlap']:,}")
    for part in found.get("mixture", ()):
        out.print(
            f"{part['source']}: {part['share']:.2%} of the rows (asked {part['weight']:.2%}), {part['epochs']:.2f} epochs"
        )
    out.print("\ntokens a document   train documents")
    most = max(bin["documents"] for bin in train["histogram"])
    for bin in train["histogram"]:
        width = (
            f"{bin['from']:>6,} to {bin['below'] - 1:>6,}"
            if bin["below"]
            else f"{bin['from']:>6,} or more"
        )
        out.print(f"{width:<18}{bin['documents']:>9,} {'█' * round(40 * bin['documents'] / most)}")
    out.print("\nThe first row of the run, document by document:")
    for number, text in enumerate(found["row"], 1):
        out.print(Text.assemble((f"{number:>3} ", "bold"), text.replace("\n", "⏎")))
