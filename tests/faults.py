"""The table of faults in README.md, made of the tests' docstrings: it cannot drift.

A test that injects a fault says so in a docstring of this form, and of no other:

    Fault 36, data: a bit flips inside a shard.

    Promise: the shard is named, exit 2; nothing trains on it.

`python -m tests.faults` prints the table, with `--write` it puts it into README.md.
"""

import ast
import dataclasses
import inspect
import itertools
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator

TESTS = pathlib.Path(__file__).parent
README = TESTS.parent / "README.md"
BEGIN, END = "<!-- faults -->", "<!-- /faults -->"
GROUPS = (
    "stopping",
    "checkpoints",
    "processes",
    "numbers",
    "data",
    "around it",
    "security",
)
FORM = re.compile(
    rf"Fault (\d+), ({'|'.join(GROUPS)}): ([^|]+?)\.\n\nPromise: ([^|]+?)\.",
)


@dataclasses.dataclass(frozen=True, order=True)
class Fault:
    """One test that injects a fault; `test` is its file, without .py, and its name."""

    number: int
    group: str
    fault: str
    promise: str
    test: str


def collect(folder: pathlib.Path = TESTS) -> list[Fault]:
    """Return the faults of all tests under `folder`, sorted by number.

    Raises ValueError on a docstring that begins as one and is not well-formed.
    """
    return sorted(
        fault
        for file in sorted(folder.rglob("test_*.py"))
        for fault in _of_file(file, folder)
    )


def table(faults: Iterable[Fault]) -> str:
    """Return the Markdown table of sorted faults; one fault's tests share a row."""
    lines = ["| fault | promise | test |", "| --- | --- | --- |"]
    for key, group in itertools.groupby(faults, lambda f: (f.number, f.group, f.fault)):
        some = sorted(group, key=lambda fault: fault.test)
        promises = dict.fromkeys(fault.promise for fault in some)
        tests = ", ".join(f"`{fault.test}`" for fault in some)
        lines.append(
            f"| {key[0]}, {key[1]}: {key[2]} | {'; '.join(promises)} | {tests} |"
        )
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """Return what stands between the marks of a README."""
    _, _, rest = text.partition(BEGIN + "\n")
    found, mark, _ = rest.partition(END)
    if not mark:
        raise ValueError(f"README.md must have the marks {BEGIN} and {END}.")
    return found


def _of_file(file: pathlib.Path, folder: pathlib.Path) -> Iterator[Fault]:
    where, source = file.relative_to(folder).with_suffix(""), file.read_text("utf-8")
    if not re.search(r"[\"']Fault\b", source):  # most files have none
        return
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = inspect.cleandoc(ast.get_docstring(node) or "")
        if not re.match(r"Fault\b", text):
            continue
        found = FORM.fullmatch(text)
        if not found or not node.name.startswith("test_"):
            raise ValueError(
                f"{file}: {node.name} must be a test whose docstring is `Fault NUMBER, "
                "GROUP: what goes wrong.`, an empty line and `Promise: what holds.`, "
                f"with a group of {', '.join(GROUPS)}; got {text!r}."
            )
        number, group, fault, promise = found.groups()
        yield Fault(
            int(number),
            group,
            " ".join(fault.split()),
            " ".join(promise.split()),
            f"{where.as_posix()}::{node.name}",
        )


def main(arguments: list[str]) -> None:
    """Print the table, or write it into README.md."""
    made = table(collect())
    if arguments != ["--write"]:
        print(made, end="")
        return
    text = README.read_text(encoding="utf-8")
    held = BEGIN + "\n" + written(text) + END
    README.write_text(text.replace(held, f"{BEGIN}\n{made}{END}"), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
