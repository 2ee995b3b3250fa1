from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.config import freeze, validate
from runner.errors import ConfigError, EspalierError
from runner.sweep.fingerprint import fingerprint, is_execution, science

Compose = Callable[..., dict[str, Any]]
CONF = Path(__file__).parent.parent.parent / "conf"
MODELS = sorted(p.stem for p in (CONF / "model").glob("*.yaml"))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_builds_on_meta(model: str, compose: Compose) -> None:
    cfg = validate(compose(f"model={model}"))
    with torch.device("meta"):
        built = cfg.model.build(257, 0)
    assert sum(p.numel() for p in built.parameters()) == cfg.model.num_parameters(257)


@pytest.mark.parametrize("group", ["precision", "optim", "schedule", "tokenizer", "task", "train", "eval"])  # fmt: skip
def test_every_node_validates(group: str, compose: Compose) -> None:
    for node in sorted(p.stem for p in (CONF / group).glob("*.yaml")):
        extra = ["tokenizer.path=x"] if node == "folder" else []
        validate(compose(f"{group}={node}", *extra))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.widht=3", ["model.widht", "did you mean width"]),
        ("train.steps=many", ["train.steps='many'", "integer"]),
        ("precision.compute=fp7", ["precision.compute='fp7'", "'fp32' or 'bf16'"]),
        ("train.micro_batch=3", ["train.batch_size=4", "train.micro_batch=3"]),
        ("train.tokens=100", ["train.steps=12", "train.tokens=100"]),
        ("model.num_heads=7", ["width=24", "num_heads=7"]),
        ("seed=one", ["seed='one'"]),
    ],
)
def test_mistakes_are_refused_with_key_value_and_choices(override: str, words: list[str], compose: Compose) -> None:  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        validate(compose(override))
    for word in words:
        assert word in str(caught.value)


def test_freezing_and_validating_again_changes_nothing(compose: Compose) -> None:
    cfg = validate(compose())
    assert validate(freeze(cfg)) == cfg


def test_one_value_spelt_twice_is_one_cell(compose: Compose) -> None:
    same = {fingerprint(validate(compose(f"optim.lr={v}"))) for v in ("1e-3", "0.001")}
    same |= {fingerprint(validate(compose("optim.lr=1e-3", "train.steps=1.2e1")))}
    assert len(same) == 1


def test_execution_keys_do_not_count_and_science_keys_do(compose: Compose) -> None:
    base = fingerprint(validate(compose()))
    for override in ("train.micro_batch=2", "data.num_workers=2", "name=x", "train.checkpoint.keep_last=5"):  # fmt: skip
        assert fingerprint(validate(compose(override))) == base
    for override in ("seed=1", "optim.lr=1e-4", "model.dropout=0.1", "precision=bf16", "eval.every=5"):  # fmt: skip
        assert fingerprint(validate(compose(override))) != base
    assert not any(is_execution(k) for k in science(validate(compose())))


def test_fingerprint_follows_the_text_not_its_path(compose: Compose, text: Path) -> None:
    base = fingerprint(validate(compose()))
    moved = text.with_name("moved.txt")
    moved.write_bytes(text.read_bytes())
    assert fingerprint(validate(compose(f"data.sources.0.path={moved}"))) == base
    moved.write_text("other text " * 500)
    assert fingerprint(validate(compose(f"data.sources.0.path={moved}"))) != base


def test_a_missing_file_is_named(compose: Compose) -> None:
    with pytest.raises(EspalierError, match=r"nowhere\.txt does not exist"):
        fingerprint(validate(compose("data.sources.0.path=nowhere.txt")))
