"""Tensors in files, each read when it is asked for: a model need not fit into memory twice."""

import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from pocketlm.errors import UserError

MIN_BAR_BYTES = 10**9  # a model of fewer bytes is converted without a progress bar


class StoredTensors(MutableMapping[str, Tensor]):
    """Tensors by name. `tensors[name]` reads one, and nothing keeps it."""

    def __init__(self) -> None:
        self.readers: dict[str, Callable[[], Tensor]] = {}
        self.origins: dict[str, str] = {}  # file of each tensor

    def add(self, name: str, origin: str, read: Callable[[], Tensor]) -> None:
        """Add a tensor of a file. Raises UserError if another file has one of this name."""
        if name in self.readers:
            raise UserError(
                f"{self.origins[name]} and {origin} both have a tensor {name}; "
                "download or save the model again"
            )
        self.readers[name], self.origins[name] = read, origin

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.readers[name] = lambda: tensor

    def __delitem__(self, name: str) -> None:
        del self.readers[name]

    def __contains__(self, name: object) -> bool:
        return name in self.readers

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; torch.isfinite would take the memory of two more."""
    return all(math.isfinite(bound) for bound in tensor.aminmax())


@contextmanager
def progress_bar(label: str, shapes: Iterable[Iterable[int]]) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr from 1 GB of float32 on; yield a function that counts bytes."""
    total = 4 * sum(math.prod(shape) for shape in shapes)
    with Progress(console=Console(stderr=True), disable=total < MIN_BAR_BYTES) as progress:
        task = progress.add_task(label, total=total)
        yield lambda n_bytes: progress.advance(task, n_bytes)
