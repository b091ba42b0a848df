"""Tests of who a process is among several: by flags or by what started it."""

import pytest

from fm_jax.cluster import launchers
from fm_jax.cluster.launchers import Cluster
from fm_jax.errors import UserError

OURS = {"FM_COORDINATOR": "a:1", "FM_NUM_PROCESSES": "3", "FM_PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08,12],cpu1",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


def _find(environ, coordinator="", num_processes=0, process_id=-1):
    return launchers.find(coordinator, num_processes, process_id, environ)


def test_a_process_that_is_told_nothing_is_alone():
    assert _find({}) is None
    assert _find({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}) is None
    assert _find({"OMPI_COMM_WORLD_SIZE": "1"}) is None
    assert _find({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    # The pod of an indexed job may be one of many runs, each alone.
    assert _find({"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "h"}) is None


def test_flags_come_before_the_environment_and_that_before_slurm():
    assert _find(OURS | SLURM) == Cluster("a:1", 3, 2)
    assert _find(OURS | SLURM, "b:2", 5, 0) == Cluster("b:2", 5, 0)
    assert _find(OURS, process_id=0) == Cluster("a:1", 3, 0)
    assert _find(SLURM, "b:2") == Cluster("b:2", 4, 3)


@pytest.mark.parametrize(
    ("environ", "promised"),
    [
        ({}, ""),
        ({"SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2"),
        ({"SLURM_GPUS_ON_NODE": "0"}, ""),
        ({"FM_ACCELERATOR": "cuda"}, "FM_ACCELERATOR=cuda"),
        ({"FM_ACCELERATOR": "tpu"}, ""),
        ({"FM_ACCELERATOR": "cuda", "JAX_PLATFORMS": "cpu"}, ""),
        ({"FM_ACCELERATOR": "cuda", "JAX_PLATFORMS": ""}, "FM_ACCELERATOR=cuda"),
        (
            {"FM_ACCELERATOR": "cuda", "JAX_PLATFORMS": "cuda,cpu"},
            "FM_ACCELERATOR=cuda",
        ),
    ],
)
def test_gpus_are_promised_by_what_asked_for_them(environ, promised):
    assert launchers.promised_gpus(environ) == promised


def test_one_process_is_alone_whatever_started_it():
    assert _find(SLURM | {"FM_NUM_PROCESSES": "1"}) is None
    assert _find(OURS | {"FM_PROCESS_ID": "0"}, num_processes=1) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[07-08,12],cpu1", "gpu07"),
        ("node001,host2", "node001"),
        ("n1", "n1"),
        ("127.0.0.[1-2]", "127.0.0.1"),
        ("rack[3,5]-ib", "rack3-ib"),
    ],
)
def test_slurm_tells_the_first_node_of_the_step(nodes, host):
    found = _find(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found == Cluster(f"{host}:{61440 + 1}", 4, 3)


def test_two_steps_of_a_slurm_job_do_not_share_a_port():
    ports = {_find(SLURM | {"SLURM_STEP_ID": str(i)}).coordinator for i in range(9)}
    assert len(ports) == 9
    given = _find(SLURM | {"JAX_COORDINATOR_PORT": "77"})
    assert given.coordinator == "gpu07:77"


def test_a_slurm_job_without_srun_is_told_to_use_it():
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    with pytest.raises(UserError, match="4 tasks must start the command with srun"):
        _find(batch)


def test_one_task_of_a_node_takes_all_its_gpus_and_several_one_each():
    assert _find(SLURM).local_device_ids is None
    crowded = SLURM | {"SLURM_STEP_NUM_NODES": "2"}
    assert _find(crowded).local_device_ids == (1,)
    several = crowded | {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert _find(several).local_device_ids == (1,)
    for bound in (
        {"CUDA_VISIBLE_DEVICES": "3"},
        {"SLURM_GPUS_PER_TASK": "2"},
        {"JAX_LOCAL_DEVICE_IDS": "0,1"},
    ):
        assert _find(crowded | bound).local_device_ids is None


def test_open_mpi_tells_where_it_was_started():
    assert _find(MPI) == Cluster(f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}", 4, 2)
    six = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::b9b,2620::2]:43370"}
    assert _find(MPI | six).coordinator == f"[fe80::b9b]:{61440 + 1}"
    pair = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert _find(MPI | pair).local_device_ids == (1,)


def test_open_mpi_5_must_be_told_the_coordinator():
    silent = {k: v for k, v in MPI.items() if k != "OMPI_MCA_orte_hnp_uri"}
    with pytest.raises(UserError, match=r"got no FM_COORDINATOR\. Give"):
        _find(silent)
    assert _find(silent, "b:2") == Cluster("b:2", 4, 2)


def test_a_tpu_pod_is_left_to_jax():
    assert _find({"TPU_WORKER_HOSTNAMES": "a,b"}) == Cluster("auto")
    assert _find({"MEGASCALE_NUM_SLICES": "2"}) == Cluster("auto")
    assert _find({"FM_COORDINATOR": "auto"}) == Cluster("auto")


def test_a_pod_of_an_indexed_job_is_numbered_by_it():
    pod = {"JOB_COMPLETION_INDEX": "1", "FM_COORDINATOR": "job-0.job:12355"}
    found = _find(pod | {"FM_NUM_PROCESSES": "2"})
    assert found == Cluster("job-0.job:12355", 2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FM_PROCESS_ID": ""}, "got no FM_PROCESS_ID. Give all"),
        (
            {"FM_COORDINATOR": "", "FM_PROCESS_ID": ""},
            "got no FM_COORDINATOR and no FM_PROCESS_ID.",
        ),
        ({"FM_PROCESS_ID": "3"}, "below --num_processes; got 3 of 3"),
        ({"FM_NUM_PROCESSES": "1"}, "below --num_processes; got 2 of 1"),
        ({"FM_NUM_PROCESSES": "0"}, "--num_processes must be >= 1; got 0"),
        ({"FM_NUM_PROCESSES": "two"}, "FM_NUM_PROCESSES must be a whole number; got"),
        ({"FM_COORDINATOR": "host"}, "--coordinator must be HOST:PORT; got 'host'"),
        ({"FM_COORDINATOR": "host:x"}, "must be HOST:PORT; got 'host:x'"),
        ({"FM_COORDINATOR": ":80"}, "must be HOST:PORT; got ':80'"),
        ({"FM_COORDINATOR": "h:65536"}, "must be HOST:PORT; got 'h:65536'"),
    ],
)
def test_what_is_missing_or_wrong_is_named(change, message):
    with pytest.raises(UserError) as error:
        _find(OURS | change)
    assert message in str(error.value)
