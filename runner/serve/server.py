"""The process: a socket, uvicorn, signals. SIGTERM drains, a second one ends at once."""

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from models.prefix_cache import PrefixCache
from runner.generate.text_generator import TextGenerator
from runner.machine.errors import ConfigError
from runner.serve.access import KEYS_VARIABLE, Access, is_loopback, read_keys
from runner.serve.app import Api
from runner.serve.engine_thread import EngineThread
from runner.serve.errors import draining
from runner.serve.gate import Gate
from runner.serve.metrics import Metrics
from runner.serve.served_model import ServedModel

_HEADER_S = 10.0  # that a client may take to send the head of a request
_LARGEST_HEAD = 1 << 14  # bytes
_MOST_CONNECTIONS = 1024
_BLOCK = 16  # tokens of a block of the prefix cache
_CLOSING_S = 5  # after the last request has ended


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run is served.

    Args:
        rows: the most requests that run at a time.
        chunk: the most tokens of a prompt that are read between two steps of the others (None:
            measured, see `ServedModel.pace`).
        max_waiting: the most requests that wait (None: four times `rows`).
        invariant: compute in one shape, so that no bit of an answer depends on the others.
        prefix_cache_mb: memory for what was read of earlier prompts.
        key_file: see `read_keys`.
        requests_per_minute, tokens_per_minute: see `Access`.
        request_timeout_s, log_prompts: see `Api`.
        drain_s: after SIGTERM, what runs has so many seconds to end.
        slow_reader_s: see `EngineThread`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    rows: int = 8
    chunk: int | None = None
    max_waiting: int | None = None
    invariant: bool = False
    prefix_cache_mb: int = 256
    key_file: Path | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    request_timeout_s: float = 600.0
    drain_s: float = 30.0
    slow_reader_s: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        least = {"rows": 1, "chunk": 1, "max_waiting": 0, "prefix_cache_mb": 0, "drain_s": 0}
        least |= {"requests_per_minute": 1, "tokens_per_minute": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {bound}")
        for name in ("request_timeout_s", "slow_reader_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0 seconds")


def serve(folder: Path, options: Options, **loading: Any) -> None:
    """Serve the run in `folder` until a signal ends it.

    Args:
        loading: see `TextGenerator`.

    Raises:
        ConfigError: a host that others reach, and no key; or what `TextGenerator` refuses.
        OSError: the port is taken.
    """
    keys = read_keys(options.key_file)
    if not keys and not is_loopback(options.host):
        raise ConfigError(
            f"--host {options.host} lets others in, and there is no key; give --api-key-file, or "
            f"set {KEYS_VARIABLE}"
        )
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.create_server((options.host, options.port), family=family, backlog=512) as listener:
        model = ServedModel(folder, TextGenerator(folder, **loading))
        access = Access(
            keys,
            requests_per_minute=options.requests_per_minute,
            tokens_per_minute=options.tokens_per_minute,
        )
        thread = _engine_thread(model, options)
        api = Api(
            model,
            thread,
            access,
            request_timeout_s=options.request_timeout_s,
            log_prompts=options.log_prompts,
        )
        gate = Gate(api.app(), access=access, only_loopback=is_loopback(options.host))
        logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
        logging.getLogger("espalier.serve").setLevel(logging.INFO)
        _Server(
            _uvicorn_config(gate, options.slow_reader_s), thread, options.drain_s, model.name
        ).run([listener])


def _engine_thread(model: ServedModel, options: Options) -> EngineThread:
    rows, chunk, pace = options.rows, options.chunk, None
    if chunk is None:
        pace = model.pace(rows=rows, invariant=options.invariant)
        chunk = pace(rows)
    if options.invariant:  # pieces that hang on the company change last bits
        pace = None
    prefixes = None
    if options.prefix_cache_mb:
        prefixes = PrefixCache(block=_BLOCK, max_bytes=options.prefix_cache_mb << 20)
    engine = model.engine(
        rows=rows,
        chunk=chunk,
        invariant=options.invariant,
        prefixes=prefixes,
    )
    return EngineThread(
        engine,
        Metrics(model.name, speculates=model.generator.draft is not None),
        4 * rows if options.max_waiting is None else options.max_waiting,
        slow_reader_s=options.slow_reader_s,
        pace=pace,
        prefixes=prefixes,
    )


def _uvicorn_config(app: Any, slow_reader_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=type("_Protocol", (_TimedHead,), {"slow_reader_s": slow_reader_s}),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client that says it is 127.0.0.1 is not
        limit_concurrency=_MOST_CONNECTIONS,
        h11_max_incomplete_event_size=_LARGEST_HEAD,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_CLOSING_S,
    )


class _Server(uvicorn.Server):
    """Uvicorn, which on a signal first lets end what runs, and whose exit code is then 0."""

    def __init__(
        self, config: uvicorn.Config, thread: EngineThread, drain_s: float, name: str
    ) -> None:
        super().__init__(config)
        self._engine_thread, self._drain_s, self._name = thread, drain_s, name
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where the server is.

        What is loaded stays to the end: the garbage collector, which would look through it in a
        third of a second while all wait, leaves it alone.
        """
        gc.collect()
        gc.freeze()
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        where = f"[{host}]" if ":" in host else host
        print(f"serving {self._name} at http://{where}:{port}", flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and Ctrl-C while the server runs."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        thread, loop = self._engine_thread, asyncio.get_running_loop()
        thread.is_draining = True
        end = loop.time() + self._drain_s
        while thread.num_open and loop.time() < end:
            await asyncio.sleep(0.05)
        thread.fail_all(draining())
        self.should_exit = True


class _TimedHead(H11Protocol):
    """Closes a connection whose client sends the head of a request too slowly, or reads nothing."""

    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    slow_reader_s = Options.slow_reader_s

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._late = self.loop.call_later(_HEADER_S, transport.close)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # the head is here
            self._stop_timer()
        elif self._late is None and (before is None or before.response_complete):
            self._late = self.loop.call_later(_HEADER_S, self.transport.close)

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`: what is written waits for its reader."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.slow_reader_s, self.transport.abort)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop_timer()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
