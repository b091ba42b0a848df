"""The exceptions that end a command with a known exit status, and their wording."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend: one line on stderr and exit status 2.

    What it repeats may be a stranger's: of that nothing reaches a terminal but letters.
    """

    def __str__(self) -> str:
        said = super().__str__()
        if said.isprintable():
            return said
        return "".join(c if c.isprintable() else _escaped(c) for c in said)


class DivergedError(RuntimeError):
    """Training left the finite numbers: exit status 76, so that nothing restarts it."""

    def __init__(self, name: str, value: float, step: int):
        super().__init__(
            f"{name} must stay finite; got {value} at step {step}. Begin another run "
            "with a lower optimizer.learning_rate, or with optimizer.clip_norm=1."
        )
        self.step = step


class OutOfMemoryError(RuntimeError):
    """A device or the host was full: exit status 1, with the table of what it held."""


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def unknown(thing: str, name: object, known: Iterable[str]) -> UserError:
    """Return the error for a name that is not known, nearest known names first."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    rest = [k for k in known if k not in near]
    hint = f"Did you mean {near[0]!r}? " if near else ""
    listed = ", ".join([*near, *rest]) or "none"
    return UserError(
        f"{thing} must be one of the known names; got {name!r}. {hint}Known: {listed}"
    )


def reason(error: BaseException) -> str:
    """Return what an error says, in one line; its kind where it says nothing."""
    said = getattr(error, "strerror", None) or str(error)
    return (said.strip() or type(error).__name__).splitlines()[0]
