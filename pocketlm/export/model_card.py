"""The model card: a README.md with the data, recipe, results and use of a model."""

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.config.sections import SourceConfig

SCORES_FILE = "scores.json"  # beside a run's checkpoints, written by its verdict
PICTURE_FILE = "loss.png"
FOLDERS = r"(?<!\S)[/~]\S*/"  # of an absolute path in a text


def picture_of(checkpoint: Checkpoint) -> Path | None:
    """Return the loss curve of the checkpoint's run, which lies beside it; None without one."""
    picture = checkpoint.path.parent / PICTURE_FILE
    return picture if checkpoint.tokens and picture.is_file() else None


def baselines_of(checkpoint: Checkpoint) -> dict[str, float]:
    """Return the losses of the counting baselines, in nats per token, by name.

    They lie beside the checkpoint once its run is complete. Without them there is the uniform one.
    """
    vocab_size = checkpoint.tokenizer.vocab_size
    file = checkpoint.path.parent / SCORES_FILE
    if checkpoint.tokens and file.is_file():
        scores = json.loads(file.read_text(encoding="utf-8"))
        if scores["tokenizer_sha256"] == checkpoint.tokenizer.fingerprint:
            losses: dict[str, float] = scores["baselines"]
            return losses
    return {"uniform": math.log(vocab_size)}


def model_card(checkpoint: Checkpoint, class_name: str, name: str) -> str:
    """Return the card in Markdown, with the header that the Hugging Face hub reads."""
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pocketlm"],
    }
    sections = [
        f"---\n{yaml.safe_dump(header)}---",
        f"# {name}",
        introduction(checkpoint, class_name),
    ]
    if checkpoint.tokens:
        sections += ["## Data", data_section(checkpoint)]
        sections += ["## Recipe", recipe_section(checkpoint)]
    if checkpoint.val_loss is not None:
        sections += ["## Results", results_table(checkpoint)]
    if picture_of(checkpoint) is not None:
        sections.append(f"![Loss against optimizer steps]({PICTURE_FILE})")
    sections += ["## Use", usage(checkpoint, name)]
    return "\n\n".join(sections) + "\n"


def introduction(checkpoint: Checkpoint, class_name: str) -> str:
    model = checkpoint.model.config
    origin = (
        f"trained from scratch with pocketlm for {checkpoint.step:,} optimizer steps"
        if checkpoint.tokens
        else "converted from a pretrained model"
    )
    decay = checkpoint.config.training.ema_decay if checkpoint.tokens else 0
    average = (
        f" The weights are their moving average (`ema_decay` {decay}), which was validated."
        if decay
        else ""
    )
    return (
        f"A `{class_name}` {origin}: {model.n_parameters:,} parameters, {model.n_layers} layers, "
        f"width {model.d_model}, context of {model.max_seq_len:,} tokens, vocabulary of "
        f"{checkpoint.tokenizer.vocab_size:,} tokens "
        f"(`{without_folders(checkpoint.tokenizer.name)}`).{average}"
    )


def data_section(checkpoint: Checkpoint) -> str:
    data = checkpoint.config.data
    lines = [f"- {source_line(source)}" for source in data.sources]
    lines.append(f"- {checkpoint.tokens:,} tokens of training, repetitions counted")
    separate = all(source.val_path or source.val_split for source in data.sources)
    if not separate:
        lines.append(f"- {data.val_share:.0%} of the documents held out for validation")
    if checkpoint.tokenizer.note:
        lines.append(f"- {re.sub(FOLDERS, '', checkpoint.tokenizer.note)}")
    return "\n".join(lines)


def source_line(source: SourceConfig) -> str:
    return f"`{without_folders(source.path or source.source)}`"


def without_folders(value: Any) -> Any:
    """Return a setting with the names alone of absolute paths, which tell of a user's computer."""
    if isinstance(value, dict):
        return {key: without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    is_absolute = isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~"))
    return Path(value).name if is_absolute else value


def recipe_section(checkpoint: Checkpoint) -> str:
    """Return the settings of training and of the architecture as YAML: `train.py` reads them."""
    sections = checkpoint.config.to_dict()
    recipe = {name: without_folders(sections[name]) for name in ("model", "data", "training")}
    return f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```"


def results_table(checkpoint: Checkpoint) -> str:
    """Return the validation loss and perplexity below those of the baselines."""
    assert checkpoint.val_loss is not None
    rows = baselines_of(checkpoint) | {"**this model**": checkpoint.val_loss}
    lines = ["| held-out documents | loss (nats per token) | perplexity |", "| --- | --- | --- |"]
    lines += [f"| {name} | {loss:.3f} | {perplexity(loss):,.1f} |" for name, loss in rows.items()]
    return "\n".join(lines)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))  # above, it is no float


def usage(checkpoint: Checkpoint, name: str) -> str:
    prompt: Any = "text = 'Once upon a time'\nids = tokenizer(text, return_tensors='pt')"
    if checkpoint.chat_template is not None:
        prompt = (
            "messages = [{'role': 'user', 'content': 'Hello!'}]\n"
            "ids = tokenizer.apply_chat_template(\n"
            "    messages, add_generation_prompt=True, return_tensors='pt', return_dict=True\n)"
        )
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})\n"
        f"{prompt}\n"
        "output = model.generate(**ids, max_new_tokens=50, do_sample=True)\n"
        "print(tokenizer.decode(output[0]))\n"
        "```"
    )
