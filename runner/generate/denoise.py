"""The strategy of masked diffusion: each step reveals some of the masked tokens of every text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.contract import logits
from runner.generate.denoising import Denoising
from runner.generate.request import Event, Finish, Request
from runner.generate.reveal import Turn, choose_places, choose_tokens
from runner.generate.text_row import Decode
from runner.generate.text_stream import TextStream


class Canvas:
    """A request under way: its prompt, and the canvas behind it.

    Attributes:
        tokens: ids of the prompt and the canvas, `mask` where one is not revealed.
        masked: which tokens of the canvas are not.
        revealed_at: the step that revealed each token of the canvas; -1 before.
    """

    unread = 0  # a forward pass reads everything

    def __init__(self, request: Request, how: Denoising, mask: int, decode: Decode) -> None:
        self.request, self.how = request, how
        size = how.max_new_tokens
        self.begin = len(request.prompt)
        self.tokens = torch.tensor([*request.prompt, *[mask] * size])
        self.masked = torch.ones(size, dtype=torch.bool)
        self.revealed_at = torch.full((size,), -1)
        self.logprobs = torch.zeros(size)
        self.stream = TextStream(decode, how.stop, request.prompt)
        self._step, self._begun, self._masked_first, self._given = 0, -1, 0, 0
        self._block = slice(0, 0)

    def turn(self) -> Turn:
        """Return where the text stands; a block that is revealed makes way for the next."""
        first = int(self.masked.nonzero()[0])
        block = self.how.block_of(first)
        if block != self._block:
            self._block, self._begun = block, self._step
            self._masked_first = int(self.masked[block].sum())
        steps = self.how.steps_of(block)
        return Turn(self._step, self._step - self._begun, steps, self._masked_first)

    def places(self) -> Tensor:
        """Return the masked places of the block, as indices of the canvas."""
        places = self.masked[self._block].nonzero()[:, 0]
        return places + self._block.start

    def reveal(self, places: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """Put tokens at places of the canvas."""
        self.tokens[self.begin + places] = tokens
        self.masked[places] = False
        self.revealed_at[places] = self._step
        self.logprobs[places] = logprobs
        self._step += 1

    def event(self, ends: Sequence[int]) -> Event:
        """Return what can no longer change at the beginning of the canvas."""
        hidden = self.masked.nonzero()[:, 0]
        settled = int(hidden[0]) if len(hidden) else len(self.masked)
        ids: list[int] = []
        text, begun = "", self._given
        finish: Finish = ""
        for token in self.tokens[self.begin + begun : self.begin + settled].tolist():
            if token in ends:
                finish = "stop"
                break
            ids.append(token)
            text += self.stream.push(token)
            if self.stream.stopped:
                finish = "stop"
                break
        self._given += len(ids)
        if not finish and settled == len(self.masked):
            finish = "length"
        return Event(
            id=self.request.id,
            ids=tuple(ids),
            logprobs=tuple(self.logprobs[begun : begun + len(ids)].tolist()),
            text=text + (self.stream.finish() if finish else ""),
            finish=finish,
        )


class Denoise:
    """See `runner.generate.engine.Strategy`.

    Rows of one length share a forward pass.

    Args:
        model: takes the tokens on both sides into account.
        context: the most tokens that it reads, prompt and canvas.
        decode: returns the text of ids.
        mask: the id of `<mask>`.
        ends: the ids that end a text whose request names no others.
        shift: the output at a token predicts the next one, as in a model that was pre-trained on
            next tokens.
    """

    settings = Denoising

    def __init__(
        self,
        model: Any,
        *,
        context: int,
        decode: Decode,
        mask: int,
        ends: Sequence[int] = (),
        shift: bool = False,
    ) -> None:
        self.model, self.context, self.decode = model, context, decode
        self.mask, self.ends, self.shift = mask, tuple(ends), shift
        self._rows: dict[str, Canvas] = {}

    def check(self, request: Request) -> None:
        """See `Strategy`."""
        how, prompt = request.how, list(request.prompt)
        if not isinstance(how, Denoising):
            raise ValueError(
                "a masked-diffusion model fills in a canvas, and does not sample token after "
                "token; give Denoising settings (espalier generate: --steps, --algorithm, --block)"
            )
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        if self.mask in prompt:
            raise ValueError(
                f"the prompt holds <mask> (id {self.mask}), which stands for a token to fill in; "
                "leave it out: the canvas follows the prompt"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.model.vocab_size:
            raise ValueError(
                f"the prompt has ids from {min(prompt)} to {max(prompt)}; those of this model are "
                f"0 to {self.model.vocab_size - 1}: encode it with the model's own tokenizer"
            )
        if len(prompt) + how.max_new_tokens > self.context:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and a canvas of {how.max_new_tokens} pass the "
                f"context of {self.context}; ask for fewer tokens, or shorten the prompt"
            )
        if (request.score_from, request.constraint, request.tools) != (None, None, None):
            raise ValueError(
                "a masked-diffusion model scores no prompt, obeys no constraint and calls no tool, "
                "which go from left to right; leave them out"
            )

    def admit(self, request: Request) -> Canvas:
        """See `Strategy`."""
        assert isinstance(request.how, Denoising)
        row = Canvas(request, request.how, self.mask, self.decode)
        self._rows[request.id] = row
        return row

    def read(self, rows: Sequence[Canvas], most: int | None) -> list[Event]:
        """See `Strategy`; there is nothing to read beforehand."""
        return []

    @torch.no_grad()
    def advance(self, rows: Sequence[Canvas]) -> list[Event]:
        """See `Strategy`."""
        groups: dict[int, list[Canvas]] = {}
        for row in rows:
            groups.setdefault(len(row.tokens), []).append(row)
        for group in groups.values():
            self._step(group)
        return [row.event(self.ends if row.how.ends is None else row.how.ends) for row in rows]

    def release(self, row: Canvas) -> None:
        """See `Strategy`."""
        self._rows.pop(row.request.id, None)

    def num_bytes(self) -> int:
        """See `Strategy`."""
        return sum(row.tokens.nbytes for row in self._rows.values())

    def _step(self, rows: Sequence[Canvas]) -> None:
        device = next(self.model.parameters()).device
        tokens = torch.stack([row.tokens for row in rows]).to(device)
        scores = logits(self.model, tokens)
        for row, own in zip(rows, scores, strict=True):
            turn, places = row.turn(), row.places()
            at = row.begin + places - int(self.shift)
            masked = own[at.to(device)].float().cpu()
            masked[:, self.mask] = -torch.inf
            chosen, confidence = choose_tokens(row.how, masked, row.begin + places, turn)
            shown = choose_places(row.how, confidence, row.begin + places, turn)
            nats = masked.gather(1, chosen[:, None])[:, 0] - masked.logsumexp(dim=-1)
            row.reveal(places[shown], chosen[shown], nats[shown])
