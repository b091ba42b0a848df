"""Tests of several features of a TFDS dataset: text, labels by name, sequences."""

import json
import sys

import numpy as np
import pytest

from fm_jax.corpora import tfds
from tests.corpora.made import met, read, refusal, write_records

NAMES = ["bad", "good"]
CHAT = [[("user", "hé"), ("assistant", "b")], [], [("user", "x")]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a data_dir with `tiny_rows` of three rows, prepared by TFDS."""
    import tensorflow_datasets

    features = tensorflow_datasets.features
    folder = tmp_path_factory.mktemp("tfds")

    class TinyRows(
        tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True
    ):
        """Rows of many kinds of features."""

        __module__ = "__main__"
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            text = features.Text()
            fields = {
                "text": text,
                "label": features.ClassLabel(names=NAMES),
                "grade": features.ClassLabel(num_classes=3),
                "score": np.float32,
                "words": features.Sequence(text),
                "scores": features.Sequence(np.int64),
                "messages": features.Sequence({"role": text, "content": text}),
                "said": {"by": text, "how": features.ClassLabel(names=NAMES)},
            }
            return tensorflow_datasets.core.DatasetInfo(
                builder=self, features=features.FeaturesDict(fields)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, chat in enumerate(CHAT):
                yield (
                    number,
                    {
                        "text": f"t{number}é",
                        "label": number - 1,
                        "grade": number,
                        "score": number / 2,
                        "words": ["w"] * number,
                        "scores": [5] * number,
                        "messages": [{"role": r, "content": c} for r, c in chat],
                        "said": {"by": "me", "how": 1},
                    },
                )

    builder = TinyRows(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return folder


def rows_of(folder, *names, **fields):
    return tfds.make(
        **{
            "name": "tiny_rows",
            "data_dir": str(folder),
            "split": "train",
            "eval_split": "train",
            "eval_fraction": 1e-9,
            "text_field": names,
            "cache": None,
        }
        | fields
    )


def found(folder, *names):
    """Return the rows in the order in which they were made."""
    rows = [json.loads(text) for text in read(rows_of(folder, "text", *names))]
    return sorted(rows, key=lambda row: row["text"])


def test_features_are_plain_values_without_tensorflow(folder):
    assert found(folder, "grade", "score", "words", "scores") == [
        {"text": "t0é", "grade": 0, "score": 0.0, "words": [], "scores": []},
        {"text": "t1é", "grade": 1, "score": 0.5, "words": ["w"], "scores": [5]},
        {
            "text": "t2é",
            "grade": 2,
            "score": 1.0,
            "words": ["w"] * 2,
            "scores": [5] * 2,
        },
    ]
    assert "tensorflow" not in sys.modules


def test_a_label_is_its_name_and_none_where_it_stands_for_nothing(folder):
    rows = found(folder, "label", "said/how", "said")
    assert [row.get("label") for row in rows] == [None, "bad", "good"]
    assert {row["said/how"] for row in rows} == {"good"}
    assert rows[0]["said"] == {"by": "me", "how": "good"}


def test_a_sequence_of_features_is_a_list_of_them(folder):
    assert [row["messages"] for row in found(folder, "messages")] == [
        [{"role": role, "content": content} for role, content in chat] for chat in CHAT
    ]


def test_features_that_are_not_there_are_left_out_and_all_of_them_refused(folder):
    assert found(folder, "none", "said/none")[0] == {"text": "t0é"}
    assert refusal(read, rows_of(folder, "prompt", "said/none")) == (
        "data.fields must name fields of the data; got prompt, said/none, none of "
        "which is in tiny_rows: grade, label, messages, said, score, scores, text, "
        "words. Say where each stands: "
        '--config.data.fields=\'(("name", "its field"), ...)\'.'
    )


def test_identity_tells_the_names_of_labels_for_they_are_in_no_data_file(folder):
    one, two = (rows_of(folder, *n).identity("train") for n in (("text",), ("label",)))
    assert one["labels"] == {"label": NAMES, "said/how": NAMES}
    assert (one["text_field"], two["text_field"]) == (["text"], ["label"])
    assert json.loads(json.dumps(one)) == one
    single = rows_of(folder, text_field="text").identity("train")
    assert {*single} == {"tfds", "split", "files", "text_field"}


def test_a_record_that_is_no_row_is_lost_alone(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "copied")
    (path,) = (tmp_path / "copied").rglob("*.array_record*")
    write_records(path, [b"\xff no example", b"", b"\xff"])
    texts, seen = met(rows_of(tmp_path / "copied", "text", "label"), on_bad_text="skip")
    assert texts == []
    assert seen["skipped"] == {"cut short": 2, "missing text": 1}
