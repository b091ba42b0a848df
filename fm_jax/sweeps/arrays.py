"""The commands with which a cluster runs lines of a sweep's file."""

import shlex
from collections.abc import Collection, Sequence

from fm_jax.sweeps.plans import Planned

BLOCK = 1000  # tasks of an array: SLURM's MaxArraySize is 1001 unless a site raises it
AT_ONCE = 16
SCRIPT = "launch/slurm/sweep.sbatch"


def commands(runs: Sequence[Planned], wanted: Collection[str], file: str) -> list[str]:
    """Return the sbatch commands, in their order, that run those of these names.

    What goes on from another run of them waits for its array.
    """
    waves: dict[int, list[int]] = {}
    depth: dict[str, int] = {}
    for one in runs:  # parents stand first
        if one.name in wanted:
            depth[one.name] = depth.get(one.parent, -1) + 1
            waves.setdefault(depth[one.name], []).append(one.index)
    said = []
    for number, indices in sorted(waves.items()):
        for offset in sorted({BLOCK * (index // BLOCK) for index in indices}):
            own = [i - offset for i in indices if offset <= i < offset + BLOCK]
            command = f"--array={ranges(own)}%{AT_ONCE} {SCRIPT} {shlex.quote(file)}"
            if number:
                command = f"--dependency=afterany:$JOBS {command}"
            before = f"FM_SWEEP_OFFSET={offset} " if offset else ""
            if number + 1 in waves:  # the next wave waits for it
                earlier = "$JOBS:" if said else ""
                said.append(f"JOBS={earlier}$({before}sbatch --parsable {command})")
            else:
                said.append(f"{before}sbatch {command}")
    return said


def ranges(indices: Collection[int]) -> str:
    """Return 0, 1, 2, 5 as 0-2,5."""
    found: list[list[int]] = []
    for index in sorted(indices):
        if found and index == found[-1][1] + 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
