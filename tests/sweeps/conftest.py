"""Working directories of sweeps whose runs are those of a stand-in for train.py."""

import sys
from pathlib import Path

import pytest

from pocketlm.sweeps import runs
from tests.support.training import write_text_and_config

PROGRAMS = Path(__file__).parents[1] / "programs"
CONFIG = """
run: {name: tiny}
model: {n_layers: 1, d_model: 16, n_heads: 2, n_kv_heads: 1}
data: {path: text.txt, tokenizer: byte}
training: {seq_len: 16, micro_batch_size: 4, max_steps: 40, val_every_steps: 10}
hardware: {accelerator: cpu}
"""


@pytest.fixture
def folder(reporting_folder, monkeypatch):
    """A working directory with a text and a config; runs take milliseconds, nothing is drawn."""
    for name in ("sweep.draw_sweep", "sweep.write_hparams", "scaling.draw_scaling"):
        monkeypatch.setattr(name, lambda *_: None)
    return reporting_folder


@pytest.fixture
def reporting_folder(tmp_path, monkeypatch):
    """The same, with pictures and TensorBoard files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "TRAIN", (sys.executable, str(PROGRAMS / "fake_train.py")))
    write_text_and_config(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path
