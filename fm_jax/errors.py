"""The exceptions that end a command with a known exit status, and their wording."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend: one line on stderr and exit status 2.

    What it repeats may be a stranger's: of that nothing reaches a terminal but letters.
    """

    def __str__(self) -> str:
        return printable(super().__str__())

    exit_status = 2


class DamagedError(UserError):
    """A checkpoint that is not what was saved: the user must choose another."""

    def __init__(self, path: object, what: str):
        super().__init__(
            f"a checkpoint must be what was saved; got {path}, where {what}. Choose "
            "another --step; fm checkpoint verify says which are good."
        )


class DivergedError(RuntimeError):
    """Training left the finite numbers: exit status 76, so that nothing restarts it."""

    exit_status = 76

    def __init__(self, name: str, value: float, step: int):
        super().__init__(
            f"{name} must stay finite; got {value} at step {step}. Begin another run "
            "with a lower optimizer.learning_rate, or with optimizer.clip_norm=1."
        )
        self.step = step


class StoppedError(RuntimeError):
    """Training was asked to stop and has: exit status 75, which asks for a restart."""

    exit_status = 75

    def __init__(self, step: int | None):
        super().__init__(
            "stopped as asked, "
            + ("before the first step" if step is None else f"saved at step {step}")
            + ". The same command goes on from there."
        )
        self.step = step


class LostError(RuntimeError):
    """Another process of the run is gone: exit status 85, which asks for a restart."""

    exit_status = 85

    def __init__(self, error: BaseException):
        super().__init__(
            f"the other processes must answer; got {reason(error)[:300]}. Their output "
            "says why. The same command goes on from the last checkpoint."
        )


class OutOfMemoryError(RuntimeError):
    """A device or the host was full: exit status 1, with the table of what it held."""

    exit_status = 1


def exit_status(error: BaseException) -> int:
    """Return the status with which a process ends that this error ends."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return getattr(error, "exit_status", 1)


def printable(text: str) -> str:
    """Return text that no terminal obeys: what is no letter of it is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


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
