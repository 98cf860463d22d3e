"""What is typed for a key of a sweep, and which configurations it gives."""

import math

import pytest
from scipy import stats

from pocketlm.sweeps.search import promoted, rungs
from pocketlm.sweeps.space import draw, grid, parse_overrides, split_alternatives


@pytest.mark.parametrize(
    "text, parts",
    [
        ("1e-3,2e-3", ["1e-3", "2e-3"]),
        ("[0.9,0.95]", ["[0.9,0.95]"]),
        ("[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]),
        ('["a,b", "c"],["]"]', ['["a,b", "c"]', '["]"]']),
        (
            "[{weight: 1, path: a},{weight: 2, path: b}]",
            ["[{weight: 1, path: a},{weight: 2, path: b}]"],
        ),
        ("'a,b'", ["'a,b'"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("don't,won't", ["don't", "won't"]),
        ("a]b,c[d,e", ["a]b", "c[d", "e"]),
        ("", [""]),
        ("a,,b", ["a", "", "b"]),
    ],
)
def test_alternatives_are_split_at_commas_outside_of_brackets_and_quotes(text, parts):
    assert split_alternatives(text) == parts


def test_single_values_are_fixed_and_the_rest_are_axes():
    overrides = ["training.lr=1e-3,2e-3", "model.d_ff=64", "training.betas=[0.9,0.95]", "x"]
    fixed, axes = parse_overrides(overrides)
    assert fixed == ["model.d_ff=64", "training.betas=[0.9,0.95]", "x"]
    assert [(axis.key, axis.values) for axis in axes] == [("training.lr", ("1e-3", "2e-3"))]


def test_a_grid_has_every_combination_once():
    _, axes = parse_overrides(["training.lr=1,2,3", "model.norm=rmsnorm,layernorm"])
    found = {tuple(settings.items()) for settings in grid(axes)}
    assert len(found) == len(grid(axes)) == 6


def test_a_wide_range_is_drawn_evenly_on_a_log_scale():
    """Kolmogorov-Smirnov test of 60 draws; the seed is fixed, so that the result is."""
    _, [axis] = parse_overrides(["training.lr=1e-4..1e-1"])
    drawn = [math.log10(float(settings["training.lr"])) for settings in draw([axis], 60)]
    assert stats.kstest(drawn, stats.uniform(-4, 3).cdf).pvalue > 0.05
    assert stats.kstest([10**value for value in drawn], stats.uniform(0, 0.1).cdf).pvalue < 1e-6


def test_a_range_of_whole_numbers_gives_whole_numbers():
    _, [axis] = parse_overrides(["model.n_layers=1..5"])
    assert {settings["model.n_layers"] for settings in draw([axis], 5)} == set("12345")


@pytest.mark.parametrize("text", ["0.99..0.9999", "1e-5..1.00004e-5"])
def test_drawn_numbers_are_in_the_range_also_when_rounded(text):
    _, [axis] = parse_overrides([f"training.ema_decay={text}"])
    drawn = [float(settings["training.ema_decay"]) for settings in draw([axis], 3)]
    assert all(axis.low <= value <= axis.high for value in drawn) and len(set(drawn)) == 3


def test_a_number_that_rounding_takes_out_of_the_range_is_not_drawn():
    """Half of the draws of each key are rounded to 0.123456, below the range."""
    keys = ("lr", "matrix_lr", "embed_lr", "vector_lr", "weight_decay")
    _, axes = parse_overrides([f"training.{key}=0.12345605..0.12345701" for key in keys])
    assert [set(settings.values()) for settings in draw(axes, 1)] == [{"0.123457"}]


# ---- successive halving ----


@pytest.mark.parametrize(
    "count, steps, every, expected",
    [
        (8, 1000, 50, [(250, 4), (500, 2), (1000, 2)]),
        (5, 1000, 100, [(300, 3), (500, 2), (1000, 2)]),  # 250 rounds up to a validation
        (3, 90, 10, [(50, 2), (90, 2)]),
        (2, 90, 10, [(90, 2)]),
    ],
)
def test_rungs_double_up_to_all_steps_and_keep_the_better_half(count, steps, every, expected):
    assert rungs(count, steps, every) == expected


def test_the_lowest_means_are_promoted_and_a_failure_never_is():
    """By hand: means of 2.1, 1.1, infinity, 1.5 and 1.0."""
    losses = {1: [2.0, 2.2], 2: [1.0, 1.2], 3: [0.5, math.inf], 4: [1.5, 1.5], 5: [0.9, 1.1]}
    assert promoted(losses, 3) == [2, 4, 5]
    assert promoted({1: [math.inf], 2: [1.0]}, 2) == [2]
