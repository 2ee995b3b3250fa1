"""Programs in the sandbox: right ones pass, wrong ones fail, none gets out."""

import os
import socket
from pathlib import Path

import psutil
import pytest

from runner.evaluate import sandbox
from runner.evaluate.code_execution import humaneval, mbpp
from runner.evaluate.sandbox import Limits, Wall, run
from runner.machine.errors import ConfigError
from tests.conftest import ROOT

WALLS: list[Wall] = ["bubblewrap", "namespaces"]


@pytest.fixture(params=WALLS)
def wall(request: pytest.FixtureRequest) -> Wall:
    chosen: Wall = request.param
    if not sandbox._works(chosen):
        pytest.skip(f"{chosen} does not work here: make sandbox")
    return chosen


def test_programs_pass_by_reaching_their_end(wall: Wall) -> None:
    assert run("import math, json, re\nassert math.gcd(4, 6) == 2", wall=wall).passed
    wrong = run("assert 1 + 1 == 3", wall=wall)
    assert not wrong.passed
    assert "AssertionError" in wrong.reason
    for early in ("import sys; sys.exit(0)", "import os; os._exit(0)", "def f(:"):
        assert not run(early, wall=wall).passed


@pytest.mark.parametrize(
    "program",
    [
        "import io, sys\nsys.stdout = io.StringIO()\nprint('x')",
        "import sys\nsys.stdout.close()",
        "import os\nprint('x')\nos.close(1)",
        "import os\nos.dup2(os.open('/dev/null', os.O_WRONLY), 1)",
        "import atexit\natexit.register(print, 'bye')",
        "from __future__ import annotations\nassert __name__ == '__main__'",
        "import sys\nassert sys.stdin.read() == '' and len(sys.argv) == 1",
        "import multiprocessing as m\ndef f(x):\n    return x * x\n"
        "with m.Pool(2) as pool:\n    assert pool.map(f, [1, 2, 3]) == [1, 4, 9]",
        "from multiprocessing.shared_memory import SharedMemory as S\n"
        "s = S(create=True, size=9)\ns.buf[0] = 1\ns.close()\ns.unlink()",
    ],
)
def test_right_programs_pass_whatever_they_do_to_stdout_or_start(program: str, wall: Wall) -> None:
    assert run(program, wall=wall) == sandbox.Outcome(True, "")


@pytest.mark.parametrize("first", ["sys.exit(0)", "assert False"])
def test_a_child_does_not_reach_the_end_for_its_parent(first: str, wall: Wall) -> None:
    program = f"import os, sys\nif os.fork():\n    os.wait()\n    {first}"
    assert not run(program, wall=wall).passed


def test_memory_is_limited_over_all_processes(wall: Wall) -> None:
    """Six processes: pages that they share count once, pages of their own each time."""
    limits = Limits(total_memory_bytes=200 << 20)
    fork = "for _ in range(6):\n    if os.fork() == 0:\n        "
    shared = f"import os, time\nx = bytearray(b'1' * (90 << 20))\n{fork}"
    shared += "time.sleep(0.3); os._exit(0)\nfor _ in range(6): os.wait()"
    assert run(shared, wall=wall, limits=limits).passed
    own = f"import os, time\n{fork}x = bytearray(b'1' * (90 << 20)); time.sleep(60)\ntime.sleep(60)"
    assert "took more than 210 MB" in run(own, wall=wall, limits=limits).reason


def test_nothing_outside_can_be_read_written_or_reached(wall: Wall, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        remount = "ctypes.CDLL(None).mount(b'none', b'/usr', None, 32, None)"
        connect = "import socket; socket.create_connection"
        processes = "[p for p in os.listdir('/proc') if p.isdigit()]"
        attempts = {
            "read a file": f"open({str(secret)!r}).read()",
            "read the passwords": "open('/etc/shadow').read()",
            "read the project": f"open({str(ROOT / 'README.md')!r}).read()",
            "write beside the libraries": "open('/usr/lib/x', 'w')",
            "write at the root": "open('/x', 'w')",
            "write beside Python": "import sys; open(sys.base_prefix + '/x', 'w')",
            "make it writable again": f"import ctypes; assert {remount} == 0",
            "reach this machine": f"{connect}(('127.0.0.1', {port}), 2)",
            "reach another": f"{connect}(('1.1.1.1', 53), 2)",
            "see other processes": f"import os; os.kill({os.getpid()}, 0)",
            "see many processes": f"import os; assert len({processes}) > 8",
            "know who started it": "import os; assert 'HOME' in os.environ or 'USER' in os.environ",
        }
        for what, program in attempts.items():
            assert not run(program, wall=wall).passed, what
    mine = Path("/tmp", f"written_inside_{os.getpid()}")
    assert run(
        f"open({str(mine)!r}, 'w').write('mine'); assert open({str(mine)!r}).read() == 'mine'",
        wall=wall,
    ).passed
    assert not mine.exists()


def test_limits_hold(wall: Wall) -> None:
    small = Limits(wall_s=3.0, memory_bytes=1 << 28, file_bytes=1 << 20, files=32)
    for what, program in {
        "memory": "x = bytearray(1 << 29)",
        "a large file": "open('/tmp/x', 'wb').write(b'0' * (2 << 20))",
        "many open files": "f = [open('/dev/null') for _ in range(64)]",
        "a full disk": "for i in range(200): open(f'/tmp/{i}', 'wb').write(b'0' * (1 << 20))",
        "full devices": "for i in range(200): open(f'/dev/{i}', 'wb').write(b'0' * (1 << 20))",
        "full memory": "for i in range(200): open(f'/dev/shm/{i}', 'wb').write(b'0' * (1 << 20))",
        "much to say": "while True: print('0' * 9999)",
    }.items():
        assert not run(program, wall=wall, limits=small).passed, what
    slow = run("import time; time.sleep(60)", wall=wall, limits=Limits(wall_s=1.0))
    assert slow.reason == "timed out after 1 s"


def test_children_end_with_the_program(wall: Wall) -> None:
    mark = f"espalier-orphan-{os.getpid()}"
    command = f"sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}]"
    program = (
        f"import os, sys, time\nif os.fork() == 0:\n    os.setsid(); os.execv({command})\n"
        "time.sleep(0.5)"
    )

    def orphans() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]

    assert run(program, wall="none").passed
    (found,) = orphans()  # this is how one looks
    found.kill()
    found.wait()
    assert run(program, wall=wall).passed
    _, alive = psutil.wait_procs(orphans(), timeout=5)  # a killed one may take a moment to go
    assert not alive


def test_without_a_sandbox_nothing_runs_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_works", lambda wall: False)
    with pytest.raises(ConfigError, match="allow_unsafe_code=true"):
        sandbox.choose_wall(False)
    assert sandbox.choose_wall(True) == "none"
    assert run("assert True", wall="none").passed


def test_programs_are_scored_as_their_benchmarks_do(wall: Wall) -> None:
    row = {
        "prompt": "def f(x):\n",
        "test": "def check(c):\n    assert c(2) == 4",
        "entry_point": "f",
    }
    assert humaneval(row, ["    return x * x"]) == {"pass_at_1": 1.0}
    assert humaneval(row, ["    return x"]) == {"pass_at_1": 0.0}
    row = {"test_list": ["assert g(1) == 2", "assert g(2) == 3"], "test_setup_code": ""}  # type: ignore[dict-item]
    assert mbpp(row, ["def g(x):\n    return x + 1"]) == {"pass_at_1": 1.0}
    assert mbpp(row, ["def g(x):\n    return 2"]) == {"pass_at_1": 0.0}
