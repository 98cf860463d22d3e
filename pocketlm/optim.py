"""The optimizers, the learning-rate schedule and gradient clipping, in torch only.

`build_optimizer` puts every parameter into exactly one group. Weight decay applies to matrices and
not to vectors (norm gains, biases). With `muon`, the matrices of the blocks are updated by Muon and
everything else by AdamW, in one optimizer, as Lightning's automatic optimization needs it.
`WeightAverage` keeps an average of the weights in the state of any of them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from pocketlm.instruction_sets import multiplies_bfloat16

# Liu et al. 2025 (arXiv 2502.16982): this makes the RMS of an update that of AdamW's.
MUON_UPDATE_SCALE = 0.2

# Coefficients of the quintic Newton-Schulz iteration, tuned for Muon by Jordan et al. 2024.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def lr_at_step(
    step: int,
    *,
    max_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    schedule: str,
    decay_share: float = 1.0,
) -> float:
    """Return the factor on the peak learning rate for optimizer step `step` (the first is 0).

    Linear warm-up reaches 1 at step `warmup_steps`. From there, `cosine` and `linear` fall to
    `min_lr_ratio` at `max_steps`, and `constant` stays at 1. `wsd` (warm-up, stable, decay: Hu et
    al. 2024, arXiv 2404.06395) stays at 1 and falls, linearly, in the last `decay_share` of the
    steps.

    >>> length = dict(max_steps=10, warmup_steps=2, min_lr_ratio=0.0)
    >>> [lr_at_step(step, **length, schedule="linear") for step in (0, 1, 2, 6, 10)]
    [0.3333333333333333, 0.6666666666666666, 1.0, 0.5, 0.0]
    >>> [lr_at_step(step, **length, schedule="wsd", decay_share=0.4) for step in (2, 6, 8, 10)]
    [1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    start = warmup_steps
    if schedule == "wsd":
        start = max(start, max_steps - round(decay_share * max_steps))
    progress = min(1.0, max(0, step - start) / max(1, max_steps - start))
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_lr_ratio + (1 - min_lr_ratio) * decay


def build_optimizer(
    model: nn.Module,
    *,
    optimizer: str,
    lr: float | Mapping[str, float],
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    fused: bool,
) -> torch.optim.Optimizer:
    """Return AdamW, Muon with AdamW (see `MuonAdamW`), or SGD with momentum betas[0].

    lr: a rate for all, or one for each key of `lr_key` that has its own, and `lr` for the others.
    """
    rates = lr if isinstance(lr, Mapping) else {"lr": lr}
    params_by_kind: dict[tuple[str, bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, p in model.named_parameters():
        key = lr_key(name, p) if lr_key(name, p) in rates else "lr"
        uses_muon = optimizer == "muon" and lr_key(name, p) == "matrix_lr"
        params_by_kind[key, uses_muon, p.dim() >= 2].append(p)
    groups: list[dict[str, Any]] = [
        {
            "params": params,
            "lr": rates[key],
            "lr_key": key,
            "weight_decay": weight_decay if decays else 0.0,
            "muon": uses_muon,
        }
        for (key, uses_muon, decays), params in params_by_kind.items()
    ]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    if optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=betas[0], fused=fused)
    optimizer_class = MuonAdamW if optimizer == "muon" else torch.optim.AdamW
    return optimizer_class(groups, betas=betas, eps=eps, fused=fused)


def lr_key(name: str, parameter: nn.Parameter) -> str:
    """Return the key of the learning rate of a parameter of `Transformer`, by its name in there.

    >>> matrix = nn.Parameter(torch.zeros(2, 2))
    >>> [lr_key(name, matrix) for name in ("embed_tokens.weight", "layers.0.mlp.up_proj.weight")]
    ['embed_lr', 'matrix_lr']
    """
    if parameter.dim() < 2:
        return "vector_lr"
    if ".layers." in f".{name}":
        return "matrix_lr"
    return "head_lr" if "lm_head" in name else "embed_lr"


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups marked `muon` are updated by Muon instead.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the Nesterov
    momentum. Its update is scaled to the size of an AdamW update (Liu et al. 2025, arXiv
    2502.16982), so that one learning rate and one weight decay serve both.
    """

    momentum = 0.95  # decay per step; Jordan et al. 2024
    in_float32 = False  # whether to orthogonalise in float32 where the device has bfloat16 too

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
            momenta = [own_rows(self.state[p]["momentum_buffer"]) for p in params]
            grads = [own_rows(p.grad) for p in params if p.grad is not None]
            torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
            nesterov = torch._foreach_lerp(grads, momenta, self.momentum)
            orthogonalise = partial(newton_schulz, in_float32=self.in_float32)
            if is_divided(params[0]):
                updates = on_whole_matrices(nesterov, shape, orthogonalise)
            else:
                updates = list(orthogonalise(torch.stack(nesterov)).unbind())
            own = [own_rows(p) for p in params]
            step_size = group["lr"] * MUON_UPDATE_SCALE * math.sqrt(max(shape))
            torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(own, updates, alpha=-step_size)


# ---- matrices of which each process has some rows ----


def is_divided(tensor: Tensor) -> bool:
    """Return whether FSDP has divided a tensor among the processes."""
    return hasattr(tensor, "to_local")  # of DTensor, whose import takes a second


def own_rows(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this process has: all of them, without FSDP."""
    rows: Tensor = cast(Any, tensor).to_local() if is_divided(tensor) else tensor
    return rows


def on_whole_matrices(
    own: Sequence[Tensor], shape: torch.Size, function: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Apply a function of whole matrices (n, rows, columns) to matrices of this one shape.

    own: the rows of each that this process has. Process r puts matrices r, r + W, ... together and
    computes their part: two exchanges of all rows, and a W-th of the arithmetic.
    """
    count, (rows, columns) = dist.get_world_size(), shape
    size, each = -(-rows // count), -(-len(own) // count)  # most rows, and matrices, of a process
    sent = own[0].new_zeros(each, count, size, columns)  # matrix n is at [n // W, n % W]
    for number, part in enumerate(own):
        sent[divmod(number, count)][: len(part)] = part
    parts = exchange(sent.transpose(0, 1))  # (process, matrix, its rows, columns)
    whole = parts.transpose(0, 1).reshape(each, count * size, columns)[:, :rows]
    result = F.pad(function(whole), (0, 0, 0, count * size - rows))
    back = exchange(result.view(each, count, size, columns).transpose(0, 1))
    return [back[number % count, number // count, : len(part)] for number, part in enumerate(own)]


def exchange(tensors: Tensor) -> Tensor:
    """Send tensors[r] to each process r; return what the processes have sent to this one."""
    received = torch.empty_like(tensors, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, tensors.contiguous())
    return received


class WeightAverage:
    """An exponential moving average of the weights, kept in the optimizer's state.

    There it is saved, restored and divided among processes like AdamW's moments. To be used, it
    changes places with the weights. A checkpoint is saved in this state: its weights are the
    average, and the average in its optimizer are the weights with which training goes on.
    """

    STATE = "average"

    def __init__(self, decay: float):
        self.decay = decay  # per step; 0: no average
        self.in_model = False  # whether the average and the weights have changed places

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Begin or go on with training; a restored model has the average as its weights."""
        self.in_model = any(self.STATE in state for state in optimizer.state.values())
        self.place(optimizer, in_model=False)

    def update(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Move the average towards the weights after optimizer step `step` (the first is 0).

        Early in a run the decay is lower, so that the average forgets the initial weights.
        """
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        weights, averages = [], []
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            state = optimizer.state[p]
            # AdamW begins a state only if there is none yet
            if state or isinstance(optimizer, torch.optim.SGD):
                if self.STATE not in state:
                    state[self.STATE] = p.detach().clone()
                weights.append(p.data)
                averages.append(state[self.STATE])
        if weights:  # there are none while every step has been left out
            torch._foreach_lerp_(averages, weights, 1 - decay)

    def place(self, optimizer: torch.optim.Optimizer, *, in_model: bool) -> None:
        """Have the average in the model, or the weights."""
        if in_model != self.in_model:
            for p, state in optimizer.state.items():
                if self.STATE in state:
                    weights = p.detach().clone()
                    p.data.copy_(state[self.STATE])
                    state[self.STATE].copy_(weights)
            self.in_model = in_model


def newton_schulz(matrices: Tensor, steps: int = 5, *, in_float32: bool = False) -> Tensor:
    """Orthogonalise each matrix of (n, rows, cols): map U S V^T to about U V^T.

    This is Muon's quintic Newton-Schulz iteration (Jordan et al. 2024), in bfloat16 where the
    device multiplies it and in float32 elsewhere, or always with `in_float32`. With its
    coefficients, singular values end between about 0.67 and 1.15, not at 1.
    """
    native = multiplies_bfloat16(matrices.device.type) and not in_float32
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
    with_grad = [p for p in parameters if p.grad is not None]
    grads = [own_rows(p.grad) for p in with_grad if p.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if is_divided(with_grad[0]):
        square = norm.square()
        dist.all_reduce(square)
        norm = square.sqrt()
    norm = norm * scale
    if max_norm > 0:
        factor = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    else:
        factor = torch.as_tensor(scale)
    # On a CPU, reading the factor costs nothing and may save the pass over all gradients.
    if factor.device.type != "cpu" or factor != 1:
        torch._foreach_mul_(grads, factor)
    return norm
