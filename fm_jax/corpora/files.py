"""Files of text: which there are, by globs and folders, here or under URLs."""

import functools
import glob
import itertools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from fm_jax.corpora import paths, remote
from fm_jax.errors import UserError

NOT_STDLIB = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


def stdlib_files() -> dict[str, str]:
    """Return the Python standard library's own source files, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - NOT_STDLIB)
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                found[path.relative_to(root).as_posix()] = str(path)
    if not found:
        raise UserError(
            f"the standard library must have its source files; got none under {root}. "
            "Use another Python, or --config.data.source=text."
        )
    return found


def matching(patterns: tuple[str, ...], key: str) -> dict[str, str]:
    """Return the files of text that paths, globs and URLs stand for, by their names.

    A path that exists as it is spelt is no glob. A folder stands for all text under it,
    but for what is hidden. Names are relative to what the files have in common, so that
    they do not depend on where a corpus lies. Raises UserError when a pattern matches
    nothing, or names what is not text.
    """
    if not patterns:
        raise UserError(
            f"{key} must list files or globs; got none. "
            f"Example: --config.{key}='(\"corpus/**/*.txt\",)'."
        )
    found: dict[str, str] = {}  # by the place without links
    real = functools.cache(os.path.realpath)
    walked: set[tuple[int, int]] = set()
    for pattern in patterns:
        for path, is_named in _matches(pattern, key, walked):
            if paths.is_known(path):
                same = path if paths.is_remote(path) else _without_links(path, real)
                found[same] = min(path, found.get(same, path))
            elif is_named:
                raise UserError(
                    f"{key} must name {paths.KNOWN}; got {paths.shown(path)}. Name it "
                    ".txt if it is text."
                )
    if not found:
        listed = ", ".join(patterns)
        raise UserError(f"{key} must match {paths.KNOWN}; got none in {listed}.")
    parts = sorted(path.split("/") for path in found.values())
    pairs = zip(parts[0][:-1], parts[-1][:-1], strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: len({*pair}) == 1, pairs))
    return {"/".join(path[shared:]): "/".join(path) for path in parts}


def _matches(pattern, key, walked) -> Iterator[tuple[str, bool]]:
    """Yield files, and whether each was named and not only found."""
    if paths.is_remote(pattern):
        found = list(remote.matches(pattern, key))
        yield from found
    else:
        expanded = os.path.expanduser(pattern)
        is_there = os.path.lexists(expanded)
        found = [expanded] if is_there else [*_globbed(expanded, key)]
        last = os.path.basename(expanded)
        for match in sorted(found):
            if os.path.isdir(match):
                yield from ((p, False) for p in _inside(match, key, walked))
            else:
                yield _absolute(match), os.path.basename(match) == last
    if not found:
        is_here = not paths.is_remote(pattern) and not os.path.isabs(expanded)
        where = f" It was looked for in {os.getcwd()}." if is_here else ""
        raise UserError(f"{key} must match files; got none for {pattern!r}.{where}")


def _globbed(pattern: str, key: str) -> Iterator[str]:
    """Yield what a glob matches; its `**` goes through each folder once."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.glob(pattern)
        return
    place = parts.index("**")
    tops = glob.glob("/".join([*parts[:place], ""])) if place else ["."]
    rest = parts[place + 1 :]
    walked: set[tuple[int, int]] = set()
    for top in sorted(tops):
        for folder, _ in _folders(top, key, walked):
            yield from _globbed("/".join([glob.escape(folder), *rest]), key)


def _inside(top: str, key: str, walked: set[tuple[int, int]]) -> Iterator[str]:
    """Yield the files under a folder, but for what is hidden."""
    for folder, names in _folders(top, key, walked):
        for name in names:
            if not name.startswith("."):
                yield _absolute(os.path.join(folder, name))


def _folders(top: str, key: str, walked) -> Iterator[tuple[str, list[str]]]:
    """Yield folders and the names in them; each is walked once, through links too."""

    def refuse(error: OSError):
        raise UserError(
            f"{key} must be readable; got {paths.shown(str(error.filename))} "
            f"({error.strerror})."
        ) from error

    for folder, inner, names in os.walk(top, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in walked:
            inner.clear()
            continue
        walked.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield folder, names


def _absolute(path: str) -> str:
    """Return a path from the root on, by the links' own names where that is safe."""
    if ".." in path.split("/"):
        return _without_links(path)
    return os.path.abspath(path)


def _without_links(path: str, real=os.path.realpath) -> str:
    # A link keeps its own name: what it points to may have no suffix.
    folder, name = os.path.split(path)
    return os.path.join(real(folder), name)
