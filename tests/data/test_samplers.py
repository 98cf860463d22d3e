"""Samplers: the order of rows, of one dataset and of a mixture, and resuming in it."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.config.sections import TrainingConfig
from pocketlm.data.datasets import PackedLMDataset
from pocketlm.data.samplers import (
    DataShard,
    MixtureBatchSampler,
    ResumableLoader,
    ShuffledBatchSampler,
    ValidationBatchSampler,
    proportions,
)
from pocketlm.errors import UserError
from tests.support.loaders import LOADERS, packed_loader, take
from tests.support.rows import kept_targets

# ---- one dataset ----


def epoch(order: ShuffledBatchSampler, number: int) -> list[int]:
    return order.indices(number * order.size, order.size)


def test_each_epoch_is_a_permutation_of_its_own():
    orders = {
        (seed, number): epoch(ShuffledBatchSampler(50, 4, seed), number)
        for seed in (0, 1, 42)
        for number in range(3)
    }
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    # Two of 50! permutations are never equal by chance.
    assert len({tuple(order) for order in orders.values()}) == 9


def test_the_order_never_changes():
    """A run of an older version can be resumed only if it does not."""
    assert list(islice(ShuffledBatchSampler(7, 4, seed=42), 3)) == [
        [2, 1, 4, 3],
        [5, 6, 0, 2],
        [0, 6, 5, 4],
    ]


def test_the_order_is_a_pure_function_of_seed_and_position():
    order = ShuffledBatchSampler(7, 3, seed=5)
    forwards = order.indices(0, 30)
    torch.manual_seed(0)
    assert [
        ShuffledBatchSampler(7, 99, seed=5).indices(position, 1) for position in reversed(range(30))
    ] == [[i] for i in forwards[::-1]]
    assert list(islice(order, 10)) == [forwards[i : i + 3] for i in range(0, 30, 3)]


def defined(size: int, seed: int, position: int) -> int:
    """Return the index at a position by definition: each epoch has a permutation of its own."""
    epoch, row = divmod(position, size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator)[row].item()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), min_size=1, max_size=4),
)
def test_indices_are_those_of_the_definition_one_at_a_time_over_any_number_of_epochs(
    size, seed, requests
):
    """They do not depend on earlier requests, and a batch may be longer than an epoch."""
    order = ShuffledBatchSampler(size, 4, seed)
    for first, count in requests:
        assert order.indices(first, count) == [
            defined(size, seed, position) for position in range(first, first + count)
        ]


@pytest.mark.parametrize("seed", [0, 2**32, 2**44, 2**62])
def test_every_seed_that_a_config_takes_gives_an_order(seed):
    try:
        TrainingConfig(seed=seed)
    except ValueError:
        return
    assert sorted(epoch(ShuffledBatchSampler(5, 1, seed), 3)) == list(range(5))


@pytest.mark.parametrize("batch_size, size", [(4, 30), (3, 7), (5, 3)])
def test_two_ranks_together_see_what_one_sees_with_double_batches(batch_size, size):
    first, second = (
        ShuffledBatchSampler(size, batch_size, 1, DataShard(rank, 2)) for rank in (0, 1)
    )
    one = ShuffledBatchSampler(size, 2 * batch_size, 1)
    together = [a + b for a, b in zip(islice(first, 12), islice(second, 12), strict=True)]
    assert together == list(islice(one, 12))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 4))
def test_validation_covers_every_window_once_in_batches_of_one_shape(size, batch_size, world_size):
    ranks = [
        list(ValidationBatchSampler(size, batch_size, DataShard(rank, world_size)))
        for rank in range(world_size)
    ]
    length = len(ValidationBatchSampler(size, batch_size, DataShard(0, world_size)))
    assert {len(batches) for batches in ranks} == {length}
    together = [batch for batches in ranks for batch in batches]
    assert all(len(batch) == batch_size for batch in together)
    assert sorted(i for batch in together for i in batch if i >= 0) == list(range(size))


# ---- a mixture ----

SIZES, WEIGHTS = [17, 1000, 40], [0.5, 3, 1.5]  # 100, 600 and 300 of 1,000


def drawn_from(indices: list[int]) -> list[int]:
    """Return the dataset of each row index of a mixture of SIZES."""
    return [0 if i < 17 else 1 if i < 1017 else 2 for i in indices]


def indices(order: ShuffledBatchSampler, count: int) -> list[int]:
    return order.indices(0, count)


def test_every_thousand_rows_hold_the_proportions_exactly():
    drawn = drawn_from(indices(MixtureBatchSampler(SIZES, WEIGHTS, 4, seed=1), 5000))
    for begin in range(0, 5000, 1000):
        assert [drawn[begin : begin + 1000].count(part) for part in range(3)] == [100, 600, 300]


def test_a_mixture_is_what_its_definition_says():
    """A block is a permutation of the datasets' numbers; each continues after its last row."""
    expected, taken = [], [0, 0, 0]
    for block in range(3):
        numbers = np.repeat([0, 1, 2], [100, 600, 300])
        for number in np.random.default_rng([9, block]).permutation(numbers):
            row = defined(SIZES[number], 9 + 7919 * int(number), taken[number])
            expected.append([0, 17, 1017][number] + row)
            taken[number] += 1
    order = MixtureBatchSampler(SIZES, WEIGHTS, 4, seed=9)
    assert order.indices(0, 2500) == expected[:2500]
    assert order.indices(990, 1020) == expected[990:2010]  # back, and across two borders of blocks


def test_a_mixture_is_mixed_differently_in_every_block():
    drawn = drawn_from(indices(MixtureBatchSampler(SIZES, WEIGHTS, 4, seed=1), 3000))
    assert len({tuple(drawn[begin : begin + 1000]) for begin in range(0, 3000, 1000)}) == 3
    assert all(len(set(drawn[begin : begin + 100])) == 3 for begin in range(0, 3000, 100))


def test_each_dataset_is_used_whole_before_it_repeats():
    order = indices(MixtureBatchSampler(SIZES, WEIGHTS, 4, seed=1), 5000)
    for part, (first, size) in enumerate(zip([0, 17, 1017], SIZES, strict=True)):
        own = [i for i, of in zip(order, drawn_from(order), strict=True) if of == part]
        epochs = [own[begin : begin + size] for begin in range(0, len(own), size)]
        assert all(sorted(epoch) == list(range(first, first + size)) for epoch in epochs[:-1])
        assert len(set(map(tuple, epochs))) == len(epochs) > 1


def test_datasets_of_one_size_have_different_orders():
    order = indices(MixtureBatchSampler([50, 50], [1, 1], 4, seed=1), 100)
    first, second = ([i % 50 for i in order if i // 50 == part] for part in (0, 1))
    assert len(first) + len(second) == 100 and first[:40] != second[:40]


def test_a_mixture_is_a_pure_function_of_seed_and_position():
    forwards = indices(MixtureBatchSampler(SIZES, WEIGHTS, 4, seed=9), 2500)
    order = MixtureBatchSampler(SIZES, WEIGHTS, 99, seed=9)
    torch.manual_seed(0)
    assert [order.indices(position, 1) for position in reversed(range(2500))] == [
        [i] for i in forwards[::-1]
    ]
    assert list(islice(MixtureBatchSampler(SIZES, WEIGHTS, 50, seed=9), 50)) == [
        forwards[i : i + 50] for i in range(0, 2500, 50)
    ]
    assert indices(MixtureBatchSampler(SIZES, WEIGHTS, 4, seed=10), 100) != forwards[:100]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0.1, 10)), min_size=2, max_size=5),
    st.integers(0, 3500),
    st.integers(0, 2**32 - 1),
)
def test_rows_per_dataset_is_what_counting_gives(parts, count, seed):
    sizes, weights = map(list, zip(*parts, strict=True))
    order = MixtureBatchSampler(sizes, weights, 4, seed)
    borders = np.cumsum(sizes)
    counted = np.bincount(
        np.searchsorted(borders, indices(order, count), side="right"), minlength=len(sizes)
    ).tolist()
    assert order.rows_per_dataset(count) == counted


def test_two_ranks_of_a_mixture_together_see_what_one_sees():
    first, second = (
        MixtureBatchSampler(SIZES, WEIGHTS, 8, 1, DataShard(rank, 2)) for rank in (0, 1)
    )
    together = [a + b for a, b in zip(islice(first, 150), islice(second, 150), strict=True)]
    assert together == list(islice(MixtureBatchSampler(SIZES, WEIGHTS, 16, 1), 150))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_proportions_are_within_a_row_of_the_weights_and_fill_the_block(weights):
    rows = proportions(weights)
    assert rows.sum() == 1000
    for count, weight in zip(rows, weights, strict=True):
        assert abs(count - 1000 * weight / sum(weights)) < 1


def test_a_weight_that_gets_no_row_is_refused():
    with pytest.raises(UserError, match=r"data.mixture: a weight of 0.0001 is below a row in 1000"):
        proportions([1, 0.0001])


# ---- resuming ----


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_restored_loader_continues_with_the_very_next_batch(num_workers):
    dataset = PackedLMDataset(np.arange(44), 5)
    expected = []
    for indices in islice(ShuffledBatchSampler(9, 4, seed=3), 8):
        batch = dataset.__getitems__(indices)
        expected.append([batch["input_ids"].tolist(), batch["targets"].tolist()])
    first = packed_loader(num_workers)
    before = take(first, 3)
    state = json.loads(json.dumps(first.state_dict()))  # workers are ahead of it by now
    second = packed_loader(num_workers)
    second.load_state_dict(state)
    assert before + take(second, 2) == expected[:5]
    third = packed_loader(0)  # the number of workers may change
    third.load_state_dict(second.state_dict())
    assert take(third, 3) == expected[5:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_loader_resumes_in_a_new_process(tmp_path, monkeypatch, forked_commands):
    """It does so after each of several batches, across the ends of epochs and of a block."""
    monkeypatch.chdir(tmp_path)
    cases, expected = [], []
    for kind in ("packed", "mixture"):
        whole = take(LOADERS[kind](0), 10)
        for num_workers in (0, 1, 3):
            loader = LOADERS[kind](num_workers)
            batches = islice(iter(loader), 5 if num_workers == 0 else 3)
            for count, _ in enumerate(batches, 1):
                cases.append([kind, num_workers, loader.state_dict(), 3])
                expected.append(whole[count : count + 3])
    Path("cases.json").write_text(json.dumps(cases))
    done = forked_commands.run("cases.json", program="tests/programs/resume_loaders.py")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


def test_a_new_iterator_of_the_same_loader_continues_too():
    loader = packed_loader(0)
    assert take(loader, 2) + take(loader, 2) == take(packed_loader(0), 4)


def test_a_loader_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    take(packed_loader(1), 1)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_validation_loader_starts_again_every_time(num_workers):
    dataset = PackedLMDataset(np.arange(44), 5)
    validation = ResumableLoader(dataset, ValidationBatchSampler(len(dataset), 4), num_workers)
    for _ in range(2):
        assert kept_targets(validation) == list(range(1, 44))
