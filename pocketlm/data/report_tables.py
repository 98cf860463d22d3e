"""The data report as text: a table of counts, the tokenizer, a histogram, and a row of the run."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pocketlm.data.report import STREAMED_NOTE, Bin, DataReport, SplitFacts

BAR_WIDTH = 40  # characters of the longest bar


def print_report(report: DataReport) -> None:
    """Print the report to stdout."""
    out = Console(highlight=False, emoji=False, soft_wrap=True)
    out.print(count_table(report))
    print_tokenizer(out, report)
    out.print(f"documents in both train and validation: {report.overlap:,}")
    for source in report.mixture:
        out.print(
            f"{source.source}: {source.share:.2%} of the rows (weight {source.weight:.2%}), "
            f"{source.epochs:.2f} epochs"
        )
    print_histogram(out, report.train.histogram)
    out.print("\nThe first row of the run, one line per document:")
    for number, text in enumerate(report.row, 1):
        out.print(Text.assemble((f"{number:>3} ", "bold"), text.replace("\n", "⏎")))


def count_table(report: DataReport) -> Table:
    """Return the counts of both splits side by side."""
    title = f"{report.source}\n{STREAMED_NOTE}" if report.streamed else report.source
    table = Table(box=None, title=title, title_justify="left")
    table.add_column("")
    table.add_column("train", justify="right")
    table.add_column("validation", justify="right")
    columns = [count_cells(report, split) for split in (report.train, report.validation)]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    return table


def count_cells(report: DataReport, split: SplitFacts) -> dict[str, str]:
    """Return the cells of one split, by the label of their row."""
    cells = {
        "documents": f"{split.documents:,}",
        "bytes": f"{split.bytes:,}",
        "tokens": f"{split.tokens:,}",
        "bytes per token": f"{split.bytes_per_token:.3f}",
        f"ids used, of {report.tokenizer.vocab_size:,}": f"{split.ids_used:,}",
        "unknown tokens": f"{split.unknown:,} ({split.unknown / split.tokens:.3%})",
        "duplicate documents": f"{split.duplicates:,}",
        "tokens per document: shortest": f"{split.lengths.shortest:,}",
        "    median": f"{split.lengths.median:,.0f}",
        "    longest": f"{split.lengths.longest:,}",
    }
    if split.truncated is not None:
        cells["documents truncated to a row"] = f"{split.truncated:,}"
    if report.train.nul or report.validation.nul:
        cells["NUL characters (is this text?)"] = f"{split.nul:,}"
    return cells


def print_tokenizer(out: Console, report: DataReport) -> None:
    """Print the tokenizer's name and special tokens."""
    tokenizer = report.tokenizer
    bos = "no bos" if tokenizer.bos is None else f"bos is id {tokenizer.bos}"
    eos = "no eos" if tokenizer.eos is None else f"eos is id {tokenizer.eos}"
    out.print(f"\ntokenizer: {tokenizer.name}; {bos}, {eos}")
    if tokenizer.note:
        out.print(tokenizer.note, markup=False)


def print_histogram(out: Console, bars: list[Bin]) -> None:
    """Print the number of training documents by their length."""
    out.print("\ntokens per document  train documents")
    largest = max(bar.documents for bar in bars)
    for bar in bars:
        to = "or more" if bar.high is None else f"to {bar.high - 1:>6,}"
        label = f"{bar.low:>6,} {to}"
        width = round(BAR_WIDTH * bar.documents / largest)
        out.print(f"{label:<19}{bar.documents:>10,} {'█' * width}")
