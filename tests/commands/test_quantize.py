"""quantize.py: the checkpoints it writes, its report, and its messages."""

from pathlib import Path

import pytest
import torch

import evaluate_checkpoints
import infer
import quantize as command
from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.errors import UserError
from pocketlm.inference import placement
from pocketlm.instruction_sets import instruction_set
from pocketlm.model.quantization import quantize
from tests.support.checkpoints import write_checkpoint

TEXT = "hello, hello\n" * 30
CASES = """
- {id: x, prompt: a, answers: [b], distractors: [c]}
- {id: y, prompt: b, answers: [c], distractors: [d]}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("model.ckpt"))
    Path("text.txt").write_text(TEXT)
    Path("cases.yaml").write_text(CASES)


@pytest.fixture
def int8_checkpoint(capsys):
    command.main(["model.ckpt", "--dtype", "int8", "--to", "int8.ckpt"])
    capsys.readouterr()


def test_a_quantised_checkpoint_is_read_as_it_was_written(capsys):
    assert command.main(["model.ckpt", "--dtype", "int8", "--to", "small/model.int8.ckpt"]) == 0
    assert "small/model.int8.ckpt: int8, 0.0 MB of weights" in capsys.readouterr().out
    expected = quantize(load_checkpoint("model.ckpt").model, "int8")
    loaded = load_checkpoint("small/model.int8.ckpt")
    assert (loaded.quantized, loaded.step) == ("int8", 7)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(expected(ids), loaded.model(ids))
    weights = read_checkpoint("small/model.int8.ckpt")["state_dict"]
    assert weights["model.lm_head.weight"].dtype == torch.int8


@pytest.mark.usefixtures("int8_checkpoint")
def test_infer_and_the_evaluator_read_it_and_write_what_quantising_on_the_way_writes(capsys):
    greedy = "--prompt Hello --temperature 0 --max-new-tokens 30 --device cpu"
    texts = []
    for checkpoint in (["--ckpt", "int8.ckpt"], ["--ckpt", "model.ckpt", "--dtype", "int8"]):
        assert infer.main([*checkpoint, *greedy.split()]) == 0
        output = capsys.readouterr()
        texts.append(output.out)
        assert f"step 7, int8 on cpu ({instruction_set().name})\n" in output.err
    assert len(texts[0]) > 10
    assert texts[0] == texts[1]
    options = "--checkpoints model.ckpt int8.ckpt --cases cases.yaml"
    assert evaluate_checkpoints.main(options.split()) == 0


def test_the_report_has_a_row_for_each_dtype_and_the_first_is_bfloat16(capsys):
    """The text repeats itself: the perplexity of its first window is near that of all of it."""
    options = "model.ckpt --report --dtype int8 --text text.txt --cases cases.yaml"
    assert command.main(options.split()) == 0
    title, labels, *rows = capsys.readouterr().out.splitlines()
    assert "model.ckpt: 390 bytes of text, 2 cases" in title
    assert labels.split()[:3] == ["MB", "perplexity", "change"]
    (dtype, _, perplexity, change, *_), (other_dtype, *_) = (row.split() for row in rows)
    assert (dtype, other_dtype, change) == ("bfloat16", "int8", "+0.00%")
    checkpoint = load_checkpoint("model.ckpt")
    placement.move_to_device(checkpoint, "cpu", "bfloat16")
    ids = torch.tensor([[256, *TEXT.encode()]])
    with torch.inference_mode():
        logprobs = checkpoint.model(ids[:, :64]).float().log_softmax(-1)[0]
    first_window = torch.exp(-logprobs.gather(1, ids[0, 1:65, None]).mean())
    assert float(perplexity.replace(",", "")) == pytest.approx(first_window.item(), rel=0.5)


MISTAKES = {
    "model.ckpt": "nothing to do",
    "model.ckpt --to x.ckpt": "--to writes one checkpoint",
    "model.ckpt --to text.txt --dtype int8": "text.txt exists already",
    "int8.ckpt --report": "int8.ckpt is int8 already",
    "model.ckpt --report --characters 0": "--characters is 0",
    "gone.ckpt --report": "no checkpoint gone.ckpt",
}


@pytest.mark.parametrize("options, message", MISTAKES.items())
@pytest.mark.usefixtures("int8_checkpoint")
def test_a_mistake_is_a_sentence(options, message):
    with pytest.raises(UserError, match=message):
        command.main(options.split())


@pytest.mark.usefixtures("int8_checkpoint")
def test_another_dtype_for_a_quantised_checkpoint_is_refused():
    message = "--dtype bfloat16: int8.ckpt is int8 already; leave --dtype out"
    with pytest.raises(UserError, match=message):
        placement.move_to_device(load_checkpoint("int8.ckpt"), "cpu", "bfloat16")
