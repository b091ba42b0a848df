"""Tests of the page of a fit: whole, self-contained, valid, and open about doubts."""

import base64
import csv
import dataclasses
import html.parser
import re
import shlex

import pytest

from fm_jax.commands.listed import COMMANDS
from fm_jax.errors import UserError
from fm_jax.scaling import drawn, fit, page
from tests.scaling import surfaces

VOID = {"meta", "img", "br", "link"}


class Reader(html.parser.HTMLParser):
    """Checks that every tag is closed in turn, and keeps what a reader sees."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text.append(data)

    @classmethod
    def of(cls, text):
        reader = cls()
        reader.feed(text)
        reader.close()
        assert not reader.open
        return reader


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "runs & more.csv"
    surfaces.write(path, surfaces.isoflop())
    options = fit.Options(num_bootstraps=200, seed=3, exclude=("loss>9", "loss<0.5"))
    return fit.run(path, options)


@pytest.fixture(scope="module")
def folder(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "deep" / "er"
    page.write(folder, found, ["as <printed>", "line two"])
    return folder


def _read(folder):
    return (folder / page.FILE).read_text(encoding="utf-8")


def _with(found, **record):
    return dataclasses.replace(found, record=found.record | record)


def _html(found, **record):
    return page.html_of(found.record | record, {})


def test_the_page_is_valid_and_needs_nothing_beside_it(folder):
    text = _read(folder)
    reader = Reader.of(text)
    assert text.startswith("<!doctype html>\n")
    assert not {"link", "script", "a", "iframe"} & set(reader.tags)
    sources = [value for name, value in reader.attributes if name in ("src", "href")]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in text
    assert "as <printed>\nline two" in "".join(reader.text)


def test_each_figure_is_there_once_as_png_with_its_numbers(found, folder):
    rows = drawn.tables(found)
    text = _read(folder)
    images = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    decoded = [base64.b64decode(image, validate=True) for image in images]
    assert len(decoded) == len(set(decoded)) == len(rows)
    for name, shown in rows.items():
        assert decoded.count((folder / f"{name}.png").read_bytes()) == 1
        with open(folder / f"{name}.csv", newline="") as stream:
            kept = list(csv.DictReader(stream))
        assert kept == [
            {key: "" if value is None else str(value) for key, value in row.items()}
            for row in shown
        ]
        assert f"Its numbers are in {name}.csv." in text


def test_the_same_fit_gives_the_same_files(found, folder, tmp_path):
    written = page.write(tmp_path, found, ["as <printed>", "line two"])
    assert {file.name for file in written} == {file.name for file in tmp_path.iterdir()}
    for file in written:
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name


def test_warnings_stand_first_and_their_text_is_escaped(found):
    said = ["<script>alert(1)</script>", "a & b"]
    text = _html(found, warnings=said)
    assert said[0] in "".join(Reader.of(text).text)
    assert "<script" not in text
    assert text.index("2 warnings") < text.index("<h2>Estimates</h2>")
    assert "1 warning<" in _html(found, warnings=said[:1])
    assert "No check found anything to warn of." in _html(found, warnings=[])


def test_what_the_user_wrote_is_escaped(found):
    evil = "<b>&\"'</b>"
    inputs = found.record["inputs"] | {
        "path": f"tables/{evil}.csv",
        "diverged": [evil],
        "notes": [evil],
        "columns": [evil],
    }
    text = _html(found, inputs=inputs, sensitivity=[{"what": evil}])
    assert evil not in text
    assert "".join(Reader.of(text).text).count(evil) >= 5


def test_runs_that_diverged_are_named(found):
    inputs = found.record["inputs"] | {"diverged": ["d4-wild", "d8-wild"]}
    said = "".join(Reader.of(_html(found, inputs=inputs)).text)
    assert "2 diverged, not fitted: d4-wild, d8-wild" in said
    assert "diverged, not fitted" not in _html(found)


def test_estimates_stand_with_their_intervals_and_the_hash(found, folder):
    said = "".join(Reader.of(_read(folder)).text)
    third = found.record["approach3"]
    for name in ("E", "A", "B", "alpha", "beta", "a"):
        low, high = third["ci"][name]
        assert f"{third[name]:.4g}[{low:.4g}, {high:.4g}]" in said
    assert found.record["inputs"]["sha256"] in said
    for one in found.record["held_out"][:-1]:
        assert f"{one['mare']:.2%}{one['worst']:.2%}{one['coverage']:.0%}" in said
    for one in found.record["sensitivity"][1:]:
        assert one["what"] in said
    for one in found.record["approach2"]["slices"]:
        assert f"{one['budget']:.3g}{one['points']}" in said


def _command(text):
    (line,) = re.findall(r"<h2>Again</h2><pre>(.*?)</pre>", text)
    return shlex.split("".join(Reader.of(line).text))


def test_the_command_makes_the_fit_again(found, folder):
    words = _command(_read(folder))
    assert words[:2] == ["fm", "fit"]
    flags = [word.removeprefix("--").partition("=")[::2] for word in words[2:]]
    known = COMMANDS["fit"].flags
    assert {name for name, _ in flags} <= set(known)
    assert sorted(flags) == sorted(
        [
            ("runs", found.record["inputs"]["path"]),
            ("exclude", "loss>9"),
            ("exclude", "loss<0.5"),
            ("bootstrap", found.record["options"]["bootstrap"]),
            ("num_bootstraps", "200"),
            ("seed", "3"),
        ]
    )


def test_the_command_gives_flags_their_names(found):
    asked = fit.Options(delta=float("inf"), fixed={"E": 1.5}, mapping=("params=N",))
    record = {
        "options": dataclasses.asdict(asked) | {"delta": None, "mapping": ["params=N"]}
    }
    words = _command(_html(found, **record))
    assert words[3:] == ["--delta=inf", "--fix=E=1.5", "--map=params=N"]
    known = COMMANDS["fit"].flags
    assert {"delta", "fix", "map"} <= set(known)


@pytest.mark.parametrize(
    "missing",
    [
        {"approach2": {"skipped": "no budgets"}, "approach1": {"skipped": "no curves"}},
        {"held_out": [], "sensitivity": [], "by_count": {}, "optima": []},
        {"optima": [{"flops": 1e20, "skipped": "the law reads more"}]},
        {"approach3": {"skipped": "not asked"}, "held_out": [], "optima": []},
    ],
)
def test_what_a_fit_lacks_is_said_or_left_out(found, missing):
    said = "".join(Reader.of(_html(found, **missing)).text)
    for name in ("approach1", "approach2", "approach3"):
        if name in missing:
            assert f"estimate: {missing[name]['skipped']}." in said
    skipped = any("skipped" in one for one in missing.get("optima", []))
    assert ("None: the law reads more." in said) == skipped


def test_a_fit_without_draws_or_slices_is_written_whole(found, tmp_path):
    bare = _with(found, approach2={"skipped": "no budgets"}, held_out=[])
    page.write(tmp_path, dataclasses.replace(bare, draws={}))
    Reader.of(_read(tmp_path))
    images = {file.stem for file in tmp_path.glob("*.png")}
    assert images == {"frontier", "residuals", "contours"}


def test_a_folder_that_cannot_be_written_is_the_user_s_mistake(found, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out must be a folder to write in; got"):
        page.write(tmp_path / "file", found)
