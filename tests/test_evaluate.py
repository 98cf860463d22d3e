"""The probe evaluator: scores equal to independent ones, cases checked, tables and files as promised."""

import csv
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import evaluate_checkpoints as ev
from checkpoint import kit_entry, save_whole
from config import config_from_dict
from errors import UserError
from model import Transformer
from tokenizer import ByteTokenizer, CharTokenizer, JsonTokenizer

ROOT = Path(__file__).parent.parent
CASES = [
    ev.Case("a", "one two", " three"),
    ev.Case("b", "x", " y"),
    ev.Case("c", "the longest prompt of them all", " ends"),
    ev.Case("d", "ab", "c"),
]


def make_model(vocab_size: int = 257) -> Transformer:
    torch.manual_seed(0)
    model = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "vocab_size": vocab_size, "max_seq_len": 64}
    transformer = Transformer(config_from_dict({"model": model, "training": {"seq_len": 64}}).model).eval()
    for p in transformer.parameters():  # larger than at the start of training, so that the scores differ
        p.data.mul_(5) if p.dim() == 2 else None
    return transformer


def save(path: Path, model: Transformer, step: int = 1) -> None:
    config = config_from_dict(
        {
            "model": {k: getattr(model.config, k) for k in ("n_layers", "d_model", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")},
            "data": {"tokenizer": "byte"},
            "training": {"seq_len": 64},
        }
    )
    path.parent.mkdir(exist_ok=True)
    save_whole(
        {
            "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()},
            "global_step": step,
            "kit": kit_entry(config, ByteTokenizer().state(), tokens=step * 10, val_loss=2.0),
        },
        path,
    )


def test_scores_equal_the_loss_sums_of_transformers_llama():
    """LlamaForCausalLM with labels on the target alone: its mean loss times the target's tokens."""
    model = make_model()
    c = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_ff,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta,
            tie_word_embeddings=True,
            max_position_embeddings=64,
        )
    ).eval()
    missing, unexpected = llama.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()}, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # the tied head, which is the embedding
    for case, score in zip(CASES, ev.score_cases(model, ByteTokenizer(), CASES, 5), strict=True):
        ids = [256, *(case.prompt + case.target).encode()]
        labels = [-100] * (len(ids) - len(case.target)) + list(case.target.encode())
        with torch.no_grad():
            out = llama(torch.tensor([ids]), labels=torch.tensor([labels]))
        assert score.logprob == pytest.approx(-out.loss.item() * len(case.target), abs=1e-4)  # fp32, a mean multiplied back
        first = out.logits[0, len(ids) - len(case.target) - 1].log_softmax(-1)
        assert score.rank == int((first.argsort(descending=True) == ids[-len(case.target)]).nonzero()) + 1
        assert score.top[0][1] == pytest.approx(first.max().exp().item(), rel=1e-4)


def test_a_batch_of_cases_scores_as_each_case_alone():
    model = make_model()
    together = ev.score_cases(model, ByteTokenizer(), CASES, 3)
    alone = [ev.score_cases(model, ByteTokenizer(), [case], 3)[0] for case in CASES]
    assert [s.logprob for s in together] == pytest.approx([s.logprob for s in alone], abs=1e-5)
    assert [(s.name, s.rank, s.greedy) for s in together] == [(s.name, s.rank, s.greedy) for s in alone]


def test_a_hand_worked_model_of_three_tokens():
    """With all weights of the head zero every token has probability 1/V: -2 ln V for two tokens, and no token before another."""
    tokenizer = CharTokenizer("ab")  # with unknown and end: V = 4
    model = make_model(4)
    model.embed_tokens.weight.data.zero_()
    [score] = ev.score_cases(model, tokenizer, [ev.Case("x", "a", "ba")], 5)
    assert score.logprob == pytest.approx(-2 * math.log(4), abs=1e-6)
    assert score.rank == 1
    assert score.tokens == 2


def test_the_whole_target_counts_and_not_its_first_token_alone():
    model = make_model()
    short, long = ev.score_cases(model, ByteTokenizer(), [ev.Case("s", "q", " a"), ev.Case("l", "q", " abc")], 1)
    assert short.rank == long.rank
    assert long.logprob < short.logprob
    assert (short.tokens, long.tokens) == (2, 4)


def test_prompt_and_target_are_encoded_together_behind_the_prefix():
    """A BPE merges "ab" + "c" over the border: the target then begins where the prompt alone differs."""
    tokenizer = JsonTokenizer.train_bpe(["abc abc abc xyz"] * 50, 262)
    ids, start = ev.encode_case(tokenizer, ev.Case("m", "xyz ab", "c"), 64)
    assert ids == tokenizer.prefix + tokenizer.encode("xyz abc")
    assert tokenizer.decode(ids[start:]) == " abc"
    ids, start = ev.encode_case(tokenizer, ev.Case("n", "xyz", " abc"), 64)
    assert tokenizer.decode(ids[start:]) == " abc"


def test_copies_of_the_same_weights_are_shown_once_and_the_better_model_stands_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = make_model()
    save(Path("checkpoints/step-1.ckpt"), model)
    shutil.copy("checkpoints/step-1.ckpt", "checkpoints/last.ckpt")
    save(Path("checkpoints/elsewhere.ckpt"), model, step=2)  # another file with the same weights
    better = make_model()
    optimizer = torch.optim.AdamW(better.parameters(), 1e-3)
    ids = torch.tensor([[256, *b"one two three"]])
    for _ in range(30):
        torch.nn.functional.cross_entropy(better(ids)[0, :-1], ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    save(Path("checkpoints/trained.ckpt"), better)
    Path("cases.yaml").write_text('- {name: a, prompt: "one two", target: " three"}\n')
    assert ev.main(["--cases", "cases.yaml", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [r["names"] for r in report["checkpoints"]] == [
        ["checkpoints/trained.ckpt"],
        ["checkpoints/elsewhere.ckpt", "checkpoints/last.ckpt", "checkpoints/step-1.ckpt"],
    ]
    assert ev.main(["--cases", "cases.yaml", "--csv", "--tokenizer", "byte"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["checkpoint"] for row in rows] == ["checkpoints/trained.ckpt", "checkpoints/elsewhere.ckpt"]
    assert [float(row["logprob"]) for row in rows] == pytest.approx([r["scores"][0]["logprob"] for r in report["checkpoints"]], abs=1e-5)
    assert ev.main(["--cases", "cases.yaml", "--top-k", "3"]) == 0
    table = capsys.readouterr().out
    assert table.index("trained.ckpt") < table.index("elsewhere.ckpt")
    assert "= checkpoints/last.ckpt" in table
    assert "top 3 next tokens" in table


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "a list of cases"),
        ("[]", "a list of cases"),
        ("a: 1", "a list of cases"),
        ("- 3", "bad.yaml:1: a case is"),
        (
            '- {name: a, prompt: p, target: " t"}\n- {name: a, prompt: q, target: " u"}',
            "bad.yaml:2: the name of 'a' stands already at bad.yaml:1",
        ),
        ('- {name: a, prompt: p, target: " t"}\n- {name: b, prompt: p, target: " t"}', "the prompt and target of 'b' stands already"),
        ('- {name: a, prompt: "", target: " t"}', "prompt is ''"),
        ("- {name: a, prompt: p}", "has no target"),
        ("- {name: a, prompt: p, target: 12}", "quote numbers"),
        ('- {name: a, promt: p, target: " t"}', "did you mean prompt"),
        ("- {name: a, name: b}", "stands already"),
        ("- {name: [", "not valid YAML"),
    ],
)
def test_a_wrong_suite_is_refused_with_its_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        ev.load_cases("bad.yaml")
    assert message in str(error.value)


def test_mistakes_on_the_command_line_get_one_sentence_and_status_2(tmp_path):
    (tmp_path / "cases.yaml").write_text('- {name: a, prompt: "one", target: " two"}\n')
    save(tmp_path / "checkpoints/a.ckpt", make_model())
    broken = make_model()
    broken.norm.weight.data[0] = float("nan")
    (tmp_path / "broken").mkdir()
    save(tmp_path / "broken/b.ckpt", broken)
    (tmp_path / "broken/c.ckpt").write_text("not a checkpoint")
    for arguments, message in [
        (["--checkpoints", "none/*.ckpt", "--cases", "cases.yaml"], "no checkpoint matches 'none/*.ckpt'"),
        (["--cases", "missing.yaml"], "cannot read the cases missing.yaml"),
        (["--cases", "cases.yaml", "--tokenizer", "char"], "was trained with the tokenizer 'byte'"),
        (["--cases", "cases.yaml", "--top-k", "0"], "--top-k is 0"),
        (["--cases", "cases.yaml", "--checkpoints", "broken/b.ckpt"], "not finite"),
        (["--cases", "cases.yaml", "--checkpoints", "broken/c.ckpt"], "broken/c.ckpt is truncated or not a checkpoint"),
    ]:
        done = subprocess.run([sys.executable, ROOT / "evaluate_checkpoints.py", *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_the_shipped_cases_are_stated_by_the_training_documents_they_name():
    """Each source begins exactly one document of the corpus, of the training part, and that document holds the answer."""
    from corpora import CORPORA
    from prepare import is_validation

    cases = ev.load_cases(str(ROOT / "cases/wiki_basics.yaml"))
    documents = list(CORPORA["wiki"](str(ROOT / "data")))
    assert len(cases) >= 24
    for case in cases:
        [document] = [d for d in documents if d.startswith(case.source)]
        assert not is_validation(document, 0.05), case.name
        assert case.target.strip() in document, case.name
        assert case.target.startswith(" ")
        assert not case.prompt.endswith(" ")
        assert case.target not in case.prompt
