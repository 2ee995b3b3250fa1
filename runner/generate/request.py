"""What a generation engine is given, and what it gives back as it goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from runner.generate.denoising import Denoising
from runner.generate.sampling import Sampling
from runner.generate.tools import Call, Tools

Finish = Literal["", "stop", "length", "cancelled", "error"]
Top = tuple[tuple[int, float], ...]  # (id, log-probability) of the likeliest, the best first
# Returns the ids that may follow the new tokens so far, a mask [vocab]; None allows all.
Constraint = Callable[[Sequence[int]], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to generate, or a prompt to score.

    Several continuations of a prompt are several requests, which differ in `how.sample`; prompts
    that are equal are read once.

    Args:
        id: its name, unique among the requests that an engine holds.
        prompt: ids, at least one.
        how: sampling parameters, or those of denoising. `max_new_tokens=0` generates nothing.
        score_from: give the log-probabilities of the prompt's tokens from this index on, at least
            1 (None: of none).
        constraint: called before every choice with the new ids so far; returns a mask [vocab] of
            the ids allowed next, None for all. What it raises ends this request alone.
        salt: only texts of one salt share what has been read of their common beginning, and with
            it the time that this saves: of one user, say.
        tools: what the model may call (None: nothing). Answers count among the new tokens.
        adapter: the adapter to compute with, of those that the model has (None: the model without
            any); see `runner.generate.adapted`.
        separate: decode the new tokens without their prompt, as lm-eval does: SentencePiece then
            drops a space before the first word.
    """

    id: str
    prompt: Sequence[int]
    how: Sampling | Denoising
    score_from: int | None = None
    constraint: Constraint | None = None
    salt: str = ""
    tools: Tools | None = None
    adapter: str | None = None
    separate: bool = False

    @property
    def num_read(self) -> int:
        """The number of tokens of the prompt that are read; the last predicts nothing by itself."""
        return len(self.prompt) if self.how.max_new_tokens else max(1, len(self.prompt) - 1)


@dataclass(frozen=True, kw_only=True)
class PromptScores:
    """Log-probabilities of a prompt's tokens from `score_from` on, each given those before it.

    Args:
        logprobs: nats.
        best: the likeliest id at each place.
        top: the `top_logprobs` likeliest at each place, if the request asks for any.
    """

    logprobs: tuple[float, ...]
    best: tuple[int, ...]
    top: tuple[Top, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Event:
    """What a step has added to one request.

    Args:
        id: of the request.
        ids: new tokens, without the one that ended the text.
        logprobs: of each new token, in nats, under the model's unmodified logits; 0 of a given one.
        end: (id, its log-probability) where an id has ended the text.
        top: of each new token the `top_logprobs` likeliest, if the request asks for any.
        forced: of each new token whether a tool gave it; () if it gave none.
        revealed_at: of each new token the step that revealed it, where a canvas is filled in.
        num_passes: forward passes so far, where a canvas is filled in.
        text: what can no longer change of the text.
        finish: "" as long as the request goes on; "stop" (a stop string, or an id that ends the
            text), "length", "cancelled", or "error" (see `error`).
        prompt_scores: with the first event of a request that asks for them.
        num_cached: of the prompt so many tokens were not read, but known from earlier texts; with
            the first event.
        near_ties: choices among `ids` where another token came within 1e-4 of the best (logits,
            after penalties and noise): the company in a batch may decide them in fp32.
        error: what ended the request.
        call: what the newest token calls; the request then waits for the answer.
    """

    id: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    end: tuple[int, float] | None = None
    top: tuple[Top, ...] = ()
    forced: tuple[bool, ...] = ()
    revealed_at: tuple[int, ...] = ()
    num_passes: int = 0
    text: str = ""
    finish: Finish = ""
    prompt_scores: PromptScores | None = None
    num_cached: int = 0
    near_ties: int = 0
    error: Exception | None = None
    call: Call | None = None
