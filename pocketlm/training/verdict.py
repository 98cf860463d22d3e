"""The verdict after a run."""

import csv
import math
import shlex
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pocketlm.checkpoint.runs import Run
from pocketlm.config.sections import Config
from pocketlm.data.loaders import document_ends, rows_in_run, rows_of, training_order
from pocketlm.data.prepare import Part, PreparedData
from pocketlm.data.samplers import MixtureBatchSampler
from pocketlm.data.shards import TokenShard

COUNTED = 20_000_000  # training tokens that the baselines are counted on


def is_known(data: PreparedData, text: str) -> bool:
    """Whether the text is, word for word, a document to train on."""
    if "\ufffd" in text:  # half a character
        return False
    ids = data.tokenizer.prefix + data.tokenizer.encode(text) + data.tokenizer.closing

    def is_in(shard: TokenShard) -> bool:
        starts = shard.offsets[document_ends(data, shard) - shard.offsets == len(ids)]
        return bool((shard.tokens[starts[:, None] + np.arange(len(ids))] == ids).all(1).any())

    return any(map(is_in, data.train.shards))


def passes(config: Config, data: PreparedData) -> str:
    """How often the run goes through its data; for a mixture, the share of the rows and the epochs of each source."""
    if data.stream:
        return f"a stream, of which the first {data.train.n_documents + data.val.n_documents:,} documents have been looked at"
    rows, train = rows_in_run(config), rows_of(data, config, validation=False)
    order = training_order(config, data)
    if not isinstance(order, MixtureBatchSampler):
        return f"{rows / len(train):.2f} epochs"
    drawn = zip(data.sources, order.rows_per_dataset(rows), train.parts, strict=True)
    return "; ".join(
        f"{name} {count / rows:.1%} of the rows, {count / len(part):.2f} epochs"
        for name, count, part in drawn
    )


def baselines(data: PreparedData) -> dict[str, float]:
    """Bits per byte that counting reaches on the validation tokens: no model worth its name is above them.

    uniform: every entry of the vocabulary as likely; unigram: counts of the training tokens, one added to each; bigram:
    counts of pairs with 0.75 taken off each and given to the unigram (absolute discounting, Ney et al. 1994). Counted are
    the first COUNTED training tokens, so that memory does not grow with the corpus.
    """
    vocab = data.tokenizer.vocab_size
    train, val = (first_tokens(part) for part in (data.train, data.val))
    unigram = (np.bincount(train, minlength=vocab) + 1) / (len(train) + vocab)
    pairs, counts = np.unique(train[:-1] * vocab + train[1:], return_counts=True)
    histories = pairs // vocab
    seen_after = np.bincount(histories, counts, vocab)  # tokens after each history
    kinds_after = np.bincount(histories, minlength=vocab)  # different ones
    history, target = val[:-1], val[1:]
    found = np.searchsorted(pairs, history * vocab + target).clip(max=len(pairs) - 1)
    count = np.where(pairs[found] == history * vocab + target, counts[found], 0)
    total = np.maximum(seen_after[history], 1)
    discounted = np.maximum(count - 0.75, 0) / total
    backoff = np.where(seen_after[history] > 0, 0.75 * kinds_after[history] / total, 1.0)
    bits = {
        "uniform": np.full(len(target), math.log2(vocab)),
        "unigram": -np.log2(unigram[target]),
        "bigram": -np.log2(discounted + backoff * unigram[target]),
    }
    return {
        name: float(values.mean() * data.val.n_targets / data.val.n_bytes)
        for name, values in bits.items()
    }


def first_tokens(part: Part) -> np.ndarray:
    """(n,) the first tokens of each shard, COUNTED of them in all at most."""
    return np.concatenate(
        [shard.tokens[: COUNTED // len(part.shards)] for shard in part.shards]
    ).astype(np.int64)


def read_metrics(path: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column of metrics.csv."""
    with path.open(newline="") as file:
        points = [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row[name]]
    return [step for step, _ in points], [value for _, value in points]


def draw_loss(run: Run, baseline_loss: dict[str, float]) -> Path:
    """loss.png beside the checkpoints: training and validation loss against steps, with the baselines as lines."""
    import matplotlib  # 0.5 s, needed once at the end

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    steps, losses = read_metrics(run.metrics_file, "train/loss")
    axes.plot(steps, losses, color="#9db8d2", linewidth=1.2, label="training")
    steps, losses = read_metrics(run.metrics_file, "val/loss")
    axes.plot(steps, losses, color="#1f4e79", marker="o", markersize=3.5, label="validation")
    axes.annotate(
        f"{losses[-1]:.3f}",
        (steps[-1], losses[-1]),
        textcoords="offset points",
        xytext=(0, 8),
        ha="right",
        color="#1f4e79",
    )
    for name, loss in baseline_loss.items():
        axes.axhline(loss, color="#b0b0b0", linestyle=":", linewidth=1)
        axes.text(
            0.995,
            loss,
            name,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="bottom",
            color="#808080",
            fontsize=8,
        )
    axes.set(
        xlabel="optimizer steps", ylabel="loss (nats per token)", title=run.name or "default run"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = run.checkpoints / "loss.png"
    figure.savefig(path)
    plt.close(figure)
    return path


def fit_sentence(train_loss: float, val_loss: float, best_loss: float, epochs: float | None) -> str:
    """Under- or overfitting, in a sentence; losses in nats per token."""
    apart = f"training loss {train_loss:.3f} and validation loss {val_loss:.3f}"
    apart += "" if epochs is None else f" after {epochs:.1f} epochs"
    if val_loss > best_loss + 0.02:
        return f"Overfitting: {apart}, which was {best_loss:.3f} at its best. Use best.ckpt; more text, dropout or fewer steps would help."
    if val_loss - train_loss > 0.1 * val_loss:
        return (
            f"Beginning to overfit: {apart}. More text or dropout would help more than more steps."
        )
    return f"Still underfitting: {apart}. More steps or a larger model would help."


def print_verdict(
    config: Config,
    data: PreparedData,
    run: Run,
    validation: dict[str, float],
    best: float,
    samples: list[tuple[str, str]],
    seconds: float,
) -> None:
    """The closing words of a run, on stdout. `validation` is that of the last step, `best` the lowest loss of all."""
    out = Console(highlight=False, soft_wrap=True, emoji=False)
    took = f"{seconds / 60:.1f} minutes" if seconds > 100 else f"{seconds:.0f} seconds"
    out.print(f"\nDone: {config.training.max_steps:,} steps in {took}.\n")
    counted = baselines(data)
    per_target = validation["loss"] / validation["bpb"]  # bits per byte -> nats per token
    scores = {
        name: (bits * per_target, math.exp(bits * per_target), bits)
        for name, bits in counted.items()
    }
    scores["[bold]this model"] = (validation["loss"], validation["perplexity"], validation["bpb"])
    kept = data.val
    title = f"Validation: {kept.n_documents:,} document{'s' * (kept.n_documents > 1)}, {kept.n_bytes:,} bytes, never trained on"
    table = Table(title=title, title_justify="left", box=None)
    for title in ("", "loss (nats/token)", "perplexity", "bits per byte"):
        table.add_column(title, justify="right" if title else "left")
    for name, (loss, perplexity, bits) in scores.items():
        table.add_row(name, f"{loss:.3f}", f"{perplexity:,.1f}", f"{bits:.3f}")
    out.print(table)
    if worse := [name for name, bits in counted.items() if bits <= validation["bpb"]]:
        out.print(f"\nCounting ({', '.join(worse)}) is still better than this model.")
    recent = float(np.mean(read_metrics(run.metrics_file, "train/loss")[1][-5:]))
    epochs = (
        None if data.stream else rows_in_run(config) / len(rows_of(data, config, validation=False))
    )
    out.print("\n" + fit_sentence(recent, validation["loss"], best, epochs))
    print_samples(out, config, data, samples)
    folder = run.checkpoints
    picture = draw_loss(
        run, {name: loss for name, (loss, _, _) in scores.items() if name in ("unigram", "bigram")}
    )
    opening = " ".join(samples[0][0].split())
    how = f"--prompt {shlex.quote(opening)}" if opening else "--new-document --num-samples 20"
    words = [
        f"\nLoss curve: {picture}",
        "Next:",
        f"  python infer.py --ckpt {folder / 'final.ckpt'} {how}",
    ]
    if data.sources == ("wiki",):  # the corpus that these cases ask for
        words.append(
            f"  python evaluate_checkpoints.py --checkpoints '{folder / '*.ckpt'}' --cases cases/wiki_basics.yaml"
        )
    words.append(f"  tensorboard --logdir {run.logs}")
    out.print("\n".join(words), markup=False)


def print_samples(
    out: Console, config: Config, data: PreparedData, samples: list[tuple[str, str]]
) -> None:
    """What the model writes, numbered; of whole documents, which ones it has only remembered."""
    out.print(
        "\nSamples:"
        if config.sampling.prompts
        else "\nHow validation documents go on, by the model:"
    )
    known = [not prompt and not data.stream and is_known(data, text) for prompt, text in samples]
    for number, (prompt, text) in enumerate(samples, 1):
        mark = "  (a training document)" if known[number - 1] else ""
        out.print(f"sample {number:2d}: [bold]{one_line(prompt)}[/bold]{one_line(text)}{mark}")
    if whole := [is_old for is_old, (prompt, _) in zip(known, samples, strict=True) if not prompt]:
        out.print(
            f"{len(whole) - sum(whole)} of {len(whole)} are new: not among the {data.train.n_documents:,} documents to train on."
        )


def one_line(text: str) -> str:
    """The text on one line, safe from rich's markup."""
    return escape(text.replace("\n", " ⏎ "))
