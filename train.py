"""Train a model.

    python train.py --config config.yaml                          # the default run, on real text
    python train.py --config config.yaml training.max_steps=20    # any key, changed for this run
    python train.py --config presets/shakespeare_char_cpu.yaml --dry-run

The same command again continues an interrupted run from its last checkpoint. Outputs go to checkpoints/ and logs/.
"""

import argparse
import math
import time
from typing import Any

import lightning as L
import torch
from rich.console import Console, Group
from torch import Tensor

from model import Transformer
from pocketlm.checkpoint.format import checkpoint_metadata
from pocketlm.checkpoint.runs import Run, find_start, is_first_process, print_note
from pocketlm.config.loading import load_config, to_yaml
from pocketlm.config.sections import Config
from pocketlm.data.loaders import validated_bytes, with_steps
from pocketlm.data.prepare import PreparedData, prepare
from pocketlm.errors import UserError, run_main
from pocketlm.hardware.devices import (
    check_matmul_sizes,
    check_recomputation,
    choose_hardware,
    with_compile,
)
from pocketlm.hardware.measure import keep_freed_memory
from pocketlm.hardware.mps_check import check_mps
from pocketlm.model.loss import IGNORE_INDEX, chunked_cross_entropy, cross_entropy
from pocketlm.optim import build_optimizer, clip_gradients, lr_at_step
from pocketlm.training.loop import fit, quiet_libraries
from pocketlm.training.metrics import non_finite
from pocketlm.training.plan import plan, run_header, seconds_outside_head
from pocketlm.training.verdict import print_verdict


class LitTransformer(L.LightningModule):
    """The Transformer as Lightning trains it: loss, optimizer, schedule, clip, and the counts behind the metrics."""

    def __init__(self, config: Config, data: PreparedData, fused: bool = True):
        super().__init__()
        self.save_hyperparameters(config.to_dict())
        self.config, self.tokenizer_state, self.fused = config, data.tokenizer.state(), fused
        self.val_bytes, self.data_sha256 = validated_bytes(data, config), data.sha256
        self.model = Transformer(config.model)
        self.train_loss_fn = (
            self.loss_sum
        )  # or what it compiles to; validation and generation stay plain
        self.tokens_seen = 0  # targets trained on, up to the last interval
        self.validation: dict[str, float] = {}
        self.resumed: dict[str, Any] = {}
        self.grad_norm = torch.zeros(())
        self.begin_counts()

    def on_fit_start(self) -> None:
        self.begin_counts()

    def begin_counts(self) -> None:
        """Zero counters, on the device that the batches will be on."""
        self.interval_loss_sum = torch.zeros((), device=self.device)
        self.interval_targets = torch.zeros((), dtype=torch.long, device=self.device)
        self.step_targets = torch.zeros((), dtype=torch.long, device=self.device)

    # ---- one step ----

    def loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        """Summed cross-entropy of the batch's targets."""
        hidden = self.model.hidden(batch["input_ids"], doc_ids=batch.get("doc_ids"))
        if self.config.training.loss_chunk:
            return chunked_cross_entropy(
                hidden, self.model.head_weight, batch["targets"], self.config.training.loss_chunk
            )
        return cross_entropy(self.model.logits(hidden), batch["targets"])

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        nats, targets = self.train_loss_fn(batch), batch["targets"]
        count = (targets != IGNORE_INDEX).sum()
        self.interval_loss_sum += nats.detach()
        self.interval_targets += count
        self.step_targets += count
        return (
            nats / targets.numel()
        )  # configure_gradient_clipping corrects this where targets are missing

    def configure_optimizers(self) -> torch.optim.Optimizer:
        t = self.config.training
        return build_optimizer(
            self.model,
            optimizer=t.optimizer,
            lr=t.lr,
            weight_decay=t.weight_decay,
            betas=t.betas,
            eps=t.eps,
            fused=self.fused,
        )

    def current_lr(self) -> float:
        """Peak rate times the schedule, for the step in hand; a pure function of the step, so nothing of it is saved."""
        t = self.config.training
        return t.lr * lr_at_step(
            self.trainer.global_step,
            max_steps=t.max_steps,
            warmup_steps=t.warmup_steps,
            min_lr_ratio=t.min_lr_ratio,
            schedule=t.schedule,
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.current_lr()

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any
    ) -> None:
        """Make the step's gradient the mean over its targets, however they fell into batches, and clip its norm."""
        t = self.config.training
        targets = self.total(self.step_targets)
        full = t.grad_accum_steps * t.micro_batch_size * t.seq_len * self.trainer.world_size
        self.grad_norm = clip_gradients(self.model.parameters(), t.grad_clip, full / targets)
        self.step_targets.zero_()
        if self.device.type == "cpu" and not torch.isfinite(
            self.grad_norm
        ):  # elsewhere a look would wait for the device
            raise UserError(non_finite("the gradient", self.trainer.global_step + 1))

    def total(self, count: Tensor) -> Tensor:
        """The sum of a count over all processes."""
        return (
            self.trainer.strategy.reduce(count.clone(), reduce_op="sum")
            if self.trainer.world_size > 1
            else count
        )

    def take_interval(self) -> tuple[float, int]:
        """Nats and targets since the last call."""
        nats, targets = (
            self.total(self.interval_loss_sum).item(),
            int(self.total(self.interval_targets)),
        )
        self.interval_loss_sum.zero_()
        self.interval_targets.zero_()
        self.tokens_seen += targets
        return nats, targets

    def tokens_so_far(self) -> int:
        """Targets trained on, those since the last interval too."""
        return self.tokens_seen + int(self.total(self.interval_targets))

    # ---- validation: sums, divided once ----

    def on_validation_epoch_start(self) -> None:
        self.val_loss_sum = torch.zeros((), device=self.device)
        self.val_targets = torch.zeros((), dtype=torch.long, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.val_loss_sum += self.loss_sum(batch)
        self.val_targets += (batch["targets"] != IGNORE_INDEX).sum()

    def on_validation_epoch_end(self) -> None:
        nats, targets = float(self.total(self.val_loss_sum)), int(self.total(self.val_targets))
        loss = nats / targets
        self.validation = {
            "loss": loss,
            "bpb": nats / math.log(2) / self.val_bytes,
            "perplexity": math.exp(min(loss, 700)),
        }

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        nats, targets = (
            self.total(self.interval_loss_sum).item(),
            int(self.total(self.interval_targets)),
        )
        tokens, val_loss = self.tokens_so_far(), self.validation.get("loss")
        checkpoint["kit"] = checkpoint_metadata(
            self.config,
            self.tokenizer_state,
            tokens=tokens,
            val_loss=val_loss,
            data_sha256=self.data_sha256,
        )
        checkpoint["interval"] = {
            "nats": nats,
            "targets": targets,
            "tokens_seen": self.tokens_seen,
            "validation": self.validation,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.resumed = checkpoint["interval"]

    def on_train_start(self) -> None:
        if self.resumed:
            self.tokens_seen, self.validation = (
                self.resumed["tokens_seen"],
                self.resumed["validation"],
            )
            if self.trainer.is_global_zero:  # the counts were those of all processes
                self.interval_loss_sum.fill_(self.resumed["nats"])
                self.interval_targets.fill_(self.resumed["targets"])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small language model.")
    parser.add_argument(
        "--config",
        default="config.yaml",
        help="a YAML file with what differs from the defaults (default %(default)s)",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="move this run's old outputs into old-<time>/ and begin anew",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, memory, tokens, steps and time; train nothing",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config as YAML and stop"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="changes a key, for example training.max_steps=20",
    )
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
    check_matmul_sizes(
        hardware.accelerator, config.training.micro_batch_size * config.training.seq_len
    )
    check_recomputation(hardware.accelerator, config.model)
    data = prepare(config.data)
    config = with_steps(config.with_vocab_size(data.tokenizer.vocab_size), data)
    compute = torch.float32 if hardware.precision == "32-true" else torch.bfloat16
    check_mps(hardware.accelerator, compute, config.model, config.training)
    hardware = with_compile(
        hardware, config.hardware.compile, seconds_outside_head(config, hardware)
    )
    summary = Group(plan(config, data, hardware), run_header(config, data))
    if args.dry_run:
        Console(highlight=False, soft_wrap=True, emoji=False).print(summary)
        return 0
    run = Run(config.run.name)
    with run.lock():
        start = None if args.fresh else find_start(run, config, data.sha256)
        Console(
            stderr=True, quiet=not is_first_process(), highlight=False, soft_wrap=True, emoji=False
        ).print(summary)
        if start:
            print_note(f"continuing {start.path} from step {start.step}")
            if start.max_steps != (now := config.training.max_steps):
                print_note(
                    f"training.max_steps {start.max_steps} -> {now}: the schedule is that of the new length from here on"
                )
        elif is_first_process():  # --fresh, or logs that no checkpoint goes with
            for folder in run.move_aside():
                print_note(f"moved the old outputs to {folder}")
        L.seed_everything(config.training.seed, verbose=False)
        module = LitTransformer(config, data, fused=hardware.precision != "16-mixed")
        trainer, samples, checkpoints = fit(module, config, data, hardware, run, start)
        if not trainer.is_global_zero:
            return 0
        trainer.logger.log_hyperparams(
            config.to_dict(), {f"hp/val_{name}": value for name, value in module.validation.items()}
        )
        trainer.logger.finalize("success")
        print_verdict(
            config,
            data,
            run,
            module.validation,
            checkpoints.best,
            samples.latest,
            time.perf_counter() - begin,
        )
    return 0


if __name__ == "__main__":
    run_main(main)
