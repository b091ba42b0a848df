"""Tests of whole runs as real processes: finished, killed, continued, misused."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fm_jax import trees
from fm_jax.checkpoints import Checkpoints
from fm_jax.corpora import sources
from fm_jax.corpora import synthetic as synthetic_text
from fm_jax.runs import Run
from fm_jax.train.held_out import HeldOut


@pytest.fixture(scope="module")
def finished(fm, tiny, tmp_path_factory) -> tuple[Run, str]:
    """Return a run of twenty steps, and what it printed."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    done = fm("train", *tiny, f"--workdir={path}")
    assert done.returncode == 0, done.stderr
    return Run(path), done.stderr


def _leaves(path: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Return every array of a checkpoint, whatever wrote it."""
    from orbax.checkpoint import v1 as ocp

    found = ocp.load_checkpointables(path / "checkpoints" / str(step))
    return {
        name: np.asarray(leaf)
        for name, leaf in trees.leaves_by_path(found).items()
        if hasattr(leaf, "shape")
    }


def _rows(run: Run, *names: str) -> list[dict]:
    """Return the metrics that follow from the numbers alone, not from the clock."""
    return [
        {k: v for k, v in row.items() if k == "step" or k.startswith(names)}
        for row in run.rows()
        if any(key.startswith(names) for key in row)
    ]


def test_a_run_folder_explains_itself(finished):
    run, _ = finished
    record = run.read_config()
    assert record["resolved"]["steps"] == 20
    total = record["resolved"]["params"]["total"]
    assert record["resolved"]["flops_per_token_6n"] == 6 * total
    assert record["changed_from_base"]["train.batch_size"] == [16, 8]
    assert record["history"][0]["versions"]["jax"] == jax.__version__
    assert record["history"][0]["command"][:2] == ["fm", "train"]
    assert run.done_step() == 20
    assert not (run.path / "FAILED").exists()
    assert (
        "weight decay on: blocks/attention/key/kernel"
        in (run.path / "log.txt").read_text()
    )
    assert (
        "embedding"
        not in (run.path / "log.txt")
        .read_text()
        .split("weight decay on:")[1]
        .splitlines()[0]
    )
    assert (run.path / "report.html").stat().st_size > 10_000
    steps, losses = run.series("train/loss")
    assert steps == list(range(1, 21))
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.5


def test_a_run_prints_its_yardstick_and_what_to_type_next(finished):
    run, printed = finished
    assert "bits/byte by this model" in printed
    assert "by gzip -9" in printed
    assert f"fm generate --run={run.path}" in printed
    assert "a sample, going on from 'def '" in printed
    assert "Traceback" not in printed


def test_a_run_closes_with_what_was_predicted_beside_what_was_measured(finished):
    run, _ = finished
    found = {
        name: run.series(name)
        for name in (
            "predicted/step_seconds",
            "predicted/memory_bytes",
            "memory/peak_bytes",
            "perf/median_step_seconds",
        )
    }
    assert all(steps == [20] for steps, _ in found.values())
    ((step_seconds,), (memory,), (peak,), (median,)) = (v for _, v in found.values())
    assert step_seconds > 0
    _, (tokens_per_second,) = run.series("perf/median_tokens_per_second")
    assert median == pytest.approx(8 * 16 / tokens_per_second)
    # The process by itself; how much more the compiler took is not foreseen.
    assert 1e8 < memory < peak
    # The page's own table, in its units.
    page = (run.path / "report.html").read_text("utf-8")
    for label, value in {
        "peak memory as predicted (MB)": f"{memory / 1e6:,.0f}",
        "peak memory as measured (MB)": f"{peak / 1e6:,.0f}",
        "step at the roofline (ms)": f"{step_seconds * 1e3:,.3g}",
        "step as measured, median (ms)": f"{median * 1e3:,.3g}",
    }.items():
        assert re.search(rf"<td>{re.escape(label)}</td><td[^>]*>{value}</td>", page), (
            label
        )


def test_evaluating_a_run_again_gives_its_final_loss(fm, finished):
    run, _ = finished
    done = fm("eval", f"--run={run.path}")
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert float(found["loss"]) == pytest.approx(run.series("final/loss")[1][0], 1e-5)
    assert float(found["tokens"]) == run.series("final/tokens")[1][0]


def test_generation_from_a_run_is_repeatable(fm, finished):
    run, _ = finished
    flags = [f"--run={run.path}", "--prompt=the ", "--num_samples=2", "--seed=3"]
    first, second = fm("generate", *flags), fm("generate", *flags)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    texts = first.stdout.split("\n---\n")
    assert len(texts) == 2
    assert texts[0] != texts[1]
    assert all(text.startswith("the ") for text in texts)


def test_a_finished_run_is_left_alone(fm, tiny, finished):
    run, _ = finished
    before = (run.path / "metrics.jsonl").read_bytes()
    done = fm("train", *tiny, f"--workdir={run.path}")
    assert done.returncode == 0
    assert "This run is done" in done.stderr
    assert (run.path / "metrics.jsonl").read_bytes() == before


def test_its_config_runs_it_again_to_the_same_bits(fm, finished, tmp_path):
    run, _ = finished
    done = fm(
        "train", f"--config={run.path / 'config.json'}", f"--workdir={tmp_path / 'b'}"
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = _leaves(run.path, 20), _leaves(tmp_path / "b", 20)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def _kill_at(command, environment, run: Run, step: int) -> None:
    """Start a run and kill it hard as soon as it has written `step`."""
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while time.monotonic() < end:
        written = [row["step"] for row in run.rows()]
        if written and max(written) >= step:
            break
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    process.stderr.close()


def test_a_start_that_was_killed_early_is_no_obstacle(fm, tiny, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in (".config.json.writing", "tokenizer.json", "FAILED", ".lock"):
        (run / name).write_text("half")
    done = fm("train", *tiny, f"--workdir={run}", "--config.train.steps=1")
    assert done.returncode == 0, done.stderr
    assert not (run / "FAILED").exists()


def test_two_processes_do_not_train_one_run(fm, tiny, finished):
    """Fault 23, checkpoints: two live jobs in one run folder.

    Promise: the second ends with exit 2 and writes nothing; the lock ends with its
    process.
    """
    run, _ = finished
    before = (run.path / "metrics.jsonl").read_bytes()
    with run.held():
        done = fm("train", *tiny, f"--workdir={run.path}", "--config.train.steps=21")
    assert done.returncode == 2
    assert "which another process is training" in done.stderr.splitlines()[-1]
    assert (run.path / "metrics.jsonl").read_bytes() == before
    assert run.done_step() == 20


def test_a_duration_short_of_the_last_checkpoint_is_refused(fm, tiny, finished):
    run, _ = finished
    files = ("DONE", "config.json", "metrics.jsonl", "log.txt")
    before = [(run.path / name).read_bytes() for name in files]
    done = fm("train", *tiny, f"--workdir={run.path}", "--config.train.steps=10")
    assert done.returncode == 2
    assert "the duration must reach the last checkpoint; got 10 steps" in done.stderr
    assert [(run.path / name).read_bytes() for name in files] == before


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(
    fm, tiny, environment, tmp_path
):
    """Fault 21, checkpoints: a run goes on where it was, on the same mesh.

    Promise: parameters, averages, moments and metrics are the same, bit for bit.
    """
    flags = [*tiny, "--config.train.steps=300", "--config.train.ema_decay=0.9"]
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    assert fm("train", *flags, f"--workdir={whole.path}").returncode == 0
    command = [sys.executable, "-m", "fm_jax.cli", "train", *flags]
    command.append(f"--workdir={killed.path}")
    for step in (3, 96, 203):
        _kill_at(command, environment, killed, step)
        assert not killed.done_step()
    done = fm("train", *flags, f"--workdir={killed.path}")
    assert done.returncode == 0, done.stderr
    assert "Going on from step" in done.stderr
    ours, theirs = _leaves(whole.path, 300), _leaves(killed.path, 300)
    assert any(name.startswith("ema/") for name in ours)
    assert any(name.startswith("optimizer/state") for name in ours)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    names = ("train/", "eval/", "grads/", "final/")
    assert _rows(whole, *names) == _rows(killed, *names)
    assert len(killed.read_config()["history"]) == 4


@pytest.mark.slow
def test_a_run_goes_on_over_another_mesh_with_the_same_tokens(fm, tiny, tmp_path):
    """Fault 20, checkpoints: a run goes on over another mesh.

    Promise: it sees the same tokens, and its losses agree to rounding.
    """
    # Under a constant rate, half a run is the first half of the whole.
    flags = [*tiny, "--config.schedule.name=constant", "--config.checkpoint.every=10"]
    flags += ["--config.schedule.warmup_fraction=0"]
    moved, whole = (Run(tmp_path / name) for name in ("moved", "whole"))
    for run, steps, extra, devices in (
        (whole, 20, [], "1"),
        (moved, 10, [], "1"),
        (moved, 20, ["--config.mesh.fsdp=2", "--config.mesh.data=2"], "4"),
    ):
        done = fm(
            "train", *flags, *extra, f"--workdir={run.path}",
            f"--config.train.steps={steps}", JAX_NUM_CPU_DEVICES=devices,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "'data': 2, 'fsdp': 2" in done.stderr
    assert moved.read_config()["history"][1]["changed"]["train.steps"] == [10, 20]
    for name in ("train/loss", "eval/loss", "final/loss"):
        steps, ours = whole.series(name)
        others, theirs = moved.series(name)
        assert steps == others
        np.testing.assert_allclose(ours, theirs, rtol=2e-4)


@pytest.mark.slow
def test_a_sharded_run_gives_the_losses_of_one_device(fm, tiny, finished, tmp_path):
    whole, _ = finished
    done = fm(
        "train", *tiny, f"--workdir={tmp_path / 'sharded'}", "--config.mesh.fsdp=4",
        JAX_NUM_CPU_DEVICES="8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("train/loss", "eval/loss", "final/loss"):
        steps, ours = whole.series(name)
        others, theirs = Run(tmp_path / "sharded").series(name)
        assert steps == others
        np.testing.assert_allclose(ours, theirs, rtol=2e-4)


@pytest.mark.slow
def test_a_run_cut_off_after_its_last_save_ends_with_the_same_row(
    fm, tiny, finished, tmp_path
):
    whole, _ = finished
    run = Run(tmp_path / "moved")
    shutil.copytree(whole.path, run.path)
    for name in ("DONE", "table.jsonl"):
        (run.path / name).unlink()
    done = fm("train", *tiny, f"--workdir={run.path}")
    assert done.returncode == 0, done.stderr
    assert "Going on from step 20" in done.stderr
    (ours,) = run.rows("table.jsonl")  # under its first name, whatever its folder
    *_, theirs = whole.rows("table.jsonl")
    assert ours | {"wall_seconds": theirs["wall_seconds"]} == theirs
    assert None not in (ours["train_loss"], ours["learning_rate_now"])


@pytest.mark.slow
def test_the_step_is_compiled_once(fm, tiny, tmp_path):
    flags = [*tiny, f"--workdir={tmp_path / 'run'}", "--config.train.compile_cache="]
    done = fm("train", *flags, JAX_LOG_COMPILES="1", JAX_COMPILATION_CACHE_DIR="")
    assert done.returncode == 0, done.stderr
    compiled = [
        line for line in done.stderr.splitlines()
        if "Finished XLA compilation of jit(train_step)" in line
    ]  # fmt: skip
    assert len(compiled) == 1


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(
    fm, tiny, environment, tmp_path
):
    """Fault 15, checkpoints: a save finds the disk full.

    Promise: the run ends at the next step, says which folder, and exits 2; the
    checkpoint before it stays.
    """
    flags = [*tiny, f"--workdir={tmp_path / 'run'}", "--config.model.mlp_dim=1024"]
    assert fm("train", *flags).returncode == 0
    before = _leaves(tmp_path / "run", 20)
    code = (
        "import resource, signal, sys\n"
        "from fm_jax import cli\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *flags, "--config.train.steps=4000",
         "--config.checkpoint.every=25"],
        env=environment | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "fm: the disk must have room for a checkpoint; got none under"
    )
    assert "Traceback" not in done.stderr
    assert Run(tmp_path / "run").series("train/loss")[0][-1] < 50
    after = _leaves(tmp_path / "run", 20)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert "the disk must have room" in (tmp_path / "run" / "FAILED").read_text()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(fm, tiny, tmp_path):
    flags = [*tiny, f"--workdir={tmp_path / 'run'}", "--config.checkpoint.every=1"]
    done = fm(
        "train", *flags, "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.clip_norm=0",
    )  # fmt: skip
    assert done.returncode == 76, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "must stay finite; got" in last
    step = int(last.split("at step ")[1].split(".")[0])
    run = Run(tmp_path / "run")
    assert all(saved < step for saved in Checkpoints(run.checkpoints).steps())
    assert "must stay finite" in (run.path / "FAILED").read_text()
    assert all(np.isfinite(v) for v in run.series("train/loss")[1])


def test_a_held_out_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
    fm, tiny, tmp_path
):
    # The loss of the first step is that of the first weights; the update breaks them.
    for name, flags in {
        "evaluated": ["--config.eval.every=1"],
        "saved": ["--config.eval.every=0"],
    }.items():
        run = Run(tmp_path / name)
        done = fm(
            "train", *tiny, *flags, f"--workdir={run.path}", "--config.train.steps=2",
            "--config.checkpoint.every=1", "--config.optimizer.learning_rate=1e38",
        )  # fmt: skip
        assert done.returncode == 76, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("fm: the held-out loss must stay finite; got nan at ")
        assert "at step 1." in last
        assert Checkpoints(run.checkpoints).steps() == []
        assert "the held-out loss must" in (run.path / "FAILED").read_text()
        assert "NaN" not in (run.path / "metrics.jsonl").read_text()
        (row,) = run.rows("table.jsonl")
        assert (row["status"], row["step"], row["loss"]) == ("diverged", 1, None)
        assert row["train_loss"] == run.series("train/loss")[1][0]


def _train_in_gigabytes(limit, environment, *flags):
    """Return the finished process of a run that may map so much memory."""
    code = (
        "import resource, sys\n"
        "from fm_jax import cli\n"
        "limit = int(sys.argv[1]) * 10**9\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.exit(cli.main(sys.argv[2:]))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(limit), "train", *flags],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_a_step_that_memory_does_not_hold_ends_in_the_table_of_what_it_needs(
    environment, tiny, tmp_path
):
    """Fault 34, numbers: a step needs more memory than there is.

    Promise: exit 1 with the table of what needs it.
    """
    run = Run(tmp_path / "run")
    # The limit leaves room for any number of threads; the step needs a lot more.
    done = _train_in_gigabytes(
        16, environment, *tiny, f"--workdir={run.path}",
        "--config.train.batch_size=8192", "--config.model.mlp_dim=16384",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    first, *rows, last = done.stderr.split("fm: ")[1].splitlines()
    assert re.fullmatch(
        r"out of memory \(RESOURCE_EXHAUSTED: Out of memory allocating \d+ bytes\.\)\. "
        "What one device needs:",
        first,
    )
    assert [row.rsplit(maxsplit=2)[0].strip() for row in rows] == [
        "parameters",
        "optimizer",
        "batch",
        "gradients",
        "activations and the rest",
        "a device in all",
    ]
    short = int(re.search(r"allocating (\d+) bytes", first)[1])
    in_all, unit = rows[-1].split()[-2:]
    assert unit == "GB"
    assert float(in_all) * 1e9 == pytest.approx(short, rel=0.01)
    assert last == "fm plan with the same --config flags searches for what fits."
    assert run.path.joinpath("FAILED").read_text() == "\n".join(
        [f"OutOfMemoryError: {first}", *rows, last, ""]
    )
    assert run.done_step() == 0


def test_a_model_that_memory_does_not_hold_ends_in_the_table_of_its_state(
    environment, tiny, tmp_path
):
    run = Run(tmp_path / "run")
    done = _train_in_gigabytes(
        6, environment, *tiny, f"--workdir={run.path}",
        "--config.model.mlp_dim=8388608",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[-2:] == [
        "  and gradients and activations: the step was not compiled",
        "fm plan with the same --config flags searches for what fits.",
    ]
    # Up and down of two layers, and two moments, in float32; the rest is small.
    state = 4 * 3 * 2 * 2 * 16 * 8_388_608
    assert lines[-3].split()[:-2] == ["a", "device", "in", "all"]
    assert lines[-3].endswith(f" {state / 1e9:.3g} GB")
    assert lines[-7].startswith("fm: out of memory (RESOURCE_EXHAUSTED: ")
    assert "the step was not compiled" in (run.path / "FAILED").read_text()


def test_waiting_for_data_is_counted(finished):
    run, _ = finished
    seconds = {
        key: value for row in run.rows() for key, value in row.items()
        if key.startswith("time/")
    }  # fmt: skip
    assert {
        "time/wait_for_data_seconds",
        "time/train_seconds",
        "time/eval_seconds",
        "time/checkpoint_seconds",
        "time/compile_seconds",
    } <= seconds.keys()


def test_json_lines_are_objects_with_a_step(finished):
    run, _ = finished
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line)["step"], int)


# ---- a source whose best possible loss is known

SYNTHETIC = [
    "--config.data.source=synthetic",
    "--config.data.tokenizer=symbols",
    "--config.synthetic.num_symbols=19",
    "--config.synthetic.mean_length=30",
    "--config.synthetic.num_tokens=6000",
    "--config.synthetic.num_eval_tokens=3000",
    "--config.sample.prompt=$%",
]


@pytest.fixture(scope="module")
def synthetic(fm, tiny, tmp_path_factory) -> tuple[Run, str]:
    """Return a run of sixty steps on symbols, and what it printed."""
    path = tmp_path_factory.mktemp("runs") / "synthetic"
    flags = ["--config.synthetic.kind=hmm", "--config.train.steps=60"]
    done = fm("train", *tiny, *SYNTHETIC, *flags, f"--workdir={path}")
    assert done.returncode == 0, done.stderr
    return Run(path), done.stderr


def test_nothing_is_compiled_again_after_the_first_step(finished):
    run, printed = finished
    assert "first step after" in printed
    assert "after the first step" not in (run.path / "log.txt").read_text()


def test_a_run_on_a_known_source_stands_above_the_best_possible_loss(synthetic):
    run, printed = synthetic
    for split, count in (("eval", 6), ("final", 1)):
        loss, best, excess, error, spread = (
            run.series(f"{split}/{name}")[1]
            for name in ("loss", "bayes_loss", "excess_loss", "excess_se", "loss_se")
        )
        assert len(loss) == len(error) == len(spread) == count
        np.testing.assert_allclose(np.subtract(loss, best), excess, rtol=1e-9)
        assert min(excess) > 0.02
        assert excess[-1] > 5 * error[-1]
        assert len(set(best)) == 1  # the same windows each time
    _, excess = run.series("eval/excess_loss")
    assert excess[-1] < excess[0] - 0.1
    assert "nats/token above the best that any model can reach" in printed
    assert "a sample, going on from '$%'" in printed
    assert "--prompt='$%'" in printed
    assert "WARNING" not in printed
    assert "entropy rate" not in printed  # of an hmm there is no closed form
    assert "held-out above it (nats/token)" in (run.path / "report.html").read_text()


def test_the_entropy_rate_of_one_markov_chain_is_told_before_training(
    fm, tiny, tmp_path
):
    path = tmp_path / "run"
    flags = [*tiny, *SYNTHETIC, "--config.train.steps=1", f"--workdir={path}"]
    done = fm("train", *flags)
    assert done.returncode == 0, done.stderr
    (line,) = (x for x in done.stderr.splitlines() if x.startswith("data    "))
    source = synthetic_text.make(**Run(path).read_config()["config"]["synthetic"])
    rate = source.chain.entropy_rate()
    assert line.endswith(f"; entropy rate {rate:.4f} nats/token")


def test_the_best_possible_loss_is_that_of_all_the_held_out_text(synthetic):
    run, _ = synthetic
    source = synthetic_text.make(**run.read_config()["config"]["synthetic"])
    end, nats, tokens = source.chain.end_id, 0.0, 0
    # Rows of 16 cut the stream: the same is done here by hand, from the text alone.
    letters = {chr(c): i for i, c in enumerate(synthetic_text.alphabet(19))}
    stream = [end]
    policy = {"on_bad_text": "error", "max_document_bytes": 1 << 30}
    for text in sources.documents(source, "eval", **policy):
        stream += [*(letters[c] for c in text), end]
    for start in range(0, len(stream) - 1, 16):
        row = np.array([stream[start : start + 17]])
        ones = np.ones((1, row.shape[1] - 1))
        nats += source.chain.bayes_nll(row[:, :-1], row[:, 1:], ones).sum()
        tokens += ones.size
    assert run.series("final/tokens")[1] == [tokens]
    assert run.series("final/bayes_loss")[1][0] == pytest.approx(nats / tokens)


def test_evaluating_again_gives_the_same_excess(fm, synthetic):
    run, _ = synthetic
    done = fm("eval", f"--run={run.path}")
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    for name in ("loss", "bayes_loss", "excess_loss"):
        expected = run.series(f"final/{name}")[1][0]
        assert float(found[name]) == pytest.approx(expected, rel=1e-4), name
    assert "WARNING" not in done.stderr


def test_a_loss_below_the_best_is_said_loudly():
    said = []
    measured = HeldOut(None, None, None, None, None, None, said.append)
    numbers = {"loss": 1.9, "bayes_loss": 2.0, "excess_loss": -0.1, "excess_se": 0.001}
    row = measured.row("final", numbers | {"tokens": 1000.0})
    assert row["final/excess_loss"] == -0.1
    (line,) = said
    assert line.startswith("WARNING: the held-out loss must not be below the source's")
    above = numbers | {"loss": 2.1, "excess_loss": 0.1, "tokens": 1000.0}
    measured.row("final", above)
    assert len(said) == 1
