"""The start of several processes that train together, and the end of one of them.

Lightning starts them, or torchrun or Slurm has: `connected` then only joins them.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from pocketlm.config.sections import HardwareConfig
from pocketlm.distributed.agreement import GRACE
from pocketlm.errors import UserError
from pocketlm.hardware.processes import print_note

# what gloo, NCCL and torch's store say when another process has gone, or does not answer
LOST = re.compile(
    "connection (was )?(closed|reset|refused)|timed? ?out|broken pipe|heartbeat|socket|nccl",
    re.IGNORECASE,
)


AFTER_A_LOSS = (
    "its own message, if it had time for one, says why. The checkpoints on the disk are whole, and "
    "the same command resumes from the last"
)


def check_launch(config: HardwareConfig) -> None:
    """Raise UserError if a launcher has started another number of processes than devices."""
    if TorchElasticEnvironment.detect():
        launcher, count = "torchrun", whole_number("WORLD_SIZE")
        local = whole_number("LOCAL_WORLD_SIZE", count)
        checked = ["RANK", "LOCAL_RANK", "GROUP_RANK"]
    elif "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect():
        launcher, count = "Slurm", whole_number("SLURM_NTASKS")
        local = count // max(1, whole_number("SLURM_NNODES", 1)) or 1
        checked = ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS_PER_NODE"]
    else:
        launcher, count, local = "this command", config.world_size, config.devices
        checked = ["MASTER_PORT", "NODE_RANK", "LOCAL_RANK"] if count > 1 else []
    for name in checked:
        whole_number(name, 0)
    if (count, local) != (config.world_size, config.devices):
        raise UserError(
            f"{launcher} has started {count} processes, and hardware.devices x hardware.num_nodes "
            f"is {config.devices} x {config.num_nodes}: set hardware.devices={local} "
            f"hardware.num_nodes={count // local}"
        )
    if launcher == "Slurm" and count > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            f"this Slurm job has {count} tasks, and Lightning needs their number on each machine: "
            f"write #SBATCH --ntasks-per-node={local} instead of --ntasks"
        )
    if launcher == "Slurm" and count > 1 and "SLURM_STEP_ID" not in os.environ:
        print_note(
            f"this Slurm job has {count} tasks; each needs a process: srun python train.py ..."
        )


def check_machines(config: HardwareConfig) -> None:
    """Raise UserError if no launcher has started the processes of several machines."""
    launched = TorchElasticEnvironment.detect() or SLURMEnvironment.detect()
    if config.num_nodes > 1 and not launched and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"hardware.num_nodes is {config.num_nodes}, and no launcher has started this process: "
            f"run torchrun --nnodes {config.num_nodes} --nproc-per-node {config.devices} "
            "--rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 train.py ... on each machine, "
            "or srun in a Slurm job"
        )


def whole_number(name: str, default: int | None = None) -> int:
    """Return an environment variable that counts processes. Raises UserError."""
    text = os.environ.get(name, default)
    if text is None or not str(text).isdecimal():
        raise UserError(
            f"the environment variable {name} is {text!r}, and the start of several processes "
            "needs a whole number there: unset it, or let torchrun or srun set it"
        )
    return int(text)


@contextmanager
def connected(trainer: L.Trainer, timeout: int) -> Iterator[None]:
    """Start the other processes of a run, unless a launcher has, and wait for all of them.

    timeout: seconds. Raises UserError if they do not come together, or if one is lost before the
    context ends.
    """
    strategy = trainer.strategy
    children = Children([])
    if isinstance(strategy.launcher, _SubprocessScriptLauncher):  # FSDP's has none under torchrun
        try:
            strategy.launcher.launch(lambda: None)
        except ValueError as error:  # Lightning compares its settings with those of the launcher
            raise UserError(" ".join(str(error).split())) from None
        children = Children([*strategy.launcher.procs])
        strategy.launcher.procs.clear()  # Lightning would end this process without a word
    children.start()
    try:
        join(strategy, timedelta(seconds=timeout))
        yield
    except Exception as error:
        children.watched = False
        if not is_loss(error):
            raise
        ended = children.first_ended(wait=1) or f"another process of this run {lost(error)}"
        raise UserError(f"{ended}; {AFTER_A_LOSS}") from None
    finally:
        children.finish()


def join(strategy: Strategy, timeout: timedelta) -> None:
    """Join the processes of a run. Raises UserError if they do not come together."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if shared and not dist.is_initialized():
            device = strategy.root_device
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store_of_this_start(timeout),
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
        strategy.setup_environment()
    except (RuntimeError, OSError) as error:
        if re.search("EADDRINUSE|address already in use", str(error)):
            raise UserError(
                f"the port of {address} is taken by another program; set MASTER_PORT to a free one"
            ) from None
        if not is_loss(error):
            raise
        raise UserError(
            f"the processes of this run have not come together at {address} "
            f"({first_line(error)}); {how_to_meet(address, str(error))}"
        ) from None


def how_to_meet(address: str, problem: str) -> str:
    """Return what to change if processes do not come together at an address."""
    # many machines have their own name for 127.0.0.1 in /etc/hosts, and gloo then tells it to all
    if "[127." in problem and not address.startswith(("127.", "localhost")):
        return (
            "a machine has told the others 127.0.0.1 as its own address: set GLOO_SOCKET_IFNAME "
            "to the name of its network interface, such as eth0 (ip address prints it)"
        )
    return (
        "start as many as hardware.devices x hardware.num_nodes, on machines that reach this "
        "address"
    )


def store_of_this_start(timeout: timedelta) -> Store:
    """Return torchrun's store, with keys of this start only.

    The store outlives a restart, and the processes would find the addresses of those before. So
    the first one gives a prefix to each process that asks for it now.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timeout)
    rank, count, own = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", own)
        prefix = store.get(f"answer/{own}").decode()  # waits for it
        store.add(f"{prefix}/arrived", 1)
        return PrefixStore(prefix, store)
    deadline = time.monotonic() + timeout.total_seconds()
    while (arrived := store.add(f"{own}/arrived", 0)) < count - 1:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"{arrived + 1} of {count} processes have come")
        for other in range(1, count):
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        time.sleep(0.05)
    return PrefixStore(own, store)


class Children(threading.Thread):
    """Watches the processes that Lightning has started, and ends this one if one of them fails.

    This process may wait for that one without end. If it notices by itself, it has some seconds to
    do so.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]):
        super().__init__(daemon=True)
        self.processes, self.watched = processes, bool(processes)

    def run(self) -> None:
        while self.watched:
            time.sleep(1)
            if ended := self.first_ended():
                time.sleep(GRACE)
                if self.watched:
                    print(f"error: {ended}; {AFTER_A_LOSS}", file=sys.stderr, flush=True)
                    for process in self.processes:
                        process.kill()
                    os._exit(2)

    def finish(self) -> None:
        """End the other processes if this one has failed: they could only report a loss."""
        self.watched = False
        if isinstance(sys.exception(), Exception):
            for process in self.processes:
                process.kill()

    def first_ended(self, wait: float = 0) -> str | None:
        """Return a clause on a process that has failed, which may take `wait` seconds; or None."""
        deadline = time.monotonic() + wait
        while True:
            for number, process in enumerate(self.processes, 1):
                if status := process.poll():
                    how = f"status {status}" if status > 0 else signal.Signals(-status).name
                    return f"process {number} of this run has ended with {how}"
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)


def is_loss(error: Exception) -> bool:
    """Return whether an error may come from the end, or the silence, of another process."""
    if not isinstance(error, RuntimeError) or dist.is_initialized() and dist.get_world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or bool(LOST.search(str(error)))


def lost(error: Exception) -> str:
    """Return what gloo or NCCL says of another process."""
    return f"has ended or does not answer ({first_line(error)})"


def first_line(error: Exception) -> str:
    """Return the first sentence of an error's text, without the place in the library's source."""
    line = re.sub(r"^\[[^]]*\]\s*", "", (str(error).splitlines() or [""])[0])
    return line.partition(". ")[0].rstrip(". ")
