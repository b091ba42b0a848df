"""Tests of text packed into TFDS datasets: what is in them, and who reads them."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from fm_jax.corpora import documents, packed, tfds
from tests.corpora import made
from tests.corpora.made import POLICY, met, read, refusal, write_corpus


def pack(source, out, **fields):
    given = {"out": out, "name": "my_text", **POLICY}
    return packed.pack(source, **given | fields)


def rows(path):
    """Return the rows of each split as TFDS reads them, by the folder alone."""
    import tensorflow_datasets

    builder = tensorflow_datasets.builder_from_directory(path)
    return {
        split: [
            (row["text"].decode(), row["origin"].decode())
            for row in builder.as_data_source(split)
        ]
        for split in ("train", "validation")
    }


def all_of(folder):
    """Return a source that holds nothing of a folder out."""
    held_out = folder.with_name("held_out.txt")
    held_out.write_text("held out")
    return made.make(paths=(str(folder),), eval_paths=(str(held_out),))


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus", 40)
    lines = [json.dumps({"text": f"line {n} é"}) for n in range(9)]
    (tmp_path / "corpus" / "lines.jsonl").write_text("\n".join(lines))
    return made.make(paths=(str(tmp_path / "corpus"),))


def test_rows_are_the_documents_of_both_splits_in_order_and_where_they_were(
    corpus, tmp_path
):
    path = pack(corpus, tmp_path / "out")
    assert path == tmp_path / "out" / "my_text" / "1.0.0"
    found = rows(path)
    assert [text for text, _ in found["train"]] == read(corpus)
    assert [text for text, _ in found["validation"]] == read(corpus, "eval")
    every = [*found["train"], *found["validation"]]
    assert {where for text, where in every if "line" not in text} == {
        text for text, _ in every if "line" not in text
    }
    # Lines are numbered from 1.
    where = {text: where for text, where in every}
    assert all(where[f"line {n} é"] == f"lines.jsonl line {n + 1}" for n in range(9))


def test_plain_tfds_reads_it_by_name_in_another_process(corpus, tmp_path):
    pack(corpus, tmp_path / "out", version="2.0.1")
    code = """if True:
        import json, sys
        import tensorflow_datasets as tfds
        folder = sys.argv[1]
        one = tfds.builder("my_text", data_dir=folder).as_data_source("train")
        two = tfds.data_source("my_text:2.0.1", split="train", data_dir=folder)
        three = tfds.builder_from_directory(folder + "/my_text/2.0.1")
        three = three.as_data_source("train")
        texts = [[row["text"].decode() for row in rows] for rows in (one, two, three)]
        loaded = [name for name in ("tensorflow", "fm_jax") if name in sys.modules]
        print(json.dumps([texts, loaded]))
    """
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    texts, loaded = json.loads(ran.stdout)
    assert texts == [read(corpus)] * 3
    assert loaded == []


def test_our_own_source_reads_it(corpus, tmp_path):
    pack(corpus, tmp_path / "out")
    source = tfds.make(
        name="my_text",
        data_dir=str(tmp_path / "out"),
        split="train",
        eval_split="validation",
        eval_fraction=0.0,
        text_field="text",
        cache=None,
    )
    assert read(source) == read(corpus)
    assert read(source, "eval") == read(corpus, "eval")
    assert "tensorflow" not in sys.modules


def test_text_that_is_held_out_elsewhere_is_left_out_of_train(tmp_path):
    write_corpus(tmp_path / "a", 6)
    (tmp_path / "held.txt").write_text("part1/4.txt")
    source = made.make(
        paths=(str(tmp_path / "a"),), eval_paths=(str(tmp_path / "held.txt"),)
    )
    found = rows(pack(source, tmp_path / "out"))
    assert found["validation"] == [("part1/4.txt", "held.txt")]
    whole = [name for name in read(source) if name != "part1/4.txt"]
    assert [text for text, _ in found["train"]] == whole and len(whole) == 5


def test_a_gigabyte_is_no_border_and_shards_hold_so_many_rows(
    corpus, tmp_path, monkeypatch
):
    from tensorflow_datasets.core import shuffle

    # Beyond it TFDS's own writer goes by files of TensorFlow, which is not here.
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1)
    monkeypatch.setattr(packed, "SHARD_ROWS", 10)
    monkeypatch.setattr(packed, "BATCH_BYTES", 50)
    path = pack(corpus, tmp_path / "out")
    assert [text for text, _ in rows(path)["train"]] == read(corpus)
    shards = sorted(path.glob("my_text-train.array_record-*"))
    assert len(shards) == -(-len(read(corpus)) // 10)


def test_what_was_met_of_bad_text_stands_in_the_metadata(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [b'{"text": "a\xff"}', b'{"text": "b"}', b"not json", b'{"text": ""}']
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    source = all_of(folder)
    assert "must be UTF-8" in refusal(pack, source, tmp_path / "out")
    assert list((tmp_path / "out").glob("[!.]*")) == []
    path = pack(source, tmp_path / "out", on_bad_text="skip")
    assert rows(path)["train"] == [("b", "a.jsonl line 2")]
    told = json.loads((path / "metadata.json").read_text())
    assert told["train"] == met(source, on_bad_text="skip")[1]
    assert told["train"]["skipped"] == {"bad UTF-8": 1, "broken JSON": 1}


def test_bytes_are_a_function_of_the_text(corpus, tmp_path):
    one, two = (pack(corpus, tmp_path / name) for name in "ab")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir()) and len(names) == 5
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()


# What is refused.


def test_nothing_stays_where_reading_fails(corpus, tmp_path, monkeypatch):
    pieces = corpus.pieces("train")

    def failing(*_):
        (tmp_path / "corpus" / "lines.jsonl").write_text("other")
        return pieces

    monkeypatch.setattr(type(corpus), "pieces", failing)
    text = refusal(pack, corpus, tmp_path / "out")
    assert text.startswith("data file must not change until it is read; got ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [
        ".my_text-1.0.0.lock"
    ]


def test_what_a_killed_one_left_is_no_hindrance(corpus, tmp_path):
    left = tmp_path / "out" / ".my_text-1.0.0.packing" / "my_text" / "1.0.0"
    left.mkdir(parents=True)
    (left / "dataset_info.json").write_text("{")
    assert rows(pack(corpus, tmp_path / "out"))["train"]
    assert not left.exists()


def test_a_dataset_that_is_there_is_kept(corpus, tmp_path):
    path = pack(corpus, tmp_path / "out")
    assert refusal(pack, corpus, tmp_path / "out") == (
        f"dataset must be packed to a new folder; got {path}, which is there. Delete "
        "it or choose another name."
    )
    assert pack(corpus, tmp_path / "out", version="1.0.1").exists()
    assert pack(corpus, tmp_path / "out", name="other").exists()
    assert rows(path)["train"]


@pytest.mark.parametrize("name", ["My_Text", "my-text", "", "9lives", "a__b", "a/b"])
def test_a_name_that_tfds_would_not_find_is_refused(name, corpus, tmp_path):
    assert refusal(pack, corpus, tmp_path / "out", name=name) == (
        "name of a dataset must be small letters, digits and single underscores; got "
        f"{name!r}. Example: my_text."
    )


def test_a_version_that_is_none_is_refused(corpus, tmp_path):
    assert refusal(pack, corpus, tmp_path / "out", version="1.0") == (
        "version of a dataset must be three numbers; got '1.0'. Example: 1.0.0."
    )


def test_a_split_without_text_is_refused(tmp_path):
    (tmp_path / "only.txt").write_text("one document")
    digest = documents.fraction(documents.text_hash("one document"))
    fraction = (digest + 1) / 2  # above it: held out
    source = made.make(paths=(str(tmp_path),), eval_fraction=fraction)
    assert refusal(pack, source, tmp_path / "out") == (
        "the corpus must have text; got no document of its train split with any in it. "
        "Check data.paths and data.eval_fraction."
    )
    assert list((tmp_path / "out").glob("[!.]*")) == []


def test_a_folder_that_cannot_be_written_is_refused(corpus, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert refusal(pack, corpus, tmp_path / "out") == (
        f"--out must be writable and have room; got {tmp_path / 'out'} (File exists). "
        "Free space or name another folder."
    )


def test_a_disk_without_room_is_refused_and_nothing_stays(tmp_path):
    random = os.urandom(1 << 17).hex()
    (tmp_path / "corpus").mkdir()
    for number in range(4):
        text = random[number * 50_000 :][:60_000]
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    source = all_of(tmp_path / "corpus")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, limits[1]))
        text = refusal(pack, source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert text.startswith(
        f"--out must be writable and have room; got {tmp_path / 'out'} ("
    )
    assert "File too large" in text and "\n" not in text
    assert list((tmp_path / "out").glob("[!.]*")) == []
    assert list((tmp_path / "out").glob(".*packing")) == []


def test_a_file_with_a_name_that_is_no_utf8_is_packed(tmp_path):
    folder = tmp_path / "corpus"
    write_corpus(folder, 1)
    (folder / os.fsdecode(b"\xff.txt")).write_text("odd")
    origins = [where for _, where in rows(pack(all_of(folder), tmp_path))["train"]]
    assert origins == ["part0/0.txt", "\\udcff.txt"]
