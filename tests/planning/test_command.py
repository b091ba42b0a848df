"""Tests of `fm plan` as people run it: what it prints, and what it refuses."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
from tokenizers import Tokenizer, models

from fm_jax import accelerators, cli, flags
from fm_jax import config as configs
from fm_jax.commands.listed import COMMANDS
from fm_jax.models import counts
from fm_jax.planning import command, search, show
from fm_jax.planning import plan as plans
from fm_jax.prepare import opened

ROOT = pathlib.Path(__file__).parent.parent.parent
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for TPUs needs libtpu: pip install 'fm_jax[tpu]'",
)
SMALL = [
    f"--config={ROOT}/configs/quickstart.py",
    "--config.data.source=text",
    "--config.data.paths=('not-there.txt',)",
    "--config.data.tokenizer=bytes",
    "--config.data.max_length=32",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.embed_dim=24",
    "--config.model.mlp_dim=40",
    "--config.train.batch_size=16",
    "--config.train.steps=30",
    "--config.eval.batch_size=8",
]
VOCAB = 320  # 257 ids of bytes, in whole 64s
TOPOLOGIES = [
    pytest.param("v5e:2x2", marks=needs_libtpu), "cpu:8", "h100:8", ""
]  # fmt: skip


@pytest.fixture(scope="module")
def fm():
    """Return `fm(*arguments, **environment)`: the finished process of `fm plan`."""
    ours = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax")}

    def run(*arguments, **extra):
        return subprocess.run(
            [sys.executable, "-m", "fm_jax.cli", "plan", *SMALL, *arguments],
            env=os.environ | ours | {"JAX_PLATFORMS": "cpu"} | extra,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def record(fm):
    """Return `record(topology)`: what `fm plan --json --mfu=0.25` says of it."""
    known = {}

    def of(topology):
        if topology not in known:
            done = fm(f"--topology={topology}", "--mfu=0.25", "--json")
            assert done.returncode == 0, done.stderr
            known[topology] = json.loads(done.stdout)
        return known[topology]

    return of


def _config(*arguments) -> configs.Config:
    _, raw = flags.parse(COMMANDS["plan"], [*SMALL, *arguments])
    config, known = plans.corpus_of(configs.check(raw))
    assert known is None
    return config


def _chip(topology):
    return accelerators.CHIPS.get(topology.split(":")[0])


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_record_says_machine_model_and_steps(record, topology):
    found = record(topology)
    devices = {"v5e:2x2": 4, "cpu:8": 8, "h100:8": 8, "": 1}[topology]
    assert found["machine"] == (topology or "1 cpu")
    assert found["devices"] == devices
    assert found["mesh"] == ({"data": devices} if devices > 1 else {})
    assert found["params"] == vars(counts.params(_config().model))
    assert found["vocab_size"] == VOCAB
    sizes = [found[name] for name in ("steps", "batch_size", "length", "tokens")]
    assert sizes == [30, 16, 32, 30 * 16 * 32]
    assert (found["micro_batches"], found["remat"]) == (1, "none")
    assert found["epochs"] is None


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_record_counts_the_work_in_three_ways(record, topology):
    flops, model = record(topology)["flops_per_step"], _config().model
    assert flops["6n"] == 16 * 32 * 6 * counts.params(model).total
    assert flops["exact"] == 16 * 32 * counts.flops_per_token(model, 32)
    # The program makes whole squares of scores where half of them are masked, and once
    # more in the backward pass.
    whole = flops["exact"] + 16 * 32 * 3 * 4 * 24 * 2 * (32 - (32 + 1) / 2)
    whole += 16 * 32 * 2 * 24 * 2 * 32
    assert flops["exact"] <= flops["compiled"] <= 1.02 * whole


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_parts_of_the_memory_are_all_that_is_needed(record, topology):
    memory, params = record(topology)["memory"], counts.params(_config().model)
    parts = [memory[part] for part in show.MEMORY_PARTS if part != "host"]
    assert sum(parts) == memory["needed"]
    assert memory["params"] == 4 * params.total
    # Two moments, and counts of steps.
    assert 0 <= memory["optimizer"] - 8 * params.total <= 64
    devices = record(topology)["devices"]
    assert memory["batch"] == 16 * 32 * 6 * 4 // devices
    chip = _chip(topology)
    assert memory["capacity"] == (chip.usable_hbm_bytes if chip else None)
    assert memory["fits"]
    assert memory["is_cpu_estimate"] == (topology == "h100:8")


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_replicas_say_their_gradients_and_one_device_says_nothing(record, topology):
    found = record(topology)
    if found["devices"] == 1:
        assert found["collectives"] == []
        return
    (said,) = found["collectives"]
    assert (said["kind"], said["axes"]) == ("all-reduce", ["data"])
    gradients = found["memory"]["params"]
    assert gradients <= said["bytes"] <= 1.05 * gradients
    assert not said["crosses_slices"]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_times_are_those_of_the_published_peak(record, topology):
    found, chip = record(topology), _chip(topology)
    if chip is None:
        assert not {"at_mfu", "roofline"} & found.keys()
        return
    peak = found["devices"] * chip.flops["bfloat16"]
    at_mfu, roofline = found["at_mfu"], found["roofline"]
    exact = found["flops_per_step"]["exact"]
    assert at_mfu["mfu"] == 0.25
    assert at_mfu["step_seconds"] == pytest.approx(exact / peak / 0.25)
    for times in (at_mfu, roofline):
        assert times["mfu"] == pytest.approx(exact / peak / times["step_seconds"])
        rate = times["tokens_per_second"]
        assert rate == pytest.approx(16 * 32 / times["step_seconds"])
        assert times["hours"] == pytest.approx(found["tokens"] / rate / 3600)
    alone = {n: roofline[f"{n}_seconds"] for n in ("compute", "memory", "network")}
    compiled = found["flops_per_step"]["compiled"]
    assert alone["compute"] == pytest.approx(compiled / peak)
    wire = sum(said["wire_bytes"] for said in found["collectives"])
    assert alone["network"] == pytest.approx(wire / chip.link_bytes_per_second)
    # The compiler for CPUs says nothing of a GPU's traffic with its memory.
    assert (alone["memory"] is None) == (topology == "h100:8")
    slowest = max(seconds for seconds in alone.values() if seconds is not None)
    assert roofline["step_seconds"] == slowest


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_checkpoint_is_the_state_once(record, topology):
    found = record(topology)
    memory, saved = found["memory"], found["checkpoint"]
    # Of replicas each holds all of it, and one of a host's devices writes it.
    assert saved["bytes"] == memory["params"] + memory["optimizer"]
    assert saved["host_bytes"] == saved["bytes"]


def test_a_host_of_a_cut_state_holds_its_devices_parts(fm):
    done = fm("--topology=h100:16", "--config.mesh.preset=fsdp", "--json",
              "--config.eval.batch_size=16", "--config.model.embed_dim=32")  # fmt: skip
    found = json.loads(done.stdout)
    memory, saved = found["memory"], found["checkpoint"]
    assert found["mesh"] == {"fsdp": 16}
    held = 8 * (memory["params"] + memory["optimizer"])
    assert saved["host_bytes"] == held < saved["bytes"]


@pytest.mark.parametrize("topology", ["h100:8", "cpu:8"])
def test_the_text_is_that_of_the_record(fm, record, topology):
    done = fm(f"--topology={topology}", "--mfu=0.25")
    assert (done.returncode, done.stderr) == (0, "")
    *shown, compiled = done.stdout.splitlines()
    assert shown == show.lines(record(topology))[:-1]
    assert compiled.startswith("compiled  in ")


def test_tokens_per_param_needs_no_corpus_and_epochs_need_its_size(fm):
    arguments = ("--topology=cpu:1", "--json", "--config.train.steps=0")
    done = fm(*arguments, "--config.train.tokens_per_param=2")
    found = json.loads(done.stdout)
    wanted = 2 * found["params"]["total"] / (16 * 32)
    assert wanted <= found["steps"] < wanted + 1
    done = fm(*arguments, "--config.train.epochs=3", "--corpus_tokens=5120")
    found = json.loads(done.stdout)
    assert (found["steps"], found["epochs"]) == (30, 3.0)


def test_the_corpus_that_is_prepared_gives_its_size(tmp_path, fm, monkeypatch):
    # Where SMALL looks for it.
    (tmp_path / "not-there.txt").write_text("one cat and another cat " * 60)
    other = tmp_path / "b.txt"
    other.write_text("a mat " * 70)
    arguments = [
        f"--config.data.eval_paths=('{other}',)",
        f"--config.data.cache_dir={tmp_path}",
    ]
    monkeypatch.chdir(tmp_path)
    _, raw = flags.parse(COMMANDS["plan"], [*SMALL, *arguments])
    data = opened.open_data(configs.check(raw), lambda line: None)
    done = fm(*arguments, "--topology=cpu:1", "--json", "--config.train.steps=0",
              "--config.train.epochs=2")  # fmt: skip
    found = json.loads(done.stdout)
    targets = data.train.num_targets
    assert found["steps"] == -(-2 * targets // (16 * 32))
    assert found["epochs"] == pytest.approx(found["tokens"] / targets)


def test_a_tokenizer_file_gives_its_ids_before_a_corpus_is_prepared(tmp_path):
    vocab = {"<|endoftext|>": 700} | {chr(97 + i): i for i in range(26)}
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(path))
    config = _config(f"--config.data.tokenizer={path}")
    assert config.model.vocab_size == 704  # 701 in whole 64s


# ---- instead of the plan


def test_sharding_lists_every_parameter_and_its_bytes(fm):
    arguments = ["--topology=cpu:8", "--config.mesh.preset=fsdp_tensor"]
    done = fm(*arguments, "--show=sharding")
    assert (done.returncode, done.stderr) == (0, "")
    header, *rows, last = [line.split() for line in done.stdout.splitlines()]
    assert header[:2] == ["parameter", "shape"]
    found = {row[0]: row[1:] for row in rows}
    total = counts.params(_config().model).total
    sizes = {name: _product(row[0]) for name, row in found.items()}
    assert sum(sizes.values()) == total
    assert found["embedding"] == [f"{VOCAB}x24", "vocab,embed", "tensor,fsdp", "3,840"]
    assert found["final_norm/scale"] == ["24", "embed_vector", "-", "96"]
    key = found["blocks/attention/key/kernel"]
    axes = "layers,embed,kv_heads,head_dim"
    assert key == ["2x24x2x12", axes, "-,fsdp,tensor,-", "576"]
    held = [int(row[-1].replace(",", "")) for row in found.values()]
    assert last == ["all", f"{sum(held):,}"]
    memory = json.loads(fm(*arguments, "--json").stdout)["memory"]
    assert memory["params"] == sum(held) < 4 * total


def _product(shape: str) -> int:
    product = 1
    for dim in shape.split("x"):
        product *= int(dim)
    return product


@pytest.mark.slow
def test_activations_grow_with_rows_and_length_and_shrink_when_made_again(
    capsys, monkeypatch
):
    # One device, and the two policies that bound the others.
    monkeypatch.setattr(command, "POLICIES", ("none", "full"))
    given = [
        "--topology=cpu:8", "--show=activations", "--config.data.max_length=128",
        "--config.model.num_layers=4",
    ]  # fmt: skip
    parsed, raw = flags.parse(COMMANDS["plan"], [*SMALL, *given])
    command.run(configs.check(raw), parsed)
    said, header, *rows = capsys.readouterr().out.splitlines()
    assert said.startswith("activations and the rest")
    columns = ["remat", "1 x 32", "1 x 64", "1 x 128", "2 x 128", "4 x 128"]
    assert _cells(header) == columns
    table = {cells[0]: [*map(_bytes, cells[1:])] for cells in map(_cells, rows)}
    assert list(table) == ["none", "full"]
    for sizes in table.values():
        assert sizes == sorted(sizes)
        assert sizes[-1] > 1.5 * sizes[-2] > 2 * sizes[-3]
    assert table["full"][-1] < 0.7 * table["none"][-1]


@pytest.mark.parametrize(
    "length, context, lengths", [(3, 1, [1, 1, 3]), (20, 2, [4, 8, 20])]
)
def test_activations_are_asked_for_in_lengths_that_the_mesh_can_cut(
    capsys, monkeypatch, length, context, lengths
):
    asked = []

    def make(config, machine, corpus):
        asked.append(config)
        return types.SimpleNamespace(estimate=None, bytes_needed=3e12)

    monkeypatch.setattr(plans, "make", make)
    given = [
        "--topology=cpu:8", "--show=activations", "--config.mesh.preset=fsdp",
        f"--config.data.max_length={length}", f"--config.mesh.context={context}",
    ]  # fmt: skip
    parsed, raw = flags.parse(COMMANDS["plan"], [*SMALL, *given])
    command.run(configs.check(raw), parsed)
    per_policy = asked[: len(asked) // len(command.POLICIES)]
    assert [one.data.max_length for one in per_policy] == [*lengths, length, length]
    groups = 8 // context
    rows = [one.train.batch_size // groups for one in per_policy]
    assert rows == [1, 1, 1, 2, 4]
    assert {one.model.remat for one in asked} == set(command.POLICIES)
    assert "over 3 TB in all" in capsys.readouterr().out


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def _bytes(shown: str) -> float:
    number, unit = shown.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


# ---- what does not fit


# Replicas of 13 GB of weights and twice as much of moments, that four chips can share.
BIG = ("--topology=v5e:2x2", "--config.model.num_layers=24",
       "--config.model.num_heads=1", "--config.model.head_dim=128",
       "--config.model.embed_dim=2048", "--config.model.mlp_dim=24576")  # fmt: skip


@needs_libtpu
def test_without_tries_it_is_only_said_by_how_much_a_device_is_too_small(fm):
    done = fm(*BIG, "--tries=0")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = [s for s in done.stdout.splitlines() if s.startswith("DOES NOT FIT")]
    capacity = accelerators.CHIPS["v5e"].usable_hbm_bytes
    shown = [_terabytes(part) for part in line.split(": needs ")[1].split(" of ")]
    needed, there = shown[0], _terabytes(line.split(" of ")[1])
    assert there == pytest.approx(capacity / 1e12, rel=0.01)
    assert line.endswith(" too much")
    over = _terabytes(line.rsplit(", ", maxsplit=1)[1])
    assert over == pytest.approx(needed - there, rel=0.01)
    assert "This fits" not in done.stdout
    assert "roofline" not in done.stdout
    total = counts.params(_config(*BIG).model).total
    (line,) = [s for s in done.stdout.splitlines() if s.startswith("  params ")]
    assert _terabytes(line.split(maxsplit=1)[1]) == pytest.approx(4e-12 * total, 0.01)


def _terabytes(text: str) -> float:
    number, unit = text.split()[:2]
    return float(number) * {"MB": 1e-6, "GB": 1e-3, "TB": 1}[unit]


@pytest.mark.slow
@needs_libtpu
def test_a_way_that_fits_is_searched_and_its_overrides_make_it_fit(fm):
    done = fm(*BIG, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["memory"]["fits"]
    assert "activations" not in found["memory"]
    other = found["instead"]
    assert other["memory"]["fits"]
    tried = [s for s in done.stderr.splitlines() if s.startswith("  tried ")]
    assert 1 <= len(tried) <= 6
    assert tried[-1].endswith(", fits")
    assert other["mesh"] == {"fsdp": 4}
    assert other["memory"]["params"] == pytest.approx(
        found["memory"]["params"] / 4, rel=1e-3
    )
    # What is printed makes that very config.
    printed = show.instead(found).removeprefix("This fits: ").split()
    given = dataclasses.replace(_config(*BIG, *printed), raw={})
    wanted = search.overridden(_config(*BIG), other["overrides"])
    assert given == dataclasses.replace(wanted, raw={})


# ---- misuse

REFUSED = {
    "an unknown chip": (["--topology=h10:8"], "Did you mean 'h100'"),
    "an unknown shape": (["--topology=v5e:3x3"], "Known: v5e:2x4, v5e:4x4"),
    "a mesh that does not match": (
        ["--topology=cpu:8", "--config.mesh.data=3"],
        "mesh must multiply to the 8 devices; got data=3.",
    ),
    "a batch that does not divide": (
        ["--topology=cpu:8", "--config.train.batch_size=12"],
        "must divide by data*fsdp*expert of the mesh; got 12 over 8. Nearest: 8 or 16.",
    ),
    "no MFU": (["--mfu=0"], "--mfu must be above 0 and at most 1; got 0.0."),
    "an MFU above the peak": (["--mfu=1.5"], "--mfu must be above 0 and at most 1"),
    "an unknown table": (["--show=nonsense"], "--show must be one of the known names"),
    "a table as JSON": (
        ["--show=sharding", "--json"], "--json must be without --show; got"
    ),
    "less than no tries": (["--tries=-1"], "--tries must be >= 0; got -1."),
    "no number of tokens": (["--corpus_tokens=nan"], "--corpus_tokens must be >= 0"),
    "epochs of an unknown corpus": (
        ["--topology=cpu:8", "--config.train.steps=0", "--config.train.epochs=2"],
        "Give --corpus_tokens, or set train.steps or train.tokens.",
    ),
    "a tokenizer that is not there": (
        ["--topology=cpu:8", "--config.data.tokenizer=not-there.json"],
        "data.tokenizer must be bytes, bpe or the path of a tokenizer.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_one_line_and_exit_status_2(capsys, mistake):
    arguments, said = REFUSED[mistake]
    assert cli.main(["plan", *SMALL, *arguments]) == cli.EXIT_MISTAKE
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("fm: ")
    assert said in line


def test_a_mistake_ends_a_real_process_without_a_traceback(fm):
    done = fm("--topology=cpu:6", "--config.mesh.data=4")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("fm: mesh must multiply to the 6 devices; got data=4.")


HIDES_LIBTPU = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def hidden(name, path=None, target=None):
    return None if name == "libtpu" else find(name, path, target)
PathFinder.find_spec = staticmethod(hidden)
"""


def test_a_missing_libtpu_is_one_line_and_exit_status_2(fm, tmp_path, monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    (tmp_path / "sitecustomize.py").write_text(HIDES_LIBTPU)
    done = fm("--topology=v5e:2x2", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "must find libtpu" in line
    assert "pip install 'fm_jax[tpu]'" in line
