"""Texts with the same beginning read it once, and say what they say without that."""

import pytest
import torch

from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from models.linear_attention_config import LinearAttentionConfig
from models.prefix_cache import PrefixCache
from runner.generate.generate import completions, make_engine
from runner.generate.request import Request
from runner.generate.sampling import Sampling

PARTS = {"x": LinearAttentionConfig(kind="gated_delta", chunk=8)}
KINDS = {"attention": ("af", {}), "recurrent": ("xf", PARTS)}
TRUNK = list(range(20))
PROMPTS = [[*TRUNK, 1, 2], [*TRUNK, 3], [*TRUNK, 1, 2], [9, 8, 7], [*TRUNK, 4, 5, 6]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 6])
def test_a_known_beginning_is_not_read_again(kind: str, chunk: int | None) -> None:
    pattern, parts = KINDS[kind]
    model = DecoderConfig(depth=2, width=16, num_heads=2, pattern=pattern, parts=parts)
    said, read = [], []
    for prefixes in (None, PrefixCache(block=4, max_bytes=1 << 20)):
        said.append(_said(model.build(23, 3).double(), prefixes, chunk, read))
    assert said[0] == said[1]
    alone, shared = read
    # One request after another: the trunk's five blocks are read by the first. One token more is
    # read to learn whether a state keeps every length.
    assert alone - shared == (22 - 2) + (21 - 1) + (23 - 3) - 1


def _said(
    model: Decoder, prefixes: PrefixCache | None, chunk: int | None, read: list[int]
) -> list[tuple[list[int], list[float]]]:
    """Return (ids, rounded log-probabilities) of each prompt; append the number of tokens read."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    count: list[int] = []
    model.embedding.register_forward_pre_hook(lambda _, args: count.append(args[0].numel()))
    engine = make_engine(model, context=32, decode=str, ends=(), rows=1, prefixes=prefixes)
    engine.chunk = chunk
    how = Sampling(max_new_tokens=4, temperature=1.0)
    requests = [Request(id=str(i), prompt=ids, how=how) for i, ids in enumerate(PROMPTS)]
    done = list(completions(engine, requests))
    read.append(sum(count))
    assert engine.strategy.num_bytes() == 0
    return [(one.ids, [round(logprob, 9) for logprob in one.logprobs]) for one in done]


def test_texts_of_another_salt_are_unknown_and_an_event_counts_what_is_known() -> None:
    prefixes = PrefixCache(block=4, max_bytes=1 << 20)
    model = DecoderConfig(depth=1, width=16, num_heads=2).build(23, 3)
    engine = make_engine(model, context=32, decode=str, ends=(), rows=1, prefixes=prefixes)
    how = Sampling(max_new_tokens=2)
    salts = ["a", "a", "b", "", "b"]
    requests = [
        Request(id=str(index), prompt=TRUNK[:10], how=how, salt=salt)
        for index, salt in enumerate(salts)
    ]
    cached = [(event.id, event.num_cached) for event in engine.run(requests)]
    assert cached[::2] == [("0", 0), ("1", 8), ("2", 0), ("3", 0), ("4", 8)]
    assert {number for _, number in cached[1::2]} == {0}
