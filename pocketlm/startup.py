"""The time that a command takes to start."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import without the garbage collector, which then leaves what was imported alone.

    `import torch` makes hundreds of thousands of objects that live as long as the process. Looking
    for garbage among them takes a fifth of the time of the imports, and again 0.2 s now and then.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
