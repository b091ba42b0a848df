"""Columns of Arrow as plain values: text as bytes, labels by their names."""

import contextlib
import json


def names_of(schema) -> dict[str, list[str]]:
    """Return the names of the labels of columns that the library `datasets` wrote.

    It tells of them in the schema's metadata, in files of Arrow and of Parquet.
    """
    told = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(told or b"{}").get("info", {}).get("features", {})
    except (ValueError, AttributeError):  # of another who writes under that key
        return {}
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and isinstance(feature.get("names"), list)
    }


def rows(batch, names: tuple[str, ...], labels: dict[str, list[str]]) -> list[dict]:
    """Return the rows of a batch as dicts of those columns, None where there is none.

    labels: the names of the labels of columns; a label without one is None.
    """
    columns = {}
    for name in names:
        index = batch.schema.get_field_index(name)
        held = [None] * batch.num_rows if index < 0 else values(batch.column(index))
        columns[name] = [named(value, labels.get(name)) for value in held]
    return [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]


def named(value: object, names: list[str] | None) -> object:
    """Return the name of a label; of what is no label, or has no names, itself."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def values(column) -> list:
    """Return the values of a column; its text is bytes, wherever it stands in them.

    What is not UTF-8 is then met as in other files.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    with contextlib.suppress(pa.ArrowNotImplementedError):
        column = column.cast(_as_bytes(column.type))
    return column.to_pylist()


def is_text(held) -> bool:
    """Return whether a type is text, or bytes that may be."""
    import pyarrow as pa

    checks = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
    )
    return any(check(held) for check in checks)


def _as_bytes(held):
    """Return a type with bytes in place of text, and values in place of their codes."""
    import pyarrow as pa

    if is_text(held):
        return pa.large_binary()
    if pa.types.is_dictionary(held):
        return _as_bytes(held.value_type)
    if pa.types.is_struct(held):
        inner = [held.field(n) for n in range(held.num_fields)]
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in inner])
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(check(held) for check in lists):
        return pa.large_list(_as_bytes(held.value_type))
    return held
