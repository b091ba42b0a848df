"""fm bench checkpoint: saves and restores of a config's state, beside bare files.

What they are held against is NumPy writing and reading as many bytes in one file of the
same disk. What is written is forced to the disk on both sides, and what is read was
first dropped from the page cache where the system lets it; the two take turns.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import config as configs
from fm_jax import digests
from fm_jax.bench import ratios
from fm_jax.checkpoints import Checkpoints, size_bytes
from fm_jax.train import compose, opening


def checkpoint(
    config: configs.Config,
    *,
    rounds: int,
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return seconds and bytes/s of saving and restoring the state, by `rounds`.

    `stall_seconds` is how long training stands still; `save_seconds` until the bytes
    are on the disk. Ratios above 1 are faster than the bare file; all are medians, low
    and high the quartiles. folder: on the disk to measure, left as it was.

    Raises UserError when the disk has no room for two checkpoints.
    """
    parts = compose.build(config, compose.open_layout(config), corpus_tokens=2**30)
    abstract = parts.state_parts(parts.abstract)
    size = size_bytes(abstract)
    opening.require_room(folder, 2 * size)
    times: dict[str, list[float]] = {}
    with (
        parts.layout.active(),
        tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as path,
    ):
        bare = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        saved = Checkpoints(Path(path, "checkpoints"), writes=True)
        draw = _noise(abstract)
        for number in range(rounds + 1):
            say(f"round {number} of {rounds}" if number else "warming up")
            # New arrays each time: an array keeps the copy that the host once made.
            state = jax.block_until_ready(draw(jax.random.key(number)))
            took = _ours(saved, number, state, abstract)
            took |= _bare(bare, Path(path, "bare"))
            if number:  # the first makes threads and folders
                for name, seconds in took.items():
                    times.setdefault(name, []).append(seconds)
        on_disk = sum(file.stat().st_size for file in _files(saved.path / str(rounds)))
        saved.close()
    return {"state_bytes": size, "disk_bytes": on_disk} | _summary(times, size)


def _noise(abstract: Any) -> Callable[[jax.Array], Any]:
    """Return a compiled rng -> arrays of these shapes that no file makes smaller."""
    leaves, tree = jax.tree.flatten(abstract)

    def draw(rng):
        drawn = [
            jax.random.normal(jax.random.fold_in(rng, index), leaf.shape, leaf.dtype)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for index, leaf in enumerate(leaves)
        ]
        return tree.unflatten(drawn)

    places = tree.unflatten([leaf.sharding for leaf in leaves])
    return jax.jit(draw, out_shardings=places)


def _ours(saved: Checkpoints, step: int, state: Any, abstract: Any) -> dict:
    before = time.perf_counter()
    digests.of(state)  # once more: a save begins with it
    began = time.perf_counter()
    saved.save(step, state, None)
    stalled = time.perf_counter()
    saved.wait()
    files = _files(saved.path / str(step))
    for file in files:
        _force(file)
    ended = time.perf_counter()
    for file in files:
        _forget(file)
    again = time.perf_counter()
    jax.block_until_ready(saved.restore(step, abstract))
    restored = time.perf_counter() - again
    return {
        "digest": began - before,
        "stall": stalled - began,
        "save": ended - began,
        "restore": restored,
    }


def _bare(bytes_N: np.ndarray, file: Path) -> dict[str, float]:
    began = time.perf_counter()
    bytes_N.tofile(file)
    _force(file)
    written = time.perf_counter()
    _forget(file)
    again = time.perf_counter()
    np.fromfile(file, np.uint8)
    read = time.perf_counter() - again
    file.unlink()
    return {"bare_write": written - began, "bare_read": read}


def _summary(times: dict[str, list[float]], size: int) -> dict[str, float]:
    found = {}
    for name, seconds in times.items():
        low, median, high = ratios.quartiles(seconds)
        found |= {
            f"{name}_seconds": median,
            f"{name}_seconds_low": low,
            f"{name}_seconds_high": high,
        }
        if name != "stall":
            found[f"{name}_bytes_per_second"] = size / median
    for name, other in (("save", "bare_write"), ("restore", "bare_read")):
        paired = ratios.paired(times[other], times[name])
        found |= {
            f"{name}_ratio": paired["median"],
            f"{name}_ratio_low": paired["low"],
            f"{name}_ratio_high": paired["high"],
        }
    return found


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _force(file: Path) -> None:
    """Return when a file is on the disk."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def _forget(file: Path) -> None:
    """Drop a file from the page cache, where the system lets it."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
