"""What a user gets wrong: one line, exit status 2, nothing half-written."""

import gzip
import json
import pathlib

import pytest

from fm_jax import cli


@pytest.fixture
def train(tiny, tmp_path, capsys):
    """Return `train(*overrides)`: the one line that a refused run prints."""

    def call(*overrides, workdir=None):
        folder = workdir or tmp_path / "run"
        # A flag of tuples that is given twice adds up, so each is given once.
        given = {override.partition("=")[0] for override in overrides}
        flags = [flag for flag in tiny if flag.partition("=")[0] not in given]
        status = cli.main(["train", *flags, f"--workdir={folder}", *overrides])
        printed = capsys.readouterr().err
        assert status == 2, printed
        last = printed.strip().splitlines()[-1]
        assert last.startswith("fm: ")
        assert "Traceback" not in printed
        if workdir is None:
            assert not folder.exists()
        return last

    return call


def _text(folder: pathlib.Path, **files: bytes) -> str:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.txt").write_bytes(content)
    return f"--config.data.paths=('{folder}',)"


@pytest.mark.parametrize("flag", ["--grace=-1", "--hang=nan", "--rewinds=-2"])
def test_limits_below_nothing(flag, train):
    name, _, value = flag.partition("=")
    assert f"{name} must be at least 0; got {value}" in train(flag)


def test_missing_files(train, tmp_path):
    line = train(f"--config.data.paths=('{tmp_path}/no*.txt',)")
    assert "data.paths must match files; got none for" in line


def test_text_that_is_not_utf8_is_named_with_its_offset(train, tmp_path):
    """Fault 38, data: text is not UTF-8.

    Promise: exit 2 with the file and the byte; on_bad_text skips or mends it.
    """
    paths = _text(tmp_path / "bad", bad=b"twelve bytes\xff\xfe")
    _text(tmp_path / "good", good=b"fine")
    line = train(paths, f"--config.data.eval_paths=('{tmp_path}/good',)")
    assert "text must be UTF-8; got" in line
    assert "bad.txt (a bad byte at offset 12)" in line
    assert "--config.data.on_bad_text=skip" in line


def test_damaged_gzip(train, tmp_path):
    """Fault 35, data: a packed text file is cut.

    Promise: exit 2 with its name; no run folder is made.
    """
    file = tmp_path / "cut.txt.gz"
    file.write_bytes(gzip.compress(b"hello " * 1000)[:-20])
    _text(tmp_path / "good", good=b"fine")
    line = train(
        f"--config.data.paths=('{file}',)",
        f"--config.data.eval_paths=('{tmp_path}/good',)",
    )
    assert "data file must be whole; got" in line
    assert "cut.txt.gz" in line


def test_an_empty_corpus(train, tmp_path):
    """Fault 37, data: the corpus has no text at all.

    Promise: exit 2; no run folder is made.
    """
    paths = _text(tmp_path / "empty", a=b"", b=b"")
    assert "the corpus must have text" in train(paths)


def test_a_corpus_shorter_than_a_window(train, tmp_path):
    """Fault 37, data: the corpus is shorter than one row.

    Promise: exit 2 with both numbers of tokens; no run folder is made.
    """
    paths = _text(tmp_path / "short", **{f"f{i}": b"%d" % i for i in range(40)})
    line = train(paths, "--config.data.max_length=256", "--config.model.max_length=256")
    assert "the corpus must be longer than one window" in line


def test_a_plan_of_rows_that_cannot_be_kept(train, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "plans").write_text("a file, not a folder")
    line = train(
        "--config.data.packing=best_fit",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    )
    assert "data.cache_dir must be writable and have room; got" in line


def test_a_vocabulary_too_small_for_the_tokenizer(train):
    """Fault 39, data: the model has fewer ids than the tokenizer.

    Promise: exit 2 with both numbers; no run folder is made.
    """
    line = train("--config.model.vocab_size=100")
    assert "model.vocab_size must hold the tokenizer's ids; got 100 for 257 ids" in line


def test_a_tokenizer_file_that_is_none(train, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": "none"}))
    assert "tokenizer file must be a tokenizer.json" in train(
        f"--config.data.tokenizer={file}"
    )


def test_a_batch_that_does_not_divide_by_the_mesh(train):
    line = train("--config.train.batch_size=12")
    assert (
        "train.batch_size / train.accumulation must divide by data*fsdp*expert" in line
    )
    assert "got 12 over 8. Nearest: 8 or 16." in line


def test_a_mesh_that_does_not_match_the_devices(train):
    line = train("--config.mesh.data=3")
    assert line == (
        "fm: mesh must multiply to the 8 devices; got data=3. "
        "Nearest that work: data=8."
    )


def test_a_row_that_does_not_divide_by_the_context(train):
    line = train("--config.mesh.context=8", "--config.data.max_length=24")
    assert (
        "data.max_length must divide by 2*context of the mesh; got 24 over 16" in line
    )


def test_a_dim_that_does_not_divide_by_the_mesh(train):
    line = train("--config.model.num_heads=2", "--config.mesh.tensor=4")
    assert "dim 'kv_heads' must divide by the mesh axes tensor; got 2 over 4" in line


def test_an_unknown_key_is_refused_with_the_nearest(train):
    line = train("--config.model.nun_layers=3")
    assert "got 'model.nun_layers'. Did you mean 'model.num_layers'?" in line


def test_a_value_of_another_type(train):
    assert "config.model.num_layers=many" in train("--config.model.num_layers=many")


def test_two_durations(train):
    line = train("--config.train.tokens=1e6")
    assert "exactly one of train.steps" in line
    assert "train.steps=20, train.tokens=1000000.0" in line


def test_an_impossible_combination(train):
    line = train("--config.model.num_heads=4", "--config.model.num_kv_heads=3")
    assert "model.num_heads must be a multiple of model.num_kv_heads" in line


def test_a_folder_that_is_no_run(train, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    line = train(workdir=tmp_path / "photos")
    assert "--workdir must be a run or an empty folder" in line
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_folder_of_another_run(train, tiny, tmp_path):
    """Fault 22, checkpoints: the same folder with another model or seed.

    Promise: exit 2 with each key's old and new value; no file of the run is touched.
    """
    other = tmp_path / "other"
    status = cli.main(["train", *tiny, f"--workdir={other}", "--config.train.steps=1"])
    assert status == 0
    before = {p: p.stat().st_mtime_ns for p in other.rglob("*")}
    line = train("--config.model.mlp_dim=32", "--config.train.seed=4", workdir=other)
    assert "--workdir must be this run's" in line
    assert "model.mlp_dim: 24 there, 32 here" in line
    assert "train.seed: 0 there, 4 here" in line
    assert {p: p.stat().st_mtime_ns for p in other.rglob("*")} == before


def test_data_that_changed_under_a_run(train, tiny, tmp_path, capsys):
    """Fault 40, data: the text changes under a run.

    Promise: going on is refused with exit 2, and told which split is another.
    """
    paths = _text(
        tmp_path / "text", **{f"f{i}": b"some words %d " % i * 9 for i in range(40)}
    )
    run = tmp_path / "kept"
    flags = [flag for flag in tiny if not flag.startswith("--config.data.paths")]
    flags += [paths, f"--workdir={run}", "--config.train.steps=1"]
    assert cli.main(["train", *flags]) == 0
    for index in range(40):
        (tmp_path / "text" / f"f{index}.txt").write_bytes(b"others %d " % index * 30)
    line = train(paths, "--config.train.steps=2", workdir=run)
    assert "the data must be what" in line
    assert "train_store, eval_store" in line


def test_a_disk_without_room(train, monkeypatch):
    """Fault 17, checkpoints: the disk has no room for two checkpoints.

    Promise: told before the run begins, exit 2; no run folder is made.
    """
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    line = train()
    assert "the disk under --workdir must have room for two checkpoints" in line


def test_a_workdir_where_nobody_may_write(train):
    """Fault 17, checkpoints: nothing can be written under --workdir.

    Promise: told before the run begins, exit 2 with the folder.
    """
    folder = pathlib.Path("/proc/fm_jax/run")  # where root may not write either
    line = train(workdir=folder)
    assert "under --workdir must have room" in line or "must be writable" in line
    assert "/proc" in line


def test_a_workdir_that_cannot_be_made(train, tmp_path):
    (tmp_path / "file").write_text("")
    line = train(workdir=tmp_path / "file")
    assert "--workdir must be a run or an empty folder" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "command must be one of the known names; got 'trian'. Did you "
                    "mean 'train'?"),
        (["train"], "--config must be given"),
        (["train", "--config=configs/quickstrat.py"], "quickstart.py"),
        (["generate"], "--run must be given"),
        (["generate", "--run=nowhere"], "a run must be a folder with config.json"),
        (["generate", "--run=nowhere", "--num_tokens=0"], "must be >= 1"),
        (["report"], "fm report must be given run folders"),
        (["report", "nowhere"], "a run must be a folder with config.json"),
        (["eval", "--run=nowhere", "--stpe=3"], "Did you mean 'step'?"),
        (["data", "biuld"], "got 'data biuld'. Did you mean 'data build'?"),
        (["data", "verify"], "fm data verify must be given token stores; got none."),
        (["data", "overlap"], "must be given two token stores, of training and of "
                              "held-out text; got 0."),
        (["data", "verify", "nowhere"], "a token store must be a folder; got "
                                        "'nowhere'."),
    ],
)  # fmt: skip
def test_other_commands(arguments, expected, capsys):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert len(printed.strip().splitlines()) == 1


def test_commands_of_two_words_are_listed_by_the_first(capsys):
    assert cli.main(["data", "--help"]) == 0
    printed = capsys.readouterr().out
    listed = [line.split()[:2] for line in printed.splitlines() if line[:3] == "  d"]
    assert listed == [n.split() for n in cli.COMMANDS if n.startswith("data ")]
    assert cli.main(["data"]) == 2


def test_help_names_every_flag_and_an_example(capsys):
    for name, command in cli.COMMANDS.items():
        assert cli.main([name, "--help"]) == 0
        printed = capsys.readouterr().out
        assert f"example: {command.example}" in printed
        assert all(f"--{flag}" in printed for flag in command.flags)
    assert cli.main(["--help"]) == 0
    assert all(name in capsys.readouterr().out for name in ["train"])
