"""The plan for several devices: memory, communication, time and cost, worked by hand."""

from dataclasses import replace

import pytest

from model import ModelConfig, Transformer
from pocketlm.config.sections import Config, HardwareConfig, TrainingConfig
from pocketlm.errors import UserError
from pocketlm.hardware.memory import communication_buffers, estimate_memory
from pocketlm.hardware.scaling import (
    CARDS,
    MODEL_FLOPS_SHARE,
    Card,
    Target,
    assumed_rate,
    communication_bytes,
    device_memory,
    forecast,
    link_of,
)

# V 10, C 4, 2 heads, F 8, 3 layers, T 2: a block has 4 x 16 + 3 x 32 + 2 x 4 = 168 parameters,
# the rest 10 x 4 + 4 = 44 (a tied head and the last norm), so n = 3 x 168 + 44 = 548
MODEL = ModelConfig(
    vocab_size=10, d_model=4, n_heads=2, n_kv_heads=2, d_ff=8, n_layers=3, max_seq_len=2
)
N_BLOCK, N = 168, 548


def config_of(devices: int = 1, num_nodes: int = 1, **training: object) -> Config:
    sizes = {"seq_len": 2, "micro_batch_size": 4, "grad_accum_steps": 2, "max_steps": 100}
    return Config(
        model=MODEL,
        training=TrainingConfig(**sizes | {"optimizer": "adamw"} | training),
        hardware=HardwareConfig(devices=devices, num_nodes=num_nodes),
    )


def test_the_parameters_of_the_example_are_counted_right():
    assert sum(p.numel() for p in Transformer(MODEL).parameters()) == MODEL.n_parameters == N
    four = replace(MODEL, n_layers=4)
    assert four.n_parameters - N == N_BLOCK


def test_ddp_repeats_all_state_and_fsdp_divides_it():
    config = config_of(devices=4)
    ddp = device_memory(config, "cuda", "32-true", "ddp")
    fsdp = device_memory(config, "cuda", "32-true", "fsdp")
    assert ddp.persistent == 16 * N  # parameters, gradients and two moments
    assert fsdp.persistent == 4 * N
    assert ddp.activations == fsdp.activations
    assert ddp.communication == 4 * N
    # whole parameters: the rest, a block and the next; gradients: the rest and a block; a block's
    # once more, to be sent
    rest = N - 3 * N_BLOCK
    whole = (rest + 2 * N_BLOCK) + (rest + N_BLOCK) + N_BLOCK
    assert fsdp.communication == communication_buffers(MODEL, 4, sharded=True) == 4 * whole


def test_on_one_device_there_is_the_estimate_of_one_process():
    config = config_of()
    estimate = estimate_memory(config, "cuda", "bf16-mixed")
    for strategy in ("single", "ddp", "fsdp"):
        memory = device_memory(config, "cuda", "bf16-mixed", strategy)
        assert (memory.total, memory.communication) == (estimate.total, 0)
    # a single device is planned for all rows, wherever the config runs
    assert device_memory(config_of(devices=8), "cuda", "bf16-mixed", "single").total == (
        estimate.total
    )


def test_each_of_two_devices_has_half_of_the_rows():
    two = device_memory(config_of(devices=2, grad_accum_steps=1), "cuda", "32-true", "ddp")
    half = device_memory(
        config_of(micro_batch_size=2, grad_accum_steps=1), "cuda", "32-true", "ddp"
    )
    assert two.activations == half.activations
    with pytest.raises(UserError, match="8 rows"):
        device_memory(config_of(devices=3), "cuda", "32-true", "fsdp")


def test_the_bytes_that_are_sent_in_a_step():
    """4 devices, 8 rows of a step in two passes of one row each."""
    config = config_of(devices=2, num_nodes=2, micro_batch_size=1, grad_accum_steps=8)
    assert communication_bytes(config, "ddp") == 2 * 3 / 4 * 4 * N
    assert communication_bytes(config, "fsdp") == 2 * 3 / 4 * N * (4 + 4 + 4)
    assert communication_bytes(config, "single") == 0


@pytest.mark.parametrize(
    "link, step, share",
    [
        (None, 4.0, 0.0),  # 16 tokens at 2 tokens/s on each of 2 devices
        (548.0, 4.0, 0.5),  # 2 x 1/2 x 4 x 548 bytes take 4 s
        (274.0, 8.0, 2 / 3),  # and here 8 s, which are longer than the 4 s of computing
    ],
)
def test_time_and_cost_of_a_run(link, step, share):
    target = Target("this", "cuda", "32-true", 1e9, rate=2.0, rate_source="given", link=link)
    found = forecast(config_of(devices=2), "ddp", target)
    assert found.tokens == 100 * 16
    assert found.tokens_per_second == 16 / step
    assert found.seconds == 100 * step
    assert found.days == pytest.approx(100 * step / 3600 / 24)
    assert found.communication_share == pytest.approx(share)
    assert found.cost(price=3.6, count=2) == pytest.approx(100 * step / 3600 * 2 * 3.6)


def test_the_assumed_rate_is_a_share_of_the_peak():
    config, card = config_of(), Card(1e9, 1e12, 1e9)
    # 6 for each weight of the matmuls (3 blocks of 160, a head of 40), and attention
    flops = 6 * (3 * 160 + 40) + 6 * 3 * 4 * 2
    assert assumed_rate(config, card) == pytest.approx(MODEL_FLOPS_SHARE * 1e12 / flops)
    again = replace(config, model=replace(MODEL, gradient_checkpointing=True))
    assert assumed_rate(again, card) == pytest.approx(MODEL_FLOPS_SHARE * 1e12 / flops * 3 / 4)


def test_several_machines_are_joined_by_their_network():
    assert link_of(CARDS["H100"], config_of(devices=8)) == 450e9
    assert link_of(CARDS["H100"], config_of(devices=8, num_nodes=2)) == 50e9
    assert link_of(CARDS["L4"], config_of(devices=8, num_nodes=2)) == 32e9
