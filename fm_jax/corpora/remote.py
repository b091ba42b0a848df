"""Files that another machine keeps, under URLs, through fsspec."""

import errno
import glob
import io
from collections.abc import Iterator

from fm_jax.corpora import paths
from fm_jax.errors import UserError, reason, unknown

# What tells of a file's content, the surest first. The same in a listing of many files
# and when one is asked for, which the whole of an entry is not.
VERSIONS = (
    "sha256",
    "ETag",
    "etag",
    "md5Hash",
    "blob_id",
    "CRC",
    "generation",
    "mtime",
    "modificationTime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "modify",
    "created",
)


def matches(pattern: str, key: str) -> Iterator[tuple[str, bool]]:
    """Yield the files that a URL or a glob of them stands for, and if each was named.

    Raises UserError where the place cannot be reached.
    """
    system, path = _open_system(pattern, key)
    try:
        is_file = _type(system, path) == "file"
        # Of a page fsspec says that it is a folder, once it is downloaded.
        found, is_named = set(), False
        if not (is_file and paths.is_known(path)) and system.isdir(path):
            found.update(_inside(system, path))
        elif is_file:
            found, is_named = {path}, True
        else:
            for match, entry in system.glob(path, detail=True).items():
                is_folder = entry["type"] == "directory"
                found.update(_inside(system, match) if is_folder else [match])
            if "/." not in path:
                found = {match for match in found if "/." not in match}
    except Exception as error:  # each system raises its own
        raise UserError(
            f"{key} must be reachable; got {pattern!r} ({reason(error)})."
        ) from error
    for file in sorted(found):
        yield system.unstrip_protocol(file), is_named


def open_file(url: str) -> io.BufferedIOBase:
    """Open a file's bytes; OSError where that cannot be."""
    system, path = _open_system(url, "data.paths")
    return io.BufferedReader(_File(_asked(system.open, path, "rb")))


def version(url: str) -> tuple[str, int]:
    """Return what stands for a file's content, and its size; OSError as `open_file`."""
    system, path = _open_system(url, "data.paths")
    system.invalidate_cache(path)
    return _version(system, path)


def versions(urls: list[str]) -> dict[str, tuple[str, int] | OSError]:
    """Return `version` of each, or why there is none, of what a listing still knows."""
    found = {}
    for url in urls:
        system, path = _open_system(url, "data.paths")
        try:
            found[url] = _version(system, path)
        except OSError as error:
            found[url] = error
    return found


class _File(io.RawIOBase):
    """A file as its system opens it, of which all that fails is an OSError.

    Their own `read` may return less than there is, and their `readline` take no size.
    """

    def __init__(self, file):
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer) -> int:
        found = _asked(self._file.read, len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return _asked(self._file.seek, offset, whence)

    def tell(self) -> int:
        return _asked(self._file.tell)

    def close(self) -> None:
        super().close()
        self._file.close()


def _inside(system, folder: str) -> list[str]:
    """Return the files under a folder, but for what is hidden."""
    top = folder.rstrip("/") + "/"
    return [
        path for path in system.find(folder) if "/." not in "/" + path.removeprefix(top)
    ]


def _type(system, path: str) -> str:
    """Return what there is at a path, "" for nothing; a glob may mean what it likes."""
    try:
        return system.info(path)["type"]
    except FileNotFoundError:
        return ""
    except Exception:  # each system raises its own
        if glob.has_magic(path):
            return ""
        raise


def _version(system, path) -> tuple[str, int]:
    entry = _asked(system.info, path)
    told = next((f"{k} {entry[k]}" for k in VERSIONS if entry.get(k)), None)
    if told is None:
        told = f"ukey {_asked(system.ukey, path)}"
    return f"{told}, {entry.get('size')} bytes", entry.get("size") or 0


def _open_system(url: str, key: str):
    """Return the file system of a URL and the path in it."""
    try:
        import fsspec
        from fsspec.registry import known_implementations
    except ImportError as error:
        raise UserError(
            f"{key} with a URL must have fsspec installed; got {url!r}. "
            "pip install fsspec."
        ) from error
    if "::" in url:
        raise UserError(
            f"{key} must hold plain URLs; got {url!r}. Unpack the archive, or name "
            "what lies under the cache."
        )
    protocol = url.split("://", 1)[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = known_implementations.get(protocol, {"class": ""})["class"]
        package = package.split(".")[0]
        how = "" if package in ("", "fsspec") else f" pip install {package}."
        raise UserError(
            f"{key} with {protocol}:// must have its library installed; got {url!r} "
            f"({reason(error)}).{how}"
        ) from error
    except ValueError as error:
        if protocol not in fsspec.available_protocols():
            known = fsspec.available_protocols()
            raise unknown(f"the protocol in {key}", protocol, known) from error
        raise UserError(
            f"{key} must be reachable; got {url!r} ({reason(error)})."
        ) from error


def _asked(ask, *args):
    """Return what a file system says; all that it raises comes out as an OSError.

    With a number, so that it is the connection's and not the file's own damage.
    """
    try:
        return ask(*args)
    except Exception as error:  # each system raises its own
        if isinstance(error, OSError) and error.errno:
            raise
        raise OSError(errno.EIO, reason(error)) from error
