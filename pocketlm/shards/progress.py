"""Progress of a preparation, on stderr."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from pocketlm.corpus.pieces import WHOLE, Part, Source

LINE_SECONDS = 5  # between two lines, where there is no terminal


class TokenisingProgress:
    """Context manager that shows how much of a source has been tokenised, on stderr.

    `resumed_batches` were tokenised by an earlier process and do not count for the speed. `part` is
    the part of the source that is tokenised.
    """

    def __init__(
        self,
        source: Source,
        resumed_batches: int,
        part: Part = WHOLE,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.source, self.clock = source, clock
        self.positions = part.positions(source.size or 0)
        self.name = source.name if part == WHOLE else f"part {part} of {source.name}"
        self.note = f"resumed after {resumed_batches} batches, " if resumed_batches else ""
        self.bytes = self.tokens = 0
        self.began = self.printed = clock()
        # Names of files may hold brackets, which are markup to rich.
        self.console = Console(stderr=True, highlight=False, emoji=False, markup=False)
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("tokenising {task.description}", markup=False),
            BarColumn(24),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> "TokenisingProgress":
        self.bar.start()
        self.task = self.bar.add_task(self.name, total=len(self.positions) or None, text="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def advance(self, more_bytes: int, more_tokens: int) -> None:
        """Count bytes of text and their tokens."""
        self.bytes += more_bytes
        self.tokens += more_tokens
        total = len(self.positions)
        position = max(0, self.source.position - self.positions.start) if total else 0
        self.bar.update(self.task, completed=position, text=self.summary())
        if not self.console.is_terminal and self.clock() - self.printed > LINE_SECONDS:
            share = f"{min(1, position / total):.0%}, " if position else ""
            line = f"tokenising {self.name}: {share}{self.summary()}"
            self.console.print(line, soft_wrap=True)
            self.printed = self.clock()

    def summary(self) -> str:
        """Return the bytes and tokens so far, and the speed."""
        seconds = max(self.clock() - self.began, 1e-3)
        megabytes, millions = self.bytes / 1e6, self.tokens / 1e6
        speed = megabytes / seconds
        return f"{self.note}{megabytes:,.0f} MB, {millions:,.1f} M tokens, {speed:.1f} MB/s"
