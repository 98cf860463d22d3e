"""Progress of a preparation: a bar on a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from pocketlm.corpus.pieces import Source

LINE_SECONDS = 5  # between two lines, where there is no terminal


class TokenisingProgress:
    """Context manager that shows how much of a source has been tokenised, on stderr.

    `resumed_batches` were tokenised by an earlier process and do not count for the speed.
    """

    def __init__(
        self, source: Source, resumed_batches: int, clock: Callable[[], float] = time.monotonic
    ):
        self.source, self.clock = source, clock
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
        self.task = self.bar.add_task(self.source.name, total=self.source.size, text="")
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
        position = self.source.position if self.source.size else 0
        self.bar.update(self.task, completed=position, text=self.summary())
        if not self.console.is_terminal and self.clock() - self.printed > LINE_SECONDS:
            share = f"{position / self.source.size:.0%}, " if self.source.size and position else ""
            line = f"tokenising {self.source.name}: {share}{self.summary()}"
            self.console.print(line, soft_wrap=True)
            self.printed = self.clock()

    def summary(self) -> str:
        """Return the bytes and tokens so far, and the speed."""
        seconds = max(self.clock() - self.began, 1e-3)
        megabytes, millions = self.bytes / 1e6, self.tokens / 1e6
        speed = megabytes / seconds
        return f"{self.note}{megabytes:,.0f} MB, {millions:,.1f} M tokens, {speed:.1f} MB/s"
