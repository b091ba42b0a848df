"""Tests of what a compiled program does: rules by hand, and programs of XLA."""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fm_jax.compiled import program as programs
from fm_jax.compiled.text import Array
from fm_jax.models import counts, zoo
from fm_jax.train import step as steps
from tests.compiled import modules
from tests.compiled.modules import ADD

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))


def _read(lines, *, before=""):
    """Read a module whose ENTRY computation is `lines`."""
    return programs.read(modules.entry(lines, before=before))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def _compiled(function, *arrays, mesh=None):
    """Compile for arrays given as (shape, dtype) or (shape, dtype, spec)."""
    args = [
        jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, *spec) if mesh else None
        )
        for shape, dtype, *spec in arrays
    ]
    return jax.jit(function).lower(*args).compile()


def test_the_largest_arrays_are_those_outside_fusions():
    before = """
%inside (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %wide = f32[4,1000]{1,0} broadcast(%q), dimensions={0}
  ROOT %r = f32[4]{0} slice(%wide), slice={[0:4], [0:1]}
}
"""
    program = _read(
        """%p = f32[4]{0} parameter(0)
        %f = f32[4]{0} fusion(%p), kind=kLoop, calls=%inside
        %pair = (f32[4]{0}, (bf16[9,2]{1,0}, s32[])) custom-call(%f)
        ROOT %e = f32[4]{0} get-tuple-element(%pair), index=0""",
        before=before,
    )
    assert program.largest(2) == (Array("bf16", (9, 2)), Array("f32", (4,)))
    assert program.largest(9) == (*program.largest(2), Array("s32", ()))


# Loops and other callers.


@pytest.mark.parametrize(
    "limit, trips, unknown", [("5", 5, 0), ("0", 0, 0), ("anything", 1, 1)]
)
def test_a_loop_that_nothing_bounds_runs_once_and_is_counted(limit, trips, unknown):
    program = programs.read(modules.loop(limit=limit))
    assert program.unknown_loops == unknown
    assert sum(c.count for c in program.collectives) == trips


def test_collectives_run_as_often_as_all_that_is_around_them():
    before = f"""{ADD}
%fused (a1: f32[8]) -> f32[8] {{
  %a1 = f32[8]{{0}} parameter(0)
  ROOT %r1 = f32[8]{{0}} all-reduce(%a1), replica_groups={{}}, to_apply=%add
}}
%called (a2: f32[8]) -> f32[8] {{
  %a2 = f32[8]{{0}} parameter(0)
  %f2 = f32[8]{{0}} fusion(%a2), kind=kLoop, calls=%fused
  ROOT %g2 = f32[8]{{0}} fusion(%f2), kind=kLoop, calls=%fused
}}
%inner (a3: f32[8]) -> f32[8] {{
  %a3 = f32[8]{{0}} parameter(0)
  ROOT %r3 = f32[8]{{0}} call(%a3), to_apply=%called
}}
%go (a4: f32[8]) -> pred[] {{
  %a4 = f32[8]{{0}} parameter(0)
  ROOT %yes = pred[] constant(true)
}}
%outer (a5: f32[8]) -> f32[8] {{
  %a5 = f32[8]{{0}} parameter(0)
  ROOT %r5 = f32[8]{{0}} while(%a5), condition=%go, body=%inner, \
backend_config={{"known_trip_count":{{"n":"3"}}}}
}}
"""
    program = _read(
        """%p = f32[8]{0} parameter(0)
        %b = s32[] parameter(1)
        %w = f32[8]{0} while(%p), condition=%go, body=%outer, \
backend_config={"known_trip_count":{"n":"5"}}
        %c = f32[8]{0} conditional(%b, %w, %w), branch_computations={%fused, %called}
        %d = f32[8]{0} conditional(%b, %c, %c), true_computation=%fused, \
false_computation=%go
        ROOT %x = f32[8]{0} custom-call(%d), custom_call_target="k", \
called_computations={%fused}""",
        before=before,
    )
    (found,) = program.collectives
    # Loops in a loop around two, one branch and two of another, one branch, one call.
    assert found.count == 5 * 3 * 2 + 1 + 2 + 1 + 1
    assert found.bytes == 32 * found.count
    assert found.groups == (tuple(range(8)),)


# Collectives.


def test_a_permutation_is_told_by_its_pairs():
    (found,) = _read(
        """%p = bf16[6]{0} parameter(0)
        ROOT %r = bf16[6]{0} collective-permute(%p), \
source_target_pairs={{3,0},{0,1}}"""
    ).collectives
    assert found.groups == ((0, 1), (3, 0))
    assert (found.group_size, found.bytes, found.wire_bytes) == (2, 12, 12)


# Kind, bytes of a device's operand, payload and bytes sent in a group of four.
@pytest.mark.parametrize(
    "kind, operand, result, payload, sent",
    [
        ("all-gather", 3, 12, 48, 3 * 12),
        ("reduce-scatter", 12, 3, 48, 3 * 12),
        ("all-reduce", 12, 12, 48, 2 * 3 * 12),
        ("all-to-all", 12, 12, 48, 3 * 12),
        ("collective-broadcast", 12, 12, 48, 48),
    ],
)
def test_payload_is_the_larger_side_and_a_ring_sends_its_share(
    kind, operand, result, payload, sent
):
    (found,) = _read(
        f"""%p = f32[{operand}]{{0}} parameter(0)
        ROOT %r = f32[{result}]{{0}} {kind}(%p), replica_groups=[2,4]<=[8]"""
    ).collectives
    assert (found.kind, found.dtype, found.count) == (kind, "f32", 1)
    assert found.bytes == payload
    assert found.wire_bytes == sent


@pytest.mark.parametrize(
    "kind, halves",
    [
        (
            "all-gather",
            """%s = (f32[3]{0}, f32[6]{0}) all-gather-start(%p), replica_groups={{0,1}}
            ROOT %d = f32[6]{0} all-gather-done(%s)""",
        ),
        (
            "all-reduce",
            """%s = f32[6]{0} all-reduce-start(%q), replica_groups={{0,1}}
            ROOT %d = f32[6]{0} all-reduce-done(%s)""",
        ),
        (
            "collective-permute",
            """%s = (f32[6]{0}, f32[6]{0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%q), source_target_pairs={{0,1}}
            ROOT %d = f32[6]{0} collective-permute-done(%s)""",
        ),
        (
            "reduce-scatter",
            """%s = ((f32[6]{0}), f32[3]{0}, u32[]{:S(2)}) reduce-scatter-start(%q), \
replica_groups={{0,1}}, dimensions={0}, to_apply=%add
            ROOT %d = f32[3]{0} reduce-scatter-done(%s)""",
        ),
        (
            "all-to-all",
            """%s = ((f32[6]{0}), f32[6]{0}, u32[]{:S(2)}) async-start(%q), \
calls=%wrapped
            %u = ((f32[6]{0}), f32[6]{0}, u32[]{:S(2)}) async-update(%s), calls=%wrapped
            ROOT %d = f32[6]{0} async-done(%u), calls=%wrapped""",
        ),
    ],
)
def test_the_two_halves_of_an_async_collective_count_once(kind, halves):
    before = f"""{ADD}
%wrapped (w: f32[6]) -> f32[6] {{
  %w = f32[6]{{0}} parameter(0)
  ROOT %v = f32[6]{{0}} all-to-all(%w), replica_groups={{{{0,1}}}}, dimensions={{0}}
}}
"""
    program = _read(
        f"""%p = f32[3]{{0}} parameter(0)
        %q = f32[6]{{0}} parameter(1)
        {halves}""",
        before=before,
    )
    (found,) = program.collectives
    assert (found.kind, found.count, found.bytes) == (kind, 1, 24)
    # An operand is read and a result written once, whatever the halves repeat.
    result = 12 if kind == "reduce-scatter" else 24
    assert program.bytes_accessed == {"all-gather": 12}.get(kind, 24) + result


def test_a_combined_collective_is_one_execution_of_all_its_bytes():
    (found,) = _read(
        """%p = f32[5]{0} parameter(0)
        %q = bf16[3]{0} parameter(1)
        ROOT %r = (f32[5]{0}, bf16[3]{0}) all-reduce(%p, %q), replica_groups={{0,1}}"""
    ).collectives
    assert (found.count, found.bytes, found.dtype) == (1, 26, "bf16+f32")


def test_collectives_merge_where_kind_dtype_and_groups_agree():
    program = _read(
        """%p = f32[5]{0} parameter(0)
        %a = f32[5]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}
        %b = f32[5]{0} all-reduce(%a), replica_groups=[2,2]<=[4]
        %c = f32[5]{0} all-reduce(%b), replica_groups={{0,2},{1,3}}
        %d = s32[5]{0} convert(%c)
        ROOT %e = s32[5]{0} all-reduce(%d), replica_groups={{0,1},{2,3}}"""
    )
    pairs, across = ((0, 1), (2, 3)), ((0, 2), (1, 3))
    assert program.collectives == (
        programs.Collective("all-reduce", "f32", pairs, 2, 40),
        programs.Collective("all-reduce", "f32", across, 1, 20),
        programs.Collective("all-reduce", "s32", pairs, 1, 20),
    )


def test_a_fusion_of_an_all_reduce_and_its_slices_is_a_reduce_scatter():
    before = f"""{ADD}
%all-reduce-scatter (p0: f32[8], p1: f32[4]) -> (f32[4], f32[2]) {{
  %p0 = f32[8]{{0}} parameter(0)
  %p1 = f32[4]{{0}} parameter(1)
  %all = (f32[8]{{0}}, f32[4]{{0}}) all-reduce(%p0, %p1), replica_groups={{{{0,1}}}}
  %i = s32[] constant(0)
  %g0 = f32[8]{{0}} get-tuple-element(%all), index=0
  %s0 = f32[4]{{0}} dynamic-slice(%g0, %i), dynamic_slice_sizes={{4}}
  %g1 = f32[4]{{0}} get-tuple-element(%all), index=1
  %s1 = f32[2]{{0}} dynamic-slice(%g1, %i), dynamic_slice_sizes={{2}}
  ROOT %t = (f32[4]{{0}}, f32[2]{{0}}) tuple(%s0, %s1)
}}
"""
    program = _read(
        """%p = f32[8]{0} parameter(0)
        %q = f32[4]{0} parameter(1)
        ROOT %f = (f32[4]{0}, f32[2]{0}) fusion(%p, %q), kind=kCustom, \
calls=%all-reduce-scatter""",
        before=before,
    )
    (found,) = program.collectives
    assert (found.kind, found.count, found.bytes) == ("reduce-scatter", 1, 48)
    assert program.bytes_accessed == 48 + 24


def test_an_all_reduce_that_is_sliced_afterwards_stays_one():
    (found,) = _read(
        """%p = f32[8]{0} parameter(0)
        %all = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}
        %i = s32[] constant(0)
        ROOT %s = f32[4]{0} dynamic-slice(%all, %i), dynamic_slice_sizes={4}"""
    ).collectives
    assert found.kind == "all-reduce"


def test_of_a_ragged_all_to_all_the_first_operand_is_what_moves():
    (found,) = _read(
        """%p = f32[8,3]{1,0} parameter(0)
        %out = f32[90,3]{1,0} parameter(1)
        %n = s32[2]{0} parameter(2)
        ROOT %r = f32[90,3]{1,0} ragged-all-to-all(%p, %out, %n, %n, %n, %n), \
replica_groups={{0,1}}"""
    ).collectives
    assert (found.kind, found.dtype, found.bytes) == ("ragged-all-to-all", "f32", 96)


CHAIN = """
%begin (b0: bf16[4]) -> (bf16[4], bf16[8], u32[]) {
  %b0 = bf16[4]{0:T(8)} parameter(0)
  %g1 = bf16[8]{0:T(8)} all-gather(%b0), replica_groups={{0,1}}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %k1 = (bf16[4]{0:T(8)}, bf16[8]{0:T(8)}, u32[]{:S(2)}) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion (m0: bf16[4], m1: bf16[8], m2: u32[], m3: bf16[3,5], m4: bf16[5,7]) -> (bf16[3,7], bf16[4], bf16[8], bf16[8], u32[]) {
  %m0 = bf16[4]{0:T(8)} parameter(0)
  %m1 = bf16[8]{0:T(8)} parameter(1)
  %m2 = u32[]{:S(2)} parameter(2)
  %m3 = bf16[3,5]{1,0:T(8)} parameter(3)
  %m4 = bf16[5,7]{1,0:T(8)} parameter(4)
  %dot = bf16[3,7]{1,0:T(8)} convolution(%m3, %m4), dim_labels=bf_io->bf
  %g2 = bf16[8]{0:T(8)} all-gather(%m0), replica_groups={{0,1}}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %t2 = (bf16[3,7]{1,0:T(8)}, bf16[4]{0:T(8)}, bf16[8]{0:T(8)}, bf16[8]{0:T(8)}, u32[]{:S(2)}) tuple(%dot, %m0, %m1, %g2, %m2)
}
%end (e0: bf16[4], e1: bf16[8], e2: u32[]) -> bf16[8] {
  %e0 = bf16[4]{0:T(8)} parameter(0)
  %e1 = bf16[8]{0:T(8)} parameter(1)
  %e2 = u32[]{:S(2)} parameter(2)
  %g3 = bf16[8]{0:T(8)} all-gather(%e0), replica_groups={{0,1}}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %k3 = bf16[8]{0:T(8)} custom-call(%e0, %e1, %g3, %e2), custom_call_target="AsyncCollectiveDone"
}
"""  # noqa: E501


def test_a_chain_of_fusions_around_a_tpu_collective_counts_once():
    program = _read(
        """%p = bf16[4]{0:T(8)} parameter(0)
        %x = bf16[3,5]{1,0:T(8)} parameter(1)
        %w = bf16[5,7]{1,0:T(8)} parameter(2)
        %a = (bf16[4]{0:T(8)}, bf16[8]{0:T(8)}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%begin
        %a0 = bf16[4]{0:T(8)} get-tuple-element(%a), index=0
        %a1 = bf16[8]{0:T(8)} get-tuple-element(%a), index=1
        %a2 = u32[]{:S(2)} get-tuple-element(%a), index=2
        %b = (bf16[3,7]{1,0:T(8)}, bf16[4]{0:T(8)}, bf16[8]{0:T(8)}, bf16[8]{0:T(8)}, u32[]{:S(2)}) fusion(%a0, %a1, %a2, %x, %w), kind=kOutput, calls=%async_collective_fusion
        %b0 = bf16[4]{0:T(8)} get-tuple-element(%b), index=1
        %b1 = bf16[8]{0:T(8)} get-tuple-element(%b), index=2
        %b2 = u32[]{:S(2)} get-tuple-element(%b), index=4
        ROOT %c = bf16[8]{0:T(8)} fusion(%b0, %b1, %b2), kind=kCustom, calls=%end""",  # noqa: E501
        before=CHAIN,
    )
    (found,) = program.collectives
    assert (found.kind, found.count, found.bytes) == ("all-gather", 1, 16)
    assert program.flops == 2 * 3 * 5 * 7
    product = 2 * (3 * 5 + 5 * 7 + 3 * 7)
    assert program.bytes_accessed == 8 + 16 + product
    assert program.custom_calls == {}


# Products.


@pytest.mark.parametrize(
    "line, flops",
    [
        ("%r = f32[3,7] dot(%a, %b), lhs_contracting_dims={1}, "
         "rhs_contracting_dims={0}", 2 * 3 * 7 * 5),
        ("%r = f32[5,7] dot(%c, %b), lhs_batch_dims={}, lhs_contracting_dims={0,2}, "
         "rhs_contracting_dims={0,1}", 2 * 5 * 7 * 4 * 6),
        ("%r = f32[7,3] convolution(%b, %a), dim_labels=fb_oi->bf", 2 * 3 * 7 * 5),
        # All of a kernel of two meets seven of eight places; padding, the last of them.
        ("%r = f32[1,8,3] convolution(%d, %e), window={size=2 pad=0_1}, "
         "dim_labels=b0f_0io->b0f", 2 * 3 * 5 * 15),
        # With a stride of three and a hole in the kernel: places 0, 3, 6 and 2, 5.
        ("%r = f32[1,3,3] convolution(%d, %e), window={size=2 stride=3 rhs_dilate=2 "
         "pad=0_1}, dim_labels=b0f_0io->b0f", 2 * 3 * 5 * 5),
        # Negative padding skips the first two elements.
        ("%r = f32[1,6,3] convolution(%d, %e), window={size=2 pad=-2_1}, "
         "dim_labels=b0f_0io->b0f", 2 * 3 * 5 * 11),
        # The first of the kernel always falls into a hole of the input.
        ("%r = f32[1,8,3] convolution(%d, %e), window={size=2 stride=2 pad=1_0 "
         "lhs_dilate=2}, dim_labels=b0f_0io->b0f", 2 * 3 * 5 * 8),
        # How a TPU writes a product of eight pairs of [1, 5] and [5, 3].
        ("%r = f32[8,1,3] convolution(%f, %g), window={size=8 stride=7 lhs_dilate=8}, "
         "dim_labels=0bf_0io->0bf", 2 * 8 * 5 * 3),
        ('%r = (f32[3,7], s8[64]) custom-call(%a, %b), custom_call_target='
         '"__cublas$gemm", backend_config={"gemm_backend_config":{"beta":0,'
         '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
         '"rhs_contracting_dimensions":["0"]}}}', 2 * 3 * 7 * 5),
        ('%r = f32[3,7] custom-call(%a, %b), custom_call_target="__onednn$matmul", '
         'backend_config={"onednn_matmul_config":{"transpose_b":false}}', 210),
        ('%r = f32[7,3] custom-call(%b, %a), custom_call_target="__onednn$matmul", '
         'backend_config={"onednn_matmul_config":{"transpose_a":true}}', 210),
        ('%r = f32[3,7] custom-call(%a, %b), custom_call_target="tpu_custom_call", '
         'backend_config={"custom_call_config":{"cost_estimate":{"flops":"1234"}}}',
         1234),
        ("%r = f32[3,5] add(%a, %a)", 0),
    ],
)  # fmt: skip
def test_products_are_counted_from_their_dims(line, flops):
    program = _read(
        f"""%a = f32[3,5] parameter(0)
        %b = f32[5,7] parameter(1)
        %c = f32[4,5,6] parameter(2)
        %d = f32[1,8,5] parameter(3)
        %e = f32[2,5,3] parameter(4)
        %f = f32[8,1,5] parameter(5)
        %g = f32[8,5,3] parameter(6)
        ROOT {line}"""
    )
    assert program.flops == flops
    assert program.custom_calls == {}


def test_custom_calls_that_say_nothing_of_products_are_named():
    program = _read(
        """%p = f32[5]{0} parameter(0)
        %x = f32[5]{0} custom-call(%p), custom_call_target="flash"
        %y = f32[5]{0} custom-call(), custom_call_target="AllocateBuffer"
        ROOT %z = f32[5]{0} custom-call(%x, %y), custom_call_target="flash\""""
    )
    assert program.flops == 0
    assert program.custom_calls == {"flash": 2}


# Traffic. A row of the table holds 10 floats, an index 4 bytes.


@pytest.mark.parametrize(
    "line, size",
    [
        ("%r = f32[10] negate(%x)", 40 + 40),
        ("%r = f32[10] add(%x, %x)", 40 + 40 + 40),
        ("%r = f32[1,10] dynamic-slice(%table, %i, %i), dynamic_slice_sizes={1,10}",
         40 + 40 + 8),
        ("%r = f32[2,10] slice(%table), slice={[0:2], [0:10]}", 80 + 80),
        ("%r = f32[90,10] dynamic-update-slice(%table, %row, %i, %i)", 40 + 40 + 8),
        ("%r = f32[3,10] gather(%table, %ids), offset_dims={1}", 120 + 120 + 12),
        ("%r = f32[90,10] scatter(%table, %ids, %rows), to_apply=%add",
         120 + 12 + 120 + 120),
        ("%r = f32[10] bitcast(%x)", 0),
        ("%r = (f32[10], f32[10]) tuple(%x, %x)", 0),
        ("%r = (f32[10]{0:T(8)S(1)}, f32[10]{0:T(8)}, u32[]{:S(2)}) copy-start(%x)",
         40),
        ("%r = (f32[10], f32[10], u32[]) copy-start(%x)", 40 + 40),
        ("%r = ((f32[90,10]), f32[2,10], s32[]{:S(2)}) slice-start(%table), "
         "slice={[0:2], [0:10]}", 80 + 80),
        ("%r = f32[10] copy-done(%started)", 0),
        # The chip of a TPU, whose layouts have tiles; main memory of a GPU.
        ("%r = f32[10]{0:T(8)S(1)} negate(%x)", 40),
        ("%r = f32[10]{0:S(1)} negate(%x)", 40 + 40),
        ("%r = f32[10] fusion(%table, %i), calls=%cut", 40 + 40 + 4),
        ("%r = f32[10] fusion(%table, %i), calls=%nested", 40 + 40 + 4),
        ("%r = f32[90,10] fusion(%table, %row, %i), calls=%put", 40 + 40 + 4),
        ("%r = (f32[10], f32[90,10]) fusion(%table, %x), calls=%both",
         3600 + 40 + 40 + 0),
        ("%r = f32[90,10] fusion(%table), calls=%through", 3600 + 3600),
        ("%r = f32[90,10] custom-call(%table), called_computations={%through}",
         3600 + 3600),
        ("%r = f32[10] fusion(%table, %row, %i), calls=%sum_of", 3600 + 40 + 4 + 40),
    ],
)  # fmt: skip
def test_traffic_is_what_an_instruction_touches(line, size):
    before = f"""{ADD}
%cut (a0: f32[90,10], a1: s32[]) -> f32[10] {{
  %a0 = f32[90,10] parameter(0)
  %a1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %a2 = f32[1,10] dynamic-slice(%a0, %a1, %zero), dynamic_slice_sizes={{1,10}}
  ROOT %a3 = f32[10] bitcast(%a2)
}}
%nested (b0: f32[90,10], b1: s32[]) -> f32[10] {{
  %b0 = f32[90,10] parameter(0)
  %b1 = s32[] parameter(1)
  %b2 = f32[10] fusion(%b0, %b1), calls=%cut
  ROOT %b3 = f32[10] tanh(%b2)
}}
%put (c0: f32[90,10], c1: f32[1,10], c2: s32[]) -> f32[90,10] {{
  %c0 = f32[90,10] parameter(0)
  %c1 = f32[1,10] parameter(1)
  %c2 = s32[] parameter(2)
  ROOT %c3 = f32[90,10] dynamic-update-slice(%c0, %c1, %c2, %c2)
}}
%sum_of (g0: f32[90,10], g1: f32[1,10], g2: s32[]) -> f32[10] {{
  %g0 = f32[90,10] parameter(0)
  %g1 = f32[1,10] parameter(1)
  %g2 = s32[] parameter(2)
  %g3 = f32[90,10] dynamic-update-slice(%g0, %g1, %g2, %g2)
  %g4 = f32[] constant(0)
  ROOT %g5 = f32[10] reduce(%g3, %g4), dimensions={{0}}, to_apply=%add
}}
%both (d0: f32[90,10], d1: f32[10]) -> (f32[10], f32[90,10]) {{
  %d0 = f32[90,10] parameter(0)
  %d1 = f32[10] parameter(1)
  %d2 = f32[10] reduce(%d0, %d1), dimensions={{0}}, to_apply=%add
  ROOT %d3 = (f32[10], f32[90,10]) tuple(%d2, %d0)
}}
%same (e0: f32[90,10]) -> f32[90,10] {{
  %e0 = f32[90,10] parameter(0)
  ROOT %e1 = f32[90,10] bitcast(%e0)
}}
%through (f0: f32[90,10]) -> f32[90,10] {{
  %f0 = f32[90,10] parameter(0)
  %f1 = f32[90,10] fusion(%f0), calls=%same
  ROOT %f2 = f32[90,10] tanh(%f1)
}}
"""
    program = _read(
        f"""%x = f32[10] parameter(0)
        %table = f32[90,10] parameter(1)
        %row = f32[1,10] parameter(2)
        %rows = f32[3,10] parameter(3)
        %ids = s32[3] parameter(4)
        %i = s32[] parameter(5)
        %started = (f32[10], f32[10], u32[]) parameter(6)
        ROOT {line}""",
        before=before,
    )
    assert program.bytes_accessed == size


# Programs that XLA compiled.


def test_the_collectives_of_a_scan_count_with_its_trips(mesh):
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def body(x, _):
        whole = jax.lax.all_gather(x, "x", axis=0, tiled=True)
        parts = (
            jax.lax.psum(x, "y"),
            jax.lax.ppermute(x, "y", ring),
            jax.lax.all_to_all(x, "y", 0, 0, tiled=True),
            jax.lax.psum_scatter(whole, "x", scatter_dimension=0, tiled=True),
        )
        return jnp.tanh(sum(parts)), whole.sum()

    spec = PartitionSpec("x", "y")
    program = programs.read(
        _compiled(
            jax.shard_map(
                lambda x: jax.lax.scan(body, x, None, length=7),
                mesh=mesh, in_specs=spec, out_specs=(spec, PartitionSpec()),
                check_vma=False,
            ),
            ((32, 24), "float32", spec),
            mesh=mesh,
        ).as_text()
    )  # fmt: skip
    size = 32 // 2 * 24 // 4 * 4  # of one device's x, in bytes
    moves = tuple(
        sorted((4 * r + a, 4 * r + b) for r in range(2) for a, b in ring)
    )  # fmt: skip
    assert {(c.kind, c.groups): (c.count, c.bytes) for c in program.collectives} == {
        ("all-gather", COLUMNS): (7, 7 * 2 * size),
        ("reduce-scatter", COLUMNS): (7, 7 * 2 * size),
        ("all-reduce", ROWS): (7, 7 * size),
        ("all-to-all", ROWS): (7, 7 * size),
        ("collective-permute", moves): (7, 7 * size),
    }
    assert program.unknown_loops == 0


@pytest.mark.parametrize("axis, groups", [("x", COLUMNS), ("y", ROWS)])
def test_the_groups_of_a_partitioned_product_tell_its_mesh_axis(mesh, axis, groups):
    compiled = _compiled(
        lambda a, b: jax.lax.with_sharding_constraint(
            a @ b, NamedSharding(mesh, PartitionSpec())
        ),
        ((16, 24), "float32", PartitionSpec(None, axis)),
        ((24, 40), "float32", PartitionSpec(axis, None)),
        mesh=mesh,
    )
    (found,) = programs.read(compiled.as_text()).collectives
    assert (found.kind, found.groups) == ("all-reduce", groups)
    assert found.bytes == 16 * 40 * 4


@pytest.mark.parametrize("unroll, num_bodies", [(1, 1), (7, 7)])
def test_a_scan_costs_as_much_as_its_unrolling_of_which_xla_counts_one_body(
    unroll, num_bodies
):
    """XLA's cost_analysis() sees one trip; this is why the module exists."""

    def scan(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws, unroll=unroll)

    compiled = _compiled(scan, ((33, 20), "float32"), ((7, 20, 20), "float32"))
    each = 2 * 33 * 20 * 20
    assert programs.read(compiled.as_text()).flops == 7 * each
    assert compiled.cost_analysis()["flops"] == pytest.approx(
        num_bodies * each, rel=0.05
    )


def _conv(**options):
    dims = ("NHWC", "HWIO", "NHWC")
    return functools.partial(
        jax.lax.conv_general_dilated, dimension_numbers=dims, **options
    )


@pytest.mark.parametrize(
    "function, shapes",
    [
        (jnp.matmul, ((31, 25), (25, 47))),
        (lambda a, b: jnp.einsum("bntd,bnsd->bnts", a, b),
         ((3, 5, 6, 8), (3, 5, 7, 8))),
        (_conv(window_strides=(2, 1), padding="SAME"), ((2, 15, 16, 8), (3, 3, 8, 12))),
        (_conv(window_strides=(1, 1), padding=((2, 1), (0, 3)), lhs_dilation=(3, 2),
               rhs_dilation=(1, 2)), ((2, 15, 16, 8), (3, 3, 8, 12))),
        (_conv(window_strides=(1, 1), padding="VALID", feature_group_count=4),
         ((2, 15, 16, 8), (3, 3, 2, 12))),
    ],
    ids=["dot", "batches", "strides", "dilations", "groups"],
)  # fmt: skip
def test_without_loops_the_count_is_that_of_xla(function, shapes):
    compiled = _compiled(function, *((shape, "float32") for shape in shapes))
    program, theirs = programs.read(compiled.as_text()), compiled.cost_analysis()
    assert program.flops == pytest.approx(theirs["flops"], rel=1e-6)
    assert program.bytes_accessed == theirs["bytes accessed"]


def test_a_gather_and_a_write_touch_rows_and_not_the_table():
    table, rows = 5000 * 64 * 4, 7 * 64 * 4
    gather = _compiled(lambda t, i: t[i], ((5000, 64), "float32"), ((7,), "int32"))
    assert programs.read(gather.as_text()).bytes_accessed < 3 * rows < table

    def scan(xs):
        return jax.lax.scan(lambda c, x: (c + 1, jnp.sin(x) * c), 0.0, xs)[1]

    # Each trip reads one slice and writes one: in all, once in and once out. Unfused
    # copies of single rows come on top.
    program = programs.read(_compiled(scan, ((5000, 64), "float32")).as_text())
    assert 2 * table <= program.bytes_accessed < 5 * table


def test_a_train_step_has_the_products_that_the_model_implies(model_config):
    config = model_config()
    model, (rows, length) = zoo.build(config), (8, 5)
    sums_of = steps.loss_sums(model, z_loss=0.0, loss_chunk=0)
    dtypes = {"loss_weights": "float32"}
    names = ("tokens", "targets", "loss_weights", "positions", "segment_ids")
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), dtypes.get(name, "int32"))
        for name in (*names, "target_bytes")
    }
    grad = jax.jit(jax.value_and_grad(sums_of, has_aux=True))
    program = programs.read(grad.lower(model.abstract, batch).compile().as_text())
    # The model's count halves causal attention; the program computes the square, and
    # scores once more in the backward pass.
    width = config.num_layers * config.num_heads * config.head_dim
    halved = 12 * width * (length + 1) / 2
    per_token = counts.flops_per_token(config, length) - halved + 14 * width * length
    assert program.flops == rows * length * per_token
    assert program.unknown_loops == 0


def test_a_loop_that_a_tpu_compiler_wrote_is_read():
    """Five times a product of six pairs of matrices, and a step around a ring.

    Compiled for v5e:2x4, without its metadata and backend_config:
    shard_map(lambda x: fori_loop(0, 5, lambda i, x: ppermute(
        einsum("bij,bjk->bik", x, x), "fsdp", ring), x))
    on a mesh fsdp=4, tensor=2, x bfloat16[6, 4096, 4096].
    """
    program = programs.read((GOLDEN / "tpu_loop.hlo").read_text())
    size = 6 * 4096 * 4096 * 2
    devices = np.arange(8).reshape(4, 2)
    moves = np.stack([devices, np.roll(devices, -1, axis=0)], axis=-1).reshape(-1, 2)
    assert program.unknown_loops == 0
    assert program.flops == 5 * 6 * 2 * 4096**3
    assert program.collectives == (
        programs.Collective(
            "collective-permute", "bf16", tuple(map(tuple, moves.tolist())), 5, 5 * size
        ),
    )
    # A copy in and one out; each trip reads and writes for the product and the step;
    # the rest are the counter and its comparison.
    scalars = 8 + 5 * (12 + 9)
    assert program.bytes_accessed == 4 * size + 5 * 4 * size + scalars
    assert program.largest(1) == (Array("bf16", (6, 4096, 4096)),)


def test_a_large_module_is_read_in_seconds():
    """Thousands of loops and fusions, as a deep model unrolled would have."""
    parts = []
    for n in range(2000):
        text = modules.loop().replace("ENTRY ", "").replace("(p: f32", f"(p{n}: f32")
        for name in ("add", "test", "body", "main"):
            text = text.replace(f"%{name} (", f"%{name}{n} (")
            text = text.replace(f"=%{name}", f"=%{name}{n}")
        parts.append(text)
    calls = [
        f"  %c{n} = (s32[], f32[8]{{0}}) call(%p, %n), to_apply=%main{n}, "
        f'metadata={{op_name="{"x" * 2000}"}}'
        for n in range(2000)
    ]
    head = ["ENTRY %all () -> f32[] {", "  %p = f32[8]{0} parameter(0)"]
    head += ["  %n = s32[] parameter(1)"]
    whole = "\n".join([*parts, *head, *calls, "  ROOT %r = f32[] constant(0)", "}"])
    began = time.perf_counter()
    program = programs.read(whole)
    assert time.perf_counter() - began < 10
    assert [c.count for c in program.collectives] == [2000 * 5]
