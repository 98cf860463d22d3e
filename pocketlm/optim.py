"""The optimizer, the learning-rate schedule and the gradient clip: torch only, pure where it can be.

`build_optimizer` gives every parameter to exactly one group. Matrices decay, vectors (norm gains) do not. With
`muon`, the matrices inside the blocks follow Muon and everything else AdamW, in one optimizer, as Lightning's
automatic optimization wants it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
from torch import Tensor


def lr_at_step(
    step: int, *, max_steps: int, warmup_steps: int, min_lr_ratio: float, schedule: str
) -> float:
    """Factor on the peak learning rate for optimizer step `step` (0 is the first).

    Linear warm-up reaches 1 at step `warmup_steps`; then `cosine`, `linear` or `constant` down to `min_lr_ratio`
    at `max_steps`.

    >>> [lr_at_step(s, max_steps=10, warmup_steps=2, min_lr_ratio=0.0, schedule="linear") for s in (0, 1, 2, 6, 10)]
    [0.3333333333333333, 0.6666666666666666, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return min_lr_ratio + (1 - min_lr_ratio) * left


def build_optimizer(
    model: nn.Module,
    *,
    optimizer: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    fused: bool,
) -> torch.optim.Optimizer:
    """AdamW, Muon for the blocks' matrices with AdamW for the rest, or SGD with momentum betas[0]."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, p in model.named_parameters():
        muon = optimizer == "muon" and p.dim() == 2 and ".layers." in f".{name}"
        groups[muon, p.dim() >= 2].append(p)
    param_groups = [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "muon": muon}
        for (muon, decays), params in groups.items()
    ]
    assert sum(len(g["params"]) for g in param_groups) == len(list(model.parameters()))
    if optimizer == "sgd":
        return torch.optim.SGD(param_groups, lr=lr, momentum=betas[0], fused=fused)
    kind = MuonAdamW if optimizer == "muon" else torch.optim.AdamW
    return kind(param_groups, lr=lr, betas=betas, eps=eps, fused=fused)


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups marked `muon` follow Muon instead (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Muon's update is the orthogonalised Nesterov momentum, scaled to the size of an AdamW update (Liu et al. 2025,
    arXiv 2502.16982), so that one learning rate and one weight decay serve both.
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every_group = self.param_groups
        self.param_groups = [group for group in every_group if not group["muon"]]
        super().step()
        self.param_groups = every_group
        for group in every_group:
            if group["muon"]:
                self._muon_step(group)
        return loss

    def _muon_step(self, group: dict) -> None:
        same_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                same_shape[p.shape].append(p)
        for shape, params in same_shape.items():
            for p in params:
                if not self.state[p]:  # AdamW's loading asks every state for a step
                    self.state[p].update(
                        step=torch.tensor(0.0), momentum_buffer=torch.zeros_like(p)
                    )
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            grads = [p.grad for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
            updates = orthogonalise(torch.stack(torch._foreach_lerp(grads, momenta, self.momentum)))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(
                params, list(updates.unbind()), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape))
            )


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Map each matrix of (n, rows, cols) towards U V^T of its singular value decomposition, by Newton-Schulz in bf16.

    The quintic's coefficients are Muon's own: singular values end between about 0.67 and 1.15, not at 1. Runs in float32 on MPS.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.float() if matrices.device.type == "mps" else matrices.bfloat16()
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, scale: Tensor | float = 1.0
) -> Tensor:
    """Multiply the gradients by `scale`, then down to a global 2-norm of at most `max_norm` (0: no clip), in one pass.

    Returns the norm after `scale` and before the clip. Nothing waits for the device.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) * scale
    factor = (
        scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if max_norm > 0
        else torch.as_tensor(scale)
    )
    if (
        factor.device.type != "cpu" or factor != 1
    ):  # where a look costs nothing, it may save a pass over all gradients
        torch._foreach_mul_(grads, factor)
    return norm
