"""The plan of a run on several devices: memory on each, communication, time and cost.

n parameters, N devices, of which each has 1/N of a step's rows. A strategy is `single` (one device
with all rows), `ddp` (each has all parameters, gradients and optimizer state, and adds up the
gradients with the others) or `fsdp` (each has 1/N of them, and collects the parameters of a block
when it needs them). Sources: Rajbhandari et al. 2020 (ZeRO), Zhao et al. 2023 (FSDP).
"""

from dataclasses import dataclass, replace

from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.hardware.memory import MemoryEstimate, estimate_memory

STRATEGIES = ("single", "ddp", "fsdp")
FLOAT32 = 4  # bytes of a parameter or a gradient
MODEL_FLOPS_SHARE = (
    0.4  # of a card's peak, if nothing was measured; published runs have 0.3 to 0.55
)


@dataclass(frozen=True)
class Card:
    """A GPU as its maker states it."""

    memory: float  # bytes
    peak: float  # FLOP/s of dense matmuls in bfloat16
    link: float  # bytes/s that it sends to the other cards of its machine


CARDS = {
    "H200": Card(141e9, 989e12, 450e9),
    "H100": Card(80e9, 989e12, 450e9),
    "A100": Card(80e9, 312e12, 300e9),
    "L4": Card(24e9, 121e12, 32e9),
    "4090": Card(24e9, 165e12, 32e9),
}
NETWORK = 50e9  # bytes/s that a card sends to other machines: 400 Gbit/s for each


def device_memory(
    config: Config, accelerator: str, precision: str, strategy: str
) -> MemoryEstimate:
    """Estimate the memory of each device under a strategy. Raises UserError; see `on_devices`."""
    return estimate_memory(on_devices(config, strategy), accelerator, precision)


def on_devices(config: Config, strategy: str) -> Config:
    """Return the config under a strategy, which for `single` is that of one device.

    Raises UserError if the devices cannot share the rows of a step.
    """
    changes = {"devices": 1, "num_nodes": 1} if strategy == "single" else {"strategy": strategy}
    config = replace(config, hardware=replace(config.hardware, **changes))
    config.on_each_device()
    return config


def communication_bytes(config: Config, strategy: str) -> float:
    """Return the bytes that each device sends in a step, all in float32.

    DDP adds the gradients up in a ring: 2 (N - 1) / N of them, once. FSDP collects the parameters
    twice and sends the gradients once in every forward and backward pass.
    """
    config = on_devices(config, strategy)
    n, count = config.model.n_parameters, config.hardware.world_size
    others = (count - 1) / count
    if strategy != "fsdp":
        return 2 * others * FLOAT32 * n
    passes = config.on_each_device().training.grad_accum_steps
    return passes * others * 3 * FLOAT32 * n


@dataclass(frozen=True)
class Target:
    """Hardware that a run is planned for."""

    name: str
    accelerator: str
    precision: str
    memory: float  # bytes of each device, those that the program itself takes not counted
    rate: float  # tokens/s of one device by itself
    rate_source: str  # where the rate is from
    link: float | None = None  # bytes/s that a device sends to the others; None: not known


@dataclass(frozen=True)
class Forecast:
    """Time and cost of a run. `device_hours` count all devices."""

    tokens: int
    tokens_per_second: float  # of all devices
    communication_share: float  # of a step's time, if none of it happens while computing
    seconds: float

    @property
    def days(self) -> float:
        return self.seconds / 86_400

    def cost(self, price: float, count: int) -> float:
        """Return the cost of the run at a price of a device-hour."""
        return self.seconds / 3600 * count * price


def forecast(config: Config, strategy: str, target: Target) -> Forecast:
    """Estimate the time of a run.

    Communication that takes no longer than the computation is hidden behind it, and without a
    known link there is none. A worked example: tests/hardware/test_scaling.py.
    """
    config = on_devices(config, strategy)
    training, count = config.training, config.hardware.world_size
    tokens = training.micro_batch * training.grad_accum_steps * training.seq_len
    computing = tokens / (count * target.rate)
    sending = communication_bytes(config, strategy) / target.link if target.link else 0.0
    step = max(computing, sending)
    return Forecast(
        tokens=tokens * training.steps,
        tokens_per_second=tokens / step,
        communication_share=sending / (computing + sending),
        seconds=training.steps * step,
    )


def link_of(card: Card, config: Config) -> float:
    """Return the bytes/s that a card sends: within one machine, or between several."""
    return card.link if config.hardware.num_nodes == 1 else min(card.link, NETWORK)


def assumed_rate(config: Config, card: Card) -> float:
    """Return the tokens/s of one card at MODEL_FLOPS_SHARE of its peak.

    Recomputing the blocks adds a third to the operations.
    """
    flops: float = config.model.flops_per_token(config.training.seq_len)
    if config.model.gradient_checkpointing:
        flops = flops * 4 / 3
    return MODEL_FLOPS_SHARE * card.peak / flops


def card_target(config: Config, name: str, rate: float | None) -> Target:
    """Return a card to plan for. rate: measured tokens/s of one; None: an assumption.

    Raises UserError for a card that is not known.
    """
    if name not in CARDS:
        raise UserError(f"--card {name}: the cards are {', '.join(CARDS)}")
    card = CARDS[name]
    precision = config.training.precision
    precision = "bf16-mixed" if precision == "auto" else precision
    source = f"assumed: {MODEL_FLOPS_SHARE:.0%} of {card.peak / 1e12:,.0f} TFLOP/s"
    return Target(
        name=name,
        accelerator="cuda",
        precision=precision,
        memory=card.memory,
        rate=rate or assumed_rate(config, card),
        rate_source="given" if rate else source,
        link=link_of(card, config),
    )
