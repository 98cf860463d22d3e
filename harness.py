"""EleutherAI's lm-evaluation-harness on our checkpoints, and our suites as its tasks. Needs lm-eval (requirements-dev.txt).

    python harness.py export --cases 'cases/*.yaml' --to lm_eval_tasks
    python harness.py run --include lm_eval_tasks --tasks grammar,words
    python harness.py run --ckpt checkpoints/best.ckpt --tasks blimp --limit 100

Tasks that are not in --include are lm-eval's own, which fetches their data from the hub. In Python:

    lm_eval.simple_evaluate(model=harness.as_lm(load_checkpoint(path)), tasks=[...])
"""

import argparse
from collections import Counter
from pathlib import Path

from pocketlm.errors import UserError, run_main
from pocketlm.evaluation.cases import known_suites, load_suite
from pocketlm.evaluation.lm_eval_harness import export, run, task_name
from pocketlm.files import expand_globs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="lm-evaluation-harness on our checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export", help="write suites as tasks of lm-eval")
    exporting.add_argument(
        "--cases", nargs="+", required=True, help="suites: YAML or JSON files, or quoted patterns"
    )
    exporting.add_argument(
        "--to",
        required=True,
        metavar="DIR",
        type=Path,
        help="folder for the tasks, whose data are found only there",
    )
    running = commands.add_parser("run", help="score a checkpoint on tasks")
    running.add_argument("--ckpt", help="checkpoint; by default the best there is")
    running.add_argument(
        "--tasks",
        required=True,
        metavar="NAME[,NAME]",
        help="tasks, groups or tags; an exported suite's name is a tag",
    )
    running.add_argument("--include", metavar="DIR", help="folder of exported tasks")
    running.add_argument("--limit", type=float, help="cases of each task; below 1 a share of them")
    running.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if args.command == "run":
        run(args)
        return 0
    suites = [load_suite(path) for path in expand_globs(args.cases, "suite", known_suites)]
    if twins := [name for name, n in Counter(map(task_name, suites)).items() if n > 1]:
        raise UserError(f"two suites are called {twins[0]}; give one of them another name")
    print("\n".join(name for suite in suites for name in export(suite, args.to)))
    return 0


if __name__ == "__main__":
    run_main(main)
