"""Tests of which files there are: by globs, folders and names, and what is refused."""

import glob
import gzip
import os
import sysconfig

import pytest

from fm_jax.corpora import files, paths, sources
from tests.corpora.made import make, read, refusal, texts, write_corpus

KNOWN = (
    "text (.txt, .md, .py and the like), .jsonl, each also .gz or .zst, .parquet or "
    ".array_record"
)


def found(*patterns):
    return list(files.matching(tuple(map(str, patterns)), "data.paths"))


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


@pytest.mark.parametrize(
    ("path", "suffix", "packing", "is_known"),
    [
        ("a.txt", ".txt", "", True),
        ("/b.md/a.TXT.GZ", ".txt", ".gz", True),
        ("a.2024.jsonl.zst", ".jsonl", ".zst", True),
        ("a.parquet", ".parquet", "", True),
        ("a.parquet.gz", ".gz", ".gz", False),
        ("a.array_record", ".array_record", "", True),
        ("a.gz", ".gz", ".gz", False),
        ("README", "", "", False),
        (".txt", "", "", False),
        ("photo.png", ".png", "", False),
        ("s3://b.md/a.py?x.gz", ".gz", ".gz", False),
        ("https://b.md/a.py.gz?download=true", ".py", ".gz", True),
    ],
)
def test_a_suffix_says_what_a_file_holds(path, suffix, packing, is_known):
    assert paths.suffix_of(path) == suffix
    assert paths.packing_of(path) == packing
    assert paths.is_known(path) == is_known


def test_a_folder_stands_for_all_text_under_it_in_name_order(tmp_path):
    names = ["z.txt", "inner/deep/y.md", "inner/x.py", "w.jsonl.gz", "v.parquet"]
    write(tmp_path, *names, "photo.png", "inner-/b.rs", "u.array_record", "t.zst")
    assert found(tmp_path) == [
        "inner/deep/y.md",
        "inner/x.py",
        "inner-/b.rs",
        "u.array_record",
        "v.parquet",
        "w.jsonl.gz",
        "z.txt",
    ]


def test_what_is_hidden_in_a_folder_is_left_out_unless_it_is_named(tmp_path):
    write(tmp_path, "a.txt", ".b.txt", ".git/c.txt")
    assert found(tmp_path) == ["a.txt"]
    assert found(tmp_path, tmp_path / ".git", tmp_path / ".b.txt") == [
        ".b.txt",
        ".git/c.txt",
        "a.txt",
    ]


def test_globs_cross_folders_and_pass_by_what_is_not_text(tmp_path):
    write_corpus(tmp_path, 5)
    (tmp_path / "part0" / "0.bin").write_text("no")
    assert texts(f"{tmp_path}/**/[03].*") == ["part0/0.txt", "part0/3.txt"]
    assert len(texts(f"{tmp_path}/**")) == 5


def test_a_path_that_exists_as_it_is_spelt_is_no_glob(tmp_path):
    write(tmp_path, "a[1].txt", "a1.txt", "b*/x.txt", "bc/y.txt")
    assert found(tmp_path / "a[1].txt") == ["a[1].txt"]
    assert found(tmp_path / "b*") == ["x.txt"]
    assert found(tmp_path / "a[12].txt") == ["a1.txt"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_corpus(tmp_path, 1)
    assert texts("~/part0/*.txt") == ["part0/0.txt"]


def test_a_file_that_two_patterns_match_is_read_once(tmp_path, monkeypatch):
    write_corpus(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    patterns = ["part0/0.txt", f"{tmp_path}/part0", f"{tmp_path}/part1/../part0/*"]
    assert texts(*patterns) == ["part0/0.txt"]


def test_a_link_is_read_by_its_own_suffix_and_not_its_targets(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "5ca1ab1e").write_bytes(gzip.compress(b'{"text": "in"}'))
    (tmp_path / "rows.jsonl.gz").symlink_to("blobs/5ca1ab1e")
    assert texts(tmp_path / "rows.jsonl.gz") == ["in"]


def test_a_linked_folder_is_walked_once_and_circles_end(tmp_path):
    write(tmp_path, "far/a.txt", "corpus/b.txt")
    for link in ["one", "two"]:
        (tmp_path / "corpus" / link).symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "corpus")
    assert found(tmp_path / "corpus") == ["b.txt", "one/a.txt"]
    assert found(tmp_path / "corpus" / "one") == ["a.txt", "back/b.txt"]


def test_a_link_up_from_a_linked_folder_is_followed_where_it_leads(tmp_path):
    write(tmp_path, "far/in/a.txt", "far/b.txt", "b.txt")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "in")
    found = files.matching((f"{tmp_path}/link/../b.txt",), "data.paths")
    assert found == {"b.txt": f"{tmp_path}/far/b.txt"}


def test_names_of_files_that_have_only_the_root_in_common_are_whole(tmp_path):
    os.makedirs(tmp_path / "x")
    write(tmp_path / "x", "a.txt")
    names = files.matching((str(tmp_path), f"file://{tmp_path}/x/a.txt"), "data.paths")
    assert names == {
        f"{tmp_path}/x/a.txt": f"{tmp_path}/x/a.txt",
        f"file://{tmp_path}/x/a.txt": f"file://{tmp_path}/x/a.txt",
    }


def test_missing_paths_are_refused_with_where_they_were_looked_for(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert refusal(make, paths=("none/*.txt",)) == (
        "data.paths must match files; got none for 'none/*.txt'. It was looked for in "
        f"{tmp_path}."
    )


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


@pytest.mark.parametrize("folder", ["{}", "{}*"])
def test_a_named_file_that_is_not_text_is_refused(folder, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(b"")
    assert refusal(found, f"{folder.format(tmp_path)}/photo.png") == (
        f"data.paths must name {KNOWN}; got {path}. Name it .txt if it is text."
    )


def test_patterns_that_match_no_text_are_refused(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"")
    assert refusal(found, tmp_path, f"{tmp_path}/*") == (
        f"data.paths must match {KNOWN}; got none in {tmp_path}, {tmp_path}/*."
    )


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    write(tmp_path, "a.txt", "inner/b.txt")
    real = os.scandir

    def locked(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert refusal(found, tmp_path) == (
        f"data.paths must be readable; got {tmp_path}/inner (Permission denied)."
    )


def test_the_standard_library_is_clean_utf8_without_tests_or_installed_packages():
    found = files.stdlib_files()
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(found)
    folders = {part for name in found for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages"}
    assert not folders & {"dist-packages", "__pycache__"}
    source = make(source="stdlib", eval_fraction=0.05)
    every = [text for split in sources.SPLITS for text in read(source, split)]
    assert sum(len(t.encode()) for t in every) == sum(
        os.path.getsize(path) for path in found.values()
    )


def test_a_python_without_its_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert refusal(make, source="stdlib") == (
        f"the standard library must have its source files; got none under {tmp_path}. "
        "Use another Python, or --config.data.source=text."
    )


def test_a_glob_walks_each_folder_once_and_circles_end(tmp_path):
    write(tmp_path, "far/a.txt", "corpus/b.txt", "corpus/.hidden/c.txt")
    write(tmp_path, "corpus/d/b.md")
    for link in ["one", "two"]:
        (tmp_path / "corpus" / link).symlink_to(tmp_path / "far")
        (tmp_path / "far" / f"{link}-back").symlink_to(tmp_path / "corpus")
    assert found(tmp_path / "corpus/**/*.txt") == ["b.txt", "one/a.txt"]
    assert found(tmp_path / "corpus/**/d/**/*.md") == ["b.md"]
    assert found(tmp_path / "corpus/**/.hidden/*") == ["c.txt"]
    assert found(tmp_path / "corpus/**") == ["b.txt", "d/b.md", "one/a.txt"]


def test_globs_match_what_the_standard_ones_do(tmp_path, monkeypatch):
    write(tmp_path, "a.txt", "b/a.txt", "b/c/a.txt", "b/[x]/d.txt", "b/.e/f.txt")
    monkeypatch.chdir(tmp_path)
    for pattern in ["**/*.txt", "**/a.*", "b/**/a.txt", "**/c/*", "*/**/[ad].txt"]:
        for at in ["", f"{tmp_path}/"]:
            expected = glob.glob(at + pattern, recursive=True)
            ours = files.matching((at + pattern,), "data.paths").values()
            assert sorted(ours) == sorted(map(os.path.abspath, expected))
