"""Heads ahead: the frozen run stays as it is, they learn, and their text is that of the run."""

from collections.abc import Callable

import pytest
import torch

from models.decoder_config import DecoderConfig
from models.medusa_config import MedusaConfig
from runner.generate.generate import completions, make_engine, requests_of
from runner.generate.sampling import Sampling
from runner.generate.text_generator import TextGenerator
from runner.machine.errors import ConfigError
from runner.records import metrics
from runner.records.cells import Cell, freeze_cell, make_cells
from runner.records.trained_model import load_model
from tests.conftest import compose_tiny, write_text
from tests.workers import train_here

SHAPE = "{_target_: models.decoder_config.DecoderConfig, depth: 2, width: 24, num_heads: 2}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Cell]:
    """Return a run with these overrides."""
    root = tmp_path_factory.mktemp("medusa")
    text = write_text(root / "text.txt")

    def inner(*overrides: str) -> Cell:
        shape = ["train.sequence_length=48", "train.steps=60", "eval.every=20", "optim.lr=1e-2"]
        (cell,) = make_cells([("", compose_tiny(root, text, *shape, *overrides))])
        freeze_cell(cell)
        train_here(cell, stop_after=7 if "task=medusa" in overrides else None)
        return cell

    return inner


def test_heads_learn_on_a_frozen_run_and_draft_for_it(made: Callable[..., Cell]) -> None:
    trunk = made()
    given = f"+inputs.trunk={{runs: [{trunk.fingerprint}]}}"
    heads = made("task=medusa", "model=medusa", f"model.trunk={SHAPE}", given)
    logged = [row for row in metrics.read(heads.folder) if "val_ahead_loss" in row]
    assert logged[-1]["val_ahead_loss"] < logged[0]["val_ahead_loss"] < 6.0
    assert logged[-1]["val_loss"] == metrics.latest(trunk.folder)["val_loss"]
    assert logged[-1]["val_ahead_accuracy_1"] > 1.5 / 257
    frozen, plain = load_model(heads.folder)[0], load_model(trunk.folder)[0]
    for name, weight in plain.state_dict().items():
        assert torch.equal(frozen.trunk.state_dict()[name], weight), name
    prompts = ["line 12: 1", "line", "is the square"]
    for how in (Sampling(max_new_tokens=30, temperature=0.0), Sampling(max_new_tokens=1)):
        drafted = TextGenerator(heads.folder, draft="heads").generate(prompts, how)
        expected = TextGenerator(trunk.folder).generate(prompts, how)
        assert [one.ids for one in drafted] == [one.ids for one in expected]
    generator = TextGenerator(heads.folder, draft="heads")
    about = {"context": 48, "decode": lambda _: "", "ends": (), "rows": 1}
    engine = make_engine(generator.model, draft=generator.draft, **about)
    how = Sampling(max_new_tokens=36, temperature=0.0)
    list(completions(engine, requests_of(engine, [torch.tensor([108, 105])], how)))
    counts = engine.strategy.counts
    assert counts.proposed
    assert counts.accepted > 0
    with pytest.raises(ConfigError, match="Decoder has none; train task=medusa"):
        TextGenerator(trunk.folder, draft="heads")


def test_what_has_no_heads_or_no_trunk_is_refused(made: Callable[..., Cell]) -> None:
    for overrides, message in (
        (["task=medusa"], "use model=medusa"),
        (["task=medusa", "model=medusa"], "name it as the input trunk"),
        (["task=medusa", "model=medusa", "task.decay=0"], "must be above 0"),
    ):
        with pytest.raises((ConfigError, ValueError), match=message):
            made(*overrides)


def test_heads_tell_what_the_trunk_does_at_first() -> None:
    shape = DecoderConfig(depth=1, width=16, num_heads=2)
    cfg = MedusaConfig(trunk=shape, num_heads=2)
    model, tokens = cfg.build(11, 0), torch.arange(6)[None]
    assert cfg.num_parameters(11) == sum(p.numel() for p in model.parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "ahead.0.weight",
        "ahead.1.weight",
    }
    for logits in model(tokens, ahead=True):
        torch.testing.assert_close(logits, model(tokens))
