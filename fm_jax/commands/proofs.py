"""Commands that make a run's steps again, or all of it, and compare."""

import json
import sys
import tempfile
from pathlib import Path

from fm_jax import machine
from fm_jax.commands.command import Command
from fm_jax.errors import UserError

EXIT_OTHER = 1  # what was made again is not what it was


def replay(flags, raw, argv) -> int:
    """Make one step of a run again."""
    machine.tune_allocator()
    from fm_jax.train import replay as replaying

    found = replaying.replay(
        Path(flags.run), flags.step, lambda line: print(line, file=sys.stderr)
    )
    if flags.json:
        print(json.dumps(found.numbers))
    else:
        for name, value in found.numbers.items():
            print(f"{name} {value!r}")
    common = found.numbers.keys() & found.written.keys()
    said = f"all {len(common)} metrics that the run wrote are the same, bit for bit"
    if not common:
        said = "the run wrote no metrics of this step to compare with"
    elif found.changed:
        said = f"other than the run wrote: {', '.join(found.changed)}"
    print(f"{said}\n{found.folder}", file=sys.stderr)
    return EXIT_OTHER if found.changed else 0


def verify_resume(flags, raw, argv) -> int:
    """Kill a run again and again, and compare how it ends."""
    from fm_jax import config as configs
    from fm_jax.train import proof

    raw = configs.check(raw).raw
    if flags.kills < 1:
        raise UserError(f"--kills must be at least 1; got {flags.kills}.")
    folder = Path(flags.workdir or tempfile.mkdtemp(prefix="fm-verify-resume-"))
    found = proof.prove(
        raw,
        folder,
        num_kills=flags.kills,
        seed=flags.seed,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    for difference in found.differences:
        print(f"other: {difference}")
    verdict = "NOT the same" if found.differences else "the same, bit for bit"
    print(
        f"{len(found.kills)} kills; {found.num_arrays} arrays and {found.num_lines} "
        f"lines of metrics are {verdict}. Both runs are in {folder}"
    )
    return EXIT_OTHER if found.differences else 0


COMMANDS = {
    "replay": Command(
        replay,
        "make one step of a run again: its batch, its norms, its numbers",
        "fm replay --run=runs/quickstart-1a2b3c4d --step=120",
        {
            "run": (None, "the run folder"),
            "step": (0, "which step, from 1"),
            "json": (False, "print the numbers as JSON"),
        },
    ),
    "verify_resume": Command(
        verify_resume,
        "prove on this machine that a run that is killed ends with the same bits",
        "fm verify_resume --config=configs/quickstart.py --kills=5",
        {
            "kills": (
                4,
                "how often it is killed, in turn while it compiles, takes a step, "
                "saves and evaluates",
            ),
            "seed": (0, "of the moments"),
            "workdir": ("", "a new folder for the two runs; default: a temporary one"),
        },
        takes_config=True,
    ),
}
