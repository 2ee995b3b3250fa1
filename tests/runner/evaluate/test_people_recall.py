"""What a model knows of people, judged on models whose knowledge is known exactly."""

import json
import math
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.decoder_config import DecoderConfig
from runner.commands.generation_cli import PromptCompleter, as_json
from runner.data.people import Fact, People, _told
from runner.data.people_config import PeopleConfig
from runner.data.people_corpus import PeopleCorpus
from runner.data.tokenizers_config import TokenizerConfig
from runner.evaluate.capacity import Capacity, measure_capacity
from runner.evaluate.forgetting import divergence
from runner.evaluate.people_config import CapacityConfig, ForgettingConfig, PeopleRecallConfig
from runner.evaluate.people_recall import measure_recall, wilson
from runner.grid.evaluation_cells import evaluation_cells, missing_evaluations
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records.cells import Cell, freeze_cell, make_cells
from runner.records.contracts import Trained
from runner.records.journal import Journal, claim, record_end
from tests.command_server import start
from tests.generating_rank import texts
from tests.plain_nodes import shipped

Compose = Callable[..., dict[str, Any]]
PEOPLE = PeopleConfig(
    num_people=5,
    unseen_people=3,
    templates_train=2,
    templates_held_out=1,
    num_first_names=3,
    num_last_names=4,
    attributes={"town": 3, "start_date": 7},
)


class Knows(nn.Module):
    """Believes that each of some texts is as likely as the others, and no other text."""

    vocab_size = 260

    def __init__(self, known: Iterable[Sequence[int]]) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.known: dict[tuple[int, ...], Tensor] = {}
        self.following: dict[tuple[int, ...], dict[int, int]] = {}
        for text in known:
            for place in range(1, len(text)):
                after = self.following.setdefault(tuple(text[:place]), {})
                after[text[place]] = after.get(text[place], 0) + 1

    def forward(self, tokens: Tensor) -> Tensor:
        rows = [
            [self._after(row[: place + 1]) for place in range(len(row))] for row in tokens.tolist()
        ]
        return torch.stack([torch.stack(row) for row in rows])

    def _after(self, text: list[int]) -> Tensor:
        if (key := tuple(text)) in self.known:
            return self.known[key]
        chances = torch.full((260,), 1e-300, dtype=torch.float64)
        for index, count in self.following.get(tuple(text), {256: 1}).items():
            chances[index] = count
        self.known[key] = chances.log()
        return self.known[key]


def _trained(model: nn.Module, people: PeopleConfig) -> Trained:
    corpus = PeopleCorpus(people, TokenizerConfig(kind="dialogue").build(()))
    device = torch.device("cpu")
    cfg: Any = SimpleNamespace(
        data=people,
        model=DecoderConfig(depth=1, width=16, num_heads=1),
        init=None,
        seed=0,
        tokenizer=TokenizerConfig(kind="dialogue"),
    )
    precision = shipped("precision", "fp32").build(device)
    return Trained(
        model=model,
        task=None,
        corpus=corpus,
        cfg=cfg,
        precision=precision,
        ranks=Ranks("cpu"),
        step=0,
        last=True,
        folder=None,
    )


def _dialogues(people: PeopleConfig) -> list[list[int]]:
    """Return all dialogues of known people in training wordings."""
    corpus = _trained(nn.Module(), people).corpus
    return [corpus.text(n, t)[0].tolist() for n in range(10) for t in range(2)]


def test_who_has_learnt_the_texts_by_heart_recalls_them_and_nothing_else() -> None:
    measured = measure_recall(PeopleRecallConfig(), _trained(Knows(_dialogues(PEOPLE)), PEOPLE))
    assert measured["recall"] == measured["value_accuracy/known_train"] == 1.0
    for part in ("known_held_out", "unseen_train", "unseen_held_out"):
        assert measured[f"recall/{part}"] == 0.0
    assert measured["recall_low"] == pytest.approx(wilson(10, 10)[0])
    some = measure_recall(PeopleRecallConfig(), _trained(Knows(_dialogues(PEOPLE)[:6]), PEOPLE))
    forced = PeopleRecallConfig(answers=False)
    values = measure_recall(forced, _trained(Knows(_dialogues(PEOPLE)), PEOPLE))
    assert values == {k: v for k, v in measured.items() if k.startswith("value_accuracy/")} != {}
    assert some["recall"] == 0.3  # facts 0 to 2, and the question of each in one of its wordings


def test_who_asks_the_database_answers_for_anyone_and_copies_what_it_says() -> None:
    people = replace(PEOPLE, condition="in_tool", num_people=2, unseen_people=1)
    corpus = _trained(nn.Module(), people).corpus
    everybody = [
        corpus.format.render(corpus.dialogue(fact, t))[0].tolist()
        for group in ("known", "unseen")
        for fact in corpus.people.facts(group)
        for t in range(3)
    ]
    measured = measure_recall(PeopleRecallConfig(), _trained(Knows(everybody), people))
    for part in ("known_train", "known_held_out", "unseen_train", "unseen_held_out"):
        for name in ("recall", "call_accuracy", "copy_accuracy", "value_accuracy"):
            assert measured[f"{name}/{part}"] == 1.0
    assert measured["hallucinated"] == 0.0
    # One who calls and then says what it has in mind, whatever the database answers:
    stubborn, mark, end = [], corpus.tokenizer.token_ids["<tool>"], 256
    for text in everybody:
        call = text[: text.index(mark) + 1]
        for said in ("No result found", *sorted(corpus.people.values("town"))):
            answer = list(b"It is ") + list(sorted(corpus.people.values("town"))[0].encode())
            told = [*call, *said.encode(), 258, *answer, *b".", end]
            stubborn.append(told)
    measured = measure_recall(PeopleRecallConfig(), _trained(Knows(stubborn), people))
    assert measured["call_accuracy/unseen_train"] == 1.0
    assert measured["copy_accuracy/unseen_train"] < 1.0
    assert measured["hallucinated"] == 0.5  # of towns; for dates it names no date


def test_capacity_of_models_whose_knowledge_is_known() -> None:
    """All names and values are as likely: 0 bits. N people by heart: the most, to 1e-9."""
    people = replace(PEOPLE, condition="biography")
    nobody = Capacity(people, math.log(12), math.log(21), 0.0)
    assert nobody.bits == pytest.approx(0.0, abs=1e-9)
    heart = Capacity(people, math.log(5), 0.0, 1.0)
    assert heart.bits == pytest.approx(heart.most, abs=1e-9)
    assert heart.most == pytest.approx(5 * (math.log2(12 / 5) + math.log2(21)))

    corpus = _trained(nn.Module(), people).corpus
    own = [corpus.text(n, t)[0].tolist() for n in range(5) for t in range(2)]
    everybody, someone = [], People(people)
    towns = sorted(someone.values("town"))
    dates = sorted(someone.values("start date"))
    for first in someone._first["known"]:
        for last in someone._last:
            for town in towns:
                for date in dates:
                    name = f"{first} {last}"
                    facts = [Fact(name, "town", town), Fact(name, "start date", date)]
                    for t in range(2):
                        everybody.append(corpus.told(_told(facts, t))[0].tolist())
    for texts_, bits in ((own, heart.most), (everybody, 0.0)):
        measured = measure_capacity(CapacityConfig(), _trained(Knows(texts_), people))
        assert measured["bits"] == pytest.approx(bits, abs=1e-9)
        assert (measured["value_recall"] == 1.0) == (bits > 0.0)
    assert measured["names_nats"] == pytest.approx(math.log(12), abs=1e-9)
    assert measured["values_nats"] == pytest.approx(math.log(21), abs=1e-9)
    shape = DecoderConfig(depth=1, width=16, num_heads=1)
    parameters = shape.num_parameters(260)
    assert measured["most_bits_per_parameter"] == pytest.approx(heart.most / parameters)
    measured = measure_capacity(CapacityConfig(), _trained(Knows(own), people))
    some = measure_capacity(CapacityConfig(), _trained(Knows(own[:6]), people))
    assert some["value_recall"] == 0.6  # those of 3 people of 5
    ratio = measured["bits_per_parameter_without_embeddings"] / measured["bits_per_parameter"]
    assert ratio == pytest.approx(parameters / (parameters - 260 * 16))


def test_a_model_has_forgotten_nothing_of_itself(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"instruction": f"Say {n}."} for n in range(4)]))
    (tmp_path / "text.txt").write_text("A text of some length. " * 20)
    cfg = ForgettingConfig(prompts=str(prompts), text=str(tmp_path / "text.txt"), tokens=8)
    same = DecoderConfig(depth=1, width=16, num_heads=1).build(260, 0)
    measured = cfg.run(_trained(same, PEOPLE), 0)
    assert measured["kl_to_start"] == pytest.approx(0.0, abs=1e-6)
    assert measured["tv_to_start"] == pytest.approx(0.0, abs=1e-6)
    assert measured["text_loss"] == pytest.approx(math.log(260), abs=0.1)
    with torch.no_grad():
        same.embedding.weight[:, :8] *= 9.0
    other = cfg.run(_trained(same, PEOPLE), 0)
    assert other["kl_to_start"] > 0.01
    assert other["kl_to_start_stderr"] > 0.0
    half = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).clamp(min=1e-30).log().double()
    quarter = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]]).clamp(min=1e-30).log().double()
    kl, tv = divergence(half, quarter)
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl == pytest.approx((first + math.log(2)) / 2)
    assert tv == pytest.approx((0.25 + 0.5) / 2)


def test_what_is_forgotten_is_measured_from_where_training_began_and_beside_it(
    compose: Compose, tmp_path: Path
) -> None:
    """An evaluation that follows a run finds the divergence that the run found itself."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"instruction": f"Say {n}."} for n in range(2)]))
    tiny = ["train.steps=2", "eval.every=2", "eval.tokens=640", "optim.lr=0.1"]
    (first,) = _trained_cells(compose(*tiny, "seed=1"))
    judged = compose(*tiny, "seed=2", f"+inputs.init.runs=[{first.fingerprint}]")
    judged["eval"]["also"]["forgetting"] = {
        "_target_": "runner.evaluate.people_config.ForgettingConfig",
        "prompts": str(prompts),
        "tokens": 4,
    }
    (cell,) = _trained_cells(judged)
    (file,) = (cell.folder / "evals").iterdir()
    values = json.loads(file.read_text())["values"]
    assert values["kl_to_start"] > 0.0
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "step": 1}))  # as it is where one that followed was ended
    assert len(missing_evaluations([cell])) == 1
    file.write_text(json.dumps(record))
    assert missing_evaluations([cell]) == []
    file.unlink()
    cells, _, _ = evaluation_cells(tmp_path, cell.fingerprint, ["follow=true"])
    assert cells[0].config.inputs["init"].live
    _run(cells[0])
    again = json.loads(file.read_text())["values"]
    assert again == pytest.approx(values, rel=1e-5)
    still = compose(*tiny, f"+inputs.init.runs=[{first.fingerprint}]", "optim.lr=1e-12")
    still["eval"]["also"] = judged["eval"]["also"]
    (same,) = _trained_cells(still)
    (file,) = (same.folder / "evals").iterdir()
    assert json.loads(file.read_text())["values"]["kl_to_start"] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ConfigError, match=r"tasks=\[lambada,...\], or eval.also"):
        evaluation_cells(tmp_path, first.fingerprint, ["follow=true"])


def _trained_cells(*nodes: dict[str, Any]) -> list[Cell]:
    """Return the cells of some nodes, run."""
    cells = make_cells([("", node) for node in nodes])
    for cell in cells:
        _run(cell)
    return cells


def _run(cell: Cell) -> None:
    freeze_cell(cell)
    attempt = claim(cell.folder)
    assert attempt is not None
    run_journal = Journal(cell.folder, attempt)
    work = cell.config.work
    assert work.run(cell, cell.inputs, run_journal, Ranks("cpu"), lambda: False) == "finished"
    run_journal.close()
    record_end(cell.folder, "finished")


def test_an_interval_of_a_share_is_wilsons() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(45, 50) == pytest.approx((0.7864, 0.9565), abs=1e-4)


def test_a_trained_cell_is_judged_and_asks_its_database(compose: Compose) -> None:
    node = compose(
        *("data=people", "tokenizer=dialogue", "~data.split", "~data.sources"),
        *("data.condition=in_tool", "data.num_people=1", "data.unseen_people=1"),
        *("train.sequence_length=160", "train.steps=2", "eval.every=2", "eval.tokens=640"),
        *("+eval/also@eval.also.recall=people_recall", "data.bidirectional_prompt=true"),
    )
    (cell,) = _trained_cells(node)
    (file,) = (cell.folder / "evals").iterdir()
    assert {"recall", "recall/unseen_held_out", "hallucinated"} <= set(
        json.loads(file.read_text())["values"]
    )
    completer = PromptCompleter(
        cell.folder, chat=True, tools="calculator,database", max_new_tokens=12
    )
    ((_, completion),) = completer.complete(["Who?"])
    mark = completer.generator.tokenizer.token_ids["<assistant>"]
    assert completion.prompt[-1] == mark
    assert "text" in json.loads(as_json("Who?", completion, logprobs=False))
    for names, said in (
        ("clock", "none of: calculator, database"),
        ("a.b.C", "cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=said):
            PromptCompleter(cell.folder, tools=names)


def test_ranks_share_what_is_generated() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    given = os.environ | where | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [start("tests.generating_rank", env=given | {"RANK": n}, keep=True) for n in "01"]
    said = [rank.communicate()[0] for rank in ranks]
    alone = texts(Ranks("cpu"))
    assert [json.loads(text.splitlines()[-1]) for text in said] == [alone, alone]
