"""What a command of fm is."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: what it does, one example, its flags, and whether it takes a config.

    `call(flags, raw, argv)` returns the exit status, None for 0.
    `flags` maps a name to (default, help); the default's type is the flag's type, a
    tuple is a flag that may be repeated, None a flag that must be given.
    """

    call: Callable
    summary: str
    example: str
    flags: dict[str, tuple]
    takes_config: bool = False
    positional: str = ""
