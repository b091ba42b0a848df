"""Tests of the token store: its layout, its name, and what trouble leaves behind."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library
from tokenizers import models, normalizers, pre_tokenizers

from fm_jax.corpora import sources
from fm_jax.data import store
from fm_jax.errors import UserError
from fm_jax.tokenizers import all as tokenizers

BYTES = tokenizers.ByteTokenizer()
TEXTS = ["abc", "d", "", "é\U0001f642", "fg\x00h"]
END = 256


class CodePoints(tokenizers.Tokenizer):
    """Ids are code points, and the last id is the end: as wide as one asks for."""

    def __init__(self, vocab_size):
        self.vocab_size, self.end_id = vocab_size, vocab_size - 1
        widths = np.searchsorted([0x80, 0x800, 0x10000], np.arange(vocab_size), "right")
        self.byte_lengths = np.where(
            np.arange(vocab_size) == self.end_id, 0, widths + 1
        )

    def encode_batch(self, texts):
        return [np.array([ord(c) for c in t], np.uint32) for t in texts]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i != self.end_id)

    def to_json(self):
        return json.dumps({"code_points": self.vocab_size})


def say_nothing(line):
    """Take a line and keep quiet."""


def build(cache, texts, tokenizer=BYTES, say=say_nothing, name="a"):
    identity = {"split": "train", "name": name}
    documents = texts if callable(texts) else lambda: iter(texts)
    return store.find_or_build(cache, documents, tokenizer, identity=identity, say=say)


def refusal(function, *args, **kwargs):
    """Return the text of the UserError that a call ends in."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    return str(error.value)


def stream_of(texts):
    """Return the ids of a store of bytes by its definition."""
    return [i for text in texts for i in (END, *text.encode())] + [END]


def left_in(cache):
    names = (path.name for path in (cache / "stores").iterdir())
    return sorted(name for name in names if not name.endswith(".lock"))


# Layout.


def test_the_stream_is_an_end_before_each_document_and_after_the_last(tmp_path):
    built = build(tmp_path, TEXTS)
    expected = [END, 97, 98, 99, END, 100, END, END, 0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82]
    expected += [END, 102, 103, 0, 104, END]
    assert built.read(0, len(built)).tolist() == expected == stream_of(TEXTS)
    assert built.offsets.tolist() == [0, 4, 6, 7, 14]
    assert built.leftover.tolist() == [0] * 5
    assert built.offsets.dtype == np.int64


def test_the_header_counts_what_is_there(tmp_path):
    built = build(tmp_path, TEXTS)
    packed = len(gzip.compress("".join(TEXTS).encode(), 9))
    assert json.loads((built.path / "header.json").read_text()) == built.header
    assert built.header == {
        "format": 1,
        "dtype": "<u2",
        "tokenizer": BYTES.fingerprint,
        "vocab_size": 257,
        "end_id": 256,
        "num_documents": 5,
        "num_tokens": 20,
        "num_bytes": 14,
        "gzip_bytes": packed,
        "shard_tokens": 1 << 28,
        "shards": [20],
        "has_leftover": False,
    }
    assert (len(built), built.num_bytes) == (20, 14)


def test_the_three_lines_of_numpy_in_the_docstring_read_a_store(tmp_path, monkeypatch):
    built = build(tmp_path, TEXTS)
    lines = [line for line in store.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    found = {"json": json, "np": np}
    monkeypatch.chdir(built.path)
    exec(textwrap.dedent("\n".join(lines)), found)
    assert found["tokens"].tolist() == stream_of(TEXTS)
    assert found["offsets"].tolist() == [0, 4, 6, 7, 14]
    assert found["header"]["num_documents"] == 5


def test_shards_read_as_one_stream(tmp_path, monkeypatch):
    texts = ["abcdefghijklmnopqrstuvwxyz", *TEXTS, "z" * 6]
    stream = stream_of(texts)
    monkeypatch.setattr(store, "SHARD_TOKENS", 7)
    built = build(tmp_path, texts)
    assert len(stream) == 54
    assert built.header["shards"] == [7] * 7 + [5]
    sizes = [(built.path / f"tokens-{n:05d}.bin").stat().st_size for n in range(8)]
    assert sizes == [14] * 7 + [10]
    # What a store was written with is in its header, whatever the constant is now.
    monkeypatch.setattr(store, "SHARD_TOKENS", 11)
    again = store.open_store(built.path, BYTES)
    for start in range(len(stream)):
        for stop in range(start + 1, len(stream) + 1):
            assert again.read(start, stop).tolist() == stream[start:stop]


def test_a_stream_that_just_fills_its_shards_has_no_empty_one(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_TOKENS", 4)
    built = build(tmp_path, ["abc", "def"])
    assert built.header["shards"] == [4, 4, 1]
    built = build(tmp_path, ["abc", "de"], name="b")
    assert built.header["shards"] == [4, 4]
    assert built.read(0, 8).tolist() == stream_of(["abc", "de"])


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4"), (0x110001, "<u4")],
)
def test_ids_take_two_bytes_where_they_fit_and_four_where_not(
    vocab_size, dtype, tmp_path
):
    tokenizer = CodePoints(vocab_size)
    text = "aé\u20ac\ufffd" + ("\U0010ffff" if vocab_size > 1 << 20 else "")
    built = build(tmp_path, [text], tokenizer)
    assert built.header["dtype"] == dtype
    end = tokenizer.end_id
    assert built.read(0, len(built)).tolist() == [end, *map(ord, text), end]
    size = (built.path / "tokens-00000.bin").stat().st_size
    assert size == len(built) * int(dtype[-1])


def test_documents_beyond_one_batch_keep_their_order(tmp_path, monkeypatch):
    texts = [f"{n:03d}" * (n % 5) for n in range(200)]
    monkeypatch.setattr(store, "BATCH_BYTES", 50)
    built = build(tmp_path, texts)
    assert built.read(0, len(built)).tolist() == stream_of(texts)


def test_bytes_that_ids_do_not_stand_for_are_kept_by_document(tmp_path):
    pieces = ["[UNK]", "[SEP]", "ab", "c"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    inner = library.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.add_special_tokens(["[UNK]", "[SEP]"])
    tokenizer = tokenizers.JsonTokenizer(inner.to_str())
    built = build(tmp_path, ["ab c", "Ab  c", "\U0001f642 c", "ab"], tokenizer)
    assert built.read(0, len(built)).tolist() == [1, 2, 3, 1, 2, 3, 1, 0, 3, 1, 2, 1]
    assert built.leftover.tolist() == [1, 2, 5, 0]
    assert built.header["has_leftover"]


@pytest.mark.parametrize("batch_bytes", [1 << 22, 1000])
def test_gzip_bytes_are_those_of_the_corpus_in_one_gzip(
    batch_bytes, tmp_path, monkeypatch
):
    monkeypatch.setattr(store, "BATCH_BYTES", batch_bytes)
    texts = [path.read_text() for path in Path(store.__file__).parent.glob("*.py")]
    texts += [np.random.default_rng(0).bytes(40_000).hex()]
    built = build(tmp_path, texts)
    packed = len(gzip.compress("".join(texts).encode(), 9))
    assert abs(built.header["gzip_bytes"] - packed) <= 20


# What names a store.


def test_a_store_is_built_once_and_then_found(tmp_path):
    said = []
    first = build(tmp_path, ["abc", "de"], say=said.append)
    assert said == [
        f"Building a token store in {first.path}",
        "  2 documents, 5 bytes, 8 tokens",
    ]

    def never():
        raise AssertionError("built again")

    again = build(tmp_path, never, say=said.append)
    assert len(said) == 2
    assert again.path == first.path
    assert again.read(0, 8).tolist() == stream_of(["abc", "de"])


def test_changed_text_gives_another_store_and_leaves_the_first(tmp_path):
    corpus, held_out = tmp_path / "a.txt", tmp_path / "b.txt"
    held_out.write_text("held out")
    options = {
        "source": "text",
        "paths": (str(corpus),),
        "eval_paths": (str(held_out),),
        "eval_fraction": 0.0,
        "name": "",
        "tfds_dir": "",
        "split": "train",
        "eval_split": "validation",
        "text_field": "text",
        "on_bad_text": "error",
        "synthetic": {},
    }
    built = []
    for text in ["one", "two", "one"]:
        corpus.write_text(text)
        source = sources.make(**options)
        built.append(
            store.find_or_build(
                tmp_path,
                lambda source=source: source.documents("train"),
                BYTES,
                identity=source.identity("train"),
                say=say_nothing,
            )
        )
    one, two, again = built
    assert one.path == again.path != two.path
    assert again.read(1, 4).tobytes() == np.array([*b"one"], "<u2").tobytes()
    assert two.read(1, 4).tobytes() == np.array([*b"two"], "<u2").tobytes()


def test_another_tokenizer_end_or_format_gives_another_store(tmp_path, monkeypatch):
    vocab = {"[UNK]": 0, "</s>": 1, "[SEP]": 2, "abc": 3}
    inner = library.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.add_special_tokens(["[UNK]", "</s>", "[SEP]"])
    text = inner.to_str()
    found = [build(tmp_path, ["abc"])]
    for end_token in ["</s>", "[SEP]"]:
        tokenizer = tokenizers.JsonTokenizer(text, end_token=end_token)
        built = build(tmp_path, ["abc"], tokenizer)
        assert built.read(0, 3).tolist() == [vocab[end_token], 3, vocab[end_token]]
        found.append(built)
    monkeypatch.setattr(store, "FORMAT", 2)
    found.append(build(tmp_path, ["abc"]))
    assert len({built.path for built in found}) == 4


def test_opening_with_another_tokenizer_is_refused(tmp_path):
    built = build(tmp_path, TEXTS)
    other = CodePoints(300)
    assert refusal(store.open_store, built.path, other) == (
        f"token store must be made with the tokenizer in use; got {built.path} made "
        f"with {BYTES.fingerprint}, in use {other.fingerprint}."
    )


@pytest.mark.parametrize("damage", ["cut", "grown", "gone"])
def test_a_shard_of_the_wrong_size_is_refused(damage, tmp_path):
    built = build(tmp_path, TEXTS)
    file = built.path / "tokens-00000.bin"
    raw = file.read_bytes()
    if damage == "gone":
        file.unlink()
        size = 0
    else:
        file.write_bytes(raw[:-3] if damage == "cut" else raw + b"\0")
        size = file.stat().st_size
    assert refusal(build, tmp_path, TEXTS) == (
        f"token store must be whole; got {file} with {size} bytes. "
        f"Delete {built.path} and start again: it will be rebuilt."
    )
    shutil.rmtree(built.path)
    assert build(tmp_path, TEXTS).read(0, 20).tolist() == stream_of(TEXTS)


@pytest.mark.parametrize("name", ["offsets", "leftover"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_array_is_refused(damage, name, tmp_path):
    built = build(tmp_path, TEXTS)
    file = built.path / f"{name}.npy"
    raw = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(raw[:-1] if damage == "cut" else b"")
    text = refusal(build, tmp_path, TEXTS)
    assert text.startswith(f"token store must be whole; got {file} (")
    assert text.endswith(f"). Delete {built.path} and start again: it will be rebuilt.")
    assert "\n" not in text


# Trouble while building.


@pytest.mark.parametrize("texts", [[], [""]], ids=["none", "no_text"])
def test_an_empty_corpus_is_refused_and_leaves_nothing(texts, tmp_path):
    source = sources.Files(
        files={"train": {}}, eval_fraction=0.0, text_field="text", on_bad_text="error"
    )
    for text in texts:
        path = tmp_path / "a.txt"
        path.write_text(text)
        source.files["train"]["a.txt"] = path
    assert refusal(build, tmp_path, lambda: source.documents("train")) == (
        "the corpus must have text; got no document with any in it. Check data.paths "
        "and data.eval_fraction."
    )
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, UserError])
def test_a_build_that_is_interrupted_leaves_nothing(error, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BATCH_BYTES", 1)
    seen = []

    def documents():
        yield "abc"
        yield "def"
        seen.extend(left_in(tmp_path))
        raise error

    with pytest.raises(error):
        build(tmp_path, documents)
    assert len(seen) == 1 and seen[0].endswith(f".building-{os.getpid()}")
    assert left_in(tmp_path) == []
    built = build(tmp_path, TEXTS)
    assert built.read(0, 20).tolist() == stream_of(TEXTS)


def leave_a_half_built_store(cache, pid):
    """Leave what looks whole, of other text, under the name of a build by `pid`."""
    built = build(cache, ["stale"])
    stale = built.path.parent / f".{built.path.name}.building-{pid}"
    built.path.rename(stale)
    return stale


def test_what_a_dead_process_left_is_removed_and_never_read(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leave_a_half_built_store(tmp_path, dead.pid)
    built = build(tmp_path, TEXTS)
    assert built.read(0, 20).tolist() == stream_of(TEXTS)
    assert left_in(tmp_path) == [built.path.name]


def test_what_a_dead_process_of_our_own_id_left_is_removed(tmp_path):
    leave_a_half_built_store(tmp_path, os.getpid())
    built = build(tmp_path, TEXTS)
    assert built.read(0, 20).tolist() == stream_of(TEXTS)
    assert left_in(tmp_path) == [built.path.name]


def test_what_a_living_process_is_building_is_left_alone(tmp_path):
    stale = leave_a_half_built_store(tmp_path, os.getppid())
    built = build(tmp_path, TEXTS)
    assert built.read(0, 20).tolist() == stream_of(TEXTS)
    assert left_in(tmp_path) == sorted([built.path.name, stale.name])


def test_the_store_of_a_process_that_was_first_is_taken(tmp_path):
    first = build(tmp_path / "other", TEXTS)

    def documents():
        yield from TEXTS
        place = tmp_path / "stores" / first.path.name
        shutil.copytree(first.path, place)
        (place / "first").touch()

    built = build(tmp_path, documents)
    assert (built.path / "first").exists()
    assert built.read(0, 20).tolist() == stream_of(TEXTS)
    assert left_in(tmp_path) == [first.path.name]


def test_a_cache_that_is_a_file_is_refused(tmp_path):
    cache = tmp_path / "cache"
    cache.write_text("")
    text = refusal(build, cache, TEXTS)
    assert text.startswith(
        f"data.cache_dir must be writable and have room; got {cache}/stores/"
    )
    assert text.endswith(
        " (Not a directory). Free space or set --config.data.cache_dir."
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_may_not_be_written_is_refused(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    text = refusal(build, cache, TEXTS)
    assert text.startswith(
        f"data.cache_dir must be writable and have room; got {cache}/stores/"
    )
    assert text.endswith(
        " (Permission denied). Free space or set --config.data.cache_dir."
    )


# The limit stops the tokens of the first corpus, and of the second only the offsets,
# which NumPy writes in its own way.
@pytest.mark.parametrize(
    "texts", [["a" * 1000], ["a"] * 100], ids=["tokens", "offsets"]
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(texts, tmp_path):
    program = f"""
        import pathlib, resource, signal
        from fm_jax.data import store
        from fm_jax.tokenizers import all as tokenizers
        from fm_jax.errors import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
        try:
            store.find_or_build(
                pathlib.Path({str(tmp_path)!r}),
                lambda: {texts!r},
                tokenizers.ByteTokenizer(),
                identity={{"split": "train"}},
                say=lambda line: None,
            )
        except UserError as error:
            print(error, end="")
    """
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(store.__file__).parents[2],
    )
    assert done.stderr == ""
    assert done.stdout.startswith(
        f"data.cache_dir must be writable and have room; got {tmp_path}/stores/"
    )
    assert done.stdout.endswith(". Free space or set --config.data.cache_dir.")
    assert "(File too large)" in done.stdout
    assert left_in(tmp_path) == []


# Several processes.


# Reads its documents, once it has said so, for as long as the other has not asked.
BUILDER = """
    import pathlib, sys, time
    from fm_jax.data import store
    from fm_jax.tokenizers import all as tokenizers
    name, cache = sys.argv[1], pathlib.Path(sys.argv[2])
    def documents():
        print("reads", flush=True)
        while not (cache / "asked").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        yield name
    if name == "second":
        (cache / "asked").touch()
    built = store.find_or_build(
        cache,
        documents,
        tokenizers.ByteTokenizer(),
        identity={"split": "train"},
        say=print,
    )
    print(bytes(built.read(1, len(built) - 1).astype("u1")).decode())
"""


def test_of_two_processes_one_builds_and_the_other_finds(tmp_path):
    def start(name):
        command = [sys.executable, "-B", "-c", textwrap.dedent(BUILDER)]
        return subprocess.Popen(
            [*command, name, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )

    with start("first") as first:
        said = [first.stdout.readline(), first.stdout.readline()]
        with start("second") as second:
            found, _ = second.communicate(timeout=60)
        said += first.communicate(timeout=60)[0].splitlines(keepends=True)
    (name,) = [name for name in left_in(tmp_path) if name != "asked"]
    built = "  1 documents, 5 bytes, 7 tokens\n"
    line = f"Building a token store in {tmp_path / 'stores' / name}\n"
    assert sorted(said) == sorted([line, "reads\n", built, "first\n"])
    assert found == "first\n"


def test_a_store_that_may_not_be_built_is_refused_and_nothing_is_made(tmp_path):
    def find():
        return store.find_or_build(
            tmp_path / "cache",
            lambda: iter(TEXTS),
            BYTES,
            identity={"split": "train", "name": "a"},
            say=said.append,
            may_build=False,
        )

    said = []
    text = refusal(find)
    assert text.startswith(f"{tmp_path}/cache/stores/")
    assert text.endswith(" must be prepared; got nothing there. fm train does.")
    assert list(tmp_path.iterdir()) == []
    built = build(tmp_path / "cache", TEXTS)
    assert find().path == built.path
    assert text.startswith(f"{built.path} ")
    assert said == []
