"""The command infer.py: prompts, options, mistakes and the program as a whole."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infer
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.sampling import SamplingConfig
from pocketlm.errors import UserError, run_main
from pocketlm.instruction_sets import instruction_set
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.generation import tokens_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("checkpoints/best.ckpt"))
    return tmp_path


def run(capsys: pytest.CaptureFixture, *args: str) -> tuple[str, str]:
    """Return stdout and stderr of `python infer.py --device cpu` with `args`."""
    assert infer.main(["--device", "cpu", "--seed", "3", "--max-new-tokens", "12", *args]) == 0
    return capsys.readouterr()


def expected_text(checkpoint: Path, prompt: str, **params: object) -> str:
    """Return the completion from the parts: eos and prompt to ids, generated ids to UTF-8."""
    [text] = expected_texts(checkpoint, prompt, **params)
    return text


def expected_texts(checkpoint: Path | str, prompt: str, **params: object) -> list[str]:
    ids = torch.tensor([[256, *prompt.encode()]])
    changes = dict(temperature=0.8, top_p=0.95, seed=3, max_new_tokens=12) | params
    samples = tokens_of(load_checkpoint(checkpoint).model, ids, 256, **changes)
    return [bytes(i for i in ids if i is not None).decode(errors="replace") for ids in samples]


def test_prompt_file_and_standard_input_give_the_same_completion_alone(folder, capsys, monkeypatch):
    expected = expected_text(Path("checkpoints/best.ckpt"), "Où 😀") + "\n"
    out, err = run(capsys, "--prompt", "Où 😀")
    assert out == expected
    assert err == f"checkpoints/best.ckpt: step 7, float32 on cpu ({instruction_set().name})\n"
    Path("prompt.txt").write_text("Où 😀\n", encoding="utf-8")
    assert run(capsys, "--prompt-file", "prompt.txt")[0] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Où 😀\n".encode())))
    assert run(capsys)[0] == expected
    # as Notepad and PowerShell save it
    for raw in (b"\xef\xbb\xbf" + "Où 😀\r\n".encode(), "Où 😀\r\n".encode("utf-16")):
        Path("prompt.txt").write_bytes(raw)
        assert run(capsys, "--prompt-file", "prompt.txt")[0] == expected


def test_the_options_reach_the_sampling(folder, capsys):
    greedy = run(capsys, "--prompt", "a", "--temperature", "0")[0]
    assert greedy == expected_text(Path("checkpoints/best.ckpt"), "a", temperature=0.0) + "\n"
    assert run(capsys, "--prompt", "a", "--top-k", "1", "--temperature", "5")[0] == greedy
    stopped = run(capsys, "--prompt", "a", "--temperature", "0", "--stop", greedy[3])[0]
    assert stopped == greedy[: greedy.index(greedy[3])] + "\n"
    assert len(run(capsys, "--prompt", "a", "--temperature", "0", "--max-new-tokens", "1")[0]) == 2


def test_what_is_not_given_is_what_the_checkpoint_says(folder, capsys):
    greedy = run(capsys, "--prompt", "a", "--temperature", "0")[0]
    write_checkpoint(
        Path("greedy.ckpt"),
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=3, num_samples=5, prompts=("b",)),
    )
    assert infer.main(["--device", "cpu", "--ckpt", "greedy.ckpt", "--prompt", "a"]) == 0
    assert capsys.readouterr().out == greedy[:3] + "\n"
    assert run(capsys, "--ckpt", "greedy.ckpt", "--prompt", "a")[0] == greedy


def test_a_new_document_begins_with_the_token_before_every_document(folder, capsys):
    expected = expected_text(Path("checkpoints/best.ckpt"), "")
    assert run(capsys, "--new-document")[0] == expected + "\n"
    path = write_checkpoint(Path("endless.ckpt"), tokenizer=ByteTokenizer(eos=False))
    with pytest.raises(UserError, match="no token in 'byte', with which a text could begin"):
        run(capsys, "--ckpt", str(path), "--new-document")


def test_several_samples_are_numbered_and_equal_the_rows(folder, capsys):
    texts = expected_texts("checkpoints/best.ckpt", "a", num_samples=3)
    expected = [f"--- {number} ---\n{text}\n" for number, text in enumerate(texts, 1)]
    out = run(capsys, "--prompt", "a", "--num-samples", "3")[0]
    assert out == "".join(expected) + "\n"


def test_a_vocabulary_larger_than_the_tokenizers_does_not_end_in_a_traceback(folder, capsys):
    path = write_checkpoint(Path("padded.ckpt"), tokenizer=CharTokenizer("ab"), vocab_size=64)
    options = ["--temperature", "9", "--max-new-tokens", "40"]
    out, _ = run(capsys, "--ckpt", str(path), "--prompt", "ab", *options)
    assert set(out) <= set("ab\ufffd\n")


def test_the_tokenizer_may_be_named_if_it_is_the_same(folder, capsys):
    assert run(capsys, "--prompt", "a", "--tokenizer", "byte")[0] == run(capsys, "--prompt", "a")[0]


def test_the_short_form_takes_the_unnamed_run_else_the_named_one_with_the_lowest_loss(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, loss in [("a", 2.0), ("oak", 1.5), ("old-2024", 0.1), ("z", 3.0)]:
        write_checkpoint(Path("checkpoints", name, "best.ckpt"), val_loss=loss)
    write_checkpoint(Path("checkpoints/oak/last.ckpt"), val_loss=0.2)
    assert run(capsys, "--prompt", "a")[1].startswith("checkpoints/oak/best.ckpt: step 7")
    write_checkpoint(Path("checkpoints/best.ckpt"), val_loss=9.0)
    assert run(capsys, "--prompt", "a")[1].startswith("checkpoints/best.ckpt: step 7")
    assert run(capsys, "--prompt", "a", "--ckpt", "checkpoints/z/best.ckpt")[1].startswith(
        "checkpoints/z/best.ckpt: step 7"
    )


MISTAKES = {
    "--tokenizer char --prompt a": "'byte', not 'char'",
    "--tokenizer bpe:300 --prompt a": "'byte', not 'bpe:300'",
    "--prompt-file empty.txt": "the prompt is empty",
    "--prompt-file latin.txt": "byte 3 is 0xe9",
    "--prompt-file gone.txt": "gone.txt",
    "--prompt-file .": "a directory",
    "--prompt a\udcff": "not valid Unicode",
    "--prompt a --ckpt gone.ckpt": "no checkpoint gone.ckpt; here are checkpoints/best.ckpt",
    "--prompt a --ckpt empty.txt": "empty.txt is truncated or not a checkpoint",
    "--prompt a --temperature -1": "--temperature is -1.0",
    "--prompt a --temperature nan": "--temperature is nan",
    "--prompt a --top-p 0": "--top-p is 0.0",
    "--prompt a --repetition-penalty 0": "--repetition-penalty is 0.0",
    "--prompt a --max-new-tokens 0": "--max-new-tokens is 0",
    "--prompt a --num-samples 0": "--num-samples is 0",
    "--prompt a --stop=": "--stop is ('',)",
    "--prompt a --max-new-tokens 9999999999": "9999999999; it must be from 1 to 1,000,000",
    "--prompt a --top-k 258": "--top-k is 258; the vocabulary has 257 tokens",
    "--prompt a --no-repeat-ngram -1": "--no-repeat-ngram is -1",
    "--prompt a" + " --stop x" * 65: "it must be a list of at most 64 strings",
    "--prompt a --stop " + "x" * 1001: "it must be strings of at most 1,000 characters",
    "--prompt a --dtype int4 --ckpt narrow.ckpt": "int4 needs widths that 64 divides",
    "--prompt a --chat": "--chat answers typed messages",
    "--prompt=": "the prompt is empty",
    "--prompt a --device cuda": "'cuda'",
    "--prompt a --device cpu --dtype float16": "--dtype float16",
}


@pytest.mark.parametrize("args, message", MISTAKES.items(), ids=map(ascii, MISTAKES))
def test_a_mistake_is_one_line_on_stderr_and_status_2(folder, capsys, monkeypatch, args, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"caf\xe9")
    write_checkpoint(Path("narrow.ckpt"), d_ff=96)
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: infer.main(args.split()))
    out, err = capsys.readouterr()
    assert (exit_.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err


def python(folder: Path, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        env={**os.environ, **environment},
        input=stdin,
        capture_output=True,
        timeout=120,
    )


@pytest.mark.parametrize("args, message", [
    (["--tokenizer", "char"], "'byte', not 'char'"),
    (["--temperature", "-1"], "--temperature is -1.0"),
    (["--device", "cuda"], "'cuda'"),
])  # fmt: skip
def test_the_program_exits_with_status_2_and_no_traceback(folder, forked_commands, args, message):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = forked_commands.run(
        *("--prompt", "a", *args), program="infer.py", environment=environment
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def test_the_program_itself_completes_standard_input(folder):
    options = ["--temperature", "0", "--max-new-tokens", "12", "--device", "cpu"]
    done = python(folder, str(ROOT / "infer.py"), *options, stdin="Où\n".encode())
    assert done.returncode == 0
    expected = expected_text(Path("checkpoints/best.ckpt"), "Où", temperature=0.0)
    assert done.stdout.decode() == expected + "\n"
    description = f"float32 on cpu ({instruction_set().name})"
    assert done.stderr.decode() == f"checkpoints/best.ckpt: step 7, {description}\n"


def test_importing_infer_brings_no_trainer_and_prints_nothing(tmp_path):
    heavy = ["lightning", "pytorch_lightning", "datasets", "transformers", "torchmetrics", "pandas"]
    program = f"import sys, infer; print([name for name in {heavy} if name in sys.modules])"
    done = python(tmp_path, "-c", program)
    assert (done.stdout, done.stderr) == (b"[]\n", b"")
    assert list(tmp_path.iterdir()) == []
