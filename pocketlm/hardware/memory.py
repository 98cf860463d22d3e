"""The memory that a run takes, estimated before anything is allocated, and what there is.

The letters of the comments: B rows, T tokens of a row, N = B T, C d_model, F d_ff, H heads, D
head_dim, A = H D, V vocabulary. The factors that are not counted in the code (docs/experiments.md
has the measurements) are those of the C library's heap, which keeps holes between the tensors of
torch's operations.
"""

import ctypes
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types
import torch

from model import ModelConfig
from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.model import kernels
from pocketlm.model.attention import LONGEST, TILE
from pocketlm.model.loss import CACHED_TOKENS

if sys.platform != "win32":
    import resource

M_MMAP_THRESHOLD = -3  # of malloc.h
LIBRARIES = 60e6  # what is imported after the estimate, and the buffers of the matmuls
BFLOAT16_LIBRARIES = 50e6  # code that oneDNN generates, and its copies of weights
SAFE_SHARE = 0.9  # of the free memory that `micro_batch_size: auto` may fill
OUT_OF_MEMORY = "out of memory|can't allocate memory|not enough memory|failed to allocate"
# share of the activations that the heap wastes on holes, where torch computes the blocks
HOLES = 0.3
# temporary tensors of a block that torch computes, in multiples of N (C + F) elements and, with
# dropout, of B H T T
TORCH_TEMPORARIES, DROPOUT_TEMPORARIES = 4, 7
# bytes of holes for each parameter under FSDP on a CPU: the blocks' parameters come and go there
FSDP_HOLES = 8
HEAD_HOLES = 2  # holes of the size of the head, which the loss leaves in the heap


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training a model takes on its device, beside those that the process has."""

    persistent: int  # weights, gradients and the optimizer's state
    activations: int  # kept for the backward pass
    temporary: int  # the largest of the loss, a block's backward pass and the optimizer's step
    communication: int = 0  # what is collected from the other devices, or sent to them

    @property
    def total(self) -> int:
        return self.persistent + self.activations + self.temporary + self.communication


def estimate_memory(config: Config, accelerator: str, precision: str) -> MemoryEstimate:
    """Estimate the memory of a run with a resolved micro-batch and vocabulary, on each device."""
    count, sharded = config.hardware.world_size, config.hardware.strategy == "fsdp"
    config = config.on_each_device()
    model, training = config.model, config.training
    size = 4 if precision == "32-true" else 2  # bytes of a matmul's operand
    tokens = training.micro_batch * training.seq_len
    n, muon = model.n_parameters, muon_weights(model)
    gradients = 4 * n
    average = training.ema_decay > 0
    persistent = 4 * n + gradients + optimizer_bytes(model, training.optimizer, average=average)
    native = accelerator == "cpu" and kernels.available(torch.device("cpu"), torch.float32)
    blocks = BlockMemory(config, size, native and model.is_llama)
    layers = model.n_layers
    inputs = 4 * model.d_model * tokens
    if model.gradient_checkpointing:
        activations = layers * inputs
        in_backward = blocks.kept() + 2 * blocks.temporary()  # of the block's forward pass too
    else:
        activations = layers * blocks.kept()
        in_backward = blocks.temporary()
        if training.grad_accum_steps == 1 and not sharded:
            in_backward -= gradients  # Lightning has freed those of the last step
    holes = 0 if blocks.native else int(HOLES * max(activations, blocks.kept()))
    activations += 2 * inputs
    head = 4 * (model.vocab_size or 0) * model.d_model
    in_forward = head + loss_bytes(config, size, native)
    holes += HEAD_HOLES * head
    in_step = 0
    if training.optimizer == "muon" and muon:
        in_step = newton_schulz_bytes(model) - activations  # which are freed by then
    libraries = LIBRARIES + (BFLOAT16_LIBRARIES if size == 2 and accelerator == "cpu" else 0)
    temporary = max(in_forward, in_backward + head, in_step) + holes + int(libraries)
    persistent //= count if sharded else 1
    communication = communication_buffers(model, count, sharded)
    if sharded and count > 1 and accelerator == "cpu":
        temporary += FSDP_HOLES * n
    return MemoryEstimate(persistent, activations, temporary, communication)


def communication_buffers(model: ModelConfig, count: int, sharded: bool) -> int:
    """Return the bytes of the buffers of communication on each of `count` devices.

    DDP has a copy of the gradients. FSDP (`sharded`) has the whole parameters of the embeddings and
    the head, of a block and of the next one, the gradients of all of these but the last, and those
    of a block once more, as they are sent.
    """
    if count == 1:
        return 0
    if not sharded:
        return 4 * model.n_parameters
    block = replace(model, n_layers=model.n_layers + 1).n_parameters - model.n_parameters
    rest = model.n_parameters - model.n_layers * block
    return 4 * (2 * rest + 4 * block)


def muon_weights(model: ModelConfig) -> int:
    """Return the number of weights in the blocks' matrices."""
    return sum(count * rows * columns for (rows, columns), count in matrix_shapes(model).items())


def matrix_shapes(model: ModelConfig) -> dict[tuple[int, int], int]:
    """Return how many matrices of each shape the blocks have."""
    C, F, D = model.d_model, model.d_ff or 0, model.head_dim or 0
    A = model.n_heads * D
    shapes = [(A, C), *[((model.n_kv_heads or 0) * D, C)] * 2, (C, A)]
    shapes += [(F, C)] * (2 if model.mlp == "swiglu" else 1) + [(C, F)]
    return {shape: shapes.count(shape) * model.n_layers for shape in shapes}


def optimizer_bytes(model: ModelConfig, optimizer: str, *, average: bool = False) -> int:
    """Return the bytes of the optimizer's state: a momentum, or AdamW's two moments.

    average: whether it has the average of the weights too.
    """
    averages = 4 * model.n_parameters if average else 0
    if optimizer == "adamw":
        return 8 * model.n_parameters + averages
    if optimizer == "sgd":
        return 4 * model.n_parameters + averages
    return 8 * model.n_parameters - 4 * muon_weights(model) + averages


def newton_schulz_bytes(model: ModelConfig) -> int:
    """Return the bytes of Muon's step: for the matrices of a shape, four copies and three grams."""
    return max(
        16 * count * (rows * columns + min(rows, columns) ** 2)
        for (rows, columns), count in matrix_shapes(model).items()
    )


def loss_bytes(config: Config, size: int, native: bool) -> int:
    """Return the bytes of the loss beside the gradient of the head, which it computes at once."""
    model, training = config.model, config.training
    V, C = model.vocab_size or 0, model.d_model
    N = training.micro_batch * training.seq_len
    if not training.loss_chunk:  # logits, log-probabilities, two gradients, of all tokens
        return (16 if size == 4 else 14) * N * V
    chunk = min(training.loss_chunk, N)
    if native:
        chunk = min(chunk, CACHED_TOKENS[torch.float32 if size == 4 else torch.bfloat16])
    copies = 2 * size * V * C if size == 2 or V % 64 else 0  # the padded head and a product
    d_hidden = size * N * C + (6 * N * C if size == 2 else 0)
    return chunk * V * (size if native else 2 * size) + copies + d_hidden


class BlockMemory:
    """Bytes of a block in training.

    size: bytes of a matmul's operand. native: training.c computes the block.
    """

    def __init__(self, config: Config, size: int, native: bool):
        self.model, self.size, self.native = config.model, size, native
        self.rows, self.length = config.training.micro_batch, config.training.seq_len
        self.N = self.rows * self.length
        self.masked = config.data.document_mask
        self.weights = muon_weights(config.model) // config.model.n_layers

    def kept(self) -> int:
        """Return the bytes that a block keeps for its backward pass."""
        model, size = self.model, self.size
        C, F, D = model.d_model, model.d_ff or 0, model.head_dim or 0
        A, key_values = model.n_heads * D, 2 * (model.n_kv_heads or 0) * D
        gated = model.mlp == "swiglu"
        # the inputs of both norms, in float32, and of what mixes embeddings in
        residual = (12 if model.embedding_shortcut else 8) * C
        if self.native:
            per_token = residual + size * (2 * C + 2 * A + key_values + 3 * F)
            copies = self.weights if size == 2 else self.weights - C * A - C * F
            return self.N * per_token + size * copies
        # inputs of matmuls of width C; that of o_proj is A wide
        casts = 3 + (2 if gated else 1) if size == 2 else 2
        hidden = F * (4 if gated else 1 if model.mlp == "relu" else 2)
        per_token = residual + size * (casts * C + A + hidden)
        if model.qk_norm:  # its inputs, in float32
            per_token += 4 * A + 2 * key_values
        if model.dropout:
            per_token += 12 * A + 2 * size * C  # q, k, v of all heads; the masks of two outputs
        else:
            per_token += size * (A + key_values)
        copies = size * self.weights if size == 2 else 0
        return self.N * per_token + self.kept_by_attention() + copies

    def kept_by_attention(self) -> int:
        """Return the bytes that torch's attention keeps beside q, k and v."""
        H, T = self.model.n_heads, self.length
        if self.model.dropout:  # probabilities before and after dropout, and its mask
            return 12 * self.rows * H * T * T
        if self.size == 2 and T <= LONGEST:  # TiledAttention: probabilities of the past
            tiles = sum(min(TILE, T - s) * min(s + TILE, T) for s in range(0, T, TILE))
            return 2 * self.rows * H * tiles
        return self.N * (4 * T if self.masked else 0) + 4 * H * self.N

    def temporary(self) -> int:
        """Return the bytes of the temporary tensors of a block's backward pass."""
        model = self.model
        C, F, A = model.d_model, model.d_ff or 0, model.n_heads * (model.head_dim or 0)
        if self.native:
            return self.N * (8 * C + 3 * self.size * F) + 4 * self.weights
        scores = 4 * self.rows * model.n_heads * self.length**2
        if model.dropout:
            return DROPOUT_TEMPORARIES * scores
        return TORCH_TEMPORARIES * self.size * self.N * (max(A, C) + F)


# ---- what there is ----


@dataclass(frozen=True)
class Room:
    """Bytes of memory that a process may take: of the whole machine or group, and free now."""

    total: int
    free: int
    limited_by: str  # in words


def available_memory(accelerator: str) -> Room:
    """Return the memory of a device, or, for a CPU, of this machine, cgroup and process."""
    if accelerator == "cuda":
        free, total = torch.cuda.mem_get_info()
        return Room(total, free, "the GPU has")
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    rooms = [Room(memory.total + swap.total, memory.available + swap.free, "this machine has")]
    rooms += [*cgroup_rooms(), *address_space_rooms()]
    if accelerator == "mps":
        most = torch.mps.recommended_max_memory()
        rooms.append(Room(most, most - torch.mps.driver_allocated_memory(), "MPS may use"))
    return min(rooms, key=lambda room: room.total)


def cgroup_rooms(
    groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> list[Room]:
    """Return the limits of the control groups of this process, in either version of cgroups."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, names = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif not controllers:
            root, names = mount, ("memory.max", "memory.current")
        else:
            continue
        folder = root / path.strip("/")
        # in a container, the path may be that of the host: the mount then is the group itself
        for group in (folder, *folder.parents):
            limit, used = (read_number(group / name) for name in names)
            if limit is not None and used is not None:
                reclaimable = read_reclaimable(group / "memory.stat")
                free = max(0, limit - used + reclaimable)
                rooms.append(Room(limit, free, "the control group (container) has"))
            if group == root:
                break
    return rooms


def address_space_rooms() -> list[Room]:
    """Return what the limit of this process's address space leaves, if there is one: ulimit -v."""
    if sys.platform == "win32":
        return []
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return []
    held = psutil.Process().memory_info()
    free = max(0, limit - held.vms)  # libraries and mapped files count too, in use or not
    return [Room(held.rss + free, free, "ulimit -v leaves this process")]


def read_number(path: Path) -> int | None:
    """Return the number in a file of a control group; None if there is none, or no limit."""
    try:
        number = int(path.read_text())
    except (OSError, ValueError):  # "max"
        return None
    return number if number < 2**60 else None


def read_reclaimable(path: Path) -> int:
    """Return the bytes of files in the cache of a control group, which it gives up when needed."""
    try:
        pairs = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(pairs.get("total_inactive_file", pairs.get("inactive_file", 0)))


def run_bytes(config: Config, accelerator: str, precision: str) -> int:
    """Return the bytes that the run takes in all: on a CPU with those that the process has now."""
    used = psutil.Process().memory_info().rss if accelerator == "cpu" else 0
    return int(estimate_memory(config, accelerator, precision).total + used)


def check_memory(config: Config, accelerator: str, precision: str) -> None:
    """Raise UserError, with what to change, if the run cannot fit into memory.

    Called before anything is allocated. A vocabulary that is not known yet counts as one token.
    """
    if config.model.vocab_size is None:
        config = config.with_vocab_size(1)
    if config.training.micro_batch_size == "auto":
        config = config.with_micro_batch(1)
    needed = run_bytes(config, accelerator, precision)
    room = available_memory(accelerator)
    if needed > room.total:
        raise UserError(
            f"training this model needs about {gigabytes(needed)} of memory, and {room.limited_by} "
            f"{gigabytes(room.total)}; {memory_advice(config)}"
        )


def memory_advice(config: Config) -> str:
    """Return what makes a run smaller, without changing what it learns where possible."""
    training, model = config.training, config.model
    advice = []
    if isinstance(training.micro_batch_size, int) and training.micro_batch_size > 1:
        rows = training.micro_batch_size // 2
        steps = math.ceil(training.micro_batch_size * training.grad_accum_steps / rows)
        advice.append(
            f"training.micro_batch_size={rows} with training.grad_accum_steps={steps} has the "
            "same batch"
        )
    if not model.gradient_checkpointing:
        advice.append("model.gradient_checkpointing=true takes a third more time")
    if not training.loss_chunk or training.loss_chunk > 256:
        advice.append("training.loss_chunk=256 keeps fewer logits")
    advice.append("a smaller model.n_layers or model.d_model takes less of everything")
    return "; ".join(advice)


def choose_micro_batch(
    config: Config, accelerator: str, precision: str, previous: int | None
) -> Config:
    """Return the config with the largest micro-batch that fits, and the same rows in a step.

    previous: the micro-batch of the run that is resumed, which is kept if it divides those rows.
    """
    rows = config.with_micro_batch(1).training.grad_accum_steps
    if previous and rows % previous == 0:
        return config.with_micro_batch(previous)
    rows = config.with_micro_batch(1).on_each_device().training.grad_accum_steps
    divisors = [n for n in range(rows, 0, -1) if rows % n == 0]
    free = SAFE_SHARE * available_memory(accelerator).free
    for micro_batch in divisors:
        chosen = config.with_micro_batch(micro_batch)
        if estimate_memory(chosen, accelerator, precision).total <= free:
            return chosen
    return config.with_micro_batch(1)


@contextmanager
def memory_errors(config: Config) -> Iterator[None]:
    """Turn the many errors for memory that has run out into a UserError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error)
        if isinstance(error, RuntimeError) and not re.search(OUT_OF_MEMORY, text, re.IGNORECASE):
            raise
        first = text.splitlines()[0] if text else "the allocation failed"
        raise UserError(
            f"the memory has run out ({first}); the checkpoints on the disk are whole. "
            f"{memory_advice(config)}"
        ) from error


def gigabytes(size: float) -> str:
    """Format a number of bytes.

    >>> gigabytes(0.734e9), gigabytes(12.34e9), gigabytes(4e15)
    ('0.73 GB', '12.3 GB', '4,000,000 GB')
    """
    return f"{size / 1e9:,.{2 if size < 10e9 else 1 if size < 100e9 else 0}f} GB"


def return_large_blocks() -> None:
    """Have glibc give freed blocks of 1 MB or more back to the system at once.

    It would keep those of up to 32 MB, and the holes between them.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)
