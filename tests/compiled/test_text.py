"""Tests of the parser of HLO text: shapes, groups of devices, trips of loops."""

import pytest

from fm_jax.compiled import text
from tests.compiled import modules


def _root(module):
    """Return the ENTRY computation of a module and its last instruction."""
    _, entry, _ = text.parse(module)
    return entry, entry.root


def test_text_that_is_no_module_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"'func @main'. Pass compiled.as_text\(\)"):
        text.parse("func @main")


def test_an_instruction_is_read_whatever_its_parentheses():
    entry, op = _root(
        modules.entry(
            """%p = (f32[3]{0:T(8)}, s32[]) parameter(0)
            ROOT %r = f32[3]{0} copy-start(f32[3]{0:T(8)(2,1)} %p, s32[] %p), k={(1)}"""
        )
    )
    assert list(entry.ops) == ["p", "r"]
    assert (op.name, op.opcode, op.kind) == ("r", "copy-start", "copy")
    assert (op.shape, op.operands, op.attrs) == ("f32[3]{0}", ["p", "p"], ", k={(1)}")


def test_the_devices_are_partitions_times_replicas():
    module = modules.entry("ROOT %p = f32[] parameter(0)")
    assert text.parse(module)[2] == 8
    more = module.replace("num_partitions=8", "replica_count=3, num_partitions=4")
    assert text.parse(more)[2] == 12


@pytest.mark.parametrize(
    "shape, dtype, dims, size",
    [
        ("f32[]", "f32", (), 4),
        ("pred[3,5]{1,0}", "pred", (3, 5), 15),
        ("s32[7]{0:T(128)S(6)}", "s32", (7,), 28),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", "bf16", (8, 128), 2048),
        ("f8e4m3fn[16,3]{1,0:T(8,128)(4,1)}", "f8e4m3fn", (16, 3), 48),
        ("u8[11]{0}", "u8", (11,), 11),
        ("s4[5]{0:E(4)}", "s4", (5,), 3),
        ("c64[2]{0}", "c64", (2,), 16),
        ("f32[<=6,2]{1,0}", "f32", (6, 2), 48),
        ("token[]", "token", (), 0),
    ],
)
def test_shapes_are_read_without_their_layouts(shape, dtype, dims, size):
    ((array, _),) = text.places(shape)
    assert array == text.Array(dtype, dims)
    assert array.bytes == size


@pytest.mark.parametrize(
    "trips, changes",
    [
        (5, {}),
        (0, {"limit": -3}),
        (14, {"start": 3, "limit": 17}),
        (7, {"start": 1, "limit": 20, "step": 3}),
        (6, {"way": "LE"}),
        (9, {"start": 9, "limit": 0, "step": -1, "way": "GT"}),
        (10, {"start": 9, "limit": 0, "step": -1, "way": "GE"}),
        (5, {"way": "GT", "sides": "%limit, %i"}),
        (6, {"way": "GE", "sides": "%limit, %i"}),
    ],
)
def test_a_counter_says_how_often_a_loop_runs(trips, changes):
    entry, loop = _root(modules.loop(**changes))
    assert entry.trips(loop) == trips


@pytest.mark.parametrize(
    "old, new",
    [
        ("%start = s32[] copy(%c)", "%start = s32[] copy(%n)"),
        (
            "%limit = s32[] constant(5)",
            "%limit = s32[] get-tuple-element(%state), index=0",
        ),
        ("add(%k, %step)", "multiply(%k, %step)"),
        ("add(%k, %step)", "negate(%k)"),
        ("tuple(%next, %y)", "optimization-barrier(%next, %y)"),
        ("(%old), index=0", "(%old), index=1"),
        ("direction=LT", "direction=NE"),
        ("step = s32[] constant(1)", "step = s32[] constant(-1)"),
    ],
)
def test_a_loop_that_nothing_bounds_has_no_number_of_trips(old, new):
    assert old in modules.loop()
    entry, loop = _root(modules.loop().replace(old, new))
    assert entry.trips(loop) is None


def test_the_noted_trip_count_goes_before_the_counter():
    note = ', backend_config={"known_trip_count":{"n":"11"},"known_init_step":{}}'
    entry, loop = _root(modules.loop().replace("body=%body", f"body=%body{note}"))
    assert entry.trips(loop) == 11


ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    "written, groups",
    [
        ("{{0,1,2,3},{4,5,6,7}}", ROWS),
        ("{{7,3},{1,5},{4,0},{2,6}}", COLUMNS),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8]", ROWS),
        ("[4,2]<=[2,4]T(1,0)", COLUMNS),
        ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['x'=2,'y'=4] {'y'}", ROWS),
        ("mesh['x'=2,'y'=4] {'x'}", COLUMNS),
        ("mesh['x'=2,'a'=1,'y'=4] {'x','y'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['x'=8] {'x':(1)2}", COLUMNS),
        ("mesh['x'=8] {'x':(2)4}", ROWS),
        ("mesh['x'=8] {'x':(1)2,'x':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", COLUMNS),
        ("mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'x'}",
         ((0, 1), (2, 3), (4, 5), (6, 7))),
    ],
)  # fmt: skip
def test_all_ways_to_write_groups_are_read(written, groups):
    _, op = _root(
        modules.entry(
            f"""%p = f32[8]{{0}} parameter(0)
            ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, \
replica_groups={written}, use_global_device_ids=true, to_apply=%add""",
            before=modules.ADD,
        )
    )
    assert op.groups(8) == groups


def test_the_pairs_of_a_permutation_keep_their_direction():
    _, op = _root(
        modules.entry(
            """%p = bf16[6]{0} parameter(0)
            ROOT %r = bf16[6]{0} collective-permute(%p), \
source_target_pairs={{3,0},{0,1}}"""
        )
    )
    assert op.groups(8) == ((0, 1), (3, 0))
