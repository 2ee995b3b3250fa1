"""Every kind of model is served as it generates: runs of each, in this process, without a port."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from runner.generate.denoising import Denoising
from runner.generate.sampling import Sampling
from runner.generate.text_generator import TextGenerator
from runner.machine.errors import ConfigError
from runner.serve.fields import Message
from runner.serve.requests import messages_of
from tests.command_server import run
from tests.conftest import TINY, write_text
from tests.runner.serve.running import CHATML, PATIENCE_S, asked, events
from tests.runner.test_old_cells import lay_out

OLD = {  # their contexts are 16 tokens, of characters, bytes or numbers
    "attention": ("10bc2a67cdc05a27", "line 1: "),
    "bdh": ("2926a455e96b2227", "line 1: "),
    "engram, delta rule and experts": ("00a2106fe8a4ac6a", "line 1: "),
    "hybrid": ("9a1932dfda8955d4", "3 1 4 1 5 9 2 6"),
    "experts": ("54d54d84eb8a9bd3", "line 1: "),
}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of many kinds of models."""
    return lay_out(tmp_path_factory.mktemp("old") / "runs_2026_11") / "runs"


@pytest.mark.parametrize("kind", OLD)
def test_texts_through_the_server_are_those_of_generate(kind: str, old: Path) -> None:
    name, prompt = OLD[kind]
    generator = TextGenerator(old / name)
    hows = [Sampling(max_new_tokens=8, temperature=t, seed=5) for t in (0.0, 1.0)]
    body = {"prompt": prompt, "max_tokens": 8, "seed": 5}
    asks = [("/v1/completions", body | {"temperature": how.temperature}) for how in hows * 2]
    answers = asked(generator, old / name, asks)
    own = [one.text for one in generator.generate([prompt] * 2, hows)]
    assert [answer["choices"][0]["text"] for _, answer in answers] == own * 2
    assert own[0] != own[1]


def test_a_model_of_texts_holds_no_conversation_and_says_so(old: Path) -> None:
    folder = old / OLD["experts"][0]
    messages = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    asks = [
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/chat/completions", {"messages": messages, "tools": tools}),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "[é]{3}"}}),
    ]
    asks.append(("/infill", {"input_prefix": "a", "input_suffix": "b"}))
    (status, plain), (_, tooled), (_, bound), (_, gap) = asked(TextGenerator(folder), folder, asks)
    assert "fim_prefix" in gap["error"]["message"]
    assert (status, plain["error"]["code"]) == (400, "no_chat_template")
    assert tooled["error"]["param"] == "tools"
    assert bound["choices"][0]["text"] == "ééé"  # six tokens of bytes
    assert bound["choices"][0]["finish_reason"] == "stop"


def test_a_text_that_takes_long_to_encode_holds_up_nobody_else(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = old / OLD["experts"][0]
    generator, answered = TextGenerator(folder), threading.Event()
    encode, decode = generator.tokenizer.encode, generator.tokenizer.decode

    def slow_encode(text: str) -> Any:
        assert text != "slow" or answered.wait(PATIENCE_S)
        if text == "quick":
            answered.set()
        return encode(text)

    def slow_decode(ids: Any) -> Any:
        assert list(ids) != [7, 7, 7] or answered.wait(PATIENCE_S)
        return decode(ids)

    monkeypatch.setattr(generator.tokenizer, "encode", slow_encode)
    monkeypatch.setattr(generator.tokenizer, "decode", slow_decode)
    asks: list[tuple[str, dict[str, Any]]] = [
        ("/tokenize", {"prompt": "slow", "add_special_tokens": False}),
        ("/detokenize", {"tokens": [7, 7, 7]}),
        ("/tokenize", {"prompt": "quick", "add_special_tokens": False}),
    ]
    answers = asked(generator, folder, asks, at_once=True)
    assert [status for status, _ in answers] == [200] * 3


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of masked diffusion."""
    root = tmp_path_factory.mktemp("diffusion")
    text = write_text(root / "text.txt")
    more = ["task=diffusion", "model.causal=false", "train.steps=1", "train.sequence_length=32"]
    done = run("runner", *TINY, *more, f"data.sources.0.path={text}", f"root={root}")
    assert done.returncode == 0, done.stderr
    (folder,) = (root / "runs").iterdir()
    return folder


def test_a_canvas_streams_its_beginning_and_refuses_what_goes_from_left_to_right(
    diffusion: Path,
) -> None:
    generator = TextGenerator(diffusion)
    body = {"prompt": "line", "max_tokens": 12, "temperature": 0, "seed": 1, "block": 4}
    path = "/v1/completions"
    refused = ({"echo": True, "logprobs": 1}, {"presence_penalty": 1.0}, {"min_tokens": 2})
    asks = [(path, body), (path, body | {"stream": True})]
    asks += [(path, body | fields) for fields in refused]
    asks += [(path, body | {"structured_outputs": {"regex": "a+"}})]
    (_, whole), (_, streamed), *others = asked(generator, diffusion, asks)
    how = Denoising(max_new_tokens=12, temperature=0.0, seed=1, block=4)
    (own,) = generator.generate(["line"], how)
    assert whole["choices"][0]["text"] == own.text
    *chunks, done = events(streamed)
    assert done == "[DONE]"
    pieces = [json.loads(chunk)["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == own.text
    assert [answer["error"]["param"] for _, answer in others] == [
        "logprobs",
        "presence_penalty",
        "min_tokens",
        "prompt",
    ]
    assert {status for status, _ in others} == {400}
    with pytest.raises(ConfigError, match=r"one token after the other, .* does not; serve each"):
        TextGenerator(diffusion, adapters={"mine": diffusion})


TOOLS = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}"""


def test_calls_of_tools_come_back_as_calls_and_the_rest_as_text(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / made.name)
    kept = json.loads((folder / "tokenizer.json").read_text())
    kept["beside"]["files"]["chat_template.jinja"] = TOOLS + CHATML
    (folder / "tokenizer.json").write_text(json.dumps(kept))
    call = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    said = f"ok{call}{call}"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": "<|im_end|>"}}}]
    body = {"messages": [{"role": "user", "content": "?"}], "tools": tools, "max_tokens": 200}
    body |= {"structured_outputs": {"choice": [said]}}
    path, short = "/v1/chat/completions", {"structured_outputs": {"choice": ["no <tool_call>{x"]}}
    asks = [body, body | {"stream": True}, body | {"tool_choice": "none"}, body | short]
    generator = TextGenerator(folder)
    generator.context = 512  # it knows positions of any distance
    answers = asked(generator, folder, [(path, ask) for ask in asks])
    (_, whole), (_, streamed), (_, none), (_, broken) = answers
    message, finish = (whole["choices"][0][key] for key in ("message", "finish_reason"))
    assert (message["content"], finish) == ("ok", "tool_calls")
    functions = [one["function"] for one in message["tool_calls"]]
    assert functions == [{"name": "f", "arguments": '{"x": 1}'}] * 2
    chunks = [json.loads(chunk) for chunk in events(streamed)[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "ok"
    calls = [one for delta in deltas for one in delta.get("tool_calls", ())]
    assert [(one["index"], one["function"]) for one in calls] == list(enumerate(functions))
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert none["choices"][0]["message"]["content"] == said
    assert none["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["prompt_tokens"] > none["usage"]["prompt_tokens"]
    assert broken["choices"][0]["message"]["content"] == "no <tool_call>{x"
    said_before = Message(
        role="assistant", tool_calls=[{"id": "1", "type": "function", "function": functions[0]}]
    )
    (plain,) = messages_of([said_before])
    assert plain["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert plain["content"] == ""
