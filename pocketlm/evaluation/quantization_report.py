"""The effect of quantisation: perplexity and accuracy on probe cases, compared with bfloat16."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.sections import Config
from pocketlm.corpus.chunks import split_source
from pocketlm.corpus.sources import open_source
from pocketlm.evaluation.cases import Case, known_suites, load_suite, merge_suites
from pocketlm.evaluation.results import Result
from pocketlm.evaluation.scoring import Score, encode_case, score_cases
from pocketlm.files import expand_globs
from pocketlm.inference.placement import move_to_device
from pocketlm.model.quantization import weight_bytes

BASELINE = "bfloat16"


def validation_texts(config: Config, max_characters: int) -> Iterator[str]:
    """Yield held-out documents of this config, up to this number of characters in total."""
    remaining = max_characters
    for source_config in config.data.sources:
        separate = bool(source_config.val_path or source_config.val_split)
        source = open_source(source_config, config.data.cache_dir, validation=separate)
        for chunk in split_source(source, 1.0 if separate else config.data.val_share):
            if chunk.split == "val" and remaining > 0:
                yield chunk.text[:remaining]
                remaining -= len(chunk.text)


@dataclass(frozen=True)
class Measurement:
    """The size of a model's weights, its loss on texts, and its result on cases."""

    weight_bytes: int
    perplexity: float
    bits_per_byte: float
    result: Result


def measure(path: str, dtype: str, texts: list[Case], cases: tuple[Case, ...]) -> Measurement:
    """Load the checkpoint in this data type and score texts and cases."""
    checkpoint = load_checkpoint(path)
    move_to_device(checkpoint, "auto", dtype)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    encoded = [encode_case(tokenizer, case, model.max_seq_len) for case in (*texts, *cases)]
    scores = score_cases(model, tokenizer, encoded)
    text_scores, case_scores = scores[: len(texts)], scores[len(texts) :]
    loss_sum = math.fsum(text_bits(score) for score in text_scores) * math.log(2)
    return Measurement(
        weight_bytes(model),
        perplexity=math.exp(loss_sum / sum(score.tokens for score in text_scores)),
        bits_per_byte=loss_sum / math.log(2) / sum(score.bytes for score in text_scores),
        result=Result(
            [dtype],
            checkpoint.step,
            checkpoint.tokens,
            val_loss=None,
            weights_sha256="",
            tokenizer_sha256=tokenizer.fingerprint,
            scores=case_scores,
        ),
    )


def text_bits(score: Score) -> float:
    """Return the bits of a whole text."""
    assert score.bits_per_byte is not None
    return score.bits_per_byte * score.bytes


def report_row(dtype: str, measured: Measurement, baseline: Measurement) -> list[str]:
    """Return the cells of a data type. A change in accuracy has its paired interval, in points."""
    row = [
        dtype,
        f"{measured.weight_bytes / 1e6:,.1f}",
        f"{measured.perplexity:,.3f}",
        f"{measured.perplexity / baseline.perplexity - 1:+.2%}",
        f"{measured.bits_per_byte:.4f}",
    ]
    if measured.result.graded:
        difference, (low, high) = measured.result.difference_from(baseline.result)
        row.append(f"{measured.result.macro:.2%}")
        row.append(f"{100 * difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]")
    return row


def print_quantization_report(
    path: str, dtypes: list[str], texts: list[str], suites: list[str]
) -> None:
    """Print a row for bfloat16 and each of the data types. Raise UserError for a wrong suite."""
    text_cases = [Case(f"text {n}", "text", text=text) for n, text in enumerate(texts)]
    cases: tuple[Case, ...] = ()
    if suites:
        files = expand_globs(suites, "suite", known_suites)
        cases = merge_suites(load_suite(file) for file in files).cases
    size = sum(len(text.encode()) for text in texts)
    title = f"{path}: {size:,} bytes of text, {len(cases)} cases"
    table = Table(title=title, box=None, title_justify="left")
    for label in ("", "MB", "perplexity", "change", "bits per byte", "cases right", "change"):
        table.add_column(label, justify="right" if label else "left")
    baseline = measure(path, BASELINE, text_cases, cases)
    table.add_row(*report_row(BASELINE, baseline, baseline))
    for dtype in dict.fromkeys(dtypes):
        if dtype != BASELINE:
            measured = measure(path, dtype, text_cases, cases)
            table.add_row(*report_row(dtype, measured, baseline))
    Console(highlight=False, width=140).print(table)
