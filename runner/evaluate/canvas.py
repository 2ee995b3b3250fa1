"""Texts that a model writes by several samplers, judged by their data or a model; their order."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runner.data.corpus import prompt_ids
from runner.data.markov import shared_chain
from runner.data.sudoku import SudokuConfig, is_solved
from runner.data.sum_lines import is_right
from runner.evaluate.canvas_config import RevealOrdersConfig, SamplersConfig
from runner.evaluate.next_token_judge import NextTokenJudge
from runner.evaluate.scores import repetition
from runner.generate.denoising import Denoising
from runner.generate.generate import Completion, Settings, generate
from runner.generate.sampling import Sampling
from runner.machine.errors import ConfigError
from runner.machine.storage import write_atomically
from runner.records.contracts import Trained, strategy
from runner.records.inputs import named_input

_OTHER_SEED = 1 << 20  # of puzzles that are no training data of the default seed


def measure_samplers(cfg: SamplersConfig, trained: Trained) -> dict[str, float]:
    """Return the values of `SamplersConfig.run`.

    Raises:
        ConfigError: the judge is that of other data, or an input of the run that does not fit.
    """
    own = _strategy(trained)
    prompts = _prompts(cfg, trained)
    model = _judge(cfg, trained)
    values: dict[str, float] = {}
    for name, how in _ways(cfg, own):
        done = _write(trained, prompts, how, own)
        measures = _known_scores(cfg, trained, done)
        if own is not None:
            measures["passes_per_token"] = [one.num_passes / len(one.ids) for one in done]
        measures["distinct"] = [1.0 - repetition(one.ids) for one in done]
        if model is not None:
            measures["judge_nats"] = model.nats(done, trained.corpus.tokenizer)
        for key, given in measures.items():
            known = np.array([score for score in given if math.isfinite(score)])
            stderr = known.std(ddof=1) / math.sqrt(len(known)) if len(known) > 1 else math.nan
            values[f"samples/{key}@{name}"] = float(known.mean()) if len(known) else math.nan
            values[f"samples/{key}@{name}_stderr"] = float(stderr)
    return values


def write_orders(cfg: RevealOrdersConfig, trained: Trained) -> dict[str, float]:
    """Write orders.json; see `RevealOrdersConfig.run`.

    Raises:
        ConfigError: the model fills in no canvas.
    """
    own = _strategy(trained)
    if own is None:
        raise ConfigError(
            "eval.also.reveal_orders needs a model that fills in a canvas: task=diffusion and "
            "model.causal=false"
        )
    rows = []
    for prompt in cfg.prompts:
        ids = torch.tensor(prompt_ids(trained.corpus.tokenizer, prompt))
        how = [
            Denoising(
                max_new_tokens=cfg.tokens,
                algorithm=cfg.algorithm,
                temperature=cfg.temperature,
                ends=(),
                sample=sample,
            )
            for sample in range(cfg.samples)
        ]
        for one in _write(trained, [ids] * cfg.samples, how, own):
            rows.append({"prompt": prompt, "revealed_at": one.revealed_at, "text": one.text})
    if trained.folder is not None:
        write_atomically(trained.folder / "orders.json", json.dumps(rows))
    return {"orders": float(len(rows))}


def _strategy(trained: Trained) -> Any:
    context = trained.cfg.train.sequence_length
    return strategy(trained.cfg.task, trained.model, trained.corpus.tokenizer, context)


def _ways(cfg: SamplersConfig, own: Any) -> Iterator[tuple[str, list[Settings]]]:
    """Yield (name, settings of each text)."""
    if own is None:
        yield (
            "autoregressive",
            [
                Sampling(max_new_tokens=cfg.tokens, temperature=cfg.temperature, sample=sample)
                for sample in range(cfg.texts)
            ],
        )
        return
    ways: list[tuple[str, dict[str, Any]]] = [
        (f"{algorithm}_{steps}", {"algorithm": algorithm, "steps": steps})
        for algorithm in cfg.algorithms
        for steps in cfg.steps
    ]
    for least in cfg.thresholds:
        ways.append((f"threshold_{least}", {"algorithm": "low_confidence", "threshold": least}))
    for name, how in ways:
        fixed = Denoising(max_new_tokens=cfg.tokens, temperature=cfg.temperature, ends=(), **how)
        yield name, [replace(fixed, sample=sample) for sample in range(cfg.texts)]


def _prompts(cfg: SamplersConfig, trained: Trained) -> list[Tensor]:
    """Return the first tokens of texts: those that a chain depends on, a puzzle, a line's end."""
    data, tokenizer = trained.cfg.data, trained.corpus.tokenizer
    if cfg.judge == "sudoku":
        return [
            torch.tensor(prompt_ids(tokenizer, f"\n{puzzle}="))
            for puzzle, _ in SudokuConfig(lines=cfg.texts, data_seed=_OTHER_SEED).puzzles()
        ]
    if cfg.judge != "chain":
        return [torch.tensor(prompt_ids(tokenizer, "\n"))] * cfg.texts
    if getattr(data, "in_context", True):
        raise ConfigError("eval.also.samplers.judge=chain needs data=markov, one chain for all")
    draw = np.random.default_rng(0)
    vocab = trained.cfg.tokenizer.vocab_size
    return list(torch.from_numpy(draw.integers(0, vocab, (cfg.texts, data.order))))


def _write(
    trained: Trained, prompts: Sequence[Tensor], how: Sequence[Settings], own: Any
) -> list[Completion]:
    tokenizer = trained.corpus.tokenizer
    with trained.precision.autocast():
        return generate(
            trained.model,
            prompts,
            how,
            context=trained.cfg.train.sequence_length,
            decode=tokenizer.decode,
            ends=(),
            rows=32,
            strategy=own,
        )


def _judge(cfg: SamplersConfig, trained: Trained) -> NextTokenJudge | None:
    if cfg.judge_input is None:
        return None
    given = named_input(trained.cfg.inputs, cfg.judge_input, "the judge")
    folder = Path(trained.cfg.root) / "runs" / given.run
    return NextTokenJudge(folder, trained.ranks.device, average=given.take == "average")


def _known_scores(
    cfg: SamplersConfig, trained: Trained, done: Sequence[Completion]
) -> dict[str, list[float]]:
    """Return the score of each text by what is known of the data, by its name."""
    if cfg.judge == "chain":
        return {"nats": _chain_nats(trained, done)}
    if cfg.judge == "sums":
        return {"right": [_right(one.text) for one in done]}
    if cfg.judge == "sudoku":
        decode = trained.corpus.tokenizer.decode
        return {"right": [_solved(decode([*one.prompt, *one.ids])) for one in done]}
    return {}


def _chain_nats(trained: Trained, done: Sequence[Completion]) -> list[float]:
    """Return the nats per new token of each text; infinite where the chain cannot write it."""
    data: Any = trained.cfg.data
    chain = shared_chain(data, trained.cfg.tokenizer.vocab_size)
    ids = np.array([[*one.prompt, *one.ids] for one in done])
    with np.errstate(divide="ignore"):
        return list(chain.nats(ids)[:, data.order - 1 :].mean(axis=1))


def _right(text: str) -> float:
    """Return the part of the whole lines of a text that are right sums, NaN if there is none."""
    lines = text.split("\n")[:-1]
    return sum(map(is_right, lines)) / len(lines) if lines else math.nan


def _solved(text: str) -> float:
    """Return 1 if the first line after the line end that a text begins with is solved, else 0."""
    return float(is_solved(text.removeprefix("\n").partition("\n")[0]))
