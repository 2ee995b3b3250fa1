"""One of each kind of thing from a foreign package: planned, trained, resumed, evaluated, shown."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from analysis.runs import from_folders
from runner.learn.optim.groups_config import MuonConfig
from runner.machine import storage
from runner.machine.errors import ConfigError
from runner.records import checkpoint, checkpoint_folder, journal
from runner.records.cells import Cell, freeze_cell, load_cell, make_cells
from runner.records.inputs import sha256
from tests.command_server import ROOT, run, start

PACKAGE = ROOT / "tests" / "foreign"
CHOSEN = [
    "hydra.searchpath=[pkg://mylab.conf]",
    "model=conv_net",
    "optim=sgd",
    "schedule=step_decay",
    "task=reconstruction",
    "data=counter",
    "tokenizer=letters",
    "train.sequence_length=16",
    "train.batch_size=4",
    "train.steps=12",
    "train.log_every=1",
    "train.threads=1",
    "eval.every=4",
    "eval.tokens=256",
    "track.uri=off",
]
NORM = "+eval/also@eval.also.norm=weight_norm"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PACKAGE))


def _sweep(root: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return run("runner", "-m", *CHOSEN, f"root={root}", "name=lab", *overrides, env=ENVIRONMENT)


def _espalier(root: Path, *line: str) -> str:
    done = run("runner.commands.cli", *line, "--root", str(root), env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _cell(root: Path, *overrides: str) -> Cell:
    return make_cells([("", _composed(root, *overrides))])[0]


def _composed(root: Path, *overrides: str) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir

    from runner.commands.composer import open_keys, to_plain
    from runner.commands.hydra_plugin import register

    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return to_plain(compose("config", open_keys([*CHOSEN, f"root={root}", *overrides])))


def _start(cell: Cell) -> Any:
    freeze_cell(cell)
    return start("runner.launch.worker", str(cell.folder), env=ENVIRONMENT)


def _killed_at(cell: Cell, step: int) -> None:
    """Start `cell` and kill it once it has logged `step`."""
    process = _start(cell)
    while process.poll() is None:
        rows = storage.read_lines(cell.folder / "metrics.jsonl")
        if any(row.get("step", 0) >= step and "restored" not in row for row in rows):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _weights(cell: Cell) -> dict[str, torch.Tensor]:
    saved = checkpoint_folder.newest(cell.folder / "checkpoints")
    assert saved is not None
    return load_file(saved / "model.safetensors")


@pytest.mark.slow
def test_it_is_planned_trained_and_shown_and_an_evaluation_is_made_up_for(tmp_path: Path) -> None:
    planned = _sweep(tmp_path, "hydra.sweeper.dry_run=true")
    assert planned.returncode == 0, planned.stderr
    # 28 x 16 twice, 3 taps and a bias for each of 16 channels, 2 layers of 16 x 16 and biases.
    assert str(2 * 28 * 16 + 16 * 3 + 16 + 2 * (16 * 16 + 16)) in planned.stdout
    assert " GB" in planned.stdout  # the memory, of a step on what the task draws
    trained = _sweep(tmp_path)
    assert trained.returncode == 0, trained.stderr
    (folder,) = tmp_path.glob("runs/*")
    saved = {file: file.stat().st_mtime_ns for file in folder.glob("checkpoints/*/*")}
    facts = json.loads((folder / "summary.json").read_text())
    assert facts["num_embedding_parameters"] == 28 * 16
    assert facts["num_active_parameters"] == facts["num_parameters"]
    assert facts["flops"] == 12 * 4 * 3 * 2 * 16 * (16 * 3 + 2 * 16 * 16 + 16 * 28)

    later = _sweep(tmp_path, NORM)
    assert "2 cells (1 finished, 1 new); 1 to run" in later.stderr
    assert later.returncode == 0, later.stderr
    assert {file: file.stat().st_mtime_ns for file in folder.glob("checkpoints/*/*")} == saved
    assert "0 to run" in _sweep(tmp_path, NORM).stderr
    row = from_folders(tmp_path, "lab").table.set_index("fingerprint").loc[folder.name]
    expected = sum(float(w.square().sum()) for w in _weights(load_cell(folder)).values()) ** 0.5
    assert row["weight_norm"] == pytest.approx(expected, rel=1e-6)
    assert 0.0 <= row["val_recovered"] <= 1.0

    table = _espalier(tmp_path, "status", "lab")
    assert "finished" in table
    assert "val recovered" in table
    assert f"{row['val_recovered']:.3f}" in table
    assert "val_recovered=" in _espalier(tmp_path, "show", folder.name)
    page = Path(_espalier(tmp_path, "report", "lab").strip())
    text = page.read_text()
    assert folder.name[:6] in text
    assert f'<td data-label="val recovered" data-value="{row["val_recovered"]:.10g}">' in text


@pytest.mark.slow
def test_what_can_be_asked_of_it_is_and_the_rest_is_refused(tmp_path: Path) -> None:
    more = [f"+eval/also@eval.also.{name}={name}" for name in ("details", "induction")]
    cell = _cell(tmp_path, "train.steps=2", *more)
    assert _start(cell).wait() == 0
    rows = storage.read_lines(cell.folder / "metrics.jsonl")
    last = {key: value for row in rows for key, value in row.items()}
    assert {"val_accuracy", "repeat_gain", "sample_repetition"} <= last.keys()
    assert len(_espalier(tmp_path, "generate", cell.fingerprint, "--prompt", "ab")) > 2
    for line, said in (
        (["export", cell.fingerprint, str(tmp_path / "hf")], "Letters has no form"),
        (["look", cell.fingerprint, "--text", "abc"], "ConvNet has no unembed"),
        (["ngram", cell.fingerprint], "n-grams of data=CounterConfig"),
    ):
        done = run("runner.commands.cli", *line, "--root", str(tmp_path), env=ENVIRONMENT)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {said}")
    tasks = [f"data={_questions(tmp_path)}", "tasks=[lambada]", "--jobs", "1"]
    _espalier(tmp_path, "eval", cell.fingerprint, *tasks)
    scores = [json.loads(file.read_text())["scores"] for file in cell.folder.glob("evals/*.json")]
    assert {row["task"] for row in scores[0]} == {"lambada"}


def _questions(folder: Path) -> Path:
    """Two questions of LAMBADA, in the form that the shipped task reads."""
    rows = [{"text": "the cat sat on the mat"}, {"text": "one and one makes two"}]
    file = folder / "questions" / "lambada_openai.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file.parent


@pytest.mark.slow
def test_killed_run_resumes_bit_identically_and_keeps_its_best_by_the_highest_measure(
    tmp_path: Path,
) -> None:
    much = ["train.steps=60", "eval.every=5", "train.micro_batch=2"]
    kept = ["train.checkpoint.every_steps=7", "train.checkpoint.keep_last=1"]
    whole, broken = (_cell(tmp_path / name, *much, *kept) for name in ("whole", "broken"))
    assert _start(whole).wait() == 0
    for step in (3, 20, 41):
        _killed_at(broken, step)
    assert _start(broken).wait() == 0
    assert len(journal.attempts(broken.folder)) == 4
    a, b = _weights(whole), _weights(broken)
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())
    for cell in (whole, broken):
        rows = storage.read_lines(cell.folder / "metrics.jsonl")
        measured = {row["step"]: row["val_recovered"] for row in rows if "val_recovered" in row}
        best, worst = max(measured, key=measured.__getitem__), min(measured.values())
        assert measured[best] > worst
        there = {int(path.name) for path in checkpoint_folder.listing(cell.folder / "checkpoints")}
        assert there == {best, 60}


def test_text_from_a_source_and_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    text = ["data=squares", "data.split=tail", "task=language_modelling", "optim=muon"]
    cell = _cell(tmp_path, *text, "train.steps=3", "eval.also.samples.tokens=4")
    assert _start(cell).wait() == 0
    rows = storage.read_lines(cell.folder / "metrics.jsonl")
    assert any("val_bits_per_byte" in row for row in rows)
    assert json.loads((cell.folder / "tokenizer.json").read_text())["lower"] is True


def test_work_reads_what_it_names_resumes_and_records_its_output(tmp_path: Path) -> None:
    work = ["work=count_letters", "data=squares", "work.pause_s=0.005"]
    cell = _cell(tmp_path, *work)
    assert not any(key.startswith(("model.", "optim.")) for key in cell.science)
    assert _cell(tmp_path, *work, "model.width=8").fingerprint == cell.fingerprint
    _killed_at(cell, 5)
    assert _start(cell).wait() == 0
    (output,) = (cell.folder / "outputs").iterdir()
    assert len(json.loads(output.read_text())) == 3
    (wrote,) = (e for e in journal.events(journal.attempts(cell.folder)[-1]) if "output" in e)
    assert wrote["sha256"] == sha256(output)
    table = _sweep(tmp_path, *work, "hydra.sweeper.dry_run=true").stdout
    assert "1 finished" in table


@pytest.mark.parametrize(
    "override",
    [
        "model.width=8",
        "optim.momentum=0.5",
        "schedule.every=3",
        "task.share=0.5",
        "data.stride=2",
        "tokenizer.lower=false",
    ],
)
def test_each_of_its_fields_counts_in_the_fingerprint(override: str, tmp_path: Path) -> None:
    assert _cell(tmp_path, override).fingerprint != _cell(tmp_path).fingerprint


def test_a_source_counts_by_its_content_and_a_further_evaluation_not_at_all(tmp_path: Path) -> None:
    text = ["data=squares", "task=language_modelling"]
    more = "data.sources=[{_target_:mylab.squares.SquaresConfig,count:99}]"
    assert _cell(tmp_path, *text, more).fingerprint != _cell(tmp_path, *text).fingerprint
    assert _cell(tmp_path, NORM).fingerprint == _cell(tmp_path).fingerprint


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.widht=8", r"model\.widht is not a key; did you mean width\?"),
        ("optim.lr=fast", r"optim\.lr='fast'"),
        ("schedule.evry=3", r"schedule\.evry is not a key; did you mean every\?"),
        ("task.shre=0.5", r"task\.shre is not a key"),
        ("data.strid=2", r"data\.strid is not a key"),
        ("tokenizer.lwer=false", r"tokenizer\.lwer is not a key"),
        ("eval.also.norm.pow=1", r"eval\.also\.norm\.pow is not a key"),
        ("work.tpo=1", r"work\.tpo is not a key; did you mean top\?"),
    ],
)
def test_a_wrong_key_is_refused_by_name(override: str, said: str, tmp_path: Path) -> None:
    chosen = ["work=count_letters", "data=squares"] if override.startswith("work") else [NORM]
    with pytest.raises(ConfigError, match=said):
        _cell(tmp_path, *chosen, override)


def test_muon_takes_the_layers_matrices_alone(tmp_path: Path) -> None:
    model = _cell(tmp_path).config.model.build(28, 0)
    muon, rest = MuonConfig().build(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    taken = {names[p] for group in muon.param_groups for p in group["params"]}
    assert taken == {"layers.0.weight", "layers.1.weight"}
    left = {names[p] for group in rest.param_groups for p in group["params"]}
    assert left | taken == set(names.values())
    assert {"wte.weight", "mix.weight", "lm_head.weight"} <= left


class _Counting(torch.optim.Optimizer):
    """Descent by 1/k of the gradient in step k, counted by a Python number."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["k"] = state.get("k", 0) + 1
            parameter.sub_(parameter.grad / state["k"])


def test_what_an_optimiser_counts_by_a_number_survives_a_checkpoint(tmp_path: Path) -> None:
    weights = []
    for stop in (False, True):
        model = torch.nn.Linear(2, 1)
        torch.nn.init.zeros_(model.weight)
        optimizer = _Counting(model.parameters())
        for step in range(4):
            if stop and step == 2:
                files = checkpoint.gather(model, [optimizer], {}, keep=True)
                saved = checkpoint.save(tmp_path, files, {"step": step})
                optimizer = _Counting(model.parameters())
                checkpoint.load(saved, model, [optimizer])
                assert optimizer.state[model.weight]["k"] == 2
            model.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)
