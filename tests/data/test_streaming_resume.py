"""A stream resumes exactly, in this process and in a new one, with the workers it began with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketlm.data.samplers import DataShard
from pocketlm.errors import UserError
from tests.support.loaders import LOADERS, stream_loader, take

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"  # more workers than cores
)


def resume_cases(kind: str, num_workers: int, counts: range) -> tuple[list, list]:
    """Return the cases after each of `counts` batches, and the four batches that follow each."""
    loader = LOADERS[kind](num_workers)
    whole = take(LOADERS[kind](num_workers), max(counts) + 4)
    batches = iter(loader)
    cases, expected = [], []
    for count in range(max(counts) + 1):
        if count in counts:
            cases.append([kind, num_workers, loader.state_dict(), 4])
            expected.append(whole[count : count + 4])
        next(batches)
    return cases, expected


def test_a_stream_resumes_in_a_new_process(tmp_path, monkeypatch, forked_commands):
    """It does so inside blocks and across the ends of epochs, with 0, 1 and 3 workers."""
    monkeypatch.chdir(tmp_path)
    cases, expected = [], []
    for kind, num_workers, counts in (
        ("stream", 0, range(40)),
        ("padded stream", 0, range(0, 40, 5)),
        ("stream", 1, range(0, 40, 7)),
        ("stream", 3, range(7, 50, 8)),
        ("padded stream", 3, range(10, 11)),
    ):
        more_cases, more_expected = resume_cases(kind, num_workers, counts)
        cases += more_cases
        expected += more_expected
    positions = [state["ranks"][0]["places"] for _, _, state, _ in cases]
    assert max(position["epoch"] for workers in positions for position in workers) >= 1
    inside = [any(0 < position["row"] < 3 for position in workers) for workers in positions]
    assert sum(inside) > 10
    Path("cases.json").write_text(json.dumps(cases))
    done = forked_commands.run("cases.json", program="tests/programs/resume_loaders.py")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


def test_a_new_iterator_of_the_same_stream_continues_too():
    for num_workers in (0, 2):
        loader = stream_loader(num_workers)
        assert take(loader, 3) + take(loader, 5) == take(stream_loader(num_workers), 8)


@pytest.mark.parametrize("before, now", [(2, 0), (0, 1)])
def test_a_stream_does_not_resume_with_other_workers(before, now):
    """They would have other documents: some text twice, and some never."""
    loader = stream_loader(before)
    take(loader, 3)
    state = json.loads(json.dumps(loader.state_dict()))
    sentence = "a stream resumes only with the workers that it began with: set "
    with pytest.raises(UserError, match=f"^{sentence}hardware.num_workers to {before}, not {now}$"):
        stream_loader(now).load_state_dict(state)


def test_a_stream_whose_documents_an_earlier_version_dealt_out_to_ranks_is_refused():
    state = stream_loader(0).state_dict()
    state["ranks"] *= 2
    with pytest.raises(UserError, match="^an earlier version .* to 2 devices, .*run.name=NAME$"):
        stream_loader(0).load_state_dict(state)


@pytest.mark.parametrize("kind", ["packed", "mixture"])
def test_rows_resume_on_another_number_of_ranks(kind):
    """Two ranks take half of the batches of one, and four of a quarter go on from there."""
    whole = [row for batch in take(LOADERS[kind](0), 6) for row in batch[0]]
    size = len(whole) // 6

    def ranks(count: int, state: dict | None, batches: int) -> tuple[list, dict]:
        loaders = [LOADERS[kind](0, DataShard(rank, count)) for rank in range(count)]
        for loader in loaders if state else ():
            loader.load_state_dict(state)
        taken = [take(loader, batches) for loader in loaders]
        [state, *others] = [loader.state_dict() for loader in loaders]
        assert all(other == state for other in others)
        rows = [row for batch in zip(*taken, strict=True) for part in batch for row in part[0]]
        return rows, state

    first, state = ranks(2, None, 2)
    second, state = ranks(4, state, 3)
    third, _ = ranks(1, state, 1)
    assert first + second + third == whole
    assert state == {"rows": 5 * size}


def test_a_stream_leaves_the_global_generators_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(2).tolist(), np.random.rand(2).tolist()
    for num_workers in (0, 1):
        torch.manual_seed(1)
        np.random.seed(1)
        take(stream_loader(num_workers), 3)
        assert (torch.rand(2).tolist(), np.random.rand(2).tolist()) == expected
