"""Tensors written as they come: safetensors files of a given size, and their index."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fm_jax.errors import UserError
from fm_jax.hf import header, tensors

BLOCK_BYTES = 1 << 24  # made contiguous and written at once
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor to write: its dtype by the format's name, and its shape."""

    kind: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its bytes in a file."""
        return math.prod(self.shape) * header.DTYPES[self.kind].itemsize


def size(text: str) -> int:
    """Return the bytes that a size stands for: 5GB, 200MB, 1.5GiB, 1000.

    Raises UserError when it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = found and UNITS.get(found[2].upper())
    if not unit or not 1 <= float(found[1]) * unit < 1 << 62:
        raise UserError(
            f"--max_shard_size must be a size as 5GB or 500MB; got {text!r}."
        )
    return int(float(found[1]) * unit)


def plan(planned: dict[str, Planned], max_bytes: int) -> dict[str, dict[str, Planned]]:
    """Return the tensors of each file, in order; a larger tensor has one to itself."""
    groups: list[dict[str, Planned]] = [{}]
    filled = 0
    for name, tensor in planned.items():
        if groups[-1] and filled + tensor.num_bytes > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.num_bytes
    if len(groups) == 1:
        return {tensors.SINGLE: groups[0]}
    count = len(groups)
    return {
        f"model-{number:05}-of-{count:05}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def write(
    folder: Path,
    files: dict[str, dict[str, Planned]],
    array: Callable[[str], np.ndarray],
    say: Callable[[str], None],
) -> None:
    """Write planned files, a tensor at a time; the index last, where there is one.

    array: returns a tensor by its name, of the planned dtype and shape.
    """
    for file, group in files.items():
        say(f"Writing {file}: {sum(t.num_bytes for t in group.values()) / 1e6:,.1f} MB")
        with open(folder / file, "wb") as stream:
            stream.write(header.write({n: (t.kind, t.shape) for n, t in group.items()}))
            for name, tensor in group.items():
                _append(stream, array(name), tensor)  # no name for it outlives the call
    if len(files) > 1:
        total = sum(t.num_bytes for group in files.values() for t in group.values())
        weight_map = {name: file for file, group in files.items() for name in group}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / tensors.INDEX).write_text(text, encoding="utf-8")


def _append(stream, array: np.ndarray, planned: Planned) -> None:
    """Write an array's bytes, of any strides, some rows at a time."""
    assert array.shape == planned.shape, (array.shape, planned)
    assert array.dtype == header.DTYPES[planned.kind], (array.dtype, planned)
    if not array.ndim or not array.size:
        stream.write(array.tobytes())
        return
    rows = max(1, BLOCK_BYTES // (array.nbytes // len(array) or 1))
    for start in range(0, len(array), rows):
        block = np.ascontiguousarray(array[start : start + rows])
        stream.write(block.view(np.uint8).data)
