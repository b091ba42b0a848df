"""Text datasets of TensorFlow Datasets, read from ArrayRecord without TensorFlow."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fm_jax.corpora import fields, records, rows, streams
from fm_jax.corpora.documents import Reader
from fm_jax.corpora.fields import TextField
from fm_jax.errors import UserError, reason, unknown

# A namespace before the name; after it stand versions alone, as c4/en:3.0.1.
ELSEWHERE = re.compile(r"[^/:]*:(?!\d|\*|experimental_latest)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds:
    """A text dataset of TensorFlow Datasets, prepared by it.

    `text_field` of a feature in a feature is `outer/inner`.
    """

    name: str
    data_dir: str
    text_field: TextField

    @property
    def shown(self) -> str:
        """The name with its version."""
        return self._builder.info.full_name

    @functools.cached_property
    def _builder(self):
        if ELSEWHERE.match(self.name):
            raise UserError(
                "data.name must be a dataset that TFDS has, or one in data.tfds_dir; "
                f"got {self.name!r}, whose code it would fetch and run. Prepare it "
                "where that does no harm, and name its folder."
            )
        import tensorflow_datasets as tfds

        try:
            return tfds.builder(self.name, data_dir=self.data_dir or None)
        except (
            tfds.core.DatasetNotFoundError,
            FileNotFoundError,
            ValueError,  # a name that does not parse, or an unknown config
            AssertionError,  # an unknown version
        ) as error:
            raise UserError(
                f"data.name must be a TFDS dataset; got {self.name!r} "
                f"({reason(error)}). See tensorflow.org/datasets."
            ) from error

    def parts(self, asked: str, key: str) -> list[rows.Part]:
        """Return where a split's rows stand.

        Raises UserError where there is no such split, it is not prepared as
        ArrayRecord, or it has no such field or none that is text.
        """
        info = self._builder.info
        found = self._instructions(asked, key) if info.splits else []
        try:
            # It makes ArrayRecord the format of `info` where that is one of several.
            if found or not info.splits:
                self._builder.as_data_source(split=asked)
            if info.file_format.value != "array_record":
                raise ValueError(f"it is {info.file_format.value}")
        except Exception as error:
            raise UserError(
                f"TFDS dataset must be prepared as ArrayRecord; got {self.name!r} "
                f"split {asked!r} ({reason(error)}). Run "
                f"tfds.builder({self.name!r}, file_format='array_record')"
                ".download_and_prepare() first."
            ) from error
        self._check_field(info)
        # Of all splits: a slice has no bytes of its own.
        num_bytes = sum(part.num_bytes for part in info.splits.values())
        each = num_bytes / max(1, info.splits.total_num_examples)
        return [
            rows.Part(f"{file.filename}", file.skip, file.take, int(file.take * each))
            for file in self._instructions(asked, key)  # of that format
        ]

    def told(self) -> dict:
        """Return the dataset's features, and the names of their labels by paths."""
        features = self._builder.info.features
        told = {"features": features.to_json(), "labels": _labels(features)}
        return json.loads(json.dumps(told, sort_keys=True))  # else in any order

    def _instructions(self, asked: str, key: str) -> list:
        """Return the files of a split, and which of their rows."""
        known = self._builder.info.splits
        try:
            return known[asked].file_instructions
        except Exception as error:
            if asked.isidentifier():
                raise unknown(key, asked, known) from error
            raise UserError(
                f"{key} must be a split of TFDS, or a slice as train[:5%]; got "
                f"{asked!r} ({reason(error)})."
            ) from error

    def _check_field(self, info) -> None:
        if not fields.is_one(self.text_field):
            there = [n for n in self.text_field if _feature(info.features, n)]
            fields.refuse_unknown(
                self.text_field, there or sorted(info.features), self.name
            )
            return
        feature = _feature(info.features, self.text_field)
        if feature is None:
            raise unknown("data.text_field", self.text_field, info.features)
        told = feature.get_tensor_info()
        if isinstance(told, dict):
            held = f"features: {', '.join(told)}"
        elif told.shape:
            held = "several"
        else:
            held = np.dtype(told.np_dtype).name
        if held != "object":
            raise UserError(
                f"data.text_field must name text; got {self.text_field!r} of "
                f"{self.name!r}, which holds {held}."
            )


def make(
    *,
    name: str,
    data_dir: str,
    split: str,
    eval_split: str,
    eval_fraction: float,
    text_field: TextField,
    cache: Path | None,
) -> rows.RowSource:
    """Return the source; nothing is opened before it is asked for."""
    return rows.RowSource(
        kind="tfds",
        dataset=Tfds(name=name, data_dir=data_dir, text_field=text_field),
        splits={"train": split, "eval": eval_split},
        eval_fraction=eval_fraction,
        text_field=text_field,
        cache=cache,
    )


def reader(spec: dict) -> Reader:
    """Return the reader of pieces, by a source's `spec`; without its builder."""
    field = spec["text_field"]

    def values(raw, path, start, stop, together) -> Iterator[object]:
        from google.protobuf import message

        parse = _one(field) if fields.is_one(field) else _several(spec)
        with records.local(raw, path) as here, records.open_records(here) as file:
            for first in range(start, stop, together):
                last = min(stop, first + together)
                for record in records.values(file, first, last):
                    if isinstance(record, streams.Damaged):
                        yield record
                        continue
                    try:
                        yield parse(record)
                    except (message.DecodeError, KeyError, ValueError) as error:
                        yield streams.Damaged(str(error))

    return rows.reader(spec["parts"], values)


def _one(field: str) -> Callable[[bytes], bytes | None]:
    """Return the function that gives a record's text."""
    from tensorflow_datasets.proto import tf_example_pb2

    def parse(record: bytes) -> bytes | None:
        features = tf_example_pb2.Example.FromString(record).features.feature
        found = features[field].bytes_list.value if field in features else ()
        return found[0] if len(found) == 1 else None

    return parse


def _several(spec: dict) -> Callable[[bytes], dict]:
    """Return the function that gives a record's fields as TFDS's features have them."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeatureConnector.from_json(spec["features"])
    asked = {name: _feature(features, name) for name in spec["text_field"]}
    # The others are not decoded: they may be images.
    tops = {name.partition("/")[0] for name, found in asked.items() if found}
    features = tfds.features.FeaturesDict({top: features[top] for top in tops})

    def parse(record: bytes) -> dict:
        row = features.deserialize_example_np(record)
        found = {}
        for name, feature in asked.items():
            value = None
            if feature is not None:
                value = row
                for part in name.split("/"):
                    value = value[part]
                value = _plain(feature, value, name, spec["labels"])
            found[name] = value
        return found

    return parse


def _plain(feature, value, path: str, labels: dict[str, list[str]]) -> object:
    """Return a feature's value as Python has it, labels by their names.

    TFDS has a sequence of features as features of sequences; here it is a list of them.
    A label that stands for none is None.
    """
    import tensorflow_datasets as tfds

    if value is None:
        return None
    if isinstance(feature, tfds.features.FeaturesDict):
        return {
            k: _plain(f, value[k], f"{path}/{k}", labels) for k, f in feature.items()
        }
    inner = getattr(feature, "feature", None)
    if isinstance(inner, tfds.features.FeaturesDict):  # of a sequence
        columns = {
            key: [_plain(held, v, f"{path}/{key}", labels) for v in value[key]]
            for key, held in inner.items()
        }
        rows_of = zip(*columns.values(), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows_of]
    if inner is not None:
        return [_plain(inner, v, path, labels) for v in value]
    if path in labels:
        names = labels[path]
        return names[value] if 0 <= value < len(names) else None
    return fields.plain(value) if isinstance(value, np.ndarray | np.generic) else value


def _feature(features, name: str):
    """Return the feature that `outer/inner` names, or None."""
    import tensorflow_datasets as tfds

    for part in name.split("/"):
        if not isinstance(features, tfds.features.FeaturesDict) or part not in features:
            return None
        features = features[part]
    return features


def _labels(feature, path: str = "") -> dict[str, list[str]]:
    """Return the names of labels by the paths of their features; of some, none."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        found = {}
        for key, held in feature.items():
            found |= _labels(held, f"{path}/{key}" if path else key)
        return found
    if (inner := getattr(feature, "feature", None)) is not None:
        return _labels(inner, path)
    is_label = isinstance(feature, tfds.features.ClassLabel)
    return {path: feature.names} if is_label and _is_named(feature) else {}


def _is_named(label) -> bool:
    """Return whether labels have names; without them TFDS counts: "0", "1", ..."""
    return label.names != [f"{n}" for n in range(label.num_classes or 0)]
