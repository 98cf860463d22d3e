"""Scaled dot-product attention, as each device does it well: one function, `attend`.

torch's own kernel serves, but for two cases: training in bfloat16 on a CPU, where its backward pass is slow
(`TiledAttention` below takes its place), and MPS, where some of its kernels have been wrong.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128  # query rows that are multiplied with all keys up to their own; of 32 to 256 the fastest on a Zen 4


LONGEST = 1024  # rows, beyond which keeping every probability for the backward pass takes more memory than it is worth


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D), H a multiple of K -> (B, H, T, D).

    A mask of None means causal, for T == S, or no restriction, for T == 1; True in it lets a token see another.
    """
    device, dtype = q.device.type, q.dtype
    if (
        device == "mps"
    ):  # its kernels have been wrong for strided inputs and for grouped heads: give them neither
        groups = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if (
            mask is None and q.size(2) > 1 and dtype != torch.float32
        ):  # is_causal has leaked the future in half precision
            mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    trains = torch.is_grad_enabled() and q.size(2) == k.size(2) <= LONGEST and not dropout
    if device == "cpu" and dtype == torch.bfloat16 and trains:
        return TiledAttention.apply(q, k, v, mask)
    causal, grouped = mask is None and q.size(2) > 1, q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal, enable_gqa=grouped
    )


class TiledAttention(torch.autograd.Function):
    """Causal attention in `TILE` query rows at a time: no row is multiplied with a tile of keys that all lie in its future.

    The softmax of each tile is kept for the backward pass, in the dtype of q; inside, it is computed in float32.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        (B, H, T, D), K = q.shape, k.size(1)
        ctx.scale = 1 / math.sqrt(D)
        with torch.autocast(q.device.type, enabled=False):
            q = (q * ctx.scale).reshape(
                B * K, H // K, T, D
            )  # the heads of a group share a product with their keys
            k, v = k.reshape(B * K, T, D), v.reshape(B * K, T, D)
            y = torch.empty_like(q)
            tiles = []
            for start in range(0, T, TILE):
                rows = slice(start, end := min(start + TILE, T))
                score = torch.bmm(q[:, :, rows].flatten(1, 2), k[:, :end].mT).view(B, H, -1, end)
                if mask is None:
                    score[..., start:] += torch.full(
                        (end - start, end - start), -torch.inf, dtype=score.dtype
                    ).triu(1)
                else:
                    score.masked_fill_(~mask[:, :, rows, :end], -torch.inf)
                p = score.softmax(-1).view(B * K, -1, end)
                y[:, :, rows] = torch.bmm(p, v[:, :end]).view(B * K, H // K, -1, D)
                tiles.append(p)
        ctx.save_for_backward(q, k, v, *tiles)
        return y.view(B, H, T, D)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *tiles = ctx.saved_tensors
        (B, H, T, D), K = dy.shape, k.size(0) // dy.size(0)
        with torch.autocast(dy.device.type, enabled=False):
            dy = dy.reshape(q.shape)
            sums = torch.promote_types(
                k.dtype, torch.float32
            )  # keys and values are summed over tiles
            dq, dk, dv = (
                torch.empty_like(q),
                torch.zeros_like(k, dtype=sums),
                torch.zeros_like(v, dtype=sums),
            )
            for start, p in zip(range(0, T, TILE), tiles, strict=True):
                rows, end = slice(start, start + TILE), p.size(-1)
                q_tile, dy_tile = q[:, :, rows].flatten(1, 2), dy[:, :, rows].flatten(1, 2)
                dv[:, :end] += torch.bmm(p.mT, dy_tile)
                d_score = torch._softmax_backward_data(
                    torch.bmm(dy_tile, v[:, :end].mT), p, -1, p.dtype
                )
                dq[:, :, rows] = torch.bmm(d_score, k[:, :end]).view(B * K, H // K, -1, D)
                dk[:, :end] += torch.bmm(d_score.mT, q_tile)
            return (
                (dq * ctx.scale).view(B, H, T, D),
                dk.to(k.dtype).view(B, K, T, D),
                dv.to(v.dtype).view(B, K, T, D),
                None,
            )
