"""Who this process is among several, by flags or by what started it."""

import dataclasses
import re
from collections.abc import Mapping

from fm_jax.errors import UserError

AUTO = "auto"  # as an address: jax asks the TPU's or the cloud's own services
NAMES = ("FM_COORDINATOR", "FM_NUM_PROCESSES", "FM_PROCESS_ID")
GPU_PLATFORMS = ("cuda", "gpu", "rocm")  # as jax names them
MOST_DIGITS = 18
# A name, an IPv4 address, or an IPv6 one: others end in the resolver's own errors.
HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9_][A-Za-z0-9_-]{0,62}(?:\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?"
    r"|\[?[0-9A-Fa-f:.]+(?:%[A-Za-z0-9]+)?\]?"
)
LOOPBACK = {"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "[::1]": "[::1]"}
FIRST_PORT, NUM_PORTS = 61440, 4096  # above the ports that Linux gives to clients


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where process 0 listens, how many processes there are, and which this one is.

    `local_device_ids` are the GPUs of its machine that this process takes; None: all
    that it sees.
    """

    coordinator: str
    num_processes: int = 0
    process_id: int = -1
    local_device_ids: tuple[int, ...] | None = None

    @property
    def bind_host(self) -> str:
        """Where process 0 listens, "" for all addresses of its machine.

        All others are there too where they call it by an address that stays there.
        """
        return LOOPBACK.get(self.coordinator.rpartition(":")[0].lower(), "")


def find(
    coordinator: str, num_processes: int, process_id: int, environ: Mapping[str, str]
) -> Cluster | None:
    """Return the cluster that this process belongs to; None where it is alone.

    Each value is taken from the arguments ("", 0 and -1: not given), else from FM_*,
    else from Open MPI, SLURM or a TPU pod. The id may be that of an indexed Kubernetes
    job. FM_NUM_PROCESSES=1 is alone, whatever started it; FM_COORDINATOR=auto leaves
    all to jax. Raises UserError on what is missing or contradicts itself.
    """
    address = coordinator or environ.get(NAMES[0]) or None
    num = num_processes if num_processes > 0 else _int(environ, NAMES[1])
    index = process_id if process_id >= 0 else _int(environ, NAMES[2])
    if num == 1 and index in (None, 0):
        return None
    if address == AUTO:
        return Cluster(AUTO)
    given = (address, num, index)
    told = _by_launcher(environ) if None in given else None
    if given == (None, None, None) and (told is None or told.coordinator == AUTO):
        return told
    local = None
    if told is not None and told.coordinator != AUTO:
        address = address or told.coordinator or None
        num = told.num_processes if num is None else num
        index = told.process_id if index is None else index
        local = told.local_device_ids
    elif index is None:
        index = _int(environ, "JOB_COMPLETION_INDEX")
    _check(address, num, index)
    return Cluster(address, num, index, local)


def promised_gpus(environ: Mapping[str, str]) -> str:
    """Return what says that there are GPUs here, as NAME=VALUE; "" where nothing does.

    Nothing does where JAX_PLATFORMS chooses another kind.
    """
    if (environ.get("JAX_PLATFORMS") or "cuda").partition(",")[0] not in GPU_PLATFORMS:
        return ""
    if environ.get("FM_ACCELERATOR") == "cuda":
        return "FM_ACCELERATOR=cuda"
    num = _int(environ, "SLURM_GPUS_ON_NODE")
    return f"SLURM_GPUS_ON_NODE={num}" if num else ""


def _int(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    if not text:
        return None
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise UserError(f"{name} must be a whole number; got {text[:40]!r}.")
    return int(text)


def _whole(text: str) -> int:
    """Return a number, 0 where a text is none that can be."""
    return int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else 0


def _check(address: str | None, num: int | None, index: int | None) -> None:
    missing = [
        name
        for name, value in zip(NAMES, (address, num, index), strict=True)
        if value is None
    ]
    if missing:
        raise UserError(
            "several processes must be told --coordinator, --num_processes and "
            f"--process_id, or {', '.join(NAMES)}; got no {' and no '.join(missing)}. "
            "Give all, or none for one process alone."
        )
    if num < 1:
        raise UserError(f"--num_processes must be >= 1; got {num}.")
    if index >= num:
        raise UserError(
            f"--process_id must be below --num_processes; got {index} of {num}. "
            "The first process is 0."
        )
    host, _, port = address.rpartition(":")
    is_number = port.isdecimal() and len(port) <= MOST_DIGITS
    if not HOST.fullmatch(host) or not is_number or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator must be HOST:PORT; got {address!r}. It is where process 0 "
            "runs and a port that is free there."
        )


def _by_launcher(environ: Mapping[str, str]) -> Cluster | None:
    """Return what started this process as one of several; None where nothing did."""
    if num := _int(environ, "OMPI_COMM_WORLD_SIZE"):
        local = None
        if (_int(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1) > 1:
            local = _own_device(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
        index = _int(environ, "OMPI_COMM_WORLD_RANK")
        return Cluster(_mpi_address(environ), num, index, local) if num > 1 else None
    if "SLURM_JOB_ID" in environ:
        num = _int(environ, "SLURM_STEP_NUM_TASKS") or _int(environ, "SLURM_NTASKS")
        if (num or 1) == 1:
            return None
        if not environ.keys() >= {"SLURM_STEP_NODELIST", "SLURM_PROCID"}:
            raise UserError(
                f"a SLURM job of {num} tasks must start the command with srun; got it "
                "without. Write: srun fm ...; or set FM_NUM_PROCESSES=1 for one alone."
            )
        local = None
        if num > (_int(environ, "SLURM_STEP_NUM_NODES") or 1):
            local = _own_device(environ, "SLURM_LOCALID")
        index = _int(environ, "SLURM_PROCID")
        return Cluster(_slurm_address(environ), num, index, local)
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices = _int(environ, "MEGASCALE_NUM_SLICES") or 1
    return Cluster(AUTO) if slices > 1 or "," in (hosts or "") else None


def _own_device(environ: Mapping[str, str], name: str) -> tuple[int] | None:
    """Return this process's one GPU where several share a machine and see them all."""
    bound = {"JAX_LOCAL_DEVICE_IDS", "SLURM_GPUS_PER_TASK"} & environ.keys()
    if bound or environ.get("CUDA_VISIBLE_DEVICES", ",").isdecimal():
        return None
    return (_int(environ, name) or 0,)


def _slurm_address(environ: Mapping[str, str]) -> str:
    """Return the first of the step's nodes: of "gpu[07-09,12],cpu1" it is gpu07."""
    start, number, end = re.match(
        r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", environ["SLURM_STEP_NODELIST"]
    ).groups("")
    # Two steps of one job may run at once, and must not meet each other.
    job, step = (_int(environ, f"SLURM_{n}_ID") or 0 for n in ("JOB", "STEP"))
    return f"{start}{number}{end}:{_port(environ, job + 769 * step)}"


def _mpi_address(environ: Mapping[str, str]) -> str:
    """Return where mpirun runs; "" for Open MPI 5, which does not tell."""
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    host = re.search(r"tcp://([^,:]+)|tcp6://(\[[^,\]]+)", uri)
    if not host:
        return ""
    job = _whole(uri.partition(".")[0]) // NUM_PORTS  # Open MPI counts in 4096s
    return f"{host[1] or host[2] + ']'}:{_port(environ, job)}"


def _port(environ: Mapping[str, str], job: int) -> int:
    return _int(environ, "JAX_COORDINATOR_PORT") or FIRST_PORT + job % NUM_PORTS
