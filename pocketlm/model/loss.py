"""Cross-entropy from hidden states, in chunks of tokens: the logits never exist all at once.

The head of a small model with a large vocabulary is most of its arithmetic and nearly all of its
memory: 8 x 256 tokens by a vocabulary of 50,257 are 412 MB in float32, three times over in the
plain loss. `chunked_cross_entropy` computes a chunk's gradients together with its loss and keeps
only those.

Losses are sums over targets, in nats: the caller divides once, by the targets of the whole step.
Letters in the shape comments: B batch, T tokens, C d_model, V vocab_size, N tokens of all rows.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import MPS_INNER_LIMIT, Transformer
from pocketlm.model import kernels

IGNORE_INDEX = -100  # a target with this value has no loss

# Tokens of a chunk with training.c at most: their logits stay in the cache between two matmuls.
CACHED_TOKENS = {torch.float32: 256, torch.bfloat16: 512}


def batch_loss(model: Transformer, batch: Mapping[str, Tensor], chunk: int) -> Tensor:
    """Return the summed cross-entropy of a batch, `chunk` tokens at a time (0: all at once).

    The batch has input_ids and targets (B, T), and doc_ids (B, T) if documents are masked.
    """
    hidden = model.hidden(batch["input_ids"], doc_ids=batch.get("doc_ids"))
    if chunk:
        return chunked_cross_entropy(hidden, model.head_weight, batch["targets"], chunk)
    return cross_entropy(model.logits(hidden), batch["targets"])


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy of targets (...) under logits (..., V).

    It is computed in float32 at least. Targets equal to IGNORE_INDEX are left out.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Return the summed cross-entropy of targets (B, T), `chunk` tokens at a time.

    hidden: (B, T, C). weight: the head's matrix (V, C).
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if not torch.is_grad_enabled():
        # Without gradients, smaller chunks are faster: their float32 copies fit the cache.
        chunk = min(chunk, 256)
        parts = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
        return torch.stack([cross_entropy(F.linear(h, weight), t) for h, t in parts]).sum()
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if dtype == torch.float16:
        dtype = torch.float32  # probabilities of 1/50,000 are below float16's range
    loss: Tensor = ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, chunk, dtype
    )
    return loss


class ChunkedCrossEntropy(torch.autograd.Function):
    """`loss_and_gradients` as a differentiable function; the forward pass computes both."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # `dtype` decides
            loss, d_hidden, d_weight = loss_and_gradients(hidden, weight, targets, chunk, dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        # In place, to save memory: autograd then refuses a second backward pass.
        return d_hidden.mul_(scale), d_weight.mul_(scale), None, None, None


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed cross-entropy and its gradients by hidden (N, C) and weight (V, C).

    Matmuls are in `dtype`; sums are in float32 at least.
    """
    if kernels.available(hidden.device, dtype):
        return native_loss_and_gradients(hidden, weight, targets, chunk, dtype)
    V, C = weight.shape
    h, w = hidden.to(dtype), padded(weight, dtype)
    sum_dtype = torch.float32 if dtype != torch.float64 else dtype
    loss = torch.zeros((), dtype=sum_dtype, device=hidden.device)
    d_hidden = torch.empty_like(hidden)
    d_weight: Tensor | None = None
    for first in range(0, hidden.size(0), chunk):
        rows = slice(first, first + chunk)
        counted = (targets[rows] != IGNORE_INDEX).to(sum_dtype)  # 1 for a target, 0 if ignored
        target = targets[rows].clamp(min=0)
        logits = h[rows] @ w.T
        logits[:, V:] = -torch.inf
        target_logit = logits.gather(1, target[:, None])[:, 0].to(sum_dtype)
        max_logit = logits.amax(1, keepdim=True)
        # In place, and never divided: the row sums divide the small factors below instead.
        exps = logits.sub_(max_logit).exp_()
        # Summed in 64 parts, so that little precision is lost in `dtype`.
        total = exps.view(len(exps), 64, -1).sum(-1).to(sum_dtype).sum(1)
        loss += ((total.log() + max_logit[:, 0] - target_logit) * counted).sum()
        scale = (counted / total)[:, None]  # exps * scale: the probabilities
        d_hidden[rows] = matmul(exps, w) * scale - w[target] * counted[:, None]
        part = matmul(exps.T, (h[rows] * scale).to(dtype))
        d_weight = part.to(weight.dtype) if d_weight is None else d_weight.add_(part)
        target_part = h[rows].to(d_weight.dtype) * -counted[:, None].to(d_weight.dtype)
        d_weight.index_add_(0, target, target_part)
    assert d_weight is not None, "a batch has at least one token"
    return loss, d_hidden, d_weight[:V]


def native_loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `loss_and_gradients` does; everything but the matmuls is done by training.c."""
    V, C = weight.shape
    chunk = min(chunk, CACHED_TOKENS[dtype])
    h, w = hidden.to(dtype), padded(weight, dtype)
    losses = []
    d_hidden = torch.empty_like(h)
    d_weight = torch.zeros(len(w), C, dtype=torch.float32)
    for first in range(0, len(h), chunk):
        rows = slice(first, first + chunk)
        logits = h[rows] @ w.T
        losses.append(kernels.cross_entropy_(logits, V, targets[rows]))
        torch.mm(logits, w, out=d_hidden[rows])
        if dtype == torch.float32:
            d_weight.addmm_(logits.T, h[rows])
        else:  # a matmul of bfloat16 cannot add to float32
            d_weight += logits.T @ h[rows]
    return torch.cat(losses).sum(), d_hidden.to(hidden.dtype), d_weight[:V].to(weight.dtype)


def padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in `dtype`, with rows of zeros up to a multiple of 64.

    The gradient of an odd number of rows is a third slower.
    """
    return F.pad(weight.to(dtype), (0, 0, 0, -len(weight) % 64))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b; on MPS in parts, as a sum over a long inner dimension is wrong there."""
    if a.device.type != "mps" or a.size(1) < MPS_INNER_LIMIT:
        return a @ b
    size = MPS_INNER_LIMIT // 2
    pairs = zip(torch.split(a, size, dim=1), torch.split(b, size), strict=True)
    products = (left.contiguous() @ right for left, right in pairs)
    total = next(products)
    for product in products:
        total = total + product
    return total
