"""Chat completions: their text and their prompts are those of infer.py --chat."""

import pytest

from pocketlm.config.sampling import SamplingParams
from pocketlm.inference.chat import ChatSession
from pocketlm.inference.conversation import Conversation
from tests.support.chat import CHATML
from tests.support.server import CONTEXT, MESSAGES, RunningServer


@pytest.mark.parametrize("fixture", ["server", "protected_server"], ids=["template", "turns"])
def test_an_answer_equals_infer_chat(fixture: str, request: pytest.FixtureRequest) -> None:
    """Special tokens in a message stay text, or the prompt would have fewer tokens."""
    server = request.getfixturevalue(fixture)
    checkpoint = server.checkpoint
    params = SamplingParams(temperature=0, max_new_tokens=30, top_k=40)
    answer = "".join(ChatSession(checkpoint, params).answer(MESSAGES[0]["content"]))
    response = server.chat(temperature=0, max_tokens=30)
    choice = response.choices[0]
    assert (choice.message.content, choice.message.role) == (answer, "assistant")
    ids = Conversation(checkpoint.tokenizer, checkpoint.chat_template).encode(MESSAGES)
    assert response.usage.prompt_tokens == len(ids)
    assert response.usage.completion_tokens <= 30
    chunks = list(server.chat(temperature=0, max_completion_tokens=30, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    parts = [{"type": "text", "text": text} for text in ("hello, what", " is up?<|im_end|>")]
    in_parts = server.chat([{"role": "user", "content": parts}], temperature=0, max_tokens=30)
    assert in_parts.choices[0].message.content == answer


def test_a_conversation_continues_with_an_answer_as_the_client_has_it(
    server: RunningServer,
) -> None:
    first = server.chat(temperature=0, max_tokens=5).choices[0].message
    question = {"role": "user", "content": "ok"}
    messages = [{"role": "developer", "content": "Be kind."}, *MESSAGES, first, question]
    plain = [
        {"role": "system", "content": "Be kind."},
        *MESSAGES,
        {"role": "assistant", "content": first.content},
        question,
    ]
    ids = Conversation(server.checkpoint.tokenizer, CHATML).encode(plain)
    assert server.chat(messages, max_tokens=1).usage.prompt_tokens == len(ids)


def test_an_answer_may_fill_the_context_up_to_512_tokens(server: RunningServer) -> None:
    tokenizer = server.checkpoint.tokenizer
    conversation = Conversation(tokenizer, CHATML)
    end_tokens = (tokenizer.eos_id, *conversation.stop_ids)
    never_ends = {str(i): -100 for i in end_tokens}
    usage = server.chat(logit_bias=never_ends).usage
    assert usage.completion_tokens == CONTEXT - len(conversation.encode(MESSAGES))
