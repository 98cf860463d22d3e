"""Devices and dtypes of all tensors that the model and the optimizer create."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import KVCache, ModelConfig, Transformer
from pocketlm.optim import build_optimizer, clip_gradients
from tests.support.models import PACKED, TINY, T, mean_loss, random_ids, random_model

optimizers = pytest.mark.parametrize("optimizer", ["adamw", "muon"])
SETTINGS = dict(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


@pytest.fixture
def meta() -> torch.device:
    """Return a device that is not the CPU on every machine; mixing the two is an error."""
    return torch.device("meta")


class TensorRecorder(TorchDispatchMode):
    """Records the dtype and the device of every tensor that an operation returns.

    `created` has, for each pair of them, the first operation that returned one.
    """

    def __init__(self, scalars: bool = True) -> None:
        super().__init__()
        self.scalars = scalars
        self.created: dict[tuple[torch.dtype, str], str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (self.scalars or tensor.dim() > 0):
                self.created.setdefault((tensor.dtype, tensor.device.type), str(func))
        return result

    @property
    def devices(self) -> set[str]:
        return {device for _, device in self.created}


@optimizers
@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_makes_every_tensor_on_the_device_of_its_inputs(
    meta: torch.device, optimizer: str, packed: bool
) -> None:
    """Except AdamW's counters of steps, scalars that are on the CPU by design."""
    with meta:
        model = Transformer(ModelConfig(**TINY))
    ids = random_ids().to(meta)
    stepper = build_optimizer(model, optimizer=optimizer, fused=False, **SETTINGS)
    with TensorRecorder() as recorder:
        mean_loss(model(ids, doc_ids=PACKED.to(meta) if packed else None), ids).backward()
        clip_gradients(model.parameters(), 1.0)
    with TensorRecorder(scalars=False) as step_recorder:
        stepper.step()
    assert recorder.devices == {"meta"}, recorder.created
    assert step_recorder.devices == {"meta"}, step_recorder.created
    assert all(p.grad.device.type == "meta" for p in model.parameters())


@torch.no_grad()
def test_cached_chunks_make_every_tensor_on_the_device_of_their_inputs(meta: torch.device) -> None:
    with meta:
        model = Transformer(ModelConfig(**TINY))
    ids = random_ids().to(meta)
    cache = KVCache(model.config, 2, T, dtype=torch.float32, device=meta)
    with TensorRecorder() as recorder:
        for piece in ids.split([5, 7, 1], dim=1):
            logits = model(piece, cache=cache)
    assert recorder.devices == {"meta"}, recorder.created
    assert logits.shape == (2, 1, TINY["vocab_size"])


@optimizers
def test_a_float32_training_step_makes_no_float64_and_no_complex_tensor(optimizer: str) -> None:
    """MPS has neither. There, attention is decomposed into the operations of the math kernel."""
    with sdpa_kernel(SDPBackend.MATH), TensorRecorder() as recorder:
        model, ids = random_model(), random_ids()
        stepper = build_optimizer(model, optimizer=optimizer, fused=True, **SETTINGS)
        mean_loss(model(ids, doc_ids=PACKED), ids).backward()
        clip_gradients(model.parameters(), 1.0)
        stepper.step()
    dtypes = {dtype for dtype, _ in recorder.created}
    assert torch.float32 in dtypes
    assert torch.float64 not in dtypes, recorder.created
    assert not any(dtype.is_complex for dtype in dtypes), recorder.created


def test_a_model_built_on_meta_is_whole_after_its_weights_and_tables_are_set() -> None:
    expected, ids = random_model(), random_ids()
    with torch.device("meta"):
        model = Transformer(expected.config)
    model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict())
    model.reset_tables()
    assert torch.equal(model(ids), expected(ids))
