"""Tokenizers by name: mistakes, and names on the hub."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers as hf

from pocketlm.errors import UserError
from pocketlm.tokenizer import build
from pocketlm.tokenizer.build import build_tokenizer, from_state
from tests.support.tokenizer_kinds import DATA, trained, word_level


@pytest.mark.parametrize("name, words", [
    ("char:abc", "write char:SIZE with a size of 3 or more, for example char:4096"),
    ("char:2", "3 or more"), ("char:0", "3 or more"), ("char:", "char:4096"),
    ("char:-5", "char:SIZE"), ("char:1e3", "char:SIZE"), ("char: 9", "char:SIZE"),
    ("bpe:abc", "bpe:SIZE"), ("bpe:256", "257 or more"), ("bpe:", "bpe:4096"),
    ("bpe:-5", "bpe:SIZE"), ("gtp2", "no copy of tokenizer 'gtp2'"),
    ("gtp2", "byte, seen-bytes, char, char:SIZE, bpe:SIZE, gpt2"),
    ("nobody/no-such-name", "no copy of tokenizer 'nobody/no-such-name'"),
    ("folder", "folder holds no tokenizer.json"),
    ("text.json", "text.json is not a tokenizer.json"),
    ("broken", "tokenizer_config.json is not JSON"),
    ("list", "tokenizer_config.json is not a JSON object"),
])  # fmt: skip
def test_a_name_that_is_no_tokenizer_is_a_user_error(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("text.json").write_text("{}")
    for name_of, content in (("broken", "{"), ("list", "[]")):
        Path(name_of).mkdir()
        word_level(Path(name_of), {"?": 0})
        Path(name_of, "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError) as error:
        build_tokenizer(name, DATA, ["text"])
    assert words in str(error.value)
    assert name in str(error.value)


def test_a_state_of_an_unknown_kind_is_a_user_error():
    with pytest.raises(UserError, match="'words'"):
        from_state({"kind": "words"})


def test_a_name_on_the_hub_is_asked_for_there(monkeypatch):
    """The library's tokenizer provides the backend and the ids of bos and eos."""
    requested = []
    backend = hf.Tokenizer.from_str(trained().json_text)

    def hub_tokenizer(name: str) -> SimpleNamespace:
        requested.append(name)
        return SimpleNamespace(backend_tokenizer=backend, bos_token_id=5, eos_token_id=7)

    monkeypatch.setattr(build, "hub_tokenizer", hub_tokenizer)
    tokenizer = build_tokenizer("owner/name", DATA, (), False, None)
    assert requested == ["owner/name"]
    assert (tokenizer.name, tokenizer.bos_id, tokenizer.eos_id) == ("owner/name", None, 7)
    assert build_tokenizer("owner/name", DATA).bos_id == 5
    assert tokenizer.encode("the cat") == trained().encode("the cat")
    assert build_tokenizer("byte", DATA).name == "byte"
    assert requested == ["owner/name"] * 2
