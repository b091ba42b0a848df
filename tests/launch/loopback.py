"""A SLURM cluster on loopback: its own munge, controller and nodes, without root.

Needs Debian's slurm-wlm and munge, and touches nothing of a system's own. Nodes are
named by addresses, 127.0.0.1 and 127.0.0.2, so that nobody has to resolve them.
"""

import contextlib
import os
import pathlib
import pwd
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
MinJobAge=900
CompleteWait=0
ReturnToService=2
SlurmdTimeout=5
SlurmctldTimeout=30
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 "
    "RealMemory=4000 Gres=gpu:2"
)


def missing() -> list[str]:
    """Return the programs that are not installed here."""
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


class Cluster:
    """Two nodes and a controller; commands are run with its environment."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.names = ["127.0.0.1", "127.0.0.2"]
        # The environment of a cluster that runs these tests is not this cluster's.
        self.environ = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM", "SBATCH", "SRUN"))
        } | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

    def start(self) -> None:
        """Start munge, the controller and both nodes; wait until all are idle."""
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        (folder / "state").mkdir(parents=True)
        (folder / "munge").mkdir(mode=0o755)
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        port = _free_ports(1 + len(self.names))
        nodes = [
            NODE.format(name=name, host=host, port=port + index)
            for index, name in enumerate(self.names, 1)
        ]
        (folder / "slurm.conf").write_text(
            CONF.format(
                folder=folder,
                host=host,
                port=port,
                user=pwd.getpwuid(os.getuid()).pw_name,
                nodes="\n".join(nodes),
            )
        )
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainCores=no\n")
        self.run(
            "munged", "--force", f"--socket={folder}/munge/socket",
            f"--key-file={key}", f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed",
        )  # fmt: skip
        self.run("slurmctld", "-f", folder / "slurm.conf")
        for name in self.names:
            (folder / f"spool-{name}").mkdir()
            self.start_node(name)
        self.wait_idle()

    def wait_idle(self) -> None:
        """Wait until both nodes take jobs."""
        wait(
            lambda: (
                self.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D")
                == str(len(self.names))
            ),
            60,
            self._logs,
        )

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self.run("slurmd", "-f", self.folder / "slurm.conf", "-N", name)

    def kill_node(self, name: str) -> None:
        """Kill a node's daemon and all that it started, as when a machine is gone."""
        marks = {
            f"SLURM_CONF={self.environ['SLURM_CONF']}",
            f"SLURMD_NODENAME={name}",
        }
        tasks, parents = [], set()
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if marks <= set((process / "environ").read_text().split("\0")):
                    tasks.append(int(process.name))
                    stat = (process / "stat").read_text()
                    parents.add(int(stat.rpartition(")")[2].split()[1]))
        daemon = int((self.folder / f"slurmd-{name}.pid").read_text())
        for pid in (daemon, *(parents - {1}), *tasks):  # who would tell goes first
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self, *command: object, **how) -> str:
        """Return what a command prints; raises what it says where it fails."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environ | how.pop("env", {}),
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            **how,
        )
        if done.returncode:
            raise RuntimeError(f"{command}: {done.returncode}\n{done.stderr}")
        return done.stdout.strip()

    def job(self, number: str, field: str) -> str:
        """Return a field of what the controller knows of a job."""
        shown = self.run("scontrol", "show", "job", number)
        return re.search(rf"\b{field}=(\S*)", shown)[1]

    def stop(self) -> None:
        """Cancel all jobs and end the daemons."""
        with contextlib.suppress(Exception):
            self.run("scancel", "--user", str(os.getuid()), "--signal=KILL", "--full")
            self.run("scancel", "--user", str(os.getuid()))
        names = [f"slurmd-{name}" for name in self.names]
        for name in [*names, "slurmctld", "munged"]:
            with contextlib.suppress(OSError, ValueError):
                pid = int((self.folder / f"{name}.pid").read_text())
                os.kill(pid, signal.SIGTERM)
                end = time.monotonic() + 10
                while _lives(pid) and time.monotonic() < end:
                    time.sleep(0.1)
                if _lives(pid):
                    os.kill(pid, signal.SIGKILL)

    def _logs(self) -> str:
        return "\n".join(
            "\n".join(file.read_text(errors="replace").splitlines()[-15:])
            for file in sorted(self.folder.glob("*.log"))
        )


def wait(holds, seconds: float, why=str) -> None:
    """Wait until `holds()`; fail with what `why()` says after `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise AssertionError(f"it did not come in {seconds} s\n{why()}")
        time.sleep(0.1)


def _free_ports(count: int) -> int:
    """Return the first of `count` ports in a row that nobody has now."""
    while True:
        first = random.randrange(20000, 30000, 10)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def _lives(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False
