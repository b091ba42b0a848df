"""What a command of fm is."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: what it does, one example, its flags, and whether it takes a config.

    `call(flags, raw, argv)` returns the exit status, None for 0.
    `flags` maps a name to (default, help); the default's type is the flag's type, a
    tuple is a flag that may be repeated, None a flag that must be given. `config` is
    the shipped config file that it takes where --config is not given; "": it must be,
    None: it need not be.
    """

    call: Callable
    summary: str
    example: str
    flags: dict[str, tuple]
    takes_config: bool = False
    config: str | None = ""
    positional: str = ""
