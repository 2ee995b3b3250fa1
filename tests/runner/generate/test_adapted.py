"""Adapters that requests choose among: each text is that of a model with its adapter alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.adapter import adapted_layers
from models.adapter_choice import put_adapters
from models.adapter_config import AdapterConfig, Base
from models.decoder_config import DecoderConfig
from models.prefix_cache import PrefixCache
from runner.generate.generate import make_engine
from runner.generate.request import Event, Request
from runner.generate.sampling import Sampling

VOCAB, CONTEXT, PROMPT = 23, 48, [1, 5, 2, 7, 3, 9, 4, 8, 6]
BASE = DecoderConfig(depth=2, width=16, num_heads=2)


def _adapted(kind: Any, targets: tuple[str, ...], seed: int, base: Base = "full") -> Any:
    cfg = AdapterConfig(kind=kind, rank=2, targets=targets, base=base)
    model = replace(BASE, adapter=cfg).build(VOCAB, 3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for b in layer.b.values():
                b.normal_(std=3.0, generator=generator)
    return model


def _engine(model: Any, **more: Any) -> Any:
    return make_engine(
        model, context=CONTEXT, decode=lambda ids: "x" * len(ids), ends=(), rows=4, **more
    )


def _texts(engine: Any, asked: dict[str, str | None]) -> dict[str, list[tuple[int, float]]]:
    how = Sampling(max_new_tokens=12, temperature=0.0)
    texts: dict[str, list[tuple[int, float]]] = {id: [] for id in asked}
    for id, adapter in asked.items():
        engine.submit(Request(id=id, prompt=PROMPT, how=how, adapter=adapter))
    while not engine.is_idle:
        events: list[Event] = engine.step()
        for event in events:
            assert event.error is None
            texts[event.id] += zip(event.ids, event.logprobs, strict=True)
    return texts


def _scores(engine: Any, prompt: list[int], adapter: str | None) -> list[float]:
    """Return the log-probabilities of four ends of one beginning, which is read once."""
    how = Sampling(max_new_tokens=0)
    for number, id in enumerate("abcd"):
        own = [*prompt, number]
        request = Request(id=id, prompt=own, how=how, adapter=adapter, score_from=len(prompt))
        engine.submit(request)
    events: list[Event] = [event for _ in range(99) for event in engine.step()]
    return [nats for e in events if e.prompt_scores for nats in e.prompt_scores.logprobs]


@pytest.mark.parametrize("chunk", [None, 4])
def test_texts_of_several_adapters_in_one_batch_are_those_of_each_alone(chunk: int | None) -> None:
    kinds: dict[str, Any] = {"keys": ("lora", ("*",)), "b.1": ("dora", ("*.mlp.*", "*.q"))}
    models = {name: _adapted(kind, targets, 1) for name, (kind, targets) in kinds.items()}
    alone = {n: _texts(_engine(m), {n: None})[n] for n, m in models.items()}
    base = BASE.build(VOCAB, 3)
    alone["none"] = _texts(_engine(base), {"none": None})["none"]
    assert len({round(nats, 3) for text in alone.values() for _, nats in text[:1]}) == 3
    choice = put_adapters(base, models)
    prefixes = PrefixCache(block=4, max_bytes=1 << 20)
    engine = _engine(base, adapters=choice, chunk=chunk, prefixes=prefixes)
    for _ in range(2):  # the second time the prompt is known, of each adapter
        found = _texts(engine, {"none": None, "keys": "keys", "b.1": "b.1"})
        for name, text in found.items():
            assert [id for id, _ in text] == [id for id, _ in alone[name]]
            nats, expected = (torch.tensor([x for _, x in t]) for t in (text, alone[name]))
            torch.testing.assert_close(nats, expected, rtol=0, atol=1e-5)
    scored = {name: _scores(engine, PROMPT * 4, name) for name in ("keys", "b.1", None)}
    for name, nats in scored.items():  # each anew, though the first has been read by the others
        own = _scores(_engine(models[name] if name else BASE.build(VOCAB, 3)), PROMPT * 4, None)
        assert nats == pytest.approx(own, abs=1e-5)
    assert engine.strategy.num_bytes() == 0
    with pytest.raises(ValueError, match=r"adapter='c' is none of: keys, b\.1$"):
        engine.check(Request(id="c", prompt=PROMPT, how=Sampling(), adapter="c"))


def test_an_adapter_of_another_base_or_none_is_refused() -> None:
    base = BASE.build(VOCAB, 4)
    with pytest.raises(ValueError, match="adapter a has another base than this model"):
        put_adapters(base, {"a": _adapted("lora", ("*",), 1)})
    with pytest.raises(ValueError, match="or holds it in few bits"):
        put_adapters(BASE.build(VOCAB, 3), {"a": _adapted("lora", ("*",), 1, "int8")})
    with pytest.raises(ValueError, match="adapter a is a whole model without an adapter"):
        put_adapters(base, {"a": base})
    with pytest.raises(ValueError, match="the model has an adapter itself"):
        put_adapters(_adapted("lora", ("*",), 1), {})
