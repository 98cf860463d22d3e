"""Processes of a run that are killed: what the others do, and what torchrun makes of it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocketlm.checkpoint.format import read_checkpoint
from tests.support.training import TINY, end_equal, rows_without_timing

ROOT = Path(__file__).parents[2]
COMMAND = ["--config", "config.yaml", *TINY]  # 12 steps, saved every 3 and at each best, dropout
TWO = ["hardware.devices=2"]
HOSTS = ["hardware.num_nodes=2", "hardware.timeout=60"]


@pytest.fixture
def two_ranks(folder, forked_commands):
    """Make a run in two processes; return how many failed or were killed, and what they said."""

    def two_ranks(*overrides: str, launcher: str = "torchrun", **keys: object) -> tuple[int, str]:
        run = {"arguments": [*COMMAND, *overrides], **keys}
        Path("plan.json").write_text(json.dumps({"ranks": 2, "launcher": launcher, "runs": [run]}))
        done = forked_commands.run("plan.json", program="tests/programs/train_ranks.py")
        return done.returncode, done.stderr

    return two_ranks


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_process_that_is_killed_ends_the_other_and_leaves_the_last_checkpoint(
    two_ranks, strategy
):
    options = [*TWO, f"hardware.strategy={strategy}", "hardware.timeout=60"]
    failed, shown = two_ranks(*options, interrupt=[8, signal.SIGKILL, 1], exit=2)
    assert failed == 1  # the killed one; the other has ended with status 2
    [error] = [line for line in shown.splitlines() if "rror" in line and "[" not in line[:1]]
    assert error.startswith("error: another process of this run has ended or does not answer (")
    assert error.endswith("the same command resumes from the last")
    assert read_checkpoint("checkpoints/last.ckpt")["global_step"] == 6


def test_slurms_warning_to_all_processes_is_one_save_and_one_requeue(two_ranks, monkeypatch):
    scontrol = Path("bin/scontrol").absolute()
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\necho "$@" >> calls.txt\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=":")
    warning = [4, signal.SIGUSR1, None]
    status = 128 + signal.SIGUSR1
    failed, shown = two_ranks(*TWO, launcher="slurm", interrupt=warning, exit=status)
    assert not failed, shown
    assert shown.count("stopped at step 4; ") == shown.count("asked Slurm to run job 7 again") == 1
    assert Path("calls.txt").read_text() == "requeue 7\n"
    assert read_checkpoint("checkpoints/last.ckpt")["global_step"] == 4


def torchrun(*options: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start torchrun, with one restart, on a run whose process 1 is killed after step 8."""
    program = str(ROOT / "tests/programs/killed_rank.py")
    agent = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "1"]
    command = [*before, *agent, *options[:-2], program, "1", "8", *COMMAND, *options[-2:]]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def assert_went_on(*agents: subprocess.Popen) -> None:
    """Assert that the run in checkpoints/ resumed at step 6 and ended as the one in whole/."""
    shown = "".join(agent.communicate(timeout=200)[0] for agent in agents)
    assert not any(agent.returncode for agent in agents), shown
    assert "resuming from checkpoints/last.ckpt at step 6" in shown
    assert end_equal("checkpoints", "whole/checkpoints")
    whole = rows_without_timing("whole/logs/metrics.csv")
    assert rows_without_timing("logs/metrics.csv") == whole


def move_aside() -> None:
    Path("whole").mkdir()
    for name in ("checkpoints", "logs"):
        shutil.move(name, "whole")


@pytest.mark.slow
def test_torchrun_restarts_a_run_which_ends_as_if_nothing_had_been_killed(two_ranks):
    failed, shown = two_ranks(*TWO)
    assert not failed, shown
    move_aside()
    assert_went_on(torchrun("--standalone", "--nproc-per-node", "2", *TWO, "hardware.timeout=60"))


# ---- two machines ----


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def two_machines() -> Iterator[list[tuple[str, tuple[str, ...]]]]:
    """Yield the addresses of two machines, and what runs a command on each.

    They are network namespaces that a cable joins, where this is allowed, else this machine twice.
    """
    names = [f"plm{os.getpid()}-{number}" for number in (1, 2)]
    machines = []
    with contextlib.ExitStack() as made:
        try:
            for name in names:
                ip("netns", "add", name)
                made.callback(ip, "netns", "delete", name)
            cable = ("link", "add", "eth0", "netns", names[0], "type", "veth")
            ip(*cable, "peer", "name", "eth0", "netns", names[1])
            for number, name in enumerate(names, 1):
                ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "eth0", "up")
                inside = ("ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=eth0")
                machines.append((f"10.77.0.{number}", inside))
        except (OSError, subprocess.CalledProcessError):
            machines = [("127.0.0.1", ())] * 2
        yield machines


@pytest.mark.slow
def test_two_machines_restart_together(two_ranks):
    """One torchrun on each, of whose stores the first machine has the one."""
    failed, shown = two_ranks(*TWO)
    assert not failed, shown
    move_aside()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with two_machines() as machines:
        agents = [
            torchrun(
                *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "run"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{machines[0][0]}:{port}"),
                *("--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", address),
                *HOSTS,
                before=inside,
            )
            for number, (address, inside) in enumerate(machines)
        ]
        assert_went_on(*agents)
