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


@pytest.mark.parametrize("before, now, message", [
    ((2, 1), (0, 1), "set hardware.num_workers to 2, not 0"),
    ((0, 1), (1, 1), "set hardware.num_workers to 0, not 1"),
    ((0, 1), (0, 2), "set hardware.devices to 1, not 2"),
])  # fmt: skip
def test_a_stream_does_not_resume_with_other_workers_or_ranks(before, now, message):
    """They would have other documents: some text twice, and some never."""
    (workers, ranks), (other_workers, other_ranks) = before, now
    loader = stream_loader(workers, rank=DataShard(0, ranks))
    take(loader, 3)
    state = json.loads(json.dumps(loader.state_dict()))
    other = stream_loader(other_workers, rank=DataShard(0, other_ranks))
    sentence = f"a stream resumes only with the workers and devices that it began with: {message}"
    with pytest.raises(UserError, match=f"^{sentence}$"):
        other.load_state_dict(state)


def test_a_stream_leaves_the_global_generators_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(2).tolist(), np.random.rand(2).tolist()
    for num_workers in (0, 1):
        torch.manual_seed(1)
        np.random.seed(1)
        take(stream_loader(num_workers), 3)
        assert (torch.rand(2).tolist(), np.random.rand(2).tolist()) == expected
