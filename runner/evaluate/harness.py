"""Benchmarks by lm-eval on models trained here.

Shape legend: batch, seq, vocab.
"""

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lm_eval
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from models.language_model import LanguageModel
from models.prefix_cache import PrefixCache
from runner.data.benchmark_files import specify
from runner.data.corpus import encode_with_special, end_ids, prompt_ids, start_id
from runner.data.tokenizers import Tokenizer
from runner.evaluate import code_execution as code
from runner.evaluate.config import HarnessConfig
from runner.evaluate.generation_settings import denoising_of, sampling_of
from runner.evaluate.harness_report import Report, record_of, scores_of
from runner.evaluate.labels import evenly_spaced
from runner.evaluate.likelihoods import couples_rows
from runner.evaluate.sandbox import choose_wall
from runner.generate.denoising import Denoising
from runner.generate.engine import Engine, Strategy
from runner.generate.generate import completions, make_engine
from runner.generate.request import Request
from runner.generate.sampling import Sampling
from runner.machine.errors import ConfigError
from runner.records.contracts import Trained, strategy

_BLOCK, _PREFIX_BYTES = 32, 1 << 28  # of the examples that all questions of a task begin with
_MANY = 0.01  # of a task's requests lost their beginning: it was another task
Context = Callable[[], AbstractContextManager[None]]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """lm-eval's interface to a model and its tokenizer.

    A text longer than `context` tokens loses its beginning. `num_requests` and `num_truncated`
    count the requests by task, and those that did.

    Args:
        shares_prefixes: read once what several texts begin with. False for a model whose forward
            pass couples the rows of a batch: it would change the scores.
        strategy: how the model generates (None: one token after the other). One that fills in a
            canvas gives no scores of its own.
        fill: settings of filling in a canvas; its length is that of the task.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        context: int,
        batch_size: int = 16,
        autocast: Context = nullcontext,
        shares_prefixes: bool = True,
        strategy: Strategy[Any] | None = None,
        fill: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.strategy, self.fill = strategy, dict(fill or {})
        self.shares_prefixes = shares_prefixes
        self.model, self.tokenizer, self.context = model, tokenizer, context
        self.rows_per_batch, self.autocast = batch_size, autocast
        self._device = next(model.parameters()).device  # the field behind `device` of lm-eval
        self.num_requests: Counter[str] = Counter()
        self.num_truncated: Counter[str] = Counter()
        self._tasks: list[str] = []  # of the requests that are being scored

    @property
    def eot_token_id(self) -> int:
        """The id of the end of a document."""
        return self.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """The id that precedes an empty context."""
        return start_id(self.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text, by default with the special tokens of the tokenizer's own."""
        if add_special_tokens is False:
            return [int(i) for i in self.tokenizer.encode(string)]
        return [int(i) for i in encode_with_special(self.tokenizer, string)]

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood of the continuation, whether it is greedy) of each request."""
        self._tasks = [request.task_name for request in requests]
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return scored

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        for task, (context, continuation) in zip(self._tasks, pairs, strict=True):
            self._count(task, len(context) + len(continuation) > self.context + 1)
        return self.score(pairs)

    def _count(self, task: str, truncated: bool) -> None:
        self.num_requests[task] += 1
        self.num_truncated[task] += truncated

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return the log-likelihood (nats) of each continuation and whether it is greedy.

        What several pairs begin with is read once.

        Args:
            pairs: ids of context and continuation. The longest are scored first.
        """
        if self.strategy is not None:
            raise ConfigError(
                "a model that fills in a canvas scores no continuations token by token; ask for "
                "tasks that generate (humaneval, mbpp, gsm8k), and see val_bound"
            )
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        if self.shares_prefixes:  # pairs of one context are neighbours
            order.sort(key=lambda i: (-len(pairs[i][0]), pairs[i][0]))
        scored: dict[int, tuple[float, bool]] = {}
        with self.autocast():
            for event in self._engine().run(self._scored(i, *pairs[i]) for i in order):
                index, scores = int(event.id), event.prompt_scores
                assert scores is not None
                targets = pairs[index][1][-len(scores.best) :]
                scored[index] = sum(scores.logprobs), list(scores.best) == targets
        return [scored[i] for i in range(len(pairs))]

    def _scored(self, number: int, context: list[int], continuation: list[int]) -> Request:
        """Return the request for the scores of a continuation."""
        ids = (*context, *continuation)[-(self.context + 1) :]
        first = max(1, len(ids) - len(continuation))
        how = Sampling(max_new_tokens=0)
        return Request(id=str(number), prompt=ids, how=how, score_from=first)

    def _engine(self) -> Engine[Any]:
        prefixes, tokenizer = PrefixCache(block=_BLOCK, max_bytes=_PREFIX_BYTES), self.tokenizer
        return make_engine(
            self.model,
            context=self.context,
            decode=tokenizer.decode,
            ends=end_ids(tokenizer),
            rows=self.rows_per_batch,
            strategy=self.strategy,
            prefixes=prefixes if self.shares_prefixes else None,
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood (nats) of each text, computed in disjoint windows."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.context,
                context_len=1,
            )
            self._count(request.task_name, False)
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self.score(pairs), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context up to the first of its stop strings."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].args[0]))
        wanted = [self._generated(i, requests[i].task_name, *requests[i].args) for i in order]
        with self.autocast():
            done = list(completions(self._engine(), wanted))
        texts = {
            int(request.id): _until(self.tokenizer.decode(one.ids), request.how.stop)
            for request, one in zip(wanted, done, strict=True)
        }
        return [texts[i] for i in range(len(requests))]

    def _generated(
        self, number: int, task: str, context: str, settings: Mapping[str, Any]
    ) -> Request:
        """Return the request for the continuation of a context."""
        how: Sampling | Denoising = sampling_of(settings, self.tokenizer, number)
        ids = prompt_ids(self.tokenizer, context)
        room = max(1, self.context // 2, self.context - how.max_new_tokens)
        if self.strategy is not None:
            assert isinstance(how, Sampling)
            how = denoising_of(how, min(len(ids), room), self.context, self.fill)
        self._count(task, len(ids) > room)
        return Request(id=str(number), prompt=ids[-room:], how=how, separate=True)


def _until(text: str, stop: Sequence[str]) -> str:
    """Return `text` up to the first of its stop strings."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def run_benchmarks(cfg: HarnessConfig, trained: Trained, step: int) -> dict[str, float]:
    """Run lm-eval on `cfg.tasks`; write the report to evals/ and return the scores.

    An evaluation-only cell writes the report to the run evaluated too.
    """
    tokenizer, context = trained.corpus.tokenizer, cfg.context_in(trained.cfg)
    model = HarnessModel(
        trained.model,
        tokenizer,
        context=context,
        batch_size=cfg.batch_size,
        autocast=trained.precision.autocast,
        shares_prefixes=not couples_rows(trained),
        strategy=strategy(trained.cfg.task, trained.model, tokenizer, context),
        fill=cfg.fill,
    )
    report = evaluate(model, cfg, suffix=trained.suffix)
    if trained.folder is not None:
        report.write(trained.folder, step)
        if trained.scored is not None:
            report.write(*trained.scored)
    return report.values


def evaluate(model: HarnessModel, cfg: HarnessConfig, *, suffix: str = "") -> Report:
    """Return the report of `cfg.tasks` on a model.

    Args:
        suffix: appended to the names of the scores ("_average" for averaged weights).

    Raises:
        ConfigError: a task is unknown, it asks for a way of generation that is not done here, or it
            runs programs and there is no sandbox.
    """
    specs = [specify(name, cfg.data, cfg.include) for name in cfg.tasks]
    with _quiet(cfg.allow_unsafe_code):
        named = any(isinstance(spec, str) for spec in specs)
        # One for both: lm-eval's own takes seconds, since it indexes every task that it ships.
        manager = TaskManager(include_path=cfg.include, include_defaults=named)
        tasks = manager.load(specs)["tasks"]
        unsafe = {name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)}
        _check_sandbox(unsafe, specs, cfg)
        for task in tasks.values():
            sampling_of(getattr(task.config, "generation_kwargs", None) or {})
        samples = None
        if cfg.limit is not None:
            samples = {
                name: evenly_spaced(len(task.eval_docs), cfg.limit) for name, task in tasks.items()
            }
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks.values()),
            task_manager=manager,
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
    if results is None:
        raise ConfigError("lm-eval returned nothing")
    records = [record_of(name, row) for name, rows in results["samples"].items() for row in rows]
    truncated, asked = model.num_truncated.total(), model.num_requests.total()
    if truncated:
        print(
            f"{truncated} of {asked} requests were longer than the context "
            f"of {model.context} tokens and lost their beginning; see eval.harness.context",
            file=sys.stderr,
        )
    cut = {
        task: model.context
        for task, number in model.num_truncated.items()
        if number > _MANY * model.num_requests[task]
    }
    return Report(list(scores_of(results, suffix, cut)), records)


def _check_sandbox(unsafe: set[str], specs: list[Any], cfg: HarnessConfig) -> None:
    """Check that tasks which run programs do so in a working sandbox.

    Raises:
        ConfigError: no sandbox works here, or lm-eval's own scoring would run the programs.
    """
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
            f"{', '.join(sorted(unsafe - ours))}: lm-eval's own scoring would run a model's "
            "programs without a sandbox; give eval.harness.data, for the shipped task, or accept "
            "the risk with eval.harness.allow_unsafe_code=true"
        )
    choose_wall(False)


@contextmanager
def _quiet(allow_unsafe: bool) -> Iterator[None]:
    """Silence lm-eval's warnings and tell the scoring functions whether a sandbox is required.

    lm-eval returns results on LOCAL_RANK 0 only; here every rank evaluates, so each is set to 0.
    What it notes of the environment takes a second, and an attempt has its own notes.
    """
    add_environment = evaluator.add_env_info
    logger = logging.getLogger("lm_eval")
    level = logger.level
    before = {name: os.environ.get(name) for name in (code.ALLOW, "LOCAL_RANK")}
    logger.setLevel(logging.ERROR)
    os.environ |= {code.ALLOW: "true" if allow_unsafe else "false", "LOCAL_RANK": "0"}
    evaluator.add_env_info = lambda results: None
    try:
        yield
    finally:
        evaluator.add_env_info = add_environment
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
