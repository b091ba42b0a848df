"""Tests of verify: whatever is damaged in a store is named, and nothing else."""

import errno
import io
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest

from fm_jax.data import headers, verify
from fm_jax.data.lanes import Sizes
from fm_jax.tokenizers.plain import SymbolTokenizer
from tests.data import made, written

TEXTS = ["abc", "", "é\U0001f642", "d", "fg\x00h" * 9, "ab", "x"]
PIECES = (["a.txt", "/t/a.txt"], ["b.jsonl", ""])
FILES = ["header.json", *headers.FILES, *(headers.shard_name(i) for i in range(3))]
CHANGED = "was changed after it was written: its digest is another"
DAMAGED = "is not as it was written: its blake2b is another"


@pytest.fixture
def folder(tmp_path):
    return written.write(tmp_path / "store", TEXTS, cuts=(2, 6), pieces=PIECES)


def saved(array):
    """Return the bytes of an array's .npy."""
    held = io.BytesIO()
    np.save(held, array)
    return held.getvalue()


def test_a_sound_store_has_no_problems(folder, tmp_path):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert verify.verify(folder) == verify.verify(str(folder)) == []
    assert verify.verify(written.write(tmp_path / "one", ["a"])) == []


def test_a_store_that_was_built_is_sound_and_its_damage_named(tmp_path):
    made.write_corpus(tmp_path / "corpus")
    small = Sizes(batch_bytes=200, shard_tokens=500)
    told = {"tokenizer": written.BYTES, "sizes": small, "deduplicate": True}
    for split in ("train", "eval"):
        cache = tmp_path / split
        built = made.build_files(cache, tmp_path / "corpus", split=split, **told)
        assert len(built.shards) > 1
        assert verify.verify(built.path) == []
        for file in list(built.path.iterdir()):
            raw = file.read_bytes()
            file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
            (found,) = verify.verify(built.path)
            assert found.startswith(f"{file.name}: ")
            file.write_bytes(raw)


def test_blocks_far_smaller_than_a_file_change_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "BLOCK_BYTES", 16)
    assert verify.verify(folder) == []
    rising = saved(np.array([0, 4, 5, 12, 12, 50, 53]))
    other = written.write(tmp_path / "2", TEXTS, cuts=(2, 6), **{"offsets.npy": rising})
    assert verify.verify(other) == ["offsets.npy: must rise from document to document"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_named_wherever_it_is(folder, name):
    """Fault 36, data: a bit flips in any file of a store, at any place.

    Promise: fm data verify names the file, of a store of any size.
    """
    raw = (folder / name).read_bytes()
    expected = f"{name}: {DAMAGED}"
    for place in range(0, len(raw), 1 if len(raw) < 200 else 7):
        other = bytearray(raw)
        other[place] ^= 1 << (place * 5 % 8)
        (folder / name).write_bytes(other)
        found = verify.verify(folder)
        assert len(found) == 1
        assert found[0].startswith("header.json: " if name == FILES[0] else expected)
    (folder / name).write_bytes(raw)
    assert verify.verify(folder) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-(10**9), -7, -1, 1, 4096])
def test_a_file_cut_or_lengthened_is_named(folder, name, change):
    """Fault 35, data: a file of a token store is cut or longer than it was.

    Promise: fm data verify names it.
    """
    raw = (folder / name).read_bytes()
    cut = raw[: max(0, len(raw) + change)] + b"\x00" * change
    (folder / name).write_bytes(cut)
    (found,) = verify.verify(folder)
    if name.endswith(".bin"):
        assert found == f"{name}: must have {len(raw)} bytes; has {len(cut):,}"
    elif name == "header.json":
        assert found.startswith("header.json: is not JSON (")
    else:
        assert found == f"{name}: {DAMAGED}"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert verify.verify(folder) == [f"{name}: is missing"]
    (folder / name).mkdir()
    assert verify.verify(folder) == [f"{name}: is not a plain file"]
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    assert verify.verify(folder) == [f"{name}: is not a plain file"]


def test_all_that_is_damaged_is_named_together(folder):
    shutil.copy(folder / "offsets.npy", folder / "leftover.npy")
    (folder / "tokens-00000.bin").unlink()
    (folder / "tokens-00002.bin").write_bytes(b"\x61\x00\x00\x01")
    (folder / "pieces.json").write_bytes(b"[]")
    assert verify.verify(folder) == [
        f"leftover.npy: {DAMAGED}",
        f"pieces.json: {DAMAGED}",
        "tokens-00000.bin: is missing",
        "tokens-00002.bin: must have 6 bytes; has 4",
    ]


def test_what_the_disk_does_not_give_is_named(folder, monkeypatch):
    def failing(file, *args, **kwargs):
        if file.name in ("counts.npy", "tokens-00001.bin"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open(file, *args, **kwargs)

    monkeypatch.setattr(verify, "open", failing, raising=False)
    assert verify.verify(folder) == [
        "counts.npy: cannot be read (Input/output error)",
        "tokens-00001.bin: cannot be read (Input/output error)",
    ]


def test_a_folder_that_is_no_store_is_named(tmp_path):
    assert verify.verify(tmp_path / "x") == ["header.json: is missing"]
    (tmp_path / "file").write_text("x")
    assert verify.verify(tmp_path / "file") == [
        "header.json: cannot be read (Not a directory)"
    ]


def test_a_header_changed_by_hand_is_named(folder):
    text = (folder / "header.json").read_text()
    (folder / "header.json").write_text(
        text.replace('"duplicates": 0', '"duplicates": 1')
    )
    assert verify.verify(folder) == [f"header.json: {CHANGED}"]


def test_nothing_outside_the_folder_is_opened(folder, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_bytes((folder / "tokens-00001.bin").read_bytes())
    opened = []
    monkeypatch.setattr("builtins.open", lambda *args, **_: opened.append(args))
    header = json.loads((folder / "header.json").read_text())
    for name in ("../secret", str(secret)):
        header["shards"][1]["file"] = name
        written.reseal(folder, shards=header["shards"])
        (found,) = verify.verify(folder)
        assert found == (
            "header.json: shards[1]['file'] must be tokens-00001.bin; got "
            + repr(name)[:80]
        )
    assert not opened


# Digests that are right, of files that are wrong: by a mistake of ours, or by malice.

STREAM = np.array([256, 99, 256], "<u2").tobytes()
AMISS = "must point into the 1 of pieces.json"
NO_JSON = "must be JSON (Expecting value: line 1 column 2 (char 1))"
SYMBOLS = SymbolTokenizer(256)


@pytest.mark.parametrize(
    "name, held, problem",
    [
        ("tokens-00000.bin", np.array([256, 300, 256], "<u2").tobytes(),
         "ids must be below 257; got 300 at 1 of the stream"),
        ("tokens-00000.bin", np.array([99, 99, 256], "<u2").tobytes(),
         "has no end id at 0 of the stream; must have one"),
        ("tokens-00000.bin", np.array([256, 99, 99], "<u2").tobytes(),
         "has no end id at 2 of the stream; must have one"),
        ("tokens-00000.bin", np.array([256, 256, 256], "<u2").tobytes(),
         "has an end id at 1 of the stream; must have none"),
        ("tokens-00000.bin", STREAM + b"\x00\x00", "must have 6 bytes; has 8"),
        ("offsets.npy", saved(np.array([1])),
         "must lie from 0 to below the last end id's 2; got 1 to 1"),
        ("offsets.npy", saved(np.array([-1])), "must rise from document to document"),
        ("offsets.npy", saved(np.array([0, 2])), "must be <i8 [1]; got <i8 [2]"),
        ("offsets.npy", saved(np.array([0], "<i4")), "must be <i8 [1]; got <i4 [1]"),
        ("offsets.npy", saved(np.array([0])) + b"\x00", "must have 136 bytes; has 137"),
        ("leftover.npy", saved(np.array([1], "<i4")),
         "must agree with the header's has_leftover False"),
        ("counts.npy", saved(np.bincount([256, 98, 256])),
         "must have how often each id stands in the shards; got 1 of id 98, counted 0"),
        ("origins.npy", saved(np.array([[1, 0]])), AMISS),
        ("origins.npy", saved(np.array([[0, -1]])), AMISS),
        ("pieces.json", b'[["a"]]', "must be a list of [name, path]"),
        ("pieces.json", b'{"a": "b"}', "must be a list of [name, path]"),
        ("pieces.json", b"[", NO_JSON),
        ("tokenizer.json", SYMBOLS.to_json().encode(),
         f"must have the header's tokenizer {written.BYTES.fingerprint}; got "
         f"{SYMBOLS.fingerprint}"),
    ],
)  # fmt: skip
def test_what_was_written_wrong_is_named(tmp_path, name, held, problem):
    folder = written.write(tmp_path / "store", ["c"], **{name: held})
    assert verify.verify(folder) == [f"{name}: {problem}"]


def test_arrays_that_mean_harm_are_refused(tmp_path):
    objects = io.BytesIO()
    np.save(objects, np.array([print], object), allow_pickle=True)
    zipped = io.BytesIO()
    np.savez(zipped, np.array([0]))
    huge = saved(np.array([0])).replace(b"(1,), }    ", b"(2**62,), }")
    wide = saved(np.array([0])).replace(b"(1,), }         ", b"(9999999999,), }")
    turned = saved(np.asfortranarray(np.zeros((3, 2), "<u8")))
    for number, (name, held, problem) in enumerate(
        [
            ("offsets.npy", objects.getvalue(), "must be <i8 [1]; got |O [1]"),
            ("offsets.npy", zipped.getvalue(), "must be an array of NumPy ("),
            ("offsets.npy", huge, "must be an array of NumPy ("),
            ("offsets.npy", wide, "must be <i8 [1]; got <i8 [9999999999]"),
            ("offsets.npy", b"", "must be an array of NumPy ("),
            ("offsets.npy", b"\x93NUMPY\x02\x00" + b"\xff" * 40, "must be an array of"),
            ("hashes.npy", turned, "must be <u8 [1, 2]; got <u8 [3, 2], in Fortran's"),
        ]
    ):
        folder = written.write(tmp_path / str(number), ["c"], **{name: held})
        (found,) = verify.verify(folder)
        assert found.startswith(f"{name}: {problem}")


def test_the_headers_counts_are_held_against_the_files(tmp_path):
    folder = written.write(tmp_path / "bytes", TEXTS, num_bytes=54)
    assert verify.verify(folder) == [
        "leftover.npy: must make up, with the bytes that ids stand for, the header's "
        "num_bytes 54; got 49"
    ]
    folder = written.write(tmp_path / "documents", TEXTS, cuts=(3,))
    shards = json.loads((folder / "header.json").read_text())["shards"]
    shards[0]["documents"], shards[1]["documents"] = 4, 3
    written.reseal(folder, shards=shards)
    assert verify.verify(folder) == [
        "tokens-00000.bin: must have 4 documents; 3 begin in it",
        "tokens-00001.bin: must have 3 documents; 4 begin in it",
    ]


def test_a_store_of_wide_ids_is_read_as_such(tmp_path):
    wide = SymbolTokenizer(70_000)
    texts = [wide.decode([69_999, 3, 65_536]), wide.decode(range(65_530, 65_540))]
    folder = written.write(tmp_path / "store", texts, wide, cuts=(1,))
    assert (folder / "tokens-00001.bin").stat().st_size == 4 * 12
    assert verify.verify(folder) == []
    raw = bytearray((folder / "tokens-00001.bin").read_bytes())
    raw[4:8] = (70_001).to_bytes(4, "little")
    other = written.write(
        tmp_path / "2", texts, wide, cuts=(1,), **{"tokens-00001.bin": bytes(raw)}
    )
    assert verify.verify(other) == [
        "tokens-00001.bin: ids must be below 70,001; got 70,001 at 5 of the stream"
    ]


def test_memory_does_not_follow_the_size_of_a_store(tmp_path, monkeypatch):
    text = "ab" * 3_000_000
    folder = written.write(tmp_path / "store", [text, "c", text], cuts=(1, 2))
    monkeypatch.setattr(verify, "BLOCK_BYTES", 1 << 16)
    tracemalloc.start()
    assert verify.verify(folder) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (folder / "tokens-00000.bin").stat().st_size > 12_000_000
    assert peak < 2_000_000
