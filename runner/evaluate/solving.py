"""Problems solved greedily, by several samples, by a scorer's choice and at budgets of thinking.

Values, each NAME/... with a standard error over problems, NAME/..._stderr, where it is a share:

    greedy                    share of right greedy answers
    wrong_arithmetic, wrong_reasoning, unparsed     what is wrong with the others
    greedy_tokens, sample_tokens                    mean tokens of an answer
    pass_at_K, majority_at_K, best_at_K             of K of the samples
    tokens_at_K                                     spent for them
    auc, auc_within           of the scorer, over all pairs and over those of one problem
    gated_T, gated_T_tokens   drawn until the score reaches T, and the tokens spent
    budget_B, budget_B_tokens, budget_B_cut         with B tokens of thinking
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import torch

from models.prefix_cache import PrefixCache
from runner.data.answer_parsers import MarkedNumber
from runner.data.arithmetic import VERDICTS, Verdict, verdict
from runner.data.corpus import end_ids
from runner.data.problems import prompts_and_solutions
from runner.evaluate.answer_metrics import (
    auc,
    auc_within,
    best_at_k,
    gated,
    majority_at_k,
    mean_and_error,
    pass_at_k,
)
from runner.evaluate.likelihoods import couples_rows
from runner.evaluate.rewards import checked_scores
from runner.evaluate.solving_config import SolvingConfig
from runner.evaluate.worked_examples import WorkedExamples
from runner.generate.budget_forcing import BudgetForcing, think
from runner.generate.generate import Completion, generate
from runner.generate.sampling import Sampling
from runner.generate.tool_pool import InTurn
from runner.generate.tools import tools_for
from runner.machine.errors import ConfigError
from runner.machine.storage import write_atomically
from runner.records.contracts import Trained, strategy

Values = dict[str, float]
_BLOCK, _PREFIX_BYTES = 32, 1 << 28  # of the worked examples, which are read once


@dataclass
class Solved:
    """A problem and what the model made of it.

    Args:
        ids: of the prompt, and of the worked examples before it.
        reference: the right answer, parsed.
        greedy, tokens: the greedy answer and its tokens.
        samples, sample_tokens, scores: of each sample.
    """

    ids: list[int]
    prompt: str
    reference: str
    greedy: str = ""
    tokens: int = 0
    verdict: Verdict = "unparsed"
    samples: list[str] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    sample_tokens: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    @property
    def right(self) -> list[bool]:
        """Which samples are right."""
        return [answer == self.reference for answer in self.answers]


class Solver:
    """A trained model that solves problems as a config says."""

    def __init__(self, cfg: SolvingConfig, trained: Trained) -> None:
        self.cfg, self.trained = cfg, trained
        self.tokenizer = trained.corpus.tokenizer
        self.parser = cfg.parser or MarkedNumber()
        self.context = trained.cfg.train.sequence_length + 1  # the last token is read by nobody
        if strategy(trained.cfg.task, trained.model, self.tokenizer, self.context) is not None:
            raise ConfigError(
                "problems are solved one token after the other, and this task's model generates "
                "otherwise; leave the evaluation out"
            )
        shots = cfg.shots
        self.examples = WorkedExamples(trained, shots, cfg.shots_seed) if shots else None
        shared = shots and not couples_rows(trained)
        self.prefixes = PrefixCache(block=_BLOCK, max_bytes=_PREFIX_BYTES) if shared else None

    def after_examples(self, ids: list[int]) -> list[int]:
        """Return the ids of a prompt with the worked examples before it, if there are any."""
        return ids if self.examples is None else self.examples.before(ids)

    def prompts(self) -> Iterator[tuple[list[int], str]]:
        """Yield the ids of each held-out prompt and the text of its solution."""
        cfg, run, eos = self.cfg, self.trained.cfg, self.tokenizer.eos
        seq = run.train.sequence_length
        batches = self.trained.corpus.held_out(seq, run.eval.batch_size, cfg.problems * seq)
        given = chain.from_iterable(map(prompts_and_solutions, batches))
        for ids, solution in islice(given, cfg.problems):
            yield ids, self.tokenizer.decode([i for i in solution if i != eos])

    def problems(self) -> list[Solved]:
        """Return the problems to solve.

        Raises:
            ConfigError: the parser finds no answer in a solution.
        """
        problems = []
        for ids, text in self.prompts():
            reference = self.parser.parse(text)
            if reference is None:
                raise ConfigError(
                    f"the solution {text[:80]!r} has no answer that {self.parser} finds; set "
                    "the parser of the evaluation to the form of the data"
                )
            problems.append(Solved(self.after_examples(ids), self.tokenizer.decode(ids), reference))
        return problems

    def continued(
        self, texts: Sequence[Sequence[int]], samplings: Sequence[Sampling]
    ) -> list[Completion]:
        """Return what the model writes after each text."""
        cfg, fitting = self.cfg, []
        for text, how in zip(texts, samplings, strict=True):
            room = self.context - len(text)
            if room < 1:
                raise ConfigError(
                    f"a text of {len(text)} tokens leaves no room for an answer in "
                    f"train.sequence_length={self.context - 1}; raise it"
                )
            fitting.append(_shortened(how, room))
        tools = tools_for(list(cfg.tools.values()), self.tokenizer) if cfg.tools else None
        with torch.no_grad(), self.trained.precision.autocast():
            return generate(
                self.trained.model,
                [torch.tensor(text) for text in texts],
                fitting,
                context=self.context,
                decode=self.tokenizer.decode,
                ends=end_ids(self.tokenizer),
                rows=cfg.rows,
                prefixes=self.prefixes,
                tools=tools,
                pool=InTurn(),
            )

    def sampling(self, temperature: float, sample: int = 0) -> Sampling:
        """Return the settings of a sample of a problem."""
        cfg = self.cfg
        return Sampling(
            max_new_tokens=cfg.max_new_tokens,
            temperature=temperature,
            top_k=cfg.top_k if temperature else None,
            stop=cfg.stop,
            seed=cfg.seed,
            sample=sample,
        )

    def answer(self, problems: Sequence[Solved]) -> None:
        """Fill in the greedy answers and the samples."""
        count = self.cfg.samples
        texts = [problem.ids for problem in problems]
        done = self.continued(texts, [self.sampling(0.0)] * len(texts))
        for problem, completion in zip(problems, done, strict=True):
            problem.greedy, problem.tokens = completion.text, _num_tokens(completion)
            answer = self.parser.parse(completion.text)
            problem.verdict = verdict(completion.text, answer, problem.reference)
        every = [
            self.sampling(self.cfg.temperature, place * count + sample)
            for place in range(len(problems))
            for sample in range(count)
        ]
        drawn = self.continued([ids for ids in texts for _ in range(count)], every)
        for place, problem in enumerate(problems):
            own = drawn[place * count : (place + 1) * count]
            problem.samples = [completion.text for completion in own]
            problem.answers = [self.parser.parse(text) for text in problem.samples]
            problem.sample_tokens = [_num_tokens(completion) for completion in own]

    def score(self, problems: Sequence[Solved]) -> None:
        """Fill in the scores of the samples.

        Raises:
            ConfigError: the scorer gives another number of scores, or one that is no number.
        """
        scorer, count = self.cfg.scorer.build(self.trained), self.cfg.samples
        prompts = [problem.prompt for problem in problems for _ in range(count)]
        answers = [text for problem in problems for text in problem.samples]
        given = scorer.score(prompts, answers)
        scores = checked_scores(str(self.cfg.scorer), given, len(answers))
        for place, problem in enumerate(problems):
            problem.scores = scores[place * count : (place + 1) * count]

    def at_budgets(self, problems: Sequence[Solved]) -> Values:
        """Return the accuracy of greedy answers at each budget of thinking."""
        given = self.cfg.forcing
        values: Values = {}
        for budget in given.budgets:
            forcing = BudgetForcing(
                budget=budget,
                think_end=given.think_end,
                wait=given.wait,
                waits=given.waits,
                final=given.final,
                answer_tokens=given.answer_tokens,
            )
            asked = [self.sampling(0.0)] * len(problems)
            texts = [problem.ids for problem in problems]
            done = think(self.continued, self.tokenizer, texts, asked, forcing)
            right = [
                float(self.parser.parse(thought.text) == problem.reference)
                for thought, problem in zip(done, problems, strict=True)
            ]
            values |= _share(f"budget_{budget}", right)
            values[f"budget_{budget}_tokens"] = sum(t.spent for t in done) / len(done)
            values[f"budget_{budget}_cut"] = sum(t.cut for t in done) / len(done)
        return values


def solve(cfg: SolvingConfig, trained: Trained) -> Values:
    """Return the values of this file's head; write answers_NAME.jsonl, a line for each problem.

    Every rank computes everything.

    Raises:
        ConfigError, DataError: the data hold no problems, or the model cannot solve them.
    """
    solver = Solver(cfg, trained)
    problems = solver.problems()
    solver.answer(problems)
    if cfg.scorer is not None:
        solver.score(problems)
    if trained.folder is not None:
        lines = (json.dumps(_line(problem)) for problem in problems)
        file = trained.folder / f"answers_{cfg.name}.jsonl"
        write_atomically(file, "".join(f"{line}\n" for line in lines))
    values = of_greedy(problems) | of_samples(problems)
    if cfg.scorer is not None:
        values |= of_scores(problems, cfg.thresholds)
    if cfg.forcing is not None:
        values |= solver.at_budgets(problems)
    return {f"{cfg.name}/{key}{trained.suffix}": value for key, value in values.items()}


def of_greedy(problems: Sequence[Solved]) -> Values:
    """Return the values of the greedy answers."""
    values = _share("greedy", [float(one.verdict == "right") for one in problems])
    for kind in VERDICTS[1:]:
        values[kind] = sum(one.verdict == kind for one in problems) / len(problems)
    return values | {"greedy_tokens": sum(one.tokens for one in problems) / len(problems)}


def of_samples(problems: Sequence[Solved]) -> Values:
    """Return pass@k, votes and tokens; nothing if there are no samples."""
    count = len(problems[0].samples)
    if not count:
        return {}
    mean = sum(sum(one.sample_tokens) for one in problems) / (count * len(problems))
    values = {"sample_tokens": mean}
    for k in curve(count):
        passed = [pass_at_k(count, sum(one.right), k) for one in problems]
        voted = [majority_at_k(one.answers, one.reference, k) for one in problems]
        values |= _share(f"pass_at_{k}", passed) | _share(f"majority_at_{k}", voted)
        values[f"tokens_at_{k}"] = k * mean
    return values


def of_scores(problems: Sequence[Solved], thresholds: Iterable[float]) -> Values:
    """Return what choosing by the scores gives."""
    scores, right = [one.scores for one in problems], [one.right for one in problems]
    pooled = [s for some in scores for s in some], [r for some in right for r in some]
    values = {"auc": auc(*pooled), "auc_within": auc_within(scores, right)}
    for k in curve(len(scores[0])):
        best = [best_at_k(*pair, k) for pair in zip(scores, right, strict=True)]
        values |= _share(f"best_at_{k}", best)
    for threshold in thresholds:
        taken = [gated(some, threshold) for some in scores]
        hits = [float(one[index]) for one, (index, _) in zip(right, taken, strict=True)]
        spent = [
            sum(one.sample_tokens[:drawn]) for one, (_, drawn) in zip(problems, taken, strict=True)
        ]
        values |= _share(f"gated_{threshold:g}", hits)
        values[f"gated_{threshold:g}_tokens"] = sum(spent) / len(spent)
    return values


def curve(count: int) -> list[int]:
    """Return the numbers of samples of an N-curve: the powers of 2 and `count` itself."""
    powers = [1 << power for power in range(count.bit_length()) if 1 << power < count]
    return [*powers, count]


def _share(name: str, values: Sequence[float]) -> Values:
    mean, error = mean_and_error(values)
    return {name: mean} | ({f"{name}_stderr": error} if len(values) > 1 else {})


def _shortened(how: Sampling, room: int) -> Sampling:
    return how if how.max_new_tokens <= room else replace(how, max_new_tokens=room)


def _num_tokens(completion: Completion) -> int:
    return len(completion.ids) + (completion.end is not None)


def _line(problem: Solved) -> dict[str, Any]:
    return {
        "prompt": problem.prompt,
        "reference": problem.reference,
        "greedy": problem.greedy,
        "verdict": problem.verdict,
        "samples": problem.samples,
        "right": problem.right,
        "scores": problem.scores,
        "tokens": problem.sample_tokens,
    }
