"""Token stores written by hand, from the format's words alone: right, or wrong."""

import hashlib
import json

import numpy as np

from fm_jax.tokenizers.plain import ByteTokenizer

BYTES = ByteTokenizer()


def digest(raw):
    """Return the digest of a file's bytes."""
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def write(folder, texts, tokenizer=BYTES, *, cuts=(), pieces=(["a.txt", ""],), **told):
    """Write a store of texts, a shard up to each document of `cuts`; return folder.

    told: fields of the header, or bytes of files, that are to be something else; the
    files' digests and the header's seal are right all the same.
    """
    folder.mkdir(parents=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    end = np.array([tokenizer.end_id])
    documents = [np.append(end, ids) for ids in tokenizer.encode_batch(texts)]
    offsets = np.cumsum([0, *map(len, documents)])[:-1]
    shards = [documents[a:b] for a, b in zip((0, *cuts), (*cuts, None), strict=True)]
    shards[-1] = [*shards[-1], end]
    files = {
        f"tokens-{i:05d}.bin": np.concatenate(shard).astype(dtype).tobytes()
        for i, shard in enumerate(shards)
    }
    raw = [text.encode() for text in texts]
    sizes = [tokenizer.byte_lengths[ids].sum() for ids in documents]
    leftover = [len(r) - size for r, size in zip(raw, sizes, strict=True)]
    every = np.concatenate([*documents, end])
    arrays = {
        "offsets.npy": np.array(offsets, "<i8"),
        "leftover.npy": np.array(leftover, "<i4"),
        "hashes.npy": np.stack(
            [
                np.frombuffer(hashlib.blake2b(r, digest_size=16).digest(), "<u8")
                for r in raw
            ]
        ),
        "origins.npy": np.array(
            [(i % len(pieces), i // len(pieces)) for i in range(len(texts))], "<i8"
        ),
        "counts.npy": np.bincount(every, minlength=tokenizer.vocab_size).astype("<i8"),
    }
    for name, array in arrays.items():
        np.save(folder / name, array)
        files[name] = (folder / name).read_bytes()
    files["pieces.json"] = json.dumps(list(pieces)).encode()
    files["tokenizer.json"] = tokenizer.to_json().encode()
    files |= {name: told.pop(name) for name in list(told) if name in files}
    lengths = [len(ids) - 1 for ids in documents]
    header = {
        "format": 2,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "end_id": tokenizer.end_id,
        "num_documents": len(texts),
        "num_tokens": len(every),
        "num_bytes": sum(map(len, raw)),
        "gzip_bytes": 0,
        "gzip_of": 0,
        "has_leftover": any(leftover),
        "shards": [
            {
                "file": f"tokens-{i:05d}.bin",
                "tokens": len(np.concatenate(shard)),
                "documents": len(shard) - (i == len(shards) - 1),
                "blake2b": digest(files[f"tokens-{i:05d}.bin"]),
            }
            for i, shard in enumerate(shards)
        ],
        "arrays": {
            name: digest(held) for name, held in files.items() if name[-4:] != ".bin"
        },
        "name": folder.name,
        "split": "train",
        "source": {},
        "options": {
            "on_bad_text": "error",
            "max_document_bytes": 1 << 26,
            "deduplicate": False,
        },
        "met": {"skipped": {}, "replaced": {}, "empty": 0, "examples": {}},
        "duplicates": 0,
        "held_out_elsewhere": 0,
        "quantiles": {
            q: int(np.quantile(lengths, int(q) / 100, method="inverted_cdf"))
            for q in ("0", "5", "25", "50", "75", "95", "100")
        },
        "unknown_ids": 0,
        "vocabulary_used": int((np.bincount(every) > 0).sum()),
        **told,
    }
    for name, held in files.items():
        (folder / name).write_bytes(held)
    write_header(folder, header)
    return folder


def write_header(folder, header):
    """Write a header with a right seal."""
    text = json.dumps({**header, "digest": ""}, indent=1)
    sealed = text.replace('"digest": ""', f'"digest": "{digest(text.encode())}"')
    (folder / "header.json").write_text(sealed)


def reseal(folder, **told):
    """Change fields of a header and seal it again: told by one who means harm."""
    header = json.loads((folder / "header.json").read_text())
    del header["digest"]
    write_header(folder, header | told)
