"""How far a model has gone from the one it started from, on what it was not trained on.

    kl_to_start   KL(start || model), nats a token over the whole vocabulary
    tv_to_start   total variation, half the L1 distance

on answers that the model at the start gives, greedily, to prompts of any kind; the mean over
prompts of the mean over an answer's tokens, with the standard error by prompt. `text_loss` is the
loss on the beginning of a text.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.contract import logits
from models.pretrained import load_weights
from runner.data.chat_template import template_of
from runner.data.corpus import end_ids, prompt_ids, token_id
from runner.data.dialogue_format import MARKS, dialogue_format
from runner.data.sources import SourceConfig
from runner.evaluate.people_config import ForgettingConfig
from runner.generate.generate import generate
from runner.generate.sampling import Sampling
from runner.machine.text_files import read_text
from runner.records import checkpoint
from runner.records.cells import load_cell
from runner.records.contracts import Trained
from runner.records.trained_model import is_run, load_model

_BYTES_OF_TOKEN = 16  # read so much of a text for each token that is wanted


def measure_forgetting(cfg: ForgettingConfig, trained: Trained) -> dict[str, float]:
    """Return the values of the file's head; every rank computes all."""
    start, answers = _start(cfg, _Run(trained))
    divergences = [_divergence(trained, start, *answer) for answer in answers if answer[1]]
    values = {}
    for place, name in enumerate(("kl_to_start", "tv_to_start")):
        own = torch.tensor([row[place] for row in divergences], dtype=torch.float64)
        values[name] = float(own.mean())
        if len(own) > 1:
            values[f"{name}_stderr"] = float(own.std()) / math.sqrt(len(own))
    if cfg.text is not None:
        values["text_loss"] = _text_loss(cfg.text, cfg.text_tokens, trained)
    return values


@torch.no_grad()
def _divergence(
    trained: Trained, start: Any, prompt: Sequence[int], answer: Sequence[int]
) -> tuple[float, float]:
    """Return (KL, total variation), means over the answer's tokens."""
    tokens = torch.tensor([[*prompt, *answer][:-1]], device=trained.ranks.device)
    with trained.precision.autocast():
        ours, theirs = (
            logits(model, tokens)[0, len(prompt) - 1 :].double().log_softmax(-1)
            for model in (trained.model, start)
        )
    return divergence(theirs, ours)


def divergence(start: Tensor, model: Tensor) -> tuple[float, float]:
    """Return (KL(start || model), total variation) of log-probabilities [tokens, vocab]: means."""
    kl = (start.exp() * (start - model)).sum(-1)
    tv = 0.5 * (start.exp() - model.exp()).abs().sum(-1)
    return float(kl.mean()), float(tv.mean())


@torch.no_grad()
def _text_loss(file: str, count: int, trained: Trained) -> float:
    text = read_text(Path(file))[: _BYTES_OF_TOKEN * count]
    ids = prompt_ids(trained.corpus.tokenizer, text)[:count]
    tokens = torch.tensor([ids], device=trained.ranks.device)
    with trained.precision.autocast():
        scores = logits(trained.model, tokens[:, :-1])[0]
    return float(torch.nn.functional.cross_entropy(scores.float(), tokens[0, 1:]))


class _Run:
    """A trained model as a key: evaluations of one run have one start."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        cfg = trained.cfg
        device = str(trained.ranks.device)
        self._key = (trained.start, cfg.model, cfg.seed, cfg.tokenizer, device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Run) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=1)
def _start(cfg: ForgettingConfig, run: _Run) -> tuple[Any, list[tuple[list[int], list[int]]]]:
    """Return (the model at the start, its answers as (prompt, ids))."""
    trained = run.trained
    tokenizer, device = trained.corpus.tokenizer, trained.ranks.device
    model = start_model(trained).to(device)
    prompts = _prompts(cfg, tokenizer)
    done = generate(
        model,
        [torch.tensor(ids, device=device) for ids in prompts],
        Sampling(max_new_tokens=cfg.tokens, temperature=0.0),
        context=max(map(len, prompts)) + cfg.tokens,
        decode=tokenizer.decode,
        ends=end_ids(tokenizer),
        rows=cfg.rows,
    )
    run.trained = None  # type: ignore[assignment]  # the key must not keep the model
    return model, [(completion.prompt, completion.ids) for completion in done]


def start_model(trained: Trained) -> Any:
    """Return the model that training started from, without adapters of its own."""
    config, folder = trained.cfg, trained.start
    if folder is not None and is_run(folder):
        scored = config if trained.scored is None else load_cell(trained.scored[0]).config
        return load_model(folder, average=scored.inputs["init"].take == "average")[0]
    shape = config.model
    if getattr(shape, "adapter", None) is not None:
        shape = replace(shape, adapter=None)
    model = shape.build(trained.corpus.tokenizer.vocab_size, config.seed)
    if folder is not None:
        load_weights(folder, model, put=checkpoint.like)
    return model


def _prompts(cfg: ForgettingConfig, tokenizer: Any) -> list[list[int]]:
    kind: Any = "json" if cfg.prompts.endswith(".json") else "jsonl"
    source = SourceConfig(format=kind, path=cfg.prompts, field="instruction")
    texts = [text for text, _ in zip(source.documents(), range(cfg.num_prompts), strict=False)]
    marked = all(token_id(tokenizer, mark) is not None for mark in MARKS)
    if not marked and template_of(tokenizer) is None:
        return [prompt_ids(tokenizer, text) for text in texts]
    form = dialogue_format(tokenizer)
    return [form.prompt([{"role": "user", "content": text}]) for text in texts]
