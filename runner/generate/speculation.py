"""Speculative decoding: a draft proposes several tokens, which the model checks in one pass.

Leviathan et al., arXiv 2211.17192: x, drawn from the draft's q, is accepted with the probability
min(1, p(x) / q(x)); at the first refusal a token is drawn from max(0, p - q), normalised; where all
are accepted, one more from p. A text is then distributed as without a draft, and a greedy one has
the same ids. p and q are those that the settings of a request make: temperature, top-k, penalties.
Speed is bought by computing more, so beyond a few rows it is off.

Where a state is overwritten, as a recurrent one, that of before the round is kept, and what was
accepted is read again.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runner.generate.autoregressive import Autoregressive
from runner.generate.choosing import Choices, choose, probabilities
from runner.generate.drafts import ACCEPTED, LEFT, Draft, Proposal, draw, noise
from runner.generate.request import Event, Request
from runner.generate.text_row import TextRow


@dataclass
class Counts:
    """What has been speculated.

    Args:
        rounds: of a text, in which tokens were proposed.
        proposed, accepted: tokens.
        new: tokens that these rounds have added.
        by_length: rounds by (tokens proposed, tokens added).
    """

    rounds: int = 0
    proposed: int = 0
    accepted: int = 0
    new: int = 0
    by_length: Counter[tuple[int, int]] = field(default_factory=Counter)


class Speculative:
    """See `runner.generate.engine.Strategy`.

    A request with a constraint or with tools goes on token by token.

    Args:
        plain: how texts go on without a draft.
        length: tokens that a draft proposes.
        most_rows: with more rows nothing is proposed.
    """

    def __init__(
        self, plain: Autoregressive, draft: Draft, *, length: int = 4, most_rows: int = 8
    ) -> None:
        if length < 1:
            raise ValueError(f"length={length} must be at least 1 token")
        self.plain, self.draft, self.length, self.most_rows = plain, draft, length, most_rows
        self.context, self.counts = plain.context, Counts()

    def check(self, request: Request) -> None:
        """See `Strategy`."""
        self.plain.check(request)

    def admit(self, request: Request) -> TextRow:
        """See `Strategy`."""
        return self.plain.admit(request)

    def read(self, rows: Sequence[TextRow], most: int | None) -> list[Event]:
        """See `Strategy`."""
        return self.plain.read(rows, most)

    def leave(self, row: TextRow) -> None:
        """See `Strategy`."""
        self.plain.leave(row)

    def resume(self, row: TextRow, ids: Sequence[int]) -> Event:
        """See `Strategy`."""
        return self.plain.resume(row, ids)

    def release(self, row: TextRow) -> None:
        """See `Strategy`."""
        self.draft.forget(row.request.id)
        self.plain.release(row)

    def num_bytes(self) -> int:
        """See `Strategy`; without the draft's."""
        return self.plain.num_bytes()

    @torch.no_grad()
    def advance(self, rows: Sequence[TextRow]) -> list[Event]:
        """See `Strategy`."""
        most = [self._most(row) for row in rows]
        if len(rows) > self.most_rows or not any(most):
            return self.plain.advance(rows)
        proposals = self.draft.propose(rows, most)
        texts = {
            row.request.id: [row.tokens[-1], *proposal.ids]
            for row, proposal in zip(rows, proposals, strict=True)
        }
        logits = self.plain.read_ahead(texts, self.length + 1)
        events, taken = self._take(rows, proposals, logits)
        hidden = getattr(self.plain.model, "hidden", None)
        if hidden is not None:  # the newest token is not read yet: the one before it is
            places = [self.plain.place(row) for row in rows]
            self.draft.follow(
                {
                    row.request.id: hidden[place, new - 1]
                    for row, place, new in zip(rows, places, taken, strict=True)
                }
            )
        self.plain.go_back(rows, taken, events)
        return events

    def _most(self, row: TextRow) -> int:
        """Return how many tokens may be proposed to a row."""
        if row.request.constraint is not None or row.request.tools is not None:
            return 0
        return max(0, min(self.length, row.num_left - 1, self.context - len(row.tokens)))

    def _take(
        self, rows: Sequence[TextRow], proposals: Sequence[Proposal], logits: Tensor
    ) -> tuple[list[Event], list[int]]:
        """Add to each row what is accepted and one token more; return (events, new tokens)."""
        events, taken = [], [0] * len(rows)
        going, place = list(range(len(rows))), 0
        while going:
            own = [rows[index] for index in going]
            given = [proposals[index] for index in going]
            choices = _judged(logits[going, place], own, given, place)
            still = []
            for number, (index, row) in enumerate(zip(going, own, strict=True)):
                event = row.take(choices, number)
                events.append(event)
                taken[index] += 1
                ids = proposals[index].ids
                accepted = place < len(ids) and choices.ids[number] == ids[place]
                self.counts.accepted += accepted
                if accepted and not event.finish:
                    still.append(index)
            going, place = still, place + 1
        for proposal, new in zip(proposals, taken, strict=True):
            if proposal.ids:
                self.counts.rounds += 1
                self.counts.proposed += len(proposal.ids)
                self.counts.new += new
                self.counts.by_length[len(proposal.ids), new] += 1
        return events, taken


def _judged(
    logits: Tensor, rows: Sequence[TextRow], proposals: Sequence[Proposal], place: int
) -> Choices:
    """Return the next token of each row: the proposed one, or one of what is left."""
    histories = [row.history for row in rows]
    choices = choose(logits, histories)
    drawn = [
        index
        for index, (row, proposal) in enumerate(zip(rows, proposals, strict=True))
        if place < len(proposal.ids) and row.history.how.temperature > 0
    ]
    if not drawn:  # a greedy row accepts what it would have taken
        return choices
    own = [histories[index] for index in drawn]
    p = probabilities(logits[drawn], own)
    q = torch.stack([_proposed(proposals[index], place, p[0]) for index in drawn])
    tokens = torch.tensor([proposals[index].ids[place] for index in drawn], device=p.device)
    uniform = torch.exp(-torch.exp(-noise(own, ACCEPTED, 1))).to(p)[:, 0]
    chosen = tokens[:, None]
    refused = uniform * q.gather(1, chosen)[:, 0] >= p.gather(1, chosen)[:, 0]
    left = (p - q).clamp(min=0.0)
    left = torch.where(left.sum(dim=1, keepdim=True) > 0, left, p)  # p = q but for rounding
    tokens = torch.where(refused, torch.tensor(draw(left, own, LEFT), device=p.device), tokens)
    logprobs = torch.log_softmax(logits[drawn], dim=-1).gather(1, tokens[:, None])[:, 0]
    for index, token, nats in zip(drawn, tokens.tolist(), logprobs.tolist(), strict=True):
        choices.ids[index], choices.logprobs[index] = token, nats
        choices.near_ties[index] = False
    return choices


def _proposed(proposal: Proposal, place: int, like: Tensor) -> Tensor:
    """Return what a proposed token was drawn from, [vocab]."""
    if proposal.probs is not None:
        return proposal.probs[place].to(like)
    certain = torch.zeros_like(like)
    certain[proposal.ids[place]] = 1.0
    return certain
