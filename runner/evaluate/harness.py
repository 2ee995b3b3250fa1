"""lm-eval over our models: its tasks ask, a model that is trained here answers.

Shape legend: batch, seq, vocab.
"""

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from models.language_model import LanguageModel
from runner.data.benchmark_files import specify
from runner.data.tokenizers import Tokenizer
from runner.evaluate import code_execution as code
from runner.evaluate.config import HarnessConfig
from runner.evaluate.sandbox import choose_wall
from runner.generate.generate import generate
from runner.generate.sampling import Sampling
from runner.machine import storage
from runner.machine.errors import ConfigError
from runner.records.contracts import Trained

_LOGITS = 1 << 27  # numbers in the logits of one forward pass, at most
_SCHEMA = 1
Context = Callable[[], AbstractContextManager[None]]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model and its tokenizer as lm-eval wants them; texts beyond `context` lose their beginning."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        context: int,
        batch_size: int = 16,
        autocast: Context = nullcontext,
    ) -> None:
        super().__init__()
        self.model, self.text, self.context, self.batch = model, tokenizer, context, batch_size
        self.autocast, self.place = autocast, next(model.parameters()).device
        self.asked = self.cut = 0  # requests, and those whose beginning did not fit

    @property
    def eot_token_id(self) -> int:
        """The end of a document, which also stands before an empty context."""
        return self.text.eos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text."""
        return [int(i) for i in self.text.encode(string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood of the continuation, whether it is the greedy one) of each request."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self.score(pairs)

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """As `_loglikelihood_tokens`, of (context, continuation) in ids; long rows first."""
        rows = [(*context, *continuation)[-(self.context + 1) :] for context, continuation in pairs]
        self.asked += len(pairs)
        self.cut += sum(len(a) + len(b) > self.context + 1 for a, b in pairs)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: dict[int, tuple[float, bool]] = {}
        while len(found) < len(order):
            longest = len(rows[order[len(found)]])
            size = max(1, min(self.batch, _LOGITS // (longest * self.text.vocab_size)))
            chosen = order[len(found) : len(found) + size]
            logits = self._logits([rows[i][:-1] for i in chosen])
            for i, scores in zip(chosen, logits, strict=True):
                length = min(len(pairs[i][1]), len(rows[i]) - 1)
                targets = torch.tensor(rows[i][len(rows[i]) - length :], device=scores.device)
                end = len(rows[i]) - 1
                own = torch.log_softmax(scores[end - length : end], dim=-1)
                nats = own.gather(1, targets[:, None]).sum()
                found[i] = float(nats), bool((own.argmax(dim=-1) == targets).all())
        return [found[i] for i in range(len(rows))]

    def _logits(self, rows: list[tuple[int, ...]]) -> Tensor:
        """Return [batch, seq, vocab]; what stands behind the end of a row is padding."""
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(self.place)
        with self.autocast():
            logits = self.model(padded)
        assert isinstance(logits, Tensor)
        return logits.float()

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in windows that do not overlap."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.context,
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self.score(pairs), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to one of its stop strings."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].args[0]))
        texts: dict[int, str] = {}
        for first in range(0, len(order), self.batch):
            chosen = order[first : first + self.batch]
            wishes = [_sampling(requests[i].args[1], i) for i in chosen]
            prompts = []
            for i, wish in zip(chosen, wishes, strict=True):
                ids = self.tok_encode(requests[i].args[0]) or [self.eot_token_id]
                room = max(1, self.context // 2, self.context - wish.max_new_tokens)
                self.asked, self.cut = self.asked + 1, self.cut + (len(ids) > room)
                prompts.append(torch.tensor(ids[-room:], dtype=torch.int64))
            with self.autocast():
                done = generate(
                    self.model,
                    prompts,
                    wishes,
                    context=self.context,
                    decode=self.text.decode,
                    eos=self.text.eos,
                )
            texts |= {i: completion.text for i, completion in zip(chosen, done, strict=True)}
        return [texts[i] for i in range(len(requests))]


def _sampling(wanted: dict[str, Any], seed: int) -> Sampling:
    until = wanted.get("until") or []
    sampled = wanted.get("do_sample", False) and wanted.get("temperature", 1.0) > 0
    return Sampling(
        max_new_tokens=int(wanted.get("max_gen_toks", 256)),
        temperature=float(wanted.get("temperature", 1.0)) if sampled else 0.0,
        top_k=wanted.get("top_k") or None,
        top_p=wanted.get("top_p"),
        stop=tuple([until] if isinstance(until, str) else until),
        seed=seed,
    )


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Args:
        scores: one for each task, metric and filter: value, stderr (None: not known), n, and what makes
            it comparable: version, prompt hash, n-shot, lm-eval's version.
        records: one for each question and filter.
    """

    scores: list[dict[str, Any]]
    records: list[dict[str, Any]]

    @property
    def values(self) -> dict[str, float]:
        """Return the scores by the names of their metrics, standard errors where they are known."""
        found = {}
        for row in self.scores:
            found[row["name"]] = row["value"]
            if row["stderr"] is not None:
                found[f"{row['name']}_stderr"] = row["stderr"]
        return found

    def write(self, folder: Path, step: int) -> None:
        """Write evals/<identity>.json and .parquet in a run's folder, over those of an earlier step."""
        import pandas as pd  # noqa: PLC0415

        identity = hashlib.sha256(json.dumps([row["identity"] for row in self.scores]).encode())
        place = folder / "evals"
        place.mkdir(exist_ok=True)
        name = identity.hexdigest()[:16]
        partial = place / f".{name}.parquet"
        pd.DataFrame(self.records).to_parquet(partial)
        os.replace(partial, place / f"{name}.parquet")
        text = json.dumps({"schema": _SCHEMA, "step": step, "scores": self.scores}, indent=1)
        storage.write_atomically(place / f"{name}.json", text)


def ask_benchmarks(cfg: HarnessConfig, trained: Trained, step: int) -> dict[str, float]:
    """Run lm-eval on `cfg.tasks`, write the full report to evals/ and return the scores."""
    asked = HarnessModel(
        trained.model,
        trained.corpus.tokenizer,
        context=trained.cfg.train.sequence_length,
        batch_size=cfg.batch_size,
        autocast=trained.precision.autocast,
    )
    report = evaluate(asked, cfg, suffix=trained.suffix)
    if trained.folder is not None:
        report.write(trained.folder, step)
        if trained.scored is not None:
            report.write(*trained.scored)
    return report.values


def evaluate(model: HarnessModel, cfg: HarnessConfig, *, suffix: str = "") -> Report:
    """Ask the model the questions of `cfg.tasks`; `suffix` ends the names of the scores (averaged weights).

    Raises:
        ConfigError: a task is unknown, or runs programs where there is no sandbox.
    """
    specs = [specify(name, cfg.data, cfg.include) for name in cfg.tasks]
    with _quiet(cfg.allow_unsafe_code):
        named = any(isinstance(spec, str) for spec in specs)
        tasks = TaskManager(include_path=cfg.include, include_defaults=named).load(specs)["tasks"]
        unsafe = {name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)}
        _refuse_unwalled(unsafe, specs, cfg)
        samples = None
        if cfg.limit is not None:
            samples = {
                name: _spread(len(task.eval_docs), cfg.limit) for name, task in tasks.items()
            }
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks.values()),
            num_fewshot=cfg.num_fewshot,
            samples=samples,
            bootstrap_iters=0,
            log_samples=True,
            confirm_run_unsafe_code=True,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=cfg.fewshot_seed,
        )
    if found is None:
        raise ConfigError("lm-eval returned nothing")
    records = [_record(name, row) for name, rows in found["samples"].items() for row in rows]
    if model.cut:
        print(
            f"{model.cut} of {model.asked} requests were longer than the context of {model.context} tokens and "
            "lost their beginning",
            file=sys.stderr,
        )
    return Report(list(_scores(found, suffix)), records)


def _refuse_unwalled(unsafe: set[str], specs: list[Any], cfg: HarnessConfig) -> None:
    """Refuse tasks that run programs where there is no sandbox, or past it: only our own scores use it."""
    if not unsafe or cfg.allow_unsafe_code:
        return
    ours = {
        spec["task"]
        for spec in specs
        if isinstance(spec, dict)
        and getattr(spec.get("process_results"), "__module__", "") == code.__name__
    }
    if unsafe - ours:
        raise ConfigError(
            f"{', '.join(sorted(unsafe - ours))}: lm-eval's own scoring would run a model's programs without a "
            "sandbox; give eval.harness.data, for the shipped task, or accept the risk with "
            "eval.harness.allow_unsafe_code=true"
        )
    choose_wall(False)


def _spread(count: int, limit: int) -> list[int]:
    """Return at most `limit` of `count` indices, evenly spaced: files are often sorted by kind."""
    return sorted({i * count // min(limit, count) for i in range(min(limit, count))})


def _scores(found: dict[str, Any], suffix: str) -> Iterator[dict[str, Any]]:
    for task, values in found["results"].items():
        rows = found["samples"][task]
        prompts = hashlib.sha256("".join(row["prompt_hash"] for row in rows).encode()).hexdigest()
        about = {
            "version": found["versions"].get(task),
            "prompt_hash": prompts[:16],
            "num_fewshot": found["n-shot"].get(task, 0),
            "lm_eval": version("lm_eval"),
        }
        identity = hashlib.sha256(json.dumps([task, about, suffix]).encode()).hexdigest()[:16]
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            mine = [row for row in rows if row["filter"] == kind]
            stderr = _stderr(metric, float(value), [row.get(metric) for row in mine])
            name = f"{task}/{metric}" + (f".{kind}" if kind != "none" else "") + suffix
            yield {
                "name": name,
                "task": task,
                "metric": metric,
                "filter": kind,
                "value": float(value),
                "stderr": stderr,
                "n": len(mine),
                **about,
                "identity": identity,
            }


def _stderr(metric: str, value: float, each: list[Any]) -> float | None:
    """Return the standard error of a mean, or of exp(-mean) by the delta method; None of anything else."""
    if len(each) < 2 or not all(isinstance(one, (int, float)) for one in each):
        return None
    numbers = torch.tensor(each, dtype=torch.float64)
    of_mean = float(numbers.std()) / math.sqrt(len(each))
    if math.isclose(float(numbers.mean()), value, rel_tol=1e-6, abs_tol=1e-9):
        return of_mean
    return value * of_mean if metric == "perplexity" else None


def _record(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return a question with what was asked, said and scored; nested parts as JSON."""
    nested = ("doc", "arguments", "resps", "filtered_resps", "target")
    flat = {key: value for key, value in row.items() if key not in (*nested, "metrics")}
    said = {key: json.dumps(row.get(key), default=str, ensure_ascii=False) for key in nested}
    return {"task": task} | flat | said


@contextmanager
def _quiet(allow_unsafe: bool) -> Iterator[None]:
    """lm-eval warns of much that is meant; its programs are told whether a sandbox is a must.

    Of several processes on a node it answers the first only; ours all ask alike, so each is a first.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    before = {name: os.environ.get(name) for name in (code.ALLOW, "LOCAL_RANK")}
    logger.setLevel(logging.ERROR)
    os.environ |= {code.ALLOW: "true" if allow_unsafe else "false", "LOCAL_RANK": "0"}
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
