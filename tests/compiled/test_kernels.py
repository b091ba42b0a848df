"""Tests of what attention kernels cost, by hand and by the TPU's compiler."""

import pytest

from fm_jax.compiled import program
from fm_jax.compiled.text import Array
from tests.compiled import modules

# Rows and heads, 6 of queries and 2 of keys; a row; a head's dims.
QUERY, KEY = "bf16[3,6,64,16]{3,2,1,0}", "bf16[3,2,64,16]{3,2,1,0}"
ARRAY = 2 * 3 * 6 * 64 * 16
PAIRS, BLOCK = 40 * 64, 8  # 40 tiles of 8 x 8
LOADED = 3 * 6 * PAIRS // BLOCK * 16 * 2  # of each array that is loaded again


def _splash(phase, operands, results, *, again=PAIRS):
    """Return a module of one splash kernel, its attributes over lines as XLA's are."""
    lines = [f"%p{k} = {shape} parameter({k})" for k, shape in enumerate(operands)]
    names = ", ".join(f"%p{k}" for k in range(len(operands)))
    kernel = f"splash_mha_{phase}_segmented_residuals"
    lines.append(
        f"ROOT %{kernel}.2 = {results} custom-call({names}), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={'
    )
    name = f"jit(f)/vmap(pairs_{again}_by_{BLOCK})/{kernel}/pallas_call"
    rest = [
        r'"xprof_metadata":"{\"block_q\": 8}"',
        f'}}}}, metadata={{op_name="{name}"}}',
        "}",
    ]
    return modules.entry("\n".join(lines)).rstrip("}").rstrip() + "\n" + "\n".join(rest)


def test_splash_forward_has_two_products_and_loads_keys_for_every_block():
    operands = ("s8[1,8,8]{2,1,0}", QUERY, KEY, KEY, "s32[3,64,128]{2,1,0}")
    found = program.read(_splash("fwd", operands, QUERY))
    assert found.flops == 2 * 2 * 3 * 6 * PAIRS * 16
    once = 64 + 2 * ARRAY + 3 * 64 * 128 * 4
    assert found.bytes_accessed == once + 2 * LOADED
    assert found.custom_calls == {}


def test_splash_for_keys_has_four_products_and_loads_queries_and_gradients():
    lse = "f32[3,6,8,64]{3,2,1,0}"
    operands = (QUERY, KEY, KEY, lse, QUERY, lse)
    found = program.read(_splash("dkv", operands, f"({KEY}, {KEY})"))
    assert found.flops == 4 * 2 * 3 * 6 * PAIRS * 16
    once = 2 * 3 * 6 * 8 * 64 * 4 + 4 * ARRAY // 3
    assert found.bytes_accessed == once + 2 * LOADED


def test_what_is_on_the_chip_is_loaded_from_there():
    near = "bf16[3,2,64,16]{3,2,1,0:T(8,128)S(1)}"
    operands = (QUERY, near, KEY)
    found = program.read(_splash("dq", operands, QUERY))
    assert found.flops == 3 * 2 * 3 * 6 * PAIRS * 16
    assert found.bytes_accessed == 2 * ARRAY + LOADED


def test_kernels_that_say_nothing_are_counted_as_unknown():
    text = _splash("fwd", (QUERY, KEY, KEY), QUERY).replace("pairs", "others")
    found = program.read(text)
    assert (found.flops, found.custom_calls) == (0, {"tpu_custom_call": 1})


def test_attributes_may_stand_on_several_lines():
    text = _splash("fwd", (QUERY, KEY, KEY), QUERY)
    found = program.read(text.rstrip("}") + "  ROOT %c = f32[5]{0} parameter(9)\n}")
    assert found.flops
    assert Array("f32", (5,)) in found.arrays


CONFIG = (
    'backend_config={"cudnn_fmha_backend_config":{"fmha_scale":1,'
    '"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["3","6","64",'
    '"64"]},"mask_type":"MASK","sliding_window_length":WINDOW}}'
)


@pytest.mark.parametrize(
    "mask, window, pairs",
    [("CAUSAL", 0, 64 * 65 // 2), ("CAUSAL", 2, 1 + 63 * 2), ("NO_MASK", 0, 64 * 64)],
)
@pytest.mark.parametrize("backward, products", [("", 2), ("Backward", 5)])
def test_cudnn_works_on_what_its_mask_leaves(mask, window, pairs, backward, products):
    config = CONFIG.replace("MASK", mask).replace("WINDOW", str(window))
    found = program.read(
        modules.entry(
            f"""%q = bf16[3,64,6,16]{{3,2,1,0}} parameter(0)
            %k = bf16[3,64,2,16]{{3,2,1,0}} parameter(1)
            ROOT %o = (bf16[3,6,64,16]{{3,1,2,0}}, u8[0]) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax{backward}", {config}"""
        )
    )
    assert found.flops == 2 * products * 3 * 6 * pairs * 16
