"""Sampling and generation against transformers and against uncached passes, stop texts, and the command line."""

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import infer
from model import Transformer
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.sampling import SamplingConfig, SamplingParams
from pocketlm.errors import UserError, run_main
from pocketlm.inference.generate import complete, encode_prompt, generate, generate_texts
from pocketlm.inference.text import until_stop
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from pocketlm.tokenizer.streaming import stream_text
from tests.support.checkpoints import byte_ids, confident_model, write_checkpoint

ROOT = Path(__file__).parents[2]
PLAIN = SamplingParams(temperature=1.0, top_p=1.0)


def tokens_of(
    model: Transformer, ids: Tensor, eos_id: int | None = None, **params: object
) -> list[list[int | None]]:
    """One list a row."""
    return [
        list(row)
        for row in zip(
            *generate(model, ids, dataclasses.replace(PLAIN, **params), eos_id), strict=True
        )
    ]


# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_text_equals_transformers(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = confident_model(tie_embeddings=tied)
    c = model.config
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    ))  # fmt: skip
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": p
        for name, p in model.state_dict().items()
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    theirs.tie_weights()
    prompt = byte_ids(11)
    expected = (
        theirs.eval()
        .generate(
            prompt, do_sample=False, max_new_tokens=40, attention_mask=torch.ones_like(prompt)
        )[0, 11:]
        .tolist()
    )
    assert len(set(expected)) > 10  # a text that could go wrong
    assert tokens_of(model, prompt, temperature=0, max_new_tokens=40) == [expected]


def uncached(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy text without a cache: a full pass over the window for every token."""
    size = model.config.max_seq_len
    ids, window = list(prompt), prompt[-size:]
    for _ in range(count):
        if len(window) > size:
            window = ids[-max(1, size // 2) :]
        token = int(model(torch.tensor([window]))[0, -1].argmax())
        ids, window = [*ids, token], [*window, token]
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 40])
def test_text_beyond_the_context_goes_on_from_its_last_half(length):
    """And a prompt longer than the context keeps its last tokens."""
    model, prompt = confident_model(max_seq_len=16), byte_ids(length)
    with torch.inference_mode():
        expected = uncached(model, prompt[0].tolist(), 40)
    assert len(set(expected)) > 8
    assert tokens_of(model, prompt, temperature=0, max_new_tokens=40) == [expected]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_smallest_contexts_work(size):
    model, prompt = confident_model(max_seq_len=size), byte_ids(4)
    with torch.inference_mode():
        expected = uncached(model, prompt[0].tolist(), 12)
    assert tokens_of(model, prompt, temperature=0, max_new_tokens=12) == [expected]


def test_only_the_end_of_a_long_prompt_matters():
    model = confident_model(max_seq_len=16)
    long = byte_ids(40)
    for count in (1, 30):
        assert tokens_of(model, long, seed=1, max_new_tokens=count) == tokens_of(
            model, long[:, -16:], seed=1, max_new_tokens=count
        )


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    model, prompt = confident_model(), byte_ids(5)
    torch.manual_seed(1)
    first = tokens_of(model, prompt, seed=7, max_new_tokens=30)
    torch.manual_seed(2)
    assert tokens_of(model, prompt, seed=7, max_new_tokens=30) == first
    assert tokens_of(model, prompt, seed=8, max_new_tokens=30) != first
    hot = dict(temperature=50.0, max_new_tokens=30)  # nearly uniform: 61^30 texts
    assert tokens_of(model, prompt, **hot) != tokens_of(model, prompt, **hot)


def test_samples_of_one_prompt_differ_and_greedy_ones_do_not():
    model, prompt = confident_model(), byte_ids(5)
    rows = tokens_of(model, prompt, num_samples=4, seed=1, max_new_tokens=20)
    assert len(rows) == len({tuple(row) for row in rows}) == 4
    greedy = tokens_of(model, prompt, num_samples=3, temperature=0, max_new_tokens=20)
    assert greedy == 3 * tokens_of(model, prompt, temperature=0, max_new_tokens=20)


def test_the_rows_of_a_batch_do_not_meet():
    model, prompts = confident_model(), byte_ids(6, batch=3)
    alone = [
        tokens_of(model, prompt[None], temperature=0, max_new_tokens=20)[0] for prompt in prompts
    ]
    assert tokens_of(model, prompts, temperature=0, max_new_tokens=20) == alone


def test_the_end_of_a_document_ends_a_row_and_the_last_one_ends_it_all():
    model, prompts = confident_model(), byte_ids(6, batch=3)
    free = tokens_of(model, prompts, temperature=0, max_new_tokens=40)
    eos = next(
        token for token in free[0][5:] if all(token in row for row in free)
    )  # a token that every row comes to
    ends = [row.index(eos) for row in free]
    assert len(set(ends)) > 1
    rows = tokens_of(model, prompts, eos, temperature=0, max_new_tokens=40)
    assert [row[:end] for row, end in zip(rows, ends, strict=True)] == [
        row[:end] for row, end in zip(free, ends, strict=True)
    ]
    assert all(token is None for row, end in zip(rows, ends, strict=True) for token in row[end:])
    assert {len(row) for row in rows} == {max(ends) + 1}


# ---- stop texts ------------------------------------------------------------------------------------------------------

pieces_of = st.lists(st.text(alphabet="abc\n", max_size=4), max_size=12)
a_stop = st.text(alphabet="abc\n", min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(pieces_of, a_stop)
def test_a_stop_text_cuts_at_its_first_occurrence_wherever_the_pieces_end(pieces, stop):
    assert "".join(until_stop(iter(pieces), (stop,))) == "".join(pieces).partition(stop)[0]


@settings(max_examples=300, deadline=None)
@given(pieces_of, st.lists(a_stop, max_size=3).map(tuple))
@example(["abc"], ("abc", "b"))
def test_of_several_stop_texts_the_first_that_is_complete_cuts(pieces, stops):
    """So the result is the same however the text is cut into pieces, a character at a time too."""
    text = "".join(pieces)
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            text = text[: end - max(map(len, found))]
            break
    assert "".join(until_stop(iter(pieces), stops)) == text


def test_nothing_is_held_back_that_cannot_become_a_stop_text():
    taken, shown = [], ""
    for piece in until_stop((taken.append(letter) or letter for letter in "abcdefgh"), ("xyz",)):
        shown += piece
        assert len(shown) >= len(taken) - 2
    assert shown == "abcdefgh"
    assert next(until_stop(iter(["ab", "cd"]), ())) == "ab"


def test_a_sample_that_comes_to_a_stop_text_ends_and_the_others_go_on():
    """Each text is cut where it would be alone, and no token is drawn for it after that."""
    model, tokenizer = confident_model(vocab_size=257), ByteTokenizer()
    params = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=60, num_samples=5, seed=3)
    free = generate_texts(model, tokenizer, [[65]], params)
    stop = free[0][20:22]
    cut = generate_texts(model, tokenizer, [[65]], dataclasses.replace(params, stop=(stop,)))
    assert cut == [text.partition(stop)[0] for text in free]
    assert len(cut[0]) <= 20


def test_prompts_of_different_lengths_go_on_together_as_they_do_alone():
    model, tokenizer = confident_model(vocab_size=257), ByteTokenizer()
    prompts = [list(b"a"), list(b"something longer"), list(b"x" * 100)]
    params = SamplingParams(temperature=1.0, max_new_tokens=30, num_samples=2, seed=5)
    together = generate_texts(model, tokenizer, prompts, params)
    alone = [generate_texts(model, tokenizer, [prompt], params) for prompt in prompts]
    assert together == [texts[sample] for sample in range(2) for texts in alone]


def test_nothing_is_drawn_after_a_stop_text():
    drawn = []
    assert (
        "".join(
            until_stop((drawn.append(piece) or piece for piece in ["a", "b", "c", "d"]), ("b",))
        )
        == "a"
    )
    assert drawn == ["a", "b"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("checkpoints/best.ckpt"))
    return tmp_path


def run(capsys: pytest.CaptureFixture, *args: str) -> tuple[str, str]:
    """stdout and stderr of `python infer.py --device cpu` with `args`."""
    assert infer.main(["--device", "cpu", "--seed", "3", "--max-new-tokens", "12", *args]) == 0
    return capsys.readouterr()


def expected_text(checkpoint: Path, prompt: str, **params: object) -> str:
    """The completion, from the parts that the tests above check: [eos] prompt in, ids out, bytes read as UTF-8."""
    loaded = load_checkpoint(checkpoint)
    ids = torch.tensor([[256, *prompt.encode()]])
    changes = dict(temperature=0.8, top_p=0.95, seed=3, max_new_tokens=12) | params
    return bytes(
        i for i in tokens_of(loaded.model, ids, 256, **changes)[0] if i is not None
    ).decode(errors="replace")


def test_prompt_file_and_standard_input_give_the_same_completion_alone(folder, capsys, monkeypatch):
    expected = expected_text(Path("checkpoints/best.ckpt"), "Où 😀") + "\n"
    out, err = run(capsys, "--prompt", "Où 😀")
    assert out == expected
    assert err == "checkpoints/best.ckpt: step 7, float32 on cpu\n"
    Path("prompt.txt").write_text("Où 😀\n", encoding="utf-8")
    assert run(capsys, "--prompt-file", "prompt.txt")[0] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Où 😀\n".encode())))
    assert run(capsys)[0] == expected


def test_the_options_reach_the_sampling(folder, capsys):
    greedy = run(capsys, "--prompt", "a", "--temperature", "0")[0]
    assert greedy == expected_text(Path("checkpoints/best.ckpt"), "a", temperature=0.0) + "\n"
    assert run(capsys, "--prompt", "a", "--top-k", "1", "--temperature", "5")[0] == greedy
    assert (
        run(capsys, "--prompt", "a", "--temperature", "0", "--stop", greedy[3])[0]
        == greedy[: greedy.index(greedy[3])] + "\n"
    )
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


def test_a_new_document_begins_with_what_stands_before_every_document(folder, capsys):
    rows = tokens_of(load_checkpoint("checkpoints/best.ckpt").model, torch.tensor([[256]]), 256, temperature=0.8, top_p=0.95, seed=3,
                     max_new_tokens=12)  # fmt: skip
    assert (
        run(capsys, "--new-document")[0]
        == bytes(i for i in rows[0] if i is not None).decode(errors="replace") + "\n"
    )
    path = write_checkpoint(Path("endless.ckpt"), tokenizer=ByteTokenizer(eos=False))
    with pytest.raises(UserError, match="no token in 'byte', with which a text could begin"):
        run(capsys, "--ckpt", str(path), "--new-document")


def test_several_samples_are_numbered_and_equal_the_rows(folder, capsys):
    rows = tokens_of(load_checkpoint("checkpoints/best.ckpt").model, torch.tensor([[256, 97]]), 256, temperature=0.8, top_p=0.95, seed=3,
                     max_new_tokens=12, num_samples=3)  # fmt: skip
    texts = [bytes(i for i in row if i is not None).decode(errors="replace") for row in rows]
    out = run(capsys, "--prompt", "a", "--num-samples", "3")[0]
    assert (
        out == "".join(f"--- {number} ---\n{text}\n" for number, text in enumerate(texts, 1)) + "\n"
    )


def test_a_vocabulary_larger_than_the_tokenizers_does_not_end_in_a_traceback(folder, capsys):
    path = write_checkpoint(Path("padded.ckpt"), tokenizer=CharTokenizer("ab"), vocab_size=64)
    out, _ = run(
        capsys,
        "--ckpt",
        str(path),
        "--prompt",
        "ab",
        "--temperature",
        "9",
        "--max-new-tokens",
        "40",
    )
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
    "--prompt a --max-new-tokens 9999999999": "--max-new-tokens is 9999999999; it must be from 1 to 1,000,000",
    "--prompt a --top-k 258": "--top-k is 258, and the vocabulary has 257 entries",
    "--prompt a --no-repeat-ngram -1": "--no-repeat-ngram is -1",
    "--prompt a" + " --stop x" * 65: "it must be a list of at most 64 texts",
    "--prompt a --stop " + "x" * 1001: "it must be texts of at most 1,000 characters",
    "--prompt a --dtype int4 --ckpt narrow.ckpt": "int4 needs widths that 64 divides",
    "--prompt a --chat": "--chat answers to what is typed",
    "--prompt=": "the prompt is empty",
    "--prompt a --device cuda": "'cuda'",
    "--prompt a --device cpu --dtype float16": "--dtype float16",
}


@pytest.mark.parametrize("args, said", MISTAKES.items(), ids=map(ascii, MISTAKES))
def test_a_mistake_is_one_line_on_stderr_and_status_2(folder, capsys, monkeypatch, args, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"caf\xe9")
    write_checkpoint(Path("narrow.ckpt"), d_ff=96)
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: infer.main(args.split()))
    out, err = capsys.readouterr()
    assert (exit_.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert said in err


ODD = {
    "nul": "a\0b",
    "right to left": "مرحبا שלום",
    "emoji": "👩‍👩‍👧‍👦 🇦🇪",
    "special": "<|endoftext|> <|im_end|>",
    "blank": " \t\n\n",
    "long": "word " * 200_000,
}


@pytest.mark.parametrize("prompt", ODD.values(), ids=ODD)
@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), JsonTokenizer.train_bpe(["a word"], 300)],
    ids=["byte", "bpe:300"],
)
def test_any_text_is_a_prompt_and_only_text(tmp_path, tokenizer, prompt):
    """Its ids are those of its bytes or pieces, behind the token that begins a document, which the text cannot spell."""
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "x.ckpt", tokenizer=tokenizer))
    ids = encode_prompt(tokenizer, prompt)
    assert ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids[1:]) == prompt
    text = "".join(
        piece
        for _, piece in complete(
            checkpoint, prompt, SamplingParams(temperature=0.0, max_new_tokens=5)
        )
    )
    rows = generate(
        checkpoint.model,
        torch.tensor([ids[-64:]]),
        SamplingParams(temperature=0.0, max_new_tokens=5),
        tokenizer.eos_id,
    )
    assert text == "".join(stream_text(tokenizer, [token for [token] in rows if token is not None]))


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), JsonTokenizer.train_bpe(["a"], 257)], ids=["byte", "bpe:257"]
)
def test_half_a_character_in_the_prompt_is_a_mistake(tmp_path, tokenizer):
    """A shell hands over bytes that are not UTF-8 as lone surrogates."""
    path = write_checkpoint(tmp_path / "x.ckpt", tokenizer=tokenizer)
    with pytest.raises(UserError, match="not valid Unicode"):
        list(complete(load_checkpoint(path), "a\udcff", PLAIN))


def command(folder: Path, *args: str, given: bytes = b"") -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        env=environment,
        input=given,
        capture_output=True,
        timeout=120,
    )


@pytest.mark.parametrize("args, said", [
    (["--tokenizer", "char"], b"'byte', not 'char'"),
    (["--temperature", "-1"], b"--temperature is -1.0"),
    (["--device", "cuda"], b"'cuda'"),
])  # fmt: skip
def test_the_program_itself_exits_with_status_2_and_no_traceback(folder, args, said):
    done = command(folder, str(ROOT / "infer.py"), "--prompt", "a", *args)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert done.stderr.startswith(b"error: ")
    assert said in done.stderr


def test_the_program_itself_completes_standard_input(folder):
    done = command(
        folder,
        str(ROOT / "infer.py"),
        "--temperature",
        "0",
        "--max-new-tokens",
        "12",
        "--device",
        "cpu",
        given="Où\n".encode(),
    )
    assert done.returncode == 0
    assert (
        done.stdout.decode()
        == expected_text(Path("checkpoints/best.ckpt"), "Où", temperature=0.0) + "\n"
    )
    assert done.stderr.decode() == "checkpoints/best.ckpt: step 7, float32 on cpu\n"


def test_importing_infer_brings_no_trainer_and_prints_nothing(tmp_path):
    heavy = ["lightning", "pytorch_lightning", "datasets", "transformers", "torchmetrics", "pandas"]
    done = command(
        tmp_path,
        "-c",
        f"import sys, infer; print([name for name in {heavy} if name in sys.modules])",
    )
    assert (done.stdout, done.stderr) == (b"[]\n", b"")
    assert list(tmp_path.iterdir()) == []
