"""Self-check: compare the MPS backend with the CPU before training or generating.

The kernels of Apple's GPU come with torch and with macOS, and some have been silently wrong:
attention that saw the future in half precision, batches permuted, long sums in matmuls. `check_mps`
computes a small model of the configured kind, and matmuls of the configured sizes, on both devices
and compares. It needs no data, takes a second, and leaves the CPU's random state unchanged. On any
other accelerator it does nothing.
"""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model import MPS_INNER_LIMIT, KVCache, ModelConfig, Transformer
from pocketlm.config.sections import TrainingConfig
from pocketlm.errors import UserError
from pocketlm.model.loss import chunked_cross_entropy
from pocketlm.optim import build_optimizer, clip_gradients

# sizes of the small model; 100 is not a multiple of a kernel's tile
ROWS, TOKENS, VOCAB_SIZE = 2, 100, 300
# largest difference, as a share of the largest value; rounding is 1e-6, 0.07 and 0.05
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.25, torch.float16: 0.25}
# share of the largest logit; seeing one token too many changes it by 7e-3 and more
LEAK = 1e-3
CHUNK = 64  # tokens of the chunked loss


def check_mps(
    accelerator: str, dtype: torch.dtype, model: ModelConfig, training: TrainingConfig | None = None
) -> None:
    """Raise UserError if `accelerator` is mps and computes wrongly in float32 or in `dtype`.

    Without `training`, only the sizes of generation are checked.
    """
    if accelerator == "mps":
        check_device(torch.device("mps"), dtype, model, training)


def check_device(
    device: torch.device,
    dtype: torch.dtype,
    model: ModelConfig,
    training: TrainingConfig | None = None,
) -> None:
    """Raise UserError if `device` differs from the CPU in float32 or in `dtype`."""
    inner = inner_dimensions(model, training)
    expected = compute_values(torch.device("cpu"), torch.float32, model, inner)
    for kind in dict.fromkeys([torch.float32, dtype]):
        remedy = "training.precision=32-true, or --dtype float32,"
        if kind == torch.float32:
            remedy = "hardware.accelerator=cpu, or --device cpu,"
        actual = compute_values(device, kind, model, inner)
        for fault in find_faults(actual, expected, TOLERANCE[kind]):
            raise UserError(
                f"{device.type} computes wrongly in {str(kind).removeprefix('torch.')}: {fault}; "
                f"use {remedy} or a newer torch and macOS"
            )


def find_faults(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> Iterator[str]:
    """Yield a description of each fault: leaks of attention first, then wrong values."""
    for mode in ("with gradients", "without gradients"):
        changed = actual[f"logits {mode} before another last token"]
        leak = difference(changed, actual[f"logits {mode}"][:, :-1])
        if not leak <= LEAK:  # true for nan too
            yield (
                f"attention {mode} sees the future, another last token changes earlier logits by "
                f"{leak:.2g} of the largest"
            )
    for name, value in actual.items():
        error = difference(value, expected[name])
        if not error <= tolerance:
            yield f"{name}, off by {error:.2g} of the largest value from the CPU's"


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, as a share of b's largest value (of 1, if that is larger)."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def compute_values(
    device: torch.device, dtype: torch.dtype, config: ModelConfig, inner: set[int]
) -> dict[str, Tensor]:
    """Return the results of the small model and the matmuls on `device`, as float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small_model(config).to(device, dtype)
        values = model_values(model, torch.randint(VOCAB_SIZE, (ROWS, TOKENS)).to(device))
        for size in sorted(inner):
            for form, product in products(size, device, dtype).items():
                values[f"a matmul with {size:,} terms a sum {form}"] = product
        if dtype == torch.float32:  # the precision of the weights in training
            values |= optimizer_values(model)
    return {name: value.detach().float().cpu() for name, value in values.items()}


def small_model(config: ModelConfig) -> Transformer:
    """Return two layers of the config's kind and head size.

    The weights are large, so that attention has a large effect on the logits.
    """
    assert config.n_kv_heads is not None and config.head_dim is not None
    width = 2 * config.head_dim
    return Transformer(
        dataclasses.replace(
            config,
            vocab_size=VOCAB_SIZE,
            max_seq_len=TOKENS,
            n_layers=2,
            n_heads=2,
            n_kv_heads=1 if config.n_kv_heads < config.n_heads else 2,
            d_model=width,
            d_ff=None,
            init_std=width**-0.5,
            dropout=0.0,
            gradient_checkpointing=False,
        )
    )


def model_values(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    """Return the logits of each kernel of attention, the summed loss, and its gradients."""
    values = {}
    other_ids = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % VOCAB_SIZE], dim=1)
    documents = (torch.arange(TOKENS, device=ids.device) >= TOKENS // 3).long().expand_as(ids)
    # attention has other kernels when no gradients are needed
    for mode, with_gradients in (("with gradients", True), ("without gradients", False)):
        with torch.set_grad_enabled(with_gradients):
            values[f"logits {mode}"] = model(ids)
            values[f"logits {mode} before another last token"] = model(other_ids)[:, :-1]
            values[f"logits {mode} of two documents in a row"] = model(ids, doc_ids=documents)
    with torch.no_grad():
        values |= generation_values(model, ids)
        hidden = model.hidden(ids)
        loss = chunked_cross_entropy(hidden, model.head_weight, ids, chunk=CHUNK)
        values["the validation loss"] = loss
    hidden = model.hidden(ids, doc_ids=documents)
    targets = ids.roll(-1, dims=1)
    loss = chunked_cross_entropy(hidden, model.head_weight, targets, chunk=CHUNK)
    loss.backward()  # type: ignore[no-untyped-call]  # torch's method has no types
    values["the loss"] = loss
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        values[f"the gradient of {name}"] = parameter.grad
    return values


def generation_values(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    """Return the logits of the last token, and those computed in three parts with a KV cache."""
    weight = model.embed_tokens.weight
    cache = KVCache(model.config, ROWS, TOKENS, dtype=weight.dtype, device=weight.device)
    parts = torch.split(ids, [TOKENS - 9, 8, 1], dim=1)
    last = model.logits(model.hidden(ids)[:, -1])
    cached = torch.cat([model(part, cache=cache) for part in parts], dim=1)
    return {"logits of the last token": last, "logits from cached keys": cached}


def optimizer_values(model: Transformer) -> dict[str, Tensor]:
    """Return the norm of random gradients, and the weights after two steps along them.

    The learning rate is 1, so that a wrong step shows.
    """
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape).to(parameter)
    norm = clip_gradients(model.parameters(), 1.0)
    optimizer = build_optimizer(
        model, optimizer="adamw", lr=1.0, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    optimizer.step()
    optimizer.step()
    values = {"the norm of gradients": norm}
    for name, parameter in model.named_parameters():
        values[f"{name} after two steps of AdamW"] = parameter
    return values


def inner_dimensions(model: ModelConfig, training: TrainingConfig | None) -> set[int]:
    """Return the inner dimensions (terms per sum) of a step's matmuls.

    They are the widths of the model, and in training the tokens of a row, of a batch and of a
    chunk of the loss, and the vocabulary.
    """
    assert model.d_ff is not None
    assert model.n_kv_heads is not None and model.head_dim is not None
    heads = {n * model.head_dim for n in (1, model.n_kv_heads, model.n_heads)}
    widths = {model.d_model, model.d_ff} | heads
    if training is None:
        return widths
    tokens = training.micro_batch * training.seq_len
    chunk = min(training.loss_chunk or tokens, tokens)
    row_sizes = {training.seq_len, tokens, chunk, tokens % chunk}
    return (widths | row_sizes | head_dimensions(model)) - {0}


def head_dimensions(model: ModelConfig) -> set[int]:
    """Return the inner dimensions of the gradient of the hidden states: parts of the vocabulary.

    The chunked loss pads the vocabulary to a multiple of 64 and cuts it into parts below the
    limit of MPS.
    """
    assert model.vocab_size is not None
    part = MPS_INNER_LIMIT // 2
    sizes = set()
    for vocab_size in (model.vocab_size, model.vocab_size + -model.vocab_size % 64):
        sizes |= {
            min(vocab_size, part),
            vocab_size % part,
            min(vocab_size, MPS_INNER_LIMIT - 1),
        }
    return sizes


def products(inner: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the product of random matrices (32, inner) and (inner, 48) in each form of a model.

    Its values are around 1. Behind the second matrix lie large values in memory, which show in a
    sum with too many terms.
    """
    a = (torch.randn(32, inner) / inner**0.5).to(device, dtype)
    with_rows_behind = torch.cat([torch.randn(inner, 48), torch.full((64, 48), 1000.0)])
    b = with_rows_behind.to(device, dtype)[:inner]
    x = torch.zeros(32, 48, device=device, dtype=dtype, requires_grad=True)
    weight = torch.zeros(32, 48, device=device, dtype=dtype, requires_grad=True)
    ((F.linear(x, b) * a).sum() + (F.linear(b, weight) * a.T).sum()).backward()
    assert x.grad is not None
    assert weight.grad is not None
    return {
        "(forward)": a @ b,
        "(batched)": a[None] @ b[None],
        "(its input's gradient)": x.grad,
        "(its weight's gradient)": weight.grad,
    }
