"""The settings of a run: six frozen sections with the defaults of config.yaml, each checked as far as it can be by itself.

Where sizes do not fit, ValueError says so in a sentence that begins with the key. `config_file.py` reads and writes them.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from model import ModelConfig
from pocketlm.config.sampling import SamplingConfig
from pocketlm.errors import FieldError, UserError


@dataclass(frozen=True)
class RunConfig:
    name: str = ""  # outputs go to checkpoints/<name> and logs/<name>; empty: straight into checkpoints and logs

    def __post_init__(self) -> None:
        if self.name.startswith((".", "old-")) or not all(
            c.isascii() and (c.isalnum() or c in "._-") for c in self.name
        ):
            raise FieldError(
                "name",
                f"{self.name!r} is a folder's name: letters, digits, '.', '_', '-', not beginning '.' or 'old-'",
            )


@dataclass(frozen=True)
class SourceConfig:
    """Where documents come from."""

    source: str = "wiki"  # a corpus by name: wiki, shakespeare, names, korean_names, dialogue, sotu; or a Hugging Face dataset, OWNER/NAME
    path: str | None = None  # a file, a folder or a pattern; takes the place of `source`
    optional_path: str | None = (
        None  # a file or folder that is read in place of `source` where it is there
    )
    val_path: str | None = (
        None  # the same, of which all is validation; None: val_share of the training text
    )
    text_field: str = (
        "text"  # the field of jsonl, csv, parquet and Hugging Face rows that holds a document
    )
    separator: str | None = (
        None  # between the documents of a text file: line, blank_line, or a text; None: a file is one
    )
    errors: Literal["strict", "replace"] = (
        "strict"  # of bytes that are not UTF-8: refuse, or put U+FFFD there
    )
    config_name: str | None = None  # Hugging Face: configuration, also called subset
    split: str = "train"  # Hugging Face: split
    val_split: str | None = (
        None  # Hugging Face: split of which all is validation; None: val_share of the training text
    )
    revision: str | None = None  # Hugging Face: commit, tag or branch

    def __post_init__(self) -> None:
        if self.separator == "":
            raise FieldError(
                "separator",
                "is empty; it is line, blank_line, a text, or null for one document a file",
            )
        if self.val_split == self.split:
            raise FieldError(
                "val_split",
                f"{self.val_split!r} is the split to train on; name another, or leave it null",
            )
        if self.val_path and self.val_path == self.path:
            raise FieldError(
                "val_path",
                f"{self.val_path!r} is the path to train on; name another, or leave it null",
            )


@dataclass(frozen=True)
class MixtureConfig(SourceConfig):
    """One of several sources."""

    weight: float = 1.0  # its share of the rows, beside the other weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.weight < math.inf:
            raise FieldError("weight", f"is {self.weight}; it must be above 0 and finite")


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    mixture: tuple[
        MixtureConfig, ...
    ] = ()  # several sources at once; takes the place of the keys above
    tokenizer: str = "gpt2"  # byte, seen-bytes, char, char:SIZE, bpe:SIZE, gpt2, a tokenizer.json, a Hugging Face folder or name
    bos: bool | None = None  # a begin token before each document; None: where the tokenizer has one
    eos: bool | None = None  # an end token behind each document; None: where the tokenizer has one
    val_share: float = (
        0.05  # share of the documents (of a single document's end) kept for validation
    )
    packing: Literal["packed", "padded"] = (
        "packed"  # rows cut from one stream of tokens, or a document a row
    )
    document_mask: bool = True  # tokens attend within their own document only
    streaming: bool = False  # tokenise while training, and keep no tokens on the disk but those of the first documents
    shuffle_buffer: int = 1000  # rows that streaming shuffles at a time, in each worker
    cache_dir: str = "data"  # fetched corpora and token shards

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.val_share < 1:
            raise FieldError(
                "val_share", f"is {self.val_share}; it is a share between 0 and 1, for example 0.05"
            )
        if self.shuffle_buffer < 1:
            raise FieldError("shuffle_buffer", f"is {self.shuffle_buffer}; it must be 1 or more")
        if self.mixture and self.path:
            raise FieldError(
                "path",
                f"{self.path!r} and mixture are both given; set the one that is not meant to null",
            )
        if self.mixture and self.streaming:
            raise FieldError("streaming", "reads a single source; leave out streaming or mixture")

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """Where the documents come from: the parts of the mixture, or the one source."""
        return self.mixture or (self,)


@dataclass(frozen=True)
class TrainingConfig:
    seq_len: int = 256  # tokens in a row
    micro_batch_size: int = 8  # rows in one forward pass, on each device
    grad_accum_steps: int = 1  # forward passes in one optimizer step
    max_steps: int = 600  # optimizer steps
    max_epochs: float | None = None  # passes over the rows; takes the place of `max_steps`
    optimizer: Literal["adamw", "muon", "sgd"] = (
        "muon"  # muon: the blocks' matrices by Muon, the rest by AdamW
    )
    lr: float = 6e-3  # peak learning rate
    min_lr_ratio: float = 0.0  # final learning rate as a share of the peak
    schedule: Literal["cosine", "linear", "constant"] = "linear"  # from the peak to the end
    warmup_steps: int = 30  # optimizer steps from 0 to the peak
    weight_decay: float = 0.1  # on matrices, not on norm gains
    betas: tuple[float, float] = (0.9, 0.998)  # AdamW; the first is SGD's momentum
    eps: float = 1e-8  # AdamW
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clip
    loss_chunk: int = 1024  # tokens whose logits exist at a time; 0: all of them
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    seed: int = 42
    log_every_steps: int = 10  # optimizer steps between logged points
    val_every_steps: int = 100  # optimizer steps between validations
    probe_cases: tuple[str, ...] = ()  # probe suites that each validation scores
    save_every_steps: int = 100  # optimizer steps between checkpoints
    keep_checkpoints: int = 3  # numbered checkpoints kept, newest first; 0: all

    def __post_init__(self) -> None:
        for name in (
            "seq_len",
            "micro_batch_size",
            "grad_accum_steps",
            "max_steps",
            "log_every_steps",
            "val_every_steps",
            "save_every_steps",
        ):
            if getattr(self, name) < 1:
                raise FieldError(name, f"is {getattr(self, name)}; it must be 1 or more")
        for name in (
            "min_lr_ratio",
            "warmup_steps",
            "weight_decay",
            "grad_clip",
            "loss_chunk",
            "keep_checkpoints",
            "seed",
        ):
            if not 0 <= getattr(self, name) < 2**32:
                raise FieldError(
                    name, f"is {getattr(self, name)}; it must be 0 or more, and below 2^32"
                )
        if not (0 < self.lr < math.inf and 0 < self.eps < math.inf):
            raise FieldError("lr", f"{self.lr} and eps {self.eps} must be above 0 and finite")
        if self.max_epochs is not None and not 0 < self.max_epochs < math.inf:
            raise FieldError(
                "max_epochs", f"is {self.max_epochs}; it must be above 0 and finite, or null"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise FieldError("betas", f"are {list(self.betas)}; each lies from 0 to below 1")

    def validates(self, step: int) -> bool:
        """Whether a validation follows optimizer step `step`; one always follows the last."""
        return step % self.val_every_steps == 0 or step == self.max_steps


@dataclass(frozen=True)
class HardwareConfig:
    accelerator: Literal["auto", "cpu", "mps", "cuda", "gpu"] = (
        "auto"  # auto: mps, else cuda, else cpu; gpu is cuda
    )
    devices: int = 1  # how many of them
    num_workers: int = 0  # processes that prepare batches; 0: the training process itself
    compile: Literal["auto", "on", "off"] = (
        "auto"  # torch.compile; auto: on CUDA, and on a CPU in a run of many minutes
    )

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise FieldError("devices", f"is {self.devices}; it must be 1 or more")
        if self.num_workers < 0:
            raise FieldError("num_workers", f"is {self.num_workers}; it must be 0 or more")


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
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        if self.model.max_seq_len is None:
            object.__setattr__(
                self, "model", dataclasses.replace(self.model, max_seq_len=self.training.seq_len)
            )
        if self.model.max_seq_len < self.training.seq_len:
            raise ValueError(
                f"training.seq_len {self.training.seq_len} does not fit model.max_seq_len {self.model.max_seq_len}"
            )

    def with_vocab_size(self, vocab_size: int) -> "Config":
        """This config for a tokenizer of `vocab_size`. Raises UserError where the model was given a smaller one."""
        given = self.model.vocab_size
        if given is not None and given < vocab_size:
            raise UserError(
                f"model.vocab_size is {given}, but the tokenizer {self.data.tokenizer!r} has {vocab_size} entries; leave it empty"
            )
        return dataclasses.replace(
            self, model=dataclasses.replace(self.model, vocab_size=given or vocab_size)
        )

    def with_max_steps(self, max_steps: int) -> "Config":
        """This config for a run of so many optimizer steps."""
        return dataclasses.replace(
            self, training=dataclasses.replace(self.training, max_steps=max_steps)
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain dicts, lists, numbers and strings: what a checkpoint and YAML hold."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(each) for key, each in value.items()}
            return [plain(each) for each in value] if isinstance(value, tuple) else value

        return plain(dataclasses.asdict(self))
