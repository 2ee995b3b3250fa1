"""A request that is under way: its tokens, its text, the scores of its prompt."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from models.cache import State
from runner.generate.choosing import Choices, History, likeliest
from runner.generate.request import Event, Finish, PromptScores, Request
from runner.generate.text_stream import TextStream
from runner.generate.tools import Call

Decode = Callable[[Sequence[int]], str]


class TextRow:
    """A request that a strategy has admitted.

    Attributes:
        tokens: the model's context: the prompt, the new tokens, or the last of them.
        unread: so many tokens at their end are to be read before the row can advance.
        state: of those that are read, until the row joins the batch.
        spans: of each of `tokens` the id of the stretch that was given to the model, 0 of its own.
        unscored: the index of the next token of the prompt to score (None: of none).
        num_cached: tokens of the prompt that are known from earlier texts, until an event says so.
        answered: whether what is unread is the answer of a tool, after a state of its own.
    """

    def __init__(self, request: Request, history: History, decode: Decode) -> None:
        self.request, self.history = request, history
        before = () if request.separate else request.prompt
        generates = request.how.max_new_tokens > 0
        self.stream = TextStream(decode, request.how.stop, before) if generates else None
        self.tokens = list(request.prompt[: request.num_read])
        self.unread = len(self.tokens)
        self.spans = [1] * len(self.tokens)
        self.state: State | None = None
        self.num_cached = 0
        self.answered = False
        self._turn = self._num_calls = 0  # the new tokens before the present turn; calls so far
        self.unscored = request.score_from
        asks = request.score_from is not None
        self._scores = PromptScores(logprobs=(), best=()) if asks else None

    @property
    def unread_ids(self) -> tuple[int, ...]:
        """The tokens to read."""
        return tuple(self.tokens[len(self.tokens) - self.unread :])

    @property
    def unread_spans(self) -> tuple[int, ...]:
        """The spans of the tokens to read."""
        return tuple(self.spans[len(self.spans) - self.unread :])

    @property
    def num_read(self) -> int:
        """The number of tokens that are read."""
        return len(self.tokens) - self.unread

    @property
    def num_left(self) -> int:
        """The number of tokens that may still be added."""
        return self.request.how.max_new_tokens - len(self.history.ids)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to generate and nothing to score."""
        scored = self.unscored is None or self.unscored >= len(self.request.prompt)
        return self.num_left == 0 and scored

    @property
    def is_only_scored(self) -> bool:
        """Whether the prompt is to be scored, nothing of it is read, and nothing is generated."""
        return self.num_left == 0 and not self.is_idle and self.num_read == 0

    def score(self, logits: Float[Tensor, "seq vocab"]) -> None:
        """Score the next tokens of the prompt; `logits` predict them."""
        assert self.unscored is not None
        assert self._scores is not None
        targets = list(self.request.prompt[self.unscored : self.unscored + len(logits)])
        logits = logits[: len(targets)]
        chosen = logits.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0]
        logprobs = chosen - logits.logsumexp(dim=-1)
        top = likeliest(logits, [self.history.how.top_logprobs] * len(logits))
        old = self._scores
        self._scores = PromptScores(
            logprobs=(*old.logprobs, *logprobs.tolist()),
            best=(*old.best, *logits.argmax(dim=-1).tolist()),
            top=(*old.top, *top.values()),
        )
        self.unscored += len(targets)

    def take(self, choices: Choices, index: int) -> Event:
        """Add the token chosen for this row, number `index` of a batch."""
        assert self.stream is not None
        error, token = choices.errors.get(index), choices.ids[index]
        if error is not None:
            return self._event("error", text=self.stream.finish(), error=error)
        near = int(choices.near_ties[index])
        call = self._call(token)
        if call is None and token in self.history.ends:
            end = token, choices.logprobs[index]
            return self._event("stop", text=self.stream.finish(), end=end, near_ties=near)
        text, finish = self._add(token)
        tools = self.request.tools
        if call is not None and not finish and tools is not None:
            finish = "length" if self._num_calls >= tools.max_calls else ""
            self._num_calls += 1
        return self._event(
            finish,
            ids=(token,),
            logprobs=(choices.logprobs[index],),
            top=(choices.top[index],) if index in choices.top else (),
            text=text + (self.stream.finish() if finish else ""),
            near_ties=near,
            call=None if finish else call,
        )

    def give(self, ids: Sequence[int]) -> Event:
        """Add tokens that the model does not choose, as many as may still be added."""
        assert self.stream is not None
        given = ids[: self.num_left]
        for token in given:
            self._keep(token)
        text, finish = "".join(map(self.stream.push_given, given)), self._finish()
        self._turn = len(self.history.ids)
        self.unread += len(given)
        for place in range(len(self.tokens) - len(given), len(self.tokens)):
            self.spans[place] = 1 + self._num_calls
        return self._event(
            finish,
            ids=tuple(given),
            logprobs=(0.0,) * len(given),
            forced=(True,) * len(given),
            text=text + (self.stream.finish() if finish else ""),
        )

    def _call(self, token: int) -> Call | None:
        """Return the call that a token completes."""
        if self.request.tools is None:
            return None
        return self.request.tools.find([*self.history.ids[self._turn :], token])

    def _add(self, token: int) -> tuple[str, Finish]:
        """Add a token; return the text that can no longer change, and whether it is the last."""
        assert self.stream is not None
        self._keep(token)
        return self.stream.push(token), self._finish()

    def _keep(self, token: int) -> None:
        self.history.add(token)
        self.tokens.append(token)
        self.spans.append(0)

    def _finish(self) -> Finish:
        assert self.stream is not None
        return "stop" if self.stream.stopped else "" if self.num_left else "length"

    def end_unread(self) -> Event:
        """Return the last event of a row that generates nothing."""
        return self._event("length")

    def _event(self, finish: Finish, **values: object) -> Event:
        scores, self._scores = self._scores, None
        cached, self.num_cached = self.num_cached, 0
        return Event(
            id=self.request.id,
            finish=finish,
            prompt_scores=scores,
            num_cached=cached,
            **values,  # type: ignore[arg-type]
        )
