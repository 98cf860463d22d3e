"""Changes between a run and its resume: meaning is compared, and what was resolved is used."""

import dataclasses

import pytest
import torch

from pocketlm.checkpoint import changes
from pocketlm.checkpoint.changes import (
    Previous,
    adopt_choices,
    adopt_threads,
    adopt_weights,
    changed_keys,
    check_change,
    describe_hardware,
    name_rounding_differences,
)
from pocketlm.config.loading import config_from_dict
from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.hardware.devices import Hardware

NOW = describe_hardware(Hardware("cpu", "32-true", False, {}), 1)


def config(**sections: dict) -> Config:
    """Return a config with the sizes and steps that a run has resolved."""
    model = {"vocab_size": 300} | sections.pop("model", {})
    training = {"max_steps": 12} | sections.pop("training", {})
    return config_from_dict({"model": model, "training": training, **sections})


def previous(record: dict | None = None, **sections: dict) -> Previous:
    return Previous(config(**sections), NOW if record is None else record, "tokens", ())


def changed(then: Previous, now: Config, hardware: dict = NOW, tokens: str = "tokens") -> set[str]:
    return {key for key, _ in changed_keys(then, now, hardware, tokens)}


# ---- meaning, not spelling ----


@pytest.mark.parametrize(
    "then, now",
    [
        ({"data": {"path": "x.txt"}}, {"data": {"path": "./x.txt"}}),
        ({"data": {"path": "x.txt"}}, {"data": {"path": "moved/x.txt", "separator": "\n"}}),
        ({"data": {"tokenizer": "tok.json"}}, {"data": {"tokenizer": "./tok.json", "eos": True}}),
        ({"data": {"val_path": "v.txt"}}, {"data": {"val_path": ".//v.txt"}}),
        ({"data": {"shuffle_buffer": 5}}, {"data": {"shuffle_buffer": 6}}),
        ({"model": {"n_kv_heads": None}}, {"model": {"n_kv_heads": 4}}),
        ({"training": {"betas": [0.9, 1e-1]}}, {"training": {"betas": [0.9, 0.1]}}),
        ({"hardware": {"accelerator": "auto"}}, {"hardware": {"accelerator": "cpu"}}),
        ({"training": {"precision": "auto"}}, {"training": {"precision": "32-true"}}),
        ({"hardware": {"num_workers": 0}}, {"hardware": {"num_workers": 2}}),
        ({"training": {"on_nonfinite": "stop"}}, {"training": {"on_nonfinite": "skip"}}),
        (
            {"data": {"mixture": [{"path": "a.txt"}, {"path": "b.txt"}]}},
            {"data": {"mixture": [{"path": "./a.txt"}, {"path": "b.txt"}]}},
        ),
        (
            {"data": {"streaming": True, "path": "x.txt"}},
            {"data": {"streaming": True, "path": "./x.txt"}},
        ),
    ],
    ids=str,
)
def test_another_spelling_of_the_same_run_is_the_same_run(then, now):
    """The tokens to train on are compared themselves, by their hash."""
    assert changed(previous(**then), config(**now)) == set()


def mixture(*weights: float) -> Config:
    sources = [{"path": f"{number}.txt", "weight": w} for number, w in enumerate(weights)]
    return config(data={"mixture": sources})


@pytest.mark.parametrize("same", [(4, 2, 2), (0.2, 0.1, 0.1), (2, 1, 1)])
@pytest.mark.parametrize("other", [(2, 1, 1.001), (1, 2, 1), (2, 1)])
def test_the_weights_of_a_mixture_are_shares(same, other):
    then = Previous(mixture(2, 1, 1), NOW, "tokens", ())
    assert adopt_weights(mixture(*same), then) == mixture(2, 1, 1)
    assert adopt_weights(mixture(*other), then) == mixture(*other)
    assert adopt_weights(config(), then) == config()


@pytest.mark.parametrize(
    "now, keys",
    [
        ({"training": {"lr": 1e-3}}, {"training.lr"}),
        ({"training": {"micro_batch_size": 4}}, {"training.micro_batch_size"}),
        ({"data": {"packing": "padded"}}, {"data.packing"}),
        ({"data": {"val_path": "other.txt"}}, {"data.val_path"}),
        ({"data": {"document_mask": False}}, {"data.document_mask"}),
        ({"model": {"dropout": 0.1}}, {"model.dropout"}),
        ({"training": {"seed": 1}}, {"training.seed"}),
    ],
    ids=str,
)
def test_what_decides_the_weights_is_compared(now, keys):
    assert changed(previous(), config(**now)) == keys


def test_another_text_is_another_run():
    assert changed(previous(), config(), tokens="others") == {"the tokens to train on"}


def test_a_stream_which_has_no_tokens_yet_is_compared_by_its_keys():
    stream = {"streaming": True, "separator": "line"}
    then = previous(data={"path": "x.txt", **stream})
    assert changed(then, config(data={"path": "y.txt", **stream})) == {"data.path"}
    buffered = config(data={"path": "x.txt", "shuffle_buffer": 7, **stream})
    assert changed(then, buffered) == {"data.shuffle_buffer"}


# ---- what was resolved ----


@pytest.mark.parametrize(
    "field, value, key",
    [
        ("precision", "bf16-mixed", "training.precision"),
        ("compile", True, "hardware.compile"),
        ("accelerator", "cuda", "hardware.accelerator"),
    ],
)
def test_what_was_resolved_is_compared_and_not_what_was_written(field, value, key):
    """`auto` both times, and something else each time."""
    assert changed(previous(NOW | {field: value}), config()) == {key}


def test_auto_takes_what_the_run_began_with(monkeypatch):
    monkeypatch.setattr(changes, "multiplies_bfloat16", lambda accelerator: True)
    then = previous(NOW | {"precision": "bf16-mixed", "compile": True})
    adopted = adopt_choices(config(), then, frozenset())
    assert adopted.training.precision == "bf16-mixed"
    assert (adopted.hardware.accelerator, adopted.hardware.compile) == ("cpu", "on")
    assert adopt_choices(config(), previous(), frozenset()).hardware.compile == "off"


def test_what_is_typed_is_kept_so_that_it_can_be_refused():
    then = previous(NOW | {"compile": True})
    typed = config(hardware={"compile": "off"})
    assert adopt_choices(typed, then, frozenset()).hardware.compile == "off"
    named = adopt_choices(config(), then, frozenset({"hardware.compile"}))
    assert named.hardware.compile == "auto"


def test_the_same_typed_value_means_what_it_meant():
    """compile=on on a machine without a compiler was off, and stays off where there is one."""
    then = previous(hardware={"compile": "on"})
    then = dataclasses.replace(then, hardware=NOW | {"compile": False})
    adopted = adopt_choices(config(hardware={"compile": "on"}), then, frozenset())
    assert adopted.hardware.compile == "off"


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("precision", "bf16-mixed", "bf16-mixed, and nothing here multiplies bfloat16.*--change "
                                    "training.precision=32-true"),
        ("accelerator", "cuda", "cuda, and this machine has cpu; .*--change hardware.accelerator="),
    ],
)  # fmt: skip
def test_what_this_machine_cannot_do_is_refused_with_the_way_on(monkeypatch, field, value, message):
    monkeypatch.setattr(changes, "multiplies_bfloat16", lambda accelerator: False)
    monkeypatch.setattr(changes, "available_accelerators", lambda: ["cpu"])
    with pytest.raises(UserError, match=message):
        adopt_choices(config(), previous(NOW | {field: value}), frozenset())


def test_a_checkpoint_of_an_earlier_version_says_nothing_and_is_resumed():
    """Its precision was compared as it was written."""
    then = previous({})
    other = config(hardware={"accelerator": "cpu", "compile": "on"})
    assert changed(then, other) == set()
    assert adopt_choices(other, then, frozenset()) == other
    assert changed(then, config(training={"precision": "32-true"})) == {"training.precision"}
    name_rounding_differences(then, NOW)


def test_as_many_threads_as_before_are_used_unless_others_are_asked_for(monkeypatch, capsys):
    """Sums over threads round in another order: no tensor is the same with one more of them."""
    before = torch.get_num_threads()
    other = before % 2 + 1
    monkeypatch.setattr(changes.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    then = previous(NOW | {"threads": other})
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", str(before))
        adopt_threads(then)
        assert torch.get_num_threads() == before
        monkeypatch.delenv("OMP_NUM_THREADS")
        adopt_threads(then)
        assert torch.get_num_threads() == other
    finally:
        torch.set_num_threads(before)
    assert f"using {other} threads, as the run did" in capsys.readouterr().err


def test_a_machine_that_rounds_in_another_way_is_named(capsys):
    name_rounding_differences(previous(NOW | {"instruction set": "mmx", "torch": "1.0"}), NOW)
    message = capsys.readouterr().err
    assert f"instruction set mmx -> {NOW['instruction set']}, torch 1.0 -> " in message
    name_rounding_differences(previous(), NOW)
    assert capsys.readouterr().err == ""


# ---- --change ----


@pytest.mark.parametrize(
    "override, message",
    [
        ("training.seed=1", "another training.seed; begin another run"),
        ("hardware.devices=2", "hardware.devices; give it without --change"),
        ("training.max_steps=9", "training.max_steps; give it without --change"),
    ],
)
def test_only_what_a_run_can_go_on_with_may_be_changed(override, message):
    assert check_change(["training.lr=1e-3"]) == {"training.lr"}
    with pytest.raises(UserError, match=message):
        check_change([override])
