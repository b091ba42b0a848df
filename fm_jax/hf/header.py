"""The header of a safetensors file, read without trust.

github.com/huggingface/safetensors: eight bytes of length, a JSON object of that length,
then the tensors' bytes. Nothing of the file is believed before all of it fits together.
Imports no jax.
"""

import dataclasses
import json
import math
import stat
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fm_jax import jsonfiles
from fm_jax.errors import UserError, reason

MOST_BYTES = 100_000_000  # of a header, as the format's own library has it
MOST_DIMS = 32
# What weights may be in, by the format's name; and the bits of what else may be there.
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
OTHER_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32,
              "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8,
              "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6,
              "F6_E3M2": 6, "F4": 4}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Info:
    """Where a tensor lies: `start` is its first byte in `file`."""

    file: Path
    name: str
    kind: str  # the format's name of its dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read(file: Path) -> dict[str, Info]:
    """Return what stands in a file, by name, in the order of its bytes.

    Raises UserError, which names the file and the tensor, when the file is cut off or
    its header says what cannot be: offsets outside the file, overlaps, holes, bytes
    that are not the shape's, a name that stands twice.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise OSError("no plain file")
        size = status.st_size
        with open(file, "rb") as stream:
            length = _length(file, stream.read(8), size)
            text = stream.read(length)
    except OSError as error:
        raise UserError(f"{file} must be readable; got {reason(error)}.") from error
    infos = [
        _info(file, name, said, 8 + length, size)
        for name, said in _object(file, text).items()
        if name != "__metadata__"
    ]
    infos.sort(key=lambda info: (info.start, info.num_bytes))
    end = 8 + length
    for info in infos:
        if info.start != end:
            what = "overlap" if info.start < end else "leave a hole"
            raise _broken(
                info, f"must begin where the one before it ends, at byte {end}",
                f"byte {info.start}: they {what}",
            )  # fmt: skip
        end = info.start + info.num_bytes
    if end != size:
        raise UserError(
            f"{file} must end with its last tensor, at byte {end}; got {size} bytes. "
            "Fetch the file again."
        )
    return {info.name: info for info in infos}


def write(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Return the beginning of a file that holds tensors of (kind, shape), in order."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * DTYPES[kind].itemsize
        fields[name] = {
            "dtype": kind,
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    return struct.pack("<Q", len(text)) + text


def _length(file: Path, raw: bytes, size: int) -> int:
    length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else size
    if length > min(size - 8, MOST_BYTES):
        raise UserError(
            f"{file} must be a safetensors file with its whole header; got {size} "
            f"bytes, of which the header would be {length}. Fetch the file again."
        )
    return length


def _object(file: Path, text: bytes) -> dict[str, Any]:
    """Return the header as a dict without repeated names."""

    def once(pairs):
        fields = {}
        for name, value in pairs:
            if name in fields:
                raise ValueError(f"{name!r} twice")
            fields[name] = value
        return fields

    def refuse(constant):
        raise ValueError(f"{constant}, which is no JSON")

    try:
        fields = jsonfiles.parse(text, object_pairs_hook=once, parse_constant=refuse)
    except ValueError as error:
        raise UserError(
            f"{file} must have a header of JSON; got {reason(error)}."
        ) from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} must have a header of JSON; got no object.")
    return fields


def _info(file: Path, name: str, said: Any, data: int, size: int) -> Info:
    """Return a tensor's place, checked as far as it can be alone."""
    named = Info(file, name, "", (), 0, 0)
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(named, "must have dtype, shape and data_offsets", repr(said)[:80])
    kind, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES.keys() | OTHER_BITS.keys():
        raise _broken(named, "must have a dtype of the format", repr(kind)[:80])
    if not _is_counts(shape) or len(shape) > MOST_DIMS:
        raise _broken(named, "must have a list of sizes as its shape", repr(shape)[:80])
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(named, "must have ascending data_offsets", repr(offsets)[:80])
    first, last = offsets
    if data + last > size:
        raise _broken(
            named, f"must lie inside the file's {size} bytes",
            f"bytes {data + first} to {data + last}: it is cut off or tampered with",
        )  # fmt: skip
    bits = DTYPES[kind].itemsize * 8 if kind in DTYPES else OTHER_BITS[kind]
    needed = math.prod(shape) * bits
    if needed != 8 * (last - first):
        said = f"{needed / 8:g}" if needed < 1 << 63 else "more than a disk's"
        raise _broken(
            named, f"must have the {said} bytes of {kind} {repr(shape)[:80]}",
            f"{last - first}",
        )  # fmt: skip
    return Info(file, name, kind, tuple(shape), data + first, last - first)


def _is_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and value >= 0 for value in values
    )


def _broken(info: Info, demand: str, got: str) -> UserError:
    return UserError(
        f"tensor {info.name!r} of {info.file} {demand}; got {got}. Fetch the file "
        "again."
    )
