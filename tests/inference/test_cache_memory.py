"""Memory of the engine's KV cache."""

import psutil

from pocketlm.config.sampling import SamplingParams
from pocketlm.inference.engine import Engine, GenerationRequest
from tests.support.checkpoints import confident_model


def test_the_cache_takes_memory_only_when_it_is_written() -> None:
    model = confident_model(vocab_size=257, max_seq_len=4096)
    process = psutil.Process()
    before = process.memory_info().rss
    engine = Engine(model, max_slots=2000)
    size = 2 * engine.cache.keys.numel() * 4
    assert size > 2**29
    engine.add(GenerationRequest([1, 2, 3], SamplingParams(temperature=0.0, max_new_tokens=5)))
    while engine.busy:
        engine.step()
    assert process.memory_info().rss - before < size / 10
