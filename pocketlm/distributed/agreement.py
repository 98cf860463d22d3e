"""Agreement of several processes: the same start, and one voice."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pocketlm.checkpoint.changes import FREE, comparable
from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.hardware.devices import Hardware
from pocketlm.hardware.processes import is_first_process

T = TypeVar("T")

GRACE = 5  # seconds in which a launcher ends the other processes after the first has failed

# keys that may differ between machines: where each keeps its prepared data, and how it reads it
OF_EACH_MACHINE = {"data.cache_dir", "hardware.num_workers"}


def check_agreement(config: Config, hardware: Hardware, others: Mapping[str, object]) -> None:
    """Raise UserError, in the first process, if the processes disagree; the others exit.

    others: what must be equal besides the config, the chosen hardware and the program, by a name
    for messages.
    """
    values = comparable(config)
    for section, settings in config.to_dict().items():
        names = {key: f"{section}.{key}" for key in settings}
        values |= {n: settings[key] for key, n in names.items() if section != "data" or n in FREE}
    values |= {"accelerator": hardware.accelerator, "precision": hardware.precision}
    values |= {"compile": hardware.compile, "torch": str(torch.__version__)}
    values |= {"the program": program_sha256(), **others}
    own = {name: repr(value) for name, value in values.items() if name not in OF_EACH_MACHINE}
    everyone: list[dict[str, str]] = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                if dist.get_rank():
                    raise SystemExit(2)
                raise UserError(
                    f"the processes of this run disagree: {name} is {value} in the first and "
                    f"{theirs.get(name)} in number {rank}; start all of them with the same "
                    "command, files and versions"
                )


def program_sha256() -> str:
    """Return the SHA-256 of this program's source files."""
    package = Path(__file__).parents[1]
    files = [*package.parent.glob("*.py"), *package.rglob("*.py"), *package.rglob("*.c")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(package.parent)} {file.stat().st_size}".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def decided_by_first(decide: Callable[[], T]) -> T:
    """Return what `decide` returns in the first process, which alone calls it.

    If it raises there, the other processes exit with status 2.
    """
    if not dist.is_initialized():
        return decide()
    answer: list[Any] = [False, None]
    if dist.get_rank() == 0:
        try:
            answer = [True, decide()]
        finally:
            dist.broadcast_object_list(answer)
    else:
        dist.broadcast_object_list(answer)
        if not answer[0]:
            raise SystemExit(2)
    result: T = answer[1]
    return result


@contextmanager
def first_process_speaks() -> Iterator[None]:
    """Let a process other than the first wait before it reports an error.

    If the first one has the same error, its launcher ends the others meanwhile.
    """
    try:
        yield
    except UserError as error:
        if is_first_process():
            raise
        time.sleep(GRACE)
        number = dist.get_rank() if dist.is_initialized() else "after the first"
        raise UserError(f"in process {number}: {error}") from error
