"""What 50 clients leave behind that come and leave for minutes: nothing.

    python -m tests.bench.soak [--seconds 600]      # make soak: 10.8M weights
    pytest tests/runner/serve/test_soak.py --soak-seconds 60      # a tiny model, as CI does

A third of the clients read their stream to its end, a third wait for a whole answer, a third leave:
before an answer begins, or in its middle. Afterwards `Soaked.check` holds that no answer was lost
or cut, and that nothing is left: rows, states, queued requests, sockets, threads, memory.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from tests.bench.serve import prompt
from tests.bench.serve_peers import make_model, our_server

CLIENTS, CACHE_MB = 50, 16
# All may wait, and who left a moment ago beside them; what grows is no cache that still fills.
OPTIONS = ("--max-waiting", "128", "--prefix-cache-mb", str(CACHE_MB))
_GROWTH = 0.05  # of RSS, from the second quarter to the last
_LARGEST_PROMPT, _MOST_NEW = 30, 40
_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "state_bytes")


@dataclass
class Soaked:
    """What the clients counted, and what the server says afterwards.

    Args:
        done, left: requests that had their whole answer; whose client left.
        lost: what was wrong with the others.
        memory_mb: RSS of the server from beginning to end.
        kept: what the server holds when all have gone, see `_kept`.
        ended: requests that the server says have ended, by reason.
    """

    done: int = 0
    left: int = 0
    lost: list[str] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    kept: dict[str, float] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)

    @property
    def grown_mb(self) -> float:
        """RSS of the last quarter less that of the second: the first warms up."""
        quarter = len(self.memory_mb) // 4
        warm, last = self.memory_mb[quarter : 2 * quarter], self.memory_mb[-quarter:]
        return statistics.mean(last) - statistics.mean(warm)

    def check(self) -> None:
        """Raise AssertionError unless nothing was lost and nothing is left."""
        assert not self.lost, f"{len(self.lost)} lost, the first: {self.lost[0]}"
        assert self.done >= CLIENTS, self
        assert self.left >= CLIENTS, self
        # Who leaves early enough was never counted, who leaves late enough was answered.
        assert not self.ended.get("error"), self.ended
        assert self.ended["length"] >= self.done, (self.ended, self.done)
        assert sum(self.ended.values()) <= self.done + self.left, (self.ended, self.left)
        assert self.ended["cancelled"] > 0, self.ended
        assert not any(self.kept.values()), self.kept
        limit = _GROWTH * self.memory_mb[-1]
        assert self.grown_mb <= limit, f"RSS grew by {self.grown_mb:.0f} MB: {self.memory_mb}"


async def soak(url: str, pid: int, seconds: float, *, rows: int = 8) -> Soaked:
    """Return what 50 clients leave behind that ask the server at `url` for so many seconds."""
    found, process = Soaked(), psutil.Process(pid)
    draw, end = random.Random(0), time.perf_counter() + seconds
    files = process.num_fds()

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < end:
            kind = draw.choice(("stream", "whole", "leave early", "leave amid"))
            try:
                await _ask(session, url, draw, kind)
            except (aiohttp.ClientError, AssertionError, ValueError) as error:
                found.lost.append(repr(error)[:500])
                continue
            found.left += kind.startswith("leave")
            found.done += not kind.startswith("leave")

    async with _session() as session:
        tasks = [asyncio.create_task(client(session)) for _ in range(CLIENTS)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(seconds / 100)
            found.memory_mb.append(process.memory_info().rss / 1e6)
        await asyncio.gather(*tasks)
    found.ended = await _ended(url)
    await _ask_at_once(url, rows)
    found.kept = await _kept(url, process, files)
    return found


async def _ask(session: aiohttp.ClientSession, url: str, draw: random.Random, kind: str) -> None:
    """Ask for a text; raise AssertionError if what came is not all of it."""
    new, streams = draw.randrange(2, _MOST_NEW), kind in ("stream", "leave amid")
    text = prompt(draw.randrange(200), draw.randrange(1, _LARGEST_PROMPT))
    body = {"prompt": text, "max_tokens": new, "ignore_eos": True, "seed": 1, "stream": streams}
    more = {"stream_options": {"include_usage": True}} if streams else {}
    pieces, usage, last = 0, None, ""
    stays_s, leaves_after = draw.expovariate(5.0), draw.randrange(1, 8)
    try:
        async with asyncio.timeout(stays_s if kind == "leave early" else None):
            async with session.post(f"{url}/v1/completions", json=body | more) as response:
                assert response.status == 200, await response.text()
                if not streams:
                    usage, last = (await response.json())["usage"], "[DONE]"
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    last, pieces = line[6:].decode().strip(), pieces + 1
                    if last != "[DONE]":
                        assert "error" not in json.loads(last), last
                        usage = json.loads(last)["usage"]
                    if kind == "leave amid" and pieces == leaves_after:
                        response.close()
                        return
    except TimeoutError:
        return
    assert last == "[DONE]", f"the stream ended with {last!r}"
    assert usage is not None
    assert usage["completion_tokens"] == new, (usage, new)


async def _ask_at_once(url: str, rows: int) -> None:
    """Fill every row: one that leaked would let the last of these wait for ever."""
    body = {"prompt": "the", "max_tokens": _MOST_NEW, "ignore_eos": True, "n": rows}
    async with _session() as session, session.post(f"{url}/v1/completions", json=body) as response:
        assert (await response.json())["usage"]["completion_tokens"] == rows * _MOST_NEW


async def _kept(url: str, process: psutil.Process, files: int) -> dict[str, float]:
    """Return what the server holds: requests, tokens and bytes of rows, files beyond so many.

    A closed connection is closed there a moment later: it has a minute to be rid of all.
    """
    for _ in range(600):
        text = await _metrics(url)
        held = dict(re.findall(r"^espalier:(\w+)\{[^,\n]*\} (\S+)$", text, re.MULTILINE))
        kept = {name: float(held[name]) for name in _GAUGES}
        kept["files"] = max(0, process.num_fds() - files)
        assert 0 < float(held["prefix_cache_bytes"]) <= CACHE_MB << 20, held
        if not any(kept.values()):
            break
        await asyncio.sleep(0.1)
    return kept


async def _ended(url: str) -> dict[str, int]:
    pattern = r'request_success_total\{finished_reason="(\w+)",.*\} (\S+)$'
    return {
        reason: int(float(number))
        for reason, number in re.findall(pattern, await _metrics(url), re.MULTILINE)
    }


async def _metrics(url: str) -> str:
    async with _session() as session, session.get(f"{url}/metrics") as response:
        return await response.text()


def _session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600), connector=connector)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    seconds = parser.parse_args().seconds
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        cell = make_model(Path(folder), None)
        with our_server(cell, Path(folder), *OPTIONS) as peer:
            found = asyncio.run(soak(peer.url, peer.pid, seconds))
    print(f"{found.done} done, {found.left} left, {len(found.lost)} lost; ended {found.ended}")
    print(f"left behind: {found.kept}")
    print(f"RSS MB {[round(mb) for mb in found.memory_mb[::10]]}, grown {found.grown_mb:+.1f}")
    found.check()


if __name__ == "__main__":
    main()
