"""Text datasets of TensorFlow Datasets, read from ArrayRecord without TensorFlow."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fm_jax.corpora import records, rows, streams
from fm_jax.corpora.documents import Reader
from fm_jax.errors import UserError, reason, unknown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds:
    """A text dataset of TensorFlow Datasets, prepared by it.

    `text_field` of a feature in a feature is `outer/inner`.
    """

    name: str
    data_dir: str
    text_field: str

    @property
    def shown(self) -> str:
        """The name with its version."""
        return self._builder.info.full_name

    @functools.cached_property
    def _builder(self):
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
        import tensorflow_datasets as tfds

        feature = info.features
        for name in self.text_field.split("/"):
            if not isinstance(feature, tfds.features.FeaturesDict):
                feature = {}
            if name not in feature:
                raise unknown("data.text_field", self.text_field, info.features)
            feature = feature[name]
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
    text_field: str,
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
        from tensorflow_datasets.proto import tf_example_pb2

        parse = tf_example_pb2.Example.FromString
        with records.local(raw, path) as here, records.open_records(here) as file:
            for first in range(start, stop, together):
                last = min(stop, first + together)
                for record in records.values(file, first, last):
                    if isinstance(record, streams.Damaged):
                        yield record
                        continue
                    try:
                        features = parse(record).features.feature
                    except message.DecodeError as error:
                        yield streams.Damaged(str(error))
                        continue
                    found = (
                        features[field].bytes_list.value if field in features else ()
                    )
                    yield found[0] if len(found) == 1 else None

    return rows.reader(spec["parts"], values)
