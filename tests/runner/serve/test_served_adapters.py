"""`serve --adapter`: clients choose an adapter by the name of a model."""

from pathlib import Path

from tests.command_server import run
from tests.conftest import TINY, write_text
from tests.runner.serve.running import CONTEXT, http_get, http_post, serving


def test_an_adapter_is_served_on_its_base_and_chosen_by_name(made: Path, tmp_path: Path) -> None:
    folder = made.parent.parent / "hf"
    line = [override for override in TINY if not override.startswith("model=")]
    line += [f"data.sources.0.path={write_text(tmp_path / 'text.txt')}", f"root={tmp_path}"]
    line += [f"init=hf:{folder}", f"train.sequence_length={CONTEXT}", "name=tuned"]
    done = run("runner", *line, "train.steps=2", "optim.lr=0.1", "+model/adapter=lora")
    assert done.returncode == 0, done.stderr
    (tuned,) = (tmp_path / "runs").iterdir()
    asked = {"prompt": "ab", "max_tokens": 8, "temperature": 0, "logprobs": 0}
    with serving(made, "--adapter", f"mine={tuned}", "--adapter", str(tuned)) as server:
        listed = http_get(f"{server.url}/v1/models").json()["data"]
        assert [(one["id"], one.get("parent")) for one in listed] == [
            ("tiny", None),
            ("mine", "tiny"),
            ("tuned", "tiny"),
        ]
        nats = {}
        for name in ("tiny", "mine", "tuned", "tiny"):
            answer = http_post(f"{server.url}/v1/completions", json={"model": name, **asked})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == name
            nats[name] = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        assert nats["mine"] == nats["tuned"] != nats["tiny"]
        wrong = http_post(f"{server.url}/v1/completions", json={"model": "other", **asked})
        assert wrong.status_code == 404
    with serving(tuned) as server:  # the run of the adapter alone
        answer = http_post(f"{server.url}/v1/completions", json=asked).json()
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == nats["mine"]
    command = ("runner.commands.cli", "serve", str(made), "--port", "0")
    refused = {
        ("--adapter", str(made)): "adapter tiny is a whole model without an adapter",
        ("--adapter", f"tiny={tuned}"): "has the name of the model; give another: NAME=RUN",
        ("--adapter", str(tuned), "--draft", "lookup"): "without a draft; leave",
    }
    for options, message in refused.items():
        done = run(*command, *options)
        assert done.returncode != 0
        assert message in " ".join(done.stderr.split()), done.stderr
