"""Masked diffusion against a Markov chain whose posterior is known."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kernels.philox import NoiseKey
from models.contract import logits
from models.decoder_config import DecoderConfig
from models.language_model import TokenLoss
from models.pretrained import load_pretrained
from runner.data.corpus import loads, token_id
from runner.data.special_tokens import WithTokens
from runner.data.tokenizers import SymbolTokenizer
from runner.learn.tasks.diffusion import (
    context_weights,
    draw_times,
    hide,
    maskable,
    opened,
    runs_of,
)
from runner.learn.tasks.diffusion_config import DiffusionConfig
from runner.learn.trainer import Trainer
from runner.machine.errors import CheckpointError, ConfigError
from runner.machine.ranks import Ranks
from runner.records import checkpoint, checkpoint_folder, journal, metrics
from runner.records.cells import Cell, freeze_cell, make_cells
from tests.folders import llama3
from tests.workers import logged, train_here

CHAIN = torch.tensor([[0.80, 0.15, 0.05], [0.10, 0.70, 0.20], [0.25, 0.25, 0.50]]).double()
LENGTH, ENTROPY = 8, 6.559125 / 8  # nats a token
TOKENIZER = WithTokens(SymbolTokenizer(4), ["<mask>"])  # three states, eos = 3, <mask> = 4


class Posterior(nn.Module):
    """The exact distribution of each state of the chain, given the states that are not hidden."""

    vocab_size = 5

    def __init__(self, *, shift: bool = False) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, tokens: Tensor) -> Tensor:
        seen = nn.functional.one_hot(tokens[:, 1:].clamp(max=2), 3).double()
        seen[tokens[:, 1:] > 2] = 1.0
        forward = [seen[:, 0] / 3]
        for place in range(1, seen.shape[1]):
            forward.append((forward[-1] @ CHAIN) * seen[:, place])
        backward = [torch.ones_like(seen[:, 0])]
        for place in range(seen.shape[1] - 1, 0, -1):
            backward.append((backward[-1] * seen[:, place]) @ CHAIN.T)
        joint = torch.stack(forward, 1) * torch.stack(backward[::-1], 1)
        states = (joint / joint.sum(-1, keepdim=True)).log()
        logits = torch.full((*tokens.shape, 5), -1e3, dtype=torch.float64)
        places = slice(0, -1) if self.shift else slice(1, None)
        logits[:, places, :3] = states.clamp(min=-500)
        return logits


def _samples(count: int, start: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(start)
    states = torch.randint(3, (count, 1), generator=draw)
    for _ in range(LENGTH - 1):
        following = torch.multinomial(CHAIN[states[:, -1]], 1, generator=draw)
        states = torch.cat((states, following), 1)
    tokens = nn.functional.pad(states, (1, 0), value=3)
    targets = nn.functional.pad(states, (0, 1), value=-100)
    return {"tokens": tokens, "targets": targets, "index": torch.arange(start, start + count)}


class Predicts(Posterior):
    """The same in the form that a task calls in training: with targets and weights."""

    def forward(  # type: ignore[override]
        self, tokens: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> Any:
        logits = super().forward(tokens)
        if targets is None:
            return logits
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        nll = nll.view(targets.shape)
        return TokenLoss(total=(weights * nll).sum(), nll=nll)


def _losses(cfg: DiffusionConfig, batch: dict[str, Tensor]) -> Tensor:
    """Return the weighted loss of each sample, nats a token."""
    task = cfg.build(None, TOKENIZER, {})
    noise = NoiseKey(seed=1, step=0, samples=batch["index"])
    hidden = hide(cfg, batch["tokens"], maskable(batch), task.mask, noise)
    out = task.loss(Predicts(shift=cfg.shift), batch, noise)
    nll = out.nll.roll(1, 1) if cfg.shift else out.nll
    assert torch.allclose(out.total.double(), (hidden.weights * nll).sum(), rtol=1e-5)
    weights = hidden.weights
    if cfg.weight == "cart":  # the published value knows no first token
        given = ~hidden.where[:, 1:]
        weights = nn.functional.pad(hidden.where[:, 1:] * context_weights(given, 0.1), (1, 0))
    return (weights * nll).sum(-1) / LENGTH


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.820059),
        ({"min_probability": 0.1}, 0.837276),
        ({"weight": "none"}, 0.443322),
        ({"weight": "linear"}, 0.135427),
        ({"weight": "cart"}, 0.037039),
        ({"shift": True}, 0.820059),
        ({"never_mask": True}, 0.820059),
    ],
)
def test_the_objectives_of_the_exact_model(options: dict[str, Any], expected: float) -> None:
    losses = _losses(DiffusionConfig(**options), _samples(40_000))
    error = float(losses.std()) / math.sqrt(len(losses))
    assert abs(float(losses.mean()) - expected) < 4 * error
    assert error < 0.01 * expected


@pytest.mark.parametrize(("weight", "expected"), [("none", 0.886645), ("cart", 0.074079)])
def test_a_ratio_to_the_number_hidden_hangs_on_the_micro_batch(
    weight: Any, expected: float
) -> None:
    """The loss is divided by the tokens of the whole batch that can be hidden, not so."""
    cfg, batch = DiffusionConfig(weight=weight), _samples(40_000)
    noise = NoiseKey(seed=1, step=0, samples=batch["index"])
    number = hide(cfg, batch["tokens"], maskable(batch), 4, noise).where.sum(-1).double()
    losses = _losses(cfg, batch) * LENGTH
    ratio = float(losses.sum() / number.sum())
    error = float((losses - ratio * number).std() / number.mean()) / math.sqrt(len(losses))
    assert abs(ratio - expected) < 4 * error
    assert error < 0.01 * expected
    of_each = float((losses / number.clamp(min=1)).mean())
    assert abs(of_each - expected) > 10 * error, "micro-batches of one sample"


def test_the_entropy_of_the_chain() -> None:
    states, nats = torch.full((3,), 1 / 3).double(), math.log(3)
    for _ in range(LENGTH - 1):
        nats -= float(states @ (CHAIN * CHAIN.log()).sum(-1))
        states = states @ CHAIN
    assert nats == pytest.approx(ENTROPY * LENGTH, abs=1e-6)
    assert nats / LENGTH == pytest.approx(0.819891, abs=1e-6)


def test_times_shared_out_buy_little_where_the_draw_of_what_is_hidden_dominates() -> None:
    """An estimate of 16 samples spreads by 0.22 nats, twice that of counts (0.11).

    0.2314 is exact, from all texts and all that can be hidden; the others are of 1.3 million
    samples. Tails are heavy: 20,000 estimates know their spread to about 5%.
    """
    batch = _samples(320_000)
    for options, spread in (
        ({}, 0.2314),
        ({"strata": 16}, 0.2269),
        ({"strata": 16, "times": "shifted"}, 0.2165),
    ):
        losses = _losses(DiffusionConfig(**options), batch).view(-1, 16).mean(-1)
        assert float(losses.std()) == pytest.approx(spread, rel=0.1), options


def test_the_loss_of_a_hidden_token_by_how_many_are_hidden() -> None:
    """Of the exact model the bound is tight: the losses of 1 to 8 hidden sum up to the entropy."""
    batch, means = _samples(4_000), []
    for hidden, nats in enumerate(
        [0.6513, 0.6850, 0.7236, 0.7683, 0.8210, 0.8843, 0.9625, 1.0633], start=1
    ):
        draw = torch.Generator().manual_seed(hidden)
        order = torch.rand(4_000, LENGTH, generator=draw).argsort(-1)
        where = nn.functional.pad(order < hidden, (1, 0), value=False)
        tokens = torch.where(where, 4, batch["tokens"])
        chances = Posterior()(tokens).log_softmax(-1).gather(-1, batch["tokens"][..., None])
        losses = -(chances[..., 0] * where).sum(-1) / hidden
        means.append(float(losses.mean()))
        assert means[-1] == pytest.approx(nats, abs=4 * float(losses.std()) / math.sqrt(4_000))
    assert sum(means) == pytest.approx(ENTROPY * LENGTH, rel=0.02)


def test_validation_is_the_entropy_and_its_error_is_that_of_the_draws() -> None:
    batch, model = _samples(4_000), Predicts()
    task = DiffusionConfig(draws=8).build(None, TOKENIZER, {})
    values = task.validate(model, batch)
    bound, tokens = values["val_bound"]
    assert tokens == 4_000 * LENGTH
    text = float(batch_entropy(batch["tokens"][:, 1:])) / LENGTH  # of these texts
    error = math.sqrt(values["val_bound_stderr"][0]) / tokens
    assert abs(bound / tokens - text) < 4 * error
    assert abs(text - ENTROPY) < 0.02
    # The estimate of 16 samples by one draw spreads half as much as that at a random time.
    assert error * math.sqrt(8 * 4_000 / 16) == pytest.approx(0.11, abs=0.02)
    halves = [task.validate(model, {k: v[part] for k, v in batch.items()}) for part in _HALVES]
    assert sum(half["val_bound"][0] for half in halves) == pytest.approx(bound, rel=1e-12)


_HALVES = (slice(0, 1_234), slice(1_234, None))


def batch_entropy(states: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the chain's texts, nats."""
    return math.log(3) - CHAIN.log()[states[:, :-1], states[:, 1:]].sum(-1).mean()


def test_times_are_shared_out_whatever_the_micro_batch() -> None:
    noise = NoiseKey(seed=3, step=5, samples=torch.arange(64))
    for cfg in (DiffusionConfig(strata=16), DiffusionConfig(strata=16, times="shifted")):
        times = draw_times(cfg, noise)
        in_strata = (times.view(4, 16) * 16).floor().sort(-1).values
        assert torch.equal(in_strata, torch.arange(16.0).double().expand(4, 16))
        part = replace(noise, samples=noise.samples[20:30])
        assert torch.equal(draw_times(cfg, part), times[20:30])
    gaps = times[:16].diff() % 1.0
    assert torch.allclose(gaps, torch.full_like(gaps, 1 / 16)), "one draw for all"


def test_the_first_token_and_those_without_a_target_are_never_hidden() -> None:
    batch = _samples(256)
    batch["targets"][:, 2] = -100
    noise = NoiseKey(seed=0, step=0, samples=batch["index"])
    hidden = hide(
        DiffusionConfig(min_probability=0.999), batch["tokens"], maskable(batch), 4, noise
    )
    assert hidden.where.any(0).tolist() == [False, True, True, False, *[True] * 5]
    assert torch.equal(hidden.tokens == 4, hidden.where)


def test_padding_after_the_longest_sample_is_cut_and_the_loss_stays() -> None:
    batch = _samples(16)
    ends = torch.arange(16)[:, None] % 4 + 2  # of the samples; the longest has five tokens
    padding = torch.arange(LENGTH + 1) > ends
    padded = batch | {
        "tokens": batch["tokens"].masked_fill(padding, 3),
        "targets": batch["targets"].masked_fill(padding.roll(-1, 1), -100),
    }
    padded["targets"][:, -1] = -100
    noise = NoiseKey(seed=1, step=0, samples=batch["index"])
    whole = DiffusionConfig().build(None, TOKENIZER, {})
    cuts = DiffusionConfig(cut_padding=True).build(None, TOKENIZER, {})
    assert whole.draw(None, [padded], noise)[0] is padded
    (cut,) = cuts.draw(None, [padded], noise)
    assert cut["tokens"].shape == cut["targets"].shape == (16, 6)
    assert cuts.planned(padded) is padded
    assert int(cuts.count(cut)) == int(whole.count(padded)) == int(ends.sum())
    losses = [task.loss(Predicts(), b, noise).total for task, b in ((whole, padded), (cuts, cut))]
    assert float(losses[0]) > 0
    torch.testing.assert_close(losses[1], losses[0])
    nothing = padded | {"targets": torch.full_like(padded["targets"], -100)}
    assert cuts.draw(None, [nothing], noise)[0]["tokens"].shape == (16, 1)


def test_a_causal_mask_opens_in_steps_and_ends_share_their_fate() -> None:
    noise = NoiseKey(seed=1, step=3, samples=torch.zeros(1, dtype=torch.int64))
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    for share in (0.0, 0.25, 0.5):
        seen = opened(noise, 64, share)
        assert bool(seen[causal].all())
        ahead = float(seen[~causal].double().mean())
        assert abs(ahead - share) < 4 * math.sqrt(0.25 / 2016)
    assert torch.equal(opened(noise, 64, 0.5), opened(noise, 64, 0.5))
    alike = torch.tensor([[False, True, True, False, True, True, True, False]])
    assert runs_of(alike).tolist() == [[0, 1, 1, 3, 4, 4, 4, 7]]
    cfg, tokens = DiffusionConfig(ends_together=True), torch.tensor([[0, 3, 3, 1, 3, 3, 3, 2]])
    many = NoiseKey(seed=0, step=0, samples=torch.arange(200))
    batch = tokens.expand(200, -1)
    hidden = hide(cfg, batch, batch >= 0, 4, many, runs_of(batch == 3)).where
    assert bool((hidden[:, 1] == hidden[:, 2]).all())
    assert bool((hidden[:, 4:7].sum(-1) % 3 == 0).all())
    assert 40 < int((hidden[:, 2] != hidden[:, 4]).sum()) < 120, "runs are hidden apart"


def _fit(node: dict[str, Any]) -> tuple[Cell, Trainer]:
    (cell,) = make_cells([("", node)])
    freeze_cell(cell)
    attempt = journal.claim(cell.folder)
    assert attempt is not None
    writer = journal.Journal(cell.folder, attempt)
    trainer = Trainer(cell, cell.inputs, writer, Ranks("cpu"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    outcome = trainer.fit(lambda: False)
    writer.event(outcome)
    writer.close()
    trainer.model.load_state_dict(before)
    return cell, trainer


def test_a_model_of_next_tokens_goes_on_as_a_diffusion_model(
    compose: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Its weights, a new row for `<mask>`; at first it sees what it saw; its average is bounded."""
    before, trained = _fit(compose("train.steps=4"))
    newest = checkpoint_folder.newest(before.folder / "checkpoints")
    assert newest is not None
    weights = load_file(newest / "model.safetensors")
    diffusion = ["task=diffusion", "model.causal=false", "task.shift=true"]
    start = [f"+inputs.init.runs=[{before.fingerprint}]", "train.average.kind=ema"]
    cell, after = _fit(compose(*diffusion, *start, "task.anneal_steps=1000", "train.steps=4"))
    own = after.model.state_dict()
    embedding = own.pop("embedding.weight")
    assert torch.equal(embedding[:-1], weights.pop("embedding.weight"))
    assert float(embedding[-1].abs().sum()) > 0
    assert all(torch.equal(own[name], weights[name]) for name in weights)
    values = metrics.read(cell.folder)
    assert {"val_bound", "val_bound_stderr", "val_bound_average"} <= {k for v in values for k in v}
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    ours = logits(after.model, tokens, visible=causal)[..., :-1]
    trained.model.load_state_dict(load_file(newest / "model.safetensors"))
    torch.testing.assert_close(ours, logits(trained.model, tokens), rtol=1e-4, atol=1e-5)
    after.model.added_rows = 0
    with pytest.raises(CheckpointError, match="of another model"):
        checkpoint.load_weights(newest, after.model)


@pytest.mark.parametrize(
    "options",
    [["task=diffusion", "task.strata=4", "task.anneal_steps=9"], ["task=diffusion_infill"]],
)
def test_an_interrupted_run_hides_what_it_would_have_hidden(
    compose: Callable[..., dict[str, Any]], tmp_path: Path, options: list[str]
) -> None:
    found = []
    for name, stop in (("whole", None), ("broken", 5)):
        root = f"root={tmp_path / name}"
        (cell,) = make_cells([("", compose(*options, "model.causal=false", root))])
        train_here(cell, stop_after=stop)
        newest = checkpoint_folder.newest(cell.folder / "checkpoints")
        assert newest is not None
        found.append((load_file(newest / "model.safetensors"), logged(cell)))
    (whole, values), (broken, again) = found
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert values == again
    assert len(values) > 20


def test_a_folder_of_next_tokens_starts_a_diffusion_model(
    compose: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = llama3(tmp_path / "llama3")
    named = f"+init=hf:{folder}"
    with pytest.raises(ConfigError, match=r"model\.causal=false"):
        make_cells([("", compose(named, "task=diffusion"))])
    _, trainer = _fit(compose(named, "task=diffusion", "model.causal=false", "train.steps=2"))
    theirs = load_pretrained(folder)
    assert torch.equal(trainer.model.embedding.weight[:-1], theirs.embedding.weight)
    assert not trainer.model.cfg.causal


def test_what_does_not_fit_is_refused() -> None:
    model = DecoderConfig(depth=1, width=8, num_heads=1)
    data, train = SimpleNamespace(), SimpleNamespace(batch_size=16)
    run: Any = SimpleNamespace(model=model, data=data, train=train)
    with pytest.raises(ValueError, match=r"model\.causal=false"):
        DiffusionConfig().check(run)
    run.model = replace(model, causal=False)
    DiffusionConfig(strata=8).check(run)
    with pytest.raises(ValueError, match=r"divide train\.batch_size=16"):
        DiffusionConfig(strata=5).check(run)
    run.data = SimpleNamespace(sequences_per_sample=2)
    with pytest.raises(ValueError, match="task=diffusion learns single sequences"):
        DiffusionConfig().check(run)
    with pytest.raises(ValueError, match="draws=1"):
        DiffusionConfig(draws=1)


def test_the_tokenizer_with_a_mask_survives_a_run_folder() -> None:
    again = loads(TOKENIZER.dumps())
    assert (again.vocab_size, again.eos, token_id(again, "<mask>")) == (5, 3, 4)
    assert again.decode([2, 4, 1]) == " 2 1"
    assert again.bytes_per_id().tolist() == [2, 2, 2, 0, 0]
