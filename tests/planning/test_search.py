"""Tests of the search: which ways there are, in which order, and which are tried."""

import dataclasses
import itertools
import pathlib

import pytest

from fm_jax import accelerators, configfile, meshes
from fm_jax import config as configs
from fm_jax.errors import UserError
from fm_jax.planning import search
from fm_jax.planning.plan import Machine

ROOT = pathlib.Path(__file__).parent.parent.parent


def _config(**overrides) -> configs.Config:
    raw = configfile.load(str(ROOT / "configs" / "quickstart.py")).to_dict()
    raw["model"] |= {
        "num_layers": 3, "embed_dim": 96, "num_heads": 12, "num_kv_heads": 4,
        "head_dim": 8, "vocab_size": 320,
    }  # fmt: skip
    raw["data"]["max_length"] = 1024
    raw["train"]["batch_size"] = 24
    raw["eval"]["batch_size"] = 24
    for key, value in overrides.items():
        section, name = key.split("__")
        raw[section][name] = value
    return configs.check(raw)


def _machine(count=8, *, chip="v5e", capacity=None, num_slices=1) -> Machine:
    known = accelerators.CHIPS.get(chip)
    return Machine(
        name="test", devices=[None] * count, num_slices=num_slices, chip=known,
        capacity=capacity, devices_per_host=4, is_simulated=True,
    )  # fmt: skip


class _Maker:
    """Plans without a compiler: `needs(config)` bytes each."""

    def __init__(self, machine, needs):
        self.machine, self.needs, self.made = machine, needs, []

    def __call__(self, config):
        self.made.append(config)
        return _Planned(self.needs(config), self.machine.capacity)


@dataclasses.dataclass
class _Planned:
    bytes_needed: int
    capacity: int

    @property
    def fits(self):
        return self.bytes_needed <= self.capacity


def test_ways_come_the_fastest_first():
    found = search.ways(_config(), _machine())
    assert len(found) > 20
    keys = [(way.seconds, way.memory) for way in found]
    assert keys == sorted(keys)
    assert min(min(key) for key in keys) > 0


@pytest.mark.parametrize("count", [1, 8, 24])
def test_every_way_divides_devices_rows_and_length(count):
    config = _config(eval__batch_size=7)
    found = search.ways(config, _machine(count))
    assert found
    for way in found:
        changed = search.overridden(config, way.overrides)
        given = {axis: getattr(changed.mesh, axis) for axis in meshes.AXES}
        sizes = meshes.sizes(changed.mesh.preset, given, count)
        groups = sizes["data"] * sizes["fsdp"]
        rows = changed.train.batch_size // changed.train.accumulation
        assert changed.train.batch_size % changed.train.accumulation == 0
        assert rows % groups == changed.eval.batch_size % groups == 0
        assert changed.eval.batch_size - 7 < groups
        assert config.model.embed_dim % sizes["fsdp"] == 0
        assert config.model.num_kv_heads % sizes["tensor"] == 0
        assert sizes["tensor"] <= 4  # of a host
        assert config.data.max_length % (2 * sizes["context"]) == 0


def test_a_way_is_applied_to_its_keys_alone():
    config = _config()
    way = search.ways(config, _machine())[-1]
    changed = search.overridden(config, way.overrides)
    for key, value in way.overrides.items():
        section, name = key.split(".")
        assert getattr(getattr(changed, section), name) == value
        old = getattr(getattr(config, section), name)
        back = {name: old}
        section_back = dataclasses.replace(getattr(changed, section), **back)
        changed = dataclasses.replace(changed, **{section: section_back})
    assert changed == config


def test_all_policies_micro_batches_and_axes_are_varied():
    found = [way.overrides for way in search.ways(_config(), _machine())]
    assert {way["model.remat"] for way in found} == set(search.RECOMPUTED)
    assert {way["train.accumulation"] for way in found} >= {1, 2, 4}
    assert {way["mesh.tensor"] for way in found} == {1, 2, 4}
    assert {way["mesh.context"] for way in found} == {1, 2, 4}


def test_short_and_odd_rows_have_ways_too():
    for length in (32, 1000):
        found = search.ways(_config(data__max_length=length), _machine(1))
        assert {way.overrides["mesh.context"] for way in found} == {1}


def test_micro_batches_and_recomputation_cost_time_and_save_memory():
    found = {
        (way.overrides["model.remat"], way.overrides["train.accumulation"]): way
        for way in search.ways(_config(), _machine(1))
    }
    for remat in search.RECOMPUTED:
        fewer, more = found[remat, 1], found[remat, 4]
        assert fewer.seconds < more.seconds
        assert fewer.memory > more.memory
    policies = [found[remat, 1] for remat in ("none", "dots", "names", "full")]
    for less, more in itertools.pairwise(policies):
        assert less.seconds < more.seconds
        assert less.memory > more.memory


def test_between_slices_goes_what_the_config_sends_there():
    for dcn in ({"data": 2, "fsdp": 1}, {"data": 1, "fsdp": 2}):
        config = _config(mesh__dcn_data=dcn["data"], mesh__dcn_fsdp=dcn["fsdp"])
        found = search.ways(config, _machine(num_slices=2))
        assert found
        for way in found:
            changed = search.overridden(config, way.overrides).mesh
            given = {axis: getattr(changed, axis) for axis in meshes.AXES}
            sizes = meshes.sizes(changed.preset, given, 8)
            assert sizes["data"] == dcn["data"]
            assert sizes["fsdp"] % dcn["fsdp"] == 0


def test_a_device_of_unknown_speed_has_the_same_ways():
    config = _config()

    def ways(chip):
        found = search.ways(config, _machine(chip=chip))
        return sorted(str(way.overrides) for way in found)

    assert ways("unknown") == ways("v5e")


def test_the_fastest_that_fits_is_taken_with_what_it_changes():
    config, said = _config(), []
    machine = _machine(capacity=10**15)
    found = search.ways(config, machine)
    make = _Maker(machine, lambda changed: 10**14 * 3)
    overrides, plan = search.fastest_fitting(
        config, machine, make, tries=3, say=said.append
    )
    assert plan.fits
    assert make.made == [search.overridden(config, found[0].overrides)]
    assert overrides.items() <= found[0].overrides.items()
    # Only what is new is said: the policy and the micro-batches are the config's.
    assert "model.remat" not in overrides
    assert "train.accumulation" not in overrides
    assert "mesh.expert" not in overrides
    shown = " ".join(f"{key}={value}" for key, value in overrides.items())
    assert said == [f"  tried {shown}: 300,000.0 GB, fits"]


def test_what_is_expected_to_need_more_than_what_failed_is_passed_over():
    config, said = _config(), []
    machine = _machine(capacity=10**15)
    expected = {
        _key(search.overridden(config, way.overrides)): way.memory
        for way in search.ways(config, machine)
    }
    small = sorted(expected.values())[3]

    def needs(changed):
        return 1 if expected[_key(changed)] <= small else 10**16

    make = _Maker(machine, needs)
    overrides, _ = search.fastest_fitting(
        config, machine, make, tries=99, say=said.append
    )
    made = [_key(changed) for changed in make.made]
    assert len(said) == len(made) > 2
    assert _key(search.overridden(config, overrides)) == made[-1]
    # From the fastest on, each that is expected to need less than all that failed.
    least, wanted = float("inf"), []
    for key, memory in expected.items():
        if memory < least:
            wanted.append(key)
            least = memory
        if memory <= small:
            break
    assert made == wanted


def _key(changed: configs.Config) -> tuple:
    mesh = changed.mesh
    sizes = mesh.fsdp, mesh.tensor, mesh.context
    return changed.model.remat, changed.train.accumulation, *sizes


def test_what_is_expected_to_need_more_than_there_is_is_not_tried():
    config = _config()
    least = min(way.memory for way in search.ways(config, _machine()))
    machine = _machine(capacity=int(least))
    make = _Maker(machine, lambda changed: 1)
    nothing = search.fastest_fitting(config, machine, make, tries=9, say=print)
    assert (nothing, make.made) == (None, [])


@pytest.mark.parametrize("tries", [0, 1, 2])
def test_so_many_are_compiled_and_no_more(tries):
    machine = _machine(capacity=10**15)
    make = _Maker(machine, lambda changed: 10**16)
    said = []
    assert (
        search.fastest_fitting(_config(), machine, make, tries=tries, say=said.append)
        is None
    )
    assert len(make.made) == len(said) == tries


def test_a_way_that_is_refused_before_it_is_compiled_is_no_try():
    machine = _machine(capacity=10**15)
    refused = []

    def make(changed):
        if changed.mesh.fsdp > 2:
            refused.append(changed)
            raise UserError("sizes must divide")
        return _Planned(1, machine.capacity)

    overrides, _ = search.fastest_fitting(
        _config(), machine, make, tries=1, say=lambda line: None
    )
    assert refused
    assert overrides["mesh.fsdp"] <= 2
