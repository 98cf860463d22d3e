"""Cross-entropy from hidden states, in chunks of tokens, so that the logits of a large vocabulary never stand whole.

The head of a small model with a large vocabulary is most of its arithmetic and nearly all of its memory:
8 x 256 tokens by 50,257 entries are 412 MB in float32, three times over in the plain loss. `chunked_cross_entropy`
computes a chunk's gradients beside its loss and keeps only those.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import MPS_INNER_LIMIT

IGNORE_INDEX = -100  # a target that counts for nothing


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed nats of targets (...) under logits (..., V), in float32 at least; targets of -100 are left out."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # `dtype` decides
            nats, d_hidden, d_weight = loss_and_gradients(hidden, weight, targets, chunk, dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        return nats

    @staticmethod
    def backward(ctx, scale: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return (
            d_hidden.mul_(scale),
            d_weight.mul_(scale),
            None,
            None,
            None,
        )  # in place: autograd refuses a second backward


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed nats and their gradients by hidden (N, C) and weight (V, C), with matmuls in `dtype` and sums in float32 at least."""
    V, C = weight.shape
    h = hidden.to(dtype)
    w = torch.empty(
        V + -V % 64, C, dtype=dtype, device=weight.device
    )  # the gradient of an odd number of rows is a third slower
    w[:V], w[V:] = weight, 0
    nats = torch.zeros(
        (), dtype=torch.float32 if dtype != torch.float64 else dtype, device=hidden.device
    )
    d_hidden = torch.empty_like(hidden)
    d_weight: Tensor | None = None
    for first in range(0, hidden.size(0), chunk):
        rows = slice(first, first + chunk)
        kept = (targets[rows] != IGNORE_INDEX).to(nats.dtype)
        target = targets[rows].clamp(min=0)
        logits = h[rows] @ w.T
        logits[:, V:] = -torch.inf
        target_logit = logits.gather(1, target[:, None])[:, 0].to(nats.dtype)
        largest = logits.amax(1, keepdim=True)
        e = logits.sub_(
            largest
        ).exp_()  # in place, and never divided: the row sums divide the small factors below
        total = (
            e.view(len(e), 64, -1).sum(-1).to(nats.dtype).sum(1)
        )  # 64 parts, so that little is lost in `dtype`
        nats += ((total.log() + largest[:, 0] - target_logit) * kept).sum()
        share = (kept / total)[:, None]
        d_hidden[rows] = matmul(e, w) * share - w[target] * kept[:, None]
        part = matmul(e.T, (h[rows] * share).to(dtype))
        d_weight = part.to(weight.dtype) if d_weight is None else d_weight.add_(part)
        d_weight.index_add_(
            0, target, h[rows].to(d_weight.dtype) * -kept[:, None].to(d_weight.dtype)
        )
    return nats, d_hidden, d_weight[:V]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """A @ b; on MPS in pieces of the inner dimension, where the whole of it would be summed wrongly."""
    if a.device.type != "mps" or a.size(1) < MPS_INNER_LIMIT:
        return a @ b
    pieces = zip(a.split(MPS_INNER_LIMIT // 2, dim=1), b.split(MPS_INNER_LIMIT // 2), strict=True)
    return sum(left.contiguous() @ right for left, right in pieces)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Summed nats of targets (B, T) under the head `weight` (V, C) over hidden (B, T, C), `chunk` tokens at a time."""
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if (
        not torch.is_grad_enabled()
    ):  # no gradients to make beside the loss, and float32 copies that should fit the cache
        parts = zip(hidden.split(min(chunk, 256)), targets.split(min(chunk, 256)), strict=True)
        return torch.stack([cross_entropy(F.linear(h, weight), t) for h, t in parts]).sum()
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    dtype = (
        torch.float32 if dtype == torch.float16 else dtype
    )  # shares of 1/50,000 are below float16's range
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk, dtype)
