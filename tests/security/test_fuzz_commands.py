"""What a command is given, in words and in its environment, made wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fm_jax import config as configs
from fm_jax import configfile, durations, flags
from fm_jax.cli import COMMANDS
from fm_jax.cluster import launchers
from fm_jax.commands import texts, verdicts
from tests.security import mutants

QUICKSTART = str(configfile.BASE.parent / "quickstart.py")
KEYS = sorted(configfile.flat(configfile.load(QUICKSTART).to_dict()))
WORDS = (
    "", " ", "0", "-1", "1e999", "nan", "inf", "9" * 5000, "0x10", "True", "()",
    "(", "('a',)", "((1,", "[[]]", "{}", "{'a': 1}", "None", "a.b", "../..", "~root",
    "__import__('os').getpid()", "open('/etc/passwd')", "lambda: 0", "(1,) * 10**9",
    "'a' * 10**9", "[0] * 10**9", "10**10**6", "(" * 500, "((" * 200 + "))" * 200,
    "f'{1}'", "\ud800", "\u202e", "é", "(('a', (1.5,)),)", "((5, (0.2, 0.8)),)",
    "http://a:b@c/d.txt", "latest@x", "runs/a@3",
)  # fmt: skip
WORD = st.one_of(st.sampled_from(WORDS), st.text(max_size=12))


def _parse(argv):
    raw = flags.parse(COMMANDS["train"], [f"--config={QUICKSTART}", *argv])[1]
    configs.check(raw)


def test_an_override_that_is_right_is_taken():
    _parse(["--config.model.num_layers=3", "--config.train.steps=5"])


@mutants.cases(400)
@given(pairs=st.lists(st.tuples(st.sampled_from(KEYS), WORD), max_size=2), end=WORD)
def test_any_override_is_taken_or_one_line(pairs, end):
    words = [f"--config.{key}={value}" for key, value in pairs]
    mutants.refused(_parse, words)
    mutants.refused(_parse, [*words, end])
    mutants.refused(_parse, [*words, f"--{end}"])


@mutants.cases(200)
@given(path=WORD)
def test_any_config_path_is_taken_or_one_line(path):
    mutants.refused(configfile.load, path)


MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1234.0;tcp://10.0.0.1,10.0.0.2:5000",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],cpu1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OURS = {
    "FM_COORDINATOR": "10.0.0.1:5000",
    "FM_NUM_PROCESSES": "4",
    "FM_PROCESS_ID": "3",
    "JOB_COMPLETION_INDEX": "2",
    "TPU_WORKER_HOSTNAMES": "a,b",
    "MEGASCALE_NUM_SLICES": "2",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "JAX_COORDINATOR_PORT": "1234",
}
ODD = st.sampled_from(
    ("-1", "0", "1", "4", "9" * 5000, "1e3", " 7", "٣", "²", "a" * 300, "a..b:1",
     "[", "gpu[", "gpu[1", "gpu[a-b]x", "host:99999", "host:-1", "x:" + "9" * 5000,
     "a\nb:1", "-h:5", "10.0.0.1", ",", "", "auto", "tcp6://[fe80::1%eth0]:5")
)  # fmt: skip


@pytest.mark.parametrize("environ", [MPI, SLURM, OURS], ids=["mpi", "slurm", "ours"])
def test_an_environment_that_is_right_is_found(environ):
    assert launchers.find("", 0, -1, environ).num_processes == 4


@mutants.cases(900)
@given(data=st.data())
def test_any_environment_is_a_cluster_or_one_line(data):
    environ = dict(data.draw(st.sampled_from((MPI, SLURM, OURS, MPI | OURS))))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted({**MPI, **SLURM, **OURS})))
        if data.draw(st.integers(0, 3)) == 0:
            environ.pop(name, None)
        else:
            environ[name] = data.draw(st.one_of(ODD, st.text(max_size=8)))
    coordinator = data.draw(st.sampled_from(("", "", "auto", "a:1", ":", "x")))
    if mutants.refused(launchers.find, coordinator, 0, -1, environ):
        return
    found = launchers.find(coordinator, 0, -1, environ)
    if found is not None and found.coordinator != launchers.AUTO:
        host, _, port = found.coordinator.rpartition(":")
        assert 0 < int(port) < 2**16 and 0 <= found.process_id < found.num_processes
        host.strip("[]").encode("idna")  # else the resolver ends in its own error


@mutants.cases(300)
@given(
    raw=st.one_of(
        mutants.of_bytes(b'{"prompt": "a", "text": "b"}\n\n{"prompt": ""}\n'),
        mutants.of_json({"prompt": "a", "text": "b"}),
    )
)
def test_any_file_of_prompts_is_read_or_one_line(tmp_path_factory, raw):
    for name in ("prompts.jsonl", "prompts.txt"):
        file = tmp_path_factory.getbasetemp() / name
        file.write_bytes(raw)
        mutants.refused(texts.read_prompts, [], str(file))
        mutants.refused(verdicts.read_texts, [], str(file), "text")


@mutants.cases(200)
@given(seconds=st.floats(allow_nan=False, allow_infinity=False))
def test_any_seconds_are_a_clock(seconds):
    assert durations.clock(seconds)


@mutants.cases(300)
@given(
    duration=st.sampled_from(configfile.DURATIONS),
    value=st.one_of(st.floats(), st.integers(), st.sampled_from(mutants.VALUES)),
)
def test_any_duration_is_steps_or_one_line(duration, value):
    raw = configfile.load_base()
    raw["train"][duration] = value
    how = {"tokens_per_step": 1024, "corpus_tokens": 10**6, "num_params": 10**6}

    def resolve():
        assert 1 <= configs.resolve_steps(configs.check(raw).train, **how) < 2**63

    mutants.refused(resolve)


def test_values_of_overrides_are_never_run(tmp_path):
    file = tmp_path / "run"
    word = f"__import__('pathlib').Path('{file}').touch()"
    for key in KEYS:
        mutants.refused(_parse, [f"--config.{key}={word}"])
        mutants.refused(_parse, [f"--config.{key}=({json.dumps(word)}, {word})"])
    assert not file.exists()
