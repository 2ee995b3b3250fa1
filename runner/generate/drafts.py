"""What proposes the next tokens of a text, for another model to check; see `speculation`.

A smaller model of the same vocabulary; the first layers of the model itself; the text so far.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels.philox import gumbel
from models.contract import for_inference, start
from models.decoder import Decoder
from models.medusa import Medusa
from runner.generate.choosing import History, probabilities
from runner.generate.decoding_batch import DecodingBatch
from runner.generate.text_row import TextRow
from runner.machine.errors import ConfigError
from runner.records.trained_model import is_run, load_model

# Keys of what is drawn besides the tokens of a text, which have the positions themselves.
PROPOSED, ACCEPTED, LEFT = (number << 28 for number in (1, 2, 3))


@dataclass(frozen=True)
class Proposal:
    """Tokens that may follow a text.

    Args:
        probs: what each was drawn from, [tokens, vocab]; None where they are certain.
    """

    ids: Sequence[int]
    probs: Float[Tensor, "tokens vocab"] | None = None


@runtime_checkable
class Draft(Protocol):
    """Proposes tokens."""

    def propose(self, rows: Sequence[TextRow], most: Sequence[int]) -> list[Proposal]:
        """Return at most `most[i]` tokens that may follow the text of each row."""
        ...

    def forget(self, id: str) -> None:
        """Forget the text of a request, which may be unknown."""
        ...

    def follow(self, hidden: Mapping[str, Tensor]) -> None:
        """Note what the model that checks was in before the newest token of each request, [dim].

        It is called after each round, where that model shows it (`models.medusa`).
        """
        ...


class PromptLookup:
    """Copies what followed the last `longest` ids, or the last fewer, when they stood before.

    Saxena, "Prompt lookup decoding" (2023): good where a text repeats itself, as code and summaries
    do; it costs nothing. Where what followed ends at the newest token, it goes on with the copy.
    """

    def __init__(self, longest: int = 3) -> None:
        self.longest = longest

    def propose(self, rows: Sequence[TextRow], most: Sequence[int]) -> list[Proposal]:
        """See `Draft`."""
        return [
            Proposal(self._after(row.tokens, number))
            for row, number in zip(rows, most, strict=True)
        ]

    def _after(self, tokens: Sequence[int], number: int) -> list[int]:
        for size in range(min(self.longest, len(tokens) - 1), 0, -1):
            last = list(tokens[-size:])
            for begin in range(len(tokens) - size - 1, -1, -1):  # the newest place first
                if list(tokens[begin : begin + size]) == last:
                    text = list(tokens)
                    for place in range(begin + size, begin + size + number):
                        text.append(text[place])
                    return text[len(tokens) :]
        return []

    def forget(self, id: str) -> None:
        """See `Draft`: it remembers nothing."""

    def follow(self, hidden: Mapping[str, Tensor]) -> None:
        """See `Draft`: it needs nothing."""


class DraftModel:
    """A model that generates the proposals, under the settings of each request.

    Args:
        context: the most tokens that it reads.
    """

    def __init__(self, model: Any, context: int) -> None:
        self.model, self.context = model, context
        self._batch = DecodingBatch(model, context)
        self._read: dict[str, int] = {}  # tokens of each text that count

    @torch.no_grad()
    def propose(self, rows: Sequence[TextRow], most: Sequence[int]) -> list[Proposal]:
        """See `Draft`."""
        fitting = [
            min(number, self.context - len(row.tokens)) if number else 0
            for row, number in zip(rows, most, strict=True)
        ]
        ids: list[list[int]] = [[] for _ in rows]
        probs: list[list[Tensor]] = [[] for _ in rows]
        histories = [row.history.copy() for row in rows]
        going = [index for index, number in enumerate(fitting) if number > 0]
        logits = self._catch_up([rows[index] for index in going])
        while going:
            own = [histories[index] for index in going]
            scores = probabilities(logits, own)
            tokens = draw(scores, own, PROPOSED)
            for place, (index, token) in enumerate(zip(going, tokens, strict=True)):
                ids[index].append(token)
                probs[index].append(scores[place])
                histories[index].add(token)
            going = [index for index in going if len(ids[index]) < fitting[index]]
            if going:
                newest = {rows[index].request.id: ids[index][-1] for index in going}
                logits = self._batch.step(newest, keep=0)
        self._go_back()
        return [
            Proposal(tokens, torch.stack(drawn_from) if drawn_from else None)
            for tokens, drawn_from in zip(ids, probs, strict=True)
        ]

    def _catch_up(self, rows: Sequence[TextRow]) -> Tensor:
        """Read what is new of each text; return the logits after it."""
        for row in rows:
            name = row.request.id
            if self._read.get(name, 0) >= len(row.tokens):  # it has slid
                self.forget(name)
            if name not in self._read:
                self._batch.join([name], start(self.model, 1, len(row.tokens)))
                self._read[name] = 0
        unread = {row.request.id: row.tokens[self._read[row.request.id] :] for row in rows}
        if not unread:
            return torch.empty(0)
        logits = self._batch.read_ahead(unread, keep=0)
        for row in rows:
            self._read[row.request.id] = len(row.tokens)
        self._batch.mark()
        last = torch.tensor([len(ids) - 1 for ids in unread.values()], device=logits.device)
        return logits[torch.arange(len(last), device=logits.device), last]

    def _go_back(self) -> None:
        """Forget the proposals: what becomes of them is not known yet."""
        self._batch.back_to_mark()

    def forget(self, id: str) -> None:
        """See `Draft`."""
        if self._read.pop(id, None) is not None:
            self._batch.leave(id)

    def follow(self, hidden: Mapping[str, Tensor]) -> None:
        """See `Draft`: it reads the text itself."""


class HeadsAhead:
    """The heads of the model that checks: they tell tokens beyond the next from its last pass.

    A text's first round has no proposals.
    """

    def __init__(self, model: Medusa) -> None:
        self.model = model
        self._hidden: dict[str, Tensor] = {}

    @torch.no_grad()
    def propose(self, rows: Sequence[TextRow], most: Sequence[int]) -> list[Proposal]:
        """See `Draft`."""
        return [self._ahead(row, number) for row, number in zip(rows, most, strict=True)]

    def _ahead(self, row: TextRow, most: int) -> Proposal:
        hidden = self._hidden.get(row.request.id)
        if hidden is None or most < 1:
            return Proposal(())
        history, ids, probs = row.history.copy(), [], []
        for scores in self.model.logits_ahead(hidden)[:most]:
            (own,) = probabilities(scores[None], [history])
            (token,) = draw(own[None], [history], PROPOSED)
            history.add(token)
            ids.append(token)
            probs.append(own)
        return Proposal(ids, torch.stack(probs))

    def forget(self, id: str) -> None:
        """See `Draft`."""
        self._hidden.pop(id, None)

    def follow(self, hidden: Mapping[str, Tensor]) -> None:
        """See `Draft`."""
        self._hidden |= hidden


def first_layers(model: Any, number: int) -> Any:
    """Return the model of the first `number` layers of `model`, with its norm and head.

    It shares all weights, and has states of its own.

    Raises:
        ValueError: it is no decoder of layers, or has no more than `number`.
    """
    if not isinstance(model, Decoder):
        raise ValueError(
            f"{type(model).__name__} cannot be left after a layer: a decoder can; draft with "
            "another run, or look the text up"
        )
    if not 1 <= number < len(model.layers):
        raise ValueError(f"layers={number} must be in 1 to {len(model.layers) - 1}")
    early = copy.copy(model)
    early._modules = dict(model._modules)
    early.layers = nn.ModuleList(list(model.layers)[:number])
    return early


def make_draft(given: str, model: Any, tokenizer: Any, context: int) -> Draft:
    """Return a draft for `model`: "lookup", "layers:N", "heads", or the folder of a run.

    Raises:
        ConfigError: it is none of these, or the run has another tokenizer.
        ValueError: see `first_layers`.
    """
    if given == "lookup":
        return PromptLookup()
    if given == "heads":
        if not isinstance(model, Medusa):
            raise ConfigError(f"draft=heads: {type(model).__name__} has none; train task=medusa")
        return HeadsAhead(model)
    word, _, number = given.partition(":")
    if word == "layers" and number.isdecimal():
        return DraftModel(first_layers(model, int(number)), context)
    folder = Path(given)
    if not is_run(folder):
        raise ConfigError(f"draft={given} is no run, nor lookup, heads or layers:N")
    smaller, theirs, most = load_model(folder)
    if theirs.dumps() != tokenizer.dumps():
        raise ConfigError(
            f"draft={given} has another tokenizer, so that its ids mean other texts; take a run of "
            "the same sweep"
        )
    weight = next(model.parameters())
    smaller = smaller.to(weight.device, weight.dtype)
    return DraftModel(for_inference(smaller), min(most, context))


def draw(
    probs: Float[Tensor, "rows vocab"], histories: Sequence[History], stream: int
) -> list[int]:
    """Return a token for each row, drawn by the key of its next one in `stream`."""
    scores = probs.log() + noise(histories, stream, probs.shape[1]).to(probs)
    greedy = [history.how.temperature == 0 for history in histories]
    scores = torch.where(torch.tensor(greedy, device=probs.device)[:, None], probs, scores)
    ids: list[int] = scores.argmax(dim=-1).tolist()
    return ids


def noise(histories: Sequence[History], stream: int, number: int) -> Float[Tensor, "rows number"]:
    """Return Gumbel variables of each row for its next token in `stream`."""
    keys = [(one.how.seed, one.how.sample, stream + len(one.ids)) for one in histories]
    seeds, samples, positions = torch.tensor(keys).unbind(1)
    return gumbel(seeds, samples, positions, number)
