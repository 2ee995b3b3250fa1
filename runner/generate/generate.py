"""Completions of prompts, all at once: a façade over the generation engine."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from models.adapter_choice import AdapterChoice
from models.prefix_cache import PrefixCache
from runner.generate.adapted import ByAdapter
from runner.generate.autoregressive import Autoregressive
from runner.generate.denoising import Denoising
from runner.generate.drafts import Draft
from runner.generate.engine import Engine, Overflow, Strategy
from runner.generate.request import Event, Finish, Request
from runner.generate.sampling import Sampling
from runner.generate.speculation import Speculative
from runner.generate.text_row import Decode
from runner.generate.tool_pool import ToolPool
from runner.generate.tools import Tools

Settings = Sampling | Denoising


@dataclass
class Completion:
    """The text generated for one prompt.

    Args:
        prompt: the ids that were read.
        ids: the new tokens, without the one that ended the text.
        logprobs: of each new token, in nats, under the model's unmodified logits.
        text: the text of `ids` up to a stop string.
        finish: "stop" (a stop string or the end of the document) or "length".
        end: (id, its log-probability) where an id has ended the text.
        near_ties: choices that the company in a batch may have decided; see `Event`.
        forced: of each new token whether a tool gave it.
        num_calls: of tools.
        revealed_at: of each new token the step that revealed it, where a canvas was filled in.
        num_passes: forward passes that filled it in, guidance's included; 0 without a canvas.
    """

    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish: Finish = ""
    end: tuple[int, float] | None = None
    near_ties: int = 0
    forced: list[bool] = field(default_factory=list)
    num_calls: int = 0
    revealed_at: list[int] = field(default_factory=list)
    num_passes: int = 0

    def add(self, event: Event) -> None:
        """Add what a step has added.

        Raises:
            Exception: the event's `error`.
        """
        if event.error is not None:
            raise event.error
        self.ids += event.ids
        self.logprobs += event.logprobs
        self.revealed_at += event.revealed_at
        self.num_passes = event.num_passes
        self.text += event.text
        self.finish, self.end = event.finish, event.end
        self.near_ties += event.near_ties
        self.forced += event.forced or [False] * len(event.ids)
        self.num_calls += event.call is not None


def generate(
    model: Any,
    prompts: Sequence[Tensor],
    sampling: Settings | Sequence[Settings],
    *,
    context: int,
    decode: Decode,
    ends: Collection[int],
    on_text: Callable[[int, str], None] | None = None,
    slide: bool = False,
    separate: bool = False,
    compiled: bool = False,
    invariant: bool = False,
    rows: int | None = None,
    prefixes: PrefixCache | None = None,
    strategy: Strategy[Any] | None = None,
    tools: Tools | None = None,
    pool: ToolPool | None = None,
    bidirectional: bool = False,
    draft: Draft | None = None,
) -> list[Completion]:
    """Return a completion of each prompt.

    Args:
        prompts: ids, [seq] each.
        sampling: one for all prompts, or one for each.
        context: the most tokens that the model reads. A text that outgrows it goes on from the last
            half of it, read again.
        decode: returns the text of ids.
        ends: the ids that end a text.
        on_text: called with (index of the prompt, piece of text) once a piece can no longer change.
        slide: truncate a prompt longer than `context` to its last tokens instead of refusing it.
        separate: decode the new tokens without their prompt, as lm-eval does: SentencePiece then
            drops a space before the first word.
        compiled: decode by a compiled step, with a batch of fixed size.
        invariant: compute in one shape whatever else is generated, so that no bit of a completion
            depends on the other prompts, given the same `rows`.
        rows: the most prompts that are continued at a time (None: all).
        prefixes: what several prompts begin with is read once and kept there.
        strategy: how the model generates, instead of one token after the other.
        tools: what the model may call; not with a `strategy`.
        pool: runs the calls (None: one of its own).
        bidirectional: tokens of a prompt see each other; see `Autoregressive`.
        draft: proposes tokens, which the model checks several at a time; see `Speculative`.

    Raises:
        ValueError: a prompt is empty, has an id that the model does not know, or is longer than
            `context` without `slide`.
    """
    if not prompts:
        return []
    engine = make_engine(
        model,
        context=context,
        decode=decode,
        ends=ends,
        rows=len(prompts) if rows is None else rows,
        compiled=compiled,
        invariant=invariant,
        prefixes=prefixes,
        strategy=strategy,
        pool=pool,
        bidirectional=bidirectional,
        draft=draft,
    )
    requests = requests_of(engine, prompts, sampling, slide=slide, separate=separate, tools=tools)
    return list(completions(engine, requests, on_text))


def make_engine(
    model: Any,
    *,
    context: int,
    decode: Decode,
    ends: Collection[int],
    rows: int,
    compiled: bool = False,
    invariant: bool = False,
    prefixes: PrefixCache | None = None,
    strategy: Strategy[Any] | None = None,
    chunk: int | None = None,
    overflow: Overflow = "reread",
    pool: ToolPool | None = None,
    bidirectional: bool = False,
    draft: Draft | None = None,
    draft_length: int = 4,
    adapters: AdapterChoice | None = None,
) -> Engine[Any]:
    """Return an engine; by default one for throughput, whose texts may outgrow the context.

    For the arguments see `generate`, `Autoregressive`, `Engine` and, of `draft_length`,
    `Speculative`; `adapters` are those of the model among which a request chooses, without draft or
    strategy.
    """
    plain = Autoregressive(
        model,
        context=context,
        decode=decode,
        ends=tuple(ends),
        fixed_rows=rows if compiled or invariant else None,
        invariant=invariant,
        compiled=compiled,
        prefixes=prefixes,
        bidirectional=bidirectional,
    )
    if adapters is not None:
        strategy = ByAdapter(plain, adapters)
    strategy = strategy or (
        plain if draft is None else Speculative(plain, draft, length=draft_length)
    )
    return Engine(strategy, rows=rows, chunk=chunk, overflow=overflow, pool=pool)


def requests_of(
    engine: Engine[Any],
    prompts: Sequence[Tensor],
    sampling: Settings | Sequence[Settings],
    *,
    slide: bool = False,
    separate: bool = False,
    tools: Tools | None = None,
) -> list[Request]:
    """Return a request for each prompt, all of which `engine` can run; see `generate`.

    Raises:
        ValueError: it cannot run one.
    """
    samplings = sampling if isinstance(sampling, Sequence) else [sampling] * len(prompts)
    requests = []
    for index, (prompt, how) in enumerate(zip(prompts, samplings, strict=True)):
        ids = (prompt[-engine.strategy.context :] if slide else prompt).tolist()
        requests.append(
            Request(
                id=str(index),
                prompt=ids,
                how=how,
                separate=separate,
                tools=tools,
            )
        )
        engine.check(requests[-1])
    return requests


def completions(
    engine: Engine[Any],
    requests: Iterable[Request],
    on_text: Callable[[int, str], None] | None = None,
) -> Iterator[Completion]:
    """Yield the completion of each request in their order, as soon as those before it are there.

    Raises:
        Exception: what ended a request; the others are cancelled.
    """
    under_way: dict[str, tuple[int, Completion]] = {}

    def noted() -> Iterator[Request]:
        for index, request in enumerate(requests):
            under_way[request.id] = index, Completion(list(request.prompt))
            yield request

    for event in engine.run(noted()):
        index, completion = under_way[event.id]
        completion.add(event)
        if event.text and on_text is not None:
            on_text(index, event.text)
        while under_way and next(iter(under_way.values()))[1].finish:
            yield under_way.pop(next(iter(under_way)))[1]
