"""A chat template and a tokenizer that has its markers."""

import json

from pocketlm.tokenizer.bpe import JsonTokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer() -> JsonTokenizer:
    trained = json.loads(
        JsonTokenizer.train_bpe(["hello what is up naive spaces around"], 300).text
    )
    first = max(trained["model"]["vocab"].values()) + 1
    for n, content in enumerate(["<|im_start|>", "<|im_end|>", "<|start|>", "<|sep|>"]):
        trained["added_tokens"].append(dict(id=first + n, content=content, single_word=False, lstrip=False, rstrip=False,
                                            normalized=False, special=True))  # fmt: skip
    return JsonTokenizer(json.dumps(trained), "chat", first, first + 1)
