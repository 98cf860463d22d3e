"""The examples in the docstrings of all modules."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def examples_by_module() -> dict[str, int]:
    """Return the number of examples written in each module that has any."""
    counts = {}
    for path in [*ROOT.glob("*.py"), *(ROOT / "pocketlm").rglob("*.py")]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        counts[name] = len(re.findall(r"^ *>>> ", path.read_text(), re.MULTILINE))
    return {name: count for name, count in sorted(counts.items()) if count}


@pytest.mark.parametrize("name, examples", examples_by_module().items())
def test_the_worked_examples_in_the_docstrings_hold(name: str, examples: int) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert results.attempted == examples  # none was left out
