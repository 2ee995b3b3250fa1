"""The endpoints: OpenAI's, and beside them health, metrics, tokens and a page to chat on."""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException

from runner.machine.environment import own_version
from runner.serve.access import Access, is_loopback
from runner.serve.answers import Answer, ChatAnswer, CompletionAnswer
from runner.serve.engine_thread import Call, EngineThread
from runner.serve.errors import ApiError, invalid, server_error
from runner.serve.fields import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Generation,
    InfillBody,
    TokenizeBody,
)
from runner.serve.requests import Plan, Planner
from runner.serve.served_model import ServedModel

T = TypeVar("T")
_GRAMMAR_S = 5.0  # to compile a grammar, on a machine that does other things too
_PING_S = 15
_PAGE = Path(__file__).with_name("chat_page.html")
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)
_log = logging.getLogger("espalier.serve")


class Api:
    """The endpoints of one model.

    Args:
        request_timeout_s: a request that takes longer is cancelled.
        log_prompts: write prompts and texts to the log.
    """

    def __init__(
        self,
        model: ServedModel,
        thread: EngineThread,
        access: Access,
        *,
        request_timeout_s: float = 600.0,
        log_prompts: bool = False,
    ) -> None:
        self.model, self.thread, self.access = model, thread, access
        self.request_timeout_s, self.log_prompts = request_timeout_s, log_prompts
        self.planner = Planner(model, thread.engine)
        # For tokenizing and compiling of grammars.
        self._planners = ThreadPoolExecutor(4, thread_name_prefix="plan")

    def app(self) -> FastAPI:
        """Return the application, which starts and stops the engine's thread."""

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            self.thread.start()
            yield
            self.thread.stop()

        app = FastAPI(
            title="espalier serve",
            version=own_version(),
            lifespan=lifespan,
            docs_url=None,
            redoc_url=None,
            exception_handlers={
                ApiError: _as_answer,
                RequestValidationError: _as_invalid,
                HTTPException: _as_http_error,
                Exception: _as_server_error,
            },
        )
        refused = {code: {"description": text} for code, text in _REFUSALS.items()}
        post, get = ["POST"], ["GET"]
        for path, endpoint, methods in (
            ("/v1/completions", self.completions, post),
            ("/v1/chat/completions", self.chat_completions, post),
            ("/infill", self.infill, post),
            ("/tokenize", self.tokenize, post),
            ("/detokenize", self.detokenize, post),
            ("/v1/models", self.models, get),
            ("/v1/models/{name:path}", self.one_model, get),
            ("/health", self.health, get),
            ("/ready", self.ready, get),
            ("/version", self.version, get),
        ):
            app.add_api_route(path, endpoint, methods=methods, responses=refused)  # type: ignore[arg-type]
        app.add_api_route(
            "/metrics",
            self.metrics,
            methods=get,
            responses=refused,  # type: ignore[arg-type]
            response_class=PlainTextResponse,
        )
        app.add_api_route("/", self.page, methods=get, include_in_schema=False)
        return app

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        arrived = time.monotonic()
        plan = await self._plan(body, request, lambda key: self.planner.completion(body, key))
        answer = CompletionAnswer(
            plan,
            self.model.vocabulary,
            self._name(body.model),
            logprobs=body.logprobs is not None,
            token_ids=bool(body.return_token_ids),
            echo=bool(body.echo),
        )
        return await self._answer(request, body, answer, arrived)

    async def chat_completions(self, body: ChatBody, request: Request) -> Response:
        """Answer in a conversation."""
        arrived = time.monotonic()
        plan = await self._plan(body, request, lambda key: self.planner.chat(body, key))
        answer = ChatAnswer(
            plan,
            self.model.vocabulary,
            self._name(body.model),
            logprobs=bool(body.logprobs),
            token_ids=bool(body.return_token_ids),
            tools=bool(body.tools) and body.tool_choice != "none",
        )
        return await self._answer(request, body, answer, arrived)

    async def infill(self, body: InfillBody, request: Request) -> Response:
        """Fill in what is missing between two texts."""
        arrived = time.monotonic()
        plan = await self._plan(body, request, lambda key: self.planner.infill(body, key))
        name = self._name(body.model)
        answer = CompletionAnswer(
            plan, self.model.vocabulary, name, logprobs=False, token_ids=False, echo=False
        )
        await self._collect(request, answer, arrived)
        made, usage = answer.texts[0], answer.usage()
        return JSONResponse(
            {
                "content": made.text,
                "stop": True,
                "stop_type": "eos" if made.finish == "stop" else "limit",
                "tokens_predicted": usage["completion_tokens"],
                "tokens_evaluated": usage["prompt_tokens"],
                "model": name,
            }
        )

    async def tokenize(self, body: TokenizeBody) -> Response:
        """Return the ids of a prompt or of a conversation."""
        self.model.check_name(body.model)
        ids, texts = await self._beside(lambda: self.planner.tokens(body))
        counted = {"count": len(ids), "max_model_len": self.model.context}
        return JSONResponse({**counted, "tokens": ids, "token_strs": texts})

    async def detokenize(self, body: DetokenizeBody) -> Response:
        """Return the text of ids."""
        self.model.check_name(body.model)
        largest = max(body.tokens, default=0)
        if largest >= self.model.vocabulary.size:
            size = self.model.vocabulary.size
            raise invalid(f"tokens has the id {largest}; they are 0 to {size - 1}", "tokens")
        decode = self.model.tokenizer.decode
        return await self._beside(lambda: JSONResponse({"prompt": decode(body.tokens)}))

    async def models(self) -> Response:
        """List the model, and its adapters."""
        cards = [self._card(name) for name in self.model.names]
        return JSONResponse({"object": "list", "data": cards})

    async def one_model(self, name: str) -> Response:
        """Describe the model, by its name or its fingerprint."""
        self.model.check_name(name)
        return JSONResponse(self._card(name))

    async def health(self) -> Response:
        """Say that the process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Say whether new requests are taken."""
        self.thread.check_draining()
        return JSONResponse({"status": "ok"})

    async def version(self) -> Response:
        """Return the version of espalier."""
        return JSONResponse({"version": own_version()})

    async def metrics(self, request: Request) -> Response:
        """Return the metrics as Prometheus reads them, to this machine alone."""
        if not is_loopback(request.client.host if request.client else None):
            raise ApiError(403, "/metrics answers to this machine alone", code="forbidden_host")
        return Response(self.thread.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self) -> Response:
        """Return the page to chat on."""
        text = _PAGE.read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY})

    def _name(self, asked: str | None) -> str:
        return self.model.name if asked is None else asked

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.model.created,
            "owned_by": "espalier",
            "max_model_len": self.model.context,
            **({"parent": self.model.name} if self.model.adapter_of(name) else {}),
        }

    async def _beside(self, work: Callable[[], T]) -> T:
        """Return what `work` returns; the event loop goes on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._planners, work)

    async def _plan(
        self,
        body: Generation | InfillBody,
        request: Request,
        make: Callable[[str], Plan],
    ) -> Plan:
        """Return the plan of a request, whose tokens are counted."""
        self.model.check_name(body.model)
        self.thread.check_draining()
        key = str(request.state.key)
        salt = key if self.access.several_keys else ""
        has_grammar = isinstance(body, Generation) and (
            body.response_format or body.structured_outputs
        )
        try:
            async with asyncio.timeout(_GRAMMAR_S if has_grammar else None):
                plan = await self._beside(lambda: make(salt))
        except TimeoutError:
            raise invalid(
                f"the grammar took longer than {_GRAMMAR_S:g} s to compile; make it simpler",
                code="too_complex",
            ) from None
        self.access.take("tokens", key, plan.tokens)
        return plan

    async def _answer(
        self, request: Request, body: CompletionBody | ChatBody, answer: Answer, arrived: float
    ) -> Response:
        headers = self.access.headers(str(request.state.key))
        if not body.stream:
            if body.stream_options is not None:
                raise invalid("stream_options needs stream=true; add it", "stream_options")
            await self._collect(request, answer, arrived)
            return JSONResponse(answer.whole(), headers=headers)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        call = self._submit(answer.plan, arrived)

        async def gone(_: Any) -> None:
            call.close()

        return EventSourceResponse(
            self._stream(call, answer, with_usage),
            ping=_PING_S,
            sep="\n",
            headers={"Cache-Control": "no-cache", **headers},
            client_close_handler_callable=gone,
        )

    def _submit(self, plan: Plan, arrived: float) -> Call:
        call = self.thread.submit(plan.requests, arrived)
        limit = self.request_timeout_s
        late = ApiError(
            408,
            f"the request took longer than {limit:g} s; ask for fewer tokens",
            code="request_timeout",
            headers={"x-should-retry": "false"},
        )
        call.fail_after("deadline", limit, late)
        return call

    async def _collect(self, request: Request, answer: Answer, arrived: float) -> None:
        """Wait for all texts of an answer; a client that leaves cancels them."""
        call = self._submit(answer.plan, arrived)
        watch = asyncio.create_task(_close_when_gone(request, call))
        try:
            async for index, event in call:
                answer.texts[index].add(event)
        finally:
            watch.cancel()
            call.close()
        self._note(answer)

    async def _stream(self, call: Call, answer: Answer, with_usage: bool) -> AsyncIterator[bytes]:
        """Yield the events of a stream; what goes wrong is its last one."""
        more = {"usage": None} if with_usage else {}
        try:
            async for index, event in call:
                for chunk in answer.chunks(index, event):
                    yield _event(chunk | more)
            if with_usage:
                yield _event(answer.chunk([], usage=answer.usage()))
            yield b"data: [DONE]\n\n"
            self._note(answer)
        except ApiError as error:
            yield _event(error.body())
        except Exception:
            _log.exception("request %s", answer.id)
            yield _event(server_error().body())
        finally:
            call.close()

    def _note(self, answer: Answer) -> None:
        usage, finish = answer.usage(), ",".join(str(text.finish) for text in answer.texts)
        counts = f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens"
        _log.info("%s %s %s", answer.id, counts, finish)
        if self.log_prompts:
            decode = self.model.tokenizer.decode
            for index, text in enumerate(answer.texts):
                prompt = answer.plan.prompts[index // answer.plan.n]
                _log.info("%s %r -> %r", answer.id, decode(list(prompt)), text.text)


_REFUSALS = {
    400: "A field or its value is refused.",
    401: "The key is missing or wrong.",
    403: "Another host was asked for.",
    404: "There is no such model.",
    408: "It took too long.",
    413: "The body is too large.",
    429: "Too many requests.",
    500: "A fault of the server.",
    503: "The server is about to end.",
}


# Line breaks to Unicode, not to server-sent events: some clients (httpx) cut a line there.
_BREAKS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


def _event(chunk: dict[str, Any]) -> bytes:
    text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).translate(_BREAKS)
    return f"data: {text}\n\n".encode()


async def _close_when_gone(request: Request, call: Call) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    call.fail(ApiError(400, "the client has left", code="client_closed_request"))


async def _as_answer(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


_TYPE = re.compile(r".*[^\w].*|bool|dict|float|int|list|str")


async def _as_invalid(request: Request, error: Exception) -> Response:
    """Return FastAPI's 422 as OpenAI's 400, which names the first field that is wrong."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place, code = [str(part) for part in first["loc"] if part != "body"], None
    if first["type"] != "extra_forbidden":  # pydantic names the types of a field too
        place = [part for part in place if not _TYPE.fullmatch(part)]
    param, message = ".".join(place) or None, str(first["msg"])
    if first["type"] == "extra_forbidden":
        code, message = "unknown_parameter", "this endpoint has no such field; leave it out"
    elif first["type"] == "none_required":
        code, message = "unsupported_parameter", "this server does not support it; leave it out"
    elif first["type"] == "json_invalid":
        param, message = None, f"the body is no JSON: {first['ctx']['error']}"
    where = f"{param}: " if param else ""
    return await _as_answer(request, invalid(f"{where}{message}"[:500], param, code))


async def _as_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    headers = dict(error.headers or {})
    return await _as_answer(request, ApiError(error.status_code, message, headers=headers))


async def _as_server_error(request: Request, _: Exception) -> Response:
    return await _as_answer(request, server_error())
