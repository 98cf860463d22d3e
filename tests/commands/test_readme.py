"""The statements of the README, of docs/ and of the shipped files are true."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pdoc.__main__
import pytest
import torch
import yaml

from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.loading import load_config
from pocketlm.config.sections import Config
from pocketlm.data.datasets import PaddedLMDataset
from pocketlm.model.loss import IGNORE_INDEX, cross_entropy
from pocketlm.shards.format import TokenShard

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "tests/*.md")
    for path in ROOT.glob(pattern)
)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_the_readmes_test_commands_are_the_two_halves_of_the_suite():
    block = (ROOT / "README.md").read_text().split("## Test")[1].split("```")[1]
    assert block.splitlines()[1:] == [
        "pip install -r requirements-dev.txt && python -m pytest",
        "python -m pytest -m slow",
    ]
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["addopts"].endswith("-m 'not slow and not llama_cpp'")


@pytest.mark.parametrize(
    "lines, done, status",
    [
        (["touch a", "touch b"], "ab", 0),
        (["false && touch a", "touch b"], "", 1),
        (["true && false", "touch b"], "", 1),
        (["touch a", "false"], "a", 1),
    ],
)
def test_ci_runs_the_lines_of_the_readmes_test_block_until_one_fails(tmp_path, lines, done, status):
    (tmp_path / "README.md").write_text("\n".join(["## Test", "", "```bash", *lines, "```", "x"]))
    script = (ROOT / ".ci/run").read_text()
    end = "set -euo pipefail\n" + script[script.index("commands=") :]
    assert subprocess.run(["bash", "-c", end], cwd=tmp_path).returncode == status
    assert (
        "".join(sorted(path.name for path in tmp_path.iterdir() if path.stem != "README")) == done
    )


def test_no_step_of_ci_can_fail_unnoticed():
    """Under `set -e`, a failing command that is not the last of an && list ends nothing.

    `ruff check . && ruff format --check .` let a failing ruff check pass.
    """
    script = (ROOT / ".ci/run").read_text()
    assert "set -euo pipefail" in script
    for step in ("ruff check", "ruff format --check", "mypy"):
        [line] = [line for line in script.splitlines() if line.startswith(step)]
        assert "&&" not in line
        assert "||" not in line


def test_the_readmes_tree_names_every_command_and_package():
    tree = re.search(r"```text\n(model\.py.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    files = {path.name for path in [*ROOT.glob("*.py"), *(ROOT / "pocketlm").glob("*.py")]}
    folders = {f"{path.parent.name}/" for path in (ROOT / "pocketlm").rglob("__init__.py")}
    assert (files - {"__init__.py"}) | folders <= set(tree.split())


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "")).lower().replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, fragment in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: there is no {target}"
        if fragment:
            assert fragment in anchors(file), f"{page.name}: {target} has no heading #{fragment}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    """Paths in backticks with a folder of the repository and an ending."""
    folders = "pocketlm|benchmarks|tests|docs|presets|cases|examples"
    text = page.read_text()
    for path in re.findall(rf"`((?:{folders})/[\w/.]+\.(?:py|c|yaml|md|txt|ckpt))`", text):
        assert "NAME" in path or (ROOT / path).exists(), f"{page.name}: there is no {path}"


@pytest.mark.parametrize("picture", sorted(ROOT.glob("docs/images/*")), ids=lambda p: p.name)
def test_pictures_are_small_shown_and_named_with_their_command(picture):
    assert picture.stat().st_size < 200_000
    text = "".join(path.read_text() for path in ROOT.glob("docs/*.md"))
    assert f"(images/{picture.name})" in text
    assert f"python docs/make_pictures.py {picture.stem}" in text


def test_the_walk_throughs_names_are_in_the_files_it_says():
    text = (ROOT / "docs/microgpt_walkthrough.md").read_text()
    named = re.findall(r"`([^`]+)` \[([\w/]+\.py)\]\(\.\./([\w/]+\.py)\)", text)
    assert len(named) > 15
    for symbol, file, same_file in named:
        assert file == same_file
        source = (ROOT / file).read_text()
        assert re.search(rf"\b{symbol}\b", source), f"{symbol} is not in {file}"


def test_the_names_that_contributing_lists_are_in_the_files_it_says():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| (.*`[\w/]+\.py`.*) \|$", text, re.MULTILINE)
    assert len(rows) >= 20
    for row in rows:
        files = [ROOT / file for file in re.findall(r"`([\w/]+\.py)`", row)]
        source = "".join(file.read_text() for file in files if file.exists())
        for name in re.findall(r"`(\w+)`", row):
            assert re.search(rf"\b{name}\b", source), f"{name} is not in {row}"


@pytest.mark.slow
def test_the_reference_command_documents_every_module_without_a_warning(
    tmp_path, monkeypatch, forked_commands
):
    """Here without the source beside each docstring, which takes most of the time."""
    [command] = re.findall(r"python -m pdoc (.+)", (ROOT / "README.md").read_text())
    words = shlex.split(command.split("  #")[0])
    monkeypatch.chdir(tmp_path)
    done = forked_commands.run(*words, "--no-show-source", program=pdoc.__main__.__file__)
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "api"
    documented = {
        str(page.relative_to(folder).with_suffix(".py")) for page in folder.rglob("*.html")
    }
    modules = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "pocketlm").rglob("*.py")
        if file.name != "__init__.py"
    }
    assert modules | {"model.py", "train.py", "data.py"} <= documented
    assert "Token ids (B, T) -> logits (B, T, V)" in (folder / "model.html").read_text()


def test_the_example_checkpoint_and_shard_belong_together_and_are_as_good_as_stated():
    """Loaded as a user would; the loss in examples/README.md is measured again from the shard."""
    example = load_checkpoint(ROOT / "examples/microgpt.ckpt")
    shard = TokenShard(ROOT / "examples/names_val.bin")
    assert shard.header.tokenizer == example.tokenizer.fingerprint
    rows = PaddedLMDataset(shard, example.config.training.seq_len, ends_shared=True)
    batch = rows.__getitems__(list(range(len(rows))))
    with torch.no_grad():
        summed_loss = cross_entropy(example.model(batch["input_ids"]), batch["targets"])
    loss = float(summed_loss / (batch["targets"] != IGNORE_INDEX).sum())
    training = TokenShard(ROOT / "examples/names_train.bin")
    kit = read_checkpoint(example.path)["kit"]
    assert training.header.sha256 == kit["data_sha256"]
    text = (ROOT / "examples/README.md").read_text()
    [(count, stated)] = re.findall(r"([\d,]+) names.* ([\d.]+) nats", text)
    assert int(count.replace(",", "")) == shard.header.documents
    assert float(stated) == pytest.approx(loss, abs=5e-4)
    assert example.model.config.n_parameters == 4192
    assert (ROOT / "examples/microgpt.ckpt").stat().st_size < 100_000


def test_config_yaml_states_every_key_and_its_default():
    path = ROOT / "config.yaml"
    assert load_config(path) == Config()
    stated = yaml.safe_load(path.read_text())
    assert {section: set(keys) for section, keys in stated.items()} == {
        section: set(keys) for section, keys in Config().to_dict().items()
    }


@pytest.mark.parametrize("path", sorted(ROOT.glob("presets/*.yaml")), ids=lambda p: p.name)
def test_each_preset_loads_and_holds_only_differences(path):
    config = load_config(path)
    assert config.run.name == path.stem
    values, defaults = config.to_dict(), Config().to_dict()
    same = [
        f"{section}.{key}"
        for section, keys in yaml.safe_load(path.read_text()).items()
        for key in keys
        if values[section][key] == defaults[section][key]
    ]
    assert not same


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned(name):
    for line in (ROOT / name).read_text().splitlines():
        requirement = line.split("#")[0].strip()
        unpinned = ("", "pip", "-r requirements.txt")
        assert requirement in unpinned or "==" in requirement, line
