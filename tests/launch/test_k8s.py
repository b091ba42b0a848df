"""Tests of launch/k8s: the manifests hold, and the check sees where one does not."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

from fm_jax import cli, errors, flags, watch
from fm_jax import config as configs

pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not here")
ROOT = pathlib.Path(__file__).parents[2]
K8S = ROOT / "launch" / "k8s"
MANIFESTS = sorted(K8S.glob("*.yaml"))
GPU, TPU, SWEEP = "jobset-gpu.yaml", "jobset-tpu.yaml", "sweep.yaml"


@pytest.fixture(scope="module")
def validate():
    """Return launch/k8s/validate.py as a module."""
    spec = importlib.util.spec_from_file_location("validate", K8S / "validate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _job(manifest):
    """Return the one Job of a manifest, and the spec of its pods."""
    if manifest["kind"] == "JobSet":
        (replicated,) = manifest["spec"]["replicatedJobs"]
        manifest = replicated["template"]
    return manifest["spec"], manifest["spec"]["template"]["spec"]


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.name)
def manifest(request, validate):
    """Return each of the manifests in turn."""
    (found,) = validate.read(request.param)
    return found


def test_there_are_manifests_for_gpus_for_tpus_and_for_a_sweep():
    assert [path.name for path in MANIFESTS] == [GPU, TPU, SWEEP]


def test_a_manifest_has_no_problem(manifest, validate):
    assert list(validate.problems(manifest)) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        # What the schema of Kubernetes says.
        (GPU, "backoffLimit:", "backofLimit:", "'backofLimit' was unexpected"),
        (GPU, "parallelism: 2", "parallelism: two", "parallelism: 'two' is not of"),
        (GPU, "fsGroup: 1000", "fsGroups: 1000", "'fsGroups' was unexpected"),
        (TPU, "{medium: Memory}", "{medum: Memory}", "'medum' was unexpected"),
        (TPU, "metadata:", "metadata: {lables: {}}\n_:", "_: the field must be one of"),
        (TPU, "name: fm-train", "lables: {}", "metadata: Additional properties are"),
        (SWEEP, "maxFailedIndexes: 20", "maxFailed: 20", "'maxFailed' was unexpected"),
        (SWEEP, "operator: In, ", "", "'operator' is a required property"),
        (SWEEP, "kind: Job", "kind: Jib", "the manifest must be of a kind of"),
        (SWEEP, "batch/v1", "batch/v9", "the manifest must be of a kind of"),
        # What JobSet says.
        (GPU, "maxRestarts: 20", "maxRestart: 20",
         "spec.failurePolicy.maxRestart: the field must be one of the known names; "
         "got 'maxRestart'. Did you mean 'maxRestarts'?"),
        (GPU, "maxRestarts: 20", "maxRestarts: '20'",
         "spec.failurePolicy.maxRestarts must be of type int; got '20'"),
        (GPU, "replicas: 1", "replicas: true",
         "spec.replicatedJobs.0.replicas must be of type int; got True"),
        (GPU, "FailJobSet", "Fail",
         "spec.failurePolicy.rules.0.action must be FailJobSet or RestartJob or"),
        (GPU, "{name: final, ", "{", "spec.failurePolicy.rules.0.name must be given"),
        (GPU, "enableDNSHostnames: true", "enableDNSHostnames: 1",
         "spec.network.enableDNSHostnames must be of type bool; got 1"),
        (TPU, "v1alpha2", "v1beta7", "apiVersion must be jobset.x-k8s.io/v1alpha2"),
        (TPU, "[PodFailurePolicy]", "PodFailurePolicy",
         "onJobFailureReasons must be a list; got 'PodFailurePolicy'"),
        (TPU, "  network: {", "  network: []\n  suspend: {",
         "spec.network must be a mapping; got []"),
        # What a run of ours asks for.
        (GPU, "GracePeriodSeconds: 150", "GracePeriodSeconds: 120",
         "terminationGracePeriodSeconds must be at least 135, for fm train takes up "),
        (GPU, "--workdir=", "--grace=140, --workdir=", "must be at least 155"),
        (SWEEP, "      terminationGracePeriodSeconds: 150", "", "save; got 30"),
        (GPU, "values: [2, 76]", "values: [2]",
         "podFailurePolicy: exit status 76 must end the job"),
        (GPU, "values: [2, 76]", "values: [1, 2, 76]",
         "podFailurePolicy: exit status 1 must start the run again"),
        (SWEEP, "values: [1, 2, 76]", "values: [2, 76]",
         "podFailurePolicy: exit status 1 must end the job"),
        (SWEEP, "values: [1, 2, 76]", "values: [1, 2, 75, 76]",
         "podFailurePolicy: exit status 75 must start the run again"),
        (TPU, "operator: In,", "operator: NotIn,",
         "podFailurePolicy: exit status 137 must start the run again"),
        (TPU, "action: FailJob\n", "action: Ignore\n",
         "podFailurePolicy: exit status 2 must end the job"),
        (TPU, "containerName: train", "containerName: tran",
         "containerName must be train; got 'tran'"),
        (GPU, "completions: 2", "completions: 3", "parallelism and completions must"),
        (GPU, 'value: "2"', 'value: "3"',
         "FM_NUM_PROCESSES must be completions, 2; got 3"),
        (GPU, "name: fm-train}", "name: fm-second}",
         "FM_COORDINATOR must be fm-second-node-0-0.fm-second:PORT; got fm-train-node"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)  # fmt: skip
def test_a_manifest_that_is_wrong_is_told(name, old, new, told, validate, tmp_path):
    text = (K8S / name).read_text()
    assert old in text
    path = tmp_path / name
    path.write_text(text.replace(old, new, 1))
    (changed,) = validate.read(path)
    assert any(told in line for line in validate.problems(changed))


def test_the_final_statuses_are_those_of_the_errors():
    """The manifests' numbers, from the places that give them to a process."""
    mistake = errors.exit_status(errors.UserError("x"))
    diverged = errors.exit_status(errors.DivergedError("loss", float("nan"), 3))
    other = errors.exit_status(RuntimeError("x"))
    stopped = errors.exit_status(errors.StoppedError(3))
    assert other == cli.EXIT_FAILURE
    for name in (GPU, TPU, SWEEP):
        policy = (K8S / name).read_text().partition("podFailurePolicy:")[2]
        final = {mistake, diverged} | ({other} if name == SWEEP else set())
        assert f"values: {sorted(final)}" in policy
        for again in (stopped, watch.EXIT_STOPPED, watch.EXIT_HUNG):
            assert again not in final
            assert str(again) in policy  # the comment tells those that start again


def test_the_words_of_a_manifest_are_ones_that_fm_takes(manifest):
    (container,) = _job(manifest)[1]["containers"]
    assert "command" not in container  # the image's entry point is launch/local.sh
    assert container["args"][0] == "fm"
    name, rest = cli.named(container["args"][1:])
    if name == "sweep" and rest[:1] == ["run"]:
        pytest.skip("fm sweep run is not there yet")
    parsed, raw = flags.parse(cli.COMMANDS[name], rest)
    if name == "train":
        configs.check(raw)
        assert parsed.workdir.startswith("/ckpt/")
        assert raw["data"]["cache_dir"].startswith("/ckpt/")


def test_a_pod_runs_as_the_images_user_and_keeps_its_secrets(manifest):
    _, pod = _job(manifest)
    assert pod["securityContext"]["runAsNonRoot"] is True
    dockerfile = (ROOT / "launch" / "Dockerfile").read_text()
    assert f"--uid {pod['securityContext']['runAsUser']} " in dockerfile
    (container,) = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    secrets = [e for e in container["env"] if not e["name"].startswith("FM_")]
    assert secrets
    for each in secrets:
        assert each["valueFrom"]["secretKeyRef"]["optional"] is True


def test_gpus_are_told_who_they_are_and_tpus_find_it_out(validate):
    (gpu,), (tpu,) = (validate.read(K8S / name) for name in (GPU, TPU))
    names = [
        {e["name"] for e in _job(each)[1]["containers"][0]["env"] if "FM_" in e["name"]}
        for each in (gpu, tpu)
    ]
    assert names == [{"FM_COORDINATOR", "FM_NUM_PROCESSES", "FM_PROCESS_ID"}, set()]
    limits = _job(tpu)[1]["containers"][0]["resources"]["limits"]
    assert limits.keys() == {"google.com/tpu"}
    assert _job(tpu)[1]["nodeSelector"].keys() == {
        "cloud.google.com/gke-tpu-accelerator",
        "cloud.google.com/gke-tpu-topology",
    }


def test_the_fields_of_the_table_refer_to_each_other(validate):
    for fields in validate.JOBSET.values():
        for wanted in fields.values():
            inner = wanted[0] if isinstance(wanted, list) else wanted
            assert not isinstance(inner, str) or inner in validate.JOBSET


# ---- as a program


def _run(*arguments, **kwargs):
    command = [sys.executable, K8S / "validate.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, **kwargs
    )


def test_the_program_is_silent_where_all_is_well():
    done = _run(*MANIFESTS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_program_tells_each_problem_in_a_line_and_ends_with_2(tmp_path):
    bad, twice, empty = (tmp_path / f"{name}.yaml" for name in ("bad", "twice", "no"))
    text = (K8S / GPU).read_text()
    bad.write_text(text.replace("replicas:", "replica:").replace("rules:", "rule:", 1))
    twice.write_text("kind: Job\nkind: JobSet\n")
    empty.write_text("# nothing\n")
    done = _run(bad, twice, empty, tmp_path / "nowhere", K8S / SWEEP)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 5)
    assert lines[0].startswith(f"{bad}: spec.failurePolicy.rule: the field must be one")
    assert lines[1].startswith(f"{bad}: spec.replicatedJobs.0.replica: the field must")
    assert lines[2].startswith(
        f"{twice} must be a file of YAML; got the key 'kind' sta"
    )
    assert lines[3] == f"{empty} must have a manifest in it; got none."
    assert lines[4].startswith(f"{tmp_path}/nowhere must be a file of YAML; got [Errno")


def test_the_program_says_what_it_wants_without_files():
    done = _run()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "files must be given" in done.stderr


def test_the_program_names_the_package_where_it_is_missing(tmp_path):
    (tmp_path / "kubernetes_validate.py").write_text("raise ImportError\n")
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); "
    code += f"sys.argv = ['x', 'y']; runpy.run_path({str(K8S / 'validate.py')!r}, "
    code += "run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the package kubernetes-validate must be installed; got none" in done.stderr
