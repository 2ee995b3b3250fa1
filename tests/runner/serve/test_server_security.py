"""What a server refuses, and what it keeps to itself: every item of docs/serving.md's list."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from runner.machine.errors import ConfigError
from runner.serve.access import Access, read_keys
from runner.serve.errors import ApiError
from tests.runner.serve.running import (
    CONTEXT,
    PATIENCE_S,
    Server,
    http_get,
    http_post,
    serving,
)

KEYS = ("correct-horse", "battery-staple", "tiny-budget")
SECRET = "xyzzy plugh"


@pytest.fixture(scope="module")
def server(made: Path) -> Iterator[Server]:
    """A server with three keys, and a limit for each."""
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in KEYS]
    file = made.parents[1] / "keys"
    file.write_text("".join(f"{digest}  user {i}\n" for i, digest in enumerate(digests)))
    limits = ("--tokens-per-minute", "10000", "--requests-per-minute", "1000")
    limits += ("--slow-reader-s", "2")
    with serving(made, "--api-key-file", str(file), *limits) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def slow(server: Server) -> Iterator[socket.socket]:
    """A connection on which the head of a request never ends."""
    with socket.create_connection(_address(server), timeout=PATIENCE_S) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127")
        yield slow


def _address(server: Server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def _post(server: Server, body: Any = None, key: str = KEYS[0], **more: Any) -> httpx2.Response:
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    headers |= more.pop("headers", {})
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    path = more.pop("path", "/v1/completions")
    return http_post(f"{server.url}{path}", content=content, headers=headers, **more)


def _refused(answer: httpx2.Response, status: int, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert param in (None, error["param"])
    return error


def test_a_key_is_asked_for_and_a_wrong_one_is_told_apart_from_none_by_nothing(
    server: Server, made: Path
) -> None:
    for authorization in ("", "Bearer wrong", f"Basic {KEYS[0]}", "Bearer " + "k" * 10_000):
        for path in ("/v1/models", "/version", "/openapi.json"):
            url = f"{server.url}{path}"
            answer = http_get(url, headers={"authorization": authorization})
            error = _refused(answer, 401)
            assert error["code"] == "invalid_api_key"
            assert "WWW-Authenticate" in answer.headers
    # One that comes in a single piece: where a client still sends, TCP may drop the answer.
    huge = http_get(f"{server.url}/v1/models", headers={"authorization": "k" * 50_000})
    assert huge.status_code in (400, 401)
    for path in ("/health", "/ready", "/"):
        assert http_get(f"{server.url}{path}").status_code == 200
    assert _post(server, {"prompt": "x"}).status_code == 200
    with pytest.raises(ConfigError, match="is no digest"):
        read_keys(_file(made, "not a digest\n"))
    with pytest.raises(ConfigError, match="there is none"):
        read_keys(_file(made, ""))


def _file(made: Path, text: str) -> Path:
    file = made.parents[1] / "wrong_keys"
    file.write_text(text)
    return file


def test_values_beyond_all_reason_are_refused_by_name(server: Server) -> None:
    cases: dict[str, list[Any]] = {
        "n": [10**9, 0, -1, "1", 1.5, True],
        "max_tokens": [-1, 10**12, "5"],
        "temperature": [-1, 1e9, "hot"],
        "top_p": [0, 1.1],
        "logprobs": [10**6],
        "repetition_penalty": [0, 1e-300, 1e300],
        "stop": [["s"] * 1000, "", ["a", ""], "s" * 1000, ["\ud800"]],
        "logit_bias": [{str(i): 1 for i in range(20_000)}, {"x": 1}, {"5": 101}, {"99999": 1}],
        "seed": [2**70],
        "prompt": [[], [10**12], [-1], [[]], ["\ud800"], "\udfff"],
    }
    for param, values in cases.items():
        for value in values:
            body = json.dumps({"prompt": "x", param: value}).encode()
            error = _refused(_post(server, body), 400)
            assert (error["param"] or param).partition(".")[0] == param, (param, value, error)
            assert "constrained" not in json.dumps(error), error
    for number in ("NaN", "Infinity", "1e999"):
        body = f'{{"prompt": "x", "temperature": {number}}}'.encode()
        _refused(_post(server, body), 400)
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True}
    answer = _post(server, chat | {"top_logprobs": 10**6}, path="/v1/chat/completions")
    _refused(answer, 400, "top_logprobs")


def test_bodies_are_bounded_in_size_and_depth(server: Server) -> None:
    large = b'{"prompt": "' + b"x" * (1 << 20) + b'"}'
    _refused(_post(server, large), 413)
    chunks = (b"x" * 65536 for _ in range(32))
    url = f"{server.url}/v1/completions"
    unsaid = http_post(url, content=chunks, headers={"authorization": f"Bearer {KEYS[0]}"})
    _refused(unsaid, 413)
    for deep in (b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": ' + b"[" * 70 + b"]" * 70):
        assert _refused(_post(server, deep), 400)["code"] == "too_deep"
    # Each quote may begin a string that goes on to the end: no reason to read on to it from each.
    unclosed = b'{"prompt": "' + b'\\"' * 500_000
    assert "no JSON" in _refused(_post(server, unclosed), 400)["message"]
    quoted = json.dumps({"prompt": "[" * 200 + '\\"' + "{" * 30})
    assert _refused(_post(server, quoted.encode()), 400)["code"] == "context_length_exceeded"
    _refused(_post(server, {"prompt": "x"}, headers={"content-type": "text/plain"}), 400)


def test_grammars_cannot_be_bombs(server: Server) -> None:
    bombs: list[dict[str, Any]] = [
        {"regex": "(" * 500 + "a" + ")" * 500},
        {"regex": "((a{1,999}){1,999}){1,999}"},
        {"regex": "(unclosed"},
        {"json": {"type": "nothing"}},
        {"json": {"$ref": "https://example.org/schema.json"}},
        {"json": {"anyOf": [{"pattern": f"^(a|b){{1,{i}}}$"} for i in range(1, 2000)]}},
        {"regex": "a", "choice": ["b"]},
        {"json": {"$ref": "#"}},
    ]
    for bomb in bombs:
        body = {"prompt": "x", "max_tokens": 2, "structured_outputs": bomb}
        answer = _post(server, body)
        # What is refused says so; what is small enough after all is obeyed.
        assert answer.status_code in (200, 400), answer.text
        assert "state" not in answer.text, "the parser's own words"
    assert http_get(f"{server.url}/health").status_code == 200


def test_a_name_that_points_here_from_elsewhere_is_no_way_in(server: Server) -> None:
    for headers in (
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "evil.example@127.0.0.1"},
        {"host": "127.0.0.1/evil.example"},
        {"host": "[::1"},
        {"host": "127.0.0.1", "origin": "http://[evil"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ):
        assert _refused(_post(server, {"prompt": "x"}, headers=headers), 403)
    port = server.url.rpartition(":")[2]
    for host in (f"localhost:{port}", f"[::1]:{port}", "127.0.0.1"):
        assert _post(server, {"prompt": "x"}, headers={"host": host}).status_code == 200
    answer = _post(server, {"prompt": "x"}, headers={"origin": server.url})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def _sent(server: Server, head: str, body: bytes) -> tuple[bytes, bytes]:
    """Return the head and the body of the answer to lines as they are."""
    with socket.create_connection(_address(server), timeout=PATIENCE_S) as connection:
        lines = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{head}\r\n"
        lines += f"Authorization: Bearer {KEYS[0]}\r\nContent-Type: application/json\r\n\r\n"
        connection.sendall(lines.encode() + body)
        answer = b""
        while piece := connection.recv(1 << 16):  # until the server ends the connection
            answer += piece
    head_of_answer, _, rest = answer.partition(b"\r\n\r\n")
    return head_of_answer, rest


def test_a_request_that_two_readers_would_cut_apart_at_two_places_is_refused(
    server: Server,
) -> None:
    body = b'{"prompt": "x"}'
    chunks = b"f\r\n" + body + b"\r\n0\r\n\r\n"
    both = f"Transfer-Encoding: chunked\r\nContent-Length: {len(chunks)}"
    head, answer = _sent(server, both, chunks)
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(answer)["error"]["code"] == "two_lengths"
    for lengths in ("Content-Length: 5\r\nContent-Length: 15", "Content-Length: +15"):
        head, _ = _sent(server, lengths, body)
        assert head.startswith(b"HTTP/1.1 400")
    origins = f"Origin: http://evil.example\r\nOrigin: {server.url}\r\nConnection: close"
    head, _ = _sent(server, f"{origins}\r\nContent-Length: {len(body)}", body)
    assert head.startswith(b"HTTP/1.1 403")


def test_who_reads_nothing_keeps_neither_rows_nor_a_connection(server: Server) -> None:
    said = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "ignore_eos": True}
    said |= {"n": 60, "stream": True, "logprobs": True, "top_logprobs": 20}
    body = json.dumps(said).encode()
    process = psutil.Process(server.command.pid)
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        reader.connect(_address(server))
        reader.settimeout(PATIENCE_S)
        lines = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        lines += f"Authorization: Bearer {KEYS[2]}\r\nContent-Type: application/json\r\n"
        reader.sendall(f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert reader.recv(15) == b"HTTP/1.1 200 OK"
        ours = reader.getsockname()[1]
        _until(
            lambda: all(
                not c.raddr or c.raddr.port != ours for c in process.net_connections("tcp4")
            )
        )
    zero = [f'espalier:num_requests_{name}{{model_name="tiny"}} 0.0' for name in _GAUGES]
    _until(lambda: {*zero} <= {*http_get(f"{server.url}/metrics").text.splitlines()})


_GAUGES = ("running", "waiting")


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_key_has_its_limits_and_is_told_what_is_left(server: Server) -> None:
    answer = _post(server, {"prompt": "x", "max_tokens": 5})
    for kind in ("requests", "tokens"):
        left, limit = (
            int(answer.headers[f"x-ratelimit-{word}-{kind}"]) for word in ("remaining", "limit")
        )
        assert 0 <= left < limit
        assert answer.headers[f"x-ratelimit-reset-{kind}"].endswith("s")
    most = {"prompt": ["x"] * 128, "max_tokens": CONTEXT - 2}  # 12,000 tokens
    over = _post(server, most, key=KEYS[2])
    assert _refused(over, 429)["code"] == "rate_limit_exceeded"
    assert 1 <= int(over.headers["retry-after"]) <= 60
    assert _post(server, {"prompt": "x"}).status_code == 200  # another key's
    access = Access((), requests_per_minute=2)
    for _ in range(2):
        access.take("requests", "", 1)
    with pytest.raises(ApiError, match="2 requests a minute"):
        access.take("requests", "", 1)


def test_the_page_and_the_metrics_show_no_secret(server: Server) -> None:
    said = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
    assert _post(server, said, path="/v1/chat/completions").status_code == 200
    assert _post(server, {"prompt": SECRET, "nonsense": SECRET}).status_code == 400
    metrics = http_get(f"{server.url}/metrics").text
    policy = http_get(server.url).headers["content-security-policy"]
    assert "connect-src 'self'" in policy
    shown = metrics + "".join(server.command.written())
    for word in (SECRET, *KEYS):
        assert word not in shown
    missing = _refused(_post(server, {"prompt": "x", "model": "../../etc/passwd"}), 404)
    assert str(server.run.parents[1]) not in json.dumps(missing)


def test_texts_of_one_key_are_not_told_by_the_time_of_anothers(server: Server) -> None:
    prompt = "The quick brown fox jumps over the lazy dog, and the dog doesn't mind."
    cached = [
        _post(server, {"prompt": prompt, "max_tokens": 1}, key=key).json()["usage"]
        for key in (KEYS[0], KEYS[0], KEYS[1])
    ]
    first, again, other = (usage["prompt_tokens_details"]["cached_tokens"] for usage in cached)
    assert (first, other) == (0, 0)
    assert again > 0


def test_slow_heads_are_cut_off_and_broken_ones_answered(
    server: Server, slow: socket.socket
) -> None:
    with socket.create_connection(_address(server), timeout=PATIENCE_S) as broken:
        broken.sendall(b"NONSENSE\r\n\r\n")
        assert broken.recv(1000).startswith(b"HTTP/1.1 400")
    with socket.create_connection(_address(server), timeout=PATIENCE_S) as endless:
        endless.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"k" * 30_000)
        assert endless.recv(1000).startswith(b"HTTP/1.1 400")
    assert slow.recv(1000) == b""  # ten seconds after the first test began


def test_nothing_that_the_schema_allows_or_forbids_breaks_the_server(server: Server) -> None:
    line = [sys.executable, "-c", "from schemathesis.cli import schemathesis as s; s()", "run"]
    line += [f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {KEYS[1]}"]
    line += ["--phases", "fuzzing", "--max-examples", "8", "--seed", "1", "--no-color"]
    line += ["--checks", "not_a_server_error,status_code_conformance,negative_data_rejection"]
    folder = server.run.parents[1]
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout


def test_other_hosts_need_a_key(made: Path) -> None:
    from tests.command_server import run

    line = ("runner.commands.cli", "serve", str(made), "--port", "0", "--host")
    open_ = run(*line, "0.0.0.0", timeout=PATIENCE_S)
    assert open_.returncode == 1
    assert "there is no key" in open_.stderr


def test_sigterm_lets_what_runs_end_and_exits_with_0(made: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ESPALIER_API_KEYS": KEYS[0]}
    with serving(made, env=environment) as server:
        body = {"prompt": "x", "max_tokens": CONTEXT - 2, "stream": True, "ignore_eos": True}
        headers = {"authorization": f"Bearer {KEYS[0]}"}
        url = f"{server.url}/v1/completions"
        with httpx2.stream(
            "POST", url, json=body | {"n": 40}, headers=headers, timeout=PATIENCE_S
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.command.send_signal(signal.SIGTERM)
            while (ready := http_get(f"{server.url}/ready")).status_code == 200:
                pass
            assert _refused(ready, 503)["code"] == "draining"
            refused = _post(server, {"prompt": "x"})
            assert _refused(refused, 503)["code"] == "draining"
            assert refused.headers["connection"] == "close"
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        ends = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
        assert ends.count("length") == 40
        assert server.command.wait(PATIENCE_S) == 0
