"""Limits of numbers and sizes that come from outside: configs, files of text, cases.

They are far above what is of use, and low enough that no value overflows, hangs or takes all memory
before it is refused. Those of requests are in config/sampling.py and serving/limits.py, those of
checkpoints in checkpoint/validation.py; docs/reliability.md lists all.
"""

MODEL_SIZES = {
    "vocab_size": 2**24,
    "max_seq_len": 2**24,
    "n_layers": 10_000,
    "d_model": 2**17,
    "n_heads": 2**17,
    "n_kv_heads": 2**17,
    "head_dim": 2**17,
    "d_ff": 2**20,
}

TRAINING_SIZES = {
    "seq_len": 2**24,
    "micro_batch_size": 2**20,
    "grad_accum_steps": 2**20,
    "max_steps": 2**40,
    "log_every_steps": 2**40,
    "val_every_steps": 2**40,
    "save_every_steps": 2**40,
}

MAX_DEVICES = 2**16
MAX_TIMEOUT = 2**31 // 1000  # seconds; torch counts milliseconds in 32 bits
MAX_WORKERS = 256  # processes that prepare batches
MAX_SHUFFLE_BUFFER = 2**24  # rows
MAX_PARTS = 10_000  # of a corpus that several processes prepare
MAX_EPOCHS = 1_000_000
MAX_NAME_CHARACTERS = 100  # of a run

MAX_YAML_CHARACTERS = 2**16  # of a config; eight times config.yaml
MAX_CASES_CHARACTERS = 2**22  # of a file of probe cases
MAX_YAML_DEPTH = 9  # no file of ours is nested deeper than 4

MAX_LINE_CHARACTERS = 2**27  # of a line of JSON or of a field of a table, which memory holds whole
