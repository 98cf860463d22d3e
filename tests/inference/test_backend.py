"""Decode backends: C and torch compute what the model computes without a cache."""

import pytest
import torch
from torch import Tensor

from model import KVCache
from pocketlm.config.sampling import SamplingParams
from pocketlm.inference.backend import SlotCache, TorchBackend
from pocketlm.inference.engine import Engine, GenerationRequest
from pocketlm.inference.native import NativeBackend
from pocketlm.inference.native_library import load_library
from pocketlm.model.rope import RopeScaling
from pocketlm.native_build import NativeUnavailable
from tests.support.checkpoints import confident_model

ARCHITECTURES = {  # of the presets and of the models that convert.py reads
    "llama": dict(),
    "llama with biases, its own head": dict(bias=True, tie_embeddings=False),
    "qwen2": dict(attention_bias="qkv"),
    "qwen3": dict(qk_norm=True, head_dim=24, n_kv_heads=1),
    "qwen3 with odd widths": dict(qk_norm=True, head_dim=10, d_model=36, norm_gain=False),
    "yarn": dict(rope_scaling=RopeScaling("yarn", 4.0, original_max_seq_len=10)),
    "odd widths": dict(d_model=36, d_ff=50, n_heads=6, n_kv_heads=1, vocab_size=67),
    "gpt2": dict(mlp="gelu", position="learned", norm="layernorm", bias=True, n_kv_heads=None),
    "nanogpt": dict(mlp="gelu_exact", position="learned", norm="layernorm", n_kv_heads=None),
    "microgpt": dict(
        mlp="relu",
        position="learned",
        norm_gain=False,
        embed_norm=True,
        final_norm=False,
        n_kv_heads=None,
        d_model=16,
    ),
    "randygpt": dict(
        mlp="relu2", position="learned", norm_gain=False, final_norm=False, n_kv_heads=None
    ),
}


def random_ids(batch: int, length: int) -> Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_in_c_and_one_in_torch_equal_the_model_without_a_cache(architecture, dtype):
    """Slots have different lengths. The reference computes in float32 with the same weights."""
    model = confident_model(**ARCHITECTURES[architecture]).to(dtype)
    exact = confident_model(**ARCHITECTURES[architecture]).to(dtype).float()
    ids = random_ids(5, 30)
    # float32: sums of some 100 terms in another order. bfloat16: some ten roundings by 2^-9 of a
    # value, which add up
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.inference_mode():
        expected = exact(ids)
        for backend in (NativeBackend(model), TorchBackend(model)):
            cache = SlotCache(model.config, 7, 40, dtype=dtype, device=model.device)
            for b in range(5):
                model.hidden(ids[b : b + 1, : 3 * b + 1], cache=cache.slot(b))
                cache.lengths[b] = 3 * b + 1
            for step in range(12):
                at = cache.lengths[:5].clone()
                logits = backend.decode(cache, ids[range(5), at].tolist()).float()
                error = (logits - expected[range(5), at]).square().mean().sqrt() / expected.std()
                assert error < tolerance, (backend.name, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logits_of_a_row_in_c_are_the_same_to_the_last_bit_whatever_the_batch(dtype):
    model = confident_model(d_model=96, d_ff=200, n_heads=6).to(dtype)
    backend, ids = NativeBackend(model), random_ids(11, 9)

    def logits_of(size: int) -> Tensor:
        cache = SlotCache(model.config, size, 16, dtype=dtype, device=model.device)
        steps = [backend.decode(cache, ids[:size, t].tolist()) for t in range(9)]
        return torch.stack(steps, dim=1)

    together = logits_of(11)
    for size in range(1, 11):
        assert torch.equal(logits_of(size), together[:size])


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_no_bit(threads):
    """Every thread reads what the others have written."""
    model, results, before = confident_model(n_layers=6), [], torch.get_num_threads()
    steps = random_ids(40, 7).tolist()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            backend = NativeBackend(model)
            cache = SlotCache(model.config, 7, 64, dtype=torch.float32, device=model.device)
            results.append(torch.stack([backend.decode(cache, tokens) for tokens in steps]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_keys_and_values_written_in_c_are_those_of_the_model():
    model, ids = confident_model(), random_ids(1, 20)
    ours = SlotCache(model.config, 1, 20, dtype=torch.float32, device=model.device)
    theirs = KVCache(model.config, 1, 20, dtype=torch.float32, device=model.device)
    backend = NativeBackend(model)
    for token in ids[0].tolist():
        backend.decode(ours, [token])
    with torch.inference_mode():
        model.hidden(ids, cache=theirs)
    # float32 sums in another order
    torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-5, atol=1e-5)


def greedy_tokens(engine: Engine) -> list[int]:
    engine.add(GenerationRequest([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=20)))
    tokens = []
    while engine.busy:
        tokens += [token.id for token in engine.step()]
    return tokens


def test_without_a_compiler_torch_steps_and_the_reason_is_told(monkeypatch, tmp_path):
    model = confident_model()
    native = Engine(model, 1)
    assert isinstance(native.backend, NativeBackend)
    expected = greedy_tokens(native)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    engine = Engine(model, 1)
    assert type(engine.backend) is TorchBackend
    assert "no C compiler" in engine.backend.fallback_reason
    assert greedy_tokens(engine) == expected


def test_a_compiler_that_fails_and_a_model_that_does_not_fit_are_reasons(monkeypatch, tmp_path):
    with pytest.raises(NativeUnavailable, match="float16"):
        NativeBackend(confident_model().half())
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NativeUnavailable, match="does not compile decode.c.*: no such thing"):
        load_library()
