"""Lightning's trainer, set up for a run."""

import logging
import warnings

import lightning as L
import torch

from pocketlm.checkpoint.runs import Run, Start
from pocketlm.config.sections import Config
from pocketlm.data.loaders import loaders
from pocketlm.data.prepare import PreparedData
from pocketlm.hardware.devices import Hardware
from pocketlm.training.checkpointing import Checkpoints, DurableCheckpointIO, RandomState
from pocketlm.training.metrics import MetricsLogger, tensorboard
from pocketlm.training.probes import Probes
from pocketlm.training.samples import Samples
from pocketlm.training.signals import GracefulStop


def fit(
    module: L.LightningModule,
    config: Config,
    data: PreparedData,
    hardware: Hardware,
    run: Run,
    start: Start | None,
) -> tuple[L.Trainer, Samples, Checkpoints]:
    """Train `module` to max_steps, from the beginning or from `start`."""
    t = config.training
    if hardware.accelerator == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, where a matmul is left in float32
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # which would cost a pass over all that is allocated
    )
    compiled_on_cpu = (
        hardware.compile and hardware.accelerator == "cpu"
    )  # its sums of embedding rows race, unless told not to
    torch.use_deterministic_algorithms(compiled_on_cpu, warn_only=True)
    if hardware.compile:
        module.train_loss_fn = torch.compile(module.loss_sum, dynamic=False)
    first_step = start.step if start else 0
    metrics = MetricsLogger(run, t, data.train.n_bytes / data.train.n_tokens, first_step)
    checkpoints, samples = Checkpoints(run, t), Samples(config, data)
    probes = [Probes(config, data, metrics)] if t.probe_cases else []
    trainer = L.Trainer(
        accelerator=hardware.accelerator,
        devices=config.hardware.devices,
        precision=hardware.precision,
        max_steps=t.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=t.grad_accum_steps,
        val_check_interval=t.val_every_steps * t.grad_accum_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=tensorboard(run, first_step),
        plugins=[DurableCheckpointIO()],
        use_distributed_sampler=False,
        callbacks=[
            RandomState(t.seed),
            metrics,
            samples,
            *probes,
            checkpoints,
            GracefulStop(checkpoints),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    pin = hardware.accelerator == "cuda"
    train_loader, val_loader = loaders(
        config, data, pin_memory=pin, rank=trainer.global_rank, world_size=trainer.world_size
    )
    trainer.fit(
        module, train_loader, val_loader, ckpt_path=start.path if start else None, weights_only=True
    )
    return trainer, samples, checkpoints


def quiet_libraries() -> None:
    """Keep Lightning's notices, which this program's own lines replace, off the screen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings(
        "ignore", message="This DataLoader will create"
    )  # more workers than cores are asked for
