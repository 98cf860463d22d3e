"""A small corpus of lines, prepared as a config says."""

from pocketlm.config.loading import load_config
from pocketlm.config.sections import Config
from pocketlm.corpus.chunks import is_validation
from pocketlm.data.prepare import PreparedData, prepare

LINES = [f"{i} times {i} is {i * i}" for i in range(100)]
TRAIN = [line for line in LINES if not is_validation(line, 0.2)]
VAL = [line for line in LINES if is_validation(line, 0.2)]

# Overrides of a config in a folder with LINES in lines.txt.
LINES_CONFIG = [
    "data.path=lines.txt",
    "data.separator=line",
    "data.tokenizer=byte",
    "data.val_share=0.2",
]


def prepare_config(*overrides: str) -> tuple[Config, PreparedData]:
    """Return config.yaml with overrides, and its data."""
    config = load_config("config.yaml", overrides)
    return config, prepare(config.data)
