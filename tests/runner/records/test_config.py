import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext

from runner.commands.composer import Composer, to_plain
from runner.commands.hydra_plugin import GridSweeper, register
from runner.commands.missing_values import refuse_missing_values
from runner.machine.errors import ConfigError
from runner.records.cells import make_cells
from runner.records.config import (
    NODES,
    SETTINGS,
    freeze,
    validate,
)
from tests.conftest import ROOT

Compose = Callable[..., dict[str, Any]]
Run = Callable[..., subprocess.CompletedProcess[str]]
CONF, EXPERIMENTS = ROOT / "conf", ROOT / "experiments"
MODELS = sorted(p.stem for p in (CONF / "model").glob("*.yaml"))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_builds_on_meta(model: str, compose: Compose) -> None:
    cfg = validate(compose(f"model={model}"))
    with torch.device("meta"):
        built = cfg.model.build(257, 0)
    assert sum(p.numel() for p in built.parameters()) == cfg.model.num_parameters(257)


PARTS = sorted(p.stem for p in (CONF / "model/part").glob("*.yaml"))


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_a_branch_by_one_override(part: str, compose: Compose) -> None:
    """Freezing keeps its `_target_`; its class enters the fingerprint, neutral fields do not."""
    node = compose(f"+model/part@model.parts.x={part}", "model.pattern=xf")
    cfg = validate(node)
    with torch.device("meta"):
        built = cfg.model.build(257, 0)
    assert sum(p.numel() for p in built.parameters()) == cfg.model.num_parameters(257)
    frozen = freeze(cfg)
    assert validate(frozen).model == cfg.model
    assert frozen["model"]["parts"]["x"]["_target_"].startswith("models.")
    (cell,) = make_cells([("", node)])
    assert cell.science["model.parts.x.numerics"] == type(cfg.model.parts["x"]).numerics
    with pytest.raises(ConfigError, match=r"model\.parts\.x\.wdow is not a key"):
        validate(compose(f"+model/part@model.parts.x={part}", "+model.parts.x.wdow=3"))


@pytest.mark.parametrize(
    ("kind", "name"),
    sorted(
        (k, p.stem) for k in ("streams", "rounding") for p in (CONF / "model" / k).glob("*.yaml")
    ),
)
def test_every_kind_of_streams_and_of_rounding_is_one_override(
    kind: str, name: str, compose: Compose
) -> None:
    cfg = validate(compose(f"+model/{kind}={name}"))
    with torch.device("meta"):
        built = cfg.model.build(257, 0)
    assert sum(p.numel() for p in built.parameters()) == cfg.model.num_parameters(257)
    assert getattr(cfg.model, kind) is not None
    assert validate(freeze(cfg)).model == cfg.model


NODES_OF = {g.name: sorted(p.stem for p in g.glob("*.yaml")) for g in CONF.iterdir() if g.is_dir()}
NEEDS = {
    "folder": ["tokenizer.path=x"],
    "hub": ["data.sources.0.revision=abc"],
    "conversations": [
        "~data.split",
        "data.sources.0.revision=a",
        "tokenizer=folder",
        "tokenizer.path=x",
    ],
    "diffusion": ["model.causal=false"],
    "diffusion_infill": ["model.causal=false"],
    "people": [
        "~data.split",
        "~data.sources",
        "tokenizer=dialogue",
        "train.sequence_length=160",
    ],
    "make_people": [
        "data=people",
        "~data.split",
        "~data.sources",
        "tokenizer=dialogue",
        "train.sequence_length=160",
    ],
    "preferences": [
        "task=preference",
        "task.loss=simpo",
        "~data.split",
        "data.sources.0.revision=a",
        "data.form=text",
    ],
    "solutions": ["task=verifier", "~data.split", "data.sources.0.revision=a", "data.form=text"],
    "distillation": ["task.teacher=t", "+inputs.t={runs: [a]}"],
    "medusa": ["model=medusa", "task=medusa", "+inputs.trunk={runs: [a]}"],
    "verifier": ["data=solutions", "~data.split", "data.sources.0.revision=a", "data.form=text"],
    "preference": [
        "data=preferences",
        "~data.split",
        "data.sources.0.revision=a",
        "data.form=text",
        "task.loss=simpo",
    ],
    "problems": ["~data.split", "data.sources.0.path=x"],
    "samsum": ["~data.split"],
    "sums": ["~data.split", "~data.sources.0.path"],
    "sst2": ["~data.split", "data.sources.0.path=x.tsv"],
    "sum_pairs": ["~data.sources.0.path"],
    "sudoku": ["~data.sources.0.path"],
    "sum_lines": ["~data.sources.0.path"],
    "recall": ["~data.split", "~data.sources", "tokenizer=symbols", "data.num_pairs=4"],
    "markov": ["~data.split", "~data.sources", "tokenizer=symbols", "tokenizer.vocab_size=32"],
}


@pytest.mark.parametrize(
    ("group", "node"), [(g, n) for g in (*NODES, *SETTINGS) for n in NODES_OF[g]]
)
def test_every_node_validates(group: str, node: str, compose: Compose) -> None:
    cfg = validate(compose(f"{group}={node}", *NEEDS.get(node, [])))
    assert getattr(cfg, group) is not None


@pytest.mark.parametrize(
    ("experiment", "name"), sorted((f.parent.name, f.stem) for f in EXPERIMENTS.glob("*/*.yaml"))
)
def test_every_point_of_every_experiment_builds_on_meta(experiment: str, name: str) -> None:
    register()
    with initialize_config_dir(str(EXPERIMENTS / experiment), version_base="1.3"):
        path = "hydra.searchpath=[pkg://conf]"
        composed = hydra_compose(name, [path], return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        keys = {k: v for k, v in composed.hydra.sweeper.items() if k != "_target_"}
        sweeper = GridSweeper(**keys)
        sweeper.context = HydraContext(loader, Callbacks())
        sweeper.composer = Composer(composed, loader)
        grids = {stage: sweeper.points(grid, []) for stage, grid in sweeper.grids().items()}
        points = [point for some in grids.values() for point in some]
        assert points
        nodes = [sweeper.composer.compose(point)[0] for point in points]
        # Values are set alike in all points; what Hydra alone can do hangs on keys and choices.
        compared: set[str] = set()
        for point, node in zip(points, nodes, strict=True):
            if not compared.issuperset(_keys_and_choices(point)):
                assert node == to_plain(loader.load_sweep_config(composed, point))
                compared.update(_keys_and_choices(point))
        inputs = [_inputs(sweeper, stage) for stage, some in grids.items() for _ in some]
        runs = [validate({**n, "inputs": i}) for n, i in zip(nodes, inputs, strict=True)]
    assert {r.name for r in runs} == {experiment if name == "sweep" else f"{experiment}_{name}"}
    distinct = {repr((r.model, r.optim, r.tokenizer)): r for r in runs if r.model is not None}
    models: dict[str, Any] = {}
    for cfg in distinct.values():
        vocab = cfg.tokenizer.planned_vocab_size() or 100
        key = repr((cfg.model, vocab))
        with torch.device("meta"):
            if key not in models:
                models[key] = cfg.model.build(vocab, cfg.seed)
            assert cfg.optim.build(models[key])
        assert cfg.train.num_steps(cfg.model.num_parameters(vocab), 10**9) >= 0


def _inputs(sweeper: GridSweeper, stage: str) -> dict[str, Any]:
    """Return runs that stand for those of a stage's inputs."""
    given = sweeper.grid.stages[stage].inputs if stage else {}
    return {name: {"runs": ["0" * 16], "all": one.all} for name, one in given.items()}


def _keys_and_choices(point: list[str]) -> list[str]:
    return [o.partition("=")[0] if "." in o.partition("=")[0] else o for o in point]


def test_values_that_a_node_leaves_open_are_named_together(
    compose: Compose,
) -> None:
    open_node = {"data": {"sources": [{"path": "???"}]}, "tokenizer": {"path": "???"}, "name": "x"}
    with pytest.raises(ConfigError) as refused:
        refuse_missing_values(open_node, {"data": "text"})
    assert str(refused.value) == (
        "data.sources.0.path and tokenizer.path must be given with data=text; "
        "add data.sources.0.path=VALUE tokenizer.path=VALUE"
    )
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.path must be given"):
        compose("data=jsonl", "data.sources.0.path='???'")
    with pytest.raises(ConfigError, match="revision is missing for dataset 'some/set': pin it"):
        make_cells([("", compose("data=hub", "data.sources.0.path=some/set"))])


def test_a_model_from_outside_the_clone_needs_no_registration(
    espalier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, conf = tmp_path / "code" / "mylab", tmp_path / "conf" / "model"
    package.mkdir(parents=True)
    conf.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "bigram.py").write_text(
        "from models.config import config\n"
        "from models.decoder import DecoderConfig\n"
        "@config\n"
        "class BigramConfig(DecoderConfig):\n"
        "    depth: int = 1\n"
        "    width: int = 8\n"
        "    num_heads: int = 1\n"
        "    charm: float = 1.0\n"
    )
    (conf / "bigram.yaml").write_text("_target_: mylab.bigram.BigramConfig\ncharm: 2.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    path = f"hydra.searchpath=[file://{conf.parent}]"
    done = espalier("-m", path, "model=bigram", "model.charm=3,4", "name=out")
    assert done.returncode == 0, done.stderr
    cells = [json.loads(f.read_text()) for f in tmp_path.glob("runs/*/cell.json")]
    assert sorted(c["science"]["model.charm"] for c in cells) == [3.0, 4.0]
    refused = espalier("-m", path, "model=bigram", "model.chram=3")
    assert "model.chram is not a key; did you mean charm?" in refused.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.widht=3", ["model.widht", "did you mean width"]),
        ("train.steps=many", ["train.steps='many'", "integer"]),
        ("precision.compute=fp7", ["precision.compute='fp7'", "'fp32' or 'bf16'"]),
        ("train.micro_batch=3", ["train.batch_size=4", "micro-batches of 3", "train.micro_batch"]),
        ("train.tokens=100", ["train.steps=12", "train.tokens=100"]),
        ("model.num_heads=7", ["width=24", "num_heads=7"]),
        ("seed=one", ["seed='one'"]),
    ],
)
def test_mistakes_are_refused_with_key_value_and_choices(
    override: str, words: list[str], compose: Compose
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(compose(override))
    for word in words:
        assert word in str(caught.value)
