"""Tests of text files: which are found, how they are opened, what is refused."""

import gzip
import json
import sysconfig

import numpy as np
import pytest

from fm_jax.corpora import files, sources
from tests.corpora.made import PACK, make, refusal, texts, write_corpus


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document_however_it_is_packed(suffix, packing, tmp_path):
    path = tmp_path / f"one{suffix}{packing}"
    path.write_bytes(PACK[packing]("été\r\n\x00 \U0001f642\n".encode()))
    assert texts(path) == ["été\r\n\x00 \U0001f642\n"]


@pytest.mark.parametrize("packing", PACK)
def test_each_jsonl_line_with_text_is_a_document(packing, tmp_path):
    path = tmp_path / f"rows.jsonl{packing}"
    lines = ['{"text": "a\\nb", "n": 1}', "", '{"text": ""}', '{"text": "\\u00e9"}']
    path.write_bytes(PACK[packing]("\n".join(lines).encode()))
    assert texts(path) == ["a\nb", "é"]


def test_text_field_names_the_field_of_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "no", "body": "yes"}\n')
    assert texts(path, text_field="body") == ["yes"]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("size", [3, 300_000])
def test_packed_files_joined_end_to_end_are_read_to_the_end(packing, size, tmp_path):
    one, two = (np.random.default_rng(s).bytes(size).hex() for s in (1, 2))
    path = tmp_path / f"joined.txt{packing}"
    path.write_bytes(PACK[packing](one.encode()) + PACK[packing](two.encode()))
    assert texts(path) == [one + two]


def test_empty_files_are_no_documents(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    assert texts(tmp_path) == ["b"]


def test_a_folder_stands_for_all_text_under_it_in_name_order(tmp_path):
    for name in ["z.txt", "inner/deep/y.md", "inner/x.py", "w.jsonl", "photo.png"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name == "w.jsonl" else name)
    assert texts(tmp_path) == ["inner/deep/y.md", "inner/x.py", "w.jsonl", "z.txt"]


def test_globs_cross_folders_and_pass_by_what_is_not_text(tmp_path):
    write_corpus(tmp_path, 5)
    (tmp_path / "part0" / "0.bin").write_text("no")
    assert texts(f"{tmp_path}/**/[03].*") == ["part0/0.txt", "part0/3.txt"]
    assert len(texts(f"{tmp_path}/**")) == 5


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_corpus(tmp_path, 1)
    assert texts("~/part0/*.txt") == ["part0/0.txt"]


def test_a_file_that_two_patterns_match_is_read_once(tmp_path, monkeypatch):
    write_corpus(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    read = texts("part0/0.txt", f"{tmp_path}/part0", f"{tmp_path}/part1/../part0/*")
    assert read == ["part0/0.txt"]


def test_a_link_is_read_by_its_own_suffix_and_not_its_targets(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "5ca1ab1e").write_bytes(gzip.compress(b'{"text": "in"}'))
    (tmp_path / "rows.jsonl.gz").symlink_to("blobs/5ca1ab1e")
    assert texts(tmp_path / "rows.jsonl.gz") == ["in"]


def test_missing_paths_are_refused(tmp_path):
    assert refusal(make) == (
        "data.paths must list files or globs; got none. "
        "Example: --config.data.paths='(\"corpus/**/*.txt\",)'."
    )
    for pattern in [f"{tmp_path}/none.txt", f"{tmp_path}/*.txt"]:
        assert refusal(make, paths=(pattern,)) == (
            f"data.paths must match files; got none for {pattern!r}."
        )
    (tmp_path / "a.txt").write_text("a")
    pattern = f"{tmp_path}/b.txt"
    assert refusal(make, paths=(str(tmp_path / "a.txt"),), eval_paths=(pattern,)) == (
        f"data.eval_paths must match files; got none for {pattern!r}."
    )


def test_a_named_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(b"")
    assert refusal(make, paths=(str(path),)) == (
        "data.paths must name text (.txt, .md, .py, .jsonl, each also .gz or .zst); "
        f"got {path}."
    )


def test_patterns_that_match_no_text_are_refused(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"")
    assert refusal(make, paths=(str(tmp_path), f"{tmp_path}/*")) == (
        "data.paths must match text files (.txt, .md, .py, .jsonl, each also .gz or "
        f".zst); got none in {tmp_path}, {tmp_path}/*."
    )


def test_a_file_that_has_gone_since_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    source = make(paths=(str(path),))
    path.unlink()
    expected = f"data file must be readable; got {path} (No such file or directory)."
    assert refusal(source.identity, "train") == expected
    assert refusal(lambda: list(source.documents("train"))) == expected


def cut(packed):
    return packed[: len(packed) // 2]


def cut_at_once(packed):
    return packed[:5]


def scratch(packed):
    middle = len(packed) // 2
    return packed[:middle] + b"\xff" * 50 + packed[middle + 50 :]


def scratch_the_first_block(packed):
    return packed[:10] + b"\xff" * 4 + packed[14:]  # of a kind that does not exist


def unpacked(packed):
    return b"plain text that someone renamed"


@pytest.mark.parametrize(
    "damage", [cut, cut_at_once, scratch, scratch_the_first_block, unpacked]
)
@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_damaged_packed_file_is_refused_and_never_cut_short(
    suffix, packing, damage, tmp_path
):
    path = tmp_path / f"a{suffix}{packing}"
    random = np.random.default_rng(0).bytes(150_000).hex()
    rows = [{"text": random[n : n + 1000]} for n in range(0, len(random), 1000)]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(damage(PACK[packing](raw)))
    text = refusal(texts, path, on_bad_text="skip")
    assert text.startswith(f"data file must be readable; got {path} (")
    assert text.endswith("). Restore it or take it out of data.paths.")


def test_the_standard_library_is_clean_utf8_without_tests_or_installed_packages():
    found = files.stdlib_files()
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(found)
    folders = {part for name in found for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages"}
    assert not folders & {"dist-packages", "__pycache__"}
    source = make(source="stdlib", eval_fraction=0.05)
    read = [text for split in sources.SPLITS for text in source.documents(split)]
    assert sum(len(t.encode()) for t in read) == sum(
        path.stat().st_size for path in found.values()
    )


def test_a_python_without_its_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert refusal(make, source="stdlib") == (
        f"the standard library must have its source files; got none under {tmp_path}. "
        "Use another Python, or --config.data.source=text."
    )
