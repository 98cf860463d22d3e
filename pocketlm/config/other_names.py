"""Keys of other programs (nanoGPT, Hugging Face, llm-mini), and what to use here instead."""

OURS = {
    "n_layer": "model.n_layers",
    "num_hidden_layers": "model.n_layers",
    "n_head": "model.n_heads",
    "num_attention_heads": "model.n_heads",
    "num_key_value_heads": "model.n_kv_heads",
    "n_embd": "model.d_model",
    "hidden_size": "model.d_model",
    "intermediate_size": "model.d_ff",
    "tie_word_embeddings": "model.tie_embeddings",
    "block_size": "training.seq_len",
    "batch_size": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.grad_accum_steps",
    "learning_rate": "training.lr",
    "min_lr": "training.min_lr_ratio, a share of the peak",
    "max_iters": "training.max_steps",
    "warmup_iters": "training.warmup_steps",
    "warmup_ratio": "training.warmup_steps, a number of steps",
    "eval_interval": "training.val_every_steps",
    "log_interval": "training.log_every_steps",
    "save_every": "training.save_every_steps",
    "out_dir": "run.name",
    "dtype": "training.precision",
    "device": "hardware.accelerator",
    "dataset": "data.source",
    "config": "data.config_name",
    "tokenizer_name": "data.tokenizer",
    "pack_sequences": "data.packing",
    "train_docs": "data.path, with a file of that many documents",
    "val_docs": "data.val_share",
}

NOT_SUPPORTED = {
    "early_stopping": "best.ckpt is the checkpoint with the lowest validation loss",
    "reduce_on_plateau": "training.schedule determines the learning rate",
    "swa_window": "attention always covers the whole context",
}

HINTS = {name: f"use {key}" for name, key in OURS.items()} | {
    name: f"it is not supported: {reason}" for name, reason in NOT_SUPPORTED.items()
}
