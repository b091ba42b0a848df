"""Stores that are broken are named before a step is taken, with exit status 2."""

import numpy as np
import pytest

from fm_jax import cli
from fm_jax.data import store, windows
from fm_jax.tokenizers.plain import ByteTokenizer, SymbolTokenizer
from tests.data import written

TEXTS = ["a cat sat on a mat", "and saw", "another run after the cat"] * 3
SHARDS = ("tokens-00000.bin", "tokens-00001.bin")


@pytest.fixture
def folder(tmp_path):
    """Return a folder with the stores `train`, of two shards, and `eval`."""
    for split in ("train", "eval"):
        written.write(tmp_path / "stores" / split, TEXTS, cuts=(4,))
    return tmp_path / "stores"


@pytest.fixture
def refused(tiny, folder, tmp_path, capsys):
    """Return `refused(*flags)`: the one line of a run on the stores, which must end."""

    def refused(*flags):
        given = ("data.source", "data.paths", "data.tokenizer", "train.batch_size")
        kept = [f for f in tiny if f.partition("=")[0] not in
                {f"--config.{name}" for name in given}]  # fmt: skip
        status = cli.main([
            "train", *kept, "--config.data.source=store", "--config.train.batch_size=8",
            "--config.data.tokenizer=store", f"--config.data.paths=('{folder}',)",
            f"--workdir={tmp_path / 'run'}", *flags,
        ])  # fmt: skip
        printed = capsys.readouterr().err
        assert status == 2, printed
        assert "Traceback" not in printed
        return printed.splitlines()[-1]

    return refused


def cut(raw):
    """Return the first part of a file."""
    return raw[: len(raw) // 2 | 1]


@pytest.mark.parametrize(
    "name",
    [*(f"train/{name}" for name in ("header.json", "offsets.npy", *SHARDS)),
     "eval/leftover.npy"],
)  # fmt: skip
@pytest.mark.parametrize(
    "damage",
    [cut, lambda raw: b"", lambda raw: b"\x89PNG\r\n\x1a\n" + raw, None],
    ids=["cut", "empty", "another file", "gone"],
)
def test_a_broken_file_of_a_store_is_named(damage, name, folder, refused, tmp_path):
    """Fault 35, data: a file of a token store is cut short, empty, gone or another's.

    Promise: it is named at the start, exit 2; no run folder is made.
    """
    file = folder / name
    raw = file.read_bytes()
    file.unlink()
    if damage:
        file.write_bytes(damage(raw))
    said = refused()
    # Of a folder without a header nobody can say that it was a store.
    assert str(file if damage or "header" not in name else folder) in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("shard", SHARDS)
def test_a_flipped_bit_in_a_shard_is_named(shard, folder, refused, tmp_path):
    """Fault 36, data: a bit flips inside a shard.

    Promise: the shard is named at the start, exit 2, and nothing trains on it; in a
    store above half a gigabyte `fm data verify` finds it.
    """
    file = folder / "train" / shard
    raw = bytearray(file.read_bytes())
    raw[40] ^= 1  # one letter is another: an id like all others
    file.write_bytes(raw)
    said = refused()
    assert f"{file}, which is not as it was written: its blake2b is another" in said
    assert not (tmp_path / "run").exists()


def test_every_flipped_bit_of_a_shard_is_seen(folder):
    file = folder / "train" / SHARDS[1]
    raw = file.read_bytes()
    for place in range(len(raw)):
        other = bytearray(raw)
        other[place] ^= 1 << (place * 5 % 8)
        file.write_bytes(other)
        with pytest.raises(store.UserError, match=SHARDS[1]):
            store.open_store(folder / "train").require_unchanged()
    file.write_bytes(raw)
    store.open_store(folder / "train").require_unchanged()


def test_a_store_that_takes_long_to_read_is_left_to_verify(folder, monkeypatch):
    file = folder / "train" / SHARDS[0]
    found = store.open_store(folder / "train")
    size = sum(shard.nbytes for shard in found.shards)
    file.write_bytes(bytes(len(file.read_bytes())))
    monkeypatch.setattr(store, "READ_AT_START", size - 1)
    found.require_unchanged()
    monkeypatch.setattr(store, "READ_AT_START", size)
    with pytest.raises(store.UserError):
        found.require_unchanged()


@pytest.mark.parametrize(
    ("packing", "place", "wrong"),
    [("split", 5, 300), ("best_fit", 24, 65_535), ("single", 60, 257)],
)
def test_an_id_that_the_tokenizer_does_not_have_is_named(
    packing, place, wrong, tmp_path, refused, folder
):
    """Fault 39, data: a shard has an id beyond the vocabulary, and digests that agree.

    Promise: the batch that has it stops the run with exit 2, with the id, its place
    and its shard; no model ever sees it clamped.
    """
    stream = [np.frombuffer((folder / "train" / s).read_bytes(), "<u2").copy()
              for s in SHARDS]  # fmt: skip
    shard, inside = (
        (0, place) if place < len(stream[0]) else (1, place - len(stream[0]))
    )
    stream[shard][inside] = wrong
    for split in ("train", "eval"):
        files = {name: ids.tobytes() for name, ids in zip(SHARDS, stream, strict=True)}
        written.write(tmp_path / "bad" / split, TEXTS, cuts=(4,), **files)
    said = refused(f"--config.data.packing={packing}",
                   f"--config.data.paths=('{tmp_path / 'bad'}',)",
                   f"--config.data.cache_dir={tmp_path}")  # fmt: skip
    assert "ids of a token store must be below its tokenizer's 257; got" in said
    assert f"got {wrong:,} in {tmp_path / 'bad' / 'train' / SHARDS[shard]} at" in said
    assert f" at {place:,} of the stream. Delete " in said


def test_ids_of_four_bytes_are_not_taken_for_negative_ones(tmp_path):
    wide = SymbolTokenizer(70_000)
    texts = [wide.decode(range(65_530, 65_560))]
    raw = np.array([wide.end_id, *range(65_530, 65_560), wide.end_id], "<u4")
    raw[7] = 2**32 - 3
    path = written.write(tmp_path / "store", texts, wide, **{SHARDS[0]: raw.tobytes()})
    rows = windows.Windows(store.open_store(path, wide), wide, 9, True)
    with pytest.raises(store.UserError, match=r"got 4,294,967,293 in .* at 7 of"):
        rows.rows(np.array([1, 0]))


def test_the_tokenizer_of_another_store_is_refused(folder, refused, tmp_path):
    """Fault 39, data: a store lies beside the tokenizer of another.

    Promise: both fingerprints are told at the start, exit 2.
    """
    other = SymbolTokenizer(257)
    (folder / "train" / "tokenizer.json").write_text(other.to_json())
    said = refused()
    assert "token store must be made with the tokenizer in use; got " in said
    assert (
        f"made with {ByteTokenizer().fingerprint}, in use {other.fingerprint}" in said
    )
    assert not (tmp_path / "run").exists()
