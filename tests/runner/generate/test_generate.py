"""Generation: batches and caches change no token; sampling parameters; streaming."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from models.cache import DecoderState
from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from runner.commands.cli import app
from runner.data.tokenizers import ByteTokenizer
from runner.generate.generate import generate
from runner.generate.sampling import Sampling
from runner.generate.text_stream import TextStream

Run = Callable[..., object]
BYTES = ByteTokenizer()


class _Forgetful(Decoder):
    """The same model without a cache."""

    def start(self, batch: int, capacity: int, *, static: bool = False) -> DecoderState:
        raise NotImplementedError


@pytest.fixture(scope="module")
def model() -> Decoder:
    built = DecoderConfig(depth=2, width=32, num_heads=2).build(257, 3)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(4.0)  # far from uniform
    return built


def _ids(text: str) -> Tensor:
    return torch.from_numpy(BYTES.encode(text).astype("int64"))


PROMPTS = [_ids(text) for text in ("a", "def f(x):", "the cat sat on the mat and")]


def _call(
    model: Decoder, prompts: list[Tensor], how: Sampling | list[Sampling], **more: object
) -> list[list[int]]:
    done = generate(
        model, prompts, how, **{"context": 64, "decode": BYTES.decode, "ends": (BYTES.eos,)} | more
    )  # type: ignore[arg-type]
    return [one.ids for one in done]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_says_what_each_prompt_says_alone(model: Decoder, temperature: float) -> None:
    wishes = [Sampling(max_new_tokens=n, temperature=temperature, seed=n) for n in (30, 12, 20)]
    together = _call(model, PROMPTS, wishes, ends=())
    alone = [
        _call(model, [prompt], how, ends=())[0] for prompt, how in zip(PROMPTS, wishes, strict=True)
    ]
    assert together == alone
    assert [len(ids) for ids in together] == [30, 12, 20]


def test_the_cache_changes_no_token_even_past_the_context(model: Decoder) -> None:
    plain = _Forgetful(model.cfg, 257)
    plain.load_state_dict(model.state_dict())
    how = Sampling(max_new_tokens=80, temperature=1.0, seed=5)
    assert _call(model, PROMPTS, how, context=40) == _call(plain, PROMPTS, how, context=40)  # type: ignore[arg-type]


def test_a_seed_is_a_requests_own(model: Decoder) -> None:
    how = [Sampling(max_new_tokens=15, seed=seed) for seed in (1, 2, 1)]
    one, two, again = _call(model, [PROMPTS[1]] * 3, how)
    assert one == again
    assert one != two


def test_prompts_that_cannot_be_read_are_refused(model: Decoder) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        _call(model, [_ids("")], Sampling())
    with pytest.raises(ValueError, match="the prompt has 26 tokens, more than the context of 20"):
        _call(model, [PROMPTS[2]], Sampling(), context=20)
    assert (
        len(_call(model, [PROMPTS[2]], Sampling(max_new_tokens=3), context=20, slide=True)[0]) == 3
    )


def test_the_end_of_a_document_ends_the_text(model: Decoder) -> None:
    (ids,) = _call(model, [PROMPTS[1]], Sampling(max_new_tokens=20, temperature=0.0))
    (cut,) = generate(
        model,
        [PROMPTS[1]],
        Sampling(max_new_tokens=20, temperature=0.0),
        context=64,
        decode=BYTES.decode,
        ends=(ids[4],),
    )
    assert cut.ids == ids[: ids.index(ids[4])]
    assert cut.finish == "stop"
    assert len(cut.logprobs) == len(cut.ids)


def test_pieces_are_whole_characters_and_hold_back_what_may_be_a_stop() -> None:
    text = "héllo 🙂 END of it"
    stream = TextStream(BYTES.decode, stop=["END"])
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == "héllo 🙂 "
    assert not any("\ufffd" in piece for piece in pieces)
    near = TextStream(BYTES.decode, stop=["END"])
    said = [near.push(byte) for byte in b"ENOUGH"]
    assert said == ["", "", "ENO", "U", "G", "H"]
    broken = TextStream(BYTES.decode)
    assert [broken.push(0xE2), broken.push(0x82), broken.finish()] == ["", "", "\ufffd"]


def _letters(ids: Iterable[int]) -> str:
    """A letter for each id: what a random model says is no UTF-8."""
    return "".join(chr(97 + i % 26) for i in ids)


def test_a_stop_string_over_token_boundaries_ends_its_own_row_only(model: Decoder) -> None:
    (ids,) = _call(model, [PROMPTS[1]], Sampling(max_new_tokens=30, temperature=0.0))
    text = _letters(ids)
    stop = text[8:11]
    how = [
        Sampling(max_new_tokens=30, temperature=0.0, stop=(stop,)),
        Sampling(max_new_tokens=30, temperature=0.0),
    ]
    pieces: list[tuple[int, str]] = []
    done = generate(
        model,
        [PROMPTS[1]] * 2,
        how,
        context=64,
        decode=_letters,
        ends=(),
        on_text=lambda i, p: pieces.append((i, p)),
    )
    assert done[0].finish == "stop"
    assert stop not in done[0].text
    assert done[0].text == text[: text.index(stop)]
    assert done[1].text == text
    for index in (0, 1):
        assert "".join(p for i, p in pieces if i == index) == done[index].text


def test_the_command_takes_prompts_a_file_or_streams(espalier: Run, tmp_path: Path) -> None:
    assert espalier("seed=1").returncode == 0  # type: ignore[attr-defined]
    (run,) = tmp_path.glob("runs/*")
    call = lambda *more: CliRunner().invoke(app, ["generate", str(run), "--tokens", "9", *more])  # noqa: E731
    several = call("--prompt", "line 1", "--prompt", "line 2", "--n", "2")
    assert several.exit_code == 0, several.output
    assert several.output.count("line") >= 4
    streamed = call("--prompt", "line 1", "--stream", "--temperature", "0")
    assert streamed.output.rstrip("\n") == call(
        "--prompt", "line 1", "--temperature", "0"
    ).output.rstrip("\n")
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff{"prompt": "line 1"}\n\n{"prompt": "x\u2028y"}\n')
    rows = [json.loads(row) for row in call("--file", str(file)).output.strip().split("\n")]
    assert [row["prompt"] for row in rows] == ["line 1", "x\u2028y"]
    assert all(row["tokens"] <= 9 and row["finish"] in ("stop", "length") for row in rows)
    assert "take one prompt" in str(call("--prompt", "a", "--prompt", "b", "--stream").exception)
    for row, message in (
        ('{"text": "x"}', "is not a JSON object"),
        ('{"prompt": null}', "'None' is null, not text"),
        ('{"prompt": ["x"]}', "is a list, not text"),
    ):
        file.write_text(f'{{"prompt": "line 1"}}\n\n{row}\n')
        refused = str(call("--file", str(file)).exception)
        assert "prompts.jsonl, line 3" in refused
        assert message in refused
    assert "the prompt has 17 tokens, more than the context of 16" in str(
        call("--prompt", "a" * 17).exception
    )
