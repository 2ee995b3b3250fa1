"""Two members of a group work in one folder: what one makes, the other reads and goes on with.

The members are made here, and the folder that hides root's Python from them is opened in a private
mount namespace.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.machine import storage
from runner.records import journal
from tests.conftest import ROOT, TINY, write_text

GROUP, MEMBERS = "esplab", ("espone", "esptwo")
_NEEDS = ("useradd", "groupadd", "userdel", "setpriv", "unshare")
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, _NEEDS)),
    reason=f"needs root and {', '.join(_NEEDS)}",
)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder of the group, as groups have them: what is made in it belongs to the group."""
    folder = Path("/tmp/espalier-shared")
    subprocess.run(["groupadd", "--force", GROUP], check=True)
    for member in MEMBERS:
        subprocess.run(["useradd", "-M", "-g", GROUP, member], check=True)
    try:
        folder.mkdir()
        shutil.chown(folder, group=GROUP)
        folder.chmod(0o2775)
        write_text(folder / "text.txt").chmod(0o664)
        yield folder
    finally:
        shutil.rmtree(folder)
        for member in MEMBERS:
            subprocess.run(["userdel", member], check=True, capture_output=True)
        subprocess.run(["groupdel", GROUP], check=False, capture_output=True)


def _as_member(member: str, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Run commands of the project one after the other as `member`, with umask 002."""
    lines = [shlex.join([sys.executable, "-m", *command]) for command in commands]
    user = f"setpriv --reuid={member} --regid={GROUP} --init-groups"
    hide = "mount -t proc -o hidepid=2 proc /proc;"  # as hosts of many users are set up
    script = f"{hide} {_open(Path(sys.base_prefix))} umask 002; exec {user} sh -ec " + shlex.quote(
        "; ".join(lines)
    )
    return subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HOME": "/nonexistent"},
    )


def _open(python: Path) -> str:
    """Return the shell lines that put an open folder in the place of one that hides `python`."""
    hidden = next((p for p in reversed(python.parents) if not p.stat().st_mode & 0o001), None)
    if hidden is None:
        return ""
    mount = [
        "mount --make-rprivate /",
        "mount -t tmpfs -o mode=755 tmpfs /mnt",
        "mkdir /mnt/python",
    ]
    mount += [f"mount --bind {python} /mnt/python", f"mount -t tmpfs -o mode=755 tmpfs {hidden}"]
    mount += [f"mkdir -p {python}", f"mount --bind /mnt/python {python}"]
    return "; ".join(mount) + ";"


@needs_root
@pytest.mark.slow  # five interpreters, which two users start
def test_members_of_a_group_read_train_and_analyse_in_one_root(shared: Path) -> None:
    tiny = [override for override in TINY if override != "track.uri=off"]
    train = ["runner", "-m", *tiny, f"data.sources.0.path={shared}/text.txt", f"root={shared}"]
    first = _as_member(MEMBERS[0], [a for a in [*train, "name=s", "seed=1"] if a != "-m"])
    assert first.returncode == 0, first.stderr
    (begun,) = shared.glob("runs/*")
    (journal.attempts(begun)[0] / "events.jsonl").write_text("")  # as if it had been killed
    before = os.umask(0o002)
    assert journal.claim(begun) is not None  # by a process that is hidden from the member
    look = ["runner.commands.cli", "status", "s", "--root", str(shared)]
    assert "running" in _as_member(MEMBERS[1], look).stdout
    journal.record_end(begun, "interrupted")
    os.umask(before)
    by = ["--rows", "seed", "--cols", "model.width"]
    second = _as_member(
        MEMBERS[1],
        look,
        [*train, "name=s", "seed=1,2"],
        ["analysis", "table", str(shared / "sweeps/s"), *by, "--out", str(shared / "table.json")],
    )
    assert second.returncode == 0, second.stderr
    assert "interrupted" in second.stdout
    assert "2 to run" in second.stderr
    assert "not everything was uploaded" not in first.stderr + second.stderr
    assert {journal.state(run) for run in shared.glob("runs/*")} == {"finished"}
    assert len(journal.attempts(begun)) == 3
    closed = [
        f"{path} {oct(path.stat().st_mode)}"
        for path in shared.rglob("*")
        if path.stat().st_mode & 0o060 != 0o060
    ]
    assert not closed


@pytest.mark.parametrize(("umask", "rights"), [(0o002, 0o664), (0o027, 0o640), (0o077, 0o600)])
def test_a_file_has_the_rights_that_the_umask_leaves(
    umask: int, rights: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        storage.write_atomically(tmp_path / "file.json", "{}")
        attempt = journal.claim(tmp_path)
    finally:
        os.umask(before)
    assert attempt is not None
    for file in (tmp_path / "file.json", attempt / "lease.json"):
        assert file.stat().st_mode & 0o777 == rights
