"""What the server counts and times, in Prometheus' form and under vLLM's names, `espalier:...`."""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from runner.generate.request import Event
from runner.generate.speculation import Counts

_FIRST = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5]
_FIRST += [10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0]
_BETWEEN = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5]
_BETWEEN += [10.0, 20.0, 40.0, 80.0]
_WHOLE = [0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0]
_WHOLE += [240.0, 480.0, 960.0, 1920.0, 7680.0]
_SPECULATED = {  # the field of `Counts`, what it is
    "spec_decode_num_drafts": ("rounds", "Rounds of a text in which a draft proposed tokens."),
    "spec_decode_num_draft_tokens": ("proposed", "Tokens that a draft proposed."),
    "spec_decode_num_accepted_tokens": ("accepted", "Proposed tokens that the model accepted."),
}
_STEP = [float(2**e) for e in range(15)]
_TOKENS = [float(m * 10**e) for e in range(6) for m in (1, 2, 5)]


@dataclass
class Clock:
    """When a request came, was queued, admitted, had its first token, its last; monotonic seconds.

    Args:
        arrived: before its text was turned into ids.
        tokens: generated so far.
    """

    arrived: float
    queued: float
    admitted: float | None = None
    first: float | None = None
    last: float | None = None
    tokens: int = 0


class Metrics:
    """The metrics of one server, in a registry of their own.

    Args:
        speculates: it has a draft, whose proposals are counted.
    """

    def __init__(self, model_name: str, *, speculates: bool = False) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        gauges = {
            "num_requests_running": "Requests that have a row.",
            "num_requests_waiting": "Requests that wait for a row.",
            "kv_cache_usage_perc": "Share of the tokens that fit which running requests may need.",
            "state_bytes": "Bytes of what the rows of running requests hold.",
            "prefix_cache_bytes": "Bytes of what is kept of earlier prompts.",
        }
        self._gauges = {name: self._gauge(name, text) for name, text in gauges.items()}
        counters = {
            "num_preemptions": "Always 0: what runs is never interrupted.",
            "prompt_tokens": "Tokens of prompts.",
            "generation_tokens": "Tokens generated.",
            "prefix_cache_queries": "Tokens of prompts that were looked up in the prefix cache.",
            "prefix_cache_hits": "Tokens of prompts that the prefix cache knew.",
        }
        if speculates:
            counters |= {name: text for name, (_, text) in _SPECULATED.items()}
        self._counters = {name: self._counter(name, text) for name, text in counters.items()}
        self._speculated = Counts()
        self._ended = Counter(
            "espalier:request_success",
            "Requests that have ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        histograms = {
            "time_to_first_token_seconds": ("From arrival to the first token.", _FIRST),
            "inter_token_latency_seconds": ("Between two tokens of a request.", _BETWEEN),
            "e2e_request_latency_seconds": ("From arrival to the end.", _WHOLE),
            "request_queue_time_seconds": ("Until a row was free.", _WHOLE),
            "request_prefill_time_seconds": ("From the row to the first token.", _WHOLE),
            "request_decode_time_seconds": ("From the first token to the last.", _WHOLE),
            "request_prompt_tokens": ("Tokens of the prompt of a request.", _TOKENS),
            "request_generation_tokens": ("Tokens generated for a request.", _TOKENS),
            "iteration_tokens_total": ("Tokens read of prompts and generated in a step.", _STEP),
        }
        self._histograms = {n: self._histogram(n, *given) for n, given in histograms.items()}

    def stepped(self, holds: Mapping[str, float] | None, num_tokens: int) -> None:
        """Take what a step has done.

        Args:
            holds: what the engine holds after it, by the name of a gauge (None: as before).
            num_tokens: of prompts that were read, and that were generated.
        """
        if num_tokens:
            self._histograms["iteration_tokens_total"].observe(num_tokens)
        for name, value in (holds or {}).items():
            self._gauges[name].set(value)

    def speculated(self, counts: Counts) -> None:
        """Take what the server has speculated since it began."""
        for name, (field, _) in _SPECULATED.items():
            more = getattr(counts, field) - getattr(self._speculated, field)
            self._counters[name].inc(more)
        self._speculated = counts

    def added(self, clock: Clock, event: Event, moment: float) -> None:
        """Take what a step has added to a request, and when it ended."""
        clock.tokens += len(event.ids)
        self._counters["generation_tokens"].inc(len(event.ids))
        self._counters["prefix_cache_hits"].inc(event.num_cached)
        if not event.ids:
            return
        if clock.first is None:
            clock.first = moment
            self._histograms["time_to_first_token_seconds"].observe(moment - clock.arrived)
        elif clock.last is not None:
            self._histograms["inter_token_latency_seconds"].observe(moment - clock.last)
        clock.last = moment

    def ended(self, clock: Clock, prompt_tokens: int, reason: str, moment: float) -> None:
        """Take the end of a request."""
        self._ended.labels(self._model_name, reason).inc()
        for name in ("prompt_tokens", "prefix_cache_queries"):
            self._counters[name].inc(prompt_tokens)
        times = {
            "e2e_request_latency_seconds": (clock.arrived, moment),
            "request_queue_time_seconds": (clock.queued, clock.admitted),
            "request_prefill_time_seconds": (clock.admitted, clock.first),
            "request_decode_time_seconds": (clock.first, clock.last),
        }
        for name, (start, end) in times.items():
            if start is not None and end is not None:
                self._histograms[name].observe(end - start)
        self._histograms["request_prompt_tokens"].observe(prompt_tokens)
        self._histograms["request_generation_tokens"].observe(clock.tokens)

    def text(self) -> bytes:
        """Return all of them as Prometheus reads them."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"espalier:{name}", text, ["model_name"], registry=self._registry).labels(
            self._model_name
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"espalier:{name}", text, ["model_name"], registry=self._registry).labels(
            self._model_name
        )

    def _histogram(self, name: str, text: str, buckets: list[float]) -> Histogram:
        return Histogram(
            f"espalier:{name}", text, ["model_name"], registry=self._registry, buckets=buckets
        ).labels(self._model_name)
