"""Settings of a run: six frozen dataclasses, one for each section of config.yaml.

Every section has the defaults of config.yaml and checks its own values: it raises FieldError with
the key and the reason. The comments of the fields are those of config.yaml. `loading.py` reads and
writes the settings; sampling.py and the root's model.py define two of the sections.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model import ModelConfig
from pocketlm.config.sampling import SamplingConfig
from pocketlm.errors import FieldError, UserError
from pocketlm.limits import (
    MAX_DEVICES,
    MAX_EPOCHS,
    MAX_NAME_CHARACTERS,
    MAX_SHUFFLE_BUFFER,
    MAX_TIMEOUT,
    MAX_WORKERS,
    TRAINING_SIZES,
)

TENSORBOARD_RUNS = ("train", "validation")  # folders of event files in a run's log folder
# ends of the names of files in a run's folders
OUTPUTS = (".ckpt", ".csv", ".png", ".txt", ".json", ".jsonl", ".damaged", ".holder", ".")


@dataclass(frozen=True)
class RunConfig:
    """Name of the run, which decides where its files are written."""

    # outputs go to checkpoints/<name> and logs/<name>; empty: directly to checkpoints and logs
    name: str = ""

    def __post_init__(self) -> None:
        characters_fit = all(c.isascii() and (c.isalnum() or c in "._-") for c in self.name)
        if not characters_fit or self.name.startswith((".", "old-")):
            raise FieldError(
                "name",
                f"{self.name!r} is not a valid folder name; use letters, digits, '.', '_' and '-', "
                "and do not begin it with '.' or 'old-'",
            )
        if len(self.name) > MAX_NAME_CHARACTERS:
            raise FieldError("name", f"is longer than {MAX_NAME_CHARACTERS} characters")
        if self.name.lower() in TENSORBOARD_RUNS:  # some file systems ignore the case
            raise FieldError(
                "name",
                f"{self.name!r} is the name of a folder of TensorBoard files; use another name",
            )
        if self.name.lower().startswith("events.out.") or self.name.lower().endswith(OUTPUTS):
            raise FieldError(
                "name",
                f"{self.name!r} could be an output file of the unnamed run, whose folder is the "
                f"same; do not begin it with events.out. or end it in {', '.join(OUTPUTS)}",
            )


@dataclass(frozen=True)
class SourceConfig:
    """Location and format of the documents."""

    # named corpus: wiki, shakespeare, names, korean_names, dialogue, sotu; or a Hugging Face
    # dataset, OWNER/NAME
    source: str = "wiki"
    # file, folder or glob pattern: txt, jsonl, csv, parquet (.gz and .zst too), or token .bin;
    # replaces source
    path: str | None = None
    # file or folder that replaces source if it exists: train.txt in the randygpt presets
    optional_path: str | None = None
    # file, folder or glob pattern of held-out documents; None: val_share of the training text
    val_path: str | None = None
    text_field: str = "text"  # field of jsonl, csv, parquet and Hugging Face rows with the document
    # between documents of a text file: line, blank_line, or a string; None: a file is one document
    separator: str | None = None
    # bytes that are not UTF-8: strict refuses them, replace reads U+FFFD
    errors: Literal["strict", "replace"] = "strict"
    config_name: str | None = None  # Hugging Face: configuration, also called subset
    split: str = "train"  # Hugging Face: split to train on
    # Hugging Face: split to hold out; None: val_share of the training text
    val_split: str | None = None
    revision: str | None = None  # Hugging Face: commit, tag or branch

    def __post_init__(self) -> None:
        for name in ("path", "optional_path", "val_path", "config_name", "val_split", "revision"):
            if getattr(self, name) == "":
                raise FieldError(name, "is empty; leave it out, or set it to null for none")
        for name in ("path", "optional_path", "val_path"):
            normalize_path(self, name)
        if self.separator == "":
            raise FieldError(
                "separator",
                "is empty; it is line, blank_line, a string, or null for one document per file",
            )
        if self.val_split == self.split:
            raise FieldError(
                "val_split",
                f"{self.val_split!r} is the split to train on; name another, or leave it null",
            )
        if self.val_path is not None and self.val_path == self.path:
            raise FieldError(
                "val_path",
                f"{self.val_path!r} is the path to train on; name another, or leave it null",
            )


@dataclass(frozen=True)
class MixtureConfig(SourceConfig):
    """One source of a mixture."""

    weight: float = 1.0  # share of the rows, relative to the other sources' weights

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "weight")


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Documents, tokenizer and rows."""

    # several sources at once: a list of the keys above, each with its weight; replaces the keys
    # above
    mixture: tuple[MixtureConfig, ...] = ()
    # byte, seen-bytes, char, char:SIZE, bpe:SIZE, gpt2, gpt2:SIZE, a tokenizer.json, or a Hugging
    # Face folder or name
    tokenizer: str = "gpt2:12288"
    bos: bool | None = None  # begin-of-document token: true, false; None: if the tokenizer has one
    eos: bool | None = None  # end-of-document token: true, false; None: if the tokenizer has one
    # share of the documents to hold out for validation; of a single document, its end
    val_share: float = 0.05
    # packed: rows are cut from one stream of tokens; padded: a row is one document
    packing: Literal["packed", "padded"] = "packed"
    document_mask: bool = True  # tokens attend only within their own document
    # tokenise during training and store only the first documents' tokens: for text that does not
    # fit on the disk twice
    streaming: bool = False
    shuffle_buffer: int = 1000  # rows that streaming shuffles at a time, in each worker
    cache_dir: str = "data"  # folder for downloaded corpora and token shards

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokenizer", "cache_dir"):
            if not getattr(self, name):
                raise FieldError(name, "is empty; leave it out for the default")
        normalize_path(self, "cache_dir")
        # ./gpt2 is a folder and gpt2 is not, so that the rest of a tokenizer's path stays as it is
        object.__setattr__(self, "tokenizer", os.path.expanduser(self.tokenizer))
        if not 0 < self.val_share < 1:
            raise FieldError(
                "val_share", f"is {self.val_share}; it is a share between 0 and 1, for example 0.05"
            )
        require_between(1, MAX_SHUFFLE_BUFFER, self, "shuffle_buffer")
        if self.mixture and self.path:
            raise FieldError("path", f"{self.path!r} and mixture are both set; set one to null")
        if self.mixture and self.streaming:
            raise FieldError("streaming", "reads a single source; remove streaming or mixture")

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the mixture, or the single source."""
        return self.mixture or (self,)


# of `max_steps: auto`, by precision
AUTO_STEPS = {"32-true": 1_200, "bf16-mixed": 2_200, "16-mixed": 2_200}


LR_KEYS = ("matrix_lr", "embed_lr", "head_lr", "vector_lr")  # see `lr_key` of pocketlm/optim.py
DEFAULT_ROWS = 8  # in a forward pass; `micro_batch_size: auto` counts the rows of a step in them


@dataclass(frozen=True)
class TrainingConfig:
    """Batches, length of the run, optimizer and checkpoints."""

    seq_len: int = 256  # tokens in a row
    # rows in a forward pass; auto: as many of the 8 x grad_accum_steps rows of a step as fit in
    # memory
    micro_batch_size: int | Literal["auto"] = 8
    # forward passes in an optimizer step, on one device; several share the micro_batch_size x
    # grad_accum_steps rows of a step
    grad_accum_steps: int = 1
    # checkpoint whose model and tokenizer a new run begins with; None: random weights
    init_from: str | None = None
    # optimizer steps; auto: what the default model does in less than six minutes on two cores,
    # 1,200 in float32 and 2,200 in bfloat16 or float16
    max_steps: int | Literal["auto"] = "auto"
    # passes over the training rows, for example 0.5 or 3; replaces max_steps
    max_epochs: float | None = None
    # muon: Muon for the blocks' matrices, AdamW for the rest; adamw; sgd
    optimizer: Literal["adamw", "muon", "sgd"] = "muon"
    lr: float = 6e-3  # peak learning rate
    matrix_lr: float | None = None  # peak learning rate of the blocks' matrices; None: lr
    embed_lr: float | None = None  # peak learning rate of the embeddings; None: lr
    head_lr: float | None = None  # peak learning rate of an output head of its own; None: lr
    vector_lr: float | None = None  # peak learning rate of norm gains and biases; None: lr
    min_lr_ratio: float = 0.0  # final learning rate as a share of the peak
    # learning rate from the peak to the end: linear, cosine, constant; wsd: constant, then linear
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "linear"
    decay_share: float = 0.4  # wsd: share of the steps in which the learning rate falls
    warmup_steps: int = 30  # optimizer steps in which the learning rate rises from 0 to the peak
    # of matrices, per step, as a share of the learning rate; none on norm gains
    weight_decay: float = 0.5
    # AdamW: decay per step of its two moments; SGD: the first is the momentum
    betas: tuple[float, float] = (0.9, 0.998)
    muon_momentum: float = 0.95  # Muon: decay per step of its momentum
    eps: float = 1e-8  # AdamW: added to the root of the second moment
    # decay per step of a moving average of the weights, which validations and checkpoints then use;
    # 0: no average
    ema_decay: float = 0.0
    # share of the steps without model.dropout at the beginning (late dropout: Liu et al. 2023,
    # arXiv 2303.01500)
    dropout_from: float = 0.0
    grad_clip: float = 1.0  # maximum global gradient norm; 0: no clipping
    loss_chunk: int = 1024  # tokens whose logits are in memory at a time; 0: all
    # auto, 32-true, bf16-mixed, 16-mixed; auto prints its choice and why
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    # a gradient that is not finite: stop ends the run; skip leaves the step out, ten in a row at
    # most, and waits for the device in every step
    on_nonfinite: Literal["stop", "skip"] = "stop"
    seed: int = 42  # random seed of the weights, the data order and dropout
    log_every_steps: int = 10  # optimizer steps between logged points
    # optimizer steps between validations; one always follows the last step
    val_every_steps: int = 200
    # validations in a row without a new lowest loss that end the run before max_steps; 0: none do
    patience: int = 0
    # probe suites to score at each validation, for example [cases/wiki_basics.yaml]
    probe_cases: tuple[str, ...] = ()
    save_every_steps: int = 100  # optimizer steps between checkpoints
    keep_checkpoints: int = 3  # numbered checkpoints to keep, newest first; 0: all

    def __post_init__(self) -> None:
        for name, largest in TRAINING_SIZES.items():
            if getattr(self, name) != "auto":
                require_between(1, largest, self, name)
        for name in (
            "min_lr_ratio",
            "warmup_steps",
            "weight_decay",
            "grad_clip",
            "loss_chunk",
            "keep_checkpoints",
            "patience",
            "seed",
        ):
            value = getattr(self, name)
            if not 0 <= value < 2**32:
                raise FieldError(name, f"is {value}; it must be 0 or more, and below 2^32")
        own_rates = [name for name in LR_KEYS if getattr(self, name) is not None]
        require_positive(self, "lr", "eps", *own_rates)
        for name in ("decay_share", "ema_decay", "muon_momentum", "dropout_from"):
            if not 0 <= getattr(self, name) < 1:
                raise FieldError(name, f"is {getattr(self, name)}; it must be from 0 to below 1")
        object.__setattr__(self, "probe_cases", tuple(map(os.path.expanduser, self.probe_cases)))
        if self.max_epochs is not None and not 0 < self.max_epochs <= MAX_EPOCHS:
            raise FieldError(
                "max_epochs",
                f"is {self.max_epochs}; it must be above 0 and at most {MAX_EPOCHS:,}, or null",
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise FieldError("betas", f"are {list(self.betas)}; each must be from 0 to below 1")

    @property
    def learning_rates(self) -> dict[str, float]:
        """The peak learning rate, and those that are set for some of the parameters."""
        own = {name: getattr(self, name) for name in LR_KEYS}
        return {"lr": self.lr} | {name: lr for name, lr in own.items() if lr is not None}

    @property
    def steps(self) -> int:
        """Number of optimizer steps, after `with_auto_steps` or `with_max_steps`."""
        assert isinstance(self.max_steps, int)
        return self.max_steps

    @property
    def micro_batch(self) -> int:
        """Rows in a forward pass, after `with_micro_batch`."""
        assert isinstance(self.micro_batch_size, int)
        return self.micro_batch_size

    def drops_out(self, step: int) -> bool:
        """Return whether dropout has begun at optimizer step `step` (the first is 0)."""
        return step >= round(self.dropout_from * self.steps)

    def has_ended(self, step: int, waited: int) -> bool:
        """Return whether the run ends at `step`, after `waited` validations without a new best."""
        return step >= self.steps or 0 < self.patience <= waited

    def validates(self, step: int) -> bool:
        """Return whether a validation follows optimizer step `step`."""
        return step % self.val_every_steps == 0 or step == self.steps


@dataclass(frozen=True)
class HardwareConfig:
    """Devices and how to use them."""

    # auto: mps, else cuda, else cpu; or cpu, mps, cuda; gpu means cuda
    accelerator: Literal["auto", "cpu", "mps", "cuda", "gpu"] = "auto"
    devices: int = 1  # number of devices, on each machine
    num_nodes: int = 1  # number of machines
    # with several devices: ddp: each has the whole model; fsdp: each has a part of every parameter,
    # gradient and optimizer state; auto: ddp
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    timeout: int = 1800  # seconds that a device waits for the others before the run ends
    num_workers: int = 0  # processes that prepare batches; 0: the training process itself
    # torch.compile: auto, on, off; auto: on CUDA, and on a CPU in a run of many minutes whose
    # blocks training.c does not compute
    compile: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        for name in ("devices", "num_nodes"):
            require_between(1, MAX_DEVICES, self, name)
        require_between(1, MAX_TIMEOUT, self, "timeout")
        require_between(0, MAX_WORKERS, self, "num_workers")

    @property
    def world_size(self) -> int:
        """Number of devices on all machines: each has a process, called a rank."""
        return self.devices * self.num_nodes


def normalize_path(config: object, name: str) -> None:
    """Write a path of a frozen dataclass in its one spelling.

    `~` is expanded, and `./`, `//` and a last `/` are left out.
    """
    value = getattr(config, name)
    if value is not None:
        object.__setattr__(config, name, str(Path(os.path.expanduser(value))))


def require_between(smallest: int, largest: int, config: object, name: str) -> None:
    """Raise FieldError if a field is out of range."""
    value = getattr(config, name)
    if not smallest <= value <= largest:
        raise FieldError(name, f"is {value}; it must be from {smallest} to {largest:,}")


def require_positive(config: object, *names: str) -> None:
    """Raise FieldError for the first of these fields that is not above 0 and finite."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise FieldError(name, f"is {value}; it must be above 0 and finite")


SECTIONS = {
    "run": RunConfig,
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "sampling": SamplingConfig,
    "hardware": HardwareConfig,
}


@dataclass(frozen=True)
class Config:
    """All settings of a run. Raises ValueError if two sections do not fit together."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        seq_len = self.training.seq_len
        if self.model.max_seq_len is None:
            model = dataclasses.replace(self.model, max_seq_len=seq_len)
            object.__setattr__(self, "model", model)  # the dataclass is frozen
        max_seq_len = self.model.max_seq_len
        assert max_seq_len is not None
        if max_seq_len < seq_len:
            raise ValueError(
                f"training.seq_len {seq_len} does not fit model.max_seq_len {max_seq_len}"
            )

    def with_vocab_size(self, vocab_size: int) -> "Config":
        """Return this config for a tokenizer with `vocab_size` tokens.

        A larger model.vocab_size is kept. Raises UserError if it is smaller.
        """
        configured = self.model.vocab_size
        if configured is not None and configured < vocab_size:
            raise UserError(
                f"model.vocab_size is {configured}, but the vocabulary of the tokenizer "
                f"{self.data.tokenizer!r} has {vocab_size} tokens; leave it null"
            )
        model = dataclasses.replace(self.model, vocab_size=configured or vocab_size)
        return dataclasses.replace(self, model=model)

    def with_auto_steps(self, precision: str) -> "Config":
        """Return this config with the number of steps that `auto` means in a precision."""
        if self.training.max_steps != "auto":
            return self
        return self.with_max_steps(AUTO_STEPS[precision])

    def with_max_steps(self, max_steps: int) -> "Config":
        """Return this config for a run of `max_steps` optimizer steps."""
        training = dataclasses.replace(self.training, max_steps=max_steps)
        return dataclasses.replace(self, training=training)

    def with_micro_batch(self, rows: int) -> "Config":
        """Return this config with the `auto` micro-batch as `rows`, and as many rows in a step."""
        accumulation = DEFAULT_ROWS * self.training.grad_accum_steps // rows
        training = dataclasses.replace(
            self.training, micro_batch_size=rows, grad_accum_steps=accumulation
        )
        return dataclasses.replace(self, training=training)

    def on_each_device(self) -> "Config":
        """Return this config for one device and its share of the rows of a step.

        The micro-batch is the largest that divides the share and is not above the configured one.
        Raises UserError if the devices cannot share the rows equally.

        >>> training = TrainingConfig(micro_batch_size=8, grad_accum_steps=3)
        >>> share = Config(training=training, hardware=HardwareConfig(devices=4)).on_each_device()
        >>> share.training.micro_batch_size, share.training.grad_accum_steps
        (6, 1)
        """
        training, count = self.training, self.hardware.world_size
        if count == 1:
            return self
        rows, rest = divmod(training.micro_batch * training.grad_accum_steps, count)
        if rest:
            raise UserError(
                f"a step has {training.micro_batch * training.grad_accum_steps} rows "
                f"(training.micro_batch_size x training.grad_accum_steps), which {count} devices "
                "(hardware.devices x hardware.num_nodes) cannot share equally; change one of them"
            )
        micro_batch = max(n for n in range(1, training.micro_batch + 1) if rows % n == 0)
        share = dataclasses.replace(
            training, micro_batch_size=micro_batch, grad_accum_steps=rows // micro_batch
        )
        hardware = dataclasses.replace(self.hardware, devices=1, num_nodes=1)
        return dataclasses.replace(self, training=share, hardware=hardware)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the settings as nested dicts, lists, numbers and strings, for checkpoints."""
        sections = dataclasses.asdict(self)
        return {name: to_plain(section) for name, section in sections.items()}


def to_plain(value: Any) -> Any:
    """Return `value` with lists in place of tuples, at every depth."""
    if isinstance(value, dict):
        return {key: to_plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [to_plain(each) for each in value]
    return value
