"""Train a model.

    python train.py --config config.yaml                          # the default run, on real text
    python train.py --config config.yaml training.max_steps=20    # with one key changed
    python train.py --config presets/shakespeare_char_cpu.yaml --dry-run

The same command again resumes an interrupted run from its last checkpoint. Outputs are written to
checkpoints/ and logs/. This file holds the Lightning module and the command; pocketlm/training/
holds the callbacks, the plan printed before a run and the verdict printed after it.
"""

from pocketlm.startup import begin_run, fast_imports

if __name__ == "__main__":
    begin_run()  # before the other imports, which take seconds

with fast_imports():
    import argparse
    import math
    import time
    from contextlib import ExitStack
    from dataclasses import replace
    from typing import Any

    import lightning as L
    import torch
    from rich.console import Console, Group
    from rich.table import Table
    from torch import Tensor

    from model import Transformer
    from pocketlm.checkpoint.changes import (
        Previous,
        adopt_choices,
        adopt_threads,
        adopt_weights,
        adopted_reasons,
        check_change,
        describe_hardware,
    )
    from pocketlm.checkpoint.initial import load_initial_weights, with_initial_model
    from pocketlm.checkpoint.resume import ResumePoint, find_resume_point, read_previous
    from pocketlm.checkpoint.runs import Run
    from pocketlm.config.loading import load_config, to_yaml
    from pocketlm.config.sections import Config
    from pocketlm.data.loaders import resolve_max_steps, validation_target_bytes
    from pocketlm.data.prepare import PreparedData, prepare
    from pocketlm.distributed.agreement import (
        check_agreement,
        decided_by_first,
        first_process_speaks,
    )
    from pocketlm.distributed.launch import check_launch, check_machines, connected
    from pocketlm.distributed.sharding import (
        ShardedStrategy,
        UndrawnTransformer,
        drop_whole_parameters,
    )
    from pocketlm.errors import UserError, run_main
    from pocketlm.hardware.devices import (
        Hardware,
        check_matmul_sizes,
        check_recomputation,
        choose_hardware,
        with_compile,
    )
    from pocketlm.hardware.disk import require_room
    from pocketlm.hardware.measure import keep_freed_memory
    from pocketlm.hardware.memory import check_memory, choose_micro_batch, memory_errors
    from pocketlm.hardware.mps_check import check_mps
    from pocketlm.hardware.processes import print_note
    from pocketlm.model.loss import IGNORE_INDEX, batch_loss
    from pocketlm.optim import MuonAdamW, WeightAverage, build_optimizer, clip_gradients, lr_at_step
    from pocketlm.training.loop import fit, make_trainer, quiet_libraries
    from pocketlm.training.module import TrainableModule, TrainingProgress
    from pocketlm.training.monitors import NonFiniteGuard
    from pocketlm.training.plan import (
        card_plan,
        checkpoint_sizes,
        compilable_seconds,
        plan,
        run_header,
        scaling_table,
        this_machine,
    )
    from pocketlm.training.signals import owned_signals
    from pocketlm.training.verdict import print_verdict


class LitTransformer(TrainableModule):
    """The Transformer as Lightning trains it: loss, optimizer, schedule, clipping, validation."""

    def __init__(
        self, config: Config, data: PreparedData, fused: bool = True, *, undrawn: bool = False
    ):
        super().__init__()
        self.save_hyperparameters(config.to_dict())
        self.config, self.fused = config, fused
        self.val_bytes = validation_target_bytes(config, data)
        self.model = (UndrawnTransformer if undrawn else Transformer)(config.model)
        self.progress = TrainingProgress()
        self.average = WeightAverage(config.training.ema_decay)
        self.train_loss_fn = self.loss_sum  # `fit` may compile it; validation stays eager
        self.step_targets = torch.zeros((), dtype=torch.long)
        self.non_finite = NonFiniteGuard(config, data.tokenizer)

    def on_fit_start(self) -> None:
        """Create the counters on the device of the batches."""
        self.progress.begin(self.device, self.total, self.trainer.is_global_zero)
        self.step_targets = torch.zeros((), dtype=torch.long, device=self.device)

    def on_train_start(self) -> None:
        self.average.restore(self.trainer.optimizers[0])

    def total(self, count: Tensor) -> Tensor:
        """Return the sum of a count over all processes."""
        if self.trainer.world_size == 1:
            return count
        total = self.trainer.strategy.reduce(count.clone(), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    # ---- one step ----

    def loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the summed cross-entropy of the batch's targets, in nats."""
        return batch_loss(self.model, batch, self.config.training.loss_chunk)

    def on_train_batch_start(self, *_: Any) -> None:
        begun = self.config.training.drops_out(self.trainer.global_step)
        probability = self.config.model.dropout if begun else 0.0
        if probability != self.model.dropout.p:
            self.model.set_dropout(probability)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Return the loss per position; `configure_gradient_clipping` makes it one per target."""
        loss_sum, targets = self.train_loss_fn(batch), batch["targets"]
        count = (targets != IGNORE_INDEX).sum()
        self.progress.add(loss_sum.detach(), count, batch["input_ids"])
        self.step_targets += count
        return loss_sum / targets.numel()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        t, divided = self.config.training, isinstance(self.trainer.strategy, ShardedStrategy)
        optimizer = build_optimizer(
            self.model,
            optimizer=t.optimizer,
            lr=t.learning_rates,
            weight_decay=t.weight_decay,
            betas=t.betas,
            eps=t.eps,
            fused=self.fused and not (divided and t.optimizer == "sgd"),  # torch has no such one
        )
        if isinstance(optimizer, MuonAdamW):
            optimizer.momentum = t.muon_momentum
            # rounded to bfloat16, what several devices add up in another order would drift apart
            optimizer.in_float32 = self.trainer.precision == "32-true"
        return optimizer

    def lr_factor(self) -> float:
        """Return the factor on the learning rates in the current step, by its number alone."""
        t = self.config.training
        return lr_at_step(
            self.trainer.global_step,
            max_steps=t.steps,
            warmup_steps=t.warmup_steps,
            min_lr_ratio=t.min_lr_ratio,
            schedule=t.schedule,
            decay_share=t.decay_share,
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        factor, rates = self.lr_factor(), self.config.training.learning_rates
        for group in optimizer.param_groups:
            group["lr"] = rates[group.get("lr_key", "lr")] * factor

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.trainer.global_step
        super().optimizer_step(*args, **kwargs)
        self.average.update(self.trainer.optimizers[0], step)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any
    ) -> None:
        """Make the gradient the mean over the step's targets in all batches; clip its norm."""
        t = self.config.training
        targets = self.total(self.step_targets)
        positions = t.grad_accum_steps * t.micro_batch * t.seq_len
        norm = clip_gradients(self.model.parameters(), t.grad_clip, positions / targets)
        self.progress.grad_norm = norm
        self.step_targets.zero_()
        self.progress.end_step(applied=self.non_finite.allows_step(self, norm))

    # ---- validation, of the average of the weights if there is one: sums, divided once ----

    def on_validation_start(self) -> None:
        self.average.place(self.trainer.optimizers[0], in_model=True)

    def on_validation_end(self) -> None:
        drop_whole_parameters(self.model)
        self.average.place(self.trainer.optimizers[0], in_model=False)

    def on_validation_epoch_start(self) -> None:
        self.val_loss_sum = torch.zeros((), device=self.device)
        self.val_targets = torch.zeros((), dtype=torch.long, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.val_loss_sum += self.loss_sum(batch)
        self.val_targets += (batch["targets"] != IGNORE_INDEX).sum()

    def on_validation_epoch_end(self) -> None:
        loss_sum, targets = float(self.total(self.val_loss_sum)), int(self.total(self.val_targets))
        loss = loss_sum / targets
        self.progress.validation = {
            "loss": loss,
            "bpb": loss_sum / math.log(2) / self.val_bytes,
            "perplexity": math.exp(min(loss, 700)),
        }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small language model.")
    parser.add_argument(
        "--config",
        default="config.yaml",
        help="YAML file with the keys that differ from the defaults (default: %(default)s)",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="move this run's old outputs to old-<time>/ and train from the beginning",
    )
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="section.key=value",
        help="resume with another value of a key that changes the weights, for example "
        "training.lr=1e-3; the run's history keeps it",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, memory, tokens, steps and time, and stop",
    )
    parser.add_argument(
        "--card",
        metavar="NAME",
        help="with --dry-run: plan for this GPU, such as H100, not for this machine; reads no data",
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="TOKENS",
        help="with --dry-run: tokens/s of one device, as bench.py train prints them "
        "(default: estimated)",
    )
    parser.add_argument(
        "--price", type=float, help="with --dry-run: price of an hour of one device (default: none)"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config as YAML and stop"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="config keys to change, for example training.max_steps=20",
    )
    return parser.parse_intermixed_args(argv)


def prepare_run(
    config: Config, previous: Previous | None, changes: frozenset[str]
) -> tuple[Config, PreparedData, Hardware]:
    """Return the data, the hardware, and the config with what the data decides.

    previous: the run to resume, whose choices are this one's. changes: the keys of `--change`.
    Raises UserError if the device, or the device in this precision, cannot train this config.
    """
    config = adopt_weights(config, previous) if previous else config
    chosen = adopt_choices(config, previous, changes) if previous else config
    check_launch(config.hardware)
    hardware = choose_hardware(chosen.hardware, chosen.training.precision)
    device, precision = hardware.accelerator, hardware.precision
    check_memory(config, device, precision)
    check_recomputation(device, config.model)
    data = prepare(config.data)
    config = config.with_vocab_size(data.tokenizer.vocab_size)
    if config.training.micro_batch_size == "auto":
        rows = previous.config.training.micro_batch if previous else None
        config = choose_micro_batch(config, device, precision, rows)
    check_memory(config, device, precision)
    training = config.on_each_device().training
    check_matmul_sizes(device, training.micro_batch * training.seq_len)
    config = resolve_max_steps(config, data, precision)
    compute = torch.float32 if precision == "32-true" else torch.bfloat16
    check_mps(device, compute, config.model, config.training)
    compile = chosen.hardware.compile
    seconds = compilable_seconds(config, hardware) if compile == "auto" else 0.0
    hardware = with_compile(hardware, compile, seconds)
    reasons = hardware.reasons | adopted_reasons(config, chosen)
    return config, data, replace(hardware, reasons=reasons)


def check_planning(args: argparse.Namespace) -> None:
    """Raise UserError for options of a dry run that have no meaning or a value that cannot be."""
    for name in ("card", "rate", "price"):
        value = getattr(args, name)
        if value is not None and not args.dry_run:
            raise UserError(f"--{name} is for planning; add --dry-run")
        if name != "card" and value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} is {value:g}; it must be above 0 and finite")


def print_plan(*parts: Group | Table) -> None:
    """Print the parts of a plan."""
    for part in parts:
        Console(highlight=False, soft_wrap=True, emoji=False).print(part)


def print_start(run: Run, start: ResumePoint | None, config: Config) -> None:
    """Print whether the run begins or resumes; move the outputs of an earlier run aside."""
    if start:
        print_note(f"resuming from {start.path} at step {start.step}")
        if start.verdict_only:
            print_note("the run has ended; what is missing is the verdict")
        if start.max_steps != config.training.steps:
            print_note(
                f"training.max_steps {start.max_steps} -> {config.training.steps}: from here on "
                "the schedule is the one of the new length"
            )
    if config.training.warmup_steps > config.training.steps:
        print_note(
            f"training.warmup_steps is {config.training.warmup_steps} and the run has "
            f"{config.training.steps} steps: the learning rate never reaches training.lr"
        )
    if config.training.init_from and not start:
        print_note(f"the model and its tokenizer are those of {config.training.init_from}")
    if not start:  # --fresh, or logs without a checkpoint
        for folder in run.move_aside():
            print_note(f"moved the old outputs to {folder}")


def new_module(
    config: Config, data: PreparedData, hardware: Hardware, start: ResumePoint | None
) -> LitTransformer:
    """Return the module with the weights that the run begins with.

    FSDP draws them when it divides the model, so that no process needs the room for all of them.
    """
    initial = config.training.init_from if not start else None
    finished = start is not None and start.verdict_only
    undrawn = hardware.strategy == "fsdp" and not (initial or finished)
    module = LitTransformer(config, data, hardware.precision != "16-mixed", undrawn=undrawn)
    if initial:
        load_initial_weights(module.model, initial)
    return module


def main(argv: list[str] | None = None) -> int:
    begin = time.perf_counter()
    args = parse_args(argv)
    with owned_signals(), first_process_speaks():
        config = with_initial_model(load_config(args.config, [*args.overrides, *args.change]))
        check_planning(args)
        if args.print_config:
            print(to_yaml(config), end="")
        elif args.card:
            print_plan(card_plan(config, args.card, args.rate, args.price))
        else:
            train(config, args, begin)
    return 0


def train(config: Config, args: argparse.Namespace, begin: float) -> None:
    """Print the plan and train, from the beginning or from the last checkpoint."""
    keep_freed_memory()
    quiet_libraries()
    run, changes = Run(config.run.name), check_change(args.change)
    if not args.dry_run:
        check_machines(config.hardware)
    previous = None if args.fresh else read_previous(run)
    config, data, hardware = prepare_run(config, previous, changes)
    if previous:
        adopt_threads(previous)
    summary = Group(plan(config, data, hardware), run_header(config, data))
    if args.dry_run:
        target = this_machine(config, hardware, args.rate)
        print_plan(summary, scaling_table(config, target, args.price))
        return
    with ExitStack() as until_the_end:
        if hardware.strategy != "single":
            trainer = make_trainer(config, hardware, [])
            until_the_end.enter_context(connected(trainer, config.hardware.timeout))
            flags = {"--fresh": args.fresh, "--change": sorted(changes)}
            check_agreement(config, hardware, {"the data": data.sha256, **flags})

        def begin_or_resume() -> ResumePoint | None:
            until_the_end.enter_context(run.lock())
            start = None
            if not args.fresh:
                resolved = describe_hardware(hardware, config.hardware.world_size)
                start = find_resume_point(run, config, data.sha256, resolved, changes)
            stderr = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
            stderr.print(summary)
            print_start(run, start, config)
            sizes = checkpoint_sizes(config, data.tokenizer.state())
            require_room(run.checkpoints, sizes, "the checkpoints of this run")
            run.mark_running()
            return start

        start = decided_by_first(begin_or_resume)
        L.seed_everything(config.training.seed, verbose=False)
        with memory_errors(config):
            module = new_module(config, data, hardware, start)
            trained = fit(module, config, data, hardware, run, start)
        if trained.trainer.is_global_zero:
            picture = print_verdict(config, data, run, trained, time.perf_counter() - begin)
            trained.tensorboard.add_loss_picture(picture, trained.step)
            run.mark_finished()


if __name__ == "__main__":
    run_main(main)
