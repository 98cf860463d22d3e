"""Processes that do not fit together, or of which one ends: one sentence each."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from pocketlm.config.loading import config_from_dict
from pocketlm.config.sections import HardwareConfig
from pocketlm.distributed import agreement, launch
from pocketlm.distributed.agreement import (
    check_agreement,
    decided_by_first,
    first_process_speaks,
)
from pocketlm.distributed.launch import (
    Children,
    check_launch,
    check_machines,
    connected,
    how_to_meet,
    is_loss,
    store_of_this_start,
)
from pocketlm.errors import UserError
from pocketlm.hardware.devices import Hardware
from pocketlm.startup import is_first_process, stop_signals
from pocketlm.training.loop import make_trainer
from pocketlm.training.signals import GracefulStop

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"}
SLURM = {"SLURM_JOB_NAME": "train", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    "environment, section, message",
    [
        (TORCHRUN | {"WORLD_SIZE": "2"}, {"devices": 2}, None),
        (
            TORCHRUN | {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
            {"devices": 8},
            "torchrun has started 8 processes, .* is 8 x 1: set hardware.devices=4 "
            "hardware.num_nodes=2$",
        ),
        (
            SLURM | {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"},
            {"devices": 2, "num_nodes": 2},
            None,
        ),
        (
            SLURM | {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"},
            {},
            "Slurm has started 4 processes, .* is 1 x 1: set hardware.devices=2 "
            "hardware.num_nodes=2$",
        ),
        (SLURM | {"SLURM_NTASKS": "2"}, {"devices": 2}, "write #SBATCH --ntasks-per-node=2 "),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, {}, None),
        (TORCHRUN | {"WORLD_SIZE": "two"}, {"devices": 2}, "variable WORLD_SIZE is 'two', and "),
        (TORCHRUN, {"devices": 2}, "variable WORLD_SIZE is None, and "),
        (TORCHRUN | {"WORLD_SIZE": "2", "RANK": ""}, {"devices": 2}, "variable RANK is '', and "),
        (SLURM | {"SLURM_NTASKS": "2(x2)"}, {"devices": 2}, "SLURM_NTASKS is '2.x2.', and "),
        ({"MASTER_PORT": "http"}, {"devices": 2}, "variable MASTER_PORT is 'http', and "),
        ({"MASTER_PORT": "http"}, {}, None),
    ],
)
def test_a_launcher_has_to_start_as_many_processes_as_devices(environment, section, message):
    with patch.dict(os.environ, environment):
        if message is None:
            check_launch(HardwareConfig(**section))
            return
        with pytest.raises(UserError, match=message):
            check_launch(HardwareConfig(**section))


def test_several_machines_need_a_launcher():
    two = HardwareConfig(num_nodes=2)
    message = "no launcher .*: run torchrun --nnodes 2 --nproc-per-node 1 "
    with pytest.raises(UserError, match=message):
        check_machines(two)
    for environment in (TORCHRUN, SLURM | {"SLURM_NTASKS": "2"}, {"MASTER_ADDR": "10.0.0.1"}):
        with patch.dict(os.environ, environment):
            check_machines(two)


def test_torchrun_numbers_the_processes_and_not_slurm():
    """Slurm may call a machine the first that torchrun calls the second."""
    with patch.dict(os.environ, SLURM | TORCHRUN | {"RANK": "0", "GROUP_RANK": "0"}):
        assert is_first_process()
    with patch.dict(os.environ, SLURM | TORCHRUN | {"SLURM_PROCID": "0"}):
        assert not is_first_process()


def gathered(others: dict[str, str], rank: int):
    """Stand in for a second process: what `all_gather_object` yields, of which it differs."""

    def gather(everyone: list, own: dict) -> None:
        everyone[:] = [own, own | others]

    return patch.multiple(
        dist,
        get_world_size=lambda: 2,
        get_rank=lambda: rank,
        all_gather_object=gather,
    )


@pytest.mark.parametrize("name", ["training.lr", "sampling.top_k", "the data", "the program"])
def test_processes_that_disagree_are_refused_by_the_first(name):
    config = config_from_dict({"model": {"vocab_size": 300}})
    hardware = Hardware("cpu", "32-true", False, {})
    for rank in (0, 1):
        with gathered({}, rank):
            check_agreement(config, hardware, {"the data": "a"})
    message = f"^the processes of this run disagree: {name} is .* in the first and other in "
    with gathered({name: "other"}, 0), pytest.raises(UserError, match=message):
        check_agreement(config, hardware, {"the data": "a"})
    with gathered({name: "other"}, 1), pytest.raises(SystemExit) as exit:
        check_agreement(config, hardware, {"the data": "a"})
    assert exit.value.code == 2


def test_what_each_machine_may_have_for_itself_is_not_compared():
    config = config_from_dict({"model": {"vocab_size": 300}})
    seen: dict[str, str] = {}

    def gather(everyone: list, own: dict) -> None:
        seen.update(own)

    with gathered({}, 0), patch.object(dist, "all_gather_object", gather):
        check_agreement(config, Hardware("cpu", "", False, {}), {})
    assert {"training.max_steps", "run.name", "data.packing"} <= seen.keys()
    assert not {"data.cache_dir", "data.path", "hardware.num_workers"} & seen.keys()


def test_an_error_of_the_first_process_ends_the_others():
    def fail() -> None:
        raise UserError("the disk is full")

    shared = {}
    broadcast = patch.object(
        dist, "broadcast_object_list", lambda answer: answer.__setitem__(slice(None), shared["a"])
    )
    initialized = patch.object(dist, "is_initialized", lambda: True)
    record = patch.object(dist, "broadcast_object_list", lambda answer: shared.update(a=answer))
    first, second = (patch.object(dist, "get_rank", lambda rank=rank: rank) for rank in (0, 1))
    failure = pytest.raises(UserError, match="the disk is full")
    with initialized, first, record, failure:
        decided_by_first(fail)
    with initialized, second, broadcast, pytest.raises(SystemExit) as exit:
        decided_by_first(fail)
    assert exit.value.code == 2


def test_other_processes_let_the_first_one_speak(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(agreement.time, "sleep", slept.append)
    with pytest.raises(UserError, match="^no$"), first_process_speaks():
        raise UserError("no")
    assert not slept
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="^in process after the first: no$"), first_process_speaks():
        raise UserError("no")
    assert slept == [agreement.GRACE]


def test_a_signal_that_comes_while_the_processes_compare_theirs_is_not_lost(monkeypatch):
    """The answer, of which nobody had a signal, had replaced it."""
    monkeypatch.setattr(stop_signals, "received", 0)

    def reduce(own: torch.Tensor, reduce_op: str) -> torch.Tensor:
        stop_signals.received = signal.SIGTERM  # as the handler does
        return own

    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=reduce)
    trainer = SimpleNamespace(world_size=2, strategy=strategy, global_step=3)
    GracefulStop(checkpoints=None).stop_if_signalled(trainer)
    assert stop_signals.received == signal.SIGTERM


def test_a_port_that_is_taken_is_one_sentence():
    config = config_from_dict({"hardware": {"accelerator": "cpu", "strategy": "ddp"}})
    trainer = make_trainer(
        config.with_max_steps(1), Hardware("cpu", "32-true", False, {}, "ddp"), []
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        with patch.dict(os.environ, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}):
            message = f"^the port of 127.0.0.1:{port} is taken by another program; set MASTER_PORT"
            with pytest.raises(UserError, match=message), connected(trainer, 9):
                pass


def test_a_machine_that_takes_its_name_for_the_loopback_is_told_what_to_set():
    refused = "timed out connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:23962"
    assert "set GLOO_SOCKET_IFNAME" in how_to_meet("10.77.0.1:29500", refused)
    assert how_to_meet("127.0.0.1:29500", refused).startswith("start as many as ")
    assert how_to_meet("10.77.0.1:29500", "timed out").startswith("start as many as ")


def test_a_process_that_has_failed_is_named():
    code = "import os, signal, sys; os.kill(os.getpid(), signal.SIGKILL) if {} else sys.exit(3)"
    for kill, how in ((1, "SIGKILL"), (0, "status 3")):
        child = subprocess.Popen([sys.executable, "-S", "-c", code.format(kill)])
        ended = Children([child]).first_ended(wait=30)
        assert ended == f"process 1 of this run has ended with {how}"
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as child:
        child.wait()
        assert Children([child]).first_ended() is None


@pytest.mark.parametrize(
    "text, loss",
    [
        ("[/pytorch/gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:1", True),
        ("Timed out waiting 1000ms for recv operation to complete", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_the_loss_of_a_process_is_told_from_a_mistake_of_the_program(text, loss):
    assert is_loss(RuntimeError(text)) is loss
    assert not is_loss(ValueError(text))


def test_a_restart_finds_no_address_of_the_processes_before():
    """The store is torchrun's, and outlives both starts."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "WORLD_SIZE": "2"}
    prefixes = []
    for start in range(2):
        stores: dict[int, dist.Store] = {}

        def begin(rank: int, stores: dict[int, dist.Store] = stores) -> None:
            ranks = {"RANK": str(rank)}
            with patch.object(launch.os, "environ", address | ranks):
                stores[rank] = store_of_this_start(timedelta(seconds=60))

        second = multiprocessing.get_context("fork").Process(target=begin, args=(1,))
        second.start()
        begin(0)
        second.join()
        assert second.exitcode == 0
        [store] = stores.values()
        assert not store.check(["address"])
        store.set("address", str(start))
        prefixes.append(store)
    assert [store.get("address") for store in prefixes] == [b"0", b"1"]
