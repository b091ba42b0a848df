"""fm: the one door. Parses the command line, calls the command, tells mistakes."""

import os
import sys

from fm_jax import machine
from fm_jax.commands.command import Command
from fm_jax.commands.listed import COMMANDS
from fm_jax.errors import (
    DivergedError,
    LostError,
    OutOfMemoryError,
    StoppedError,
    UserError,
    exit_status,
    unknown,
)

EXIT_FAILURE, EXIT_MISTAKE = 1, 2
TOLD = (  # in one line
    UserError,
    DivergedError,
    StoppedError,
    LostError,
    OutOfMemoryError,
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    status = EXIT_FAILURE
    try:
        status = _status(sys.argv[1:] if argv is None else argv)
    finally:
        # Of several processes one that fails alone would wait for the others.
        if "fm_jax.cluster.together" in sys.modules:
            sys.modules["fm_jax.cluster.together"].leave(status)
    return status


def named(argv: list[str]) -> tuple[str, list[str]]:
    """Return the name of the command, of two words where there is one, and the rest."""
    two = " ".join(argv[:2])
    return (two, argv[2:]) if two in COMMANDS else (argv[0], argv[1:])


def _status(argv: list[str]) -> int:
    try:
        return _main(argv)
    except TOLD as error:
        print(f"fm: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt as error:
        print(
            "\nfm: interrupted. The same command goes on from the last checkpoint, or "
            "from the finished shards of a token store.",
            file=sys.stderr,
        )
        return exit_status(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0 if argv else EXIT_MISTAKE
    if argv[0] == "--version":
        from fm_jax import __version__

        print(f"fm_jax {__version__}")
        return 0
    name, rest = named(argv)
    if name not in COMMANDS:
        group = [known for known in COMMANDS if known.startswith(f"{name} ")]
        if not group:
            raise unknown("command", name, COMMANDS)
        if not rest or rest[0] in ("--help", "-h"):
            print(_usage(f"{name} "))
            return 0 if rest else EXIT_MISTAKE
        raise unknown("command", f"{name} {rest[0]}", group)
    command = COMMANDS[name]
    group = [known for known in COMMANDS if known.startswith(f"{name} ")]
    if group and rest and not rest[0].startswith("-"):
        raise unknown("command", f"{name} {rest[0]}", group)
    if any(a in ("--help", "-h") for a in rest):
        print(_help(name, command))
        return 0
    from fm_jax import flags as parsing

    flags, raw = parsing.parse(command, rest)
    init = raw.get("init")
    if isinstance(init, dict) and init.get("model") and init.get("from"):
        from fm_jax.hf import adopt

        raw = adopt.adopted(raw)
    machine.skip_absent_tpu()
    return command.call(flags, raw, argv) or 0


def _usage(prefix: str = "") -> str:
    lines = [
        "fm trains foundation models from scratch.",
        "",
        f"usage: fm {prefix}COMMAND ...",
        "",
    ]
    lines += [
        f"  {name:18}{command.summary}"
        for name, command in COMMANDS.items()
        if name.startswith(prefix)
    ]
    return "\n".join([*lines, "", "fm COMMAND --help shows its flags."])


def _help(name: str, command: Command) -> str:
    lines = [f"fm {name}: {command.summary}", "", f"example: {command.example}", ""]
    if command.takes_config:
        lines += [
            "  --config=FILE.py[:VARIANT]   a file with get_config(), or a run's "
            "config.json",
            "  --config.SECTION.KEY=VALUE   another value for a key; configs/base.py "
            "has them all",
        ]
    if command.positional:
        lines.append(f"  {command.positional}")
    for flag, (default, text) in command.flags.items():
        shown = (
            "" if default in (None, "", (), False, 0, -1) else f" (default {default})"
        )
        must = "  required" if default is None else ""
        lines.append(f"  --{flag:15} {text}{shown}{must}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
