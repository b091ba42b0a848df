"""absl flags of one command, with a config and its typed overrides."""

import dataclasses
import keyword
from typing import Any

from absl import flags as absl_flags
from ml_collections import config_dict, config_flags

from fm_jax import configfile
from fm_jax.errors import UserError, unknown

# What a value that is no literal of Python ends in: of another type, nested too deep.
UNREADABLE = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)
MOST_LETTERS = 500  # of what is wrong with a flag


@dataclasses.dataclass
class Parsed:
    """The flags of a command as attributes, and its positional arguments."""

    values: dict[str, Any]
    positional: list[str]
    config_file: str

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["values"][name]


def parse(command, argv: list[str]) -> tuple[Parsed, dict]:
    """Return the flags of `command` and, where it takes one, the config as a dict.

    Raises UserError on unknown flags and keys, values of another type, a missing flag
    and leftover arguments.
    """
    values = absl_flags.FlagValues()
    for name, (default, text) in command.flags.items():
        _define(values, name, default, text)
    config_file, config = "", None
    if command.takes_config:
        config_file, argv = _take_config(argv, command.config)
        config = config_dict.ConfigDict()
        if config_file:
            config = configfile.load(config_file)
        elif any(a.lstrip("-").startswith("config.") for a in argv):
            raise UserError("--config must be given with --config.KEY=...; got none.")
        _check_keys(argv, config)
        _escape(config)
        argv = [_escaped(argument) for argument in argv]
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=["fm", *argv]
        )
    try:
        positional = values(["fm", *argv])[1:]
    except absl_flags.UnrecognizedFlagError as error:
        known = [*command.flags, *(["config"] if command.takes_config else [])]
        raise unknown("flag", error.flagname, known) from error
    except (absl_flags.Error, *UNREADABLE) as error:
        said = str(error) or type(error).__name__
        raise UserError(f"flags must be right; {said[:MOST_LETTERS]}") from error
    if positional and not command.positional:
        raise UserError(
            f"fm takes no argument {positional[0]!r} here; flags are "
            "written --flag=value."
        )
    for name, (default, _) in command.flags.items():
        if default is None and not values[name].value:
            raise UserError(f"--{name} must be given. Example: {command.example}")
    found = {name: values[name].value for name in command.flags}
    raw = _restored(values["config"].value.to_dict()) if command.takes_config else {}
    return Parsed(found, positional, config_file), raw


def _define(values, name: str, default: Any, text: str) -> None:
    kinds = {
        bool: absl_flags.DEFINE_bool,
        int: absl_flags.DEFINE_integer,
        float: absl_flags.DEFINE_float,
        str: absl_flags.DEFINE_string,
        type(None): absl_flags.DEFINE_string,
        tuple: absl_flags.DEFINE_multi_string,
    }
    default = list(default) if isinstance(default, tuple) else default
    kinds[type(default) if default != [] else tuple](
        name, default, text, flag_values=values
    )


def _take_config(argv: list[str], shipped: str | None) -> tuple[str, list[str]]:
    """Return the value of --config and the arguments without it.

    shipped: the file in configs that is taken where it is not given; "": it must be
    given, None: it need not.
    """
    found = str(configfile.BASE.parent / shipped) if shipped else None
    rest, index = [], 0
    while index < len(argv):
        argument = argv[index]
        if argument in ("--config", "-config") and index + 1 < len(argv):
            found, index = argv[index + 1], index + 1
        elif argument.startswith(("--config=", "-config=")):
            found = argument.partition("=")[2]
        else:
            rest.append(argument)
        index += 1
    if not found and shipped is not None:
        raise UserError(
            "--config must be given. Example: --config=configs/quickstart.py"
        )
    return found or "", rest


def _check_keys(argv: list[str], config: config_dict.ConfigDict) -> None:
    known = configfile.flat(config.to_dict())
    for argument in argv:
        if not argument.startswith("-"):
            continue
        name = argument.lstrip("-").partition("=")[0]
        if name.startswith("noconfig."):
            name = name[2:]
        if name.startswith("config.") and name.removeprefix("config.") not in known:
            raise unknown("config key", name.removeprefix("config."), known)


# ml_collections parses a key as Python, to which `init.from` is a mistake.


def _escape(config: config_dict.ConfigDict) -> None:
    """Give the keys that Python keeps for itself an underscore, in place."""
    with config.unlocked():
        for key, value in list(config.items()):
            if isinstance(value, config_dict.ConfigDict):
                _escape(value)
            if keyword.iskeyword(key):
                config[f"{key}_"] = value
                del config[key]


def _escaped(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if not name.lstrip("-").startswith(("config.", "noconfig.")):
        return argument
    parts = [f"{p}_" if keyword.iskeyword(p) else p for p in name.split(".")]
    return ".".join(parts) + equals + value


def _restored(raw: dict) -> dict:
    """Return nested dicts with those keys as they are written."""
    return {
        key[:-1] if keyword.iskeyword(key[:-1]) else key: _restored(value)
        if isinstance(value, dict)
        else value
        for key, value in raw.items()
    }
