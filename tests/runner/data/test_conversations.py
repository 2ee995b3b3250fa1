"""Conversations: what is learnt, how it is packed, what is refused."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from models.config import plain
from runner.data.conversation_rows import conversations
from runner.data.conversations import Renderer, best_fit, prepare
from runner.data.conversations_config import ConversationsConfig, ConversationSource
from runner.data.dialogue_format import dialogue_format
from runner.data.tokenizers import SubwordTokenizer, Tokenizer
from runner.data.tokenizers_config import TokenizerConfig
from runner.learn.trainer import Trainer
from runner.machine import storage
from runner.machine.errors import ConfigError, DataError
from runner.machine.ranks import Ranks
from runner.records import checkpoint_folder, journal
from runner.records.cells import freeze_cell, make_cells
from tests.folders import CHATML, chat_folder, llama2

Compose = Callable[..., dict[str, Any]]
GSM8K = Path(__file__).parents[4] / "shared/data/gsm8k/test.jsonl"


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    folder = chat_folder(tmp_path_factory.mktemp("chatml"))
    return TokenizerConfig(kind="folder", path=str(folder), eos_token="<|im_end|>")


def _rows(file: Path, *rows: Any, layout: Any = "messages", **more: Any) -> ConversationSource:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ConversationSource(path=str(file), layout=layout, **more)


def _chat(*said: str, system: str | None = None) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(said)
    turns = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
    return {"messages": [{"role": "system", "content": system}][: system is not None] + turns}


def _learnt(tokenizer: Tokenizer, source: ConversationSource) -> list[list[str]]:
    """Return the learnt stretches of each conversation as text, special tokens included."""
    result, inner = [], tokenizer._inner
    for one in conversations(source):
        rendered = Renderer(tokenizer).render(one)
        borders = np.flatnonzero(np.diff(rendered.learnt.astype(int))) + 1
        parts = zip(
            np.split(rendered.ids, borders), np.split(rendered.learnt, borders), strict=True
        )
        result.append(
            [inner.decode(i.tolist(), skip_special_tokens=False) for i, m in parts if m[0]]
        )
    return result


def test_answers_and_their_ends_are_learnt_and_nothing_else(
    chatml: TokenizerConfig, tmp_path: Path
) -> None:
    tokenizer = chatml.build(())
    said = _chat("Hi", "Hello you.", "And?", " Über 日本\n\n  all.", system="Be odd.")
    source = _rows(tmp_path / "a.jsonl", said, _chat("x", "y"))
    assert _learnt(tokenizer, source) == [
        ["Hello you.<|im_end|>", " Über 日本\n\n  all.<|im_end|>"],
        ["y<|im_end|>"],
    ]
    theirs = AutoTokenizer.from_pretrained(str(chatml.path))
    for one in conversations(source):
        messages = [dict(message) for message in one.messages]
        whole = theirs.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ours = Renderer(tokenizer).render(one)
        assert ours.ids.tolist() == whole["input_ids"][: len(ours.ids)]
        answers = [i for i, m in enumerate(whole["assistant_masks"]) if m]
        assert np.flatnonzero(ours.learnt).tolist() == [
            i for i in answers if ours.learnt[min(i, len(ours.ids) - 1)]
        ]


def test_other_roles_are_learnt_by_choice_and_given_stretches_are_told_apart(
    chatml: TokenizerConfig, tmp_path: Path
) -> None:
    tokenizer = chatml.build(())
    said = _chat("Where is it?", "<find> it", "Over there.", system="Be odd.")
    said["messages"][3]["role"] = "tool"
    said["messages"].append({"role": "assistant", "content": "It is over there."})
    source = _rows(tmp_path / "a.jsonl", *[said] * 40)
    (one, *_) = conversations(source)
    parts = {}
    for roles in (["tool"], ["user", "assistant"], ["system"]):
        rendered = Renderer(tokenizer, roles).render(one)
        ids = rendered.ids[rendered.learnt].tolist()
        parts[tuple(roles)] = tokenizer._inner.decode(ids, skip_special_tokens=False)
    assert parts["tool",] == "Over there.<|im_end|>"
    assert parts["system",] == "Be odd.<|im_end|>"
    ends = [f"{text}<|im_end|>" for text in ("Where is it?", "<find> it", "It is over there.")]
    assert parts["user", "assistant"] == "".join(ends)
    with pytest.raises(ValueError, match="cannot be learnt"):
        ConversationsConfig(sources=(source,), loss_on=("user",), bidirectional_prompt=True)
    data = ConversationsConfig(sources=(source,), val_fraction=0.5, bidirectional_prompt=True)
    # Equal conversations are held out together.
    changed = _rows(tmp_path / "b.jsonl", *[_chat(f"Say {n}.", "No.") for n in range(20)])
    corpus = prepare(replace(data, sources=(changed,)), chatml, tmp_path / "cache")
    sample = corpus.samples(512, 0)[0]
    spans, targets = sample["spans"].tolist(), sample["targets"].tolist()
    assert max(spans) > 1  # a stretch for each conversation of the window
    learnt = [
        i
        for i, t in enumerate(targets[:-1])
        if t >= 0 and sample["documents"][i + 1] == sample["documents"][i]
    ]
    assert all(spans[i + 1] == 0 for i in learnt)


def test_marks_for_roles_need_no_template(tmp_path: Path) -> None:
    """A model is trained from nothing on dialogues; the mask is that of the tokenizer's marks."""
    dialogue = TokenizerConfig(kind="dialogue")
    said = [_chat(f"Say {n}.", f"<<{n}+1={n + 1}>>It is {n}.") for n in range(20)]
    data = ConversationsConfig(sources=(_rows(tmp_path / "a.jsonl", *said),), val_fraction=0.5)
    data.check(dialogue, 64)
    corpus = prepare(data, dialogue, tmp_path / "cache")
    user, assistant = (corpus.tokenizer.token_ids[name] for name in ("<user>", "<assistant>"))
    found = set()
    for split in (corpus.train, corpus.val):
        for start, end in pairwise(split.starts):
            ids, learnt = split.ids[start:end], split.learnt[start:end]
            assert [i for i in ids if i > 255] == [user, assistant, corpus.tokenizer.eos]
            answer = corpus.tokenizer.decode(ids[ids.tolist().index(assistant) :])
            assert corpus.tokenizer.decode(ids[learnt]) == answer
            assert learnt.tolist() == [False] * int((~learnt).sum()) + [True] * int(learnt.sum())
            assert learnt[-1]
            found.add(answer)
    assert found == {chat["messages"][1]["content"] for chat in said}
    calls = dialogue_format(corpus.tokenizer).render(said[7]["messages"], calls=True)
    assert corpus.tokenizer.decode(calls[0][calls[1]]) == "<<7+1=It is 7."
    odd = ConversationsConfig(sources=(_rows(tmp_path / "b.jsonl", _chat("a", "b", system="c")),))
    with pytest.raises(DataError, match=r"line 1: tokenizer=dialogue has no mark for role=system"):
        prepare(odd, dialogue, tmp_path / "cache")


def test_a_field_that_is_missing_is_refused_before_the_run(
    chatml: TokenizerConfig, tmp_path: Path
) -> None:
    source = _rows(tmp_path / "a.jsonl", {"question": "1 + 1?", "reply": "2"}, layout="gsm8k")
    with pytest.raises(ValueError, match=r"line 1.* has no 'answer'"):
        ConversationsConfig(sources=(source,)).check(chatml, 64)
    unknown = ConversationSource(path="input:made/train.jsonl")  # nobody has made it yet
    ConversationsConfig(sources=(unknown,)).check(chatml, 64)


def test_every_layout_is_the_same_conversation(chatml: TokenizerConfig, tmp_path: Path) -> None:
    tokenizer = chatml.build(())
    rows: list[tuple[Any, dict[str, Any]]] = [
        ("messages", _chat("Name a cat.\n\nA black one.", "Tom")),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "Name a cat.\n\nA black one."},
                    {"from": "gpt", "value": "Tom"},
                ]
            },
        ),
        ("alpaca", {"instruction": "Name a cat.", "input": "A black one.", "output": "Tom"}),
        ("gsm8k", {"question": "Name a cat.\n\nA black one.", "answer": "Tom"}),
    ]
    rendered = []
    for layout, row in rows:
        (one,) = conversations(_rows(tmp_path / f"{layout}.jsonl", row, layout=layout))
        rendered.append(Renderer(tokenizer).render(one).ids.tolist())
        (tmp_path / "list.json").write_text(json.dumps([row]))
        listed = ConversationSource(path=str(tmp_path / "list.json"), layout=layout)
        packed = tmp_path / f"{layout}.jsonl.gz"
        packed.write_bytes(gzip.compress(json.dumps(row).encode()))
        for source in (listed, ConversationSource(path=str(packed), layout=layout)):
            assert [c.messages for c in conversations(source)] == [one.messages]
    assert all(ids == rendered[0] for ids in rendered)
    hub = tmp_path / "hub"
    hub.mkdir()
    import pandas as pd

    pd.DataFrame([rows[2][1]]).to_parquet(hub / "a.parquet")
    for path in (hub, hub / "a.parquet"):
        (one,) = conversations(ConversationSource(path=str(path), layout="alpaca"))
        assert one.messages[1]["content"] == "Tom"


def test_what_a_calculator_answers_is_not_learnt(chatml: TokenizerConfig, tmp_path: Path) -> None:
    row = {"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24.\n#### 24"}
    tokenizer = chatml.build(())
    with_calls = _rows(tmp_path / "a.jsonl", row, layout="gsm8k")
    assert _learnt(tokenizer, with_calls) == [["48/2 = <<48/2=", "24.\n#### 24<|im_end|>"]]
    without = _rows(tmp_path / "b.jsonl", row, layout="gsm8k", calculator=False)
    assert _learnt(tokenizer, without) == [["48/2 = 24.\n#### 24<|im_end|>"]]
    assert with_calls.content_hash() != without.content_hash()
    if GSM8K.exists():
        assert len(list(conversations(ConversationSource(path=str(GSM8K), layout="gsm8k")))) == 1319


BAD: list[tuple[str, Any, str]] = [
    ("messages", {"messages": [{"role": "assistant", "content": "a"}]}, "message 1: roles out of"),
    ("messages", {"messages": _chat("a", "b", "c")["messages"]}, "last message is of role user"),
    ("messages", {"messages": _chat("a")["messages"] * 2}, "message 2: roles out of order, user"),
    ("messages", _chat("a", "  "), "message 2: the answer is empty"),
    (
        "messages",
        {"messages": [{"role": "user", "content": None}]},
        "message 1.* is null, not text",
    ),
    ("messages", {"messages": [{"role": "user"}]}, "message 1 has no 'content'; it has role"),
    ("messages", {"messages": [{"role": "cat", "content": "x"}]}, "role='cat' is none of"),
    ("messages", {"messages": []}, r"messages=\[\] must be a list"),
    ("messages", {"messages": "Hi"}, "messages=.Hi. must be a list"),
    ("messages", {"messages": ["Hi"]}, "message 1 is no object"),
    ("messages", {"text": "Hi"}, "has no 'messages'; it has text; give the layout"),
    ("messages", ["Hi"], "is no JSON object"),
    ("alpaca", {"instruction": "x", "input": "", "output": None}, "output.* is null, not text"),
    ("gsm8k", {"question": "x", "answer": ""}, "message 2: the answer is empty"),
]


@pytest.mark.parametrize(("layout", "row", "message"), BAD, ids=[m[:25] for _, _, m in BAD])
def test_bad_rows_are_named_by_file_and_line(
    layout: Any, row: Any, message: str, tmp_path: Path
) -> None:
    good = {"messages": _chat("a", "b"), "alpaca": {"instruction": "a", "output": "b"}}
    good["gsm8k"] = {"question": "a", "answer": "b"}
    source = _rows(tmp_path / "bad.jsonl", good[layout], row, layout=layout)
    with pytest.raises(DataError, match=rf"bad.jsonl, line 2.*{message}"):
        list(conversations(source))


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (None, ConfigError, "neither marks for the roles of a dialogue nor a chat template"),
        ("{% if %}", ConfigError, "chat template is no Jinja2"),
        ("{{ raise_exception('never') }}", DataError, r"a.jsonl, line 1: .*fails on .*user.*never"),
        ("{{ messages[9].content }}", DataError, "a.jsonl, line 1: .*fails on the roles user"),
        ("{{ '%(x)s' % messages[0] }}", DataError, "a.jsonl, line 1: .*fails on .*KeyError: 'x'"),
        ("{{ 10**5000 }}", ConfigError, "is no Jinja2: ValueError"),
        ("{{ ''.__class__.__mro__ }}", DataError, "fails on the roles user.*unsafe"),
        (CHATML + "{{ messages | length }}", DataError, "does not write this turn after"),
        (CHATML.replace("<|im_end|>", ""), DataError, "a model would never learn to stop"),
        (
            CHATML.replace("m.content", "m.content[:1]"),
            DataError,
            "leaves out a part of the answer",
        ),
    ],
)
def test_templates_that_cannot_be_learnt_from_are_named(
    template: str | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = chat_folder(tmp_path / "t", template)
    tokenizer = TokenizerConfig(kind="folder", path=str(folder), eos_token="<|im_end|>")
    data = ConversationsConfig(sources=(_rows(tmp_path / "a.jsonl", _chat("Hi", "Hello")),))
    with pytest.raises(error, match=message):
        prepare(data, tokenizer, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"tokenizer.kind=bytes has neither; use init=hf:DIR"):
        data.check(TokenizerConfig(), 16)


def test_text_that_spells_a_special_token_never_becomes_one(
    chatml: TokenizerConfig, tmp_path: Path
) -> None:
    """In training and where a prompt is rendered, as the server has it."""
    tokenizer = chatml.build(())
    row = _chat("say <|im_end|>", "it is <|im_end|>, <|im_start|>")
    rendered = Renderer(tokenizer).render(next(conversations(_rows(tmp_path / "a.jsonl", row))))
    assert "say <|im_end|>" in tokenizer.decode(rendered.ids.tolist())
    end, begin = tokenizer.encode("<|im_end|><|im_start|>").tolist()
    assert [rendered.ids.tolist().count(index) for index in (end, begin)] == [
        3,
        3,
    ]  # a system's turn too
    learnt = rendered.ids[rendered.learnt].tolist()
    assert (learnt[-1], learnt.count(end)) == (end, 1)
    prompt = dialogue_format(tokenizer).prompt(row["messages"][:1])
    assert prompt == rendered.ids[: len(prompt)].tolist()


def test_best_fit_fills_bins_by_the_least_room() -> None:
    assert best_fit([4, 6, 5, 3, 2], 10) == [[1, 0], [2, 3, 4]]
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, 3000).tolist()
    bins = best_fit(lengths, 64)
    assert sorted(i for one in bins for i in one) == list(range(3000))
    assert max(sum(lengths[i] for i in one) for one in bins) <= 64
    assert len(bins) <= 1.03 * sum(lengths) / 64  # half of them are longer than half a bin


def test_windows_hold_whole_conversations_in_an_order_of_their_own(
    chatml: TokenizerConfig, tmp_path: Path
) -> None:
    chats = [_chat(f"Say {i}", "so " * (i % 7) + str(i)) for i in range(60)]
    chats += [_chat("long " * 90, "never seen"), _chat("Go on", "and on " * 60)]
    source = _rows(tmp_path / "a.jsonl", *chats)
    data = ConversationsConfig(sources=(source,), val_fraction=0.2)
    corpus = prepare(data, chatml, tmp_path / "cache")
    counts = corpus.statistics(64)
    for key, value in {"conversations": 62, "dropped": 1, "truncated": 1}.items():
        assert counts[f"train_{key}"] + counts[f"val_{key}"] == value
    samples, eos = corpus.samples(64, seed=3), corpus.tokenizer.eos
    number, seen, targets = int(counts["train_windows"]), set(), 0
    for i in range(number):
        sample = samples[i]
        tokens, learnt = sample["tokens"].numpy(), sample["targets"].numpy()
        documents = sample["documents"].numpy()
        targets += int((learnt >= 0).sum())
        for document in np.unique(documents):
            at = np.flatnonzero(documents == document)
            if not (learnt[at] >= 0).any():  # the padding
                assert (tokens[at] == eos).all()
                continue
            seen.add(corpus.tokenizer.decode(tokens[at].tolist()))
            inside = at[:-1][learnt[at[:-1]] >= 0]  # the next token is the target, of this one
            assert (tokens[inside + 1] == learnt[inside]).all()
            assert learnt[at[-1]] == eos or len(at) == 64
    assert targets == counts["train_targets"]
    assert len(seen) == counts["train_conversations"] - counts["train_dropped"]
    again = prepare(data, chatml, tmp_path / "cache").samples(64, seed=3)
    for index in (0, number + 5):
        assert (again[index]["tokens"] == samples[index]["tokens"]).all()
    order = [samples[i]["tokens"].tolist() for i in range(number)]
    assert [samples[number + i]["tokens"].tolist() for i in range(number)] != order
    with pytest.raises(DataError, match="has an answer within 4 tokens"):
        corpus.samples(4, seed=0)

    frozen = data.content_hash()
    _rows(tmp_path / "a.jsonl", *chats[1:])
    with pytest.raises(DataError, match="has changed since the cell was frozen"):
        prepare(data, chatml, tmp_path / "other", frozen)


def test_pieces_joined_are_the_ids_of_the_text(chatml: TokenizerConfig, tmp_path: Path) -> None:
    llama = TokenizerConfig(kind="folder", path=str(llama2(tmp_path / "l")), eos_token="</s>")
    for cfg in (chatml, llama):
        tokenizer = cfg.build(())
        assert isinstance(tokenizer, SubwordTokenizer)
        pieces = ["A: ", "the  dog 日", "本", "\n\n", "x"]
        encoded = tokenizer.encode_pieces(pieces)
        assert np.concatenate(encoded).tolist() == tokenizer.encode("".join(pieces)).tolist()
        assert len(encoded) == len(pieces)


def _trained(cell: Any, steps: int | None) -> dict[str, Any]:
    """Train the cell, stopped once after `steps` if given; return its weights."""
    stops = [iter(range(1000))] if steps is not None else []
    for stop in [*stops, None]:
        attempt = journal.claim(cell.folder)
        assert attempt is not None
        writer = journal.Journal(cell.folder, attempt)
        ask = (lambda: False) if stop is None else (lambda stop=stop: next(stop) >= steps)
        outcome = Trainer(cell, cell.inputs, writer, Ranks("cpu")).fit(ask)
        assert outcome == ("finished" if stop is None else "interrupted")
        writer.event(outcome)
        writer.close()
    newest = checkpoint_folder.newest(cell.folder / "checkpoints")
    assert newest is not None
    return load_file(newest / "model.safetensors")


def test_a_run_on_conversations_resumes_bit_identically(
    chatml: TokenizerConfig, compose: Compose, tmp_path: Path
) -> None:
    source = _rows(tmp_path / "a.jsonl", *[_chat(f"Say {i}", f"{i} {i}") for i in range(60)])
    data = ConversationsConfig(sources=(source,), val_fraction=0.2)
    weights, losses = [], []
    for name, steps in (("whole", None), ("broken", 5), ("without noise", None)):
        neftune = f"model.neftune={0 if name == 'without noise' else 5}"
        lengths = ["train.sequence_length=64", "train.steps=12", "optim.lr=1e-2"]
        node = compose(f"init=hf:{chatml.path}", neftune, *lengths, f"root={tmp_path / name}")
        node["data"] = plain(data, target=True)
        (cell,) = make_cells([("", node)])
        freeze_cell(cell)
        weights.append(_trained(cell, steps))
        (counts,) = [
            e for e in journal.events(journal.attempts(cell.folder)[0]) if e["event"] == "data"
        ]
        assert counts["train_conversations"] + counts["val_conversations"] == 60
        rows = storage.read_lines(cell.folder / "metrics.jsonl")
        losses.append([row["val_loss"] for row in rows if "val_loss" in row])
    whole, broken, quiet = weights
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert not all(torch.equal(whole[key], quiet[key]) for key in whole)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
