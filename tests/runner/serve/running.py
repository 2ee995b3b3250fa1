"""Servers for tests: a small run of a Qwen-style folder with a chat template, behind a port."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from models.prefix_cache import PrefixCache
from runner.generate.text_generator import TextGenerator
from runner.serve.access import Access
from runner.serve.app import Api
from runner.serve.engine_thread import EngineThread
from runner.serve.gate import Gate
from runner.serve.metrics import Metrics
from runner.serve.served_model import ServedModel
from tests.command_server import Command, run, start
from tests.conftest import TINY, write_text
from tests.folders import qwen

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HI: Any = [{"role": "user", "content": "hi"}]  # a conversation
CONTEXT = 96
PATIENCE_S = 300.0  # of a client, on a machine that does other things too
http_get = partial(httpx2.get, timeout=PATIENCE_S)
http_post = partial(httpx2.post, timeout=PATIENCE_S)
INFILL = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@dataclass(frozen=True)
class Server:
    """A running `espalier serve`, the run that it serves, and where."""

    command: Command
    run: Path
    url: str


def make_run(root: Path, template: str | None = CHATML, *overrides: str) -> Path:
    """Return the folder of an untrained run: root/hf has its weights and tokenizer."""
    folder = qwen(root / "hf")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|im_end|>"}))
    _add_special_tokens(folder / "tokenizer.json", INFILL)
    text = write_text(root / "text.txt")
    tiny = [f"data.sources.0.path={text}", f"root={root}", f"init=hf:{folder}", "train.steps=0"]
    tiny += ["name=tiny", f"train.sequence_length={CONTEXT}", *overrides]
    base = [override for override in TINY if not override.startswith("model=")]
    done = run("runner", *base, *tiny)
    assert done.returncode == 0, done.stderr
    (made,) = (root / "runs").iterdir()
    return made


def _add_special_tokens(file: Path, names: tuple[str, ...]) -> None:
    data = json.loads(file.read_text())
    first, like = len(data["model"]["vocab"]), data["added_tokens"][0]
    added = [like | {"id": first + i, "content": name} for i, name in enumerate(names)]
    file.write_text(json.dumps(data | {"added_tokens": data["added_tokens"] + added}))


@contextmanager
def serving(made: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """Serve a run at a free port until the block ends."""
    line = ("runner.commands.cli", "serve", str(made), "--port", "0", "--chunk", "16", *options)
    command = start(*line, keep=True, env=env)
    try:
        while not (told := re.search(r"serving \S+ at (http\S+)", command.written()[0])):
            assert command.poll() is None, command.written()
            time.sleep(0.02)
        yield Server(command, made, told[1])
    finally:
        command.kill()
        command.wait()


def asked(
    generator: TextGenerator,
    folder: Path,
    asks: list[tuple[str, dict[str, Any]]],
    *,
    at_once: bool = False,
    **more: Any,
) -> list[tuple[int, Any]]:
    """Return (status, answer) of requests to a server of the run in this process, in order."""
    model = ServedModel(folder, generator)
    prefixes = PrefixCache(block=4, max_bytes=1 << 20)
    engine = model.engine(rows=2, chunk=8, prefixes=prefixes, **more)
    thread, access = EngineThread(engine, Metrics(model.name), max_waiting=4), Access()
    app = Api(model, thread, access).app()
    gate = Gate(app, access=access, only_loopback=True)

    async def ask() -> list[tuple[int, Any]]:
        transport = httpx2.ASGITransport(app=gate)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
        ):
            posts = [client.post(path, json=body, timeout=60) for path, body in asks]
            answers = await asyncio.gather(*posts) if at_once else [await post for post in posts]
            return [
                (a.status_code, a.json() if a.text.startswith("{") else a.text) for a in answers
            ]

    answers = asyncio.run(ask())
    assert thread.num_open == engine.strategy.num_bytes() == 0
    return answers


def events(stream: str) -> list[str]:
    """Return the data of server-sent events, without the pings of a slow stream."""
    lines = stream.split("\n\n")
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
