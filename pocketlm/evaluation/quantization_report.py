"""What quantised weights cost: perplexity and probe scores beside bfloat16's."""

import math
from collections.abc import Iterator

from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.sections import Config
from pocketlm.corpus.chunks import split_source
from pocketlm.corpus.sources import open_source
from pocketlm.evaluation.cases import Case, known_suites, load_suite, merge_suites
from pocketlm.evaluation.results import Result
from pocketlm.evaluation.scoring import encode_case, score_cases
from pocketlm.files import expand_globs
from pocketlm.inference.placement import place
from pocketlm.model.quantization import weight_bytes


def validation_texts(config: "Config", limit: int) -> Iterator[str]:
    """Documents that a run of this config never trains on, up to so many characters."""
    for part in config.data.sources:
        own = bool(part.val_path or part.val_split)
        source = open_source(part, config.data.cache_dir, validation=own)
        for chunk in split_source(source, 1.0 if own else config.data.val_share):
            if chunk.validation and limit > 0:
                yield chunk.text[:limit]
                limit -= len(chunk.text)


def print_quantization_report(
    path: str, dtypes: list[str], texts: list[str], suites: list[str]
) -> None:
    """What each dtype makes of texts and of probe cases, beside bfloat16, with the difference and its interval over the same cases."""
    from rich.console import Console
    from rich.table import Table

    cases = [Case(f"text {n}", "text", text=text) for n, text in enumerate(texts)]
    asked = (
        merge_suites(
            load_suite(suite) for suite in expand_globs(suites, "suite", known_suites)
        ).cases
        if suites
        else ()
    )
    table = Table(
        title=f"{path}: {sum(len(text.encode()) for text in texts):,} bytes of text, {len(asked)} cases",
        box=None,
        title_justify="left",
    )
    for column in ("", "MB", "perplexity", "change", "bits per byte", "cases right", "change"):
        table.add_column(column, justify="right" if column else "left")
    first: tuple[float, Result] | None = None
    for dtype in dict.fromkeys(["bfloat16", *dtypes]):
        checkpoint = load_checkpoint(path)
        place(checkpoint, "auto", dtype)
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        encoded = [
            encode_case(tokenizer, case, model.config.max_seq_len) for case in (*cases, *asked)
        ]
        scores = score_cases(model, tokenizer, encoded)
        of_texts, of_cases = scores[: len(cases)], scores[len(cases) :]
        nats = math.fsum(score.bits_per_byte * score.bytes for score in of_texts) * math.log(2)
        perplexity = math.exp(nats / sum(score.tokens for score in of_texts))
        result = Result(
            [dtype], checkpoint.step, checkpoint.tokens, None, "", tokenizer.fingerprint, of_cases
        )
        first = first or (perplexity, result)
        row = [
            dtype,
            f"{weight_bytes(model) / 1e6:,.1f}",
            f"{perplexity:,.3f}",
            f"{perplexity / first[0] - 1:+.2%}",
        ]
        row.append(f"{nats / math.log(2) / sum(score.bytes for score in of_texts):.4f}")
        if result.graded:
            apart, (low, high) = result.difference_from(first[1])
            row += [
                f"{result.macro:.2%}",
                f"{100 * apart:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
            ]
        table.add_row(*row)
    Console(highlight=False, width=140).print(table)
