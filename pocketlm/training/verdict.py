"""The verdict after a run: its scores against baselines, the picture of its loss, its samples."""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pocketlm.checkpoint.runs import Run
from pocketlm.config.sections import Config
from pocketlm.data.loaders import build_rows, document_ends, rows_per_step
from pocketlm.data.prepare import PreparedData, PreparedSplit
from pocketlm.export.model_card import SCORES_FILE
from pocketlm.files import atomic_write
from pocketlm.shards.format import TokenShard
from pocketlm.training.loop import TrainedRun
from pocketlm.training.metrics import read_rows

MAX_BASELINE_TOKENS = 20_000_000  # training tokens that the baselines count
DISCOUNT = 0.75  # taken off each count of a pair by the bigram baseline


# ---- baselines ----


def baselines(data: PreparedData) -> dict[str, float]:
    """Return the bits per byte of three counting models on the validation tokens.

    A useful model is below all of them. uniform: every token of the vocabulary is equally likely.
    unigram: counts of the training tokens, plus one each. bigram: counts of pairs, with DISCOUNT
    taken off each and given to the unigram (absolute discounting, Ney et al. 1994). Only the first
    MAX_BASELINE_TOKENS training tokens are counted, so that memory does not grow with the corpus.
    """
    vocab = data.tokenizer.vocab_size
    train, val = first_tokens(data.train), first_tokens(data.val)
    unigram = (np.bincount(train, minlength=vocab) + 1) / (len(train) + vocab)
    pairs, counts = np.unique(train[:-1] * vocab + train[1:], return_counts=True)
    histories = pairs // vocab
    followers = np.bincount(histories, counts, vocab)  # tokens after each history
    distinct_followers = np.bincount(histories, minlength=vocab)
    history, target = val[:-1], val[1:]
    index = np.searchsorted(pairs, history * vocab + target).clip(max=len(pairs) - 1)
    count = np.where(pairs[index] == history * vocab + target, counts[index], 0)
    total = np.maximum(followers[history], 1)
    discounted = np.maximum(count - DISCOUNT, 0) / total
    seen = followers[history] > 0
    backoff = np.where(seen, DISCOUNT * distinct_followers[history] / total, 1.0)
    bits = {
        "uniform": np.full(len(target), math.log2(vocab)),
        "unigram": -np.log2(unigram[target]),
        "bigram": -np.log2(discounted + backoff * unigram[target]),
    }
    targets_per_byte = data.val.n_targets / data.val.n_bytes
    return {name: float(values.mean() * targets_per_byte) for name, values in bits.items()}


def first_tokens(split: PreparedSplit) -> NDArray[np.int64]:
    """Return the first tokens (n,) of each shard, MAX_BASELINE_TOKENS in all at most."""
    per_shard = MAX_BASELINE_TOKENS // len(split.shards)
    return np.concatenate([shard.tokens[:per_shard] for shard in split.shards]).astype(np.int64)


def write_baselines(run: Run, data: PreparedData, losses: dict[str, float]) -> None:
    """Write the baselines, in nats per token, beside the checkpoints: for a model card."""
    scores = {"tokenizer_sha256": data.tokenizer.fingerprint, "baselines": losses}
    with atomic_write(run.checkpoints / SCORES_FILE) as unfinished:
        unfinished.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


# ---- the loss curve ----


def read_metrics(path: Path, column: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one column of metrics.csv."""
    rows = [row for row in read_rows(path)[0] if row.get(column)]
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]


def draw_loss(run: Run, baseline_loss: dict[str, float]) -> Path:
    """Draw the losses against steps, with baselines as lines, to the checkpoints' loss.png."""
    import matplotlib  # 0.5 s, needed once at the end

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    blue, gray = "#1f4e79", "#b0b0b0"
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    steps, losses = read_metrics(run.metrics_file, "train/loss")
    axes.plot(steps, losses, color="#9db8d2", linewidth=1.2, label="training")
    steps, losses = read_metrics(run.metrics_file, "val/loss")
    axes.plot(steps, losses, color=blue, marker="o", markersize=3.5, label="validation")
    if losses:  # metrics.csv may be lost
        axes.annotate(
            f"{losses[-1]:.3f}",
            (steps[-1], losses[-1]),
            textcoords="offset points",
            xytext=(0, 8),
            ha="right",
            color=blue,
        )
    for name, loss in baseline_loss.items():
        axes.axhline(loss, color=gray, linestyle=":", linewidth=1)
        axes.annotate(
            name,
            (0.995, loss),
            xycoords=axes.get_yaxis_transform(),
            ha="right",
            va="bottom",
            color="#808080",
            fontsize=8,
        )
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(run.name or "default run")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = run.checkpoints / "loss.png"
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, format="png")
    plt.close(figure)
    return path


# ---- the verdict ----


def print_verdict(
    config: Config, data: PreparedData, run: Run, trained: TrainedRun, seconds: float
) -> Path:
    """Print the scores, the diagnosis, the samples and the next commands; return loss.png."""
    out = Console(highlight=False, soft_wrap=True, emoji=False)
    duration = f"{seconds / 60:.1f} minutes" if seconds > 100 else f"{seconds:.0f} seconds"
    steps, early = f"{trained.step:,}", ""
    if trained.step < config.training.steps:
        steps += f" of {config.training.steps:,}"
        early = f": no lower validation loss in {trained.waited} validations"
    out.print(f"\nDone: {steps} steps in {duration}{early}.\n")
    validation, baseline_bits = trained.validation, baselines(data)
    nats_per_bit = validation["loss"] / validation["bpb"]  # bits per byte -> nats per token
    baseline_loss = {name: bits * nats_per_bit for name, bits in baseline_bits.items()}
    scores = {
        name: (loss, math.exp(loss), baseline_bits[name]) for name, loss in baseline_loss.items()
    }
    scores["[bold]this model"] = (validation["loss"], validation["perplexity"], validation["bpb"])
    out.print(score_table(data.val, scores))
    better = [name for name, bits in baseline_bits.items() if bits <= validation["bpb"]]
    if better:
        out.print(f"\nCounting ({', '.join(better)}) is still better than this model.")
    recent = recent_losses(*read_metrics(run.metrics_file, "train/loss"))
    epochs = None
    if not data.stream:
        rows = trained.step * rows_per_step(config)
        epochs = rows / len(build_rows(config, data, "train"))
    if recent:
        train_loss = float(np.mean(recent))
        out.print("\n" + diagnosis(train_loss, validation["loss"], trained.best_loss, epochs))
    if trained.samples:
        print_samples(out, config, data, trained.samples)
    write_baselines(run, data, baseline_loss)
    picture = draw_loss(run, {name: baseline_loss[name] for name in ("unigram", "bigram")})
    first_prompt = trained.samples[0][0] if trained.samples else ""
    lines = [f"\nLoss curve: {picture}", "Next:", *next_commands(data, run, first_prompt)]
    out.print("\n".join(lines), markup=False)
    return picture


def recent_losses(steps: Sequence[int], losses: Sequence[float]) -> list[float]:
    """Return the last five losses at most, of the last fifth of the steps; the last in any case.

    >>> recent_losses([1, 500, 1000], [9.0, 5.0, 4.0]), recent_losses([1], [9.0])
    ([4.0], [9.0])
    """
    recent = [
        loss for step, loss in zip(steps, losses, strict=True) if step > 0.8 * max(steps, default=0)
    ]
    return recent[-5:]


def score_table(split: PreparedSplit, scores: dict[str, tuple[float, float, float]]) -> Table:
    """Return the table of loss, perplexity and bits per byte by model."""
    documents = f"{split.n_documents:,} document{'s' * (split.n_documents > 1)}"
    title = f"Validation: {documents}, {split.n_bytes:,} bytes, never trained on"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("")
    for heading in ("loss (nats/token)", "perplexity", "bits per byte"):
        table.add_column(heading, justify="right")
    for name, (loss, perplexity, bits) in scores.items():
        table.add_row(name, f"{loss:.3f}", f"{perplexity:,.1f}", f"{bits:.3f}")
    return table


def diagnosis(train_loss: float, val_loss: float, best_loss: float, epochs: float | None) -> str:
    """Say whether the run under- or overfits, and what would help; losses in nats per token."""
    losses = f"training loss {train_loss:.3f} and validation loss {val_loss:.3f}"
    if epochs is not None:
        losses += f" after {epochs:.1f} epochs"
    if val_loss > best_loss + 0.02:
        return (
            f"Overfitting: {losses}, which was {best_loss:.3f} at its best. Use best.ckpt; more "
            "text, dropout or fewer steps would help."
        )
    if val_loss - train_loss > 0.1 * val_loss:
        return (
            f"Beginning to overfit: {losses}. More text or dropout would help more than more steps."
        )
    return f"Still underfitting: {losses}. More steps or a larger model would help."


def next_commands(data: PreparedData, run: Run, first_prompt: str) -> list[str]:
    """Return the commands to try next, one a line, indented."""
    prompt = " ".join(first_prompt.split())
    start = f"--prompt {shlex.quote(prompt)}" if prompt else "--new-document --num-samples 20"
    commands = [f"python infer.py --ckpt {run.checkpoints / 'final.ckpt'} {start}"]
    if data.sources == ("wiki",):  # the corpus that these cases ask about
        commands.append(
            f"python evaluate_checkpoints.py --checkpoints '{run.checkpoints / '*.ckpt'}' "
            "--cases cases/wiki_basics.yaml"
        )
    commands.append(f"tensorboard --logdir {run.logs}")
    return [f"  {command}" for command in commands]


def print_samples(
    out: Console, config: Config, data: PreparedData, samples: list[tuple[str, str]]
) -> None:
    """Print the samples, numbered, and mark whole documents that the model has memorised."""
    title = "Samples:" if config.sampling.prompts else "Continuations of validation documents:"
    out.print(f"\n{title}")
    known = [not prompt and not data.stream and is_known(data, text) for prompt, text in samples]
    for number, (prompt, text) in enumerate(samples, 1):
        mark = "  (a training document)" if known[number - 1] else ""
        out.print(f"sample {number:2d}: [bold]{one_line(prompt)}[/bold]{one_line(text)}{mark}")
    whole = [is_old for is_old, (prompt, _) in zip(known, samples, strict=True) if not prompt]
    if whole:
        new = len(whole) - sum(whole)
        documents = f"{data.train.n_documents:,} training documents"
        out.print(f"{new} of {len(whole)} are new: not among the {documents}.")


def is_known(data: PreparedData, text: str) -> bool:
    """Return whether the text is exactly a training document."""
    if "\ufffd" in text:  # part of a character
        return False
    tokenizer = data.tokenizer
    ids = tokenizer.document_prefix + tokenizer.encode(text) + tokenizer.document_suffix
    return any(holds_document(data, shard, ids) for shard in data.train.shards)


def holds_document(data: PreparedData, shard: TokenShard, ids: list[int]) -> bool:
    """Return whether a document of the shard has exactly these tokens."""
    starts = shard.offsets[document_ends(data, shard) - shard.offsets == len(ids)]
    documents = shard.tokens[starts[:, None] + np.arange(len(ids))]
    return bool((documents == ids).all(1).any())


def one_line(text: str) -> str:
    """Return the text on one line, safe from rich's markup."""
    return escape(text.replace("\n", " ⏎ "))
