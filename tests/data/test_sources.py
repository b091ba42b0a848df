"""Tests of where text comes from: files, their names, the split, TFDS, and refusals."""

import gzip
import hashlib
import json
import os
import pathlib
import shutil
import sys
import sysconfig
import tempfile

import numpy as np
import pytest
import zstandard

from fm_jax.data import files, sources
from fm_jax.errors import UserError

DEFAULTS = {
    "source": "text",
    "paths": (),
    "eval_paths": (),
    "eval_fraction": 0.3,
    "name": "",
    "tfds_dir": "",
    "split": "train",
    "eval_split": "validation",
    "text_field": "text",
    "on_bad_text": "error",
}


def make(**fields):
    return sources.make(**DEFAULTS | fields)


def texts(*paths, **fields):
    """Return all the texts of files, in order, nothing held out."""
    paths = tuple(map(str, paths))
    with tempfile.TemporaryDirectory() as folder:
        held_out = pathlib.Path(folder, "held_out.txt")
        held_out.write_text("never read")
        source = make(**{"paths": paths, "eval_paths": (str(held_out),)} | fields)
        return list(source.documents("train"))


def refusal(function, *args, **kwargs):
    """Return the text of the UserError that a call ends in."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    return str(error.value)


def zstd(raw):
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw)


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def write_corpus(folder, num_files):
    """Write files whose text is their own name."""
    for number in range(num_files):
        path = folder / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.relative_to(folder).as_posix())


# What is read.


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document_however_it_is_packed(suffix, packing, tmp_path):
    path = tmp_path / f"one{suffix}{packing}"
    path.write_bytes(PACK[packing]("été\r\n\x00 \U0001f642\n".encode()))
    assert texts(path) == ["été\r\n\x00 \U0001f642\n"]


@pytest.mark.parametrize("packing", PACK)
def test_each_jsonl_line_with_text_is_a_document(packing, tmp_path):
    path = tmp_path / f"rows.jsonl{packing}"
    lines = ['{"text": "a\\nb", "n": 1}', "", '{"text": ""}', '{"text": "\\u00e9"}']
    path.write_bytes(PACK[packing]("\n".join(lines).encode()))
    assert texts(path) == ["a\nb", "é"]


def test_text_field_names_the_field_of_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "no", "body": "yes"}\n')
    assert texts(path, text_field="body") == ["yes"]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("size", [3, 300_000])
def test_packed_files_joined_end_to_end_are_read_to_the_end(packing, size, tmp_path):
    one, two = (np.random.default_rng(s).bytes(size).hex() for s in (1, 2))
    path = tmp_path / f"joined.txt{packing}"
    path.write_bytes(PACK[packing](one.encode()) + PACK[packing](two.encode()))
    assert texts(path) == [one + two]


def test_empty_files_are_no_documents(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    assert texts(tmp_path) == ["b"]


def test_a_folder_stands_for_all_text_under_it_in_name_order(tmp_path):
    for name in ["z.txt", "inner/deep/y.md", "inner/x.py", "w.jsonl", "photo.png"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name == "w.jsonl" else name)
    assert texts(tmp_path) == ["inner/deep/y.md", "inner/x.py", "w.jsonl", "z.txt"]


def test_globs_cross_folders_and_pass_by_what_is_not_text(tmp_path):
    write_corpus(tmp_path, 5)
    (tmp_path / "part0" / "0.bin").write_text("no")
    assert texts(f"{tmp_path}/**/[03].*") == ["part0/0.txt", "part0/3.txt"]
    assert len(texts(f"{tmp_path}/**")) == 5


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_corpus(tmp_path, 1)
    assert texts("~/part0/*.txt") == ["part0/0.txt"]


def test_a_file_that_two_patterns_match_is_read_once(tmp_path, monkeypatch):
    write_corpus(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    read = texts("part0/0.txt", f"{tmp_path}/part0", f"{tmp_path}/part1/../part0/*")
    assert read == ["part0/0.txt"]


def test_a_link_is_read_by_its_own_suffix_and_not_its_targets(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "5ca1ab1e").write_bytes(gzip.compress(b'{"text": "in"}'))
    (tmp_path / "rows.jsonl.gz").symlink_to("blobs/5ca1ab1e")
    assert texts(tmp_path / "rows.jsonl.gz") == ["in"]


# The split.


def test_a_names_fraction_is_its_blake2b_of_64_bits():
    digest = "d8bb14d833d59559"  # printf abc | b2sum --length=64
    assert sources.name_fraction("abc") == int(digest, 16) / 2**64


def test_the_split_by_hash_is_disjoint_and_covers_all(tmp_path):
    write_corpus(tmp_path, 60)
    source = make(paths=(str(tmp_path),))
    train, held = (list(source.documents(split)) for split in sources.SPLITS)
    every = sorted(f"part{n % 3}/{n}.txt" for n in range(60))
    assert sorted(train + held) == every
    assert held == [name for name in every if sources.name_fraction(name) < 0.3]
    assert 5 < len(held) < 35


def test_jsonl_lines_are_split_one_by_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(1, 50)))
    source = make(paths=(str(path),))
    held = [n for n in range(1, 50) if sources.name_fraction(f"rows.jsonl#{n}") < 0.3]
    assert list(source.documents("eval")) == [f"t{n}" for n in held]
    assert len(list(source.documents("train"))) == 49 - len(held)


def test_moving_a_corpus_changes_neither_split_nor_identity(tmp_path):
    here, there = tmp_path / "here", tmp_path / "far" / "there"
    write_corpus(here, 20)
    shutil.copytree(here, there)
    one, two = make(paths=(str(here),)), make(paths=(f"{there}/**/*.txt",))
    for split in sources.SPLITS:
        assert list(one.documents(split)) == list(two.documents(split))
        assert one.identity(split) == two.identity(split)


def test_eval_paths_are_held_out_and_nothing_else_is(tmp_path):
    write_corpus(tmp_path / "a", 20)
    (tmp_path / "held.txt").write_text("held")
    source = make(
        paths=(str(tmp_path / "a"),),
        eval_paths=(str(tmp_path / "held.txt"),),
        eval_fraction=0.0,
    )
    assert len(list(source.documents("train"))) == 20
    assert list(source.documents("eval")) == ["held"]


def test_identity_changes_with_a_byte_of_content_a_name_and_the_options(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one")
    (tmp_path / "b.txt").write_bytes(b"two")
    first = make(paths=(str(tmp_path),)).identity("train")
    os.utime(path, (1, 1))
    assert make(paths=(str(tmp_path),)).identity("train") == first
    seen = [first, make(paths=(str(tmp_path),)).identity("eval")]
    for fields in [
        {"eval_fraction": 0.4},
        {"text_field": "body"},
        {"on_bad_text": "skip"},
    ]:
        seen.append(make(paths=(str(tmp_path),), **fields).identity("train"))
    path.write_bytes(b"onf")
    seen.append(make(paths=(str(tmp_path),)).identity("train"))
    path.rename(tmp_path / "c.txt")
    seen.append(make(paths=(str(tmp_path),)).identity("train"))
    assert len({json.dumps(i) for i in seen}) == len(seen) == 7


# What is refused.


def test_missing_paths_are_refused(tmp_path):
    assert refusal(make) == (
        "data.paths must list files or globs; got none. "
        "Example: --config.data.paths='(\"corpus/**/*.txt\",)'."
    )
    for pattern in [f"{tmp_path}/none.txt", f"{tmp_path}/*.txt"]:
        assert refusal(make, paths=(pattern,)) == (
            f"data.paths must match files; got none for {pattern!r}."
        )
    (tmp_path / "a.txt").write_text("a")
    pattern = f"{tmp_path}/b.txt"
    assert refusal(make, paths=(str(tmp_path / "a.txt"),), eval_paths=(pattern,)) == (
        f"data.eval_paths must match files; got none for {pattern!r}."
    )


def test_a_named_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(b"")
    assert refusal(make, paths=(str(path),)) == (
        "data.paths must name text (.txt, .md, .py, .jsonl, each also .gz or .zst); "
        f"got {path}."
    )


def test_patterns_that_match_no_text_are_refused(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"")
    assert refusal(make, paths=(str(tmp_path), f"{tmp_path}/*")) == (
        "data.paths must match text files (.txt, .md, .py, .jsonl, each also .gz or "
        f".zst); got none in {tmp_path}, {tmp_path}/*."
    )


def test_a_file_that_has_gone_since_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    source = make(paths=(str(path),))
    path.unlink()
    expected = f"data file must be readable; got {path} (No such file or directory)."
    assert refusal(source.identity, "train") == expected
    assert refusal(lambda: list(source.documents("train"))) == expected


@pytest.mark.parametrize("packing", PACK)
def test_text_that_is_not_utf8_is_refused_with_the_place_of_the_byte(packing, tmp_path):
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACK[packing]("é".encode() + b"ab\xffc"))
    assert refusal(texts, path) == (
        f"data file must be UTF-8; got {path} with a bad byte at offset 4. Mend it, or "
        "set --config.data.on_bad_text=skip or =replace."
    )


def test_the_place_of_a_bad_byte_in_jsonl_is_counted_from_the_files_start(tmp_path):
    path = tmp_path / "a.jsonl"
    raw = '{"text": "é"}\n\n'.encode() + b'{"text": "a\xfe"}\n'
    path.write_bytes(raw)
    assert refusal(texts, path) == (
        f"data file must be UTF-8; got {path} with a bad byte at offset "
        f"{raw.index(0xFE)}. Mend it, or set --config.data.on_bad_text=skip or "
        "=replace."
    )


def test_on_bad_text_skips_the_document_or_replaces_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\xff")
    (tmp_path / "b.txt").write_bytes(b"b")
    rows = [b'{"text": "c\xff"}', b'{"text": "d"}', b'{"text": "e\\ud800"}']
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(rows))
    assert texts(tmp_path, on_bad_text="skip") == ["b", "d"]
    replaced = ["a\ufffd", "b", "c\ufffd", "d", "e?"]
    assert texts(tmp_path, on_bad_text="replace") == replaced


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{'text': 1}", "not JSON: Expecting property name enclosed in double quotes"),
        ('{"txt": "a"}', "no text under 'text'"),
        ('{"text": 3}', "no text under 'text'"),
        ('["text"]', "no text under 'text'"),
        ('{"text": "\\ud83d"}', "not UTF-8: 'utf-8' codec can't encode"),
    ],
)
def test_a_bad_jsonl_line_is_refused_with_its_number(line, problem, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + "\n")
    text = refusal(texts, path)
    assert text.startswith(
        "data line must be an object with text under 'text'; got "
        f"{path} line 3 ({problem}"
    )
    assert text.endswith(
        "). Set --config.data.text_field or --config.data.on_bad_text=skip."
    )
    assert "\n" not in text
    assert texts(path, on_bad_text="skip") == ["a"]


def cut(packed):
    return packed[: len(packed) // 2]


def cut_at_once(packed):
    return packed[:5]


def scratch(packed):
    middle = len(packed) // 2
    return packed[:middle] + b"\xff" * 50 + packed[middle + 50 :]


def scratch_the_first_block(packed):
    return packed[:10] + b"\xff" * 4 + packed[14:]  # of a kind that does not exist


def unpacked(packed):
    return b"plain text that someone renamed"


@pytest.mark.parametrize(
    "damage", [cut, cut_at_once, scratch, scratch_the_first_block, unpacked]
)
@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_damaged_packed_file_is_refused_and_never_cut_short(
    suffix, packing, damage, tmp_path
):
    path = tmp_path / f"a{suffix}{packing}"
    random = np.random.default_rng(0).bytes(150_000).hex()
    rows = [{"text": random[n : n + 1000]} for n in range(0, len(random), 1000)]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(damage(PACK[packing](raw)))
    text = refusal(texts, path, on_bad_text="skip")
    assert text.startswith(f"data file must be readable; got {path} (")
    assert text.endswith("). Restore it or take it out of data.paths.")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
@pytest.mark.parametrize("source", ["stdlib", "text"])
def test_a_split_by_hash_needs_a_fraction_between_0_and_1(source, fraction):
    text = refusal(make, source=source, paths=("a.txt",), eval_fraction=fraction)
    assert text == (
        "data.eval_fraction must be between 0 and 1 when documents are split by a hash "
        f"of their names; got {fraction}."
    )


def test_unknown_names_are_refused_nearest_first():
    assert refusal(make, source="txt") == (
        "data.source must be one of the known names; got 'txt'. "
        "Did you mean 'text'? Known: text, stdlib, tfds"
    )
    assert refusal(make, on_bad_text="skips") == (
        "data.on_bad_text must be one of the known names; got 'skips'. "
        "Did you mean 'skip'? Known: skip, error, replace"
    )


# The standard library.


def test_the_standard_library_is_clean_utf8_without_tests_or_installed_packages():
    found = files.stdlib_files()
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(found)
    folders = {part for name in found for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages"}
    assert not folders & {"dist-packages", "__pycache__"}
    source = make(source="stdlib", eval_fraction=0.05)
    read = [text for split in sources.SPLITS for text in source.documents(split)]
    assert sum(len(t.encode()) for t in read) == sum(
        path.stat().st_size for path in found.values()
    )


def test_a_python_without_its_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert refusal(make, source="stdlib") == (
        f"the standard library must have its source files; got none under {tmp_path}. "
        "Use another Python, or --config.data.source=text."
    )


# TensorFlow Datasets.


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Return a folder with `tiny_talk`, prepared by TFDS itself."""
    import tensorflow_datasets as tfds

    class TinyTalk(tfds.core.GeneratorBasedBuilder):
        """Twenty-three short texts to train on and seven to hold out."""

        # TFDS looks for its files by this; a test folder is no package to it.
        __module__ = "__main__"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "label": np.int64}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(0, 23),
                "validation": self._generate_examples(23, 30),
            }

        def _generate_examples(self, start, stop):
            for number in range(start, stop):
                # The middle one is empty, as happens in the wild.
                text = "" if number == 11 else f"talk {number} é"
                yield number, {"text": text, "label": number}

    folder = tmp_path_factory.mktemp("tfds")
    builder = TinyTalk(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return str(folder)


def talk(tfds_dir, **fields):
    return make(source="tfds", name="tiny_talk", tfds_dir=tfds_dir, **fields)


def test_a_tfds_dataset_is_read_whole_without_tensorflow(tfds_dir):
    source = talk(tfds_dir)
    train, held = (list(source.documents(split)) for split in sources.SPLITS)
    assert sorted(train) == sorted(f"talk {n} é" for n in range(23) if n != 11)
    assert sorted(held) == sorted(f"talk {n} é" for n in range(23, 30))
    assert list(source.documents("train")) == train
    assert "tensorflow" not in sys.modules


def test_one_tfds_split_is_shared_out_by_hash(tfds_dir):
    whole = list(talk(tfds_dir).documents("train"))
    source = talk(tfds_dir, eval_split="train")
    train, held = (list(source.documents(split)) for split in sources.SPLITS)
    assert sorted(train + held) == sorted(whole)
    assert train and held
    assert refusal(talk, tfds_dir, eval_split="train", eval_fraction=0.0) == (
        "data.eval_fraction must be between 0 and 1 when documents are split by a hash "
        "of their names; got 0.0."
    )


def test_a_tfds_slice_is_a_split(tfds_dir):
    source = talk(tfds_dir, split="train[:5]", eval_split="train[5:]")
    train, held = (list(source.documents(split)) for split in sources.SPLITS)
    assert train + held == list(talk(tfds_dir).documents("train"))
    assert len(train) in (4, 5)


def test_tfds_identity_names_version_parts_and_split(tfds_dir):
    identity = talk(tfds_dir).identity("eval")
    assert identity["tfds"] == "tiny_talk/1.0.0"
    assert {n: p[0] for n, p in identity["parts"].items()} == {
        "train": 23,
        "validation": 7,
    }
    seen = [
        identity,
        talk(tfds_dir).identity("train"),
        talk(tfds_dir, eval_split="train").identity("eval"),
        talk(tfds_dir, text_field="label").identity("eval"),
    ]
    digests = {hashlib.sha256(json.dumps(i).encode()).hexdigest() for i in seen}
    assert len(digests) == len(seen)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tiny_tlak", "Dataset tiny_tlak not found."),
        ("tiny talk", "Parsing builder name string tiny talk failed."),
        ("tiny_talk:9.9.9", "Failed to construct dataset"),
        ("tiny_talk/large", "Failed to construct dataset"),
    ],
)
def test_an_unknown_tfds_dataset_is_refused(name, reason, tfds_dir):
    source = make(source="tfds", name=name, tfds_dir=tfds_dir)
    text = refusal(source.identity, "train")
    assert text.startswith(f"data.name must be a TFDS dataset; got {name!r} ({reason}")
    assert text.endswith("). See tensorflow.org/datasets.")
    assert "\n" not in text


def test_an_unknown_tfds_split_is_refused_with_the_known_ones(tfds_dir):
    source = talk(tfds_dir, split="test")
    assert refusal(lambda: list(source.documents("train"))) == (
        "TFDS dataset must be prepared as ArrayRecord; got 'tiny_talk' split 'test' "
        "(Unknown split 'test'. Should be one of ['train', 'validation'].). Run "
        "tfds.builder('tiny_talk', file_format='array_record').download_and_prepare() "
        "first."
    )


def test_a_tfds_field_that_is_missing_or_not_text_is_refused(tfds_dir):
    source = talk(tfds_dir, text_field="txt")
    assert refusal(lambda: list(source.documents("eval"))) == (
        "data.text_field must be one of the known names; got 'txt'. "
        "Did you mean 'text'? Known: text, label"
    )
    source = talk(tfds_dir, text_field="label")
    assert refusal(lambda: list(source.documents("eval"))).startswith(
        "data.text_field must name text; got 'label' of 'tiny_talk', which holds int"
    )


def test_a_held_out_file_cannot_be_trained_on_too(tmp_path):
    write_corpus(tmp_path, 4)
    both = tmp_path / "part0" / "0.txt"
    assert refusal(make, paths=(str(tmp_path),), eval_paths=(str(both),)) == (
        f"data.eval_paths must not be trained on; got a file of data.paths: {both}. "
        "Take it out of one."
    )
