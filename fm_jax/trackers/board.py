"""TensorBoard's event files, as its own writer would leave them.

An event file is a row of records: length, checksum of the length, an Event of protocol
buffers, its checksum; https://www.tensorflow.org/tutorials/load_data/tfrecord, and
tensorboard/compat/proto/{event,summary}.proto. What we write of an Event is few
fields. tensorboardX would import torch wherever that is installed.
"""

import functools
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from fm_jax.trackers import rows

FOLDER = "tensorboard"


class Board:
    """Writes the scalars of one start of a run into a file of RUN/tensorboard.

    Readers take the files of a folder in the order of their names, so this start's
    comes after all that are there.
    """

    num_dropped = 0

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        before = [file.name.split(".")[3] for file in folder.glob("*.tfevents.*.*")]
        after = (int(number) + 1 for number in before if number.isdecimal())
        number = max([int(time.time()), *after])
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb")  # noqa: SIM115, held until close
        self._write(_event(time.time(), version="brain.Event:2"))
        self._file.flush()

    def row(self, when: float, row: dict[str, Any]) -> None:
        """Write the scalars of a row; when: seconds since 1970."""
        found = rows.scalars(row)
        if found:
            self._write(_event(when, row["step"], scalars=found))

    def rewind(self, step: int, since: int, kept: list[dict[str, Any]]) -> None:
        """Make readers drop points of `since` and later; write `kept` again."""
        self._write(_event(time.time(), since, is_start=True))
        for row in kept:
            self.row(time.time(), row)

    def flush(self) -> None:
        """Hand all to the system, which keeps it when this process dies."""
        self._file.flush()

    def end(self, status: str) -> None:
        """Be told how the run ended, of which no event tells."""

    def close(self, until: float) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))


def _event(
    when: float,
    step: int = 0,
    *,
    version: str = "",
    scalars: dict[str, float] | None = None,
    is_start: bool = False,
) -> bytes:
    """Return an Event: a file's first, a Summary of scalars, or SessionLog.START."""
    event = b"\x09" + struct.pack("<d", when) + b"\x10" + _varint(step)
    if version:
        event += _bytes(3, version.encode())
    if scalars:
        values = (
            _bytes(1, _bytes(1, tag.encode()) + b"\x15" + _float32(value))
            for tag, value in scalars.items()
        )
        event += _bytes(5, b"".join(values))
    if is_start:
        event += _bytes(7, b"\x08\x01")
    return event


def _float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except (OverflowError, struct.error):  # as rounding would have it
        return struct.pack("<f", float("inf") if value > 0 else float("-inf"))


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


@functools.cache
def _crc_table() -> tuple[int, ...]:
    """Return CRC-32C of each byte (RFC 3720, appendix B.4), bits reflected."""
    found = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)  # noqa: PLW2901
        found.append(crc)
    return tuple(found)


def _checksum(content: bytes) -> bytes:
    """Return the masked CRC-32C that stands behind a record's parts."""
    crc, table = 0xFFFFFFFF, _crc_table()
    for byte in content:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
