"""A real four-node SLURM with accounting on one Debian machine, for tests and for trials.

    make slurm-up        then: export SLURM_CONF=/tmp/espalier-slurm/slurm.conf; sinfo
    make slurm-down

Needs root and Debian's slurmctld, slurmd, slurmdbd, slurm-client, munge and mariadb-server, which
`make slurm-up` installs. There is no systemd: every daemon is started by hand, its pid written to
`daemons.json`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

HOME = Path(os.environ.get("ESPALIER_SLURM", "/tmp/espalier-slurm"))
NODES = ("n1", "n2", "n3", "n4")
_DAEMONS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")
_DB_PORT, _DBD_PORT = 16833, 16819
_STARTED: list[subprocess.Popen[bytes]] = []  # they outlive this process; it never waits for them

_SLURM = """\
ClusterName=lab
FirstJobId={first}
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={D}/run/munge.sock,cred_expire=5
SlurmctldPort=16817
SlurmctldPidFile={D}/run/slurmctld.pid
SlurmctldLogFile={D}/log/slurmctld.log
SlurmdPidFile={D}/run/slurmd-%n.pid
SlurmdLogFile={D}/log/slurmd-%n.log
StateSaveLocation={D}/state
SlurmdSpoolDir={D}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_min_interval=10000,sched_interval=5,bf_interval=1,defer_batch
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=5
MaxArraySize=10001
SlurmdTimeout=20
AccountingStorageEnforce=associations,limits,qos
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={dbd}
AccountingStoragePass={D}/run/munge.sock
JobAcctGatherType=jobacct_gather/linux
NodeName=n[1-4] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[17001-17004] {shape}
PartitionName=main Nodes=ALL Default=YES DefaultTime=60 DefMemPerCPU=100 PriorityTier=10
PartitionName=low Nodes=ALL DefMemPerCPU=100 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=cheap Nodes=ALL DefMemPerCPU=100 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=spot Nodes=ALL DefMemPerCPU=100 PriorityTier=1 PreemptMode=CANCEL
PartitionName=high Nodes=ALL DefMemPerCPU=100 PriorityTier=100 PreemptMode=OFF
"""
_SHAPE = "Sockets=1 CoresPerSocket=8 RealMemory=16000 Gres=gpu:a100:4"
_DBD = """\
AuthType=auth/munge
AuthInfo=socket={D}/run/munge.sock
DbdHost=localhost
DbdPort={dbd}
SlurmUser=root
LogFile={D}/log/slurmdbd.log
PidFile={D}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={db}
StorageUser=slurm
StoragePass=lab
StorageLoc=slurm
"""


def missing() -> list[str]:
    """Return what a cluster needs and this machine lacks: programs, or the rights of root."""
    absent = [name for name in _DAEMONS if shutil.which(name) is None]
    return absent + ["root"] * (os.geteuid() != 0)


def up() -> None:
    """Start all daemons and wait until the nodes are idle; return at once if they are."""
    if is_up() and _idle() == len(NODES):
        return
    down()
    _write_files()
    munge = ["munged", "--foreground", "--force", f"--key-file={HOME}/munge.key"]
    munge += [f"--{n}-file={HOME}/run/munge.{n}" for n in ("pid", "seed")]
    munge += [f"--log-file={HOME}/log/munge.log", f"--socket={HOME}/run/munge.sock"]
    _start("munged", munge)
    _database()
    _start("slurmdbd", ["slurmdbd", "-D"])
    _retry(["sacctmgr", "-i", "add", "cluster", "lab"])
    _run(["sacctmgr", "-i", "add", "account", "lab", "Cluster=lab"])
    _run(["sacctmgr", "-i", "add", "user", "root", "Account=lab"])
    _start("slurmctld", ["slurmctld", "-D", "-c"])
    for node in NODES:
        _start(f"slurmd-{node}", ["slurmd", "-D", "-N", node])
    _wait("idle nodes", lambda: _idle() == len(NODES))


def down() -> None:
    """Cancel all jobs, then end the daemons, last started first."""
    daemons = _daemons()
    if is_up():  # without a controller scancel would wait for one
        command = ["timeout", "10", "scancel", "--user=root"]
        subprocess.run(command, env=_environment(), capture_output=True, check=False)
    for process in reversed(daemons.values()):
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            time.sleep(0.5 if number == signal.SIGTERM else 0.0)
    (HOME / "daemons.json").unlink(missing_ok=True)


def restart(daemon: str) -> None:
    """Start a daemon again that a test has killed."""
    node = daemon.partition("-")[2]
    _start(daemon, ["slurmd", "-D", "-N", node] if node else [daemon, "-D"])


def stop(daemon: str, number: int = signal.SIGKILL) -> None:
    """Kill one daemon, as a crash of its machine would."""
    process = _daemons()[daemon]
    process.send_signal(number)
    _wait(f"end of {daemon}", lambda: not process.is_running() or process.status() == "zombie")


def configure(**keys: object) -> None:
    """Set keys of slurm.conf and start slurmctld again."""
    file = HOME / "slurm.conf"
    lines = [line for line in file.read_text().splitlines() if line.partition("=")[0] not in keys]
    file.write_text("\n".join([*lines, *(f"{k}={v}" for k, v in keys.items())]) + "\n")
    stop("slurmctld", signal.SIGTERM)
    restart("slurmctld")
    _wait("controller", lambda: _idle() > 0)


def save(job: str) -> None:
    """Make the controller write its state, which takes it some seconds, and wait until it has."""
    now = time.time()
    _run(["scontrol", "update", f"JobId={job}", "Comment=saved"])
    _wait("saved state", lambda: (HOME / "state/job_state").stat().st_mtime > now)


def is_up() -> bool:
    """Whether a controller runs."""
    return "slurmctld" in _daemons()


def _daemons() -> dict[str, psutil.Process]:
    # A pid alone is no proof: after a restart of the machine it may be another process's.
    file, alive = HOME / "daemons.json", {}
    for name, (pid, created) in (json.loads(file.read_text()) if file.exists() else {}).items():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                alive[name] = process
    return alive


def _write_files() -> None:
    shutil.rmtree(HOME, ignore_errors=True)
    for folder in ("run", "log", "state", "db", "dev", *(f"spool/{node}" for node in NODES)):
        (HOME / folder).mkdir(parents=True)
    os.chmod(HOME, 0o755)
    # A step that outlives its cluster removes its socket at its end, whose name has the job's id.
    first = int(time.time()) % 10_000_000
    names = {"D": HOME, "dbd": _DBD_PORT, "db": _DB_PORT, "shape": _SHAPE, "first": first}
    (HOME / "slurm.conf").write_text(_SLURM.format(**names))
    (HOME / "slurmdbd.conf").write_text(_DBD.format(**names))
    os.chmod(HOME / "slurmdbd.conf", 0o600)
    # GPUs that are device files only: enough to be counted and dealt out.
    for index in range(4):
        os.mknod(HOME / f"dev/nvidia{index}", 0o666 | 0o020000, os.makedev(1, 3))
    (HOME / "gres.conf").write_text(
        f"NodeName=n[1-4] Name=gpu Type=a100 File={HOME}/dev/nvidia[0-3]\n"
    )
    (HOME / "munge.key").write_bytes(os.urandom(1024))
    os.chmod(HOME / "munge.key", 0o400)


def _database() -> None:
    _run(["mariadb-install-db", "--user=root", f"--datadir={HOME}/db", "--skip-test-db"])
    command = ["mariadbd", "--no-defaults", "--user=root", f"--datadir={HOME}/db"]
    command += [f"--socket={HOME}/run/db.sock", f"--port={_DB_PORT}", "--bind-address=127.0.0.1"]
    _start("mariadbd", [*command, f"--pid-file={HOME}/run/db.pid", "--innodb-buffer-pool-size=64M"])
    users = ("slurm@'%'", "slurm@localhost")
    grants = [f"GRANT ALL ON slurm.* TO {user} IDENTIFIED BY 'lab';" for user in users]
    sql = " ".join(["CREATE DATABASE slurm;", *grants])
    _retry(["mariadb", f"--socket={HOME}/run/db.sock", "-e", sql])


def _environment() -> dict[str, str]:
    return os.environ | {"SLURM_CONF": str(HOME / "slurm.conf")}


def _start(name: str, command: list[str]) -> None:
    with open(HOME / "log" / f"{name}.out", "ab") as log:
        process = subprocess.Popen(
            command,
            env=_environment(),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    _STARTED.append(process)
    file = HOME / "daemons.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(
        json.dumps(known | {name: [process.pid, psutil.Process(process.pid).create_time()]})
    )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])}: {done.stdout}{done.stderr}; logs are in {HOME}/log")
    return done.stdout


def _retry(command: list[str]) -> None:
    def works() -> bool:
        done = subprocess.run(command, env=_environment(), capture_output=True, check=False)
        return done.returncode == 0

    _wait(" ".join(command[:3]), works)


def _idle() -> int:
    """Return the number of nodes that are up: idle, mixed or allocated."""
    sinfo = ["sinfo", "-h", "-N", "-o", "%N %T"]
    done = subprocess.run(sinfo, env=_environment(), capture_output=True, text=True, check=False)
    up_states = ("idle", "mixed", "allocated")
    return len({line.split()[0] for line in done.stdout.splitlines() if line.endswith(up_states)})


def _wait(what: str, condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"no {what} after 60 s; logs are in {HOME}/log")
        time.sleep(0.2)


if __name__ == "__main__":
    {"up": up, "down": down}[sys.argv[1]]()
