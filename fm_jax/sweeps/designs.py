"""Designs: which sizes are trained on how many tokens."""

import dataclasses
import math
import random
from collections.abc import Callable

from fm_jax.errors import UserError
from fm_jax.sweeps import ladder

# What each kind must be given, and may be; other lists of the section must be empty.
KINDS = {
    "isoflop": (("budgets",), ("sizes",)),
    "grid": (("sizes", "tokens"), ()),
    "ladder": (("sizes", "tokens_per_param"), ()),
    "random": (("sizes", "tokens"), ()),
    "branches": (("sizes", "tokens_per_param"), ()),
}
LISTS = ("budgets", "sizes", "tokens", "tokens_per_param")
ENOUGH = 5  # sizes that a budget needs for a parabola with something to spare


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run that is asked for: a size by its dial, tokens, and which repetition.

    `budget_flops` is the isoFLOP budget that it belongs to, where it does.
    """

    dial: int
    tokens: float
    budget_flops: float | None = None
    replicate: int = 0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The ladder of one sweep: counts and FLOPs of a dial."""

    size: dict
    base: dict
    flops: str  # how they are counted: 6n | exact

    def params(self, dial: int) -> int:
        """Return the parameters of a dial, by size.count."""
        return ladder.count_of(dial, self.size["count"], self.size, self.base["model"])

    def flops_per_token(self, dial: int) -> float:
        """Return training FLOPs per token of a dial, by design.flops."""
        base_model = self.base["model"]
        config = ladder.config_of(
            ladder.model_of(dial, self.size, base_model), base_model
        )
        length = self.base["data"]["max_length"]
        return ladder.flops_per_token(config, self.flops, self.size["count"], length)

    def nearest(self, params: float) -> int | None:
        """Return the dial nearest to a count, or None outside size.limits."""
        dial = ladder.nearest(params, self.size["count"], self.size, self.base["model"])
        low, high = self.size["limits"]
        return None if (low and dial < low) or (high and dial > high) else dial


def points(
    design: dict, sizes: Sizes, is_feasible: Callable[[int, float], bool]
) -> tuple[list[Point], list[str]]:
    """Return the points of a design in order, and remarks on what it could not do.

    is_feasible(dial, tokens) says whether a run of so many tokens has enough steps.
    Raises UserError on lists that the kind needs or has no use for, and on a design
    with a budget or a point that no run can be made of.
    """
    _check_lists(design)
    kind, remarks = design["kind"], []
    if kind == "isoflop":
        found, remarks = _isoflop(design, sizes, is_feasible)
    else:
        found = {
            "grid": _grid,
            "ladder": _ladder,
            "random": _random,
            "branches": _ladder,
        }[kind](design, sizes)
        for point in found:
            if not is_feasible(point.dial, point.tokens):
                raise UserError(
                    f"a point of design.kind={kind} must have budget.min_steps steps; "
                    f"got fewer for size {point.dial} on {point.tokens:.3g} tokens. "
                    "Give it more tokens or a smaller batch."
                )
    return _replicated(found, design["replicates"]), remarks


def _check_lists(design: dict) -> None:
    needed, allowed = KINDS[design["kind"]]
    for name in LISTS:
        given = bool(design[name])
        if given != (name in needed) and name not in allowed:
            must = "be given" if name in needed else "be ()"
            raise UserError(
                f"config.design.{name} must {must} for design.kind="
                f"{design['kind']}; got {design[name]!r}."
            )
    if design["kind"] == "random":
        for name in ("sizes", "tokens"):
            if len(design[name]) != 2 or design[name][0] >= design[name][1]:
                raise UserError(
                    f"config.design.{name} must be (low, high) for design.kind=random; "
                    f"got {design[name]!r}."
                )


def _isoflop(design, sizes, is_feasible) -> tuple[list[Point], list[str]]:
    """Each budget C has its sizes around the N with C = 6 N * (centre * N)."""
    found, remarks = [], []
    width, count = design["width"], design["points"]
    for flops in sorted(design["budgets"]):
        centre = math.sqrt(flops / (6 * design["centre"]))
        if design["sizes"]:
            asked = list(design["sizes"])
        else:
            exponents = [
                2 * i / (count - 1) - 1 if count > 1 else 0 for i in range(count)
            ]
            asked = [sizes.nearest(centre * width**e) for e in exponents]
        kept = []
        for dial in sorted({dial for dial in asked if dial is not None}):
            tokens = flops / sizes.flops_per_token(dial)
            if is_feasible(dial, tokens):
                kept.append(Point(dial=dial, tokens=tokens, budget_flops=flops))
        if not kept:
            raise UserError(
                f"a budget must have a size that can be trained on it; got none for "
                f"{flops:.3g} FLOPs (centre {centre:.3g} parameters). Change "
                "design.centre, design.width, size.limits or budget.min_steps."
            )
        if len(kept) < ENOUGH:
            remarks.append(
                f"budget {flops:.3g} has {len(kept)} sizes of {len(asked)} asked for, "
                f"fewer than {ENOUGH}: a parabola through them says little"
            )
        found += kept
    return found, remarks


def _grid(design, sizes) -> list[Point]:
    return [
        Point(dial=dial, tokens=float(tokens))
        for dial in sorted(set(design["sizes"]))
        for tokens in sorted(set(design["tokens"]))
    ]


def _ladder(design, sizes) -> list[Point]:
    return [
        Point(dial=dial, tokens=ratio * sizes.params(dial))
        for dial in sorted(set(design["sizes"]))
        for ratio in sorted(set(design["tokens_per_param"]))
    ]


def _random(design, sizes) -> list[Point]:
    """Draw log-uniformly; a longer design begins with the shorter one's points."""
    draw = random.Random(design["seed"])

    def between(low, high):
        return math.exp(draw.uniform(math.log(low), math.log(high)))

    low, high = design["sizes"]
    found = []
    for _ in range(design["points"]):
        params = between(sizes.params(low), sizes.params(high))
        dial = ladder.nearest(
            params, sizes.size["count"], sizes.size, sizes.base["model"]
        )
        tokens = between(*design["tokens"])
        found.append(Point(dial=min(max(dial, low), high), tokens=tokens))
    return found


def _replicated(found: list[Point], replicates: int) -> list[Point]:
    """Return the points with those of the smallest size `replicates` times."""
    smallest = min(point.dial for point in found)
    return [
        dataclasses.replace(point, replicate=replicate)
        for point in found
        for replicate in range(replicates if point.dial == smallest else 1)
    ]
