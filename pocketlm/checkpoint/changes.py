"""Changes of a run between its beginning and a resume: those allowed, refused and recorded.

What is compared is meaning, not spelling: the tokens to train on instead of the path of their text,
the precision that was chosen instead of `auto`. A key on which the weights depend is refused,
unless it was named with `--change`; the change is then kept in the history of the run.
"""

import math
import os
import platform
from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pocketlm.config.loading import config_from_dict
from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.hardware.devices import Hardware, available_accelerators
from pocketlm.hardware.processes import print_note
from pocketlm.instruction_sets import instruction_set, multiplies_bfloat16
from pocketlm.model import kernels

# Keys on which no weight depends. `training.max_steps` shapes the schedule: a change of it is named
# and kept in the history.
FREE = {
    "run.name",
    "data.cache_dir",
    "training.max_steps",
    "training.max_epochs",
    "training.log_every_steps",
    "training.val_every_steps",
    "training.patience",
    "training.probe_cases",
    "training.save_every_steps",
    "training.keep_checkpoints",
    "training.on_nonfinite",
    "hardware.devices",
    "hardware.num_nodes",
    "hardware.strategy",
    "hardware.timeout",
    "hardware.num_workers",
}
FREE_SECTIONS = ("sampling",)  # the same for all keys of these sections
# Keys whose meaning is in the tokens to train on, which are compared themselves. A stream has no
# tokens yet, so that its keys are compared as paths and texts.
IN_THE_TOKENS = {
    "source",
    "path",
    "optional_path",
    "text_field",
    "separator",
    "errors",
    "config_name",
    "split",
    "revision",
    "bos",
    "eos",
    "tokenizer",
}
PATHS = {"path", "optional_path", "val_path"}
RESOLVED = {  # compared as what they resolved to, if the checkpoint says so
    "hardware.accelerator": "accelerator",
    "training.precision": "precision",
    "hardware.compile": "compile",
}
CHANGEABLE = {  # what `--change` takes: what a run can go on with, and what may mend it
    "training.lr",
    "training.min_lr_ratio",
    "training.schedule",
    "training.decay_share",
    "training.warmup_steps",
    "training.grad_clip",
    "training.loss_chunk",
    "model.dropout",
    "model.gradient_checkpointing",
    *RESOLVED,
}


@dataclass(frozen=True)
class Previous:
    """The run to which a checkpoint belongs, by its metadata."""

    config: Config
    hardware: dict[str, Any]  # from `describe_hardware`; empty in checkpoints of earlier versions
    data_sha256: str | None
    history: tuple[dict[str, Any], ...]

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], origin: str) -> "Previous":
        """Return it from the `kit` entry of the checkpoint `origin`."""
        hardware = metadata.get("hardware") or {}
        config = config_from_dict(metadata["config"], origin=origin)
        if "strategy" not in hardware:  # earlier versions gave each device the rows of a step
            rows = config.training.grad_accum_steps * config.hardware.devices
            training = replace(config.training, grad_accum_steps=rows)
            config = replace(config, training=training)
        return cls(
            config,
            hardware,
            metadata.get("data_sha256"),
            tuple(metadata.get("history", ())),
        )


def describe_hardware(hardware: Hardware, devices: int) -> dict[str, Any]:
    """Return what was resolved for a run, in plain types, for its checkpoints."""
    on_cpu = hardware.accelerator == "cpu"
    device = torch.device(hardware.accelerator)
    native = on_cpu and kernels.available(device, torch.float32)
    return {
        "accelerator": hardware.accelerator,
        "precision": hardware.precision,
        "compile": hardware.compile,
        "strategy": hardware.strategy,
        "devices": devices,
        "threads": torch.get_num_threads(),
        "instruction set": instruction_set().name if on_cpu else "",
        "kernels": "training.c" if native else "torch",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": str(torch.__version__),
    }


# ---- before the hardware is chosen ----


def adopt_choices(config: Config, previous: Previous, changes: Set[str]) -> Config:
    """Return the config with what the run resolved when it began in place of each `auto`.

    So too for a value that is typed as it was then. Raises UserError if this machine cannot do it.
    changes: the keys named with `--change`.
    """
    adopted = config
    for name, field in RESOLVED.items():
        section, _, key = name.partition(".")
        typed = getattr(getattr(config, section), key)
        typed_then = getattr(getattr(previous.config, section), key)
        if name in changes or field not in previous.hardware or typed not in ("auto", typed_then):
            continue
        value = previous.hardware[field]
        if field == "compile":
            value = "on" if value else "off"
        if typed == "auto":
            check_possible(name, value, previous.hardware["accelerator"])
        values = replace(getattr(adopted, section), **{key: value})
        adopted = replace(adopted, **{section: values})
    return adopted


def adopt_weights(config: Config, previous: Previous) -> Config:
    """Return the config with the weights of the run's mixture, where the shares are the same.

    Weights of 4 and 2 then are those of 2 and 1, of which the hash of the data was made.
    """
    then, now = previous.config.data.mixture, config.data.mixture
    old, new = ([s.weight / sum(s.weight for s in each) for s in each] for each in (then, now))
    if len(old) != len(new) or not all(map(math.isclose, old, new)):
        return config
    pairs = zip(now, then, strict=True)
    mixture = tuple(replace(source, weight=before.weight) for source, before in pairs)
    return replace(config, data=replace(config.data, mixture=mixture))


def adopted_reasons(config: Config, adopted: Config) -> dict[str, str]:
    """Return the reason, for the plan, of each choice that `adopt_choices` has made."""
    then, now = adopted.to_dict(), config.to_dict()
    keys = {field: name.split(".") for name, field in RESOLVED.items()}
    differing = [f for f, (section, key) in keys.items() if then[section][key] != now[section][key]]
    return dict.fromkeys(differing, "as when this run began")


def check_possible(name: str, value: str, accelerator: str) -> None:
    """Raise UserError if this machine cannot do what the run resolved for the key `name`."""
    available = available_accelerators()
    if name == "hardware.accelerator" and value not in available:
        problem, instead = f"this machine has {' and '.join(available)}", available[0]
    elif (name, value) == ("training.precision", "bf16-mixed") and not multiplies_bfloat16(
        accelerator
    ):
        problem, instead = "nothing here multiplies bfloat16", "32-true"
    else:
        return
    raise UserError(
        f"this run began with {name} {value}, and {problem}; resume it where it began, or go on "
        f"here, with other numbers: --change {name}={instead}; or begin another run with run.name"
    )


def adopt_threads(previous: Previous) -> None:
    """Use as many threads as the run began with, if the machine has them and none are asked for."""
    threads = previous.hardware.get("threads")
    if "OMP_NUM_THREADS" in os.environ or not isinstance(threads, int):
        return
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if threads != torch.get_num_threads() and 1 <= threads <= (usable or 1):
        print_note(
            f"using {threads} threads, as the run did, for the same numbers; "
            "OMP_NUM_THREADS=N takes others"
        )
        torch.set_num_threads(threads)


# ---- after ----


def changed_keys(
    previous: Previous, config: Config, hardware: dict[str, Any], data_sha256: str
) -> list[tuple[str, str]]:
    """Return each changed key on which the weights depend, and its `previous -> current`."""
    old, new = comparable(previous.config), comparable(config)
    for key, field in RESOLVED.items():
        if field in previous.hardware:
            old[key], new[key] = previous.hardware[field], hardware[field]
        elif key != "training.precision":  # a checkpoint of an earlier version does not say
            del old[key]
    changes = [(key, f"{old[key]!r} -> {new[key]!r}") for key in old if old[key] != new[key]]
    if previous.data_sha256 != data_sha256:
        changes.append(("the tokens to train on", ""))
    return changes


def comparable(config: Config) -> dict[str, Any]:
    """Return the keys on which the weights depend; values that mean the same are equal.

    A relative path means the file in the working directory, which is where the checkpoints are.
    """
    values: dict[str, Any] = {}
    for section, settings in config.to_dict().items():
        if section not in FREE_SECTIONS:
            values |= {f"{section}.{key}": value for key, value in settings.items()}
    values = {name: value for name, value in values.items() if name not in FREE}
    streaming = config.data.streaming
    if not streaming:
        values.pop("data.shuffle_buffer")
        values["data.mixture"] = [source_values(each, streaming) for each in values["data.mixture"]]
    data = {name.partition(".")[2]: values.pop(name) for name in [*values] if name[:5] == "data."}
    return values | {f"data.{key}": value for key, value in source_values(data, streaming).items()}


def source_values(source: dict[str, Any], streaming: bool) -> dict[str, Any]:
    """Return the keys of a source that its tokens do not say, with paths in one spelling."""
    values = {}
    for key, value in source.items():
        if key in IN_THE_TOKENS and not streaming or key == "weight":  # the tokens' hash has it
            continue
        is_path = key in PATHS and value is not None
        values[key] = str(Path(os.path.abspath(os.path.expanduser(value)))) if is_path else value
    return values


def check_change(overrides: Iterable[str]) -> frozenset[str]:
    """Return the keys of `--change`. Raises UserError for one that a run cannot go on with."""
    keys = frozenset(override.partition("=")[0] for override in overrides)
    for key in sorted(keys - CHANGEABLE):
        hint = "give it without --change" if key in FREE else "begin another run: run.name=NAME"
        raise UserError(
            f"--change {key}: a run cannot go on with another {key}; {hint}. --change takes "
            f"{', '.join(sorted(CHANGEABLE))}"
        )
    return keys


def name_rounding_differences(previous: Previous, hardware: dict[str, Any]) -> None:
    """Print what of the machine is another: the numbers then differ in their last digits."""
    names = ("strategy", "devices", "threads", "instruction set", "kernels", "device", "torch")
    changes = [
        f"{name} {previous.hardware[name]} -> {hardware[name]}"
        for name in names
        if name in previous.hardware and previous.hardware[name] != hardware[name]
    ]
    if changes:
        print_note(
            f"this machine computes in another way than the run so far ({', '.join(changes)}): "
            "from here on the numbers differ by rounding from those of an uninterrupted run"
        )
