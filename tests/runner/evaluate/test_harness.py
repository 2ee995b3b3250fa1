"""Benchmarks over our models: equal to a direct forward pass, whatever is batched with what."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from models.linear_attention_config import LinearAttentionConfig
from runner.data.benchmark_files import SHIPPED, content_hash, specify
from runner.data.tokenizers import ByteTokenizer
from runner.data.tokenizers_config import TokenizerConfig
from runner.evaluate.config import HarnessConfig
from runner.evaluate.harness import HarnessModel, evaluate
from runner.evaluate.labels import evenly_spaced
from runner.generate.generate import generate
from runner.generate.sampling import Sampling
from runner.machine.errors import ConfigError, DataError
from runner.machine.memo import Memo

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"needs the reference data in {DATA}")
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> Decoder:
    built = DecoderConfig(depth=2, width=32, num_heads=2).build(257, 3)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(4.0)
    return built


def _ask(model: HarnessModel, kind: str, *rows: tuple[Any, ...]) -> list[Any]:
    requests = [SimpleNamespace(args=row, task_name="t") for row in rows]
    found: list[Any] = getattr(model, kind)(requests, disable_tqdm=True)
    return found


def _directly(model: Decoder, context: str, text: str) -> tuple[float, bool]:
    """One text at a time, token by token."""
    ids = [int(i) for i in (*(BYTES.encode(context) if context else [256]), *BYTES.encode(text))]
    own = torch.log_softmax(model(torch.tensor([ids]))[0].double(), dim=-1)
    places = range(len(ids) - len(text) - 1, len(ids) - 1)
    nats = sum(float(own[place, ids[place + 1]]) for place in places)
    return nats, all(int(own[place].argmax()) == ids[place + 1] for place in places)


ROWS = [
    ("the cat", " sat"),
    ("", "alone"),
    ("a" * 40, "b"),
    ("x ", "y"),
    ("def f(", "x): return x"),
]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_log_likelihoods_are_those_of_a_direct_pass(model: Decoder, batch: int) -> None:
    harness = HarnessModel(model, BYTES, context=64, batch_size=batch)
    expected = [
        _directly(model, context.rstrip(), context[len(context.rstrip()) :] + text)
        for context, text in ROWS
    ]
    for found, (nats, greedy) in zip(_ask(harness, "loglikelihood", *ROWS), expected, strict=True):
        assert found == (pytest.approx(nats, abs=1e-4), greedy)
    likeliest = _ask(harness, "generate_until", ("abc", {"until": [], "max_gen_toks": 3}))[0]
    if len(likeliest.encode()) == len(likeliest) == 3:
        assert _ask(harness, "loglikelihood", ("abc", likeliest))[0][1]


def _scored_whole(model: Any, context: list[int], ending: list[int]) -> tuple[float, bool]:
    """A pair alone, in one pass over all of it."""
    ids = torch.tensor([[*context, *ending]])
    own = torch.log_softmax(model(ids[:, :-1])[0, -len(ending) :], dim=-1)
    nats = own.gather(1, torch.tensor(ending)[:, None]).sum()
    return float(nats), own.argmax(dim=-1).tolist() == ending


class _Stateless(Decoder):
    start = None  # type: ignore[assignment]

    def forward(self, tokens: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(tokens)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attention", "recurrent", "stateless", "coupled"])
def test_what_several_choices_begin_with_is_read_once_at_equal_scores(
    model: Decoder, kind: str
) -> None:
    if kind == "recurrent":
        parts = {"x": LinearAttentionConfig(kind="gated_delta", chunk=8)}
        cfg = DecoderConfig(depth=2, width=32, num_heads=2, pattern="xf", parts=parts)
        model = cfg.build(257, 3)
    if kind == "stateless":
        weights, model = model.state_dict(), _Stateless(model.cfg, 257)
        model.load_state_dict(weights)
    shots, rng = list(range(40)), random.Random(0)
    pairs = [
        ([*shots, *rng.choices(range(257), k=10 + question)], rng.choices(range(257), k=2 + choice))
        for question in range(3)
        for choice in range(4)
    ]
    pairs = [(pairs[4 * (i // 4)][0], ending) for i, (_, ending) in enumerate(pairs)]
    read: list[int] = []
    hook = model.embedding.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    harness = HarnessModel(
        model, BYTES, context=64, batch_size=12, shares_prefixes=kind != "coupled"
    )
    scores = harness.score(pairs)
    hook.remove()
    for (nats, greedy), pair in zip(scores, pairs, strict=True):
        assert (nats, greedy) == _approximately(*_scored_whole(model, *pair))
    shares = kind in ("attention", "recurrent")
    # The shots less their last token, the rest of three questions, twelve endings, padded.
    assert sum(read) == (40 + 3 * 11 + 12 * 5 if shares else 12 * (40 + 12 + 5 - 1))


def _approximately(nats: float, greedy: bool) -> tuple[Any, bool]:
    return pytest.approx(nats, abs=1e-5), greedy


@torch.no_grad()
def test_long_texts_are_read_in_windows_and_lose_their_beginning(model: Decoder) -> None:
    harness = HarnessModel(model, BYTES, context=16)
    text = "twenty characters..." * 3
    ids = torch.tensor([256, *(int(i) for i in BYTES.encode(text))])
    total = 0.0
    for start in range(0, len(text), 16):  # each window is read without the others
        part = ids[start : start + 17]
        own = torch.log_softmax(model(part[None, :-1])[0], dim=-1)
        total += float(own.gather(1, part[1:, None]).sum())
    # The last window is filled up with context from before.
    last = len(text) % 16
    part = ids[-17:]
    own = torch.log_softmax(model(part[None, :-1])[0], dim=-1).gather(1, part[1:, None])[:, 0]
    whole = ids[len(text) - last :]
    short = torch.log_softmax(model(whole[None, :-1])[0], dim=-1).gather(1, whole[1:, None])
    total += float(own[-last:].sum() - short.sum())
    assert _ask(harness, "loglikelihood_rolling", (text,))[0] == pytest.approx(total, abs=1e-3)
    assert not harness.num_truncated.total()  # windows are no loss
    cut = _directly(model, (text + "x")[-17:-1], "x")
    assert _ask(harness, "loglikelihood", (text, "x"))[0] == (
        pytest.approx(cut[0], abs=1e-4),
        cut[1],
    )
    assert harness.num_truncated == {"t": 1}


def test_generation_is_that_of_the_engine_up_to_a_stop_string(model: Decoder) -> None:
    harness = HarnessModel(model, BYTES, context=64, batch_size=2)
    prompts = ["one", "a longer prompt", "z"]
    wanted = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
    found = _ask(harness, "generate_until", *[(prompt, wanted) for prompt in prompts])
    long = _ask(harness, "generate_until", ("q" * 30, wanted | {"max_gen_toks": 64}))
    assert not harness.num_truncated.total(), long  # half of the context is the question's
    how = Sampling(max_new_tokens=12, temperature=0.0, stop=("\n", "e"))
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.from_numpy(BYTES.encode(prompt).astype("int64"))
        (alone,) = generate(model, [ids], how, context=64, decode=BYTES.decode, ends=(BYTES.eos,))
        assert text == alone.text
        assert "e" not in text


def test_a_task_of_ones_own_is_scored_with_standard_errors_and_records(
    model: Decoder, tmp_path: Path
) -> None:
    rows = [{"q": f"question {i}", "a": ["yes", "no"], "gold": i % 2} for i in range(10)]
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    spec = {
        "task": "mine",
        "files": ["mine.jsonl"],
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "gold",
        "doc_to_choice": "{{a}}",
        "metadata": {"version": 7},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(spec))
    cfg = HarnessConfig(tasks=("mine",), data=str(tmp_path), include=str(tmp_path))
    harness = HarnessModel(model, BYTES, context=64)
    report = evaluate(harness, cfg)
    (row,) = report.scores
    right = [
        max(
            (0, 1),
            key=lambda k, r=r: harness.score(
                [(harness.tok_encode(r["q"]), harness.tok_encode(" " + r["a"][k]))]
            )[0][0],
        )
        == r["gold"]  # type: ignore[misc]
        for r in rows
    ]
    mean = sum(right) / 10
    assert row["value"] == pytest.approx(mean)
    assert row["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / 9))
    assert (row["n"], row["version"], row["num_fewshot"], row["lm_eval"]) == (10, 7, 0, "0.4.13")
    report.write(tmp_path, 5)
    (file,) = (tmp_path / "evals").glob("*.json")
    assert json.loads(file.read_text())["scores"] == report.scores
    records = pd.read_parquet(file.with_suffix(".parquet"))
    assert records["acc"].astype(bool).tolist() == right
    assert json.loads(records["doc"][3])["q"] == "question 3"
    few = evaluate(
        harness, HarnessConfig(tasks=("mine",), data=str(tmp_path), include=str(tmp_path), limit=3)
    )
    assert [json.loads(r["doc"])["q"] for r in few.records] == [
        "question 0",
        "question 3",
        "question 6",
    ]
    assert few.scores[0]["identity"] != row["identity"]
    (cut,) = evaluate(HarnessModel(model, BYTES, context=8), cfg).scores
    assert (row.get("cut_to"), cut["cut_to"]) == (None, 8)
    assert cut["identity"] != row["identity"]  # the beginnings of the questions were lost
    before = content_hash(("mine",), cfg.data, cfg.include)
    (tmp_path / "mine.jsonl").write_text(json.dumps(rows[0]))
    assert content_hash(("mine",), cfg.data, cfg.include) != before


def test_programs_past_our_sandbox_need_leave(model: Decoder, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"q": "x"}))
    spec = {
        "task": "mine",
        "files": ["mine.jsonl"],
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "x",
        "unsafe_code": True,
        "metadata": {"version": 1},
        "generation_kwargs": {"until": ["y"], "max_gen_toks": 64},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(spec))
    cfg = HarnessConfig(tasks=("mine",), data=str(tmp_path), include=str(tmp_path))
    harness = HarnessModel(model, BYTES, context=32)
    with pytest.raises(ConfigError, match="without a sandbox"):
        evaluate(harness, cfg)
    assert evaluate(harness, replace(cfg, allow_unsafe_code=True)).scores[0]["n"] == 1
    assert not harness.num_truncated.total()


def test_a_context_of_its_own_is_at_most_the_models() -> None:
    run = SimpleNamespace(
        train=SimpleNamespace(sequence_length=16),
        model=DecoderConfig(depth=1, width=8, num_heads=1),
    )
    assert HarnessConfig().context_in(run) == 16
    wide = HarnessConfig(context=2048)
    wide.check(run)  # rotary positions
    assert wide.context_in(run) == 2048
    run.model = replace(run.model, positions="learned", context_length=1024)
    HarnessConfig(context=1024).check(run)
    with pytest.raises(ValueError, match=r"context=2048: .* context_length=1024 of learned"):
        wide.check(run)


@pytest.mark.slow
def test_unknown_tasks_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"near: .*lambada"):
        specify("lambda", str(tmp_path), None)
    with pytest.raises(DataError, match=r"HumanEval.jsonl\* or"):
        specify("humaneval", str(tmp_path), None)
    assert specify("lambada", None, None) == "lambada_openai"
    assert specify("boolq", None, None) == "boolq"
    assert any("arc_easy" in names for names in Memo("lm-eval").entries.values())
    with pytest.raises(ValueError, match="twice"):
        HarnessConfig(tasks=("a", "a"))
    assert evenly_spaced(10, 3) == [0, 3, 6]
    assert evenly_spaced(2, 5) == [0, 1]


@pytest.mark.slow
@needs_data
def test_every_shipped_benchmark_asks_its_local_questions(model: Decoder) -> None:
    shipped = {file.stem for file in SHIPPED.glob("*.yaml")}
    names = tuple(sorted(shipped - {"livecodebench"}))  # its questions are nobody's to copy
    cfg = HarnessConfig(tasks=names, data=str(DATA), limit=4)
    report = evaluate(HarnessModel(model, BYTES, context=400), cfg)
    scored = {row["task"]: row for row in report.scores}
    assert set(scored) == set(names)
    assert all(row["n"] == 4 for row in report.scores)
    assert all(math.isfinite(row["value"]) for row in report.scores)
    prompts = {row["task"]: json.loads(row["arguments"]) for row in report.records}
    assert {row["num_fewshot"] for row in report.scores if row["task"] == "gsm8k"} == {5}
    first = json.dumps(prompts["gsm8k"])
    assert first.count("Answer:") == 6
    assert json.dumps(prompts["mbpp"]).count("[DONE]") >= 3
    assert "Answer:" in json.dumps(prompts["arc_easy"])
    assert scored["lambada"]["metric"] in ("acc", "perplexity")
    perplexity = next(row for row in report.scores if row["metric"] == "perplexity")
    assert perplexity["stderr"] is not None


@needs_data
def test_the_hubs_form_of_rows_asks_the_same(model: Decoder, tmp_path: Path) -> None:
    from datasets import Dataset

    lines = (DATA / "llmfoundry_evals/winogrande.jsonl").read_text().splitlines()
    local = [json.loads(line) for line in lines[:5]]
    hub = []
    for row in local:
        one, two = row["context_options"]
        size = len([a for a, b in zip(one.split(), two.split(), strict=False) if a == b])
        words = (one.split()[size:], two.split()[size:])
        sentence = " ".join([*one.split()[:size], "_", row["continuation"]])
        hub.append(
            {
                "sentence": sentence,
                "option1": " ".join(words[0]),
                "option2": " ".join(words[1]),
                "answer": str(row["gold"] + 1),
            }
        )
    (tmp_path / "hub/winogrande_xl").mkdir(parents=True)
    Dataset.from_list(hub).to_parquet(tmp_path / "hub/winogrande_xl/validation-0.parquet")
    (tmp_path / "local").mkdir()
    (tmp_path / "local/winogrande.jsonl").write_text("\n".join(json.dumps(row) for row in local))
    harness = HarnessModel(model, BYTES, context=200)
    reports = [
        evaluate(harness, HarnessConfig(tasks=("winogrande",), data=str(tmp_path / folder)))
        for folder in ("local", "hub")
    ]
    one, two = ([record["arguments"] for record in report.records] for report in reports)
    assert one == two


def test_subwords_are_scored_as_a_whole(model: Decoder) -> None:
    bpe = TokenizerConfig(kind="bpe", vocab_size=257).build(["the cat sat on the mat"] * 9)
    harness = HarnessModel(model, bpe, context=64)
    whole = harness.score([([bpe.eos], harness.tok_encode("the cat sat"))])[0][0]
    (parts,) = _ask(harness, "loglikelihood_rolling", ("the cat sat",))
    assert parts == pytest.approx(whole, abs=1e-4)
