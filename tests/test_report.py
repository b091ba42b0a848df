"""Tests of report.html: self-contained, escaped, and the same for the same run."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from fm_jax import report
from fm_jax.errors import UserError
from fm_jax.runs import Run

RECORD = {
    "config": {"data": {"name": "<script>alert(1)</script>"}, "train": {"steps": 40}},
    "changed_from_base": {"data.name": ["", "<b>&name</b>"], "train.steps": [0, 40]},
    "resolved": {"steps": 40, "params": {"total": 1234}},
    "data": {"tokenizer": "abc"},
    "history": [{"command": ["fm", "train", "--config.data.name=<i>"]}],
}


def _make(path, *, state="done", loss=4.0, **closing):
    run = Run(path)
    run.begin()
    run.write_config(RECORD)
    for step in (10, 20, 30, 40):
        run.append(
            {
                "step": step,
                "train/loss": loss - step / 20,
                "train/bits_per_byte": loss / 2 - step / 40,
                "grads/norm": 1 / step,
                "optimizer/learning_rate": 1e-3 * step,
                "perf/tokens_per_second": 1000.0 + step,
            }
        )
    run.append({"step": 40, "eval/loss": 2.5, "eval/bits_per_byte": 1.3})
    run.append(
        {
            "step": 40,
            "final/loss": 2.4321,
            "final/bits_per_byte": 1.2345,
            "gzip/bits_per_byte": 1.9876,
            "perf/median_tokens_per_second": 1030.4,
            "perf/median_mfu": 0.2796,
            "memory/peak_host_bytes": 1_234_567_890,
            "time/step_seconds": 6.0,
            "time/eval_seconds": 3.0,
            "time/data_seconds": 3.0,
            "perf/median_step_seconds": 0.0712345,
            **closing,
        }
    )
    predicted = {"predicted/memory_bytes": 987_654_321, "memory/peak_bytes": 1.2e9}
    run.append({"step": 40, "predicted/step_seconds": 0.04567, **predicted})
    for index in range(6):
        text = f"sample {index} </pre><script>alert({index})</script> a < b & c"
        run.append({"step": 40, "text": text}, "samples.jsonl")
    if state == "done":
        run.write("DONE", "40\n")
    elif state:
        run.write("FAILED", state)
    return path


class _Page(HTMLParser):
    """The tags of a page, what they fetch, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            is_link = name.split(":")[-1] in ("src", "href", "srcset", "data", "action")
            if is_link and not value.startswith("#"):
                self.fetched.append((tag, value))

    def handle_data(self, data):
        self.text.append(data)


def _page(*paths, out):
    report.write(paths, out)
    text = out.read_text("utf-8")
    return text, _Page(text)


def _cells(text, label):
    row = re.search(rf"<tr><td>{re.escape(label)}</td>(.*?)(?:<tr>|</table>)", text)
    return re.findall(r"<td[^>]*>(.*?)</td>", row[1])


@pytest.fixture
def one(tmp_path):
    """Return the report of one run, as text and as a parsed page."""
    return _page(_make(tmp_path / "small-1a2b"), out=tmp_path / "report.html")


def test_a_report_fetches_nothing(one):
    text, page = one
    assert page.fetched == []
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_every_group_of_curves_is_one_figure(one):
    _, page = one
    assert page.tags.count("figure") == page.tags.count("svg") == len(report.CURVES)
    shown = "".join(page.text)
    for title, unit, _ in report.CURVES:
        assert title in shown
        assert unit in shown
    assert "gzip -9, held out" in shown


def test_a_running_mean_takes_as_many_neighbours_on_either_side():
    values = [1.0, 5.0, 3.0, 7.0, 4.0, 40.0]
    assert report.running_mean(values, 0) == values
    assert report.running_mean(values, 2) == [1.0, 3.0, 20 / 5, 59 / 5, 51 / 3, 40.0]
    assert report.running_mean([], 3) == []


def test_a_group_without_rows_has_no_figure(tmp_path):
    run = Run(tmp_path / "new")
    run.begin()
    run.write_config(RECORD)
    _, page = _page(run.path, out=tmp_path / "report.html")
    assert "svg" not in page.tags
    run.append({"step": 1, "grads/norm": 2.0})
    _, page = _page(run.path, out=tmp_path / "report.html")
    assert page.tags.count("svg") == 1


def test_the_summary_holds_the_last_numbers_of_a_run(one):
    text, _ = one
    for label, value in {
        "steps": "40",
        "train loss (nats/token)": "2.0000",
        "held-out loss (nats/token)": "2.4321",
        "held-out bits/byte": "1.2345",
        "gzip -9 bits/byte": "1.9876",
        "tokens/s (median)": "1,030",
        "MFU (median)": "28.0%",
        "peak host memory (MB)": "1,235",
        "peak memory as predicted (MB)": "988",
        "peak memory as measured (MB)": "1,200",
        "step at the roofline (ms)": "45.7",
        "step as measured, median (ms)": "71.2",
        "state": "done",
    }.items():
        assert _cells(text, label) == [value], label


def test_the_best_possible_loss_is_shown_where_it_is_known(one, tmp_path):
    text, _ = one
    assert "best possible" not in text
    known = {"final/bayes_loss": 2.4012, "final/excess_loss": 0.0309}
    paths = [_make(tmp_path / "known", **known), _make(tmp_path / "unknown")]
    text, page = _page(*paths, out=tmp_path / "both.html")
    assert _cells(text, "best possible, Bayes (nats/token)") == ["2.4012", ""]
    assert _cells(text, "held-out above it (nats/token)") == ["0.0309", ""]
    assert "best possible (Bayes), held out" in "".join(page.text)


def test_the_time_is_shown_by_phase_as_parts_of_the_whole(one):
    text, _ = one
    rows = re.findall(r"<tr><td>(\w+)<td class=n>([\d.]+) s<td class=n>([\d.]+)%", text)
    assert rows == [
        ("step", "6.00", "50.0"),
        ("data", "3.00", "25.0"),
        ("eval", "3.00", "25.0"),
    ]


def test_values_and_samples_are_escaped(one):
    text, page = one
    shown = "".join(page.text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert "sample 5 </pre><script>alert(5)</script> a < b & c" in shown
    assert "<script>alert(1)</script>" in shown  # data.name among every key
    assert "'<b>&name</b>'" in shown  # and among those that changed
    assert "--config.data.name=<i>" in shown


def test_the_last_four_samples_are_shown(one):
    _, page = one
    shown = "".join(page.text)
    assert re.findall(r"sample (\d) ", shown) == ["2", "3", "4", "5"]


def test_several_runs_stand_side_by_side(tmp_path):
    paths = [_make(tmp_path / "first"), _make(tmp_path / "second", loss=5.0)]
    text, page = _page(*paths, out=tmp_path / "both.html")
    shown = "".join(page.text)
    assert page.fetched == []
    assert "<h1>first and second</h1>" in text
    assert page.tags.count("svg") == len(report.CURVES)
    for label in ("first, train", "second, train", "second, held out"):
        assert label in shown
    assert _cells(text, "train loss (nats/token)") == ["2.0000", "3.0000"]
    for title in ("Config", "Samples", "Environment"):
        assert f"<h2>{title}: first</h2>" in text
        assert f"<h2>{title}: second</h2>" in text


def test_the_names_of_runs_are_escaped(tmp_path):
    paths = [_make(tmp_path / "<b>a&b"), _make(tmp_path / "plain")]
    text, page = _page(*paths, out=tmp_path / "both.html")
    assert "b" not in page.tags
    assert "<b>" not in text
    assert "<b>a&b, train" in "".join(page.text)


@pytest.mark.parametrize(
    "state, shown",
    [
        ("done", "done"),
        (None, "not finished"),
        ("DivergedError: loss <nan>\n", "DivergedError: loss &lt;nan&gt;\n"),
    ],
)
def test_the_state_is_done_why_it_failed_or_not_finished(state, shown, tmp_path):
    path = _make(tmp_path / "run", state=state)
    report.write([path], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert re.search(r"<tr><td>state</td><td>(.*?)</td>", text, re.DOTALL)[1] == shown


def test_the_same_run_gives_the_same_file_in_another_process(tmp_path):
    path = _make(tmp_path / "run")
    code = (
        "import pathlib, sys\n"
        "from fm_jax import report\n"
        "run, out = map(pathlib.Path, sys.argv[1:])\n"
        "report.write([run], out)\n"
    )
    files = []
    for seed in ("1", "2"):  # of the order of sets
        out = tmp_path / f"{seed}.html"
        subprocess.run(
            [sys.executable, "-c", code, str(path), str(out)],
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        )
        files.append(out.read_bytes())
    assert files[0] == files[1]
    assert len(files[0]) > 10_000


def test_what_is_not_a_run_is_refused_and_nothing_is_written(tmp_path):
    out = tmp_path / "report.html"
    with pytest.raises(UserError) as error:
        report.write([_make(tmp_path / "run"), tmp_path / "other"], out)
    assert str(error.value) == (
        f"a run must be a folder with config.json; got {tmp_path / 'other'}. "
        "fm train prints the folder of its run."
    )
    assert not out.exists()


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    out = tmp_path / "missing" / "report.html"
    with pytest.raises(UserError) as error:
        report.write([_make(tmp_path / "run")], out)
    assert str(error.value) == (
        f"{out} must be writable and its disk have room; got No such file or directory."
    )


def test_figures_are_files_too(tmp_path):
    run = _make(tmp_path / "run")
    written = report.write_figures([run], tmp_path / "figures")
    assert [path.name for path in written] == [
        "loss.svg",
        "compression.svg",
        "learning_rate.svg",
        "gradient_norm.svg",
        "throughput.svg",
    ]
    assert all(
        ElementTree.parse(path).getroot().tag.endswith("svg") for path in written
    )
