"""Prepare data in forks of this process that are killed, or whose disk is full, and again.

    python -m tests.programs.prepare_in_forks kill DATA_CONFIG_AS_JSON FOLDER
    python -m tests.programs.prepare_in_forks full DATA_CONFIG_AS_JSON FOLDER
    python -m tests.programs.prepare_in_forks parts DATA_CONFIG_AS_JSON FOLDER

`parts` prepares PARTS parts side by side, of which the second is killed at first.
A fork has nothing from the fork before it except the files on the disk. Prints a JSON object with a
result for each pair of forks, and one for a preparation that was not disturbed ("undisturbed").
"""

import hashlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketlm.config.sections import DataConfig
from pocketlm.corpus import pieces, readers
from pocketlm.corpus.pieces import Part
from pocketlm.data.prepare import prepare, prepare_part
from pocketlm.errors import run_main
from pocketlm.shards.builder import BuildSettings
from pocketlm.shards.format import ShardHeader, ShardWriter
from tests.support.preparation import CountingEncoder

SIZE = 2**14  # of pieces, blocks and batches, so that there are many of them
pieces.PIECE_CHARACTERS = readers.BLOCK_BYTES = SIZE


@dataclass(frozen=True)
class KillPoint:
    """A call of a method before or after which the process is killed."""

    owner: object
    method: str
    call: int  # the first is 1
    before: bool = False


KILL_POINTS = {
    "the first write": KillPoint(ShardWriter, "write", 1),
    "a write": KillPoint(ShardWriter, "write", 9),
    "a later write": KillPoint(ShardWriter, "write", 19),
    "a half-written journal": KillPoint(os, "replace", 12, before=True),
    "a written journal": KillPoint(os, "replace", 12),
    "closing train": KillPoint(ShardHeader, "digest", 1, before=True),
    "closing val": KillPoint(ShardHeader, "digest", 2, before=True),
    "both are closed": KillPoint(ShardWriter, "close", 2),
    "the journal is gone": KillPoint(Path, "unlink", 2),
    "an offsets file is gone": KillPoint(Path, "unlink", 3),
    "nothing": KillPoint(os.path, "isdir", -1),  # prepares a second time what is complete
}


def kill_at(point: KillPoint) -> None:
    """Let this process be killed at a point."""
    function = getattr(point.owner, point.method)
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == point.call and point.before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if calls == point.call:
            if point.method == "write":  # as if the system had written its buffers
                arguments[0].file.flush()
                arguments[0].offsets.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(point.owner, point.method, call)


def run(keys: dict[str, Any], cache: Path) -> None:
    """Prepare into a cache, and write how many batches were tokenised to a file next to it."""
    encoder = CountingEncoder()
    settings = BuildSettings(batch_size=SIZE, journal_seconds=-1, encode=encoder)
    data = prepare(DataConfig(**keys, cache_dir=str(cache)), settings)
    key = data.train.shards[0].path.parent.name
    Path(f"{cache}.json").write_text(json.dumps({"calls": encoder.calls, "key": key}))


def run_killed(keys: dict[str, Any], cache: Path, point: KillPoint) -> None:
    kill_at(point)
    run(keys, cache)


def run_with_full_disk(keys: dict[str, Any], cache: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    run_main(lambda: run(keys, cache))


def in_fork(function: Callable[..., None], *arguments: Any) -> int:
    """Call a function in a fork, and return the fork's exit status; negative for a signal."""
    return status_of(start_fork(function, *arguments))


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start_fork(function: Callable[..., None], *arguments: Any) -> int:
    """Call a function in a fork, and return the fork's process id."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return child


PARTS = 3


def run_part(keys: dict[str, Any], cache: Path, part: Part, point: KillPoint | None = None) -> None:
    """Prepare a part, and write how many batches were tokenised to a file next to the cache."""
    if point:
        kill_at(point)
    encoder = CountingEncoder()
    settings = BuildSettings(batch_size=SIZE, journal_seconds=-1, encode=encoder)
    prepare_part(DataConfig(**keys, cache_dir=str(cache)), part, settings)
    Path(f"{cache}-{part.index}.json").write_text(json.dumps({"calls": encoder.calls}))


def run_parts(keys: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Prepare all parts at once, one of them twice, then the killed one again; join them."""
    points = [None, KillPoint(ShardWriter, "write", 4), None]
    forks = [
        start_fork(run_part, keys, cache, Part(index, PARTS), point)
        for index, point in enumerate(points)
    ]
    forks.append(start_fork(run_part, keys, cache, Part(0, PARTS)))
    statuses = [status_of(fork) for fork in forks]
    (journal,) = cache.glob("shards/parts-*/unfinished-2/journal.json")
    batches = json.loads(journal.read_text())["batches"]
    statuses.append(in_fork(run_part, keys, cache, Part(1, PARTS)))
    calls = [
        json.loads(Path(f"{cache}-{index}.json").read_text())["calls"] for index in range(PARTS)
    ]
    data = prepare(DataConfig(**keys, cache_dir=str(cache)))
    headers = [split.shards[0].header.sha256 for split in (data.train, data.val)]
    return {"statuses": statuses, "batches": batches, "calls": calls, "sha256": headers}


def result(cache: Path) -> dict[str, Any]:
    """Return what a finished preparation left in its cache."""
    entry = json.loads(Path(f"{cache}.json").read_text())
    shards = cache / "shards" / entry["key"]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards.iterdir()}
    folders = sorted(path.name for path in shards.parent.iterdir() if path.is_dir())
    return {"calls": entry["calls"], "files": files, "folders": folders}


def journalled_batches(cache: Path) -> int:
    """Return the number of batches in the journal, 0 without one."""
    for journal in cache.glob("shards/unfinished-*/journal.json"):
        return int(json.loads(journal.read_text())["batches"])
    return 0


def main() -> None:
    scenario, keys, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    assert in_fork(run, keys, folder / "undisturbed") == 0
    results = {"undisturbed": result(folder / "undisturbed")}
    if scenario == "parts":
        data = prepare(DataConfig(**keys, cache_dir=str(folder / "undisturbed")))
        results["sha256"] = [split.shards[0].header.sha256 for split in (data.train, data.val)]
        print(json.dumps(results | {"parts": run_parts(keys, folder / "parts")}))
        return
    if scenario == "full":
        disturbed = {"full": (run_with_full_disk, ())}
    else:
        disturbed = {name: (run_killed, (point,)) for name, point in KILL_POINTS.items()}
    for name, (function, arguments) in disturbed.items():
        cache = folder / name.replace(" ", "-")
        status = in_fork(function, keys, cache, *arguments)
        batches = journalled_batches(cache)
        assert in_fork(run, keys, cache) == 0
        results[name] = {"status": status, "batches": batches, **result(cache)}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
