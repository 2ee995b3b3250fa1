"""Serving: our server, transformers' and llama.cpp's, in turns, of the same weights.

    python -m tests.bench.serve [--model DIR|smollm2] [--rounds 3] [--peers ours,transformers,...]

Asyncio clients of streamed completions, greedy. A round is one measurement of each server, the
others idle, of prompts that no round before had; the first warms up. The table has the median over
the rounds. Each server has one thread that computes and one core, the clients have another. Tokens
per second of the clock tell what users wait for; those per second of the server's CPU time hardly
hang on what else the machine does.

    at N clients   closed loop: N clients, each with one request at a time, five in turn (alone:
                   three), so that most of the time all are at work
    poisson        open loop: arrivals at half the rate that 8 clients reached
    decode gap     95% of the times between two tokens of 4 streams while a prompt of 512 words
                   enters are at most so many times the median without it; the same when nothing
                   enters is what the machine does to them
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path

import aiohttp
import numpy as np
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


async def closed_loop(peer: Peer, clients: int, seeds: Iterable[int]) -> dict[str, float]:
    """Return tokens/s, times to the first token and between tokens of N clients."""
    left, done = list(seeds), list[Answer]()
    requests = len(left)

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


async def poisson(peer: Peer, per_s: float, seeds: Iterable[int]) -> dict[str, float]:
    """Return the same of requests that arrive at random."""
    draw = random.Random(0)
    async with new_session() as session:
        tasks = []
        for seed in seeds:
            tasks.append(asyncio.create_task(ask(session, peer, prompt(seed))))
            await asyncio.sleep(draw.expovariate(per_s))
        return _times(await asyncio.gather(*tasks), " poisson")


async def decode_gap(peer: Peer, seed: int) -> dict[str, float]:
    """Return by how much a long prompt that enters holds up four streams."""
    async with new_session() as session:
        answers = [Answer(time.perf_counter()) for _ in range(4)]
        streams = [
            asyncio.create_task(ask(session, peer, prompt(seed + n), 160, answer=answer))
            for n, answer in enumerate(answers)
        ]
        while any(len(answer.pieces) < 20 for answer in answers):
            await asyncio.sleep(0.01)
        long = await ask(session, peer, prompt(seed + 4, LONG), 1)
        await asyncio.gather(*streams)
    begin, end = long.sent, long.pieces[-1]
    inside, outside = [], []
    for answer in answers:
        for moment, gap in zip(answer.pieces[1:], answer.gaps, strict=True):
            (inside if begin <= moment <= end else outside).append(gap)
    quiet = statistics.median(outside)
    largest, usual = (
        statistics.quantiles(gaps, n=20)[-1] if len(gaps) > 1 else max(gaps)
        for gaps in (inside, outside)
    )
    return {
        "decode gap": largest / quiet,
        "decode gap, nothing enters": usual / quiet,
        "decode gap, median": statistics.median(inside) / quiet,
        "long TTFT ms": 1e3 * long.first,
    }


def _cpu_seconds(peer: Peer) -> float:
    times = psutil.Process(peer.pid).cpu_times()
    return float(times.user + times.system)


def _times(answers: list[Answer], suffix: str) -> dict[str, float]:
    firsts = np.array([1e3 * answer.first for answer in answers])
    gaps = [1e3 * statistics.mean(answer.gaps) for answer in answers if answer.gaps]
    return {
        f"TTFT p50 ms{suffix}": float(np.percentile(firsts, 50)),
        f"TTFT p95 ms{suffix}": float(np.percentile(firsts, 95)),
        f"TPOT ms{suffix}": statistics.median(gaps),
    }


async def measured(peer: Peer, turn: int) -> dict[str, float]:
    """Return all values of one server in one round."""
    seeds = iter(range(1000 * turn, 1000 * (turn + 1)))
    values = {"RSS MB idle": _rss_mb(peer)} if not turn else {}
    values |= await closed_loop(peer, 1, islice(seeds, 3))
    values |= await closed_loop(peer, 8, islice(seeds, 40))
    values["8 clients / 1"] = values["tok/s at 8"] / values["tok/s at 1"]
    values |= await poisson(peer, values["tok/s at 8"] / NEW / 2, islice(seeds, 8))
    if peer.holds_long_prompts:
        values |= await decode_gap(peer, next(seeds))
    return values | {"RSS MB": _rss_mb(peer)}


def _rss_mb(peer: Peer) -> float:
    return float(psutil.Process(peer.pid).memory_info().rss / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help="a Hugging Face folder, or smollm2 (default: 10.8M, random)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    clients, *servers = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cell = make_model(Path(folder), given.model)
        os.sched_setaffinity(0, servers[:1])  # what is started now stays there
        peers = {
            name: stack.enter_context(PEERS[name](cell, Path(folder)))
            for name in given.peers.split(",")
        }
        os.sched_setaffinity(0, [clients])
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
        for turn in range(given.rounds + 1):
            for name, peer in peers.items():
                rounds[name].append(asyncio.run(measured(peer, turn)))
                print(f"round {turn}, load {os.getloadavg()[0]:.0f}: {name}", rounds[name][-1])
        print_table(rounds)


def print_table(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Print the median of each value, a column a server; then what we are of each peer."""
    print(f"| | {' | '.join(rounds)} |\n| --- |{' --- |' * len(rounds)}")
    idle = {name: own[0].pop("RSS MB idle") for name, own in rounds.items()}
    medians = {
        name: {key: statistics.median(values[key] for values in own[1:]) for key in own[0]}
        | {"RSS MB idle": idle[name]}
        for name, own in rounds.items()
    }
    for key in dict.fromkeys(key for own in medians.values() for key in own):
        cells = [f"{own[key]:.1f}" if key in own else "-" for own in medians.values()]
        print(f"| {key} | {' | '.join(cells)} |")
    for ours, name in product((name for name in medians if name.startswith("ours")), medians):
        for key in ("tok/s at 8", "tok/CPU s at 8"):
            print(f"{key}, {ours} / {name}: {medians[ours][key] / medians[name][key]:.2f}")


if __name__ == "__main__":
    main()
