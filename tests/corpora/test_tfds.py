"""Tests of TFDS datasets: their rows, splits and identity, and what is refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from fm_jax.corpora import documents, sources, tfds
from fm_jax.corpora.documents import fraction, text_hash
from tests.corpora.made import met, read, refusal, write_records

NUM_TRAIN, NUM_HELD_OUT, EMPTY = 23, 7, 11


def text_of(number):
    # The middle one is empty, as happens in the wild.
    return "" if number == EMPTY else f"talk {number} é"


def prepare(folder, *, file_format="array_record"):
    """Have TFDS prepare `tiny_talk` in a folder."""
    import tensorflow_datasets

    features = tensorflow_datasets.features

    class TinyTalk(
        tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True
    ):
        """Short texts to train on, to hold out, and odd ones."""

        # TFDS looks for its files by this; a test folder is no package to it.
        __module__ = "__main__"
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            text = features.Text()
            fields = {"text": text, "label": np.int64, "said": {"by": text}}
            fields |= {"words": features.Sequence(text)}
            return tensorflow_datasets.core.DatasetInfo(
                builder=self, features=features.FeaturesDict(fields)
            )

        def _split_generators(self, dl_manager):
            last = NUM_TRAIN + NUM_HELD_OUT
            numbered = [(n, text_of(n)) for n in range(last)]
            odd = enumerate([b"a\xff", "b\0", "c"])
            return {
                "train": self._generate_examples(numbered[:NUM_TRAIN]),
                "validation": self._generate_examples(numbered[NUM_TRAIN:]),
                "odd": self._generate_examples(odd),
            }

        def _generate_examples(self, numbered):
            for number, text in numbered:
                said, words = {"by": f"me {number}"}, ["a", "b"]
                row = {"text": text, "label": number, "said": said, "words": words}
                yield number, row

    builder = TinyTalk(data_dir=str(folder), file_format=file_format)
    shards = tensorflow_datasets.download.DownloadConfig(num_shards=3)
    builder.download_and_prepare(download_config=shards)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Return a folder with `tiny_talk`, each split in three shards."""
    folder = tmp_path_factory.mktemp("tfds")
    prepare(folder)
    return str(folder)


@pytest.fixture
def copied(tfds_dir, tmp_path):
    """Return a copy of that folder, to be spoilt."""
    shutil.copytree(tfds_dir, tmp_path / "copied")
    return tmp_path / "copied"


def talk(folder, **fields):
    given = {
        "name": "tiny_talk",
        "data_dir": str(folder),
        "split": "train",
        "eval_split": "validation",
        "eval_fraction": 0.3,
        "text_field": "text",
        "cache": None,
    }
    return tfds.make(**given | fields)


def by_tfds(folder, split):
    """Return the texts of a split as TFDS itself reads them."""
    import tensorflow_datasets

    rows = tensorflow_datasets.data_source("tiny_talk", split=split, data_dir=folder)
    return [row["text"].decode() for row in rows]


# What is read.


def test_a_dataset_is_read_whole_in_its_order_without_tensorflow(tfds_dir):
    source = talk(tfds_dir)
    train, held = read(source), read(source, "eval")
    assert train == [text for text in by_tfds(tfds_dir, "train") if text]
    assert held == by_tfds(tfds_dir, "validation")
    every = {text_of(n) for n in range(NUM_TRAIN + NUM_HELD_OUT)} - {""}
    assert {*train} | {*held} == every and len(train + held) == len(every)
    assert source.is_held_out_apart
    assert source.share("train") == source.share("eval") == (0.0, 1.0)
    assert "tensorflow" not in sys.modules


def test_places_are_rows_as_tfds_numbers_them(tfds_dir):
    found, seen = met(talk(tfds_dir))
    rows = enumerate(by_tfds(tfds_dir, "train"))
    assert found == [(f"tiny_talk/1.0.0 row {n}", text) for n, text in rows if text]
    assert seen["empty"] == 1 and not seen["skipped"]


def test_pieces_of_any_size_are_the_same_rows(tfds_dir, monkeypatch):
    whole, _ = met(talk(tfds_dir))
    assert len(talk(tfds_dir).pieces("train")) == 3  # a shard each
    monkeypatch.setattr(documents, "PIECE_BYTES", 150)
    assert len(talk(tfds_dir).pieces("train")) > 9
    assert met(talk(tfds_dir))[0] == whole


def test_another_process_reads_a_piece_by_the_spec_alone(tfds_dir):
    source = talk(tfds_dir)
    told = {"spec": source.spec("train"), "piece": source.pieces("train")[1].to_json()}
    code = """if True:
        import json, sys
        from fm_jax.corpora import sources
        from fm_jax.corpora.documents import Piece, Reading
        told = json.load(sys.stdin)
        reading = Reading(on_bad_text="error", max_document_bytes=1000)
        read = sources.open_reader(told["spec"])
        found = list(read(Piece.from_json(told["piece"]), reading))
        loaded = [name for name in ("tensorflow", "jax") if name in sys.modules]
        print(json.dumps([found, loaded]))
    """
    ran = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        check=True,
    )
    found, loaded = json.loads(ran.stdout)
    piece = source.pieces("train")[1]
    rows = list(enumerate(by_tfds(tfds_dir, "train")))[piece.start : piece.stop]
    assert found == [[n, text] for n, text in rows if text]
    assert loaded == []


def test_one_split_is_shared_out_by_a_hash_of_the_text(tfds_dir):
    source = talk(tfds_dir, eval_split="train")
    assert not source.is_held_out_apart
    assert (source.share("train"), source.share("eval")) == ((0.3, 1.0), (0.0, 0.3))
    whole = [text for text in by_tfds(tfds_dir, "train") if text]
    held = [text for text in whole if fraction(text_hash(text)) < 0.3]
    assert 0 < len(held) < len(whole)
    assert read(source, "eval") == held
    assert read(source) == [text for text in whole if text not in held]


def test_a_slice_is_a_split(tfds_dir):
    source = talk(tfds_dir, split="train[:9]", eval_split="train[9:]")
    rows = by_tfds(tfds_dir, "train")
    assert read(source) == [text for text in rows[:9] if text]
    assert read(source, "eval") == [text for text in rows[9:] if text]
    found, _ = met(talk(tfds_dir, split="train[9:]"))
    assert found[0][0] == "tiny_talk/1.0.0 row 0"
    both = talk(tfds_dir, split="validation+train[:4]")
    rows = by_tfds(tfds_dir, "validation") + rows[:4]
    assert read(both) == [text for text in rows if text]


def test_a_feature_in_a_feature_is_named_by_a_path(tfds_dir):
    found = read(talk(tfds_dir, text_field="said/by"))
    assert {*found} == {f"me {n}" for n in range(NUM_TRAIN)}


def test_bad_text_follows_the_policy(tfds_dir):
    odd = talk(tfds_dir, split="odd")
    rows = by_rows(odd)
    assert {*read(odd, on_bad_text="skip")} == {"c"}
    assert {*read(odd, on_bad_text="replace")} == {"a\ufffd", "b\ufffd", "c"}
    _, seen = met(odd, on_bad_text="skip")
    assert seen["skipped"] == {"NUL bytes": 1, "bad UTF-8": 1}
    row = rows.index("a\ufffd")
    where = f"tiny_talk/1.0.0 row {row}"
    assert seen["examples"]["bad UTF-8"] == [where]
    assert refusal(read, talk(tfds_dir, split=f"odd[{row}:]")) == (
        "text must be UTF-8; got tiny_talk/1.0.0 row 0 (a bad byte at offset 1). Mend "
        "it, or set --config.data.on_bad_text=skip or =replace."
    )


def by_rows(source):
    return [text for _, text in met(source, on_bad_text="replace")[0]]


# What it is known by.


def test_identity_is_version_split_field_and_content(tfds_dir, copied):
    identity = talk(tfds_dir).identity("eval")
    assert identity["tfds"] == "tiny_talk/1.0.0"
    assert identity["split"] == "validation"
    name = "tiny_talk-validation.array_record-0000{}-of-00003"
    assert [file[0] for file in identity["files"]] == [name.format(n) for n in range(3)]
    assert sum(file[2] for file in identity["files"]) == NUM_HELD_OUT
    assert talk(copied).identity("eval") == identity
    assert talk(tfds_dir, split="odd").identity("eval") == identity
    seen = [
        identity,
        talk(tfds_dir).identity("train"),
        talk(tfds_dir, eval_split="validation[:5]").identity("eval"),
        talk(tfds_dir, text_field="said/by").identity("eval"),
    ]
    assert len({json.dumps(i) for i in seen}) == len(seen)


def test_a_dataset_prepared_again_from_other_text_is_another(copied):
    before = talk(copied).identity("eval")
    path = shard(copied, "validation")
    raw = [example(b"new text", field="text")] * before["files"][1][2]
    write_records(path, raw)
    after = talk(copied).identity("eval")
    assert after != before
    assert [file[:3] for file in after["files"]] == [f[:3] for f in before["files"]]


def shard(folder, split):
    """Return the second shard of a split."""
    name = f"tiny_talk-{split}.array_record-00001-of-00003"
    return folder / "tiny_talk" / "1.0.0" / name


def example(*values, field="text"):
    """Return a row as TFDS keeps it."""
    from tensorflow_datasets.proto import tf_example_pb2

    row = tf_example_pb2.Example()
    row.features.feature[field].bytes_list.value.extend(values)
    return row.SerializeToString()


# What is lost, and refused.


def test_rows_without_text_or_sense_are_met_by_the_policy(copied):
    count = talk(copied).identity("train")["files"][1][2]
    rows = [
        example(b"x", field="other"),
        example(b"x", b"y"),
        b"\xff\xff",
        example(b"z"),
    ]
    write_records(
        shard(copied, "train"), [*rows, *[example(b"")] * (count - len(rows))]
    )
    found, seen = met(talk(copied), on_bad_text="skip")
    first = talk(copied).pieces("train")[1].start
    assert (f"tiny_talk/1.0.0 row {first + 3}", "z") in found
    assert seen["skipped"] == {"missing text": 2, "cut short": 1}
    assert seen["examples"] == {
        "missing text": [f"tiny_talk/1.0.0 row {first + n}" for n in (0, 1)],
        "cut short": [f"tiny_talk/1.0.0 row {first + 2}"],
    }


def test_a_shard_that_is_cut_short_loses_its_rows(copied):
    whole, _ = met(talk(copied))
    path = shard(copied, "train")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    lost = talk(copied).pieces("train")[1]
    found, seen = met(talk(copied), on_bad_text="skip")
    kept = [row for row in whole if not in_piece(row[0], lost)]
    assert found == kept
    assert seen["skipped"] == {"cut short": lost.stop - lost.start}
    text = refusal(read, talk(copied))
    assert text.startswith(
        f"data file must be whole; got tiny_talk/1.0.0 row {lost.start} ({path}: "
    )


def in_piece(place, piece):
    return piece.start <= int(place.rpartition(" ")[2]) < piece.stop


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tiny_tlak", "Dataset tiny_tlak not found."),
        ("tiny talk", "Parsing builder name string tiny talk failed."),
        ("tiny_talk:9.9.9", "Dataset tiny_talk not found."),
        ("tiny_talk/large", "Dataset tiny_talk not found."),
    ],
)
def test_an_unknown_dataset_is_refused(name, reason, tfds_dir):
    source = talk(tfds_dir, name=name)
    text = refusal(source.identity, "train")
    assert text.startswith(f"data.name must be a TFDS dataset; got {name!r} ({reason}")
    assert text.endswith("). See tensorflow.org/datasets.")
    assert "\n" not in text


def test_an_unknown_split_is_refused_nearest_first(tfds_dir):
    assert refusal(talk(tfds_dir, split="trian").pieces, "train") == (
        "data.split must be one of the known names; got 'trian'. Did you mean 'train'? "
        "Known: train, odd, validation"
    )
    assert refusal(talk(tfds_dir, eval_split="test").pieces, "eval") == (
        "data.eval_split must be one of the known names; got 'test'. "
        "Known: odd, train, validation"
    )


def test_a_slice_that_is_none_is_refused(tfds_dir):
    text = refusal(talk(tfds_dir, split="train[:200%]").pieces, "train")
    assert text.startswith(
        "data.split must be a split of TFDS, or a slice as train[:5%]; got "
        "'train[:200%]' (Error parsing split 'train[:200%]'."
    )
    assert "\n" not in text


def test_a_slice_without_rows_has_no_pieces(tfds_dir):
    assert talk(tfds_dir, split="train[5:5]").pieces("train") == []


def test_a_dataset_that_is_not_prepared_is_refused(tmp_path):
    text = refusal(talk(tmp_path, name="lm1b").pieces, "train")
    assert text.startswith(
        "TFDS dataset must be prepared as ArrayRecord; got 'lm1b' split 'train' ("
    )
    assert "\n" not in text


def test_a_dataset_in_another_format_is_refused(copied):
    info = copied / "tiny_talk" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    text = refusal(talk(copied).pieces, "train")
    assert text.startswith(
        "TFDS dataset must be prepared as ArrayRecord; got 'tiny_talk' split "
        "'train' (Random access data source for file format FileFormat.TFRECORD is "
        "not supported."
    )
    assert text.endswith(
        "). Run tfds.builder('tiny_talk', file_format='array_record')"
        ".download_and_prepare() first."
    )
    assert "\n" not in text


def test_a_dataset_in_parquet_is_refused(tmp_path):
    prepare(tmp_path, file_format="parquet")
    assert refusal(talk(tmp_path).pieces, "train") == (
        "TFDS dataset must be prepared as ArrayRecord; got 'tiny_talk' split 'train' "
        "(it is parquet). Run tfds.builder('tiny_talk', file_format='array_record')"
        ".download_and_prepare() first."
    )


def test_a_field_that_is_missing_is_refused_nearest_first(tfds_dir):
    assert refusal(talk(tfds_dir, text_field="txt").pieces, "eval") == (
        "data.text_field must be one of the known names; got 'txt'. "
        "Did you mean 'text'? Known: text, label, said, words"
    )
    assert refusal(talk(tfds_dir, text_field="text/by").pieces, "eval").startswith(
        "data.text_field must be one of the known names; got 'text/by'."
    )


@pytest.mark.parametrize(
    ("field", "held"),
    [("label", "int64"), ("words", "several"), ("said", "features: by")],
)
def test_a_field_that_is_not_text_is_refused(field, held, tfds_dir):
    assert refusal(talk(tfds_dir, text_field=field).pieces, "eval") == (
        f"data.text_field must name text; got {field!r} of 'tiny_talk', which holds "
        f"{held}."
    )


def test_the_section_of_a_config_makes_it(tfds_dir, tmp_path):
    made = sources.make(
        source="tfds",
        paths=(),
        eval_paths=(),
        eval_fraction=0.3,
        name="tiny_talk",
        tfds_dir=tfds_dir,
        split="train",
        eval_split="validation",
        text_field="text",
        synthetic={},
        cache=tmp_path,
    )
    assert made == talk(tfds_dir, cache=tmp_path)
    assert read(made) == read(talk(tfds_dir))
