"""Score checkpoints with EleutherAI's lm-evaluation-harness, and export suites as its tasks.

    python harness.py export --cases 'cases/*.yaml' --to lm_eval_tasks
    python harness.py run --include lm_eval_tasks --tasks grammar,words
    python harness.py run --ckpt checkpoints/best.ckpt --tasks blimp --limit 100

`run` needs lm-eval (requirements-dev.txt). Tasks that are not in --include are lm-eval's own, which
download their data from the hub. In Python:

    lm_eval.simple_evaluate(model=harness.as_lm(load_checkpoint(path)), tasks=[...])
"""

import argparse
import importlib
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from zlib import crc32

import yaml

from pocketlm.checkpoint.loading import Checkpoint, best_checkpoint, load_checkpoint
from pocketlm.errors import UserError, run_main
from pocketlm.evaluation.cases import Case, Suite, known_suites, load_suite
from pocketlm.evaluation.scoring import case_text
from pocketlm.files import expand_globs

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]  # has no types

ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
BITS_PER_BYTE = {
    "metric": "bits_per_byte",
    "aggregation": "bits_per_byte",
    "higher_is_better": False,
}
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "prompt", "doc_to_choice": "choices"}

# kind of task: how lm-eval reads the fields of a row, and what it measures
TASKS: dict[str, dict[str, Any]] = {
    "choice": CHOICE | {"metric_list": [ACCURACY, ACCURACY | {"metric": "acc_bytes"}]},
    "schema": CHOICE | {"doc_to_text": "gold", "metric_list": [ACCURACY]},
    "cloze": {"output_type": "loglikelihood", "doc_to_text": "prompt", "metric_list": [ACCURACY]},
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "metric_list": [BITS_PER_BYTE],
    },
}


# ---- a checkpoint as a model of lm-eval ----


def lm_eval_adapter() -> ModuleType:
    """Import pocketlm.evaluation.lm_eval_adapter. Raise UserError without lm-eval.

    It is imported by name and on demand, since `export` does not need lm-eval, which is optional
    and takes seconds to import.
    """
    try:
        return importlib.import_module("pocketlm.evaluation.lm_eval_adapter")
    except ImportError as error:
        raise UserError(
            f"lm-eval cannot be imported ({error}); "
            "install it with: pip install -r requirements-dev.txt"
        ) from None


def as_lm(checkpoint: Checkpoint) -> "TemplateLM":
    """Return the checkpoint as a model for lm_eval.simple_evaluate."""
    return lm_eval_adapter().CheckpointLM(checkpoint)


# ---- suites as tasks of lm-eval ----


def as_row(case: Case) -> tuple[str, dict[str, Any]] | None:
    """Return a case's kind of task and its row there, or None if lm-eval cannot grade it."""
    row = {"id": case.id, "category": case.category, "prompt": case.prompt}
    if case.type == "schema":
        fields = {"choices": case.contexts, "gold": case.gold, "target": case.continuation}
        return "schema", row | fields
    if case.type == "text":
        return "text", row | {"target": case_text(case)}
    if case.chance is not None:
        return "choice", row | rotated_choices(case)
    if case.type == "cloze" and len(case.answers) == 1:
        return "cloze", row | {"target": case.answers[0]}
    return None


def rotated_choices(case: Case) -> dict[str, Any]:
    """Return the choices and the indices of the right ones, rotated by a hash of the id.

    lm-eval takes the first of equally likely choices, so a right one must not always be first.
    """
    texts = [text for _, text in case.candidates]  # the right ones first
    offset = crc32(case.id.encode()) % len(texts)
    targets = [(i - offset) % len(texts) for i in range(case.n_right)]
    return {"choices": texts[offset:] + texts[:offset], "target": targets}


def task_name(suite: Suite) -> str:
    """Return the name of the lm-eval tag that groups the suite's tasks."""
    return re.sub(r"[^\w.-]+", "_", suite.name)


def export_suite(suite: Suite, folder: Path) -> list[str]:
    """Write a YAML and a JSONL file for each kind of case in the suite; return the tasks' names.

    Prints on stderr which cases are left out.
    """
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for case in suite.cases:
        if exported := as_row(case):
            kind, row = exported
            rows[kind].append(row)
        elif case.type == "generate":
            left_out["of type generate"] += 1
        else:
            left_out["with several answers and no distractors"] += 1
    for reason, n in left_out.items():
        print(f"{suite.name}: {n} cases {reason} are left out", file=sys.stderr)
    if n := sum(case.scoring in ("token", "pmi") for case in suite.cases):
        print(
            f"{suite.name}: {n} cases are scored by token or pmi here, and by their sum in lm-eval",
            file=sys.stderr,
        )
    folder.mkdir(parents=True, exist_ok=True)
    return [write_task(suite, kind, rows[kind], folder) for kind in rows]


def write_task(suite: Suite, kind: str, rows: list[dict[str, Any]], folder: Path) -> str:
    """Write the files of one task; return its name."""
    name = f"{task_name(suite)}_{kind}"
    data = folder.absolute() / f"{name}.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    data.write_text("".join(lines), encoding="utf-8")
    task = {
        "task": name,
        "tag": task_name(suite),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_target": "target",
        "target_delimiter": "",
        "num_fewshot": 0,
        **TASKS[kind],
        "metadata": {"version": 1.0, "suite": suite.name, "sha256": suite.sha256},
    }
    text = yaml.safe_dump(task, sort_keys=False, allow_unicode=True)
    data.with_suffix(".yaml").write_text(text, encoding="utf-8")
    return name


# ---- command line ----


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Score checkpoints with lm-evaluation-harness, or export suites as its tasks."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("export", help="write suites as tasks of lm-eval").add_argument
    add("--cases", nargs="+", required=True, help="suites: YAML or JSON files, or quoted patterns")
    add(
        "--to",
        required=True,
        metavar="DIR",
        type=Path,
        help="folder for the tasks; they refer to it and cannot be moved",
    )

    add = commands.add_parser("run", help="score a checkpoint on tasks").add_argument
    add("--ckpt", help="checkpoint (default: the one with the lowest validation loss)")
    add(
        "--tasks",
        required=True,
        metavar="NAME[,NAME]",
        help="tasks, groups or tags; the name of an exported suite is a tag",
    )
    add("--include", metavar="DIR", help="folder of exported tasks")
    add(
        "--limit",
        type=float,
        help="maximum number of cases per task; below 1: share of the cases (default: all)",
    )
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def export(patterns: list[str], folder: Path) -> list[str]:
    """Export the suites; return the tasks' names. Raise UserError if two suites share a name."""
    suites = [load_suite(path) for path in expand_globs(patterns, "suite", known_suites)]
    for name, n in Counter(task_name(suite) for suite in suites).items():
        if n > 1:
            raise UserError(f"two suites are called {name}; give one of them another name")
    names: list[str] = []
    for suite in suites:
        names += export_suite(suite, folder)
    return names


def run(args: argparse.Namespace) -> str:
    """Score the checkpoint on the tasks; return the results as text."""
    adapter = lm_eval_adapter()
    checkpoint = load_checkpoint(args.ckpt or best_checkpoint())
    if args.include and not Path(args.include).is_dir():
        raise UserError(
            f"--include {args.include} is not a folder; "
            f"make it with: python harness.py export --cases FILE --to {args.include}"
        )
    results = adapter.run_tasks(checkpoint, args.tasks.split(","), args.include, args.limit)
    text: str = adapter.results_json(results) if args.json else adapter.results_table(results)
    return text


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.command == "export":
        print("\n".join(export(args.cases, args.to)))
    else:
        print(run(args))
    return 0


if __name__ == "__main__":
    run_main(main)
