"""The plans that are shipped, compiled for real: configs/plans.json and plans.md.

python -m fm_jax.planning.shipped [WORD ...] makes those again whose names hold a word,
all of them without one. Each is a process of its own; all take about ten minutes on two
cores. No accelerator is needed, only the extra `tpu`.
"""

import json
import subprocess
import sys
from pathlib import Path

from fm_jax.compiled.estimates import size
from fm_jax.planning import show

ROOT = Path(__file__).parent.parent.parent
DATA, PAGE = ROOT / "configs" / "plans.json", ROOT / "configs" / "plans.md"
LLAMA, GPT2 = "configs/llama_pretrain.py", "configs/gpt2_pretrain.py"
PLANS = {
    "GPT-2 124M on one H100": (f"{GPT2}:124m", "h100:1"),
    "Llama 3 1B on 16 v5e": (f"{LLAMA}:1b", "v5e:4x4"),
    "Llama 3 8B on 64 v5p": (f"{LLAMA}:8b", "v5p:4x4x4"),
    "Llama 3 8B on 256 v5e": (
        f"{LLAMA}:8b",
        "v5e:16x16",
        # What the search found: as configured it needs more than there is.
        "--config.model.remat=dots",
        "--config.train.accumulation=4",
        "--config.mesh.preset=fsdp_tensor",
        "--config.mesh.tensor=4",
    ),
    "Llama 3 70B on 512 v5p": (f"{LLAMA}:70b", "v5p:8x8x8"),
}
HEAD = """# Plans, compiled before a chip is rented

Made by `python -m fm_jax.planning.shipped`. Each is `fm plan` of a config that is
shipped, compiled by the compiler of the chip that it names on a machine without one;
none was run on that chip. For GPUs the compiler is XLA's for CPUs: their memory is an
estimate, and the roofline leaves main memory out. Units are powers of ten. The roofline
is the slowest of products at the published peak, main memory and network at full
bandwidth, the others hidden behind it: no run of this program is faster.

"""
COLUMNS = (
    "plan",
    "memory of a device",
    "mesh",
    "micro-batches",
    "remat",
    "step at the roofline",
    "MFU",
    "compiled in",
)


def main(words: list[str]) -> int:
    """Make the plans whose names hold one of the words; return the exit status."""
    found = json.loads(DATA.read_text()) if DATA.exists() else {}
    for name, (config, topology, *flags) in PLANS.items():
        if words and not any(word in name for word in words):
            continue
        command = ["fm", "plan", f"--config={config}", f"--topology={topology}"]
        command += flags
        print(" ".join(command), file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "fm_jax.cli", *command[1:], "--json"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            return done.returncode
        found[name] = {"command": " ".join(command)} | json.loads(done.stdout)
        DATA.write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text(page(found))
    return 0


def page(found: dict[str, dict]) -> str:
    """Return the page of the plans, in the order of PLANS."""
    found = {name: found[name] for name in PLANS if name in found}
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    rows += [_row(name, plan) for name, plan in found.items()]
    text = HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    for name, plan in found.items():
        lines = show.lines(plan)
        if "instead" in plan:
            lines += ["", show.instead(plan), *show.lines(plan["instead"])]
        text += f"\n## {name}\n\n`{plan['command']}`, {plan['date']}, "
        text += f"{plan['versions']}\n\n```\n" + "\n".join(lines) + "\n```\n"
    return text


def _row(name: str, plan: dict) -> list[str]:
    used = plan.get("instead", plan)
    memory, roofline = used["memory"], used.get("roofline")
    fits = "" if memory["fits"] else " (does not fit)"
    return [
        name + (" (with overrides)" if "instead" in plan else ""),
        f"{size(memory['needed'])} of {size(memory['capacity'])}{fits}",
        " ".join(f"{axis}={n}" for axis, n in used["mesh"].items()) or "1",
        str(used["micro_batches"]),
        used["remat"],
        f"{roofline['step_seconds']:.3g} s" if roofline else "",
        f"{roofline['mfu']:.0%}" if roofline else "",
        f"{used['compile_seconds']:.0f} s",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
