"""What fm fit and suggest do: flags in, text and files out."""

import json
import sys
from pathlib import Path
from typing import Any

from fm_jax.errors import UserError


def fit(flags: Any) -> None:
    """Fit a table, print the fit, and write its folder. See commands.py for flags."""
    from fm_jax.scaling import files, show
    from fm_jax.scaling import fit as fits

    path = Path(flags.runs).expanduser()
    options = fits.Options(
        law=flags.law,
        count=flags.count,
        flops=flags.flops,
        delta=flags.delta,
        space=flags.space,
        weight=flags.weight,
        fixed=numbers(flags.fix, "--fix"),
        mapping=tuple(flags.map),
        exclude=tuple(flags.exclude),
        duplicates=flags.duplicates,
        slices=flags.slices,
        bootstrap=flags.bootstrap,
        num_bootstraps=flags.num_bootstraps,
        seed=flags.seed,
    )
    out = Path(flags.out) if flags.out else _beside(path)
    options.check()
    files.prepare(out)
    found = fits.run(path, options)
    files.write(found.record, found.draws, out)
    text = show.lines(found.record)
    if flags.figures:
        from fm_jax.scaling import page

        page.write(out, found, text)
    _print([json.dumps(found.record, indent=1)] if flags.json else text)
    _say(f"written to {out}: " + ", ".join(sorted(p.name for p in out.iterdir())))


def suggest(flags: Any) -> None:
    """Print the next runs that tell most about a target, for a budget."""
    from fm_jax.runs import Run
    from fm_jax.scaling import files
    from fm_jax.scaling import suggest as suggestions

    record, draws, law = files.load(Path(flags.fit), law=flags.law)
    found = suggestions.suggest(
        record,
        draws["approach3"],
        law,
        target_flops=flags.target_flops,
        budget_flops=flags.budget_flops,
        max_runs=flags.max_runs,
        top_share=flags.top_share,
        params_factor=flags.params_factor,
        noise=flags.noise or None,
        columns=numbers(flags.column, "--column") or None,
    )
    text = suggestions.lines(found)
    _print([json.dumps(found, indent=1)] if flags.json else text)
    if flags.out:
        out = Path(flags.out)
        rows = suggestions.jsonl(found)
        Run(out.parent).write(out.name, "".join(f"{row}\n" for row in rows))
        _say(f"written to {out}")


def _beside(path: Path) -> Path:
    """Return where the report of a table goes when the user does not say."""
    return path / "fit" if path.is_dir() else Path(f"{path.stem}-fit")


def numbers(given: list[str], flag: str) -> dict[str, float]:
    """Return the NAME=NUMBER values of a flag as a dict."""
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        if name in found:
            raise UserError(f"{flag} must give {name} once; got it twice.")
        try:
            found[name] = float(value)
        except ValueError:
            raise UserError(f"{flag} must be NAME=NUMBER; got {text!r}.") from None
    return found


def _print(lines: list[str]) -> None:
    print("\n".join(lines))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
