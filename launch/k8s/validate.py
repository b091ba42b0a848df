"""Check Kubernetes manifests: every field and type, and what a run of ours asks for.

    ./launch/local.sh python launch/k8s/validate.py FILE...

Prints a line for each problem; exit status 2 where there is one. Needs no cluster and
no network. Of a Job, or of a job within a JobSet, the schema tells its first problem.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fm_jax import cli, errors, watch
from fm_jax.commands.listed import COMMANDS

VERSION = "1.33"  # of Kubernetes: the first in which all that is used is stable
MARGIN_SECONDS = 15  # from the end of a grace to SIGKILL

# The fields that JobSet v1alpha2 has beside a Job's own; "!" marks those that must be
# given. A name is a mapping of that name, [x] a list of x, a set the values that are
# allowed, None what is checked elsewhere or is used by nobody here. Source:
# github.com/kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go
JOBSET = {
    "JobSet": {
        "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
        "kind!": {"JobSet"},
        "metadata!": None,
        "spec!": "Spec",
    },
    "Spec": {
        "replicatedJobs!": ["ReplicatedJob"],
        "network": "Network",
        "successPolicy": "SuccessPolicy",
        "failurePolicy": "FailurePolicy",
        "startupPolicy": None,
        "suspend": bool,
        "coordinator": "Coordinator",
        "managedBy": str,
        "ttlSecondsAfterFinished": int,
        "volumeClaimPolicies": None,
    },
    "ReplicatedJob": {
        "name!": str,
        "groupName": str,
        "template!": "Template",
        "replicas": int,
        "dependsOn": None,
    },
    "Template": {"metadata": None, "spec!": None},
    "Network": {
        "enableDNSHostnames": bool,
        "subdomain": str,
        "publishNotReadyAddresses": bool,
    },
    "SuccessPolicy": {"operator!": {"All", "Any"}, "targetReplicatedJobs": [str]},
    "FailurePolicy": {
        "maxRestarts": int,
        "restartStrategy": {"Recreate", "BlockingRecreate", "InPlaceRestart"},
        "rules": ["Rule"],
    },
    "Rule": {
        "name!": str,
        "action!": {
            "FailJobSet",
            "RestartJobSet",
            "RestartJobSetAndIgnoreMaxRestarts",
            "RestartJob",
            "RestartJobAndIgnoreMaxRestarts",
        },
        "onJobFailureReasons": [str],
        "onJobFailureMessagePatterns": [str],
        "targetReplicatedJobs": [str],
    },
    "Coordinator": {"replicatedJob!": str, "jobIndex": int, "podIndex": int},
}


def problems(manifest: Any) -> Iterator[str]:
    """Yield what is wrong with one manifest, a line each, with the path to it."""
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    if kind != "JobSet":
        found = list(_of_schema(manifest, ""))
        yield from found
        if kind == "Job" and not found:
            yield from _of_run(manifest["spec"], "spec", one_process=True)
        return
    found = list(_of_fields(manifest, "JobSet", ""))
    yield from found
    if found:
        return
    metadata = manifest["metadata"]
    yield from _of_schema(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}, ""
    )
    for index, replicated in enumerate(manifest["spec"]["replicatedJobs"]):
        path = f"spec.replicatedJobs.{index}.template."
        job = {"apiVersion": "batch/v1", "kind": "Job"} | replicated["template"]
        found = list(_of_schema(job, path))
        yield from found
        if not found:
            yield from _of_run(job["spec"], f"{path}spec", one_process=False)
            yield from _of_cluster(manifest, replicated, job["spec"], f"{path}spec")


def _of_schema(manifest: Any, path: str) -> Iterator[str]:
    import kubernetes_validate as kubernetes

    try:
        kubernetes.validate(manifest, VERSION, strict=True)
    except kubernetes.ValidationError as error:
        where = path + ".".join(map(str, error.absolute_path)) or "the manifest"
        yield f"{where}: {error.message[:300]}"
    except (kubernetes.SchemaNotFoundError, KeyError, TypeError, AttributeError):
        yield f"the manifest must be of a kind of Kubernetes {VERSION}, or a JobSet"


def _of_fields(value: Any, wanted: Any, path: str) -> Iterator[str]:
    """Yield where a value is not what the table says of it."""
    if wanted is None:
        return
    where = path or "the manifest"
    if isinstance(wanted, set):
        if value not in wanted:
            yield f"{where} must be {' or '.join(sorted(wanted))}; got {value!r}"
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            yield f"{where} must be a list; got {value!r}"
            return
        for index, item in enumerate(value):
            yield from _of_fields(item, wanted[0], f"{path}.{index}")
    elif isinstance(wanted, type):
        # To Python, not to Kubernetes, true is a whole number.
        if type(value) is not wanted:
            yield f"{where} must be of type {wanted.__name__}; got {value!r}"
    elif not isinstance(value, dict):
        yield f"{where} must be a mapping; got {value!r}"
    else:
        yield from _of_mapping(value, JOBSET[wanted], f"{path}." if path else "")


def _of_mapping(value: dict, wanted: dict, at: str) -> Iterator[str]:
    for key in wanted:
        if key.endswith("!") and key[:-1] not in value:
            yield f"{at}{key[:-1]} must be given"
    fields = {key.rstrip("!"): kind for key, kind in wanted.items()}
    for key, item in value.items():
        if key in fields:
            yield from _of_fields(item, fields[key], f"{at}{key}")
        else:
            yield f"{at}{key}: {errors.unknown('the field', key, fields)}"


def statuses(*, one_process: bool) -> tuple[set[int], set[int]]:
    """Return the exit statuses that end a run for good, and those that start it again.

    Of several processes one whose peer was lost may end with the status of any error,
    so that this one is final only of one process alone.
    """
    final = {errors.UserError.exit_status, errors.DivergedError.exit_status}
    again = {errors.StoppedError.exit_status, watch.EXIT_STOPPED, watch.EXIT_HUNG}
    (final if one_process else again).add(cli.EXIT_FAILURE)
    return final, again | set(range(129, 129 + 64))  # ended by a signal


def _of_run(spec: dict, path: str, *, one_process: bool) -> Iterator[str]:
    """Yield where a job of fm would be cut short, or started again for nothing."""
    pod = spec["template"]["spec"]
    ours = [c for c in pod["containers"] if "fm" in _words(c)]
    if not ours:
        return
    grace = max(_grace_seconds(_words(container)) for container in ours)
    given = pod.get("terminationGracePeriodSeconds", 30)
    if given < grace + MARGIN_SECONDS:
        yield (
            f"{path}.template.spec.terminationGracePeriodSeconds must be at least "
            f"{grace + MARGIN_SECONDS:g}, for fm train takes up to {grace:g} s to "
            f"save; got {given}"
        )
    rules = (spec.get("podFailurePolicy") or {}).get("rules", [])
    ended = [
        rule["onExitCodes"]
        for rule in rules
        if rule["action"] in ("FailJob", "FailIndex") and rule.get("onExitCodes")
    ]
    final, again = statuses(one_process=one_process)
    for status in sorted(final | again):
        is_final = any(
            (status in e["values"]) == (e["operator"] == "In") for e in ended
        )
        if is_final != (status in final):
            what = "end the job" if status in final else "start the run again"
            yield f"{path}.podFailurePolicy: exit status {status} must {what}"
    names = [container["name"] for container in ours]
    for each in ended:
        if each.get("containerName", names[0]) not in names:
            yield (
                f"{path}.podFailurePolicy: containerName must be {' or '.join(names)}; "
                f"got {each['containerName']!r}"
            )


def _of_cluster(jobset: dict, replicated: dict, spec: dict, path: str) -> Iterator[str]:
    """Yield where the processes of a job would not find each other."""
    if spec.get("parallelism") != spec.get("completions"):
        yield (
            f"{path}: parallelism and completions must be the same, for all processes "
            f"run at once; got {spec.get('parallelism')} and {spec.get('completions')}"
        )
    network = jobset["spec"].get("network", {})
    name = jobset["metadata"].get("name")
    host = f"{name}-{replicated['name']}-0-0.{network.get('subdomain', name)}"
    for container in spec["template"]["spec"]["containers"]:
        given = {e["name"]: e.get("value", "") for e in container.get("env") or []}
        number = given.get("FM_NUM_PROCESSES", str(spec.get("completions")))
        if number != str(spec.get("completions")):
            yield (
                f"{path}: FM_NUM_PROCESSES must be completions, "
                f"{spec.get('completions')}; got {number}"
            )
        address = given.get("FM_COORDINATOR", f"{host}:")
        if not address.startswith(f"{host}:"):
            yield f"{path}: FM_COORDINATOR must be {host}:PORT; got {address}"


def _words(container: dict) -> list[str]:
    return [*(container.get("command") or []), *(container.get("args") or [])]


def _grace_seconds(words: list[str]) -> float:
    given = [w.partition("=")[2] for w in words if w.startswith("--grace=")]
    return float(given[-1] if given else COMMANDS["train"].flags["grace"][0])


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, as kubectl does; PyYAML takes the later."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} stands twice",
                    problem_mark=node.start_mark,
                )
        return super().construct_mapping(node, deep=deep)


def read(path: Path) -> list[Any]:
    """Return the manifests of a file; raise UserError where it has none."""
    try:
        # What is made is plain data, as by safe_load.
        found = [m for m in yaml.load_all(path.read_text(), _Loader) if m is not None]
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise errors.UserError(f"{path} must be a file of YAML; got {said}") from error
    if not found:
        raise errors.UserError(f"{path} must have a manifest in it; got none.")
    return found


def main(arguments: list[str]) -> int:
    """Check the files of the command line; return the exit status."""
    name = "launch/k8s/validate.py"
    if not arguments:
        print(f"{name}: files must be given. Example: {name} FILE...", file=sys.stderr)
        return 2
    try:
        import kubernetes_validate  # noqa: F401
    except ImportError:
        print(
            f"{name}: the package kubernetes-validate must be installed; got none. "
            f"./launch/local.sh python {name} FILE... has it.",
            file=sys.stderr,
        )
        return 2
    found = []
    for path in map(Path, arguments):
        try:
            found += [f"{path}: {p}" for m in read(path) for p in problems(m)]
        except errors.UserError as error:
            found.append(str(error))
    for line in found:
        print(line.replace("\n", " "), file=sys.stderr)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
