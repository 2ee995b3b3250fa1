"""Beam search against exhaustive search, and `espalier generate` with beams."""

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from models.language_model import LanguageModel
from models.pretrained import load_pretrained
from runner.commands.cli import app
from runner.generate.beam import beam_search
from runner.generate.generate import generate
from runner.generate.sampling import Sampling

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def model() -> Decoder:
    built = DecoderConfig(depth=2, width=32, num_heads=2).build(6, 3)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(8.0)
    return built


def _search(
    model: LanguageModel, beams: int, tokens: int, **more: object
) -> list[tuple[list[int], float]]:
    about = {
        "context": 32,
        "decode": lambda ids: "".join(chr(97 + i) for i in ids),
        "ends": (5,),
    } | more
    found = beam_search(model, torch.tensor([1, 2, 0]), beams=beams, max_new_tokens=tokens, **about)  # type: ignore[arg-type]
    return [(one.ids, sum(one.logprobs)) for one in found]


@torch.no_grad()
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_continuations(model: Decoder, penalty: float) -> None:
    prompt, found = [1, 2, 0], []
    for length in (1, 2, 3):
        for ids in itertools.product(range(6), repeat=length):
            whole = ids[-1] == 5 or length == 3
            if 5 in ids[:-1] or not whole:
                continue
            own = torch.log_softmax(model(torch.tensor([[*prompt, *ids]]))[0], dim=-1)
            total = sum(float(own[2 + i, token]) for i, token in enumerate(ids))
            found.append((total / length**penalty, [i for i in ids if i != 5]))
    best = sorted(found, key=lambda row: -row[0])[:4]
    got = [ids for ids, _ in _search(model, 36, 3, length_penalty=penalty)][:4]
    assert got == [ids for _, ids in best]


def test_one_beam_is_greedy_and_more_are_never_worse(model: Decoder) -> None:
    how = Sampling(max_new_tokens=8, temperature=0.0)
    (greedy,) = generate(model, [torch.tensor([1, 2, 0])], how, context=32, decode=str, ends=())
    ((ids, total),) = _search(model, 1, 8, ends=())
    assert ids == greedy.ids
    assert total == pytest.approx(sum(greedy.logprobs), abs=1e-4)
    assert _search(model, 8, 8, ends=())[0][1] >= total - 1e-4
    without = [ids for ids, _ in _search(_Forgetful(model), 4, 6)]
    assert without == [ids for ids, _ in _search(model, 4, 6)]


class _Forgetful(LanguageModel):
    """The same model without a state."""

    def __init__(self, inner: Decoder) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor, **_: object) -> torch.Tensor:  # type: ignore[override]
        found: torch.Tensor = self.inner(tokens)
        return found


def test_beams_are_those_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=40)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    prompt = torch.tensor([[3, 9, 27]])
    done = theirs.generate(
        prompt,
        num_beams=5,
        num_return_sequences=5,
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    found = beam_search(
        ours, prompt[0], beams=5, max_new_tokens=10, context=64, decode=str, ends=()
    )
    assert [one.ids for one in found] == done[:, 3:].tolist()


def test_a_beam_that_has_no_room_or_no_sense_is_refused(model: Decoder) -> None:
    with pytest.raises(ValueError, match="does not slide"):
        _search(model, 2, 30)
    with pytest.raises(ValueError, match="beams=0"):
        _search(model, 0, 3)


def _cli(*arguments: str, given: str | None = None) -> str:
    done = CliRunner().invoke(app, list(arguments), input=given)
    return done.output + str(done.exception or "")


def test_generate_searches_prints_logprobs_and_talks(espalier: Run, tmp_path: Path) -> None:
    assert espalier("name=x").returncode == 0
    key, root = next((tmp_path / "runs").iterdir()).name, ["--root", str(tmp_path)]
    told = _cli(
        "generate",
        key,
        "--prompt",
        "li",
        "--tokens",
        "6",
        "--beams",
        "4",
        "--n",
        "3",
        "--logprobs",
        *root,
    )
    rows = [json.loads(line) for line in told.splitlines()]
    assert len(rows) == 3
    scores = [row["logprob"] / max(1, row["tokens"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(row["logprob"] == pytest.approx(sum(row["logprobs"])) for row in rows)
    assert "at most beams=2" in _cli("generate", key, "--beams", "2", "--n", "3", *root)
    assert "does not slide" in _cli("generate", key, "--prompt", "li", "--beams", "2", *root)
    talk = _cli(
        "generate",
        key,
        "-i",
        "--tokens",
        "3",
        "--temperature",
        "0",
        *root,
        given="line\n\nfar too long a line\n",
    )
    alone = _cli("generate", key, "--prompt", "line", "--tokens", "3", "--temperature", "0", *root)
    assert talk.splitlines()[1] == alone.rstrip("\n")
    assert "the prompt is empty" in talk
    assert "more than the context of 16" in talk
    assert "leave out --file" in _cli("generate", key, "-i", "--n", "2", *root)
