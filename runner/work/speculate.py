"""What a draft brings: how much is accepted, tokens a round, and how much faster text comes.

Of each temperature t:

    accepted/t     proposed tokens that were accepted, of all that were judged
    overlap/t      mean over the text of sum min(p, q) of target and draft, where the draft is a
                   model: the chance that a token is accepted (greedy: 1 where both agree)
    round_tokens/t tokens added by a round of `length` proposals, with its standard error
    expected/t     (1 - a^(g+1)) / (1 - a), what a round would add if each of g = `length`
                   proposals were accepted with the same chance a = overlap, on its own (Leviathan
                   et al., arXiv 2211.17192); of a draft that is no model with a = accepted
    gap/t          round_tokens / expected - 1: acceptance comes in runs, some texts being easier
    speed_up/t     CPU seconds without the draft / with it

`cost` is the draft's CPU seconds a token / the target's, `size_ratio` that of their weights.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.contract import count_weights, for_inference, logits
from runner.generate.drafts import Draft, DraftModel, make_draft
from runner.generate.generate import Completion, completions, make_engine, requests_of
from runner.generate.sampling import Sampling
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records.cells import Cell
from runner.records.contracts import Inputs, Outcome
from runner.records.journal import Journal
from runner.records.run_data import build_corpus
from runner.records.trained_model import load_model
from runner.work.notes import note_environment
from runner.work.outputs import write_output
from runner.work.speculate_config import SpeculateWork

_ROUNDS = 2  # of timing, of which the faster counts


@dataclass(frozen=True)
class _Pair:
    """A target, what proposes to it, and the texts that they continue."""

    cfg: SpeculateWork
    model: Any
    draft: Draft
    prompts: Sequence[Tensor]
    context: int
    seed: int


def speculate(
    cfg: SpeculateWork, cell: Cell, inputs: Inputs, journal: Journal | None, ranks: Ranks
) -> Outcome:
    """Log the values of the file's head, write outputs/rounds.json.

    Raises:
        ConfigError: there is no input named target, nor a draft, or the held-out text is too short.
    """
    if journal is None:  # the first rank generates alone
        return "finished"
    note_environment(journal, cell, ranks)
    pair = _pair(cfg, cell, inputs, journal)
    values, rounds = {}, {}
    if isinstance(pair.draft, DraftModel):
        values["size_ratio"] = count_weights(pair.draft.model) / count_weights(pair.model)
        values["cost"] = _seconds(pair, pair.draft.model) / _seconds(pair, pair.model)
    for temperature in cfg.temperatures:
        measured, by_length = _measured(pair, temperature)
        values |= {f"{name}/{temperature:g}": value for name, value in measured.items()}
        rounds[f"{temperature:g}"] = [[*key, number] for key, number in sorted(by_length.items())]
    write_output(cell.folder, "rounds.json", json.dumps(rounds) + "\n", journal)
    journal.metrics(0, values)
    return "finished"


def _pair(cfg: SpeculateWork, cell: Cell, inputs: Inputs, journal: Journal) -> _Pair:
    missing = {"target", *(() if cfg.draft else ("draft",))} - inputs.keys()
    if missing:
        raise ConfigError(
            f"work=speculate needs an input named {' and one named '.join(sorted(missing))}: "
            "inputs.target.runs=[...], and inputs.draft or work.draft=lookup or layers:N"
        )
    model, tokenizer, context = load_model(inputs["target"][0])
    model = for_inference(model)
    hashes = [source["content"] for source in cell.science["data.sources"]]
    corpus = build_corpus(cell.config, inputs, hashes, journal)
    size = cfg.prompt + cfg.tokens
    windows = corpus.held_out(size, 1, size * cfg.texts)
    prompts = [batch["tokens"][0, : cfg.prompt] for batch in windows]
    if size > context or not prompts or min(map(len, prompts)) < cfg.prompt:
        raise ConfigError(
            f"work.prompt={cfg.prompt} and work.tokens={cfg.tokens} fit neither the context of the "
            f"target, {context}, nor the held-out text; give fewer"
        )
    draft = make_draft(cfg.draft or str(inputs["draft"][0]), model, tokenizer, context)
    return _Pair(cfg, model, draft, prompts, context, cell.config.seed)


def _measured(pair: _Pair, temperature: float) -> tuple[dict[str, float], Counter[Any]]:
    """Return (values by name, rounds by (tokens proposed, tokens added))."""
    length = pair.cfg.length
    plain = _timed(lambda: _texts(pair, pair.model, temperature))
    fast = _timed(lambda: _texts(pair, pair.model, temperature, pair.draft))
    texts, by_length = fast[1]
    accepted = sum(min(new - 1, long) * n for (long, new), n in by_length.items())
    judged = sum(min(new, long) * n for (long, new), n in by_length.items())
    whole = {new: n for (long, new), n in by_length.items() if long == length}
    added = np.repeat(list(whole), list(whole.values())).astype(np.float64)
    values = {"accepted": accepted / max(1, judged), "speed_up": plain[0] / fast[0]}
    values["rounds"] = float(by_length.total())
    chance = values["accepted"]
    if isinstance(pair.draft, DraftModel):
        chance = values["overlap"] = _overlap(pair, pair.draft.model, texts, temperature)
    values["expected"] = round_tokens(chance, length)
    if len(added) > 1:
        values["round_tokens"] = float(added.mean())
        values["round_tokens_stderr"] = float(added.std(ddof=1) / len(added) ** 0.5)
        values["gap"] = values["round_tokens"] / values["expected"] - 1.0
    return values, by_length


def round_tokens(chance: float, length: int) -> float:
    """Return the tokens that a round adds where each proposal is accepted with the same chance."""
    return sum(chance**k for k in range(length + 1))


def _texts(
    pair: _Pair, model: Any, temperature: float, draft: Draft | None = None
) -> tuple[list[Completion], Counter[Any]]:
    """Return (continuations of the prompts, rounds by (tokens proposed, tokens added))."""
    engine = make_engine(
        model,
        context=pair.context,
        decode=lambda _: "",
        ends=(),
        rows=1,
        draft=draft,
        draft_length=pair.cfg.length,
    )
    hows = [
        Sampling(
            max_new_tokens=pair.cfg.tokens, temperature=temperature, seed=pair.seed, sample=index
        )
        for index in range(len(pair.prompts))
    ]
    done = list(completions(engine, requests_of(engine, pair.prompts, hows)))
    counts = getattr(engine.strategy, "counts", None)
    return done, Counter() if counts is None else counts.by_length


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return (the least CPU seconds of a call, what it returned)."""
    best, result = float("inf"), None
    for _ in range(_ROUNDS):
        started = time.process_time()
        result = call()
        best = min(best, time.process_time() - started)
    return best, result


def _seconds(pair: _Pair, model: Any) -> float:
    return _timed(lambda: _texts(pair, model, 0.0))[0]


@torch.no_grad()
def _overlap(pair: _Pair, other: Any, texts: Sequence[Completion], temperature: float) -> float:
    """Return the mean chance that a token which `other` proposes is accepted in these texts."""
    sums, number = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*text.prompt, *text.ids]])[:, :-1]
        first = len(text.prompt) - 1
        p, q = (_distribution(logits(m, ids)[0, first:], temperature) for m in (pair.model, other))
        sums += float(torch.minimum(p, q).sum())
        number += len(p)
    return sums / number


def _distribution(scores: Tensor, temperature: float) -> Tensor:
    if temperature > 0:
        return (scores.double() / temperature).softmax(dim=-1)
    return torch.nn.functional.one_hot(scores.argmax(dim=-1), scores.shape[-1]).double()
