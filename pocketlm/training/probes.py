"""Probe suites that a run scores at every validation."""

import lightning as L

from pocketlm.config.sections import Config
from pocketlm.data.prepare import PreparedData
from pocketlm.evaluation.cases import load_suite, merge_suites
from pocketlm.evaluation.exports import scalars
from pocketlm.evaluation.results import Result
from pocketlm.evaluation.scoring import encode_case, score_cases
from pocketlm.training.metrics import MetricsLogger


class Probes(L.Callback):
    """At every validation, the scores of `training.probe_cases`: to TensorBoard by category, their mean to metrics.csv too."""

    def __init__(self, config: Config, data: PreparedData, metrics: MetricsLogger):
        self.metrics, self.tokenizer = metrics, data.tokenizer
        suite = merge_suites(load_suite(path) for path in config.training.probe_cases)
        self.encoded = [
            encode_case(data.tokenizer, case, config.model.max_seq_len) for case in suite.cases
        ]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        module.model.eval()
        scores = score_cases(module.model, self.tokenizer, self.encoded, top_k=1)
        module.model.train()
        step, tokens = trainer.global_step, module.tokens_so_far()
        result = Result(
            [], step, tokens, module.validation["loss"], "", self.tokenizer.fingerprint, scores
        )
        found = scalars(result)
        trainer.logger.log_metrics(
            {name: value for name, value in found.items() if name != "probe/macro"}, step
        )
        if result.graded:
            self.metrics.write(trainer, step, tokens, {"probe/macro": result.macro})
            low, high = result.macro_interval
            self.metrics.say(
                step,
                f"probes {result.macro:.1%} [{low:.1%}, {high:.1%}] of {len(result.graded)} cases",
                always=True,
            )
