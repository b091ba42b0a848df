"""Tests of the chunked cross-entropy and its hand-written gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import meshes, objectives, sharding
from fm_jax.compiled import estimates, program

B, T, D, V = 2, 12, 5, 37
CASES = [(0.0, 0.0), (0.0, 0.02), (2.5, 0.0), (2.5, 0.02)]


def _inputs():
    """Return hidden states, a head, targets and uneven weights, some of them zero."""
    rng = np.random.default_rng(7)
    x_BTD = rng.standard_normal((B, T, D)).astype(np.float32)
    head_VD = rng.standard_normal((V, D)).astype(np.float32)
    targets_BT = rng.integers(0, V, (B, T))
    weights_BT = rng.uniform(0.2, 2.0, (B, T)).astype(np.float32)
    weights_BT[0, -3:] = 0
    weights_BT[1, 4] = 0
    # Some targets are what the model says, so that `correct` counts something.
    best_BT = np.argmax(x_BTD @ head_VD.T, axis=-1)
    targets_BT[:, ::3] = best_BT[:, ::3]
    return x_BTD, head_VD, targets_BT, weights_BT


def _loss(x_BTD, head_VD, targets_BT, weights_BT, **overrides):
    options = {"softcap": 0.0, "z_loss": 0.0, "chunk": 0, "dtype": jnp.dtype("float32")}
    return objectives.cross_entropy(
        x_BTD, head_VD, targets_BT, weights_BT, **options | overrides
    )


def _by_hand(x_BTD, head_VD, targets_BT, weights_BT, *, softcap, z_loss):
    """Return the loss and its sums token by token, in float64."""
    sums = {"total": 0.0, "nll": 0.0, "weight": 0.0, "correct": 0.0}
    for b, t in np.ndindex(*targets_BT.shape):
        logits_V = head_VD.astype(np.float64) @ x_BTD[b, t].astype(np.float64)
        if softcap:
            logits_V = softcap * np.tanh(logits_V / softcap)
        log_z = np.log(np.sum(np.exp(logits_V)))
        nll = -np.log(np.exp(logits_V[targets_BT[b, t]]) / np.exp(log_z))
        weight = float(weights_BT[b, t])
        sums["total"] += weight * (nll + z_loss * log_z**2)
        sums["nll"] += weight * nll
        sums["weight"] += weight
        sums["correct"] += weight * (np.argmax(logits_V) == targets_BT[b, t])
    return sums.pop("total"), sums


def _by_hand_of_rows(inputs, **options):
    """Return the nats and hits of each row, as if it were the only one."""
    x_BTD, head_VD, *rest = inputs
    rows = (slice(b, b + 1) for b in range(len(x_BTD)))
    alone = ((x_BTD[b], head_VD, *(x[b] for x in rest)) for b in rows)
    sums = [_by_hand(*row, **options)[1] for row in alone]
    return {f"row_{name}": [s[name] for s in sums] for name in ("nll", "correct")}


@functools.partial(jax.jit, static_argnames=("softcap", "z_loss"))
def _naive_gradients(x_BTD, head_VD, targets_BT, weights_BT, *, softcap, z_loss):
    """Return autodiff's gradients of the loss made from the whole array of logits."""

    def loss(x_BTD, head_VD):
        logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, head_VD)
        if softcap:
            logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
        hit_BTV = jax.nn.one_hot(targets_BT, len(head_VD))
        nll_BT = -jnp.sum(jax.nn.log_softmax(logits_BTV) * hit_BTV, axis=-1)
        log_z_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV), axis=-1))
        return jnp.sum(weights_BT * (nll_BT + z_loss * log_z_BT**2))

    return jax.grad(loss, argnums=(0, 1))(x_BTD, head_VD)


@pytest.mark.parametrize("chunk", [0, 1, 4, 5, 12])
@pytest.mark.parametrize("softcap, z_loss", CASES)
def test_loss_and_sums_equal_the_formula(softcap, z_loss, chunk):
    inputs = _inputs()
    loss, sums = _loss(*inputs, softcap=softcap, z_loss=z_loss, chunk=chunk)
    expected, expected_sums = _by_hand(*inputs, softcap=softcap, z_loss=z_loss)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert sums.keys() == {"nll", "weight", "correct"}
    assert expected_sums["correct"] > 1
    for name, value in expected_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)


def _gradients(scale=1.0, **options):
    """Return the loss and its gradients in x and head, in one compiled pass."""

    @jax.jit
    def both(x_BTD, head_VD, targets_BT, weights_BT):
        def scaled(x_BTD, head_VD):
            loss, sums = _loss(x_BTD, head_VD, targets_BT, weights_BT, **options)
            return scale * loss, sums

        return jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(x_BTD, head_VD)

    return both


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("softcap, z_loss", CASES)
def test_gradients_equal_autodiff_of_the_formula(softcap, z_loss, chunk):
    inputs = _inputs()
    (loss, sums), slopes = _gradients(softcap=softcap, z_loss=z_loss, chunk=chunk)(
        *inputs
    )
    expected = _naive_gradients(*inputs, softcap=softcap, z_loss=z_loss)
    for found, other in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-5)
    # The pass that makes gradients has its own loss and sums.
    expected_loss, expected_sums = _by_hand(*inputs, softcap=softcap, z_loss=z_loss)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for name, value in expected_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("chunk", [0, 4])
def test_the_losses_of_rows_are_those_of_each_row_by_itself(chunk):
    inputs = _inputs()
    options = {"softcap": 2.5, "z_loss": 0.02}
    expected = _by_hand_of_rows(inputs, **options)
    _, alone = _loss(*inputs, **options, chunk=chunk, by_row=True)
    (loss, sums), slopes = _gradients(**options, chunk=chunk, by_row=True)(*inputs)
    assert min(expected["row_correct"]) > 0
    for name, value in expected.items():
        np.testing.assert_allclose(alone[name], value, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)
    # And nothing else changes.
    (same, others), same_slopes = _gradients(**options, chunk=chunk)(*inputs)
    assert sums.keys() - others.keys() == {"row_nll", "row_correct"}
    np.testing.assert_allclose(loss, same, rtol=1e-6)
    for found, other in zip(slopes, same_slopes, strict=True):
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-6)


def test_gradients_grow_with_what_multiplies_the_loss():
    inputs = _inputs()
    _, slopes = _gradients(scale=3.0, softcap=2.5, z_loss=0.02, chunk=4)(*inputs)
    expected = _naive_gradients(*inputs, softcap=2.5, z_loss=0.02)
    for found, other in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(found, 3 * other, rtol=0, atol=3e-5)


def test_tokens_of_weight_zero_get_no_gradient():
    inputs = _inputs()
    _, (d_x_BTD, _) = _gradients(z_loss=0.02, chunk=4)(*inputs)
    ignored_BT = inputs[3] == 0
    assert not np.any(np.asarray(d_x_BTD)[ignored_BT])
    assert np.all(np.any(np.asarray(d_x_BTD)[~ignored_BT], axis=-1))


def test_bfloat16_gradients_keep_the_dtypes_of_their_operands():
    x_BTD, head_VD, *rest = _inputs()
    x_BTD = jnp.asarray(x_BTD, jnp.bfloat16)
    _, (d_x_BTD, d_head_VD) = _gradients(chunk=4, dtype=jnp.dtype("bfloat16"))(
        x_BTD, head_VD, *rest
    )
    assert (d_x_BTD.dtype, d_head_VD.dtype) == (jnp.bfloat16, jnp.float32)
    expected = _naive_gradients(
        x_BTD.astype(jnp.float32), head_VD, *rest, softcap=0.0, z_loss=0.0
    )
    for found, other in zip((d_x_BTD, d_head_VD), expected, strict=True):
        error = np.sqrt(np.mean((found - other) ** 2) / np.mean(other**2))
        assert error < 2**-6  # a few roundings to 8 bits


def _largest_array(chunk, **options):
    """Return how many elements the largest array of the compiled gradient has."""
    options |= {"softcap": 2.5, "z_loss": 0.02, "chunk": chunk}
    return _largest(_gradients(**options).lower(*_inputs()).compile().as_text())


def _largest(text):
    """Return how many elements the largest array of a compiled program has."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)


def test_the_chunked_gradient_never_holds_all_logits():
    assert _largest_array(chunk=0) == B * T * V
    assert _largest_array(chunk=4) == B * 4 * V
    assert _largest_array(chunk=4, by_row=True) == B * 4 * V


@pytest.mark.parametrize("chunk, shrunk", [(5, 4), (8, 6), (9, 6), (18, 12), (24, 12)])
def test_a_chunk_that_does_not_divide_the_length_shrinks_to_one_that_does(
    chunk, shrunk, equations
):
    jaxpr = jax.make_jaxpr(_gradients(chunk=chunk))(*_inputs())
    scans = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
    assert {scan.params["length"] for scan in scans} == {T // shrunk}
    held = [v.aval.shape for e in equations(jaxpr) for v in e.outvars]
    assert (B, shrunk, V) in held
    assert max(shape[1] for shape in held if shape[2:] == (V,)) == shrunk


# ---- a bias on the head

BIAS_V = np.random.default_rng(13).standard_normal(V).astype(np.float32)


def _with_column(x_BTD, head_VD, bias_V):
    """Return hidden states and a head whose plain product has the bias in it."""
    ones_BT1 = np.ones((*x_BTD.shape[:2], 1), np.float32)
    return (
        np.concatenate([x_BTD, ones_BT1], axis=2),
        np.concatenate([head_VD, bias_V[:, None]], axis=1),
    )


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("softcap, z_loss", CASES)
def test_a_bias_is_a_column_of_the_head_that_sees_a_one(softcap, z_loss, chunk):
    x_BTD, head_VD, *rest = _inputs()
    wide = (*_with_column(x_BTD, head_VD, BIAS_V), *rest)
    options = {"softcap": softcap, "z_loss": z_loss}
    expected_loss, expected_sums = _by_hand(*wide, **options)
    d_wide_x, d_wide_head = _naive_gradients(*wide, **options)

    @jax.jit
    def both(x_BTD, head_VD, bias_V):
        def loss(x_BTD, head_VD, bias_V):
            how = options | {"chunk": chunk, "bias_V": bias_V}
            return _loss(x_BTD, head_VD, *rest, **how)

        slopes = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        return loss(x_BTD, head_VD, bias_V), slopes(x_BTD, head_VD, bias_V)

    (loss, sums), (slopes, same) = both(x_BTD, head_VD, BIAS_V)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for name, value in expected_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(same[name], value, rtol=1e-6, err_msg=name)
    expected = (d_wide_x[..., :D], d_wide_head[:, :D], d_wide_head[:, D])
    for found, other in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-5)


# ---- the nats of each target by themselves


@functools.partial(jax.jit, static_argnames=("softcap",))
def _naive_nll(x_BTD, head_VD, bias_V, targets_BT, *, softcap=0.0):
    """Return the nats of each target by a plain softmax over all logits at once."""
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, head_VD) + bias_V
    if softcap:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    hit_BTV = jax.nn.one_hot(targets_BT, len(head_VD))
    return -jnp.sum(jnp.log(jax.nn.softmax(logits_BTV)) * hit_BTV, axis=-1)


def _bent(nll_BT):
    """Return a loss that is no sum over targets: each weighs what the others are."""
    return jnp.sum(jnp.log1p(jnp.cumsum(nll_BT, axis=1) ** 2))


def _token_nll(x_BTD, head_VD, bias_V, targets_BT, **overrides):
    options = {"softcap": 0.0, "chunk": 0, "dtype": jnp.dtype("float32")}
    return objectives.token_nll(
        x_BTD, head_VD, targets_BT, bias_V=bias_V, **options | overrides
    )


def _token_gradients(**options):
    """Return the nats and the gradients of `_bent` in x, head and bias."""

    @jax.jit
    def both(x_BTD, head_VD, bias_V, targets_BT):
        def loss(x_BTD, head_VD, bias_V):
            nll_BT = _token_nll(x_BTD, head_VD, bias_V, targets_BT, **options)
            return _bent(nll_BT), nll_BT

        slopes = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        return slopes(x_BTD, head_VD, bias_V)

    return both


def _naive_token_gradients(x_BTD, head_VD, bias_V, targets_BT, **options):
    def loss(x_BTD, head_VD, bias_V):
        return _bent(_naive_nll(x_BTD, head_VD, bias_V, targets_BT, **options))

    return jax.grad(loss, argnums=(0, 1, 2))(x_BTD, head_VD, bias_V)


@pytest.mark.parametrize("chunk", [0, 1, 3, 5, T])
@pytest.mark.parametrize("softcap", [0.0, 2.5])
def test_the_nats_of_targets_and_their_gradients_are_a_plain_softmax_s(softcap, chunk):
    x_BTD, head_VD, targets_BT, _ = _inputs()
    given = (x_BTD, head_VD, BIAS_V, targets_BT)
    expected_BT = _naive_nll(*given, softcap=softcap)
    alone_BT = jax.jit(functools.partial(_token_nll, softcap=softcap, chunk=chunk))
    slopes, nll_BT = _token_gradients(softcap=softcap, chunk=chunk)(*given)
    for found_BT in (alone_BT(*given), nll_BT):
        assert (found_BT.shape, found_BT.dtype) == ((B, T), jnp.float32)
        np.testing.assert_allclose(found_BT, expected_BT, rtol=0, atol=2e-6)
    expected = _naive_token_gradients(*given, softcap=softcap)
    for found, other in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-5)


def test_without_a_bias_the_nats_of_targets_are_those_of_a_bias_of_zero():
    x_BTD, head_VD, targets_BT, _ = _inputs()
    expected_BT = _naive_nll(x_BTD, head_VD, np.zeros(V, np.float32), targets_BT)
    found_BT = _token_nll(x_BTD, head_VD, None, targets_BT, chunk=4)
    np.testing.assert_allclose(found_BT, expected_BT, rtol=0, atol=2e-6)


def test_the_weighted_nats_of_targets_add_up_to_the_cross_entropy():
    x_BTD, head_VD, targets_BT, weights_BT = _inputs()
    nll_BT = _token_nll(x_BTD, head_VD, None, targets_BT, softcap=2.5, chunk=3)
    loss, _ = _loss(x_BTD, head_VD, targets_BT, weights_BT, softcap=2.5, chunk=4)
    np.testing.assert_allclose(jnp.sum(weights_BT * nll_BT), loss, rtol=1e-6)


def test_bfloat16_nats_are_float32_and_gradients_keep_their_operands_dtypes():
    x_BTD, head_VD, targets_BT, _ = _inputs()
    given = (jnp.asarray(x_BTD, jnp.bfloat16), head_VD, BIAS_V, targets_BT)
    slopes, nll_BT = _token_gradients(chunk=4, dtype=jnp.dtype("bfloat16"))(*given)
    assert nll_BT.dtype == jnp.float32
    assert [d.dtype for d in slopes] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_the_chunked_nats_of_targets_never_hold_all_logits():
    x_BTD, head_VD, targets_BT, _ = _inputs()
    given = (x_BTD, head_VD, BIAS_V, targets_BT)

    def largest(chunk):
        lowered = _token_gradients(softcap=2.5, chunk=chunk).lower(*given)
        return _largest(lowered.compile().as_text())

    assert largest(0) == B * T * V
    assert largest(4) == B * 4 * V


# ---- the losses of experts


def _numbers():
    """Return the numbers of two layers, of 6 tokens with 2 of 3 experts each."""
    return {
        "load": np.array([[4, 4, 4], [6, 6, 0]], np.float32),
        "probs": np.array([[1, 2, 3], [3, 3, 0]], np.float32),
        "tokens": np.array([6, 6], np.float32),
        "lse_squared": np.array([12, 6], np.float32),
    }


def test_the_balance_loss_is_one_where_all_is_even_and_more_where_it_is_not():
    found = objectives.expert_losses(_numbers())
    # Where the load is even, probabilities do not matter; where half the choices and
    # half the probability are on one of three: 3 * (1/4 + 1/4).
    np.testing.assert_allclose(found["balance_loss"], (1 + 1.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(found["router_z_loss"], (2 + 1) / 2, rtol=1e-6)


def test_the_balance_loss_lowers_the_probability_of_busy_experts_by_their_load():
    numbers = _numbers()

    def loss(probs, load):
        more = numbers | {"probs": probs, "load": load}
        return objectives.expert_losses(more)["balance_loss"]

    d_probs, d_load = jax.grad(loss, argnums=(0, 1))(numbers["probs"], numbers["load"])
    shares = numbers["load"] / 12
    np.testing.assert_allclose(d_probs, 3 * shares / 6 / 2, rtol=1e-6)
    assert not np.any(d_load)


def test_a_batch_of_padding_has_experts_losses_of_zero():
    zeros = {name: np.zeros_like(x) for name, x in _numbers().items()}
    assert set(map(float, objectives.expert_losses(zeros).values())) == {0.0}


def test_what_experts_add_is_their_losses_for_every_unit_of_weight():
    sums = {"nll": jnp.float32(5.0), "weight": jnp.float32(4.0)}
    weights = {"balance_loss": 0.5, "router_z_loss": 0.25}
    total, found = objectives.add_experts(jnp.float32(7.0), sums, _numbers(), weights)
    assert found.pop("experts").keys() == _numbers().keys()
    assert {name: float(x) for name, x in found.items()} == pytest.approx(
        {"nll": 5.0, "weight": 4.0, "balance_loss": 4 * 1.25, "router_z_loss": 4 * 1.5}
    )
    assert float(total) == pytest.approx(7 + 4 * (0.5 * 1.25 + 0.25 * 1.5))


# ---- components of a mixture


def test_sums_of_rows_are_added_up_by_component():
    by_row = {"nll": jnp.array([1.0, 2.0, 4.0, 8.0]), "weight": jnp.arange(4.0)}
    found = objectives.by_component(by_row, jnp.array([2, 0, 2, 0]), 3)
    np.testing.assert_array_equal(found["nll"], [10, 0, 5])
    np.testing.assert_array_equal(found["weight"], [4, 0, 2])


# ---- on meshes of eight devices

MESHES = {
    "ddp": {"preset": "ddp"},
    "fsdp": {"preset": "fsdp"},
    "hsdp": {"preset": "hsdp"},
    "tensor": {"preset": "tensor"},
    "fsdp_tensor": {"preset": "fsdp_tensor"},
    "context": {"preset": "context"},
    "mix": {"preset": "ddp", "data": 2, "context": 2, "tensor": 2},
}
AXES = {
    "x": ("batch", "length", None),
    "head": ("vocab", "embed"),
    "targets": ("batch", "length"),
    "weights": ("batch", "length"),
}


def _layout(name):
    given = dict(MESHES[name])
    return sharding.layout(meshes.make(meshes.sizes(given.pop("preset"), given, 8)))


def _many_inputs():
    """Return inputs that eight devices divide, one row of them without weight."""
    rng = np.random.default_rng(11)
    x_BTD = rng.standard_normal((16, T, 24)).astype(np.float32)
    head_VD = rng.standard_normal((40, 24)).astype(np.float32)
    targets_BT = np.argmax(x_BTD @ head_VD.T, axis=-1).astype(np.int32)
    targets_BT[:, ::2] = rng.integers(0, 40, (16, T // 2))
    weights_BT = rng.uniform(0.2, 2.0, (16, T)).astype(np.float32)
    weights_BT[3], weights_BT[:, 5] = 0, 0
    return x_BTD, head_VD, targets_BT, weights_BT


def _on(layout, inputs):
    places = [
        layout.sharding(*sharding.spec(axes, x.shape, layout))
        for x, axes in zip(inputs, AXES.values(), strict=True)
    ]
    return jax.device_put(inputs, tuple(places))


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_neither_loss_nor_sums_nor_gradients(name, chunk):
    inputs, layout = _many_inputs(), _layout(name)
    options = {"softcap": 2.5, "z_loss": 0.02}
    expected_loss, expected_sums = _by_hand(*inputs, **options)
    expected = _naive_gradients(*inputs, **options)
    with layout.active():
        arguments = _on(layout, inputs)
        (loss, sums), slopes = _gradients(**options, chunk=chunk)(*arguments)
        alone, alone_sums = jax.jit(functools.partial(_loss, **options, chunk=chunk))(
            *arguments
        )
    for found, parts in ((loss, sums), (alone, alone_sums)):
        np.testing.assert_allclose(found, expected_loss, rtol=1e-6)
        for key, value in expected_sums.items():
            np.testing.assert_allclose(parts[key], value, rtol=1e-6, err_msg=key)
    for found, other, given in zip(slopes, expected, arguments, strict=False):
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-5)
        assert found.sharding.is_equivalent_to(given.sharding, found.ndim)


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_does_not_change_the_losses_of_rows(name):
    inputs, layout = _many_inputs(), _layout(name)
    options = {"softcap": 2.5, "z_loss": 0.02}
    expected = _by_hand_of_rows(inputs, **options)
    with layout.active():
        do = _gradients(**options, chunk=4, by_row=True)
        (_, sums), _ = do(*_on(layout, inputs))
    for key, value in expected.items():
        np.testing.assert_allclose(sums[key], value, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_does_not_change_the_loss_and_gradient_of_a_bias(name):
    x_BTD, head_VD, *rest = _many_inputs()
    bias_V = np.resize(BIAS_V, 40)
    wide = (*_with_column(x_BTD, head_VD, bias_V), *rest)
    options = {"softcap": 2.5, "z_loss": 0.02}
    expected_loss, _ = _by_hand(*wide, **options)
    _, d_wide_head = _naive_gradients(*wide, **options)
    layout = _layout(name)

    @jax.jit
    def do(x_BTD, head_VD, targets_BT, weights_BT, bias_V):
        def loss(bias_V):
            arrays = (x_BTD, head_VD, targets_BT, weights_BT)
            return _loss(*arrays, **options, chunk=4, bias_V=bias_V)[0]

        return jax.value_and_grad(loss)(bias_V)

    with layout.active():
        arguments = _on(layout, (x_BTD, head_VD, *rest))
        place = layout.sharding(*sharding.spec(("vocab",), bias_V.shape, layout))
        loss, d_bias_V = do(*arguments, jax.device_put(bias_V, place))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(d_bias_V, d_wide_head[:, -1], rtol=0, atol=1e-5)
    assert d_bias_V.sharding.is_equivalent_to(place, 1)


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_does_not_change_the_nats_of_targets_and_their_gradients(name, chunk):
    x_BTD, head_VD, targets_BT, _ = _many_inputs()
    layout, bias_V = _layout(name), np.resize(BIAS_V, 40)
    given = (x_BTD, head_VD, bias_V, targets_BT)
    expected_BT = _naive_nll(*given, softcap=2.5)
    expected = _naive_token_gradients(*given, softcap=2.5)
    axes = (AXES["x"], AXES["head"], ("vocab",), AXES["targets"])
    places = [
        layout.sharding(*sharding.spec(a, x.shape, layout))
        for x, a in zip(given, axes, strict=True)
    ]
    with layout.active():
        arguments = jax.device_put(given, tuple(places))
        slopes, nll_BT = _token_gradients(softcap=2.5, chunk=chunk)(*arguments)
        alone = functools.partial(_token_nll, softcap=2.5, chunk=chunk)
        alone_BT = jax.jit(alone)(*arguments)
    for found_BT in (nll_BT, alone_BT):
        np.testing.assert_allclose(found_BT, expected_BT, rtol=0, atol=5e-6)
        assert found_BT.sharding.is_equivalent_to(places[3], 2)
    for found, other, place in zip(slopes, expected, places, strict=False):
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-5)
        assert found.sharding.is_equivalent_to(place, found.ndim)


@functools.cache
def _said(name, chunk, *, is_loss_alone=False):
    """Return the collectives of the compiled loss by kind and mesh axes."""
    layout = _layout(name)
    options = {"softcap": 2.5, "z_loss": 0.02, "chunk": chunk}
    do = _gradients(**options)
    if is_loss_alone:
        do = jax.jit(functools.partial(_loss, **options))
    with layout.active():
        compiled = do.lower(*_on(layout, _many_inputs())).compile()
    found = estimates.traffic(program.read(compiled.as_text()), layout.mesh)
    return {(t.kind, t.axes): (t.count, t.bytes) for t in found if t.axes}


@pytest.mark.parametrize("is_loss_alone", [False, True])
@pytest.mark.parametrize("name", MESHES)
def test_devices_talk_once_in_a_loss_and_not_once_a_chunk(name, is_loss_alone):
    whole, chunked = (_said(name, c, is_loss_alone=is_loss_alone) for c in (0, 2))
    assert whole.keys() == chunked.keys()
    for key, (count, size) in whole.items():
        # Where the vocabulary is cut, each chunk's own numbers are added up over it.
        times = 6 if key == ("all-reduce", ("tensor",)) else 1
        assert chunked[key] == (times * count, size), key


@pytest.mark.parametrize("name", MESHES)
def test_devices_exchange_the_head_and_its_gradient_and_no_logits(name):
    head_bytes = 4 * 40 * 24 // _layout(name).size("tensor")
    others = {k: v for k, v in _said(name, 2).items() if "tensor" not in k[1]}
    assert {kind for kind, _ in others} <= {
        "all-gather",
        "reduce-scatter",
        "all-reduce",
    }
    for kind in ("all-gather", "reduce-scatter", "all-reduce"):
        found = sum(size for (k, _), (_, size) in others.items() if k == kind)
        assert found <= head_bytes + 4 * 4  # and the four sums
    assert sum(count for count, _ in others.values()) <= 4
