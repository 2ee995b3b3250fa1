"""Learning from preferences: the losses' values, their gradients, and the frozen reference."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernels import cross_entropy
from kernels.philox import NoiseKey
from models.config import plain
from models.contract import token_loss
from models.decoder_config import DecoderConfig
from models.experts_config import ExpertsConfig
from runner.data.judged_answers_config import (
    PreferencesConfig,
    PreferenceSource,
    SolutionsConfig,
    SolutionSource,
)
from runner.evaluate.rewards import RightAnswer
from runner.learn.memory import predicted_bytes
from runner.learn.tasks.distillation_config import DistillationConfig
from runner.learn.tasks.grpo_config import GRPOConfig
from runner.learn.tasks.language_modelling_config import LanguageModellingConfig
from runner.learn.tasks.preference import Preference, as_rows, mismatched
from runner.learn.tasks.preference_config import PreferenceConfig
from runner.learn.tasks.preference_losses import Pairs, pair_losses
from runner.machine.errors import ConfigError
from runner.records import checkpoint_folder
from runner.records.cells import Cell, make_cells
from runner.views.wrong_answers import wrong_answers
from tests.conftest import compose_tiny, write_text
from tests.folders import llama3, qwen
from tests.workers import train_here

FIXTURE = Pairs(
    logp=torch.tensor([[-12.0, -15.0]]).double(),
    reference=torch.tensor([[-13.0, -14.0]]).double(),
    lengths=torch.tensor([[6.0, 5.0]]).double(),
    kl=0.4,
)
CHOSEN_ONLY = {"loss": "kto", "desirable": 2.0, "undesirable": 0.0}
REJECTED_ONLY = {"loss": "kto", "desirable": 0.0, "undesirable": 2.0}
VALUES: list[tuple[dict[str, Any], float]] = [
    ({"loss": "dpo"}, 0.598139),
    ({"loss": "hinge"}, 0.8),
    ({"loss": "ipo"}, 9.0),
    ({"loss": "ipo_normalised"}, 21.467778),
    ({"loss": "dpo_normalised"}, 0.674982),
    ({"loss": "simpo", "beta": 2.0, "gamma": 0.5}, 0.201413),
    ({"loss": "orpo"}, 2.028875),
    (CHOSEN_ONLY, 0.485004),
    (REJECTED_ONLY, 0.465057),
    ({"loss": "kto"}, (0.485004 + 0.465057) / 2),
]
LOSSES = sorted({given["loss"] for given, _ in VALUES})


@pytest.mark.parametrize(("given", "value"), VALUES, ids=[g["loss"] for g, _ in VALUES])
def test_losses_have_the_published_values_and_slopes(given: dict[str, Any], value: float) -> None:
    cfg = PreferenceConfig(**given)
    pairs = FIXTURE
    if not cfg.has_reference:
        pairs = replace(FIXTURE, reference=torch.zeros(1, 2).double())
    logp = pairs.logp.clone().requires_grad_()
    loss, slopes = pair_losses(cfg, replace(pairs, logp=logp))
    (by_autograd,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.item() == pytest.approx(value, abs=6e-7)
    torch.testing.assert_close(slopes, by_autograd, rtol=1e-12, atol=1e-15)


def test_a_certain_answer_has_finite_odds() -> None:
    pairs = replace(FIXTURE, logp=torch.tensor([[0.0, -1e-9]]).double())
    loss, slopes = pair_losses(PreferenceConfig(loss="orpo"), pairs)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(slopes).all()


TINY = DecoderConfig(depth=1, width=16, num_heads=2, dropout=0.2)


def _batch(pairs: int, vocab: int = 50, seq: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(pairs)
    tokens = torch.randint(vocab, (pairs, 2, seq), generator=generator)
    tokens[:, 1, :4] = tokens[:, 0, :4]  # the prompt
    targets = torch.full_like(tokens, -100)
    for number in range(pairs):
        for side in range(2):
            end = 7 + (number + side) % 4
            targets[number, side, 3:end] = tokens[number, side, 4 : end + 1]
    return {"tokens": tokens, "targets": targets, "index": torch.arange(pairs)}


def _task(model: nn.Module, reference: nn.Module, **given: Any) -> Preference:
    task = Preference(PreferenceConfig(**given, reference="adapter"), model, None, {})
    task.reference = reference if task.cfg.has_reference else None
    return task


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_by_token_weights_equal_those_through_logits(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 7 * 50)  # no chunk holds a whole pair
    given = {"loss": loss, "beta": 0.5}
    model, reference = TINY.build(50, 0), TINY.build(50, 1)
    task, noise = _task(model, reference, **given), NoiseKey(seed=3, step=2, samples=_index(3))
    (drawn,) = task.draw(model, [_batch(3)], noise)
    key = replace(noise, samples=drawn["index"])
    out = task.loss(model, drawn, key)
    ours = torch.autograd.grad(out.total, list(model.parameters()))
    rows = as_rows(_batch(3))
    logits = model(rows["tokens"], noise=key).double().log_softmax(-1)
    learnt = rows["targets"] >= 0
    picked = logits.gather(-1, rows["targets"].clamp(min=0)[..., None])[..., 0]
    pairs = Pairs(
        logp=(picked * learnt).sum(-1).view(-1, 2),
        reference=drawn["reference"].view(-1, 2),
        lengths=learnt.sum(-1).double().view(-1, 2),
        kl=drawn.get("kl", 0.0),
    )
    losses, _ = pair_losses(task.cfg, pairs)
    theirs = torch.autograd.grad(losses.sum(), list(model.parameters()))
    assert float(out.reported or 0) == pytest.approx(losses.sum().item(), rel=1e-6)
    assert int(task.count(drawn)) == 3
    largest = max(float(other.abs().max()) for other in theirs)
    for own, other in zip(ours, theirs, strict=True):  # fp32: 1e-6 of the largest element
        torch.testing.assert_close(own, other.to(own.dtype), rtol=0, atol=1e-6 * largest)


def _index(count: int) -> Tensor:
    return torch.arange(count)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("language_modelling", LanguageModellingConfig()),
        ("distillation", DistillationConfig()),
        ("grpo", GRPOConfig(rewards={"right": RightAnswer()})),
    ],
)
def test_pairs_are_learnt_by_the_task_of_pairs_alone(name: str, task: Any) -> None:
    source = PreferenceSource(path="pairs.jsonl")
    run: Any = SimpleNamespace(data=PreferencesConfig(sources=(source,)))
    with pytest.raises(ValueError, match=rf"task={name} learns single sequences.*task=preference"):
        task.check(run)


def test_wrong_solutions_are_not_learnt_as_text() -> None:
    judged = SolutionsConfig(sources=(SolutionSource(path="solutions.jsonl"),))
    run: Any = SimpleNamespace(data=judged)
    with pytest.raises(ValueError, match=r"would learn the wrong answers.*give task=verifier"):
        LanguageModellingConfig().check(run)


@pytest.mark.parametrize("loss", ["dpo", "dpo_normalised"])
def test_the_first_loss_is_ln_2_with_dropout_and_any_micro_batches(loss: str) -> None:
    model = TINY.build(50, 0)
    task = _task(model, TINY.build(50, 0), loss=loss)
    batch = _batch(4)
    halves = [{k: v[at] for k, v in batch.items()} for at in (slice(0, 2), slice(2, 4))]
    noise = NoiseKey(seed=0, step=0, samples=_index(4))
    for drawn in task.draw(model, halves, noise):
        key = replace(noise, samples=drawn["index"])
        out = task.loss(model, drawn, key)
        assert float(out.reported or 0) == 2 * math.log(2)
        assert float(out.statistics["reward_margin"]) == 0.0
        assert not torch.equal(out.nll, task.loss(model, drawn, None).nll)  # there is dropout


def test_the_losses_of_routers_are_divided_as_that_of_pairs_is() -> None:
    experts = replace(TINY, pattern="ae", parts={"e": ExpertsConfig(num_experts=2)})
    rows = as_rows(_batch(3))
    ignored = torch.zeros(rows["targets"].shape)
    out = token_loss(
        experts.build(50, 0), rows["tokens"], rows["targets"], weights=ignored, divisor=_index(4)[3]
    )
    routers = sum(value for name, value in out.statistics.items() if ".loss." in name)
    assert float(routers) > 0
    torch.testing.assert_close(out.total.detach(), 3 * torch.as_tensor(routers))


def test_kto_compares_with_answers_to_other_prompts() -> None:
    batch = as_rows(_batch(3))
    tokens, targets = mismatched(batch["tokens"], batch["targets"])
    for row in range(6):
        other = (row + 2) % 6
        learnt = batch["targets"][other]
        answer = learnt[learnt >= 0]
        assert torch.equal(tokens[row, :4], batch["tokens"][row, :4])
        assert torch.equal(tokens[row, 4 : 4 + len(answer)], answer)
        assert torch.equal(targets[row, 3 : 3 + len(answer)], answer)
        assert int((targets[row] >= 0).sum()) == len(answer)
    model, reference = TINY.build(50, 0), TINY.build(50, 1)
    task = _task(model, reference, loss="kto")
    (drawn,) = task.draw(model, [_batch(3)], NoiseKey(seed=0, step=0, samples=_index(3)))
    ratio = task._mismatched_ratio(model, [batch], [None])
    assert ratio >= 0
    assert drawn["kl"].shape == ()


# Runs: the reference is what the run starts from, the base below adapters, or another run.


def _pairs(file: Path, count: int = 48) -> Path:
    rows = [
        {"prompt": f"{i}+{i}=", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1} or so"}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cell]:
    """A folder, and a trained run in it to start from."""
    root = tmp_path_factory.mktemp("preference")
    node = compose_tiny(root, write_text(root / "text.txt"), "train.steps=4", "optim.lr=1e-2")
    (cell,) = make_cells([("", node)])
    train_here(cell)
    return root, cell


def _cell(root: Path, *overrides: str, inputs: dict[str, Any], loss: str = "dpo") -> Cell:
    given = ["train.sequence_length=24", "model.dropout=0.1", "optim.lr=3e-3", *overrides]
    node = compose_tiny(root, root / "text.txt", "task=preference", f"task.loss={loss}", *given)
    source = PreferenceSource(path=str(_pairs(root / "pairs.jsonl")))
    data = PreferencesConfig(sources=(source,), form="text", val_fraction=0.2)
    node["data"] = plain(data, target=True)
    node["inputs"] = inputs
    (cell,) = make_cells([("", node)])
    return cell


def test_a_run_starts_at_ln_2_widens_the_margin_and_resumes_bit_identically(
    started: tuple[Path, Cell],
) -> None:
    root, start = started
    inputs = {"init": {"runs": [start.fingerprint]}}
    weights = []
    for name, stop_after in (("whole", None), ("broken", 5)):
        at = root / name
        (at / "runs").mkdir(parents=True)
        (at / "runs" / start.fingerprint).symlink_to(start.folder)
        write_text(at / "text.txt")
        cell = _cell(at, "train.micro_batch=2", "train.steps=12", inputs=inputs)
        logged = train_here(cell, stop_after=stop_after)
        newest = checkpoint_folder.newest(cell.folder / "checkpoints")
        assert newest is not None
        weights.append(load_file(newest / "model.safetensors"))
        assert logged["loss"][0] == pytest.approx(math.log(2), abs=1e-7)
        assert logged["val_reward_margin"][-1] > 0.01
        assert logged["val_preference_loss"][-1] < math.log(2)
        assert logged["tokens"][-1] == 12 * 4 * 2 * 24  # two sequences a sample
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _changed(folder: Path, other: Path) -> Path:
    """Write the same model with other weights."""
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    save_file(
        {k: 1.5 * v for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    return other


def test_the_reference_is_the_base_below_adapters_or_a_named_run(
    started: tuple[Path, Cell], tmp_path: Path
) -> None:
    root, start = started
    steps = ["train.steps=2", "eval.every=2"]
    base = [f"init=hf:{qwen(tmp_path / 'hf')}", "+model/adapter=lora"]
    losses = {}
    for reference in ("adapter", "init"):
        cell = _cell(root, *base, *steps, f"task.reference={reference}", inputs={})
        losses[reference] = train_here(cell)["loss"]
    assert losses["adapter"] == losses["init"]
    assert losses["init"][0] == pytest.approx(math.log(2), abs=1e-7)
    first = cell.fingerprint
    chained = _cell(root, *base, *steps, inputs={"init": {"runs": [first]}})
    logged = train_here(chained)
    assert logged["loss"][0] == pytest.approx(math.log(2), abs=1e-7)
    # An evaluation of that run compares with what it started from, not with itself.
    judged = {"init": {"runs": [chained.fingerprint]}}
    asked = ["work=evaluate", "+eval/also@eval.also.pairs=pairs", "eval.also.pairs.limit=1000"]
    looking = _cell(root, *base, *steps, *asked, inputs=judged)
    again = train_here(looking)
    rows = [
        json.loads(x) for x in (looking.folder / "answers_pairs.jsonl").read_text().splitlines()
    ]
    wrong = [row for row in rows if row["margin"] < 0]
    assert again["pairs/violations"] == [len(wrong) / len(rows)]
    assert again["pairs/margin"][0] == pytest.approx(sum(row["margin"] for row in rows) / len(rows))
    assert all(row["prompt"] and row["reference"] != row["rejected"] for row in rows)
    assert [one.line for one in wrong_answers(looking.folder)[0]] == [
        number for number, row in enumerate(rows, start=1) if row["margin"] < 0
    ]
    assert again["val_preference_loss"] == logged["val_preference_loss"][-1:]
    assert again["val_preference_loss"][0] != pytest.approx(math.log(2), abs=1e-6)
    for other, message in (
        (["model.adapter.rank=4"], f"inputs.init.runs=.{first}.* has model.adapter.rank=8, this"),
        ([f"init=hf:{llama3(tmp_path / 'other')}"], rf"run {first} has another tokenizer"),
        ([f"init=hf:{_changed(tmp_path / 'hf', tmp_path / 'new')}"], "an adapter of another base"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_here(_cell(root, *base, *steps, *other, inputs={"init": {"runs": [first]}}))
    named = _cell(
        root,
        *steps,
        "task.reference=other",
        inputs={"other": {"runs": [start.fingerprint]}},
        loss="ipo",
    )
    assert train_here(named)["loss"][0] != pytest.approx(25.0, abs=1e-3)  # it starts elsewhere
    memory = [predicted_bytes(one.config, 384) for one in (named, chained)]
    assert min(memory) > 0
    free = _cell(root, *steps, inputs={}, loss="simpo")
    assert len(train_here(free)["loss"]) == 2
    with pytest.raises(ConfigError, match=r"task.reference=init: there is no such model; give"):
        _cell(root, inputs={})
