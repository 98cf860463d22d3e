"""The YAML reader by itself: what it needs, and the positions of what it reads."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pocketlm.config.strict_yaml import build_dataclass, parse_yaml
from pocketlm.errors import FieldError, UserError


@dataclass(frozen=True)
class Fruit:
    name: str
    weights: tuple[float, float] = (1.0, 2.0)

    def __post_init__(self) -> None:
        if not self.name:
            raise FieldError("name", "is empty")


def test_the_reader_needs_neither_torch_nor_the_settings():
    """Probe suites are read with it as well."""
    program = (
        "import sys, pocketlm.config.strict_yaml; "
        "print({'torch', 'model', 'pocketlm.config.sections'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), done.returncode) == ("set()", 0), done.stderr


def test_every_key_and_item_has_its_position():
    text = "a: 1\nb:\n  - {c: 2}\n  -\n    d: [3,\n      4]\n"
    values, positions = parse_yaml(text, "f")
    assert values == {"a": 1, "b": [{"c": 2}, {"d": [3, 4]}]}
    assert positions == {
        (): "f:1",
        ("a",): "f:1",
        ("b",): "f:2",
        ("b", "0"): "f:3",
        ("b", "0", "c"): "f:3",
        ("b", "1"): "f:5",
        ("b", "1", "d"): "f:5",
        ("b", "1", "d", "0"): "f:5",
        ("b", "1", "d", "1"): "f:6",
    }


def test_plain_values_become_a_dataclass_of_the_declared_types():
    values, positions = parse_yaml("name: x\nweights: [3, 4]", "f")
    fruit = build_dataclass(Fruit, values, ("fruit",), positions, "f")
    assert fruit == Fruit("x", (3.0, 4.0))
    assert [type(weight) for weight in fruit.weights] == [float, float]


@pytest.mark.parametrize("text, message", [
    ("name: ''", "f:1: fruit.name is empty"),
    ("\nname: 3", "f:2: fruit.name is 3; it should be a valid string"),
    ("name: x\nweights: [1]", "f:2: fruit.weights is [1]; it should be tuple[float, float]"),
    ("name: x\nweigths: 1", "f:2: fruit has no key 'weigths'; did you mean weights?"),
    ("name: x\nzzz: 1", "f:2: fruit has no key 'zzz'; the choices are name, weights"),
    ("name: x\nmass: 1", "f:2: fruit has no key 'mass'; use weights"),
    ("[]", "f: fruit is a section with keys of its own, not []"),
])  # fmt: skip
def test_a_mistake_names_the_line_the_value_and_the_remedy(text, message):
    values, positions = parse_yaml(text, "f")
    with pytest.raises(UserError) as error:
        build_dataclass(Fruit, values, ("fruit",), path_below(positions), "f", other_names=OTHERS)
    assert str(error.value) == message


OTHERS = {"mass": "use weights"}


def path_below(positions: dict[tuple[str, ...], str]) -> dict[tuple[str, ...], str]:
    """Return the positions of a text that is the section `fruit` of a larger one."""
    return {("fruit", *path): position for path, position in positions.items() if path}
