"""Generation and evaluation under the recipe of training, by choice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from models.quantised_layer import QuantisedLinear
from runner.commands.cli import app
from runner.generate.sampling import Sampling
from runner.generate.text_generator import TextGenerator
from runner.grid.evaluation_cells import evaluation_cells
from runner.machine.errors import ConfigError
from runner.records.trained_model import load_model
from tests.runner.test_old_cells import lay_out

ROOT = Path(__file__).parents[2] / "fixtures/runs_2026_11/root"
NVFP4, DELAYED = "8db1b39c9b9626ff", "f4bfe4858078a204"


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager references: compiling takes longer than these tests."""
    monkeypatch.setenv("ESPALIER_EAGER_KERNELS", "1")


def _logits(generator: TextGenerator) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = generator.model(torch.arange(12)[None] % 10)
    return logits.float()


def test_a_model_generates_under_the_recipe_of_its_run_and_says_which() -> None:
    plain, trained = (
        TextGenerator(ROOT / "runs" / NVFP4, precision=word) for word in ("weights", "training")
    )
    assert plain.computes == "fp32"
    assert trained.computes.startswith("bf16; nvfp4 1x16 te214 RNE, nvfp4 16x16 te214 RNE in ")
    assert trained.computes.endswith(" of 8 linear layers (emulated on cpu)")
    model, _, _ = load_model(ROOT / "runs" / NVFP4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        bf16 = model(torch.arange(12)[None] % 10).float()
    found = _logits(trained)
    assert not torch.equal(found, bf16)
    assert not torch.equal(found, _logits(plain))
    torch.testing.assert_close(found, bf16, rtol=0.0, atol=0.1)
    assert torch.equal(found, _logits(trained))
    (text,) = trained.generate(["l"], Sampling(max_new_tokens=4, temperature=0.0))
    assert len(text.ids) == 4


def test_scales_of_delayed_scaling_are_those_of_the_checkpoint() -> None:
    generator = TextGenerator(ROOT / "runs" / DELAYED, precision="training")
    layers: list[Any] = [m for m in generator.model.modules() if isinstance(m, QuantisedLinear)]
    assert layers
    assert all(float(layer.delayed.amax[:2].min()) > 0 for layer in layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp4"}, "precision='fp4' is none of: weights, training"),
        ({"precision": "training", "dtype": "bf16"}, "leave dtype=bf16 out"),
        ({"precision": "training", "compiled": True}, "leave --compile out"),
    ],
)
def test_a_precision_that_would_not_count_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextGenerator(ROOT / "runs" / NVFP4, **options)


def test_the_command_says_what_it_computes_in() -> None:
    options = ["--prompt", "l", "--tokens", "2", "--precision", "training", "--root", str(ROOT)]
    result = CliRunner().invoke(app, ["generate", NVFP4, *options])
    assert result.exit_code == 0, result.output
    assert "computed as in training: bf16; nvfp4 1x16" in result.stderr


def test_an_evaluation_in_another_precision_is_a_cell_of_its_own(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "old")

    def cell(*overrides: str) -> Any:
        ((found,), _, _) = evaluation_cells(root, NVFP4, ["tasks=[lambada]", *overrides])
        return found

    as_trained, named, bf16 = cell(), cell("precision=training"), cell("precision=bf16")
    assert as_trained.fingerprint == named.fingerprint
    assert bf16.fingerprint != named.fingerprint
    assert bf16.config.precision.compute == "bf16"
    assert not bf16.config.precision.quantised
    assert named.config.precision.quantised
    with pytest.raises(ConfigError, match="precision=fp4 is none of: training, fp32, bf16"):
        cell("precision=fp4")
