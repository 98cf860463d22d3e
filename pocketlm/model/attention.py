"""Scaled dot-product attention by the fastest correct kernel of each device, and document masks.

`attend` is torch's own kernel except in two cases. For training in bfloat16 on a CPU, where the
backward pass of torch's kernel is slow, `TiledAttention` replaces it, unless training.c computes
the whole block (block.py). On MPS, where some of torch's kernels have been wrong, the inputs are
rewritten first.

Letters in the shape comments: B batch, H query heads, K key/value heads, T query tokens, S key
tokens, D head_dim.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Query rows of one tile. Of 32 to 256, this was the fastest on a Zen 4 CPU.
TILE = 128

# Longer rows use torch's kernel: keeping all probabilities for the backward pass takes too much
# memory.
LONGEST = 1024


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Return the attention (B, H, T, D) of q (B, H, T, D) over k and v (B, K, S, D).

    H is a multiple of K. In the mask, True lets a query see a key. A mask of None means causal
    for T == S, and no restriction for T == 1.
    """
    device, dtype = q.device.type, q.dtype
    causal = mask is None and q.size(2) > 1
    if device == "mps":
        # Its kernels have been wrong for strided inputs and for grouped heads: pass neither.
        groups = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if causal and dtype != torch.float32:
            # is_causal has leaked the future in half precision.
            mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
            causal = False
    trains = torch.is_grad_enabled() and q.size(2) == k.size(2) <= LONGEST and not dropout
    if device == "cpu" and dtype == torch.bfloat16 and trains:
        tiled: Tensor = TiledAttention.apply(q, k, v, mask)  # type: ignore[no-untyped-call]
        return tiled
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal, enable_gqa=grouped
    )


class TiledAttention(torch.autograd.Function):
    """Causal attention in tiles of `TILE` query rows.

    A tile is not multiplied with keys that lie in the future of all its rows. The probabilities of
    each tile are kept for the backward pass, in the dtype of q; the softmax computes in float32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        (B, H, T, D), K = q.shape, k.size(1)
        ctx.scale = 1 / math.sqrt(D)
        with torch.autocast(q.device.type, enabled=False):
            # The query heads of a group share one product with their keys.
            q = (q * ctx.scale).reshape(B * K, H // K, T, D)
            k, v = k.reshape(B * K, T, D), v.reshape(B * K, T, D)
            y = torch.empty_like(q)
            tiles = []
            for start in range(0, T, TILE):
                end = min(start + TILE, T)
                rows = slice(start, end)
                scores = torch.bmm(q[:, :, rows].flatten(1, 2), k[:, :end].mT).view(B, H, -1, end)
                if mask is None:
                    future = torch.full((end - start, end - start), -torch.inf, dtype=scores.dtype)
                    scores[..., start:] += future.triu(1)
                else:
                    scores.masked_fill_(~mask[:, :, rows, :end], -torch.inf)
                p = scores.softmax(-1).view(B * K, -1, end)
                y[:, :, rows] = torch.bmm(p, v[:, :end]).view(B * K, H // K, -1, D)
                tiles.append(p)
        ctx.save_for_backward(q, k, v, *tiles)
        return y.view(B, H, T, D)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *tiles = ctx.saved_tensors
        (B, H, T, D), K = dy.shape, k.size(0) // dy.size(0)
        with torch.autocast(dy.device.type, enabled=False):
            dy = dy.reshape(q.shape)
            # The gradients of keys and values are sums over tiles: at least float32.
            sum_dtype = torch.promote_types(k.dtype, torch.float32)
            dq = torch.empty_like(q)
            dk = torch.zeros_like(k, dtype=sum_dtype)
            dv = torch.zeros_like(v, dtype=sum_dtype)
            for start, p in zip(range(0, T, TILE), tiles, strict=True):
                rows, end = slice(start, start + TILE), p.size(-1)
                q_tile, dy_tile = q[:, :, rows].flatten(1, 2), dy[:, :, rows].flatten(1, 2)
                dv[:, :end] += torch.bmm(p.mT, dy_tile)
                dp = torch.bmm(dy_tile, v[:, :end].mT)
                d_scores = torch._softmax_backward_data(dp, p, -1, p.dtype)
                dq[:, :, rows] = torch.bmm(d_scores, k[:, :end]).view(B * K, H // K, -1, D)
                dk[:, :end] += torch.bmm(d_scores.mT, q_tile)
            dq = (dq * ctx.scale).view(B, H, T, D)
            dk = dk.to(k.dtype).view(B, K, T, D)
            dv = dv.to(v.dtype).view(B, K, T, D)
        return dq, dk, dv, None


def document_mask(doc_ids: Tensor) -> Tensor:
    """Return the causal mask (B, 1, T, T) in which tokens see only their own document."""
    same_document = doc_ids[:, None, :, None] == doc_ids[:, None, None, :]
    T = doc_ids.size(1)
    return same_document & torch.ones(T, T, dtype=torch.bool, device=doc_ids.device).tril()


def positions_in_document(doc_ids: Tensor) -> Tensor:
    """Return each token's distance from the first token of its document in the row (B, T).

    >>> positions_in_document(torch.tensor([[7, 7, 7, 8, 8]])).tolist()
    [[0, 1, 2, 0, 1]]
    """
    index = torch.arange(doc_ids.size(1), device=doc_ids.device).expand_as(doc_ids)
    is_first = torch.ones_like(doc_ids, dtype=torch.bool)
    is_first[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return index - torch.where(is_first, index, 0).cummax(dim=1).values
