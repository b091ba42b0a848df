"""TensorBoard's own reader finds in the event files what was written."""

import struct

import numpy as np
import pytest

from fm_jax.trackers.board import Board, _checksum
from fm_jax.trackers.rows import scalars

reader = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    reason="reads event files with tensorboard, of the extra test",
)


def points(folder):
    """Return {(metric, step): value} of all that TensorBoard shows of a folder."""
    found = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {
        (tag, event.step): event.value
        for tag in found.Tags()["scalars"]
        for event in found.Scalars(tag)
    }


@pytest.fixture
def board(tmp_path):
    """Return `board()`: a new Board of one folder, as each start makes one."""
    opened = []

    def start():
        for before in opened:
            before.close(0)
        opened.append(Board(tmp_path))
        return opened[-1]

    yield start
    opened[-1].close(0)


def test_every_number_is_read_back_at_its_step(board, tmp_path):
    rows = [
        {"step": 0, "train/loss": 0.1, "a": -3, "é/ü": 1e-30, "text": "left out"},
        {"step": 127, "train/loss": float("inf"), "b": 2**40},
        {"step": 128, "train/loss": -0.0, "is": True},
        {"step": 2**40, "train/loss": 1e300, "c": -1e300, "d": 10**400},
        {"step": 5_000_000, "none": None},
    ]
    one = board()
    for row in rows:
        one.row(12.5, row)
    one.flush()
    with np.errstate(over="ignore"):
        wanted = {
            (name, row["step"]): float(np.float32(min(value, 1e308)))
            for row in rows
            for name, value in scalars(row).items()
        }
    assert points(tmp_path) == wanted


def test_a_value_that_is_no_number_is_read_back_so(board, tmp_path):
    one = board()
    one.row(1.0, {"step": 3, "train/loss": float("nan")})
    one.flush()
    assert np.isnan(points(tmp_path)["train/loss", 3])


def test_the_time_of_a_point_is_that_of_its_row(board, tmp_path):
    one = board()
    one.row(1234.625, {"step": 3, "train/loss": 1.0})
    one.flush()
    found = reader.EventAccumulator(str(tmp_path))
    found.Reload()
    assert [event.wall_time for event in found.Scalars("train/loss")] == [1234.625]


def test_points_that_a_start_takes_back_are_gone_and_those_it_keeps_stay(
    board, tmp_path
):
    one = board()
    for step in range(1, 8):
        one.row(1.0, {"step": step, "train/loss": step / 2})
    one.row(1.0, {"step": 7, "final/loss": 1.0})
    two = board()
    two.rewind(5, 4, [{"step": 4, "train/loss": 2.0}, {"step": 5, "train/loss": 2.5}])
    two.row(2.0, {"step": 6, "train/loss": 9.0})
    two.flush()
    wanted = {("train/loss", step): step / 2 for step in range(1, 6)}
    assert points(tmp_path) == wanted | {("train/loss", 6): 9.0}


def test_a_start_in_the_same_second_is_read_after_the_one_before(board, tmp_path):
    for number in range(3):
        one = board()
        one.rewind(0, 0, [])
        one.row(1.0, {"step": 1, "train/loss": number})
        one.flush()
    assert len(list(tmp_path.iterdir())) == 3
    assert points(tmp_path) == {("train/loss", 1): 2.0}


def test_another_program_s_event_files_are_left_alone(board, tmp_path):
    other = tmp_path / "events.out.tfevents.99999999999.host"
    other.write_bytes(b"")
    (tmp_path / "events.out.tfevents.profile.host").write_bytes(b"")
    board()
    newest = max(path.name for path in tmp_path.glob("*.tfevents.1*"))
    assert newest.startswith("events.out.tfevents.100000000000.")
    assert other.read_bytes() == b""


def test_the_checksum_is_crc_32c():
    """RFC 3720, appendix B.4, has the sums of these; a record's are masked."""

    def masked(crc):
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)

    assert _checksum(bytes(32)) == masked(0x8A9136AA)
    assert _checksum(b"\xff" * 32) == masked(0x62A8AB43)
    assert _checksum(bytes(range(32))) == masked(0x46DD794E)
