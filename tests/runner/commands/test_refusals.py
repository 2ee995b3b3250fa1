"""What a user mistypes, or a disk refuses, ends in one message that names it; never a traceback."""

import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.machine.errors import ConfigError, EspalierError
from runner.records.cells import make_cells
from runner.records.config import set_key
from tests.command_server import run, start
from tests.conftest import TINY, compose_tiny, write_text

Run = Callable[..., subprocess.CompletedProcess[str]]
Compose = Callable[..., dict[str, Any]]


def _refused(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one message of a command that was refused."""
    assert done.returncode not in (0, -signal.SIGSEGV), done.args
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    assert done.stderr.count("error:") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["+mdoel=x"], "mdoel is not a key; did you mean model?"),
        (["~mdoel"], "mdoel is not a key; did you mean model?"),
        (["model=gpt_pcio"], "model=gpt_pcio: there is none; did you mean gpt_pico?"),
        (["train.checkpoint.evry_steps=2"], "evry_steps is not a key; did you mean every_steps?"),
        (["data.sources.1.path=x"], "data.sources.1.path: list index out of range"),
        (["model=null"], "model is chosen by name, model=NAME, of conf/model/"),
        (["seed=${oc.env:NOT_SET}"], "Environment variable 'NOT_SET' not found"),
        (["seed=-1"], "seed=-1 must lie in 0 to"),
        (["=3"], "cannot be composed"),
        (["resources.gpus=4"], "resources.gpus=4 but this machine has"),
        (["precision=nvfp4", "precision.pad=false"], "k=24 is not a multiple of 16"),
        (["init=hf:DIR", "tokenizer=bytes"], "init=hf:DIR determines model and tokenizer"),
        (["-m", "train.diverged_nats=inf"], "train.diverged_nats=inf must be a finite number"),
        (["train.seed=1,2"], "train.seed=1,2: several values are a grid, which is run by -m"),
        (["hydra.sweeper.name=x"], "hydra.sweeper.name counts for grids only; add -m"),
        (["-m", "hydra/sweeper=optuna"], "hydra.sweeper.space must be given; add"),
        (["-m", "seed=1,2", "seed=3,4"], "seed is given twice"),
        (["-m", "seed=interval(1,2)"], "hydra/sweeper=optuna"),
        (["-m", "hydra.sweeper.dryrun=true"], "did you mean dry_run?"),
        (["-m", "hydra.launcher.jobz=2"], "did you mean jobs?"),
        (["-m", "train.micro_batch=1,2"], "train.micro_batch=1 and 2 would be one cell"),
        (
            ["-m", "hydra/launcher=slurm", "resources.timeout_min=1"],
            "warning_s=90 is not below the time limit",
        ),
        (
            ["-m", "hydra/sweeper=optuna", "hydra.sweeper.space={}", "seed=1,2"],
            "seed=1,2: a study draws its points itself",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message_and_writes_nothing(
    espalier: Run, tmp_path: Path, arguments: list[str], says: str
) -> None:
    assert says in _refused(espalier(*arguments))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["../../out", "a/b", "..", "", "-x", "a\nb", "x" * 201])
def test_a_name_stays_a_folder_under_the_root(compose: Compose, name: str) -> None:
    with pytest.raises(ConfigError, match="name="):
        make_cells([("", compose() | {"name": name})])


def test_names_of_runs_and_sweeps_lead_nowhere_else(compose: Compose, tmp_path: Path) -> None:
    (cell,) = make_cells([("", compose())])
    away = {"init": {"runs": ["../../../../../../etc"]}}
    with pytest.raises(ConfigError, match="no cell is"):
        make_cells([("", compose() | {"inputs": away})])
    (tmp_path / "members.json").write_text(
        json.dumps({"name": "../../out", "cells": [{"fingerprint": "../../out", "label": ""}]})
    )
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.add(tmp_path / "members.json", "members.json")
    root = ["--root", str(cell.folder.parent.parent)]
    for verb in (["unpack", str(tmp_path / "evil.tar")], ["plots", "../../out"], ["show", "../*"]):
        assert "out" in _refused(run("runner.commands.cli", *verb, *root)) or verb[0] == "show"


def test_a_deleted_key_is_labelled_as_such(espalier: Run) -> None:
    planned = espalier("-m", "~train.clip", "resources.gpus=4", "hydra.sweeper.dry_run=true")
    assert "a launch from here refuses them: resources.gpus=4 but" in planned.stdout
    assert "~clip" in planned.stdout
    assert "null" not in planned.stdout


def test_grids_without_a_name_are_sweeps_of_their_own(espalier: Run, tmp_path: Path) -> None:
    for seeds in ("1,2", "1,2", "2,3"):
        done = espalier("-m", f"seed={seeds}", "train.steps=1", "model.depth=1")
        assert done.returncode == 0, done.stderr
        assert done.stderr.endswith("\n")
    names = sorted(folder.name for folder in (tmp_path / "sweeps").iterdir())
    assert len(names) == 2
    assert all(name.startswith("grid-") for name in names)


@pytest.mark.parametrize(
    "verb",
    [
        "",
        "run",
        "plan",
        "adopt",
        "eval",
        "ngram",
        "import",
        "import gguf",
        "import runs csv",
        "retry",
    ],
)
def test_every_verb_takes_h(verb: str) -> None:
    shown = run("runner.commands.cli", *verb.split(), "-h")
    assert shown.returncode == 0, shown.stderr
    assert ("Usage: espalier" if verb != "run" else "python -m runner model=") in shown.stdout


def test_keys_lists_every_key_with_type_and_default() -> None:
    listed = run("runner.commands.cli", "keys").stdout
    for line in (
        "  seed: int = 0",
        "  model.width: int",
        "  data.sources.0.path: str|null = null",
        "  train.checkpoint.every_s: float = 300  [execution]",
        "  resources.timeout_min: int = 60  [execution]",
    ):
        assert line in listed
    assert "there are: work, model" in _refused(run("runner.commands.cli", "keys", "x"))


@pytest.mark.slow
def test_verbs_name_what_they_refuse(espalier: Run, tmp_path: Path) -> None:
    symbols = ["data=markov", "tokenizer=symbols", "tokenizer.vocab_size=16", "~data.split"]
    base = [o for o in TINY if not o.startswith("data")]
    trained = run("runner", *base, *symbols[:3], f"root={tmp_path}", "name=s")
    assert trained.returncode == 0, trained.stderr
    (folder,) = tmp_path.glob("runs/*")
    assert f"next: `espalier generate {folder.name[:8]}" in trained.stderr
    assert "step 12/12" in trained.stderr
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text("{")
    for verb, says in (
        (["export", str(folder), str(tmp_path / "hf")], "has no form that transformers reads"),
        (["export", str(folder), "/proc/x"], "has no form"),
        (["generate", str(folder), "--temperature", "1e-40"], "temperature=1e-40 must be"),
        (["generate", str(folder), "--seed", "-1"], "seed=-1 must be"),
        (["generate", str(folder), "--beams", "2", "--temperature", "1"], "does nothing with"),
        (["eval", str(folder), "tasks=["], "'tasks=[' is no override"),
        (["eval", str(folder), "tasks=[x]", "model.width.x=3"], "model.width.x leads into 24"),
        (["plots", "s", "--root", str(tmp_path), "--out", "/proc/x/y"], "/proc/x"),
        (["import", "hf", str(bad)], f"{bad}/config.json is not JSON"),
        (["plan", "nowhere/sweep.yaml"], "there are: "),
        (["plan", "in_tool", "-cn", "quik"], "has no grid quik; there are: large, quick, sweep"),
        (["plan", "s"], "s is a sweep of the command line, which has no sweep.yaml"),
        (["logs", str(folder)], "it ran in the terminal of"),
    ):
        assert says in _refused(run("runner.commands.cli", *verb, cwd=tmp_path))
    assert not (tmp_path / "hf").exists()
    planned = run("runner.commands.cli", "plan", "experiments/demo/sweep.yaml", "seed=1")
    assert "6 cells" in planned.stdout, planned.stderr


def test_ctrl_c_while_points_are_composed_is_one_line(tmp_path: Path) -> None:
    command = start("runner", "-m", *TINY, f"root={tmp_path}", "seed=range(1,1000000)", keep=True)
    stat, hertz = Path(f"/proc/{command.pid}/stat"), os.sysconf("SC_CLK_TCK")
    while int(stat.read_text().rpartition(")")[2].split()[11]) < 0.5 * hertz:  # it composes
        time.sleep(0.02)
    command.send_signal(signal.SIGINT)
    code = command.wait(timeout=60)
    assert (code, *command.written()) == (130, "", "stopped\n")


def test_a_folder_models_of_the_users_does_not_hide_ours(tmp_path: Path) -> None:
    # Real processes: which module is imported is the question.
    for name in ("models", "runner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not ours')")
    from runner.machine.own_modules import module_command

    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        module_command("runner", "mdoel=x"),
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "did you mean model?" in done.stderr


_KEY_NAMES = """
    model model.width model.depth model.num_heads model._target_ optim.lr optim.betas schedule
    train.steps train.tokens train.batch_size train.micro_batch train.clip train.average
    train.average.kind train.checkpoint.every_s eval.every eval.harness eval.harness.tasks
    eval.also eval.also.x data.sources data.sources.0 data.sources.0.path data.sources.0.weight
    data.sources.1.path data.val_fraction data.weights tokenizer.kind tokenizer.vocab_size
    tokenizer._target_ resources.gpus resources.nodes resources.classes resources.timeout_min
    track.uri work work._target_ inputs inputs.init inputs.init.runs seed init name root x
    model.width.x data.sources.x.y precision.compute precision.keep task
"""
_KEYS = st.sampled_from(_KEY_NAMES.split())
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["", "../x", "os.path", "hf:x", "input:a/b", "tests.faults.FaultyConfig"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["_target_", "path", "runs", "when", "x"]), inner, max_size=2
        )
    ),
    max_leaves=4,
)


@given(changes=st.lists(st.tuples(_KEYS, _VALUES), min_size=1, max_size=2))
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_no_value_of_any_key_makes_a_traceback(
    node: dict[str, Any], changes: list[tuple[str, Any]]
) -> None:
    changed = json.loads(json.dumps(node))
    try:
        for key, value in changes:
            set_key(changed, key, value)
        make_cells([("", changed)])
    except (EspalierError, OSError):
        pass  # `refusals` prints it in one line


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The composed node of a tiny cell."""
    root = tmp_path_factory.mktemp("node")
    return compose_tiny(root, write_text(root / "text.txt"))


_OVERRIDES = """
    seed=1,2 seed=nan seed= =3 seed model=null model=1 model=../x model=a,b model={a:1} +model=x
    ~model ~train.clip ++a.b=c model@x=y +eval/also@eval.also.x=nope data.sources=[1]
    data.sources.x=1 seed=range(1,3,0) seed=glob(*) mdoel=glob(*) seed=${x} root=${oc.env:NO}
    optim=[1,2] hydra/launcher=1 hydra/sweeper=optuna hydra.sweeper.params=3
    hydra.sweeper.zip=[{seed:[1]}] hydra.sweeper.filter=( hydra.sweeper.draw={count:0}
    hydra.sweeper.stages={a:{from:b}} hydra.sweeper.blocks=[3] hydra.mode=x seed=' seed=[
    hydra.searchpath=3 --cfg=job --info=x -cd=/nowhere -cn=nope --foo resources.classes=[{a:1}]
    model._target_=[1] track=null work=x --reason status show ls diff /proc ../.. --root
"""
_WORDS = st.sampled_from(_OVERRIDES.split())


@pytest.mark.slow
@given(
    module=st.sampled_from(["runner", "runner.commands.cli", "analysis"]),
    words=st.lists(_WORDS, min_size=1, max_size=3),
)
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_command_line_makes_a_traceback(
    tmp_path: Path, text: Path, module: str, words: list[str]
) -> None:
    own = ["-m", *TINY, f"data.sources.0.path={text}", f"root={tmp_path}"]
    own += ["hydra.sweeper.dry_run=true"]
    done = run(module, *(own if module == "runner" else []), *words, timeout=60)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
