"""The optimizers, the learning-rate schedule and gradient clipping, in torch only.

`build_optimizer` puts every parameter into exactly one group. Weight decay applies to matrices and
not to vectors (norm gains, biases). With `muon`, the matrices of the blocks are updated by Muon and
everything else by AdamW, in one optimizer, as Lightning's automatic optimization needs it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from pocketlm.instruction_sets import multiplies_bfloat16

MUON_MOMENTUM = 0.95  # Jordan et al. 2024

# Liu et al. 2025 (arXiv 2502.16982): this makes the RMS of an update that of AdamW's.
MUON_UPDATE_SCALE = 0.2

# Coefficients of the quintic Newton-Schulz iteration, tuned for Muon by Jordan et al. 2024.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def lr_at_step(
    step: int, *, max_steps: int, warmup_steps: int, min_lr_ratio: float, schedule: str
) -> float:
    """Return the factor on the peak learning rate for optimizer step `step` (the first is 0).

    Linear warm-up reaches 1 at step `warmup_steps`. From there, `cosine` and `linear` fall to
    `min_lr_ratio` at `max_steps`, and `constant` stays at 1.

    >>> length = dict(max_steps=10, warmup_steps=2)
    >>> [lr_at_step(s, **length, min_lr_ratio=0.0, schedule="linear") for s in (0, 1, 2, 6, 10)]
    [0.3333333333333333, 0.6666666666666666, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_lr_ratio + (1 - min_lr_ratio) * decay


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
    """Return AdamW, Muon with AdamW (see `MuonAdamW`), or SGD with momentum betas[0]."""
    params_by_kind: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, p in model.named_parameters():
        uses_muon = optimizer == "muon" and p.dim() == 2 and ".layers." in f".{name}"
        params_by_kind[uses_muon, p.dim() >= 2].append(p)
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "muon": uses_muon}
        for (uses_muon, decays), params in params_by_kind.items()
    ]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=betas[0], fused=fused)
    optimizer_class = MuonAdamW if optimizer == "muon" else torch.optim.AdamW
    return optimizer_class(groups, lr=lr, betas=betas, eps=eps, fused=fused)


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups marked `muon` are updated by Muon instead.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the Nesterov
    momentum. Its update is scaled to the size of an AdamW update (Liu et al. 2025, arXiv
    2502.16982), so that one learning rate and one weight decay serve both.
    """

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's types allow closures that return a float only
        self, closure: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        all_groups = self.param_groups
        self.param_groups = [group for group in all_groups if not group["muon"]]
        super().step()
        self.param_groups = all_groups
        for group in all_groups:
            if group["muon"]:
                self._muon_step(group)
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        """Update the matrices of a group; those of the same shape are stacked and done at once."""
        params_by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                params_by_shape[p.shape].append(p)
        for shape, params in params_by_shape.items():
            for p in params:
                if not self.state[p]:
                    # AdamW's load_state_dict requires that every state has a step.
                    self.state[p]["step"] = torch.tensor(0.0)
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            grads = [p.grad for p in params if p.grad is not None]
            torch._foreach_lerp_(momenta, grads, 1 - MUON_MOMENTUM)
            nesterov = torch._foreach_lerp(grads, momenta, MUON_MOMENTUM)
            updates = newton_schulz(torch.stack(nesterov))
            step_size = group["lr"] * MUON_UPDATE_SCALE * math.sqrt(max(shape))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(updates.unbind()), alpha=-step_size)


def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalise each matrix of (n, rows, cols): map U S V^T to about U V^T.

    This is Muon's quintic Newton-Schulz iteration (Jordan et al. 2024), in bfloat16 where the
    device multiplies it and in float32 elsewhere. With its coefficients, singular values end
    between about 0.67 and 1.15, not at 1.
    """
    native = multiplies_bfloat16(matrices.device.type)
    x: Tensor = matrices.bfloat16() if native else matrices.float()
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    iterate = iterate_gram if x.dtype == torch.float32 and x.size(-2) < x.size(-1) else iterate_x
    result = iterate(x, steps) if wide else iterate(x, steps).mT
    return result.to(matrices.dtype)


def iterate_x(x: Tensor, steps: int) -> Tensor:
    """Apply x -> a x + (b gram + c gram gram) x, with gram = x x^T, `steps` times."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def iterate_gram(x: Tensor, steps: int) -> Tensor:
    """Compute `iterate_x` by iterating gram, which is smaller than x, and the product of factors.

    A step is x -> p x with a matrix p that commutes with gram: gram -> p gram p. The error in the
    smallest singular values needs float32.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    gram = x @ x.mT
    identity = torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device)
    product: Tensor | None = None
    for step in range(steps):
        p = a * identity + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = p if product is None else p @ product
        if step < steps - 1:
            gram = p @ gram @ p
    return x if product is None else product @ x


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, scale: Tensor | float = 1.0
) -> Tensor:
    """Multiply the gradients by `scale`, then clip their global 2-norm to `max_norm` (0: no clip).

    Return the norm after `scale` and before the clip. All gradients are written once, and nothing
    waits for the device.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) * scale
    if max_norm > 0:
        factor = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    else:
        factor = torch.as_tensor(scale)
    # On a CPU, reading the factor costs nothing and may save the pass over all gradients.
    if factor.device.type != "cpu" or factor != 1:
        torch._foreach_mul_(grads, factor)
    return norm
