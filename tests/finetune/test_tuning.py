"""Tests of what trains, how the rest is held, and what that saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax import trees
from fm_jax.compiled import program
from fm_jax.finetune import heads, tuning
from fm_jax.models import zoo
from tests.conftest import ARCHITECTURES
from tests.finetune import asked

UP = "blocks/mlp/up/kernel"
WAYS = {
    "full": {},
    "bias": {"method": "bias"},
    "lora": {"method": "lora"},
    "probe": {"method": "probe"},
    "lp_ft": {"method": "lp_ft"},
    "none": {"method": "none"},
    "last_layers": {"last_layers": 1},
    "lora_last_layers": {"method": "lora", "last_layers": 2},
    "several_stacks": {"rules": ((r"/[12]/attention|/2/mlp", 1.0), (r".*", 0.0))},
    "no_suffix": {"rules": ((r"/[02]/attention|/1/mlp", 2.0), (r".*", 0.0))},
}


def _plan(model, lora=(), **given):
    return tuning.plan(model, asked.finetune(**given), asked.lora(**dict(lora)))


@pytest.fixture(scope="module")
def tiny(model_config, random_params):
    """Return a model with biases and a new head, and its params."""
    model = heads.with_classifier(zoo.build(model_config(use_bias=True)), 5)
    return model, random_params(model.abstract)


@pytest.mark.parametrize("way", WAYS)
def test_the_two_parts_make_the_params_again_to_the_bit(way, tiny):
    model, params = tiny
    plan = _plan(model, **WAYS[way])
    trained, frozen = plan.split(params, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, plan.merged(trained, frozen), params)
    for part, axes, abstract in (
        (trained, plan.axes, plan.abstract),
        (frozen, plan.frozen_axes, plan.frozen_abstract),
    ):
        of = trees.leaves_by_path(axes, is_leaf=lambda x: isinstance(x, tuple))
        for path, leaf in trees.leaves_by_path(part).items():
            assert len(of.pop(path)) == leaf.ndim, path
        assert not of
        jax.tree.map(
            lambda x, s: (x.shape, x.dtype) == (s.shape, s.dtype) or 1 / 0,
            part,
            abstract,
        )


@pytest.mark.parametrize("way", ["full", "lora", "last_layers", "several_stacks"])
def test_joined_params_compute_what_the_whole_do(way, tiny):
    model, params = tiny
    plan = _plan(model, **WAYS[way])

    @jax.jit
    def both(params):
        joined = plan.join(*plan.split(params, jax.random.key(1)))
        return asked.logits(model, joined), asked.logits(model, params)

    np.testing.assert_array_equal(*both(params))


def test_the_whole_is_what_trains_and_nothing_is_frozen(tiny):
    model, params = tiny
    plan = tuning.whole(model)
    trained, frozen = plan.split(params, None)
    assert trained is params
    assert frozen == plan.frozen_abstract == plan.frozen_axes == {}
    assert plan.join(trained, frozen) is plan.merged(trained, frozen) is params
    assert plan.multipliers is plan.gate is None
    assert plan.lines() == ["trains 6,125 parameters, 100% of 6,125"]


@pytest.mark.parametrize("method", ["full", "none"])
def test_a_plan_for_everything_or_nothing_holds_the_whole(method, model_config):
    model = zoo.build(model_config(use_bias=True))
    plan = _plan(model, method=method)
    assert plan.axes is model.axes
    assert plan.abstract is model.abstract
    assert plan.frozen_abstract == {}
    assert plan.multipliers is plan.gate is None


def test_a_new_head_trains_under_every_method_and_is_kept_after_a_probe(tiny):
    model, _ = tiny
    for way in ("bias", "lora", "lp_ft", "last_layers", "probe"):
        plan = _plan(model, **WAYS[way])
        assert plan.abstract["classifier"] == model.abstract["classifier"], way
    probe = _plan(model, method="probe")
    assert list(probe.abstract) == ["classifier"]
    assert probe.multipliers == {"classifier": {"kernel": 0, "bias": 0}}


def test_what_trains_of_upper_layers_is_cut_from_what_does_not(tiny):
    model, params = tiny
    plan = _plan(model, last_layers=2)
    trained, frozen = plan.split(params, jax.random.key(1))
    assert plan.multipliers is None
    assert {leaf.shape[0] for leaf in jax.tree.leaves(trained["blocks"])} == {2}
    assert set(frozen) == {"blocks", "embedding", "head"}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(frozen["blocks"]["0"])} == {1}
    assert not frozen["blocks"].get("1")
    joined = plan.join(trained, frozen)
    assert [len(jax.tree.leaves(stack)[0]) for stack in joined["blocks"]] == [1, 2]


def test_of_layers_that_are_no_suffix_the_lowest_is_where_it_is_cut(tiny):
    model, _ = tiny
    plan = _plan(model, **WAYS["no_suffix"])
    query = plan.abstract["blocks"]["attention"]["query"]["kernel"]
    assert query.shape == (3, 12, 4, 6)
    rate = plan.multipliers["blocks"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(rate, np.float32([[[[2]]], [[[0]]], [[[2]]]]))
    assert plan.abstract["blocks"]["mlp"]["up"]["kernel"].shape == (2, 12, 20)
    rate = plan.multipliers["blocks"]["mlp"]["up"]["bias"]
    np.testing.assert_array_equal(rate, np.float32([[2], [0]]))


def test_gradients_of_what_trains_are_those_of_the_whole(tiny):
    model, params = tiny
    plan = _plan(model, **WAYS["several_stacks"])

    def loss(params):
        return jnp.mean(jax.nn.logsumexp(asked.logits(model, params), axis=-1))

    trained, frozen = plan.split(params, jax.random.key(1))
    found = jax.jit(jax.grad(lambda t: loss(plan.join(t, frozen))))(trained)
    whole = jax.jit(jax.grad(loss))(params)
    expected = plan.split(whole, jax.random.key(1))[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found,
        expected,
    )
    assert found["blocks"]["mlp"]["up"]["kernel"].shape == (1, 12, 20)
    assert found["blocks"]["attention"]["query"]["kernel"].shape == (2, 12, 4, 6)


def test_multipliers_follow_the_layers_of_what_trains(tiny):
    model, _ = tiny
    plan = _plan(model, method="lora", layer_decay=0.5, last_layers=2)
    rates = trees.leaves_by_path(plan.multipliers)
    assert rates["classifier/kernel"] == 1
    for kind in "ab":
        rate = rates[f"lora/blocks/mlp/up/{kind}"]
        np.testing.assert_array_equal(rate, np.float32([[[0.5]], [[1]]]))
        rate = rates[f"lora/blocks/attention/out/{kind}"]
        leaf = plan.abstract["lora"]["blocks"]["attention"]["out"][kind]
        assert np.broadcast_shapes(rate.shape, leaf.shape) == leaf.shape
        np.testing.assert_array_equal(np.ravel(rate), [0.5, 1])


def test_the_gate_opens_a_layer_more_every_so_many_steps(tiny):
    model, _ = tiny
    plan = _plan(model, unfreeze_every=10)
    table = []
    for step in (0, 9, 10, 19, 20, 29, 30):
        at = trees.leaves_by_path(plan.gate(jnp.int32(step)))
        assert at["classifier/bias"] == at["final_norm/scale"] == 1
        table.append((np.ravel(at[UP]).tolist(), float(at["embedding"])))
    assert table == [
        ([0, 0, 1], 0),
        ([0, 0, 1], 0),
        ([0, 1, 1], 0),
        ([0, 1, 1], 0),
        ([1, 1, 1], 0),
        ([1, 1, 1], 0),
        ([1, 1, 1], 1),
    ]
    jax.tree.map(
        lambda x, leaf: np.broadcast_shapes(x.shape, leaf.shape) == leaf.shape or 1 / 0,
        plan.gate(0),
        plan.abstract,
    )


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, ("float32", "float32")),
        ({"residual_dtype": "bfloat16"}, ("bfloat16", "bfloat16")),
        ({"tied_embeddings": True, "residual_dtype": "bfloat16"}, ("bfloat16", None)),
        ({"tied_embeddings": True}, ("float32", None)),
    ],
)
def test_frozen_weights_are_held_as_they_are_used_and_trained_in_float32(
    fields, expected, model_config, random_params
):
    given = {"dtype": "bfloat16", "positions": "learned"} | fields
    model = zoo.build(model_config(**ARCHITECTURES["gpt_oss"] | given))
    params = random_params(model.abstract)
    plan = _plan(model, method="lora", lora={"targets": "query"})
    trained, frozen = plan.split(params, jax.random.key(1))
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    held = {path: str(x.dtype) for path, x in trees.leaves_by_path(frozen).items()}
    assert held["embedding"] == expected[0]
    assert held["position_embedding"] == given.get("residual_dtype", "float32")
    assert held.get("head") == (None if expected[1] is None else "bfloat16")
    for path, dtype in held.items():
        if path.endswith("kernel"):
            is_router = "router" in path
            assert dtype == ("float32" if is_router else "bfloat16"), path
        elif path.startswith("blocks") or "norm" in path or "bias" in path:
            assert dtype == "float32", path
    exact = plan.merged(*plan.split(params, jax.random.key(1), exact=True))
    jax.tree.map(np.testing.assert_array_equal, exact, params)


# ---- what it costs

WIDE = {
    "vocab_size": 96,
    "max_length": 32,
    "num_layers": 4,
    "embed_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 16,
    "mlp_dim": 256,
}


@pytest.fixture(scope="module")
def step(model_config):
    """Return `step(way, **fields)`: a plan and its compiled step of Adam."""

    @functools.cache
    def compiled(way, base="compute", remat="none", dtype="bfloat16", **fields):
        fields = WIDE | {"dtype": dtype, "remat": remat} | fields
        model = zoo.build(model_config(**fields))
        plan = _plan(model, {"base": base, "rank": 4}, **WAYS[way])
        tx = optax.adam(1e-3)
        rows = [jax.ShapeDtypeStruct((2, 32), "int32")] * 3

        def loss(trained, frozen, *rows):
            params = plan.join(trained, frozen)
            found = asked.logits(model, params, *rows)
            return jnp.mean(jax.nn.logsumexp(found, axis=-1))

        def update(trained, moments, frozen, *rows):
            value, grads = jax.value_and_grad(loss)(trained, frozen, *rows)
            updates, moments = tx.update(grads, moments)
            return optax.apply_updates(trained, updates), moments, value

        moments = jax.eval_shape(tx.init, plan.abstract)
        given = (plan.abstract, moments, plan.frozen_abstract, *rows)
        return plan, jax.jit(update, donate_argnums=(0, 1)).lower(*given).compile()

    return compiled


def _bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("base", ["compute", "int8"])
def test_a_step_is_given_the_frozen_base_and_three_times_what_trains(base, step):
    plan, found = step("lora", base=base)
    batch, count = 3 * 2 * 32 * 4, 4
    given = found.memory_analysis().argument_size_in_bytes
    expected = _bytes(plan.frozen_abstract) + 3 * _bytes(plan.abstract) + batch + count
    assert given == expected
    kernels = 4 * (4 * 64 * 64 + 3 * 64 * 256)  # of four layers
    scales = 4 * 4 * (4 * 64 + 2 * 256 + 64) if base == "int8" else 0
    others = 4 * (2 * 4 * 64 + 64) + 96 * 64 * (2 + 4)  # norms, head and embedding
    assert _bytes(plan.frozen_abstract) == (
        kernels * (1 if base == "int8" else 2) + scales + others
    )


def test_kernels_in_eight_bits_are_whole_one_layer_at_a_time(step):
    stack = 4 * 4 * (4 * 64 * 64 + 3 * 64 * 256)
    experts = {"num_experts": 4, "num_experts_per_token": 1, "mlp_dim": 64}
    for given in ({}, {"remat": "full"}, experts):
        _, eight = step("lora", base="int8", dtype="float32", **given)
        _, held = step("lora", dtype="float32", **given)
        more = (
            eight.memory_analysis().temp_size_in_bytes
            - held.memory_analysis().temp_size_in_bytes
        )
        assert more < 0.5 * stack, given


def test_what_is_frozen_needs_no_gradients_of_weights(step):
    """A product costs once forward and twice back: for what it reads and its kernel."""
    tokens, layers = 2 * 32, 4
    kernels = 2 * tokens * (4 * 64 * 64 + 3 * 64 * 256)
    table = 2 * tokens * 96 * 64
    scores = 2 * 2 * 32 * 32 * 64  # of both rows; the backward pass makes them anew
    attention = 2 * scores  # and sums
    flops = {
        way: program.read(step(way, dtype="float32")[1].as_text()).flops
        for way in ("full", "lora", "last_layers")
    }
    forward = layers * (kernels + attention) + table
    # The embeddings' gradient is no product, what the lowest layer reads has one.
    assert flops["full"] == 3 * forward + layers * scores
    updates = 2 * tokens * 4 * (4 * 2 * 64 + 3 * (64 + 256))  # of rank 4
    frozen = 2 * layers * kernels + layers * (3 * attention + scores) + 2 * table
    assert flops["lora"] == frozen + 3 * layers * updates
    above = 2 * (kernels + attention + table)
    assert flops["last_layers"] <= forward + above + scores
    assert flops["last_layers"] > forward + above + scores - kernels


def test_lines_say_what_trains_and_how_the_rest_is_held(step):
    plan, _ = step("lora", base="int8")
    assert plan.lines() == [
        "trains 23,552 parameters, 8.56% of 275,008",
        "updates of low rank: attention/key, attention/out, attention/query, "
        "attention/value, mlp/down, mlp/gate, mlp/up",
        "frozen: 0.3 MiB (bfloat16, float32, int8)",
    ]


def test_lines_say_how_far_the_rates_are_apart(tiny):
    model, _ = tiny
    assert _plan(model, layer_decay=0.5).lines() == [
        "trains 5,681 parameters, 92.8% of 6,125",
        "learning rates times 0.125 to 1",
        "frozen: 0.0 MiB (float32)",
    ]
