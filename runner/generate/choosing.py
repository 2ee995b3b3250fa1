"""Choosing the next token of every row of a batch at once.

A draw is argmax(logits + temperature x Gumbel noise), which is distributed as the softmax. It is
taken twice, among blocks of 64 ids by the probability of each, then inside the best: noise for all
ids would cost more than a small model's step. The noise is keyed by (seed, sample, position), so
that it depends neither on the device nor on the rest of the batch, and a last bit of the logits
changes the choice only where two come close. Rows that leave a setting at its default take no part
in its computation.

Shape legend: batch, vocab.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kernels.philox import gumbel
from runner.generate.denoising import Denoising
from runner.generate.request import Constraint, Top
from runner.generate.sampling import Sampling

NEAR = 1e-4  # logits closer than this may change their order with the shape of a batch
_BLOCK = 64  # ids; a change is another draw
_FEW = 1024  # tokens hold most nuclei, and are found in a fraction of the time of a sort


class History:
    """What the choice of a request's next token depends on besides the logits.

    Args:
        ends: the ids that end the text.
        prompt: ids, for the repetition penalty.
        constraint: see `Request`.
    """

    def __init__(
        self,
        how: Sampling,
        ends: Sequence[int],
        prompt: Sequence[int],
        constraint: Constraint | None,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.how, self.ends, self.constraint = how, list(ends), constraint
        self.ids: list[int] = []
        self.counts = self.seen = None
        if how.presence_penalty or how.frequency_penalty:
            self.counts = torch.zeros(vocab_size, device=device)
        if how.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(list(prompt), device=device)] = True

    def copy(self) -> "History":
        """Return one that can go on by itself."""
        other = copy(self)
        other.ids = list(self.ids)
        other.counts = None if self.counts is None else self.counts.clone()
        other.seen = None if self.seen is None else self.seen.clone()
        return other

    def add(self, token: int) -> None:
        """Add a token to the text."""
        self.ids.append(token)
        if self.counts is not None:
            self.counts[token] += 1
        if self.seen is not None:
            self.seen[token] = True


@dataclass
class Choices:
    """One token for each row.

    Args:
        ids: the tokens.
        logprobs: of each, in nats, under the model's unmodified logits.
        top: the likeliest tokens under them, for the rows that ask for any, by number.
        near_ties: whether another token came within `NEAR` of it.
        errors: why a row has no token, by number.
    """

    ids: list[int]
    logprobs: list[float]
    top: dict[int, Top]
    near_ties: list[bool]
    errors: dict[int, Exception] = field(default_factory=dict)


def choose(logits: Float[Tensor, "batch vocab"], rows: Sequence[History]) -> Choices:
    """Return the next token of each row, given the model's logits."""
    masks, errors = _ask_constraints(rows, logits)
    scores = _modified(logits, rows, masks)
    drawn = _where(rows, lambda row: row.how.temperature > 0)
    if len(drawn) == len(rows):
        best, ids, near = _draw(scores, rows)
    else:
        best, ids, near = _largest(scores)
        if drawn:
            index = _index(drawn, scores)
            for all_rows, some in zip(
                (best, ids, near), _draw(scores[index], [rows[i] for i in drawn]), strict=True
            ):
                all_rows[index] = some
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, ids[:, None])[:, 0]
    for index in (~best.isfinite()).nonzero()[:, 0].tolist():
        errors.setdefault(
            index,
            ValueError(
                "no token can be chosen: the logits are not finite, or bias, min_tokens and "
                "constraint allow none; allow one"
            ),
        )
    top = likeliest(logits, [row.how.top_logprobs for row in rows])
    return Choices(ids.tolist(), logprobs.tolist(), top, near.tolist(), errors)


def probabilities(
    logits: Float[Tensor, "batch vocab"], rows: Sequence[History]
) -> Float[Tensor, "batch vocab"]:
    """Return the distribution that `choose` draws each row's token from, constraints left out.

    Of a greedy row it is 1 at the likeliest token.
    """
    scores = _modified(logits, rows, {})
    probs = torch.zeros_like(scores).scatter_(1, _largest(scores)[1][:, None], 1.0)
    drawn = _where(rows, lambda row: row.how.temperature > 0)
    if drawn:
        hows = [rows[i].how for i in drawn]
        index = _index(drawn, scores)
        temperature = scores.new_tensor([how.temperature for how in hows])[:, None]
        probs[index] = torch.softmax(truncate(scores[index], hows) / temperature, dim=-1)
    return probs


def likeliest(logits: Float[Tensor, "batch vocab"], wanted: Sequence[int]) -> dict[int, Top]:
    """Return the `wanted[i]` likeliest tokens of each row i that wants any."""
    rows = [index for index, number in enumerate(wanted) if number]
    if not rows:
        return {}
    logprobs = torch.log_softmax(logits[rows], dim=-1).topk(max(wanted))
    pairs = zip(rows, logprobs.indices.tolist(), logprobs.values.tolist(), strict=True)
    return {row: tuple(zip(ids, nats, strict=True))[: wanted[row]] for row, ids, nats in pairs}


def _ask_constraints(
    rows: Sequence[History], logits: Tensor
) -> tuple[dict[int, Tensor], dict[int, Exception]]:
    """Return the masks of the rows that have a constraint, and what went wrong, by row."""
    masks: dict[int, Tensor] = {}
    errors: dict[int, Exception] = {}
    for index, row in enumerate(rows):
        if row.constraint is None:
            continue
        try:
            mask = row.constraint(tuple(row.ids))
            if mask is not None:
                masks[index] = _checked(mask, logits)
        except Exception as error:
            errors[index] = error
    return masks, errors


def _checked(mask: Tensor, logits: Tensor) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != logits.shape[1:]:
        raise ValueError(
            f"a constraint returned {mask.dtype} of shape {tuple(mask.shape)}; it must be a bool "
            f"for each of {logits.shape[1]} ids"
        )
    return mask.to(logits.device)


def _modified(
    logits: Float[Tensor, "batch vocab"], rows: Sequence[History], masks: dict[int, Tensor]
) -> Float[Tensor, "batch vocab"]:
    """Return the logits after penalties, bias and masks; themselves if no row asks for any."""
    repeated = _where(rows, lambda row: row.seen is not None)
    counted = _where(rows, lambda row: row.counts is not None)
    biased = _where(rows, lambda row: bool(row.how.logit_bias))
    begun = _where(rows, lambda row: bool(row.ends) and len(row.ids) < row.how.min_tokens)
    if not (repeated or counted or biased or begun or masks):
        return logits
    scores = logits.clone()
    if repeated:
        penalty = _column(rows, repeated, logits, lambda how: how.repetition_penalty)
        old = scores[repeated]
        seen = torch.stack([rows[i].seen for i in repeated])  # type: ignore[misc]
        scores[repeated] = torch.where(
            seen, torch.where(old > 0, old / penalty, old * penalty), old
        )
    if counted:
        counts = torch.stack([rows[i].counts for i in counted])  # type: ignore[misc]
        present = _column(rows, counted, logits, lambda how: how.presence_penalty)
        often = _column(rows, counted, logits, lambda how: how.frequency_penalty)
        scores[counted] -= present * (counts > 0) + often * counts
    for i in biased:
        ids, bias = zip(*rows[i].how.logit_bias, strict=True)
        scores[i, list(ids)] += torch.tensor(bias, device=scores.device, dtype=scores.dtype)
    for i in begun:
        scores[i, rows[i].ends] = -torch.inf
    for i, mask in masks.items():
        scores[i].masked_fill_(~mask, -torch.inf)
    return scores


def _largest(scores: Float[Tensor, "batch vocab"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (the largest of each row, its first index, whether another comes within `NEAR`)."""
    two = scores.topk(min(2, scores.shape[1]))
    best, ids = two.values[:, 0], two.indices[:, 0]
    equal = best == two.values[:, -1]
    if equal.any():  # topk may name any of them
        ids = torch.where(equal, scores.argmax(dim=-1), ids)
    return best, ids, best - two.values[:, -1] < NEAR


def _draw(
    scores: Float[Tensor, "batch vocab"], rows: Sequence[History]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same of scores with noise; all rows have a temperature above 0."""
    hows = [row.how for row in rows]
    scores = truncate(scores, hows)
    temperature = scores.new_tensor([how.temperature for how in hows])[:, None]
    keys = [(how.seed, how.sample, len(row.ids)) for how, row in zip(hows, rows, strict=True)]
    seeds, samples, positions = torch.tensor(keys, device=scores.device).unbind(1)
    vocab, device = scores.shape[1], scores.device
    probs = torch.softmax(scores / temperature, dim=-1)
    cut = vocab - vocab % _BLOCK  # behind it lies a shorter block
    sums = probs[:, :cut].view(len(probs), -1, _BLOCK).sum(dim=-1)
    if cut < vocab:
        sums = torch.cat((sums, probs[:, cut:].sum(dim=-1, keepdim=True)), dim=1)
    noise = gumbel(seeds, samples, positions, _BLOCK + sums.shape[1])
    _, block, near_block = _largest((sums.log() + noise[:, _BLOCK:]) * temperature)
    members = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=device)
    inside = scores.gather(1, members.clamp(max=vocab - 1)) + noise[:, :_BLOCK] * temperature
    inside = inside.masked_fill(members >= vocab, -torch.inf)
    best, ids, near = _largest(inside)
    return best, block * _BLOCK + ids, near | near_block


def truncate(
    scores: Float[Tensor, "batch vocab"], hows: Sequence[Sampling | Denoising]
) -> Float[Tensor, "batch vocab"]:
    """Return the scores with -inf where top-k, top-p or min-p of a row drops a token."""
    cut = [
        i
        for i, how in enumerate(hows)
        if how.top_k is not None or how.min_p or (how.top_p is not None and how.top_p < 1)
    ]
    if not cut:
        return scores
    part, hows = scores[cut], [hows[i] for i in cut]
    temperature = part.new_tensor([how.temperature for how in hows])[:, None]
    vocab = part.shape[1]
    if any(how.top_k is not None for how in hows):
        most = [min(how.top_k or vocab, vocab) for how in hows]
        bounded = [i for i, k in enumerate(most) if k < vocab]
        if bounded:
            last = torch.tensor([most[i] - 1 for i in bounded], device=part.device)[:, None]
            floor = part[bounded].topk(max(most[i] for i in bounded)).values.gather(1, last)
            part[bounded] = part[bounded].masked_fill(part[bounded] < floor, -torch.inf)
    probs = torch.softmax(part / temperature, dim=-1)
    nucleus = [i for i, how in enumerate(hows) if how.top_p is not None and how.top_p < 1]
    if nucleus:
        least = probs.new_tensor([hows[i].top_p for i in nucleus])[:, None]
        least = least.clamp(min=torch.finfo(probs.dtype).tiny)  # 0 would be reached by no token
        dropped = _outside_nucleus(probs[nucleus], least)
        part[nucleus] = part[nucleus].masked_fill(dropped, -torch.inf)
        probs[nucleus] = probs[nucleus].masked_fill(dropped, 0.0)
    if any(how.min_p for how in hows):
        least = probs.new_tensor([how.min_p or 0.0 for how in hows])[:, None]
        part = part.masked_fill(probs < least * probs.max(dim=-1, keepdim=True).values, -torch.inf)
    return scores.index_copy(0, _index(cut, scores), part)


def _outside_nucleus(
    probs: Float[Tensor, "batch vocab"], least: Float[Tensor, "batch 1"]
) -> Bool[Tensor, "batch vocab"]:
    """Return which tokens the smallest set of probability `least` does without."""
    few = min(_FEW, probs.shape[1])
    largest = probs.topk(few)
    before = largest.values.cumsum(-1) - largest.values  # what crosses `least` is still included
    dropped = torch.ones_like(probs, dtype=torch.bool)
    dropped.scatter_(1, largest.indices, before >= least)
    for row in (largest.values.sum(-1) < least[:, 0]).nonzero()[:, 0].tolist():
        ordered, order = probs[row].sort(descending=True, stable=True)
        dropped[row, order] = ordered.cumsum(-1) - ordered >= least[row]
    return dropped


def _where(rows: Sequence[History], asks: Callable[[History], bool]) -> list[int]:
    return [index for index, row in enumerate(rows) if asks(row)]


def _column(
    rows: Sequence[History], which: Sequence[int], like: Tensor, value: Callable[[Sampling], float]
) -> Tensor:
    """Return a setting of some rows, [rows, 1]."""
    return like.new_tensor([value(rows[i].how) for i in which])[:, None]


def _index(rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)
