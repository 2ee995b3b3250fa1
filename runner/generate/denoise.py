"""The strategy of masked diffusion: each step reveals some of the masked tokens of every text."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.canvas import Canvas
from models.contract import logits, part_logits
from runner.generate.canvas_row import CanvasRow
from runner.generate.denoising import Denoising
from runner.generate.request import Event, Request
from runner.generate.reveal import choose_places, choose_remasked, choose_tokens
from runner.generate.text_row import Decode

_LONGEST = 64  # canvas that grows, where a request names no other length


class Denoise:
    """See `runner.generate.engine.Strategy`.

    Rows that read a part of one length, at one place, share a forward pass.

    Args:
        model: takes the tokens on both sides into account.
        context: the most tokens that it reads, prompt, canvas and suffix.
        decode: returns the text of ids.
        mask: the id of `<mask>`.
        ends: the ids that end a text whose request names no others.
        shift: the output at a token predicts the next one, as in a model that was pre-trained on
            next tokens.
        expand, delete: the ids by which a model makes two masked tokens of one, and takes one out
            of the canvas (DreamOn, arXiv 2602.01326); None: its canvas keeps its length.
        on_logits: called in each step with a row and the logits of its masked tokens [masked,
            vocab], returns those that are used.
        on_tokens: called after each step with a row: its tokens are a line of the text's history.
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
        expand: int | None = None,
        delete: int | None = None,
        on_logits: Callable[[CanvasRow, Tensor], Tensor] | None = None,
        on_tokens: Callable[[CanvasRow], None] | None = None,
    ) -> None:
        self.model, self.context, self.decode = model, context, decode
        self.mask, self.ends, self.shift = mask, tuple(ends), shift
        self.expand, self.delete = expand, delete
        self.on_logits, self.on_tokens = on_logits, on_tokens
        self._rows: dict[str, CanvasRow] = {}

    @property
    def resizes(self) -> bool:
        """Whether the model changes the length of a canvas."""
        return self.expand is not None or self.delete is not None

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
        given = [*prompt, *how.suffix]
        if self.mask in given:
            raise ValueError(
                f"the prompt holds <mask> (id {self.mask}), which stands for a token to fill in; "
                "leave it out: the canvas follows the prompt"
            )
        if not 0 <= min(given) <= max(given) < self.model.vocab_size:
            raise ValueError(
                f"the prompt has ids from {min(given)} to {max(given)}; those of this model are "
                f"0 to {self.model.vocab_size - 1}: encode it with the model's own tokenizer"
            )
        canvas = how.max_new_tokens
        if self.expand is not None and how.expansions and how.max_canvas is not None:
            canvas = max(canvas, min(how.max_canvas, canvas + how.expansions))
        if len(given) + canvas > self.context:
            raise ValueError(
                f"a prompt of {len(given)} tokens and a canvas of {canvas} pass the "
                f"context of {self.context}; ask for fewer tokens, or shorten the prompt"
            )
        if (request.score_from, request.constraint, request.tools) != (None, None, None):
            raise ValueError(
                "a masked-diffusion model scores no prompt, obeys no constraint and calls no tool, "
                "which go from left to right; leave them out"
            )
        fixed = {"block": None, "threshold": None, "cache": "none", "steps": None}
        changed = [name for name, value in fixed.items() if getattr(how, name) != value]
        if self.resizes and changed:
            raise ValueError(
                f"{changed[0]}={getattr(how, changed[0])}: this model changes the length of its "
                "canvas and reveals one token a step; leave it out"
            )

    def admit(self, request: Request) -> CanvasRow:
        """See `Strategy`."""
        assert isinstance(request.how, Denoising)
        row = CanvasRow(request, request.how, self.mask, self.decode)
        self._rows[request.id] = row
        return row

    def read(self, rows: Sequence[CanvasRow], most: int | None) -> list[Event]:
        """See `Strategy`; there is nothing to read beforehand."""
        return []

    @torch.no_grad()
    def advance(self, rows: Sequence[CanvasRow]) -> list[Event]:
        """See `Strategy`."""
        groups: dict[tuple[int, int, int, str, float], list[CanvasRow]] = {}
        for row in rows:
            part, how = row.part(row.turn(), shift=self.shift), row.how
            key = (len(row.tokens), part.start, part.stop, how.cache, how.guidance)
            groups.setdefault(key, []).append(row)
        for (length, begin, end, cache, guidance), group in groups.items():
            tokens = torch.stack([row.tokens[begin:end] for row in group])
            tokens = tokens.to(next(self.model.parameters()).device)
            if cache == "none":
                scores = logits(self.model, tokens)
            else:
                kept = [row.kept for row in group]
                scores = part_logits(self.model, tokens, Canvas(kept, begin, length))
            if guidance:
                without = logits(self.model, self._without_prompt(group, tokens))
                scores = without + (1.0 + guidance) * (scores - without)
            for row, own in zip(group, scores, strict=True):
                self._reveal(row, own, begin)
        return [row.event(self.ends if row.how.ends is None else row.how.ends) for row in rows]

    def release(self, row: CanvasRow) -> None:
        """See `Strategy`."""
        self._rows.pop(row.request.id, None)

    def num_bytes(self) -> int:
        """See `Strategy`."""
        kept = (pair for row in self._rows.values() for pair in row.kept.values())
        texts = sum(row.tokens.nbytes for row in self._rows.values())
        return texts + sum(keys.nbytes + values.nbytes for keys, values in kept)

    def _without_prompt(self, rows: Sequence[CanvasRow], tokens: Tensor) -> Tensor:
        """Return the tokens with those of each prompt but the first one masked."""
        hidden = tokens.clone()
        for row, ids in zip(rows, hidden, strict=True):
            ids[1 : row.begin] = self.mask
        return hidden

    def _reveal(self, row: CanvasRow, scores: Tensor, begin: int) -> None:
        """Take the step of a row by the logits of its tokens from `begin` on."""
        how, turn, places = row.how, row.turn(), row.places()
        at = row.begin + places - int(self.shift) - begin
        masked = scores[at.to(scores.device)].float().cpu()
        masked[:, self.mask] = -torch.inf
        unmodified = masked.logsumexp(dim=-1)
        if how.end_penalty:
            ends = list(self.ends if how.ends is None else how.ends)
            masked[:, ends] -= how.end_penalty * (1.0 - (turn.step + 1) / turn.steps)
        if self.expand is not None and not self._may_expand(row):
            masked[:, self.expand] = -torch.inf
        if self.on_logits is not None:
            masked = self.on_logits(row, masked)
        chosen, confidence = choose_tokens(how, masked, row.begin + places, turn)
        if self.resizes:
            shown = torch.arange(len(places)) == confidence.argmax()
        else:
            shown = choose_places(how, confidence, row.begin + places, turn)
        nats = masked.gather(1, chosen[:, None])[:, 0] - unmodified
        again = row.places(masked=False)
        again = again[choose_remasked(how, row.begin + again, turn)] if how.remask else again[:0]
        row.reveal(places[shown], chosen[shown], nats[shown])
        row.hide(again)
        if self.resizes:
            self._resize(row, int(places[shown]), int(chosen[shown]))
        if self.on_tokens is not None:
            self.on_tokens(row)

    def _may_expand(self, row: CanvasRow) -> bool:
        how = row.how
        longest = _LONGEST if how.max_canvas is None else how.max_canvas
        fits = len(row.masked) < longest and len(row.tokens) < self.context
        return fits and row.expanded < how.expansions

    def _resize(self, row: CanvasRow, place: int, token: int) -> None:
        """Carry out the `<expand>` or the deletion that a step has put into the canvas."""
        if token == self.expand:
            row.expand(place)
        elif token == self.delete:
            row.delete([place])
