"""Cells that crash, hang, run out of memory or fail alike: the sweep's state, and notification."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from runner.launch.policy import notify
from runner.records import journal
from runner.records.cells import load_cell
from runner.records.failures import cause_of, clusters, last_failure
from tests.command_server import start
from tests.conftest import ROOT, TINY
from tests.slurm.watch import points, running_step, same_weights, until

Run = Callable[..., subprocess.CompletedProcess[str]]
Line = Callable[..., list[str]]
CGROUP = Path("/sys/fs/cgroup/memory/espalier-test")
FAULTY = ["model._target_=tests.faults.FaultyConfig"]


@pytest.fixture
def command(tmp_path: Path, text: Path) -> Line:
    """The command of a tiny sweep: module and arguments."""

    def inner(*arguments: str, root: Path = tmp_path) -> list[str]:
        return ["runner", "-m", *TINY, f"data.sources.0.path={text}", f"root={root}", *arguments]

    return inner


def _by_fault(root: Path) -> dict[str, Path]:
    return {load_cell(f).config.model.fault: f for f in root.glob("runs/*")}


@pytest.mark.slow
def test_each_fault_ends_its_cell_alone_and_by_name(espalier: Run, tmp_path: Path) -> None:
    done = espalier(
        "-m",
        *FAULTY,
        "model.fault=none,segfault,exit0,hang,long_eval",
        "name=f",
        "resources.hang_min=0.1",
        "hydra.launcher.jobs=5",
    )
    assert done.returncode == 1, done.stderr
    cells = _by_fault(tmp_path)
    for fault in ("none", "long_eval"):  # the latter without a step for longer than hang_min
        assert journal.state(cells.pop(fault)) == "finished"
    assert {journal.state(f) for f in cells.values()} == {"failed"}
    messages = {
        fault: journal.events(journal.attempts(f)[-1])[-1]["message"] for fault, f in cells.items()
    }
    assert messages == {
        "segfault": "the process ended with SIGSEGV",
        "exit0": "the process ended with exit code 0 and had not finished",
        "hang": "no new step for 0.1 minutes (resources.hang_min)",
    }
    causes = sorted(c.cause for c in clusters([load_cell(f) for f in cells.values()]))
    assert causes == ["crash", "crash", "hang"]  # a segfault and an early end are two


def test_out_of_memory_halves_the_micro_batch_at_equal_tokens(
    espalier: Run, tmp_path: Path
) -> None:
    done = espalier(
        "-m", *FAULTY, "model.fault=oom", "seed=1", "name=o", "eval.batch_size=1", "eval.tokens=32"
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("runs/*")
    cell = load_cell(folder)
    assert (cell.config.train.batch_size, cell.config.train.micro_batch) == (4, 1)
    tried = [
        json.loads((a / "environment.json").read_text())["micro_batch"]
        for a in journal.attempts(folder)
    ]
    assert tried == [4, 2, 1]
    kept = espalier(
        "-m", *FAULTY, "model.fault=oom", "seed=2", "name=o", "resources.halve_on_oom=false"
    )
    assert kept.returncode == 1
    assert "gpu memory" in str(clusters([load_cell(f) for f in tmp_path.glob("runs/*")])[0].cause)


def test_a_worker_that_is_killed_goes_on_with_the_same_bits(command: Line, tmp_path: Path) -> None:
    line = [*FAULTY, "model.fault=slow", "name=k", "train.checkpoint.every_steps=2"]
    disturbed = start(*command(*line, root=tmp_path / "disturbed"), keep=True)
    undisturbed = start(*command(*line, root=tmp_path / "undisturbed"))
    until(lambda: running_step(tmp_path / "disturbed", 3), "step 3")
    (folder,) = tmp_path.glob("disturbed/runs/*")
    frozen = (folder / "cell.json").read_text()
    half_written = folder / "checkpoints/.partial-00000004-1"
    half_written.mkdir(parents=True)  # as by a kill amid a write
    os.kill(journal.lease(journal.attempts(folder)[0])["pid"], signal.SIGKILL)
    _, errors = disturbed.communicate(timeout=120)
    assert disturbed.returncode == 0, errors
    assert undisturbed.wait(timeout=120) == 0
    first, second = journal.attempts(folder)
    ended = journal.events(first)[-1]
    assert (ended["event"], ended["error"]) == ("interrupted", "Killed")
    assert not any(e["event"] == "not_bit_identical" for e in journal.events(second))
    assert (folder / "cell.json").read_text() == frozen
    assert not half_written.exists()
    reference = tmp_path / "undisturbed" / "runs" / folder.name
    assert same_weights(folder, reference)
    assert points(folder) == points(reference)


def test_three_kills_without_a_checkpoint_end_a_cell(command: Line, tmp_path: Path) -> None:
    process = start(*command(*FAULTY, "model.fault=stuck", "name=t"), keep=True)
    for attempt in (1, 2, 3):
        begun = f"runs/*/attempts/{attempt:04d}/environment.json"
        until(lambda begun=begun: list(tmp_path.glob(begun)), f"attempt {attempt}")
        (folder,) = tmp_path.glob("runs/*")
        os.kill(journal.lease(journal.attempts(folder)[-1])["pid"], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    cell = load_cell(folder)
    assert (cell.state, cause_of(last_failure(cell))) == ("failed", "killed")
    assert "3 attempts ended without a new checkpoint" in last_failure(cell)["message"]


@pytest.mark.slow  # two ranks, started by torchrun
def test_a_killed_rank_is_no_crash(command: Line, tmp_path: Path) -> None:
    grid = [*FAULTY, "model.fault=slow", "name=r", "resources.processes=2", "train.parallel=ddp"]
    process = start(*command(*grid), keep=True)
    until(lambda: running_step(tmp_path, 1), "step 1")
    (folder,) = tmp_path.glob("runs/*")
    first_rank = psutil.Process(journal.lease(journal.attempts(folder)[0])["pid"])
    next(p for p in first_rank.parent().children() if p.pid != first_rank.pid).kill()
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    killed, _ = journal.attempts(folder)
    assert journal.events(killed)[-1]["error"] == "Killed"
    assert load_cell(folder).config.train.micro_batch is None


@pytest.mark.slow  # an interpreter of its own, in a cgroup
@pytest.mark.skipif(
    not os.access(CGROUP.parent, os.W_OK), reason="needs cgroups of version 1 and root"
)
def test_the_kernels_kill_for_memory_halves_the_micro_batch(command: Line, tmp_path: Path) -> None:
    line = command(*FAULTY, "model.fault=kernel_oom", "name=o", "train.batch_size=2")
    line += ["eval.batch_size=1", "eval.tokens=16", "train.steps=2"]
    CGROUP.mkdir()
    try:
        (CGROUP / "memory.limit_in_bytes").write_text(str(3 << 30))
        inside = f"echo $$ > {CGROUP}/cgroup.procs; exec {sys.executable} -m {shlex.join(line)}"
        done = subprocess.run(
            ["sh", "-c", inside], cwd=ROOT, capture_output=True, text=True, check=False
        )
        until(lambda: not (CGROUP / "cgroup.procs").read_text(), "empty cgroup")
    finally:
        CGROUP.rmdir()
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("runs/*")
    assert load_cell(folder).config.train.micro_batch == 1
    (failed,) = journal.events(journal.attempts(folder)[0])[1:]
    assert cause_of(failed) == "host memory"
    assert failed["message"].endswith("the kernel killed it for want of memory")


@pytest.mark.parametrize(
    ("error", "message", "cause"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 20 MiB", "gpu memory"),
        ("AcceleratorError", "CUDA error: out of memory", "gpu memory"),
        ("RuntimeError", "CUDNN_STATUS_ALLOC_FAILED when calling ...", "gpu memory"),
        ("RuntimeError", "DefaultCPUAllocator: can't allocate memory: you tried", "host memory"),
        ("OSError", "[Errno 12] Cannot allocate memory", "host memory"),
        ("_ArrayMemoryError", "Unable to allocate 8 TiB", "host memory"),
        ("RuntimeError", "the program of task 3 raised MemoryError", "code"),
        ("Crash", "the process ended with SIGKILL", "killed"),  # as recorded by earlier releases
        ("Crash", "the process ended with SIGSEGV", "crash"),
    ],
)
def test_memory_is_blamed_on_evidence_only(error: str, message: str, cause: str) -> None:
    assert cause_of({"error": error, "message": message}) == cause


def test_failures_that_are_alike_stop_the_sweep_which_tells_once(
    espalier: Run, tmp_path: Path
) -> None:
    told = tmp_path / "told.txt"
    grid = [
        "-m",
        *FAULTY,
        "model.fault=raise",
        "seed=1,2,3,4",
        "name=a",
        "hydra.launcher.jobs=1",
        "hydra.sweeper.max_alike=2",
        f"hydra.sweeper.on_failure='echo $ESPALIER_SWEEP $ESPALIER_STATES >> {told}'",
    ]
    first = espalier(*grid)
    assert first.returncode == 1
    assert "2 cells failed alike" in first.stderr
    assert sorted(journal.state(f) for f in tmp_path.glob("runs/*")) == ["failed"] * 2 + ["new"] * 2
    assert not told.exists()  # two cells have not ended
    rest = espalier(*[a for a in grid if "max_alike" not in a])
    assert rest.returncode == 1
    assert told.read_text() == 'a {"failed": 4}\n'
    assert espalier(*grid).returncode == 1  # nothing is left to run: nobody is told again
    notify(tmp_path / "sweeps" / "a")
    assert len(told.read_text().splitlines()) == 1


def test_an_ended_sweep_posts_to_a_url(espalier: Run, tmp_path: Path) -> None:
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    done = espalier("-m", "seed=1", "name=u", f"hydra.sweeper.on_finish='{url}'")
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert bodies == [{"sweep": "u", "states": {"finished": 1}}]


def test_three_legs_without_a_checkpoint_are_enough(espalier: Run, tmp_path: Path) -> None:
    from runner.launch.after_exit import give_up

    assert espalier("train.steps=2").returncode == 0
    (folder,) = tmp_path.glob("runs/*")
    (folder / "attempts/0001/events.jsonl").write_text("")
    cell = load_cell(folder)
    for count in (1, 2):
        assert len(journal.attempts(folder)) == count
        assert not give_up(cell)
        assert journal.claim(folder) is not None
        events = journal.attempts(folder)[-1] / "events.jsonl"
        events.write_text('{"event": "interrupted", "time": 0}\n')
    assert give_up(cell)
    assert cell.state == "failed"


def test_resources_are_a_function_of_the_config(espalier: Run, tmp_path: Path) -> None:
    wide = "{when:'model.width >= 32',cpus:7,timeout_min:9}"
    classes = f"resources.classes=[{wide},{{when:'seed >= 0',cpus:3}}]"
    done = espalier("-m", "model.width=24,32", "seed=1", "name=r", classes)
    assert done.returncode == 0, done.stderr
    found = {
        cell.config.model.width: cell.config.resources
        for cell in map(load_cell, tmp_path.glob("runs/*"))
    }
    assert (found[24].cpus, found[24].timeout_min) == (3, 60)
    assert (found[32].cpus, found[32].timeout_min) == (7, 9)
    bad = espalier("-m", "seed=1", "resources.classes=[{cpus:7}]")
    assert "needs a key `when`" in bad.stderr


def test_execution_keys_of_the_last_launch_hold(espalier: Run, tmp_path: Path) -> None:
    assert espalier("-m", "seed=1", "name=e", "train.clip=null", "data.split=tail").returncode == 0
    (folder,) = tmp_path.glob("runs/*")
    (folder / "attempts/0001/events.jsonl").unlink()  # as if it had been killed
    assert (
        espalier("-m", "seed=1", "name=e", "train.clip=null", "train.micro_batch=2").returncode == 0
    )
    assert load_cell(folder).config.train.micro_batch == 2
    again = json.loads((journal.attempts(folder)[-1] / "environment.json").read_text())
    assert again["micro_batch"] == 2


def test_a_signal_within_the_handler_of_another_stops_the_run_and_not_the_process() -> None:
    """SLURM's warning and the supervisor's SIGTERM come at one moment."""
    code = (
        "import signal, sys\n"
        "from runner.launch.worker import _stop_on_signals\n"
        "stop = _stop_on_signals()\n"
        "def second(frame, event, _):\n"
        "    if frame.f_code.co_name == 'set':\n"
        "        signal.raise_signal(signal.SIGTERM)\n"  # at every line of the first one's work
        "    return second\n"
        "sys.settrace(second)\n"
        "signal.raise_signal(signal.SIGUSR2)\n"
        "print(stop.is_set())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "True\n", done.stderr
