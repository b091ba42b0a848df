"""The runs of a sweep, planned: their configs, names, hashes and costs.

What is planned follows from the sweep alone, so that the same file names the same runs.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.models import counts
from fm_jax.runs import Run
from fm_jax.sweeps import costs, designs, ladder
from fm_jax.sweeps import sweep as sweeps
from fm_jax.sweeps.sweep import Sweep

FAR = 0.05  # of a budget that a run misses, before it is said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a sweep, as it will be trained.

    `tokens` and `flops` are of the whole schedule, its parent's part included; `flops`
    are counted by design.flops, `flops_exact` per product. `role` is run, trunk or
    branch; where there is a `parent`, a run's name, it goes on from `branch_step`,
    which is that run's last. `disk_bytes` are of the checkpoints that stay. What only
    the data can tell is 0, and the params then {}.
    """

    index: int
    name: str
    hash: str
    config: dict
    overrides: dict[str, Any]
    role: str = "run"
    parent: str = ""
    branch_step: int = 0
    budget_flops: float | None = None
    replicate: int = 0
    dial: int = 0
    params: dict[str, int] = dataclasses.field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    flops_exact: float = 0.0
    memory_bytes: int = 0
    disk_bytes: int = 0

    @property
    def cost_flops(self) -> float:
        """Exact FLOPs that this run itself does."""
        return self.flops_exact * (1 - self.branch_step / max(1, self.steps))

    def is_done(self, run: Run) -> bool:
        """Return whether its folder holds it whole."""
        return run.is_done() and self.steps in (0, run.done_step())


def plan(sweep: Sweep, *, earlier: Sequence[dict] = ()) -> list[Planned]:
    """Return the runs of a sweep in the order of their start, parents first.

    earlier: records of a plan that this one goes on from: the same runs keep their
    names, new ones are numbered after them. Points that whole steps make the same run
    are one. Raises UserError on a design that cannot be run, or a run that its config
    refuses.
    """
    names = {record["hash"]: record["name"] for record in earlier}
    found: dict[str, Planned] = {}
    ends: dict[int, Planned] = {}  # of this trunk, its parts by their last steps
    next_index = len(names)
    for draft in _drafts(sweep):
        if not draft.branch_step:
            ends = {}
        one = _planned(sweep, draft, ends.get(draft.branch_step))
        if one.hash not in found:
            if one.hash in names:
                name = names[one.hash]
            else:
                name, next_index = f"{next_index:03d}-{one.name}", next_index + 1
            index = int(name.partition("-")[0])
            found[one.hash] = dataclasses.replace(one, index=index, name=name)
        if draft.role == "trunk":
            ends[one.steps] = found[one.hash]
    return list(found.values())


def remarks(sweep: Sweep, runs: Sequence[Planned]) -> list[str]:
    """Return what should be known before the runs are paid for."""
    said = _points(sweep)[1]
    for one in runs:
        if one.budget_flops and abs(one.flops / one.budget_flops - 1) > FAR:
            said.append(
                f"{one.name} does {one.flops:.3g} FLOPs for a budget of "
                f"{one.budget_flops:.3g}: its steps are few"
            )
    if sweep.base["data"]["source"] == "synthetic":
        corpus = sweep.base["synthetic"]["num_tokens"]
        repeats = [one.tokens / corpus for one in runs if one.tokens > corpus]
        if repeats:
            said.append(
                f"{len(repeats)} runs see tokens again, up to {max(repeats):.1f} "
                "epochs: raise base.synthetic.num_tokens for a law of fresh tokens"
            )
    return said


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Draft:
    """A run before it has a name."""

    point: designs.Point
    role: str = "run"
    model: dict
    training: dict
    branch_step: int = 0


def _points(sweep: Sweep) -> tuple[list[designs.Point], list[str]]:
    def is_feasible(dial, tokens):
        training = _training(sweep, dial, tokens)[1]
        return training["train.steps"] >= sweep.budget.min_steps

    return designs.points(vars(sweep.design), sweep.sizes, is_feasible)


def _training(sweep: Sweep, dial: int, tokens: float) -> tuple[dict, dict]:
    sizes = sweep.sizes
    model = ladder.model_of(dial, sizes.size, sweep.base["model"])
    training = ladder.training_of(
        sizes.params(dial),
        tokens,
        tokens * sizes.flops_per_token(dial),
        model,
        vars(sweep.budget),
        sweep.base,
    )
    return model, training


def _drafts(sweep: Sweep) -> list[_Draft]:
    points = _points(sweep)[0]
    if sweep.design.kind != "branches":
        made = []
        for point in points:
            model, training = _training(sweep, point.dial, point.tokens)
            made.append(_Draft(point=point, model=model, training=training))
        return made
    trees: dict[tuple, list[designs.Point]] = {}
    for point in points:
        trees.setdefault((point.dial, point.replicate), []).append(point)
    return [draft for tree in trees.values() for draft in _tree(sweep, tree)]


def _tree(sweep: Sweep, points: list[designs.Point]) -> list[_Draft]:
    """Return a trunk and its branches, which are as WSD runs of their whole lengths.

    One trunk has one batch size and rate, those of the longest horizon, and one
    warm-up, that of the shortest. It is a chain of parts, each from where one branch
    begins to where the next does: what a branch begins from is the end of a run, and a
    longer horizon is a part more.
    """
    points = sorted(points, key=lambda point: point.tokens)
    model, longest = _training(sweep, points[-1].dial, points[-1].tokens)
    batch_tokens = longest["train.batch_size"] * sweep.base["data"]["max_length"]
    horizons = [round(point.tokens / batch_tokens) for point in points]
    least = max(2, sweep.budget.min_steps)
    if horizons[0] < least:
        raise UserError(
            f"a branch must have {least} steps, budget.min_steps, of the batch that "
            f"the longest has; got {horizons[0]} for size {points[0].dial} on "
            f"{points[0].tokens:.3g} tokens. Raise the shortest horizon or lower the "
            "batch."
        )
    kept = 1 - sweep.design.decay_fraction
    steps_at = [min(max(1, round(kept * steps)), steps - 1) for steps in horizons]
    warmup = ladder.warmup_steps(
        sweep.sizes.params(points[0].dial),
        horizons[0],
        batch_tokens,
        vars(sweep.budget),
        sweep.base,
    )
    if warmup > steps_at[0]:
        raise UserError(
            "the warm-up of a trunk must end before its first branch; got "
            f"{warmup} steps and a branch at {steps_at[0]}. Lower "
            "base.schedule.warmup_fraction or raise the shortest horizon."
        )

    def draft(role, point, branch_step, steps, decay):
        training = longest | {
            "train.steps": steps,
            "schedule.name": "wsd",
            "schedule.warmup_fraction": warmup / steps,
            "schedule.decay_fraction": decay / steps,
        }
        return _Draft(
            point=point,
            role=role,
            model=model,
            training=training,
            branch_step=branch_step,
        )

    parts = itertools.pairwise([0, *sorted(set(steps_at))])
    return [
        draft(
            "trunk",
            dataclasses.replace(points[-1], tokens=float(end * batch_tokens)),
            begin,
            end,
            0,
        )
        for begin, end in parts
    ] + [
        draft("branch", point, step, steps, steps - step)
        for point, step, steps in zip(points, steps_at, horizons, strict=True)
    ]


def _planned(sweep: Sweep, draft: _Draft, parent: Planned | None) -> Planned:
    """Return the run of a draft, its name without a number yet."""
    base = sweep.base
    seed = base["train"]["seed"] + draft.point.replicate
    overrides = {f"model.{name}": value for name, value in draft.model.items()}
    overrides |= {**draft.training, "train.seed": seed}
    raw = _overridden(base, overrides)
    # Not by its folder: what goes on from a run is known by that one's hash.
    known_by = [configfile.fingerprint(raw, with_duration=True)]
    if parent is not None:
        known_by += [parent.hash, draft.branch_step]
        overrides["init.from"] = f"runs/{parent.name}@{draft.branch_step}"
        overrides["init.optimizer"] = True
        raw = _overridden(base, overrides)
    digest = hashlib.sha256(json.dumps(known_by).encode()).hexdigest()[:16]
    config = sweeps.check_run(raw)
    params = counts.params(config.model)
    steps, rows = overrides["train.steps"], overrides["train.batch_size"]
    length = base["data"]["max_length"]
    tokens = steps * rows * length
    count = getattr(params, sweep.size.count)
    end = "-trunk" if draft.role == "trunk" else ""
    flops_exact = counts.flops_per_token(config.model, length) * tokens
    is_exact = sweep.design.flops == "exact"
    return Planned(
        index=0,
        name=f"n{_short(count)}-d{_short(tokens)}-s{seed}{end}",
        hash=digest,
        role=draft.role,
        config=raw,
        overrides=overrides,
        parent=parent.name if parent is not None else "",
        branch_step=draft.branch_step,
        budget_flops=draft.point.budget_flops,
        replicate=draft.point.replicate,
        dial=draft.point.dial,
        params=vars(params),
        steps=steps,
        tokens=tokens,
        flops=flops_exact if is_exact else 6.0 * count * tokens,
        flops_exact=flops_exact,
        memory_bytes=costs.memory_bytes(config),
        disk_bytes=costs.disk_bytes(config, steps, steps - draft.branch_step),
    )


def _overridden(raw: dict, overrides: dict[str, Any]) -> dict:
    made = {name: dict(section) for name, section in raw.items()}
    for key, value in overrides.items():
        section, name = key.split(".")
        made[section][name] = value
    return made


def _short(number: float) -> str:
    """Return 123456 as 1.2e5."""
    digits, _, exponent = f"{number:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"
