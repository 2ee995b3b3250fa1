"""Servers for tests: a small run of a Qwen-style folder with a chat template, behind a port."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2

from tests.command_server import Command, run, start
from tests.conftest import TINY, write_text
from tests.folders import qwen

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
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
