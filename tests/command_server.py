"""The project's commands, forked from a process that has imported what they import.

    done = run("runner", "-m", "seed=1,2")                    # python -m runner -m seed=1,2
    process = start("runner.launch.worker", str(folder))      # signals can be sent to it

`python -m tests.command_server FD` imports once what commands import and forks a process for each
of them, which runs its module as `python -m` does: own arguments, environment, folder, output and
exit code. The template of a pool that such a command starts is a fork too. A test about starting,
importing, process groups or a fresh interpreter starts a real process and says so.
"""

import atexit
import functools
import gc
import importlib
import json
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
_IMPORTED = (
    "matplotlib.pyplot",
    "mlflow",
    "optuna",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "transformers",
    "runner.commands.hydra_plugin",
    "runner.commands.exchange",
    "runner.commands.infill",
    "runner.commands.models",
    "runner.commands.precision",
    "runner.commands.storage",
    "runner.launch.fork_preload",
    "runner.views.mlflow",
    "runner.views.plan",
    "runner.views.upload",
)
_LARGEST = 1 << 17  # bytes of a request: arguments and the environment
# jemalloc's thread, which pyarrow starts, is one that jemalloc itself carries over a fork.
_THREADS = {"python", "python3", "jemalloc_bg_thd"}


class Command:
    """A forked command, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, request: dict[str, Any], keep: bool) -> None:
        self.args, self.returncode = request["line"], None
        self._files: list[IO[bytes]] = [_output(keep) for _ in range(2)]
        self._status, theirs = os.pipe()
        with open(os.devnull, "rb") as empty:
            fds = [empty.fileno(), *(f.fileno() for f in self._files), theirs]
            socket.send_fds(_server(), [json.dumps(request).encode()], fds)
        os.close(theirs)
        self.pid = int(os.read(self._status, 16))

    def poll(self) -> int | None:
        """Return the exit code as `subprocess` counts it, None while it runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once there is one.

        Raises:
            subprocess.TimeoutExpired: it runs for longer than `timeout` seconds.
        """
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end and return what was written to stdout and stderr."""
        self.wait(timeout)
        return self.written()

    def written(self) -> tuple[str, str]:
        """Return what has been written to stdout and stderr so far."""
        # pread: where the file is read from here is also where the command writes next.
        out, errors = (os.pread(f.fileno(), os.fstat(f.fileno()).st_size, 0) for f in self._files)
        return out.decode(), errors.decode()

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(os.read(self._status, 16))
        return self.returncode

    def __del__(self) -> None:
        os.close(self._status)
        for file in self._files:
            file.close()


def start(
    *line: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, keep: bool = False
) -> Command:
    """Start a module with its arguments, as `python -m` would.

    Args:
        env: all of it; default: this process's, with one OpenMP thread. What a library reads when
            it is imported it has read already, at the first command.
        keep: keep the output for `communicate` and `written`.
    """
    given = dict(env if env is not None else os.environ | {"OMP_NUM_THREADS": "1"})
    return Command({"line": list(line), "cwd": str(cwd), "env": given}, keep)


def run(
    *line: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module with its arguments to its end."""
    command = start(*line, cwd=cwd, env=env, keep=True)
    out, errors = command.communicate(timeout)
    assert command.returncode is not None
    return subprocess.CompletedProcess(list(line), command.returncode, out, errors)


def _output(keep: bool) -> IO[bytes]:
    return tempfile.TemporaryFile() if keep else open(os.devnull, "wb")


@functools.cache
def _server() -> socket.socket:
    """Return the line to this process's server, which ends when it is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.command_server", str(theirs.fileno())],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


def _serve(line: socket.socket) -> dict[str, Any]:
    """Fork a process for each request; return the request in that process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for commands
    while True:
        message, fds, _, _ = socket.recv_fds(line, _LARGEST, 4)
        if not message:
            os._exit(0)
        request: dict[str, Any] = json.loads(message)
        if os.fork():
            for fd in fds:
                os.close(fd)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        if child:
            os.write(fds[3], b"%d" % child)
            os.write(fds[3], b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os._exit(0)
        for place, fd in enumerate(fds[:3]):
            os.dup2(fd, place)
        return request


def _run(request: dict[str, Any]) -> int:
    """Do in this fork what `python -m` does; return its exit code."""
    _close_all_but(range(3))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    given = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [request["cwd"], *(p for p in given if p and p not in sys.path)]
    sys.argv[:] = request["line"]
    multiprocessing.util.spawnv_passfds = _fork_template
    # As from a terminal, also where a shell has begun the tests in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: object = 0
    try:
        runpy.run_module(request["line"][0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    return int(code or 0)


def _close_all_but(kept: Collection[int]) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in kept:
            with suppress(OSError):  # the one that the folder was read by
                os.close(fd)


_spawn = multiprocessing.util.spawnv_passfds


def _fork_template(path: bytes, args: list[str], fds: list[int]) -> int:
    """Start multiprocessing's fork server by a fork: what it is to import is here already."""
    if "multiprocessing.forkserver" not in args[-1]:
        return _spawn(path, args, fds)
    child = os.fork()
    if child:
        return child
    try:
        _close_all_but((0, 1, 2, *fds))
        # As a fresh interpreter has them: this one was forked while it held their locks.
        multiprocessing.forkserver._forkserver.__init__()
        multiprocessing.resource_tracker._resource_tracker.__init__()
        exec(args[-1], {})
    finally:
        os._exit(0)


def import_all() -> None:
    """Import once what commands import."""
    for name in ("MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "true")  # as runner/__main__.py does
    for name in _IMPORTED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    names = {
        Path(f"/proc/self/task/{t}/comm").read_text().strip() for t in os.listdir("/proc/self/task")
    }
    gc.collect()
    gc.freeze()  # what no fork looks at it need not copy
    assert names <= _THREADS, f"an import started threads, which no fork keeps: {names - _THREADS}"


if __name__ == "__main__":
    import_all()
    with socket.socket(fileno=int(sys.argv[1])) as _line:
        _request = _serve(_line)
    _code = _run(_request)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_code)  # an interpreter's own end takes seconds, for all that was imported
