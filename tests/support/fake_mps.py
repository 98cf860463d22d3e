"""Apple's GPU, as far as a machine without one can simulate it.

Code runs on the CPU (or on meta tensors) and takes its branches for MPS:

- `OnMps` intercepts torch's Python functions. Every tensor says that it is on MPS, and tensors that
  are created there are created on the CPU or on meta instead. Arguments of attention are checked
  for the forms that MPS computes wrongly.
- `Guard` intercepts torch's operators, one level lower, after autograd. It raises AssertionError
  for an operator that MPS lacks (tests/support/mps_ops.json lists what the headers of torch 2.13's
  macOS wheel register), for float64 and complex tensors, for matmuls with an inner dimension at or
  above MPS_INNER_LIMIT, and for a tensor on the wrong device. It records dtypes and inner
  dimensions.
- `on_mps` combines both.
- `WrongOperators` and `wrong_attention` are the opposite: a device that computes wrongly, to test
  the self-check of pocketlm/hardware/mps_check.py.

The two base classes are torch's own hooks for such interception. Two private functions of torch
are used, because there is no public equivalent: one says whether an operator is composed of others,
and `_disable_current_modes` (re-exported as `without_interception`) suspends the interception.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_interception
from torch.utils._pytree import tree_leaves

from model import MPS_INNER_LIMIT

__all__ = [
    "MATMULS",
    "Guard",
    "OnMps",
    "WrongOperators",
    "on_mps",
    "sums_too_far",
    "without_interception",
    "wrong_attention",
]

MPS_OPS = set(json.loads(Path(__file__).with_name("mps_ops.json").read_text()))
aten = torch.ops.aten
MATMULS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)


# ---- a device that is watched ----


class OnMps(TorchFunctionMode):
    """Tensors say that they are on MPS; those created there are created on `device`."""

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func == Tensor.device.__get__:
            return torch.device("mps")
        if func is F.scaled_dot_product_attention:
            check_attention(*args, **kwargs)
        moved = {name: self.moved(value) for name, value in (kwargs or {}).items()}
        return func(*map(self.moved, args), **moved)

    def moved(self, value: Any) -> Any:
        is_mps = isinstance(value, str | torch.device) and str(value) == "mps"
        return self.device if is_mps else value


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    **options: bool,
) -> None:
    """Fail for a form of attention that MPS has computed wrongly."""
    is_causal = options["is_causal"]
    assert all(x.is_contiguous() for x in (q, k, v)), "strided input to attention"
    assert not options["enable_gqa"] and q.size(1) == k.size(1) == v.size(1), "grouped heads"
    half = q.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled("mps")
    assert not (is_causal and half), "is_causal in half precision"
    assert not is_causal or q.size(2) == k.size(2), "is_causal of unequal lengths"


class Guard(TorchDispatchMode):
    """Fails for an operator that MPS lacks or computes wrongly; records dtypes and matmul sizes."""

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.device = device
        self.inner: set[int] = set()  # inner dimensions of matmuls
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_composite(func, "Implicit"):  # in inference mode these arrive undecomposed
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = func.overloadpacket.__name__
        known = func.namespace != "aten" or is_registered(name) or is_composite(func, "Explicit")
        assert known, f"MPS has no {name}"
        if func.overloadpacket in MATMULS:
            inner = args[-1].size(-2)
            assert inner < MPS_INNER_LIMIT, f"{name} with an inner dimension of {inner}"
            self.inner.add(inner)
        result = func(*args, **kwargs)
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor):
                self.check_tensor(value, name)
        return result

    def check_tensor(self, tensor: Tensor, name: str) -> None:
        unsupported = tensor.dtype == torch.float64 or tensor.is_complex()
        assert not unsupported, f"{name} of {tensor.dtype}"
        self.dtypes.add(tensor.dtype)
        assert tensor.is_meta == (self.device == "meta"), f"{name} on the wrong device"


def is_registered(name: str) -> bool:
    """Return whether MPS has the operator; one over a list of tensors is that of each of them."""
    single = name.removeprefix("_foreach_").removesuffix("_")
    return not {name, name.removesuffix("_"), single}.isdisjoint(MPS_OPS)


def is_composite(func: Any, kind: str) -> bool:
    """Return whether the operator is composed of others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), f"Composite{kind}Autograd")


@contextmanager
def on_mps(device: str = "cpu") -> Iterator[Guard]:
    """Run code as on MPS, with the decomposed attention that training there uses."""
    with OnMps(device), Guard(device) as guard, sdpa_kernel(SDPBackend.MATH):
        yield guard


# ---- a device that computes wrongly ----


class WrongOperators(TorchDispatchMode):
    """Calls `replacement(operator, its arguments...)` in place of some operators."""

    def __init__(self, replacement: Callable, *operators: Any):
        super().__init__()
        self.replacement, self.operators = replacement, operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.overloadpacket in self.operators:
            return self.replacement(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def wrong_attention(replacement: Callable) -> Iterator[None]:
    """Call `replacement(attention, q, k, v, ...)` in place of attention."""
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda *args, **kwargs: replacement(original, *args, **kwargs)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def sums_too_far(matmul: Callable, *args: Any) -> Tensor:
    """Compute a matmul as M1 and M2 do: from 32,767 terms on, a sum includes the memory behind."""
    *rest, a, b = args
    if a.size(-1) < MPS_INNER_LIMIT:
        return matmul(*args)
    shape = (*b.shape[:-2], 1, b.size(-1))
    behind = b.as_strided(shape, b.stride(), b.storage_offset() + b.size(-2) * b.stride(-2))
    a_and_more = torch.cat([a, a[..., :1]], dim=-1)
    return matmul(*rest, a_and_more, torch.cat([b, behind], dim=-2))
