"""Whether Apple's GPU computes what the CPU computes: asked before anything is trained or generated on it.

Its kernels come with torch and with macOS, and some have been silently wrong: attention that saw the future in half
precision, batches permuted, long sums in matmuls. `check` has a small model of the configured kind, and the matmuls of the
configured sizes, computed on both and compares. It needs no data, takes a second, and leaves the CPU's random state alone.
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

ROWS, TOKENS, ENTRIES = 2, 100, 300  # of the small model; 100 is no multiple of a kernel's tile


TOLERANCE = {
    torch.float32: 0.01,
    torch.bfloat16: 0.25,
    torch.float16: 0.25,
}  # of the largest value; rounding is 1e-6, 0.07 and 0.05


LEAK = 1e-3  # of the largest logit: to see one token too many moves it by 7e-3 and more


def check_mps(
    accelerator: str, dtype: torch.dtype, model: ModelConfig, training: TrainingConfig | None = None
) -> None:
    """Raise UserError if `accelerator` is mps and computes wrongly, in float32 or in `dtype`. Without `training`, for generation only."""
    if accelerator == "mps":
        check_device(torch.device("mps"), dtype, model, training)


def check_device(
    device: torch.device,
    dtype: torch.dtype,
    model: ModelConfig,
    training: TrainingConfig | None = None,
) -> None:
    """Raise UserError where `device` computes otherwise than the CPU."""
    inner = inner_dimensions(model, training)
    expected = values(torch.device("cpu"), torch.float32, model, inner)
    for kind in dict.fromkeys([torch.float32, dtype]):
        mend = (
            "hardware.accelerator=cpu, or --device cpu,"
            if kind == torch.float32
            else "training.precision=32-true, or --dtype float32,"
        )
        for fault in faults(values(device, kind, model, inner), expected, TOLERANCE[kind]):
            raise UserError(
                f"{device.type} computes wrongly in {str(kind).removeprefix('torch.')}: {fault}; use {mend} or a newer torch and macOS"
            )


def faults(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> Iterator[str]:
    for how in ("with gradients", "without gradients"):
        leak = difference(
            found[f"logits {how} before another last token"], found[f"logits {how}"][:, :-1]
        )
        if not leak <= LEAK:
            yield f"attention {how} sees the future, another last token moves earlier logits by {leak:.2g} of the largest"
    for what, value in found.items():
        if not (off := difference(value, expected[what])) <= tolerance:
            yield f"{what}, off by {off:.2g} of the largest value from the CPU's"


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of b's largest value, or of 1 where that is larger."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def values(
    device: torch.device, dtype: torch.dtype, config: ModelConfig, inner: set[int]
) -> dict[str, Tensor]:
    """What the small model and the matmuls come to on `device`, by name; on the CPU, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small_model(config).to(device, dtype)
        found = model_values(model, torch.randint(ENTRIES, (ROWS, TOKENS)).to(device))
        for size in sorted(inner):
            found |= {
                f"a matmul with {size:,} terms a sum {form}": product
                for form, product in products(size, device, dtype).items()
            }
        if dtype == torch.float32:  # as weights are in training
            found |= stepped(model)
    return {what: value.detach().float().cpu() for what, value in found.items()}


def small_model(config: ModelConfig) -> Transformer:
    """Two layers of the config's kind and head size; the weights are large, so that attention counts for much."""
    sizes = dict(
        vocab_size=ENTRIES,
        max_seq_len=TOKENS,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1 if config.n_kv_heads < config.n_heads else 2,
    )
    width = dict(d_model=2 * config.head_dim, d_ff=None, init_std=(2 * config.head_dim) ** -0.5)
    return Transformer(
        dataclasses.replace(config, **sizes, **width, dropout=0.0, gradient_checkpointing=False)
    )


def model_values(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    """Logits by each of the ways through attention, the summed loss in nats, and its gradients."""
    found, weight = {}, model.embed_tokens.weight
    another = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % ENTRIES], dim=1)
    documents = (torch.arange(TOKENS, device=ids.device) >= TOKENS // 3).long().expand_as(ids)
    for how, grad in [
        ("with gradients", True),
        ("without gradients", False),
    ]:  # without gradients, attention has other kernels
        with torch.set_grad_enabled(grad):
            found[f"logits {how}"] = model(ids)
            found[f"logits {how} before another last token"] = model(another)[:, :-1]
            found[f"logits {how} of two documents in a row"] = model(ids, doc_ids=documents)
    with torch.no_grad():
        cache = KVCache(model.config, ROWS, TOKENS, dtype=weight.dtype, device=weight.device)
        found["logits of the last token"] = model.logits(model.hidden(ids)[:, -1])
        found["logits from cached keys"] = torch.cat(
            [model(new, cache=cache) for new in ids.split([TOKENS - 9, 8, 1], dim=1)], dim=1
        )
        found["the validation loss"] = chunked_cross_entropy(
            model.hidden(ids), model.head_weight, ids, chunk=64
        )
    found["the loss"] = chunked_cross_entropy(
        model.hidden(ids, doc_ids=documents), model.head_weight, ids.roll(-1, dims=1), chunk=64
    )
    found["the loss"].backward()
    return found | {f"the gradient of {name}": p.grad for name, p in model.named_parameters()}


def stepped(model: Transformer) -> dict[str, Tensor]:
    """The weights after two steps along random gradients, and those gradients' norm; a step is 1 large, so that a wrong one shows."""
    for p in model.parameters():
        p.grad = torch.randn(p.shape).to(p)
    norm = clip_gradients(model.parameters(), 1.0)
    stepper = build_optimizer(
        model, optimizer="adamw", lr=1.0, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    stepper.step()
    stepper.step()
    return {"the norm of gradients": norm} | {
        f"{name} after two steps of AdamW": p for name, p in model.named_parameters()
    }


def inner_dimensions(model: ModelConfig, training: TrainingConfig | None) -> set[int]:
    """Terms that a step's matmuls sum: widths, and in training the tokens of a row, a batch and a chunk, and the head's entries."""
    widths = {model.d_model, model.d_ff, model.head_dim, model.n_kv_heads * model.head_dim}
    if training is None:
        return widths
    tokens, piece = training.micro_batch_size * training.seq_len, MPS_INNER_LIMIT // 2
    chunk = min(training.loss_chunk or tokens, tokens)
    heads = {
        model.vocab_size,
        model.vocab_size + -model.vocab_size % 64,
    }  # as it is, and as the chunked loss fills it up
    pieces = {
        size
        for entries in heads
        for size in (min(entries, piece), entries % piece, min(entries, MPS_INNER_LIMIT - 1))
    }
    return (widths | {training.seq_len, tokens, chunk, tokens % chunk} | pieces) - {0}


def products(inner: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The product of random matrices (32, inner) and (inner, 48), of values around 1, by each of the ways that a model asks for it."""
    a = (torch.randn(32, inner) / inner**0.5).to(device, dtype)
    b = torch.cat([torch.randn(inner, 48), torch.full((64, 48), 1000.0)]).to(device, dtype)[
        :inner
    ]  # a sum that goes on too far shows
    x, weight = (
        torch.zeros(32, 48, device=device, dtype=dtype, requires_grad=True) for _ in range(2)
    )
    ((F.linear(x, b) * a).sum() + (F.linear(b, weight) * a.T).sum()).backward()
    return {
        "(forward)": a @ b,
        "(batched)": a[None] @ b[None],
        "(its input's gradient)": x.grad,
        "(its weight's gradient)": weight.grad,
    }
