"""Every key has the same comment in config.yaml and on the field of its dataclass."""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from pathlib import Path

import pytest

from pocketlm.config.sections import SECTIONS

ROOT = Path(__file__).parents[2]


def yaml_comments() -> dict[tuple[str, str], str]:
    """Return the comment of each (section, key); it may continue on the lines below the key."""
    comments: dict[tuple[str, str], list[str]] = {}
    section, current = "", None
    for line in (ROOT / "config.yaml").read_text().splitlines():
        if match := re.match(r"(\w+):", line):
            section, current = match[1], None
        elif match := re.match(r"  (\w+):", line):
            current = comments.setdefault((section, match[1]), [])
        if current is not None and (match := re.search(r"\s# (.*)", line)):
            current.append(match[1])
    return {key: " ".join(lines) for key, lines in comments.items()}


def field_comments(kind: type) -> dict[str, str]:
    """Return the comments of a dataclass's own fields: the lines above a field, and its end."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    result = {}
    for field in ast.parse(source).body[0].body:
        if isinstance(field, ast.AnnAssign):
            first = field.lineno
            while lines[first - 2].strip().startswith("#"):
                first -= 1
            numbers = range(first, field.end_lineno + 1)
            result[field.target.id] = " ".join(comments[n] for n in numbers if n in comments)
    return result


YAML = yaml_comments()


def test_every_key_of_every_section_has_a_comment_in_config_yaml():
    keys = {
        (section, key) for section, kind in SECTIONS.items() for key in kind.__dataclass_fields__
    }
    assert YAML.keys() == keys
    assert all(YAML.values())


@pytest.mark.parametrize("section", SECTIONS)
def test_the_dataclass_has_the_comments_of_config_yaml(section):
    """Except that YAML writes null for Python's None."""
    fields: dict[str, str] = {}
    for kind in reversed(SECTIONS[section].__mro__[:-1]):  # the class and its ancestors, but object
        fields |= field_comments(kind)
    fields = {key: comment.replace("None", "null") for key, comment in fields.items()}
    assert fields == {key: comment for (name, key), comment in YAML.items() if name == section}
