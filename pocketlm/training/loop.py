"""Set up Lightning's trainer and the callbacks of a run, and train."""

import logging
import math
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy

from pocketlm.checkpoint.changes import describe_hardware
from pocketlm.checkpoint.resume import ResumePoint
from pocketlm.checkpoint.runs import Run
from pocketlm.config.sections import Config
from pocketlm.data.loaders import build_loaders
from pocketlm.data.prepare import PreparedData
from pocketlm.data.samplers import DataShard
from pocketlm.distributed.sharding import ShardedStrategy
from pocketlm.errors import UserError
from pocketlm.hardware.devices import Hardware
from pocketlm.training.checkpointing import Checkpoints, DurableCheckpointIO, RandomState
from pocketlm.training.metrics import MetricsLogger
from pocketlm.training.module import TrainableModule
from pocketlm.training.monitors import Probes, Samples
from pocketlm.training.signals import GracefulStop
from pocketlm.training.tensorboard import TensorBoard


@dataclass(frozen=True)
class TrainedRun:
    """A run that has ended, for its verdict."""

    trainer: L.Trainer
    step: int  # the last one
    waited: int  # validations before it without a new lowest loss
    validation: dict[str, float]  # loss, bpb and perplexity of the last step
    best_loss: float  # the lowest validation loss of all steps
    samples: list[tuple[str, str]]  # prompts and texts of the last step
    tensorboard: TensorBoard


def fit(
    module: TrainableModule,
    config: Config,
    data: PreparedData,
    hardware: Hardware,
    run: Run,
    start: ResumePoint | None,
) -> TrainedRun:
    """Train `module` to its last step, from the beginning or from `start`."""
    t, model, progress = config.training, module.model, module.progress
    set_torch_options(hardware)
    if hardware.compile:
        module.train_loss_fn = torch.compile(module.loss_sum, dynamic=False)
    first_step = start.step if start else 0
    tensorboard = TensorBoard(run, first_step)
    bytes_per_token = data.train.n_bytes / data.train.n_tokens
    metrics = MetricsLogger(run, config, bytes_per_token, first_step, progress, tensorboard)
    samples = Samples(config, data, model, tensorboard)
    probes = [Probes(config, data, model, progress, metrics)] if t.probe_cases else []
    resolved = describe_hardware(hardware, config.hardware.world_size)
    checkpoints = Checkpoints(run, config, data, module, resolved, start)
    # the step is saved before samples and probes look at it: what may fail there costs no step
    monitors, stop = [samples, *probes], GracefulStop(checkpoints)
    trainer = make_trainer(
        config, hardware, [RandomState(t.seed), metrics, checkpoints, *monitors, stop]
    )
    if start and start.verdict_only:
        checkpoints.restore_finished(start.path)
        if trainer.is_global_zero:
            metrics.open_logs()
            for monitor in monitors:
                monitor.look_safely(start.step)
    else:
        train_steps(trainer, module, data, hardware, checkpoints, start)
    best_loss = math.inf if checkpoints.best is None else checkpoints.best
    return TrainedRun(
        trainer,
        start.step if start and start.verdict_only else trainer.global_step,
        checkpoints.waited,
        progress.validation,
        best_loss,
        samples.latest,
        tensorboard,
    )


RESTORE_ERRORS = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError)


def train_steps(
    trainer: L.Trainer,
    module: TrainableModule,
    data: PreparedData,
    hardware: Hardware,
    checkpoints: Checkpoints,
    start: ResumePoint | None,
) -> None:
    """Train to the last step. Raises UserError if the checkpoint cannot be restored."""
    config = module.config
    rank = DataShard(trainer.global_rank, trainer.world_size)
    train_loader, val_loader = build_loaders(
        config, data, rank, pin_memory=hardware.accelerator == "cuda"
    )
    path = start.path if start else None
    try:
        trainer.fit(module, train_loader, val_loader, ckpt_path=path, weights_only=True)
    except RESTORE_ERRORS as error:
        # Lightning and torch restore a state that is not theirs with a dozen kinds of exceptions
        if checkpoints.restored or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{path} has no state of a run that can be restored ({type(error).__name__}: {reason});"
            " remove it, and the same command goes back to the one before"
        ) from error


def set_torch_options(hardware: Hardware) -> None:
    """Choose between torch's fast and its reproducible kernels."""
    if hardware.accelerator == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the matmuls left in float32
    # filling new memory, for reproducibility, would cost a pass over every allocation; the
    # setting is a property that torch gives the module at run time, which mypy cannot see
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # compiled code on a CPU adds embedding gradients in a random order without this
    compiled_on_cpu = hardware.compile and hardware.accelerator == "cpu"
    torch.use_deterministic_algorithms(compiled_on_cpu, warn_only=True)


def make_trainer(config: Config, hardware: Hardware, callbacks: list[L.Callback]) -> L.Trainer:
    """Return a trainer without what Lightning does by itself; docs/reliability.md has the list."""
    t, passes = config.training, config.on_each_device().training.grad_accum_steps
    refuse_trainer_variables()
    trainer = L.Trainer(
        accelerator=hardware.accelerator,
        devices=config.hardware.devices,
        num_nodes=config.hardware.num_nodes,
        strategy=make_strategy(hardware.strategy, config.hardware.timeout),
        precision=hardware.precision,  # type: ignore[arg-type]  # a str that choose_precision made
        max_steps=t.steps,
        max_epochs=-1,
        accumulate_grad_batches=passes,
        val_check_interval=t.val_every_steps * passes,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        plugins=[DurableCheckpointIO()],
        use_distributed_sampler=False,
        callbacks=[*callbacks],  # Lightning appends to the list
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        # Lightning looks there for a file hpc_ckpt_N.ckpt to start from: this is never a folder
        default_root_dir=os.devnull,
    )
    # without those that an installed package registers
    trainer.callbacks = callbacks  # type: ignore[attr-defined]
    # Its handlers of SIGTERM and SIGUSR1 would save, or leave with status 0, within a step
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def make_strategy(name: str, timeout: int) -> Strategy | str:
    """Return Lightning's strategy. timeout: seconds that a process waits for the others."""
    if name == "single":
        return "auto"
    if name == "fsdp":
        return ShardedStrategy(timeout=timedelta(seconds=timeout))
    # the only buffers are RoPE's tables, which are equal everywhere
    return DDPStrategy(timeout=timedelta(seconds=timeout), broadcast_buffers=False)


def refuse_trainer_variables() -> None:
    """Raise UserError if the environment has variables that would change Lightning's trainer."""
    names = sorted(name for name in os.environ if name.startswith("PL_TRAINER_"))
    if names:
        raise UserError(
            f"the environment variable {names[0]} would change Lightning's trainer behind the "
            f"config; unset it: unset {' '.join(names)}"
        )


def quiet_libraries() -> None:
    """Hide notices of libraries that do not hold here, or that lines of this program replace."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than cores
    # it is about changes in place of a block's output, and nothing here makes any
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
