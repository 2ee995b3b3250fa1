"""GRPO and its relatives: answers are drawn inside the step and learnt by their advantage.

Shape legend: batch, seq; rows = answers; parts = rewards.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kernels.logit_rows import IGNORE
from kernels.philox import NoiseKey
from models.contract import token_loss
from models.language_model import TokenLoss
from runner.data.corpus import end_ids
from runner.data.problems import prompts_and_solutions
from runner.evaluate.rewards import Answer, checked_scores, weight
from runner.generate.generate import Completion, generate
from runner.generate.sampling import Sampling
from runner.generate.tool_pool import InTurn
from runner.generate.tools import tools_for
from runner.learn.tasks.frozen import frozen_like
from runner.learn.tasks.grpo_config import GRPOConfig
from runner.learn.tasks.grpo_loss import Surrogate, advantages, scales
from runner.records.contracts import Batch, Inputs, Measure

_ROUND_TO = 16  # positions of a batch: fewer shapes, fewer compilations


@dataclass(frozen=True)
class Drawn:
    """An answer to a problem.

    Args:
        prompt, ids: of the prompt and of the answer, its end included.
        nll: of each id when it was drawn, nats.
        learnt: which ids were chosen by the model.
        answer: the texts.
    """

    prompt: list[int]
    ids: list[int]
    nll: list[float]
    learnt: list[bool]
    answer: Answer


Problem = tuple[list[int], list[int]]  # ids of the prompt and of the solution


class GRPO:
    """See `GRPOConfig`."""

    measure: Measure = ("val_reward", "max")

    def __init__(self, cfg: GRPOConfig, model: Any, tokenizer: Any, inputs: Inputs) -> None:
        self.cfg, self.tokenizer, self.reference = cfg, tokenizer, None
        if cfg.beta:
            self.reference = frozen_like(model, "task.beta", "init", inputs, tokenizer)

    def draw(self, model: Any, batches: Sequence[Batch], noise: NoiseKey) -> list[Batch]:
        """Return the batches with the answers of `model` in the place of the solutions."""
        problems = [list(prompts_and_solutions(batch)) for batch in batches]
        seq, device = batches[0]["tokens"].shape[1], batches[0]["tokens"].device
        every = [problem for some in problems for problem in some]
        numbers = noise.samples.tolist()
        answers, parts = self._drawn_groups(model, every, numbers, noise.seed, seq)
        longest = max(len(one.prompt) + len(one.ids) - 1 for one in answers)
        width = min(seq, -(-longest // _ROUND_TO) * _ROUND_TO)
        totals = self._total(parts).view(-1, self.cfg.group)
        equal = _are_equal(totals)[:, None]
        gains = advantages(totals, self.cfg.loss).masked_fill(equal, 0.0)
        drawn, at = [], 0
        for batch in batches:
            rows = slice(at, at := at + len(batch["tokens"]) * self.cfg.group)
            made = self._batch(answers[rows], gains.flatten()[rows], parts[rows], width)
            made["index"] = batch["index"].repeat_interleave(self.cfg.group).cpu()
            drawn.append({key: value.to(device) for key, value in made.items()})
        if not any(float(batch["share"].sum()) for batch in drawn):
            drawn[0]["share"][0] = 1.0  # nothing to learn in the whole step: 0 / 1, not 0 / 0
        if self.reference is not None:
            self._add_reference(drawn, noise)
        return drawn

    def planned(self, batch: Batch) -> Batch:
        """Return a batch of the largest shapes that `draw` gives, for the plan of the memory."""
        rows, seq = len(batch["tokens"]) * self.cfg.group, batch["tokens"].shape[1]
        tokens, ones = torch.zeros(rows, seq).long(), torch.ones(rows)
        planned = {"tokens": tokens, "targets": tokens.clone(), "index": ones.long()}
        planned |= {name: torch.zeros(rows, seq) for name in ("sampled", "scale", "advantage")}
        planned |= {name: ones.bool() for name in ("cut", "equal")}
        parts = torch.zeros(rows, len(self.cfg.rewards)).double()
        return planned | {"parts": parts, "share": ones.double(), "answer_tokens": ones}

    def count(self, batch: Batch) -> Tensor:
        """Return the divisor of the loss: answers, or with dapo their tokens."""
        return batch["share"].sum()

    def loss(self, model: Any, batch: Batch, noise: NoiseKey | None) -> TokenLoss:
        """Return the loss of the answers that `draw` has added."""
        surrogate = Surrogate(
            advantage=batch["advantage"].flatten(),
            scale=batch["scale"].flatten(),
            sampled=batch["sampled"].flatten(),
            reference=batch["reference"].flatten() if "reference" in batch else None,
            low=self.cfg.clip_low,
            high=self.cfg.clip_high,
            beta=self.cfg.beta,
        )
        out = token_loss(
            model, batch["tokens"], batch["targets"], noise=noise, weights=surrogate.weights
        )
        nll = out.nll.flatten().detach()
        statistics = out.statistics | self._statistics(batch, surrogate, nll)
        return replace(out, reported=surrogate.value(nll), statistics=statistics)

    def validate(self, model: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Return `val_reward`, its parts and `val_answer_tokens` of greedy answers."""
        problems, seq = list(prompts_and_solutions(batch)), batch["tokens"].shape[1]
        asked = [
            (problem, self._sampling(problem[0], seq, temperature=0.0)) for problem in problems
        ]
        answers = self._generate(model, asked, seq)
        parts, number = self._score(answers), len(answers)
        tokens = sum(len(one.ids) for one in answers)
        values = {"val_reward": (float(self._total(parts).sum()), float(number))}
        for name, column in zip(self.cfg.rewards, parts.unbind(1), strict=True):
            values[f"val_reward/{name}"] = float(column.sum()), float(number)
        return values | {"val_answer_tokens": (float(tokens), float(number))}

    def _drawn_groups(
        self, model: Any, problems: Sequence[Problem], numbers: Sequence[int], seed: int, seq: int
    ) -> tuple[list[Drawn], Float[Tensor, "rows parts"]]:
        """Return the answers, group after group, and their rewards."""
        size, rounds = self.cfg.group, 1 + self.cfg.resample
        answers: list[Drawn] = []
        parts = torch.zeros(0, len(self.cfg.rewards), dtype=torch.float64)
        left = list(range(len(problems)))
        for turn in range(rounds):
            asked = [
                (
                    problems[index],
                    self._sampling(
                        problems[index][0],
                        seq,
                        temperature=self.cfg.temperature,
                        seed=seed,
                        sample=(numbers[index] * rounds + turn) * size + member,
                    ),
                )
                for index in left
                for member in range(size)
            ]
            new = self._generate(model, asked, seq)
            scored = self._score(new)
            if not turn:
                answers, parts = new, scored
            for place, index in enumerate(left):
                here, there = slice(index * size, (index + 1) * size), slice(place * size, None)
                answers[here] = new[there][:size]
                parts[here] = scored[there][:size]
            left = _are_equal(self._total(parts).view(-1, size)).nonzero()[:, 0].tolist()
            if not left:
                break
        return answers, parts

    def _sampling(self, prompt: Sequence[int], seq: int, **more: Any) -> Sampling:
        room = seq - len(prompt) + 1  # the last token is a target only
        if room < 1:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room for an answer in "
                f"train.sequence_length={seq}; raise it"
            )
        new = min(self.cfg.max_new_tokens, room)
        return Sampling(max_new_tokens=new, top_k=self.cfg.top_k, stop=self.cfg.stop, **more)

    def _generate(
        self, model: Any, asked: Iterable[tuple[Problem, Sampling]], seq: int
    ) -> list[Drawn]:
        problems, samplings = zip(*asked, strict=True)
        tools = tools_for(list(self.cfg.tools.values()), self.tokenizer) if self.cfg.tools else None
        completions = generate(
            model,
            [torch.tensor(prompt) for prompt, _ in problems],
            samplings,
            context=seq + 1,
            decode=self.tokenizer.decode,
            ends=end_ids(self.tokenizer),
            rows=self.cfg.rows,
            tools=tools,
            pool=InTurn(),  # answers that come when they may would change the batch
        )
        return [
            self._as_drawn(completion, solution)
            for completion, (_, solution) in zip(completions, problems, strict=True)
        ]

    def _as_drawn(self, completion: Completion, solution: Sequence[int]) -> Drawn:
        end = [completion.end] if completion.end is not None else []
        ids = completion.ids + [index for index, _ in end]
        answer = Answer(
            prompt=self.tokenizer.decode(completion.prompt),
            text=completion.text,
            reference=self.tokenizer.decode([i for i in solution if i != self.tokenizer.eos]),
            num_tokens=len(ids),
            cut=completion.finish == "length",
        )
        nll = [-logprob for logprob in completion.logprobs + [logprob for _, logprob in end]]
        learnt = [not forced for forced in completion.forced] + [True] * len(end)
        return Drawn(completion.prompt, ids, nll, learnt, answer)

    def _score(self, answers: Sequence[Drawn]) -> Float[Tensor, "rows parts"]:
        texts = [one.answer for one in answers]
        columns = []
        for name, reward in self.cfg.rewards.items():
            scores = checked_scores(f"task.rewards.{name}", reward.score(texts), len(texts))
            columns.append(torch.tensor(scores, dtype=torch.float64))
        return torch.stack(columns, dim=1)

    def _total(self, parts: Float[Tensor, "rows parts"]) -> Float[Tensor, " rows"]:
        weights = [weight(reward) for reward in self.cfg.rewards.values()]
        return parts @ torch.tensor(weights, dtype=torch.float64)

    def _batch(
        self, answers: Sequence[Drawn], gains: Tensor, parts: Tensor, width: int
    ) -> dict[str, Tensor]:
        rows, cfg = len(answers), self.cfg
        tokens = torch.full((rows, width), self.tokenizer.eos)
        targets = torch.full((rows, width), IGNORE)
        sampled = torch.zeros(rows, width)
        for row, one in enumerate(answers):
            text, first = one.prompt + one.ids, len(one.prompt) - 1
            tokens[row, : len(text) - 1] = torch.tensor(text[:-1])
            places = slice(first, first + len(one.ids))
            learnt = torch.tensor(one.learnt)
            targets[row, places] = torch.where(learnt, torch.tensor(one.ids), IGNORE)
            sampled[row, places] = torch.tensor(one.nll)
        cut = torch.tensor([one.answer.cut for one in answers])
        equal = (gains.view(-1, cfg.group) == 0).all(1).repeat_interleave(cfg.group)
        counted = ~(cut & cfg.skip_cut) & ~(equal & (cfg.loss == "dapo") & (cfg.resample > 0))
        lengths = (targets != IGNORE).sum(1)
        scale, share = scales(lengths, counted, cfg.loss, cfg.max_new_tokens)
        made = {"tokens": tokens, "targets": targets, "sampled": sampled, "share": share}
        made["scale"] = (scale[:, None] * (targets != IGNORE)).float()
        made["advantage"] = gains.float()[:, None].expand(rows, width)
        counts = torch.tensor([float(len(one.ids)) for one in answers])
        return made | {"parts": parts, "cut": cut, "equal": equal, "answer_tokens": counts}

    def _add_reference(self, batches: Iterable[Batch], noise: NoiseKey) -> None:
        """Add the reference's nll, under the noise that the policy will have."""
        for batch in batches:
            key = replace(noise, samples=batch["index"])
            out = token_loss(self.reference, batch["tokens"], batch["targets"], noise=key)
            batch["reference"] = out.nll

    def _statistics(self, batch: Batch, surrogate: Surrogate, nll: Tensor) -> dict[str, Tensor]:
        """Return what is logged of the answers; `entropy` is estimated by their mean nll."""
        learnt = batch["targets"].flatten() != IGNORE
        number = learnt.sum().clamp(min=1)
        rows = torch.arange(len(nll), device=nll.device)
        values = {
            "reward": self._total(batch["parts"].cpu()).mean().to(nll.device),
            "zero_advantage": batch["equal"].double().mean(),
            "answer_tokens": batch["answer_tokens"].mean(),
            "cut": batch["cut"].double().mean(),
            "entropy": (nll * learnt).sum() / number,
            "clipped": (surrogate.clipped(nll, rows) & learnt).sum() / number,
        }
        for name, column in zip(self.cfg.rewards, batch["parts"].unbind(1), strict=True):
            values[f"reward/{name}"] = column.mean()
        if surrogate.reference is not None:
            values["kl"] = (surrogate.divergence(nll) * learnt).sum() / number
        return values


def _are_equal(totals: Float[Tensor, "groups members"]) -> Bool[Tensor, " groups"]:
    return (totals == totals[:, :1]).all(dim=1)
