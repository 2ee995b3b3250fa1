"""What a cell is named by: values however they are spelt, texts wherever they lie, and no more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.config import plain
from runner.data.conversations_config import ConversationsConfig, ConversationSource
from runner.machine.errors import ConfigError, EspalierError
from runner.records.cells import Cell, make_cells
from runner.records.config import (
    execution_half,
    flatten,
    freeze,
    is_among,
    set_key,
    validate,
)
from runner.records.fingerprint import contents_of, earlier_fingerprint, science
from tests.folders import CHATML, chat_folder

Compose = Callable[..., dict[str, Any]]


def _cell(node: dict[str, Any]) -> Cell:
    return make_cells([("", node)])[0]


def test_a_decoder_without_parts_has_the_fingerprint_it_had_before_there_were_any(
    compose: Compose,
) -> None:
    keys = _cell(compose()).science
    assert not [
        key
        for key in keys
        if key.startswith(("model.parts", "model.pattern", "model.streams", "model.causal"))
    ]
    letters = {"x": {"_target_": "models.attention_config.AttentionConfig", "window": 7}}
    plain = compose()
    plain["model"] |= {"parts": letters, "pattern": "xf"}
    other = compose()
    other["model"] |= {"parts": {"x": letters["x"] | {"window": 8}}, "pattern": "xf"}
    assert len({_cell(node).fingerprint for node in (compose(), plain, other)}) == 3


def test_renamed_and_later_fields_keep_old_fingerprints(
    compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = _cell(compose())
    assert not any(k.startswith("train.average") for k in cell.science)  # neutral: added later
    changed = _cell(compose("train.average.kind=ema"))
    assert changed.fingerprint != cell.fingerprint
    assert changed.science["train.average.kind"] == "ema"
    # As if model.depth had been called model.layers when the cells were made ...
    then = {("model.layers" if k == "model.depth" else k): v for k, v in cell.science.items()}
    monkeypatch.setattr("runner.records.fingerprint.RENAMES", {"model.depth": "model.layers"})
    assert _cell(compose()).science == then
    # ... and a raised revision of the numerics does count.
    monkeypatch.setattr("runner.records.fingerprint.RENAMES", {})
    monkeypatch.setattr(type(cell.config.model), "numerics", 99)
    assert _cell(compose()).fingerprint != cell.fingerprint


def test_freezing_and_validating_again_changes_nothing(compose: Compose) -> None:
    cfg = validate(compose())
    assert validate(freeze(cfg)) == cfg


def test_one_value_spelt_twice_is_one_cell(compose: Compose) -> None:
    same = {_cell(compose(f"optim.lr={v}")).fingerprint for v in ("1e-3", "0.001")}
    same |= {_cell(compose("optim.lr=1e-3", "train.steps=1.2e1")).fingerprint}
    assert len(same) == 1


def test_execution_keys_do_not_count_and_science_keys_do(compose: Compose) -> None:
    base = _cell(compose()).fingerprint
    for override in (
        "train.micro_batch=2",
        "data.num_workers=2",
        "name=x",
        "train.checkpoint.keep_last=5",
    ):
        assert _cell(compose(override)).fingerprint == base
    for override in (
        "seed=1",
        "optim.lr=1e-4",
        "model.dropout=0.1",
        "precision=bf16",
        "eval.every=5",
    ):
        assert _cell(compose(override)).fingerprint != base
    half = execution_half(compose())
    assert not any(is_among(k, half) for k in _cell(compose()).science)


def test_every_field_is_one_of_the_two_halves(compose: Compose) -> None:
    """Changing a field changes the fingerprint unless the field is declared as execution."""
    for choice in ("model=gpt_nano", "model=hybrid", "optim=muon", "precision=nvfp4"):
        run = validate(compose(choice))
        execution, contents = execution_half(freeze(run)), contents_of(run)
        before = science(run, contents)
        hashed = {k.rpartition(".")[0] if k.endswith(".content") else k for k in before}
        for key, value in flatten(freeze(run)).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            # The first count with benchmarks (test_harness.py), the others for some models (below).
            counts_for_some = ("eval.batch_size", "train.micro_batch", "resources.nodes")
            if key.startswith("eval.harness.") or key in counts_for_some:
                continue
            changed = freeze(run)
            set_key(changed, key, value + 1)
            try:
                after = science(validate(changed), contents)
            except ConfigError:  # no valid value: nothing to tell
                continue
            assert (after != before) is not is_among(key, execution), key
        assert not any(is_among(key, execution) for key in hashed - {"train.samples_per_forward"})


COUPLED = [
    "model.pattern=xm",
    "+model/part@model.parts.m=experts",
    "+model/part@model.parts.x=window",
]


UNBALANCED = [*COUPLED, "model.parts.m.balance=none"]


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        ([], False),
        (["precision=mxfp8"], True),
        (["precision=fp8_current"], True),
        (["precision=nvfp4"], True),
        (["precision=mxfp8", "train.sequence_length=32"], False),
        (COUPLED, True),
        (UNBALANCED, False),
        ([*UNBALANCED, "precision=mxfp4", "train.sequence_length=32"], True),
    ],
)
def test_samples_of_a_forward_pass_count_where_they_depend_on_each_other(
    model: list[str], counts: bool, compose: Compose
) -> None:
    """MXFP8's blocks of 32 tokens in wgrad reach over sequences of 16, not over those of 32.

    Those of an expert reach over all samples, since its tokens are of all.
    """
    base = _cell(compose(*model))
    halved = _cell(compose(*model, "train.micro_batch=2"))
    ranks = _cell(compose(*model, "resources.processes=2"))
    evaluated = _cell(compose(*model, "eval.batch_size=8"))
    assert (halved.fingerprint != base.fingerprint) is counts
    assert (ranks.fingerprint == halved.fingerprint) is True
    assert (evaluated.fingerprint != base.fingerprint) is counts
    assert earlier_fingerprint(base.science) is None
    assert earlier_fingerprint(halved.science) == (base.fingerprint if counts else None)


def test_fingerprint_follows_the_text_not_its_path(compose: Compose, text: Path) -> None:
    base = _cell(compose()).fingerprint
    moved = text.with_name("moved.txt")
    moved.write_bytes(text.read_bytes())
    assert _cell(compose(f"data.sources.0.path={moved}")).fingerprint == base
    moved.write_text("other text " * 500)
    assert _cell(compose(f"data.sources.0.path={moved}")).fingerprint != base


def test_a_missing_file_is_named(compose: Compose) -> None:
    with pytest.raises(EspalierError, match=r"nowhere\.txt does not exist"):
        _cell(compose("data.sources.0.path=nowhere.txt"))


def test_a_chat_template_counts_where_the_data_read_one(compose: Compose, tmp_path: Path) -> None:
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    source = ConversationSource(path=str(rows), layout="alpaca")
    data = plain(ConversationsConfig(sources=(source,)), target=True)
    found = []
    for template in (CHATML, CHATML + " "):
        text = compose(f"init=hf:{chat_folder(tmp_path / 'folder', template)}")
        found.append([_cell(node).fingerprint for node in (text | {"data": data}, text)])
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]
