"""Answers to learn from: rows of each layout, what is learnt, what is refused or dropped."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from runner.data.judged_answer_rows import Answer
from runner.data.judged_answers import AnswerRenderer, prepare
from runner.data.judged_answers_config import (
    PreferencesConfig,
    PreferenceSource,
    SolutionsConfig,
    SolutionSource,
)
from runner.data.tokenizers_config import TokenizerConfig
from runner.machine.errors import ConfigError, DataError
from tests.folders import CHATML, chat_folder

SHARED = Path(__file__).parents[4] / "shared/data"
RASBT = SHARED / "preference_rasbt/instruction-data-with-preference.json"
HH = SHARED / "hh-rlhf/harmless-base.test.jsonl.gz"
BYTES = TokenizerConfig()


def _write(file: Path, *rows: Any) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def _said(*turns: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(turns)
    return [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]


LAYOUTS: list[tuple[Any, dict[str, Any]]] = [
    ("pairs", {"prompt": "Hi.\n\nYou.", "chosen": "Yes", "rejected": "No"}),
    ("pairs", {"prompt": _said("Hi.\n\nYou."), "chosen": "Yes", "rejected": _said("", "No")[1:]}),
    ("pairs", {"chosen": _said("Hi.\n\nYou.", "Yes"), "rejected": _said("Hi.\n\nYou.", "No")}),
    (
        "pairs",
        {"prompt": "Hi.\n\nYou.", "chosen": _said("Hi.\n\nYou.", "Yes"), "rejected": "No"},
    ),
    ("alpaca", {"instruction": "Hi.", "input": "You.", "chosen": "Yes", "rejected": "No"}),
    (
        "hh",
        {
            "chosen": "\n\nHuman: Hi.\n\nYou.\n\nAssistant: Yes",
            "rejected": "\n\nHuman: Hi.\n\nYou.\n\nAssistant: No",
        },
    ),
]


def test_every_layout_and_file_is_the_same_pair(tmp_path: Path) -> None:
    for number, (layout, row) in enumerate(LAYOUTS):
        lines = _write(tmp_path / f"{number}.jsonl", row)
        packed = tmp_path / f"{number}.jsonl.gz"
        packed.write_bytes(gzip.compress(json.dumps(row).encode()))
        listed = tmp_path / f"{number}.json"
        listed.write_text(json.dumps([row]))
        files = [lines, str(packed), str(listed)]
        if number in (0, 2):
            hub = tmp_path / f"hub{number}"
            hub.mkdir()
            pd.DataFrame([row]).to_parquet(hub / "a.parquet")
            files += [str(hub), str(hub / "a.parquet")]
        for path in files:
            ((chosen, rejected),) = PreferenceSource(path=path, layout=layout).examples()
            assert chosen.prompt == rejected.prompt == tuple(_said("Hi.\n\nYou."))
            assert (chosen.text, rejected.text) == ("Yes", "No")


BAD: list[tuple[Any, Any, str]] = [
    ("pairs", {"prompt": "a", "chosen": "b", "rejected": "b"}, "are equal, nothing can be learnt"),
    ("pairs", {"prompt": "a", "chosen": None, "rejected": "b"}, "chosen.* is null, not text"),
    ("pairs", {"prompt": None, "chosen": "a", "rejected": "b"}, "prompt.* is null, not text"),
    ("pairs", {"prompt": "a", "chosen": " ", "rejected": "b"}, "the answer is empty"),
    ("pairs", {"prompt": "a", "chosen": "b"}, "has no 'rejected'; it has prompt, chosen"),
    ("pairs", {"chosen": "a", "rejected": "b"}, "without a `prompt`, chosen and rejected must"),
    (
        "pairs",
        {"chosen": _said("a", "b"), "rejected": _said("c", "d")},
        "without a `prompt`, chosen and rejected must",
    ),
    ("pairs", {"prompt": _said("a", "b"), "chosen": "c", "rejected": "d"}, "roles out of order"),
    ("pairs", {"prompt": "a", "chosen": _said("b"), "rejected": "c"}, "one answer of the assist"),
    ("hh", {"chosen": "a", "rejected": "b"}, "is no transcript of Human: and Assistant:"),
    ("alpaca", ["a"], "is no JSON object; layout=alpaca needs one"),
    ("labelled", {"prompt": "a", "answer": "b", "label": "good"}, "label='good' is unknown; give"),
    ("labelled", {"prompt": "a", "answer": "b", "label": None}, "label=None is unknown; give true"),
    ("labelled", {"prompt": "a", "answer": "b", "label": 2}, "label=2 is unknown; give true"),
    ("labelled", {"prompt": "a", "answer": "b"}, "has no 'label'; it has prompt, answer"),
    ("labelled", {"prompt": "a", "answer": None, "label": 1}, "answer.* is null, not text"),
    ("steps", {"prompt": "a", "steps": ["b", "c"], "labels": [1]}, "2 steps, 1 labels"),
    ("steps", {"prompt": "a", "steps": ["b", " "], "labels": [1, 0]}, "a step is empty"),
    ("steps", {"prompt": "a", "steps": "b", "labels": [1]}, "steps must be a list"),
]
GOOD = {
    "pairs": LAYOUTS[0][1],
    "hh": LAYOUTS[-1][1],
    "alpaca": LAYOUTS[4][1],
    "labelled": {"prompt": "a", "answer": "b", "label": True},
    "steps": {"prompt": "a", "steps": ["b"], "labels": [0.5]},
}


@pytest.mark.parametrize(("layout", "row", "message"), BAD, ids=[m[:25] for _, _, m in BAD])
def test_bad_rows_are_named_by_file_and_line_or_dropped(
    layout: Any, row: Any, message: str, tmp_path: Path
) -> None:
    kind: Any = SolutionSource if layout in ("labelled", "steps") else PreferenceSource
    path = _write(tmp_path / "bad.jsonl", GOOD[layout], row)
    with pytest.raises(DataError, match=rf"bad.jsonl, line 2.*{message}"):
        list(kind(path=path, layout=layout).examples())
    alone = _write(tmp_path / "alone.jsonl", row)
    data: Any = SolutionsConfig if kind is SolutionSource else PreferencesConfig
    with pytest.raises(ValueError, match=rf"alone.jsonl, line 1.*{message}"):  # before the run
        data(sources=(kind(path=alone, layout=layout),), form="text").check(BYTES, 16)
    kept = list(kind(path=path, layout=layout, unusable="drop").examples())
    assert [one is None for one in kept] == [False, True]
    with pytest.raises(DataError, match=r"alone.jsonl: no row can be used; of the last: "):
        list(kind(path=alone, layout=layout, unusable="drop").examples())


def test_an_answer_and_its_end_are_learnt_step_by_step(tmp_path: Path) -> None:
    answer = Answer("here", tuple(_said("2+2+1?")), ("2+2=4", " 4+1=5 ", "5"), (1.0, 0.5, 0.0))
    folder = chat_folder(tmp_path / "chat")
    chat = TokenizerConfig(kind="folder", path=str(folder), eos_token="<|im_end|>").build(())
    for tokenizer, form in ((BYTES.build(()), "text"), (chat, "chat")):
        rendered = AnswerRenderer(tokenizer, form).render(answer)
        ids, ends = rendered.ids, np.flatnonzero(rendered.step_ends)
        start = int(np.flatnonzero(rendered.learnt)[0])
        assert rendered.learnt[start:].all()
        assert "2+2+1?" in tokenizer.decode(ids[:start].tolist())
        assert ends[-1] == len(ids) - 1
        assert ids[-1] == tokenizer.eos
        texts = [
            tokenizer.decode(ids[a:b].tolist())
            for a, b in zip([start, *(ends[:-1] + 1)], ends + 1, strict=True)
        ]
        assert "".join(texts).startswith("2+2=4\n 4+1=5 \n5")
        assert texts[1] == " 4+1=5 \n"
        assert (rendered.labels[:start] == -1).all()
        assert [float(rendered.labels[end]) for end in ends] == [1.0, 0.5, 0.0]
    assert "<|im_start|>assistant\n" in chat._inner.decode(ids[:start].tolist(), False)
    several = Answer("here", tuple(_said("a", "b", "c")), ("d",))
    with pytest.raises(DataError, match=r"here: the prompt is a conversation .*data.form=chat"):
        AnswerRenderer(BYTES.build(()), "text").render(several)
    learnt = AnswerRenderer(chat, "chat").render(several)
    assert chat.decode(learnt.ids[learnt.learnt].tolist()) == "d"  # "b" is a part of the prompt


def test_answers_that_a_template_makes_equal_are_named_or_dropped(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "chat", CHATML.replace("m.content", "m.content | trim"))
    trims = TokenizerConfig(kind="folder", path=str(folder), eos_token="<|im_end|>")
    rows = [{"prompt": f"{i}?", "chosen": "Yes", "rejected": "No"} for i in range(20)]
    path = _write(tmp_path / "a.jsonl", *rows, {"prompt": "a", "chosen": "b", "rejected": " b "})
    source = PreferenceSource(path=path)
    data = PreferencesConfig(sources=(source,), val_fraction=0.3)
    with pytest.raises(DataError, match=r"a.jsonl, line 21: .* have the same tokens"):
        prepare(data, trims, tmp_path / "cache")
    data = PreferencesConfig(sources=(replace(source, unusable="drop"),), val_fraction=0.3)
    counts = prepare(data, trims, tmp_path / "cache").statistics(64)
    assert counts["train_examples"] + counts["val_examples"] == 20
    assert counts["train_dropped"] == 1
    with pytest.raises(ConfigError, match="has no chat template"):
        AnswerRenderer(BYTES.build(()), "chat")


def test_samples_hold_both_answers_and_no_half_ones(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Say {i}.", "chosen": f"{i}" * (1 + i % 5), "rejected": "no"} for i in range(60)
    ]
    rows += [{"prompt": "Long?", "chosen": "very " * 9, "rejected": "no"}]
    rows += [{"prompt": "Same?", "chosen": "no", "rejected": "no"}]
    path = _write(tmp_path / "a.jsonl", *rows)
    source = PreferenceSource(path=path, unusable="drop")
    data = PreferencesConfig(sources=(source,), form="text", val_fraction=0.2)
    corpus = prepare(data, BYTES, tmp_path / "cache")
    counts = corpus.statistics(24)
    assert counts["train_examples"] + counts["val_examples"] == 61
    assert counts["train_too_long"] + counts["val_too_long"] == 1
    assert counts["train_dropped"] == 1
    samples, number = corpus.samples(24, seed=1), int(counts["train_examples"])
    seen = set()
    for index in range(number - int(counts["train_too_long"])):
        sample = samples[index]
        assert sample["tokens"].shape == sample["targets"].shape == (2, 24)
        for side, (tokens, targets) in enumerate(
            zip(sample["tokens"], sample["targets"], strict=True)
        ):
            at = np.flatnonzero(targets >= 0)
            assert (tokens[at + 1] == targets[at]).all()
            assert targets[at[-1]] == corpus.tokenizer.eos
            text = corpus.tokenizer.decode(targets[at].tolist())
            assert (text == "no") == (side == 1)
        seen.add(corpus.tokenizer.decode(sample["tokens"][0].tolist()))
    assert len(seen) == number - counts["train_too_long"]
    held_out = list(corpus.held_out(24, 4, 10_000))
    assert sum(len(batch["tokens"]) for batch in held_out) == 61 - number - counts["val_too_long"]
    with pytest.raises(DataError, match=r"of the train split fits into 4 tokens.*sequence_length"):
        corpus.samples(4, seed=0)
    judged = SolutionsConfig(
        sources=(SolutionSource(path=_write(tmp_path / "b.jsonl", *[GOOD["labelled"]] * 2)),),
        form="text",
        val_fraction=0.5,
    )
    with pytest.raises(DataError, match=r"the (train|val) split has no example"):
        prepare(judged, BYTES, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"tokenizer.kind=bytes has none; .*data.form=text"):
        PreferencesConfig(sources=(source,)).check(BYTES, 16)
    with pytest.raises(ValueError, match=r"tokenizer.kind=char is made from text.*tokenizer=bytes"):
        data.check(TokenizerConfig(kind="char"), 16)


@pytest.mark.skipif(not RASBT.exists(), reason=f"{RASBT} is not there")
def test_published_preferences_are_read_and_their_equal_pairs_named() -> None:
    pairs = list(PreferenceSource(path=str(RASBT), layout="alpaca", unusable="drop").examples())
    assert (len(pairs), pairs.count(None)) == (1100, 6)
    with pytest.raises(DataError, match=r"preference.json.*chosen and rejected are equal"):
        list(PreferenceSource(path=str(RASBT), layout="alpaca").examples())


@pytest.mark.skipif(not HH.exists(), reason=f"{HH} is not there")
def test_transcripts_of_hh_are_read() -> None:
    pairs = list(PreferenceSource(path=str(HH), layout="hh", unusable="drop").examples())
    assert len(pairs) == 2312
    assert pairs.count(None) < 30
