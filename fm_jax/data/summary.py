"""What a token store holds, in a few lines: from its header alone."""

import numpy as np

from fm_jax.data.visible import visible


def numbers(header: dict) -> dict:
    """Return what `lines` says as numbers, for JSON; lengths are in tokens.

    `bytes_per_token` counts no end ids; `gzip_bits_per_byte` is None of text that gzip
    was not tried on.
    """
    documents, tokens = header["num_documents"], header["num_tokens"]
    in_documents = tokens - documents - 1  # the rest are end ids
    of = header["gzip_of"]
    return {
        "name": header["name"],
        "split": header["split"],
        "tokenizer": header["tokenizer"],
        "documents": documents,
        "bytes": header["num_bytes"],
        "gzip_bits_per_byte": 8 * header["gzip_bytes"] / of if of else None,
        "tokens": tokens,
        "bytes_per_token": header["num_bytes"] / in_documents if in_documents else 0.0,
        "dtype": np.dtype(header["dtype"]).name,
        "shards": len(header["shards"]),
        "mean_length": in_documents / documents,
        "lengths": header["quantiles"],
        "vocab_size": header["vocab_size"],
        "vocabulary_used": header["vocabulary_used"],
        "unknown_ids": header["unknown_ids"],
        "duplicates": header["duplicates"],
        "held_out_elsewhere": header["held_out_elsewhere"],
        **header["met"],
    }


def lines(header: dict) -> list[str]:
    """Return what a store holds, what was left out of it and what was met, aligned."""
    f = numbers(header)
    lengths = f["lengths"]
    inner = [f"{q}% up to {lengths[q]:,}" for q in lengths if q not in ("0", "100")]
    size = f["tokens"] * np.dtype(f["dtype"]).itemsize
    rows = [
        ("store", f"{f['name']}, {f['split']}, tokenizer {f['tokenizer']}"),
        ("documents", f"{f['documents']:,}"),
        ("text", f"{_bytes(f['bytes'])}{_gzip(f)}"),
        (
            "tokens",
            f"{f['tokens']:,}, end ids among them: {_bytes(size)} of {f['dtype']} in "
            f"{_count(f['shards'], 'shard')}",
        ),
        ("tokens", f"{f['bytes_per_token']:.2f} bytes of text each, end ids apart"),
        (
            "length",
            f"{lengths['0']:,} to {lengths['100']:,} tokens a document, mean "
            f"{f['mean_length']:,.1f}",
        ),
        ("length", ", ".join(inner)),
        (
            "vocabulary",
            f"{f['vocabulary_used']:,} of {f['vocab_size']:,} ids used "
            f"({f['vocabulary_used'] / f['vocab_size']:.1%})"
            + (f"; {f['unknown_ids']:,} tokens unknown" if f["unknown_ids"] else ""),
        ),
    ]
    left_out = [
        (f["duplicates"], "repeated (they stand earlier)"),
        (f["held_out_elsewhere"], "held out"),
        (f["empty"], "without text"),
    ]
    rows += [("left out", f"{count:,} {why}") for count, why in left_out if count]
    for word in ("skipped", "replaced"):
        for kind, count in f[word].items():
            places = [visible(place) for place in f["examples"].get(kind, ())]
            more = ", ..." if count > len(places) else ""
            rows.append((word, f"{count:,} {kind}: {', '.join(places)}{more}"))
    return _aligned(rows)


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    """Return rows as lines; a word that the row before had is not said again."""
    width = 2 + max(len(word) for word, _ in rows)
    before = [("", ""), *rows[:-1]]
    return [
        ("" if word == last else word).ljust(width) + text
        for (word, text), (last, _) in zip(rows, before, strict=True)
    ]


def _gzip(f: dict) -> str:
    bits = f["gzip_bits_per_byte"]
    return "" if bits is None else f"; gzip -9 takes {bits:.3f} bits per byte"


def _bytes(size: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return _count(size, "byte")


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
