"""Values typed on the command line: text is that text, and a path is what a shell means."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.config.loading import load_config, to_yaml
from pocketlm.config.sections import Config
from pocketlm.errors import UserError

# Keys of text that is not a path, whose value may be any text.
TEXT_KEYS = ["data.text_field", "data.revision", "data.config_name", "data.val_split"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/user")
    Path("c.yaml").write_text("data: {}\n")


def typed(key: str, text: str) -> object:
    """Return the value of a key that is typed on the command line."""
    section, _, name = key.partition(".")
    return getattr(getattr(load_config("c.yaml", [f"{key}={text}"]), section), name)


YAML_SYNTAX = [
    "#1 draft", "###", "---", "...", "- a", "a: b", "a:", "? a", "*.txt", "&a", "!x", "!!int 1",
    "%TAG", "@a", "`a`", "[a", "[a]", "{a}", "{a: 1}", "|", ">", ",", "a # b", "007", "1e5", "0x10",
    "2024-01-01", "12:30", "true", "no", ".inf", "'", '"', "a'b", " a ", "a\tb", "NULL", "~",
]  # fmt: skip


@pytest.mark.parametrize("text", YAML_SYNTAX)
def test_text_that_has_yaml_syntax_is_that_text(text):
    """`data.path=#1 draft.txt` was null, a YAML comment, so that the run read another corpus."""
    assert typed("data.text_field", text) == text
    assert typed("data.separator", text) == text
    if text != "~":
        assert typed("data.path", text) == text
    config = load_config("c.yaml", [f"data.separator={text}"])
    Path("again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config("again.yaml") == config


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.sampled_from(TEXT_KEYS))
def test_any_text_without_quotes_around_it_is_that_text(text, key):
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if not quoted and text not in ("null", "train"):  # a val_split is not the split to train on
        assert typed(key, text) == text


@pytest.mark.parametrize("text, value", [
    ("null", None), ("'null'", "null"), ('"a\\tb"', "a\tb"), ("'#'", "#"), ("''''", "'"),
])  # fmt: skip
def test_null_is_no_text_and_quotes_are_yaml(text, value):
    assert typed("data.revision", text) == value


@pytest.mark.parametrize("text, value", [
    ("~", "/home/user"), ("~/kit", "/home/user/kit"), ("./x.txt", "x.txt"), ("a//b/", "a/b"),
    ("a~/x", "a~/x"), ("~no such user", "~no such user"), ("./**/*.txt", "**/*.txt"),
    ("a/../b", "a/../b"),  # another file than b, if a is a link
])  # fmt: skip
def test_a_path_is_what_a_shell_means_in_one_spelling(text, value):
    for key in ("data.path", "data.val_path", "data.optional_path", "data.cache_dir"):
        assert typed(key, text) == value
    (source,) = typed("data.mixture", f"[{{path: '{text}'}}]")
    assert source.path == value
    Path("file.yaml").write_text(f"data: {{path: '{text}'}}\n")
    assert load_config("file.yaml").data.path == value


def test_the_path_of_a_tokenizer_keeps_its_dot():
    """`gpt2` is a tokenizer's name, and `./gpt2` is a folder."""
    assert typed("data.tokenizer", "./gpt2") == "./gpt2"
    assert typed("data.tokenizer", "~/gpt2") == "/home/user/gpt2"
    assert typed("training.probe_cases", "[~/x.yaml, y.yaml]") == ("/home/user/x.yaml", "y.yaml")


@pytest.mark.parametrize("text, value", [
    (r"\n\n", "\n\n"), (r"\r\n", "\r\n"), (r"a\tb", "a\tb"), (r"\\n", r"\n"), (r"\\\n", "\\\n"),
    (r"\section", r"\section"), ("\\", "\\"), ('"\\n"', "\n"), ("'\\n'", r"\n"),
])  # fmt: skip
def test_a_separator_has_the_escapes_of_a_shell(text, value):
    assert typed("data.separator", text) == value


def test_a_separator_in_a_typed_mixture_has_them_too():
    (source,) = typed("data.mixture", r"[{path: x, separator: \n--\n}]")
    assert source.separator == "\n--\n"


@pytest.mark.parametrize("text", ["20 # steps", "--- 20", "20:", "- 20"])
def test_a_number_has_no_yaml_syntax_either(text):
    with pytest.raises(UserError, match=r"training.max_steps is '.*an integer or 'auto'"):
        typed("training.max_steps", text)


EMPTY = ["path", "val_path", "optional_path", "config_name", "revision", "val_split", "separator"]


@pytest.mark.parametrize("key", [*EMPTY, "cache_dir", "tokenizer"])
def test_an_empty_text_is_refused_where_it_cannot_be_meant(key):
    """`data.path=$UNSET` trained on the default corpus."""
    with pytest.raises(UserError, match=rf"on the command line: data.{key} is empty"):
        typed(f"data.{key}", "")
    Path("file.yaml").write_text(f"data:\n  {key}: ''\n")
    with pytest.raises(UserError, match=rf"file.yaml:2: data.{key} is empty"):
        load_config("file.yaml")


@pytest.mark.parametrize("key, value, default", [
    ("separator", "line", "null"), ("val_path", "/nonexistent.txt", "null"),
    ("text_field", "body", "text"), ("errors", "replace", "strict"), ("split", "all", "train"),
    ("val_split", "test", "null"), ("optional_path", "x.txt", "null"), ("revision", "a", "null"),
    ("config_name", "en", "null"),
])  # fmt: skip
def test_a_key_that_no_source_of_a_mixture_reads_is_refused(key, value, default):
    mixture = "data.mixture=[{path: a.txt}, {path: b.txt}]"
    with pytest.raises(UserError) as error:
        load_config("c.yaml", [mixture, f"data.{key}={value}"])
    message = str(error.value)
    assert message.startswith(f"on the command line: data.{key} is {value!r}, which no source of ")
    assert message.endswith(f"and set data.{key} to {default}")
    assert load_config("c.yaml", [mixture, f"data.{key}={default}"]).data.mixture


def test_a_mixture_replaces_the_corpus_of_a_preset():
    config = load_config("c.yaml", ["data.source=names", "data.mixture=[{path: a.txt}]"])
    assert isinstance(config, Config) and config.data.sources[0].path == "a.txt"


def test_bytes_that_are_not_utf_8_are_refused_by_their_key():
    with pytest.raises(UserError, match="on the command line: data.path: .* is not UTF-8"):
        typed("data.path", os.fsdecode(b"\xff.txt"))
