"""Text files: found by globs, opened whatever packs them, known by their content."""

import glob
import gzip
import hashlib
import io
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from fm_jax.errors import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
PACKINGS = (".gz", ".zst")
NOT_STDLIB = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


def stdlib_files() -> dict[str, Path]:
    """Return the Python standard library's own source files, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - NOT_STDLIB)
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                found[path.relative_to(root).as_posix()] = path
    if not found:
        raise UserError(
            f"the standard library must have its source files; got none under {root}. "
            "Use another Python, or --config.data.source=text."
        )
    return found


def matching(patterns: tuple[str, ...], key: str) -> dict[str, Path]:
    """Return the text files that globs match; a folder stands for all text under it.

    Names are relative to what the matches have in common, so that the split by hash
    does not depend on where a corpus lies. Raises UserError when nothing matches, or a
    match is not text.
    """
    if not patterns:
        raise UserError(
            f"{key} must list files or globs; got none. "
            f"Example: --config.{key}='(\"corpus/**/*.txt\",)'."
        )
    paths: set[Path] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        matches = [Path(p) for p in glob.glob(expanded, recursive=True)]
        if not matches:
            raise UserError(f"{key} must match files; got none for {pattern!r}.")
        for match in matches:
            if match.is_dir():
                inside = (p for p in match.rglob("*") if text_suffix(p) in SUFFIXES)
                paths.update(p for p in inside if p.is_file())
            elif text_suffix(match) in SUFFIXES:
                paths.add(match)
            elif match.name == os.path.basename(expanded):
                raise UserError(
                    f"{key} must name text ({', '.join(SUFFIXES)}, each also .gz or "
                    f".zst); got {match}."
                )
    if not paths:
        raise UserError(
            f"{key} must match text files ({', '.join(SUFFIXES)}, each "
            f"also .gz or .zst); got none in {', '.join(patterns)}."
        )
    # A link keeps its own name: what it points to may have no suffix.
    absolute = sorted({p.parent.resolve() / p.name for p in paths})
    root = os.path.commonpath([p.parent for p in absolute])
    return {p.relative_to(root).as_posix(): p for p in absolute}


def text_suffix(path: Path) -> str:
    """Return a file's suffix, that of its packing left off."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in PACKINGS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_text(path: Path) -> io.BufferedIOBase:
    """Open a file's bytes, unpacked; damage is an OSError or EOFError on reading."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            return gzip.open(path, "rb")
        if suffix == ".zst":
            packed = open(path, "rb")  # noqa: SIM115, the caller closes it
            return io.BufferedReader(_ZstdFile(packed))
        return open(path, "rb")
    except OSError as error:
        raise UserError(
            f"data file must be readable; got {path} ({error.strerror})."
        ) from error


class _ZstdFile(io.RawIOBase):
    """All frames of a zstd file; damage is an OSError and a lost end an EOFError.

    zstandard's own reader takes a file that was cut short for one that ended.
    """

    def __init__(self, packed):
        self._packed = packed
        self._chunks = self._decompressed()
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._ready = memoryview(chunk)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._packed.close()
        super().close()

    def _decompressed(self) -> Iterator[bytes]:
        import zstandard

        decompressor = zstandard.ZstdDecompressor()
        frame, raw = None, b""
        try:
            while raw := raw or self._packed.read(1 << 17):
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(raw)
                raw = b""
                if frame.eof:
                    raw, frame = frame.unused_data, None
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        if frame:
            raise EOFError("Compressed file ended before its last frame did")


def digest(path: Path) -> str:
    """Return a digest of a file's bytes as they lie."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise UserError(
            f"data file must be readable; got {path} ({error.strerror})."
        ) from error
