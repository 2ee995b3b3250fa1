"""GRPO and its relatives: their published losses, and answers drawn inside the step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kernels.philox import NoiseKey
from models.config import plain
from models.decoder_config import DecoderConfig
from runner.data.answer_parsers import MarkedNumber
from runner.data.problems import prepare, prompts_and_solutions
from runner.data.problems_config import ProblemsConfig
from runner.data.sums_config import SumsConfig
from runner.data.tokenizers_config import TokenizerConfig
from runner.evaluate.rewards import Answer, Format, Overlong, PassesTests, RightAnswer
from runner.evaluate.sandbox import choose_wall
from runner.generate.generate import Completion
from runner.learn.memory import predicted_bytes
from runner.learn.tasks.grpo import GRPO
from runner.learn.tasks.grpo_config import GRPOConfig
from runner.learn.tasks.grpo_loss import Surrogate, advantages, scales
from runner.learn.trainer import Trainer
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records import checkpoint_folder, journal, metrics
from runner.records.budget import budget
from runner.records.cells import Cell, freeze_cell, make_cells
from tests.command_server import ROOT

KINDS: tuple[Literal["grpo", "dr_grpo", "dapo"], ...] = ("grpo", "dr_grpo", "dapo")
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).double()
LENGTHS = torch.tensor([2, 4, 8, 2])
ALL = torch.ones(4, dtype=torch.bool)
SUMS = ProblemsConfig(sources=(SumsConfig(count=300),), val_fraction=0.2)
RIGHT = RightAnswer(parser=MarkedNumber(mark="#"))
BREVITY = Overlong(most=12, margin=11)  # a new model's answers differ in their lengths
CFG = GRPOConfig(rewards={"short": BREVITY, "right": RIGHT}, group=4, max_new_tokens=12)


def test_advantages_of_the_fixture() -> None:
    assert advantages(REWARDS, "dr_grpo").tolist() == [[0.5, -0.5, -0.5, 0.5]]
    for kind in ("grpo", "dapo"):
        scaled = torch.tensor([[1.0, -1.0, -1.0, 1.0]]).double() * 0.865876  # 2 x the loss below
        assert torch.allclose(advantages(REWARDS, kind), scaled, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "loss", "weights"),
    [
        ("grpo", 0.0, [0.125, 0.0625, 0.03125, 0.125]),
        ("dapo", 0.432938, [1 / 16] * 4),
        ("dr_grpo", 0.1, [1 / 40] * 4),
    ],
)
def test_losses_and_token_weights_of_the_fixture(
    kind: Literal["grpo", "dr_grpo", "dapo"], loss: float, weights: list[float]
) -> None:
    scale, share = scales(LENGTHS, ALL, kind, most=10)
    assert (scale / share.sum()).tolist() == pytest.approx(weights, abs=1e-12)
    nll = torch.rand(16).double()
    surrogate = Surrogate(
        advantage=advantages(REWARDS, kind)[0].repeat_interleave(LENGTHS),
        scale=scale.repeat_interleave(LENGTHS),
        sampled=nll,
        reference=None,
        low=0.2,
        high=0.2,
        beta=0.0,
    )
    assert float(surrogate.value(nll) / share.sum()) == pytest.approx(loss, abs=5e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_token_weights_are_the_gradient_of_the_clipped_loss(beta: float) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 50, generator=draw).double().requires_grad_()
    ids = torch.randint(50, (200,), generator=draw)
    nll = -torch.log_softmax(logits, -1)[torch.arange(200), ids]
    surrogate = Surrogate(
        advantage=torch.randn(200, generator=draw).double(),
        scale=torch.rand(200, generator=draw).double(),
        sampled=nll.detach() + 0.3 * torch.randn(200, generator=draw).double(),
        reference=nll.detach() + torch.randn(200, generator=draw).double() if beta else None,
        low=0.2,
        high=0.28,
        beta=beta,
    )
    rows = torch.arange(200)
    share = float(surrogate.clipped(nll.detach(), rows).double().mean())
    assert 0.1 < share < 0.4, "the fixture must clip some"
    (expected,) = torch.autograd.grad(surrogate.value(nll), logits, retain_graph=True)
    weights = surrogate.weights(nll.detach(), rows)
    (found,) = torch.autograd.grad((weights * nll).sum(), logits)
    assert torch.allclose(found, expected, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def model() -> Any:
    return DecoderConfig(depth=1, width=16, num_heads=2).build(257, 0)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    samples = prepare(SUMS, TokenizerConfig(kind="bytes")).samples(48, seed=0)
    rows = [samples[index] for index in range(6)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _task(cfg: GRPOConfig) -> GRPO:
    return cfg.build(None, TokenizerConfig(kind="bytes").build(()), {})


def _noise(batch: dict[str, Tensor], seed: int = 0, step: int = 0) -> NoiseKey:
    return NoiseKey(seed=seed, step=step, samples=batch["index"])


def test_answers_hang_on_seed_and_problem_not_on_micro_batches_or_the_step_they_were_resumed_in(
    model: Any, batch: dict[str, Tensor]
) -> None:
    task = _task(CFG)
    (whole,) = task.draw(model, [batch], _noise(batch))
    halves = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 2), slice(2, 6))]
    parts = task.draw(model, halves, _noise(batch))
    assert [len(part["tokens"]) for part in parts] == [8, 16]
    for key, value in whole.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value), key
    assert whole["index"].tolist() == batch["index"].repeat_interleave(4).tolist()
    (other,) = task.draw(model, [batch], _noise(batch, seed=1))
    assert not torch.equal(other["tokens"], whole["tokens"])
    assert len({tuple(row.tolist()) for row in whole["tokens"]}) > 20, "members differ"


def test_the_model_learns_what_it_has_drawn_and_the_loss_is_the_published_one(
    model: Any, batch: dict[str, Tensor]
) -> None:
    for kind in KINDS:
        task = _task(replace(CFG, loss=kind))
        (drawn,) = task.draw(model, [batch], _noise(batch))
        prompts = [prompt for prompt, _ in prompts_and_solutions(batch) for _ in range(4)]
        lengths = (drawn["targets"] >= 0).sum(1)
        for prompt, tokens, targets, length in zip(
            prompts, drawn["tokens"], drawn["targets"], lengths.tolist(), strict=True
        ):
            assert tokens[: len(prompt)].tolist() == prompt
            first = len(prompt) - 1
            assert (targets[first : first + length] >= 0).all()
            inner = slice(first, first + length - 1)
            assert tokens[first + 1 : first + length].tolist() == targets[inner].tolist()
        assert drawn["answer_tokens"].tolist() == lengths.tolist()
        ended = drawn["targets"].eq(256).any(1)
        assert torch.equal(ended, ~drawn["cut"]), "the end is learnt unless the answer was cut"
        out = task.loss(model, drawn, None)
        learnt = drawn["targets"] >= 0
        assert torch.allclose(out.nll[learnt], drawn["sampled"][learnt], atol=1e-4)
        gains = drawn["advantage"][:, 0].double()
        per_answer = {"grpo": lengths / lengths, "dapo": lengths, "dr_grpo": lengths / 12}[kind]
        loss = float(-(gains * per_answer).sum() / task.count(drawn))
        assert out.reported is not None
        assert float(out.reported / task.count(drawn)) == pytest.approx(loss, abs=1e-4)
        assert float(out.statistics["clipped"]) == 0.0
        assert {"reward", "reward/short", "reward/right", "zero_advantage"} < set(out.statistics)


def test_memory_is_planned_with_the_shapes_of_the_largest_answers(
    batch: dict[str, Tensor], model: Any, compose: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    task = _task(CFG)
    (drawn,), planned = task.draw(model, [batch], _noise(batch)), task.planned(batch)
    assert set(drawn) == set(planned)
    for key, value in drawn.items():
        assert (value.dtype, len(value)) == (planned[key].dtype, len(planned[key])), key
    runs = [_cell(compose, tmp_path, group=group).config for group in (4, 16)]
    sizes = [predicted_bytes(run, 257, steps=1, gpu=True) for run in runs]
    assert sizes[0] < sizes[1]
    tokens = [budget(run, 257).tokens for run in runs]
    assert tokens == [6 * 4 * group * 48 for group in (4, 16)], "answers are what is trained on"


def test_cut_answers_equal_groups_and_given_results_are_not_learnt(
    model: Any, batch: dict[str, Tensor]
) -> None:
    cut = replace(CFG, skip_cut=True)
    (drawn,) = _task(cut).draw(model, [batch], _noise(batch))
    assert drawn["cut"].any()
    assert not drawn["scale"][drawn["cut"]].any()
    nothing = replace(CFG, rewards={"right": RIGHT}, loss="dapo", resample=1)
    (equal,) = _task(nothing).draw(model, [batch], _noise(batch))
    assert equal["equal"].all()
    out = _task(nothing).loss(model, equal, None)
    (gradient,) = torch.autograd.grad(out.total, [next(model.parameters())])
    assert not gradient.any()
    assert float(_task(nothing).count(equal)) == 1.0
    (once,) = _task(replace(nothing, resample=0)).draw(model, [batch], _noise(batch))
    assert not torch.equal(once["tokens"], equal["tokens"]), "the second round has its own answers"

    task, given = _task(CFG), [False, True, False]
    done = Completion(
        [65, 66], [1, 2, 3], [-1.0, -2.0, -3.0], "123", "stop", end=(256, -4.0), forced=given
    )
    answers = [task._as_drawn(done, [1, 256])] * 4
    made = task._batch(answers, torch.ones(4), torch.ones(4, 2), width=7)
    assert made["tokens"][0].tolist() == [65, 66, 1, 2, 3, 256, 256]
    assert made["targets"][0].tolist() == [-100, 1, -100, 3, 256, -100, -100]
    assert made["sampled"][0].tolist() == [0, 1, 2, 3, 4, 0, 0]
    assert made["scale"][0].tolist() == pytest.approx([0, 1 / 3, 0, 1 / 3, 1 / 3, 0, 0])


def test_rewards_of_answers() -> None:
    def answer(text: str, tokens: int = 5, reference: str = "x#46") -> Answer:
        return Answer(prompt="12+34:", text=text, reference=reference, num_tokens=tokens, cut=False)

    assert RIGHT.score([answer("#46"), answer("# 46."), answer("46"), answer("#47")]) == [
        1,
        1,
        0,
        0,
    ]
    form = Format(pattern=r"<[^>]*>.*#\d+")
    assert form.score([answer("<a>\n#4"), answer("#4"), answer("<a>#4 x")]) == [1, 0, 0]
    lengths = [answer("", tokens) for tokens in (6, 8, 9, 10, 12)]
    assert Overlong(most=10, margin=4).score(lengths) == [0, -0.5, -0.75, -1, -1]
    with pytest.raises(ValueError, match=r"no answer that MarkedNumber.*finds; set the parser"):
        RightAnswer().score([answer("#46")])
    with pytest.raises(ValueError, match="no regular expression"):
        Format(pattern="(")
    with pytest.raises(ValueError, match="margin=0 must be in 1 to most=4"):
        Overlong(most=4, margin=0)


def test_a_program_is_rewarded_for_passing_its_tests_in_the_sandbox() -> None:
    try:
        choose_wall(False)
    except ConfigError as error:
        pytest.skip(str(error))
    texts = ["def f(x):\n    return x + 1", "def f(x):\n    return x", "import sys; sys.exit(0)"]
    answers = [
        Answer(prompt="", text=text, reference="assert f(1) == 2", num_tokens=1, cut=False)
        for text in texts
    ]
    assert PassesTests(seconds=5).score(answers) == [1, 0, 0]


def _cell(compose: Callable[..., dict[str, Any]], root: Path, *more: str, **task: Any) -> Cell:
    lengths = ["train.sequence_length=48", "train.steps=6", "eval.every=3", "eval.tokens=192"]
    node = compose(*lengths, "train.micro_batch=2", "optim.lr=1e-2", f"root={root}", *more)
    node["data"] = plain(SUMS, target=True)
    node["task"] = plain(replace(CFG, **task), target=True)
    (cell,) = make_cells([("", node)])
    freeze_cell(cell)
    return cell


def _trained(cell: Cell, stops: list[int | None]) -> dict[str, Tensor]:
    """Train the cell, interrupted after each of `stops`; return its weights."""
    for stop in stops:
        attempt = journal.claim(cell.folder)
        assert attempt is not None
        writer, steps = journal.Journal(cell.folder, attempt), iter(range(1000))
        inputs = {
            name: tuple(cell.folder.parent / run for run in given.runs)
            for name, given in cell.config.inputs.items()
        }
        trainer = Trainer(cell, inputs, writer, Ranks("cpu"))
        outcome = trainer.fit(
            lambda steps=steps, stop=stop: stop is not None and next(steps) >= stop
        )  # type: ignore[misc]
        assert outcome == ("finished" if stop is None else "interrupted")
        writer.event(outcome)
        writer.close()
    newest = checkpoint_folder.newest(cell.folder / "checkpoints")
    assert newest is not None
    return load_file(newest / "model.safetensors")


def test_an_interrupted_run_draws_the_same_answers_and_a_foreign_reward_is_learnt(
    compose: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests/foreign"))
    from mylab.brevity import Brevity

    rewards = {"short": Brevity(weight=0.1), "right": RIGHT}
    more = {"rewards": rewards, "group": 4}
    whole = _cell(compose, tmp_path / "whole", "model.dropout=0.1", **more)
    broken = _cell(compose, tmp_path / "broken", "model.dropout=0.1", **more)
    first, second = _trained(whole, [None]), _trained(broken, [2, None])
    assert all(torch.equal(first[name], second[name]) for name in first)
    keys = ("loss", "reward", "reward/right", "answer_tokens", "val_reward", "val_answer_tokens")
    logged = [
        [[row.get(key) for key in keys] for row in metrics.read(cell.folder)]
        for cell in (whole, broken)
    ]
    assert logged[0] == logged[1]
    rows = metrics.read(whole.folder)
    lengths = [row["answer_tokens"] for row in rows if "answer_tokens" in row]
    assert lengths[-1] < lengths[0], "shorter answers are rewarded"


def test_the_divergence_from_the_input_named_init_is_measured_and_held(
    compose: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    start = _cell(compose, tmp_path, "train.steps=1")
    _trained(start, [None])
    tokenizer = TokenizerConfig(kind="bytes").build(())
    (start.folder / "tokenizer.json").write_text(tokenizer.dumps())
    last = {}
    for beta in (1e-6, 30.0):
        more = [f"inputs.init.runs=[{start.fingerprint}]", "model.dropout=0.1"]
        cell = _cell(compose, tmp_path, *more, beta=beta)
        _trained(cell, [None])
        kl = [row["kl"] for row in metrics.read(cell.folder) if "kl" in row]
        assert kl[0] == pytest.approx(0.0, abs=1e-6), "at its first step the model is its reference"
        last[beta] = kl[-1]
    assert 0 < last[30.0] < 0.5 * last[1e-6]


def test_what_cannot_be_run_is_refused(batch: dict[str, Tensor], model: Any) -> None:
    run: Any = SimpleNamespace(
        model=SimpleNamespace(causal=True),
        train=SimpleNamespace(parallel="ddp"),
        data=SUMS,
        inputs={},
        init=None,
    )
    CFG.check(run)
    with pytest.raises(
        ValueError, match=r"task\.beta=0\.1 .* set inputs\.init\.runs.* or init=hf:DIR"
    ):
        replace(CFG, beta=0.1).check(run)
    run.train.parallel = "fsdp"
    with pytest.raises(ValueError, match=r"use train\.parallel=ddp"):
        CFG.check(run)
    for field, value in (("group", 1), ("temperature", 0.0), ("clip_low", 1.0), ("rewards", {})):
        with pytest.raises(ValueError, match=rf"task\.{field}"):
            replace(CFG, **{field: value})
    with pytest.raises(ValueError, match=r"task\.rewards\.x=3 must have a method score"):
        replace(CFG, rewards={"x": 3})
    with pytest.raises(ValueError, match=r"leaves no room .* train\.sequence_length=8; raise it"):
        _task(CFG)._sampling([1] * 9, 8)

    class Broken:
        def score(self, answers: Any) -> list[float]:
            return [float("nan")] * len(answers)

    with pytest.raises(ValueError, match=r"task\.rewards\.bad gave nan as .*finite number"):
        _task(replace(CFG, rewards={"bad": Broken()})).draw(model, [batch], _noise(batch))
