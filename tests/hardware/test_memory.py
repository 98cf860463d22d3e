"""The estimate of a run's memory is that of the tensors it counts; the limits of a machine."""

from dataclasses import replace

import pytest
import torch

import train
from model import ModelConfig, Transformer
from pocketlm.config.sections import Config, DataConfig, TrainingConfig
from pocketlm.errors import UserError
from pocketlm.hardware import memory
from pocketlm.hardware.memory import (
    BlockMemory,
    Room,
    available_memory,
    cgroup_rooms,
    check_memory,
    choose_micro_batch,
    estimate_memory,
    memory_errors,
    optimizer_bytes,
)
from pocketlm.model import kernels
from pocketlm.model.loss import batch_loss
from pocketlm.optim import WeightAverage, build_optimizer

LLAMA = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2}
GPT2 = {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "mlp": "gelu", "position": "learned"}
GPT2 |= {"norm": "layernorm", "bias": True}


def config_of(model: dict, **training: object) -> Config:
    sizes = {"seq_len": 48, "micro_batch_size": 2, "loss_chunk": 32, "max_steps": 10} | training
    return Config(
        model=ModelConfig(vocab_size=512, **model),
        training=TrainingConfig(**sizes),
        data=DataConfig(tokenizer="byte"),
    )


# ---- what is counted ----


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize(
    "kind",
    [LLAMA, GPT2 | {"tie_embeddings": False}, LLAMA | {"qk_norm": True, "head_dim": 24}],
    ids=["llama", "gpt2", "qwen3"],
)
def test_the_counts_of_many_layers_are_those_of_the_model(kind, layers):
    config = ModelConfig(vocab_size=512, max_seq_len=48, n_layers=layers, **kind)
    model = Transformer(config)
    assert config.n_parameters == sum(p.numel() for p in model.parameters())
    matrices = [model.head_weight, *(p for p in model.layers.parameters() if p.dim() == 2)]
    width = model.layers[0].self_attn.o_proj.in_features  # of all heads
    flops = 6 * sum(p.numel() for p in matrices) + 6 * layers * width * 48
    assert config.flops_per_token(48) == flops


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize(
    "kind", [LLAMA, GPT2, LLAMA | {"head_dim": 24}], ids=["llama", "gpt2", "wide heads"]
)
@pytest.mark.parametrize("average", [False, True])
def test_the_optimizers_state_has_the_bytes_of_the_real_one(kind, optimizer, average):
    model = Transformer(config_of(kind).model)
    settings = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "fused": True}
    real = build_optimizer(model, optimizer=optimizer, **settings)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    real.step()
    WeightAverage(0.9 if average else 0.0).update(real, 0)
    tensors = [t for state in real.state.values() for t in state.values() if torch.is_tensor(t)]
    estimate = optimizer_bytes(model.config, optimizer, average=average)
    assert estimate == sum(t.nbytes for t in tensors if t.dim())


def saved_bytes(config: Config, bfloat16: bool) -> int:
    """Return the bytes of the tensors that autograd keeps for a batch, but for parameters."""
    model = Transformer(config.model).train()
    own = [*model.parameters(), *model.buffers()]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_sparse and tensor.untyped_storage().data_ptr() not in pointers:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(config.training.micro_batch, config.training.seq_len, dtype=torch.long)
    batch = {"input_ids": ids, "targets": ids, "doc_ids": ids}
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        loss = batch_loss(model, batch, config.training.loss_chunk)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(LLAMA, id="llama"),
        pytest.param(LLAMA | {"dropout": 0.1}, id="dropout"),
        pytest.param(LLAMA | {"head_dim": 24}, id="wide heads"),
        pytest.param(LLAMA | {"attention_bias": "qkv"}, id="qwen2"),
        pytest.param(LLAMA | {"qk_norm": True, "head_dim": 24}, id="qwen3"),
        pytest.param(LLAMA | {"qk_norm": True, "dropout": 0.1}, id="qwen3 with dropout"),
        pytest.param(GPT2, id="gpt2"),
        pytest.param(GPT2 | {"dropout": 0.1}, id="gpt2 with dropout"),
        pytest.param(GPT2 | {"mlp": "relu"}, id="relu"),
        pytest.param(GPT2 | {"mlp": "relu2"}, id="relu2"),
    ],
)
def test_a_block_keeps_the_bytes_that_autograd_keeps(kind, bfloat16):
    """Two per cent: the norms' statistics and biases, a few numbers for each token."""
    two, three = (config_of(kind | {"n_layers": n}) for n in (2, 3))
    real = saved_bytes(three, bfloat16) - saved_bytes(two, bfloat16)
    native = kernels.available(torch.device("cpu"), torch.float32)
    native = native and two.model.is_llama
    counted = BlockMemory(two, 2 if bfloat16 else 4, native).kept()
    assert counted == pytest.approx(real, rel=0.02)


def test_gradient_checkpointing_keeps_the_input_of_each_block():
    two, three = (
        config_of(LLAMA | {"n_layers": n, "gradient_checkpointing": True}) for n in (2, 3)
    )
    real = saved_bytes(three, bfloat16=False) - saved_bytes(two, bfloat16=False)
    estimates = [estimate_memory(config, "cpu", "32-true") for config in (two, three)]
    assert estimates[1].activations - estimates[0].activations == real


# ---- what there is ----


def test_the_limits_of_a_control_group_are_found_in_both_versions(tmp_path):
    mount, groups = tmp_path / "cgroup", tmp_path / "groups"
    groups.write_text("4:memory:/docker/abc\n0::/slice/job\n")
    old, new = mount / "memory/docker/abc", mount / "slice/job"
    for folder, names in ((old, ("limit_in_bytes", "usage_in_bytes")), (new, ("max", "current"))):
        folder.mkdir(parents=True)
        for name, number in zip(names, (1000, 600), strict=True):
            (folder / f"memory.{name}").write_text(f"{number}\n")
    (old / "memory.stat").write_text("total_inactive_file 100\n")
    (mount / "slice/memory.max").write_text("max\n")
    (mount / "slice/memory.current").write_text("5\n")
    rooms = cgroup_rooms(groups, mount)
    assert [(room.total, room.free) for room in rooms] == [(1000, 500), (1000, 400)]
    assert cgroup_rooms(tmp_path / "none", mount) == []


def test_a_limit_of_the_address_space_is_a_limit_of_the_memory(monkeypatch):
    held = memory.psutil.Process().memory_info()
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (held.vms + 10**8, -1))
    room = available_memory("cpu")
    assert room.free <= 10**8 + 10**7 and room.limited_by == "ulimit -v leaves this process"
    # what the process has already is not counted twice
    assert room.total - room.free == pytest.approx(held.rss, rel=0.1)


def test_a_model_that_cannot_fit_is_refused_before_its_text_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "prepare", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model: {d_model: 131072, n_layers: 1000}\n")
    with pytest.raises(UserError, match=r"needs about [0-9,]+ GB of memory, and .* has"):
        train.main(["--config", "c.yaml", "hardware.accelerator=cpu", "--dry-run"])


def test_the_refusal_says_what_to_change(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda _: Room(10, 10, "this machine has"))
    advice = (
        "training.micro_batch_size=1 with training.grad_accum_steps=2 has the same batch; "
        "model.gradient_checkpointing=true"
    )
    with pytest.raises(UserError, match=advice):
        check_memory(config_of(LLAMA), "cpu", "32-true")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    ],
)
def test_running_out_of_memory_ends_in_advice(error):
    expected = r"memory has run out .*training\.micro_batch_size=1"
    with pytest.raises(UserError, match=expected), memory_errors(config_of(LLAMA)):
        raise error


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes"), memory_errors(config_of(LLAMA)):
        raise RuntimeError("the shapes do not fit")


# ---- micro_batch_size: auto ----


def test_the_largest_micro_batch_that_fits_keeps_the_rows_of_a_step(monkeypatch):
    auto = config_of(LLAMA, micro_batch_size="auto", grad_accum_steps=3)
    totals = {
        rows: estimate_memory(auto.with_micro_batch(rows), "cpu", "32-true").total
        for rows in (1, 2, 3, 4, 6, 8, 12, 24)
    }
    for rows, total in totals.items():
        room = Room(10**12, int(total / memory.SAFE_SHARE) + 1, "this machine has")
        monkeypatch.setattr(memory, "available_memory", lambda _, room=room: room)
        training = choose_micro_batch(auto, "cpu", "32-true", None).training
        assert (training.micro_batch, training.grad_accum_steps) == (rows, 24 // rows)


def test_a_resumed_run_keeps_its_micro_batch(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda _: Room(10**12, 10**12, ""))
    auto = config_of(LLAMA, micro_batch_size="auto")
    assert choose_micro_batch(auto, "cpu", "32-true", 2).training.micro_batch == 2
    assert choose_micro_batch(auto, "cpu", "32-true", 3).training.micro_batch == 8
    assert replace(auto.training, micro_batch_size=4).micro_batch == 4
