"""Train a model.

    python train.py --config config.yaml                          # the default run, on real text
    python train.py --config config.yaml training.max_steps=20    # any key, changed for this run
    python train.py --config presets/shakespeare_char_cpu.yaml --dry-run

The same command again continues an interrupted run from its last checkpoint. Outputs go to checkpoints/ and logs/.
"""

import argparse
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from rich.console import Console, Group
from torch import Tensor

import callbacks as cb
import mps
from checkpoint import kit_entry, read_checkpoint, save_whole
from config import Config
from config_file import load_config, to_yaml
from data import loaders, validated_bytes, with_steps
from errors import UserError, run_main
from hardware import Hardware, check_matmul_sizes, check_recomputation, choose_hardware, keep_freed_memory, with_compile
from loss import IGNORE, chunked_cross_entropy, cross_entropy
from model import Transformer
from optim import build_optimizer, clip_gradients, lr_at_step
from prepare import PreparedData, prepare
from report import facts, plan, print_verdict, seconds_outside_head
from runs import Run, Start, find_start, is_first_process, print_note


class LitTransformer(L.LightningModule):
    """The Transformer as Lightning trains it: loss, optimizer, schedule, clip, and the counts behind the metrics."""

    def __init__(self, config: Config, data: PreparedData, fused: bool = True):
        super().__init__()
        self.save_hyperparameters(config.to_dict())
        self.config, self.tokenizer_state, self.fused = config, data.tokenizer.state(), fused
        self.val_bytes, self.data_sha256 = validated_bytes(data, config), data.sha256
        self.model = Transformer(config.model)
        self.training_nats = self.nats  # or what it compiles to; validation and generation stay plain
        self.tokens_seen = 0  # targets trained on, up to the last interval
        self.validation: dict[str, float] = {}
        self.resumed: dict[str, Any] = {}
        self.grad_norm = torch.zeros(())
        self.begin_counts()

    def on_fit_start(self) -> None:
        self.begin_counts()

    def begin_counts(self) -> None:
        """Zero counters, on the device that the batches will be on."""
        self.interval_nats = torch.zeros((), device=self.device)
        self.interval_targets = torch.zeros((), dtype=torch.long, device=self.device)
        self.step_targets = torch.zeros((), dtype=torch.long, device=self.device)

    # ---- one step ----

    def nats(self, batch: dict[str, Tensor]) -> Tensor:
        """Summed cross-entropy of the batch's targets."""
        hidden = self.model.hidden(batch["input_ids"], doc_ids=batch.get("doc_ids"))
        if self.config.training.loss_chunk:
            return chunked_cross_entropy(hidden, self.model.head_weight, batch["targets"], self.config.training.loss_chunk)
        return cross_entropy(self.model.logits(hidden), batch["targets"])

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        nats, targets = self.training_nats(batch), batch["targets"]
        count = (targets != IGNORE).sum()
        self.interval_nats += nats.detach()
        self.interval_targets += count
        self.step_targets += count
        return nats / targets.numel()  # configure_gradient_clipping corrects this where targets are missing

    def configure_optimizers(self) -> torch.optim.Optimizer:
        t = self.config.training
        return build_optimizer(
            self.model, optimizer=t.optimizer, lr=t.lr, weight_decay=t.weight_decay, betas=t.betas, eps=t.eps, fused=self.fused
        )

    def current_lr(self) -> float:
        """Peak rate times the schedule, for the step in hand; a pure function of the step, so nothing of it is saved."""
        t = self.config.training
        return t.lr * lr_at_step(
            self.trainer.global_step, max_steps=t.max_steps, warmup_steps=t.warmup_steps, min_lr_ratio=t.min_lr_ratio, schedule=t.schedule
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.current_lr()

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Make the step's gradient the mean over its targets, however they fell into batches, and clip its norm."""
        t = self.config.training
        targets = self.total(self.step_targets)
        full = t.grad_accum_steps * t.micro_batch_size * t.seq_len * self.trainer.world_size
        self.grad_norm = clip_gradients(self.model.parameters(), t.grad_clip, full / targets)
        self.step_targets.zero_()
        if self.device.type == "cpu" and not torch.isfinite(self.grad_norm):  # elsewhere a look would wait for the device
            raise UserError(cb.non_finite("the gradient", self.trainer.global_step + 1))

    def total(self, count: Tensor) -> Tensor:
        """The sum of a count over all processes."""
        return self.trainer.strategy.reduce(count.clone(), reduce_op="sum") if self.trainer.world_size > 1 else count

    def take_interval(self) -> tuple[float, int]:
        """Nats and targets since the last call."""
        nats, targets = self.total(self.interval_nats).item(), int(self.total(self.interval_targets))
        self.interval_nats.zero_()
        self.interval_targets.zero_()
        self.tokens_seen += targets
        return nats, targets

    def tokens_so_far(self) -> int:
        """Targets trained on, those since the last interval too."""
        return self.tokens_seen + int(self.total(self.interval_targets))

    # ---- validation: sums, divided once ----

    def on_validation_epoch_start(self) -> None:
        self.val_nats = torch.zeros((), device=self.device)
        self.val_targets = torch.zeros((), dtype=torch.long, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.val_nats += self.nats(batch)
        self.val_targets += (batch["targets"] != IGNORE).sum()

    def on_validation_epoch_end(self) -> None:
        nats, targets = float(self.total(self.val_nats)), int(self.total(self.val_targets))
        loss = nats / targets
        self.validation = {"loss": loss, "bpb": nats / math.log(2) / self.val_bytes, "perplexity": math.exp(min(loss, 700))}

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        nats, targets = self.total(self.interval_nats).item(), int(self.total(self.interval_targets))
        tokens, val_loss = self.tokens_so_far(), self.validation.get("loss")
        checkpoint["kit"] = kit_entry(self.config, self.tokenizer_state, tokens=tokens, val_loss=val_loss, data_sha256=self.data_sha256)
        checkpoint["interval"] = {"nats": nats, "targets": targets, "tokens_seen": self.tokens_seen, "validation": self.validation}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.resumed = checkpoint["interval"]

    def on_train_start(self) -> None:
        if self.resumed:
            self.tokens_seen, self.validation = self.resumed["tokens_seen"], self.resumed["validation"]
            if self.trainer.is_global_zero:  # the counts were those of all processes
                self.interval_nats.fill_(self.resumed["nats"])
                self.interval_targets.fill_(self.resumed["targets"])


class DurableCheckpointIO(CheckpointIO):
    """Lightning's way to the disk: whole files, checked when read, plain types only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_whole(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def fit(
    config: Config, data: PreparedData, hardware: Hardware, run: Run, start: Start | None
) -> tuple[L.Trainer, LitTransformer, cb.Samples, cb.Checkpoints]:
    """Train to max_steps, from the beginning or from `start`."""
    t = config.training
    L.seed_everything(t.seed, verbose=False)
    module = LitTransformer(config, data, fused=hardware.precision != "16-mixed")
    if hardware.accelerator == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, where a matmul is left in float32
    torch.utils.deterministic.fill_uninitialized_memory = False  # which would cost a pass over all that is allocated
    compiled_on_cpu = hardware.compile and hardware.accelerator == "cpu"  # its sums of embedding rows race, unless told not to
    torch.use_deterministic_algorithms(compiled_on_cpu, warn_only=True)
    if hardware.compile:
        module.training_nats = torch.compile(module.nats, dynamic=False)
    first_step = start.step if start else 0
    metrics = cb.Metrics(run, t, data.train.n_bytes / data.train.n_tokens, first_step)
    checkpoints, samples = cb.Checkpoints(run, t), cb.Samples(config, data)
    probes = [cb.Probes(config, data, metrics)] if t.probe_cases else []
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
        logger=cb.tensorboard(run, first_step),
        plugins=[DurableCheckpointIO()],
        use_distributed_sampler=False,
        callbacks=[cb.RandomState(t.seed), metrics, samples, *probes, checkpoints, cb.StopCleanly(checkpoints)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    pin = hardware.accelerator == "cuda"
    train_loader, val_loader = loaders(config, data, pin_memory=pin, rank=trainer.global_rank, world_size=trainer.world_size)
    trainer.fit(module, train_loader, val_loader, ckpt_path=start.path if start else None, weights_only=True)
    return trainer, module, samples, checkpoints


def quiet_libraries() -> None:
    """Keep Lightning's notices, which this program's own lines replace, off the screen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores are asked for


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small language model.")
    parser.add_argument("--config", default="config.yaml", help="a YAML file with what differs from the defaults (default %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="move this run's old outputs into old-<time>/ and begin anew")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, memory, tokens, steps and time; train nothing")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes a key, for example training.max_steps=20")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    begin = time.perf_counter()
    args = parse_args(argv)
    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    keep_freed_memory()
    quiet_libraries()
    hardware = choose_hardware(config.hardware, config.training.precision)
    check_matmul_sizes(hardware.accelerator, config.training.micro_batch_size * config.training.seq_len)
    check_recomputation(hardware.accelerator, config.model)
    data = prepare(config.data)
    config = with_steps(config.with_vocab_size(data.tokenizer.vocab_size), data)
    if hardware.accelerator == "mps":
        mps.check("mps", torch.float32 if hardware.precision == "32-true" else torch.bfloat16, config.model, config.training)
    hardware = with_compile(hardware, config.hardware.compile, seconds_outside_head(config, hardware))
    summary = Group(plan(config, data, hardware), facts(config, data))
    if args.dry_run:
        Console(highlight=False, soft_wrap=True, emoji=False).print(summary)
        return 0
    run = Run(config.run.name)
    with run.lock():
        start = None if args.fresh else find_start(run, config, data.sha256)
        Console(stderr=True, quiet=not is_first_process(), highlight=False, soft_wrap=True, emoji=False).print(summary)
        if start:
            print_note(f"continuing {start.path} from step {start.step}")
            if start.max_steps != (now := config.training.max_steps):
                print_note(f"training.max_steps {start.max_steps} -> {now}: the schedule is that of the new length from here on")
        elif is_first_process():  # --fresh, or logs that no checkpoint goes with
            for folder in run.move_aside():
                print_note(f"moved the old outputs to {folder}")
        trainer, module, samples, checkpoints = fit(config, data, hardware, run, start)
        if not trainer.is_global_zero:
            return 0
        trainer.logger.log_hyperparams(config.to_dict(), {f"hp/val_{name}": value for name, value in module.validation.items()})
        trainer.logger.finalize("success")
        print_verdict(config, data, run, module.validation, checkpoints.best, samples.latest, time.perf_counter() - begin)
    return 0


if __name__ == "__main__":
    run_main(main)
