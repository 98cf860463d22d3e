"""Train in several processes, as torchrun, Slurm or Lightning would have started them.

    python tests/programs/train_ranks.py PLAN

PLAN is a JSON file: {"ranks": number of processes, "launcher": torchrun, slurm or lightning,
"runs": a list of {"arguments": those of train.py, "interrupt": [step, signal, rank] or null,
"exit": the expected status}}. Each process makes all runs, one after the other, and is a fork of
this one. With one rank, there is no launcher. The losses of each logged step go to
losses/<run.name>.json, with all their digits. The exit status is the number of processes of which
a run has had another status, or which were killed.
"""

import json
import os
import socket
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import train
from pocketlm.errors import UserError
from pocketlm.training.metrics import MetricsLogger
from tests.support.training import signal_after


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(launcher: str, rank: int, count: int, port: int) -> dict[str, str]:
    """Return the variables that a launcher sets in a process."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    number, total = str(rank), str(count)
    if launcher == "torchrun":
        ranks = {"RANK": number, "LOCAL_RANK": number, "GROUP_RANK": "0"}
        sizes = {"WORLD_SIZE": total, "LOCAL_WORLD_SIZE": total}
        return address | ranks | sizes | {"TORCHELASTIC_RUN_ID": "none"}
    if launcher == "slurm":
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0"}
        sizes = {"SLURM_NTASKS": total, "SLURM_NTASKS_PER_NODE": total, "SLURM_NNODES": "1"}
        ranks = {"SLURM_PROCID": number, "SLURM_LOCALID": number, "SLURM_NODEID": "0"}
        return address | job | sizes | ranks
    return address | {"LOCAL_RANK": number}


def record_losses(metrics: MetricsLogger, step: int, tokens: int, values: dict[str, float]) -> None:
    """Write the row of metrics.csv, and the same numbers with all their digits."""
    write_row(metrics, step, tokens, values)
    if metrics.writing:
        path = Path("losses") / f"{metrics.run.name}.json"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps([step, tokens, values]) + "\n")


write_row = MetricsLogger.write


def make_runs(runs: list[dict[str, Any]]) -> int:
    """Make the runs in this process; return how many had another exit status than expected."""
    failures = 0
    for run in runs:
        interrupt = run.get("interrupt")
        try:
            with signal_after(*interrupt) if interrupt else nullcontext():
                status: Any = train.main(run["arguments"])
        except SystemExit as exit:
            status = exit.code
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        except Exception:
            traceback.print_exc()
            status = 1
        if status != run.get("exit", 0):
            print(f"{run['arguments']} ended with {status}", file=sys.stderr)
            failures += 1
    return failures


def main() -> int:
    plan = json.loads(Path(sys.argv[1]).read_text())
    if plan["ranks"] == 1:
        return make_runs(plan["runs"])
    port, children = free_port(), []
    for rank in range(plan["ranks"]):
        child = os.fork()
        if child == 0:
            os.environ.update(environment(plan["launcher"], rank, plan["ranks"], port))
            failures = 1
            try:
                failures = make_runs(plan["runs"])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(failures)
        children.append(child)
    return sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    with patch.object(MetricsLogger, "write", record_losses):
        sys.exit(main())
