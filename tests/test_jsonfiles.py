"""Tests of reading the ends of files; of the rest see what reads them."""

import pytest

from fm_jax import jsonfiles


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("tail", [1, 5, 12, 1000])
def test_the_last_lines_are_those_of_the_file(block, tail, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonfiles, "BLOCK_BYTES", block)
    monkeypatch.setattr(jsonfiles, "TAIL_BYTES", tail)
    file = tmp_path / "lines"
    for raw in (b"", b"\n", b"a", b"a\n", b"ab\ncd", b"\nab\n\ncde\nf", b"ab\ncd\n"):
        file.write_bytes(raw)
        kept = raw[max(0, len(raw) - tail) :]
        whole = kept.split(b"\n")[:-1]  # what follows the last break is torn
        whole = whole if len(kept) == len(raw) else whole[1:]  # the first is cut
        assert list(jsonfiles.last_lines(file)) == whole[::-1]
