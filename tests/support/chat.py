"""A chat template, and a tokenizer that has its special tokens."""

import json

from pocketlm.tokenizer.bpe import JsonTokenizer

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer() -> JsonTokenizer:
    """Return a byte-level BPE with CHATML's special tokens and two more."""
    spec = json.loads(
        JsonTokenizer.train_bpe(["hello what is up naive spaces around"], 300).json_text
    )
    first_id = max(spec["model"]["vocab"].values()) + 1
    options = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    for n, content in enumerate(["<|im_start|>", "<|im_end|>", "<|start|>", "<|sep|>"]):
        spec["added_tokens"].append(dict(id=first_id + n, content=content, **options))
    return JsonTokenizer(json.dumps(spec), "chat", first_id, first_id + 1)
