"""scaling.py: fits all sizes but the largest, predicts it, trains it, and compares."""

import re
from collections import Counter
from pathlib import Path

import pytest

import scaling
from pocketlm.config.loading import load_config
from pocketlm.errors import UserError
from tests.sweeps.conftest import CONFIG

SERIES = Path(scaling.__file__).with_name("presets") / "series"


@pytest.fixture
def sizes(folder):
    """Configs of five sizes; a run's loss is 0.042 + 1 / its steps."""
    for steps in (10, 20, 40, 80, 160):
        text = CONFIG.replace("max_steps: 40", f"max_steps: {steps}, lr: 1e-2")
        (folder / f"size_{steps:03d}.yaml").write_text(text)
    return ["--configs", "size_*.yaml"]


def test_the_largest_size_is_predicted_from_the_others_and_trained_last(sizes, capsys):
    command = [*sizes, "training.lr=1e-2"]
    assert scaling.main(command) == 0
    captured = capsys.readouterr()
    # 1 / 160 + 0.042 by the law of the stand-in, whose exponent is 1
    [predicted] = re.findall(r"prediction for size_160: (\S+) \[", captured.out)
    assert float(predicted) == pytest.approx(0.042 + 1 / 160, abs=2e-4)
    assert re.search(r"exponent 95 % \[(0.99|1.00)", captured.out)
    assert "measured: 0.0483, off by" in captured.out
    lines = Path("trained.txt").read_text().splitlines()
    assert lines[-1].endswith(" 160") and set(Counter(lines).values()) == {1}
    before = captured.err.index("prediction for size_160")
    assert before < captured.err.index("[1/1] size_160")
    scaling.main(command)
    assert Path("trained.txt").read_text().splitlines() == lines


def test_too_few_and_equal_sizes_and_other_configs_are_refused(sizes):
    with pytest.raises(UserError, match="4 configs are too few"):
        scaling.main(["--configs", "size_0*.yaml"])
    Path("size_999.yaml").write_text(Path("size_160.yaml").read_text())
    with pytest.raises(UserError, match="take the same compute"):
        scaling.main(sizes)
    Path("size_999.yaml").unlink()
    with pytest.raises(UserError, match="--seeds is 0"):
        scaling.main([*sizes, "--seeds", "0"])
    with pytest.raises(UserError, match="no config matches"):
        scaling.main(["--configs", "none_*.yaml"])


def test_the_shipped_series_has_equal_tokens_per_parameter():
    """Six widths, each with the number of parameters that its comment states."""
    paths = sorted(SERIES.glob("*.yaml"))
    assert len(paths) == 6
    for path in paths:
        config = load_config(path).with_vocab_size(257)
        tokens, parameters = scaling.tokens_of(config), config.model.n_parameters
        assert tokens / parameters == pytest.approx(20, rel=0.01)  # whole steps
        assert f"# {parameters:,} parameters, {tokens:,} tokens" in path.read_text()
        assert config.run.name == path.stem and f"width {config.model.d_model}" in path.read_text()
