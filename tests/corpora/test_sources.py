"""Tests of where text comes from: documents, splits, identities, TFDS."""

import hashlib
import json
import os
import shutil
import sys

import numpy as np
import pytest

from fm_jax.corpora import sources
from tests.corpora.made import PACK, make, refusal, texts, write_corpus


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
        "Did you mean 'text'? Known: text, stdlib, synthetic, tfds"
    )
    assert refusal(make, on_bad_text="skips") == (
        "data.on_bad_text must be one of the known names; got 'skips'. "
        "Did you mean 'skip'? Known: skip, error, replace"
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
