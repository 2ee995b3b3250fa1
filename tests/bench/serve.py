"""Serving: our server, transformers' and llama.cpp's, in turns, of the same weights.

    python -m tests.bench.serve [--model DIR] [--rounds 3] [--peers ours,transformers,llama.cpp]

Asyncio clients of streamed completions, greedy. A round is one measurement of each server, the
others idle; the table has the median over the rounds. One thread each. Tokens per second of the
clock tell what users wait for; those per second of the server's CPU time hardly hang on what else
the machine does.

    at N clients   closed loop: N clients, each with one request at a time
    poisson        open loop: arrivals at half the rate that 8 clients reached
    decode gap     the largest time between two tokens of 4 streams while a prompt of 512 tokens
                   enters, over the median without it
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from tests.bench.serve_peers import PEERS, Peer, make_model

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then"]
NEW, PROMPT, LONG = 32, 40, 512


@dataclass
class Answer:
    """When a request was sent and its pieces came, seconds."""

    sent: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def first(self) -> float:
        """Time to first token."""
        return self.pieces[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Times between pieces."""
        return [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]


def prompt(seed: int, words: int = PROMPT) -> str:
    """Return a text of so many words, equal for all servers."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


async def ask(
    session: aiohttp.ClientSession,
    peer: Peer,
    text: str,
    new: int = NEW,
    leave: int | None = None,
    answer: Answer | None = None,
) -> Answer:
    """Return the times of a streamed completion; a client that leaves does so after some pieces."""
    body = {"model": peer.model, "stream": True, "temperature": 0, "max_tokens": new}
    body |= peer.body(text)
    answer = answer or Answer(time.perf_counter())
    async with session.post(f"{peer.url}{peer.path}", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            if peer.has_text(line):
                answer.pieces.append(time.perf_counter())
            if leave is not None and len(answer.pieces) >= leave:
                break
    answer.tokens = new
    return answer


def new_session() -> aiohttp.ClientSession:
    """Return a session of one connection a request: llama.cpp closes those that it has used."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600), connector=connector)


async def closed_loop(peer: Peer, clients: int, requests: int) -> dict[str, float]:
    """Return tokens/s, times to the first token and between tokens of N clients."""
    left, done = list(range(requests)), []

    async def client(session: aiohttp.ClientSession) -> None:
        while left:
            done.append(await ask(session, peer, prompt(left.pop())))

    async with new_session() as session:
        begin, cpu = time.perf_counter(), _cpu_seconds(peer)
        await asyncio.gather(*(client(session) for _ in range(clients)))
        spent, cpu = time.perf_counter() - begin, _cpu_seconds(peer) - cpu
    return {
        f"tok/s at {clients}": NEW * requests / spent,
        f"tok/CPU s at {clients}": NEW * requests / cpu,
        **_times(done, f" at {clients}"),
    }


async def poisson(peer: Peer, per_s: float, requests: int) -> dict[str, float]:
    """Return the same of requests that arrive at random."""
    draw = random.Random(0)
    async with new_session() as session:
        tasks = []
        for number in range(requests):
            tasks.append(asyncio.create_task(ask(session, peer, prompt(number))))
            await asyncio.sleep(draw.expovariate(per_s))
        return _times(await asyncio.gather(*tasks), " poisson")


async def decode_gap(peer: Peer) -> dict[str, float]:
    """Return by how much a long prompt that enters holds up four streams."""
    async with new_session() as session:
        answers = [Answer(time.perf_counter()) for _ in range(4)]
        streams = [
            asyncio.create_task(ask(session, peer, prompt(1000 + n), 300, answer=answer))
            for n, answer in enumerate(answers)
        ]
        while any(len(answer.pieces) < 20 for answer in answers):
            await asyncio.sleep(0.01)
        long = await ask(session, peer, prompt(random.randrange(10**9), LONG), 1)
        await asyncio.gather(*streams)
    begin, end = long.sent, long.pieces[-1]
    inside, outside = [], []
    for answer in answers:
        for moment, gap in zip(answer.pieces[1:], answer.gaps, strict=True):
            (inside if begin <= moment <= end else outside).append(gap)
    quiet = statistics.median(outside)
    largest = statistics.quantiles(inside, n=20)[-1] if len(inside) > 1 else max(inside)
    return {"decode gap": largest / quiet, "long TTFT ms": 1e3 * long.first}


def _cpu_seconds(peer: Peer) -> float:
    times = psutil.Process(peer.pid).cpu_times()
    return float(times.user + times.system)


def _times(answers: list[Answer], suffix: str) -> dict[str, float]:
    firsts = sorted(1e3 * answer.first for answer in answers)
    gaps = [1e3 * statistics.mean(answer.gaps) for answer in answers if answer.gaps]
    return {
        f"TTFT p50 ms{suffix}": firsts[len(firsts) // 2],
        f"TTFT p95 ms{suffix}": firsts[int(0.95 * (len(firsts) - 1))],
        f"TPOT ms{suffix}": statistics.median(gaps),
    }


async def measured(peer: Peer) -> dict[str, float]:
    """Return all values of one server in one round."""
    values = await closed_loop(peer, 1, 4)
    values |= await closed_loop(peer, 8, 24)
    values |= await poisson(peer, values["tok/s at 8"] / NEW / 2, 16)
    if peer.holds_long_prompts:
        values |= await decode_gap(peer)
    values["RSS MB"] = psutil.Process(peer.pid).memory_info().rss / 1e6
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: 10.8M, random)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cell = make_model(Path(folder), given.model)
        peers = {
            name: stack.enter_context(PEERS[name](cell, Path(folder)))
            for name in given.peers.split(",")
        }
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
        for turn in range(given.rounds + 1):
            for name, peer in peers.items():
                values = asyncio.run(measured(peer))
                if turn:  # the first warms up
                    rounds[name].append(values)
        print_table(rounds)


def print_table(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Print the median of each value, a column a server."""
    print(f"| | {' | '.join(rounds)} |\n| --- |{' --- |' * len(rounds)}")
    for key in next(iter(rounds.values()))[0]:
        cells = [
            f"{statistics.median(values[key] for values in own):.1f}" if key in own[0] else "-"
            for own in rounds.values()
        ]
        print(f"| {key} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
