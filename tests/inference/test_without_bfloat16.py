"""On a CPU that does not multiply bfloat16, nothing multiplies it, and the results are the same."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.errors import UserError
from pocketlm.evaluation.likelihood import Query, query_likelihoods
from pocketlm.inference import native
from pocketlm.inference.backend import SlotCache, TorchBackend
from pocketlm.inference.native import NATIVE_PREFILL_MAX, NativeBackend
from pocketlm.inference.placement import move_to_device
from pocketlm.instruction_sets import instruction_set
from pocketlm.model import quantization
from pocketlm.model.quantization import quantize, without_bfloat16_products
from tests.support.checkpoints import confident_model, write_checkpoint
from tests.support.weights import exact_logits

PRODUCTS = (
    torch.nn.functional.linear,
    torch.nn.functional.scaled_dot_product_attention,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
    torch._weight_int8pack_mm,
)


class NoBFloat16Products(TorchFunctionMode):
    """Fails at a product of bfloat16 tensors, and counts the others."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            assert all(tensor.dtype != torch.bfloat16 for tensor in args[:2]), func
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_bfloat16(monkeypatch):
    for module in (native, quantization):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda device_type: False)


def prefill(backend, model, ids):
    cache = SlotCache(model.config, 2, 200, dtype=model.dtype, device=model.device)
    backend.prefill(cache, [(1, ids)])
    assert cache.lengths.tolist() == [0, len(ids)]
    return torch.stack([cache.keys, cache.values])[:, :, 1, :, : len(ids)].float()


@torch.inference_mode()
def test_torch_decodes_prefills_and_scores_with_widened_weights():
    """As much as a bfloat16 cache allows: its rounding, 2^-9, is the only one."""
    model = confident_model(position="learned", bias=True, tie_embeddings=False).bfloat16()
    ids = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(1))
    exact = exact_logits(model, ids)[0]
    with NoBFloat16Products() as products:
        backend = TorchBackend(model)
        cache = SlotCache(model.config, 1, 20, dtype=model.dtype, device=model.device)
        backend.prefill(cache, [(0, ids[0, :-1].tolist())])
        logits = backend.decode(cache, [int(ids[0, -1])])
        query = Query(tuple(ids[0, :-1].tolist()), (int(ids[0, -1]),))
        likelihood = query_likelihoods(model, [query])[query]
    assert products.count and logits.dtype == torch.float32
    assert cache.keys.dtype == torch.bfloat16
    assert (logits[0] - exact[-1]).square().mean().sqrt() < 0.01 * exact.std()
    # float32 sums in another order
    assert likelihood.logprob == pytest.approx(
        exact[-2].log_softmax(0)[ids[0, -1]].item(), abs=1e-4
    )


def test_the_widened_model_shares_the_matrices_and_leaves_the_model_alone():
    model = confident_model(position="learned").bfloat16()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    widened = without_bfloat16_products(model)
    after = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert after == before and model.dtype == torch.bfloat16
    matrices = {t.data_ptr() for t in widened.state_dict().values() if t.dtype == torch.bfloat16}
    names = [name for name in before if "proj" in name or "embed_tokens" in name]
    assert matrices == {before[name] for name in names}
    float32 = confident_model()
    assert without_bfloat16_products(float32) is float32


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_long_prompt_is_read_in_c_as_torch_reads_it(kind):
    model = confident_model(max_seq_len=256)
    model = model.bfloat16() if kind == "bfloat16" else quantize(model, kind)
    ids = [i % 61 for i in range(NATIVE_PREFILL_MAX + 20)]
    with NoBFloat16Products() as products:
        in_c = prefill(NativeBackend(model), model, ids)
    assert products.count == 0
    in_torch = prefill(TorchBackend(model), model, ids)
    # bfloat16: keys and values are rounded to 2^-9. int8: activations have 16 bits in C.
    tolerance = 0.01 if kind == "bfloat16" else 1e-3
    assert (in_c - in_torch).square().mean().sqrt() < tolerance * in_torch.std()


def test_an_instruction_set_that_does_not_exist_is_told_in_a_sentence(monkeypatch, tmp_path):
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "a.ckpt"))
    monkeypatch.setenv("POCKETLM_ISA", "avx3")
    instruction_set.cache_clear()
    try:
        with pytest.raises(UserError, match="POCKETLM_ISA=avx3 is no instruction set; this CPU"):
            move_to_device(checkpoint, "cpu", None)
    finally:
        instruction_set.cache_clear()
