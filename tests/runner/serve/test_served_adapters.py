"""`serve --adapter`: clients choose an adapter by the name of a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.generate.adapted import load_adapters
from runner.generate.text_generator import TextGenerator
from runner.machine.errors import ConfigError
from runner.records.trained_model import load_model
from runner.serve.server import Options, serve
from tests.command_server import run
from tests.conftest import TINY, write_text
from tests.runner.serve.running import CONTEXT, http_get, http_post, serving


@pytest.fixture(scope="module")
def tuned(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run named `tuned` that trained an adapter on the model of `made`."""
    root = tmp_path_factory.mktemp("tuned")
    folder = made.parent.parent / "hf"
    line = [override for override in TINY if not override.startswith("model=")]
    line += [f"data.sources.0.path={write_text(root / 'text.txt')}", f"root={root}"]
    line += [f"init=hf:{folder}", f"train.sequence_length={CONTEXT}", "name=tuned"]
    done = run("runner", *line, "train.steps=2", "optim.lr=0.1", "+model/adapter=lora")
    assert done.returncode == 0, done.stderr
    (made_now,) = (root / "runs").iterdir()
    return made_now


def test_an_adapter_is_served_on_its_base_and_chosen_by_name(made: Path, tuned: Path) -> None:
    asked = {"prompt": "ab", "max_tokens": 8, "temperature": 0, "logprobs": 0}
    with serving(made, "--adapter", f"lab/mine-2.1={tuned}", "--adapter", str(tuned)) as server:
        listed = http_get(f"{server.url}/v1/models").json()["data"]
        assert [(one["id"], one.get("parent")) for one in listed] == [
            ("tiny", None),
            ("lab/mine-2.1", "tiny"),
            ("tuned", "tiny"),
        ]
        assert http_get(f"{server.url}/v1/models/lab/mine-2.1").json() == listed[1]
        nats, scores = {}, {}
        for name in ("tiny", "lab/mine-2.1", "tuned", "tiny"):
            answer = http_post(f"{server.url}/v1/completions", json={"model": name, **asked})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == name
            nats[name] = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
            scored = {"model": name, "prompt": "The quick brown fox", "echo": True, "logprobs": 0}
            answer = http_post(f"{server.url}/v1/completions", json=scored | {"max_tokens": 0})
            scores[name] = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        for values in (nats, scores):
            assert values["lab/mine-2.1"] == values["tuned"] != values["tiny"]
        wrong = http_post(f"{server.url}/v1/completions", json={"model": "other", **asked})
        assert wrong.status_code == 404
    with serving(tuned) as server:  # the run of the adapter alone
        answer = http_post(f"{server.url}/v1/completions", json=asked).json()
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == nats["tuned"]


def test_what_cannot_be_served_as_adapters_says_why_and_what_to_do(made: Path, tuned: Path) -> None:
    command = ("runner.commands.cli", "serve", str(made), "--port", "0")
    refused = {
        ("--adapter", str(made)): "adapter tiny is a whole model without an adapter",
        ("--adapter", str(tuned), "--adapter", f"tuned={tuned}"): (
            "'tuned' is the name of an earlier one; give another: NAME=RUN"
        ),
        ("--adapter", f"={tuned}"): "'': clients name an adapter by 1 to 128 letters",
    }
    for options, message in refused.items():
        done = run(*command, *options)
        assert done.returncode != 0
        assert message in " ".join(done.stderr.split()), done.stderr
    for name in ("tiny", made.name):
        with pytest.raises(ConfigError, match="has the name of the model; give another: NAME=RUN"):
            serve(made, Options(port=0), adapters={name: tuned})
    for name in ("a b", "a\nb", "é", "n" * 129, "<b>", "a=b"):
        with pytest.raises(ConfigError, match=r"digits and characters of \. _ / : @ \+ -; give"):
            serve(made, Options(port=0), adapters={name: tuned})
    for more, option in (
        ({"compiled": True}, "leave --compile out"),
        ({"precision": "training"}, "leave --precision training out"),
        ({"draft": "lookup"}, "leave --draft lookup out, or serve each adapter's run alone"),
    ):
        with pytest.raises(ConfigError, match=f"--adapter mine: .*{option}"):
            TextGenerator(made, adapters={"mine": tuned}, **more)  # type: ignore[arg-type]


def test_an_adapter_of_another_base_or_tokenizer_is_refused(
    made: Path, tuned: Path, tmp_path: Path
) -> None:
    def loaded(adapter: Path, change: float = 0.0) -> Any:
        model, tokenizer, _ = load_model(made)
        with torch.no_grad():
            model.embedding.weight[0, 0] += change
        return load_adapters(model, tokenizer, {"mine": adapter})

    assert loaded(tuned).names == ("mine",)
    with pytest.raises(ConfigError, match=r"mine has another base than .*; give the base"):
        loaded(tuned, change=1.0)
    other = shutil.copytree(tuned, tmp_path / tuned.name)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["beside"]["files"]["chat_template.jinja"] = "{{ messages[0].content }}"
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=f"mine has another tokenizer.*run alone: {other}"):
        loaded(other)
