"""Tests of updates of low rank against the merged formulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import meshes, products, sharding, trees
from fm_jax.errors import UserError
from fm_jax.finetune import lora, tuning
from fm_jax.generation import quantise
from fm_jax.models import zoo
from tests.conftest import ARCHITECTURES
from tests.finetune import asked

QUERY = "blocks/attention/query/kernel"


def _plan(model, **given):
    return tuning.plan(model, asked.finetune(method="lora"), asked.lora(**given))


def _moved(trained, seed=3):
    """Return updates whose b is not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), trained
    )


@pytest.fixture(scope="module")
def tiny(model_config, random_params):
    """Return a model and its params."""
    model = zoo.build(model_config())
    return model, random_params(model.abstract)


@pytest.mark.parametrize(
    "name, dtype, remat",
    [
        ("llama", "float32", "none"),
        ("gpt2", "bfloat16", "full"),
        ("gemma2", "bfloat16", "none"),
        ("neox", "float32", "names"),
        ("shared_expert", "bfloat16", "none"),
    ],
)
def test_it_starts_as_its_base_to_the_bit(
    name, dtype, remat, model_config, random_params
):
    config = model_config(**ARCHITECTURES[name] | {"dtype": dtype, "remat": remat})
    model = zoo.build(config)
    params = random_params(model.abstract)
    plan = _plan(model)

    @jax.jit
    def both(params):
        joined = plan.join(*plan.split(params, jax.random.key(1)))
        assert "lora" in plan.abstract
        return asked.logits(model, joined), asked.logits(model, params)

    np.testing.assert_array_equal(*both(params))


def _loss(model, params):
    return jnp.mean(jax.nn.logsumexp(asked.logits(model, params), axis=-1))


def _assert_same_but_rounded(found, expected):
    """Compare gradients in float32 whose sums ran in another order.

    By norms of leaves: single entries that nearly cancel hold more of the rounding, and
    how much follows from the machine's vectors.
    """
    found, expected = map(trees.leaves_by_path, (found, expected))
    assert found.keys() == expected.keys()
    for path, grad in expected.items():
        assert np.abs(grad).max() > 1e-6, path
        off = np.linalg.norm(found[path] - grad) / np.linalg.norm(grad)
        assert off < 2e-5, path  # 7e-6 was seen; updates rounded to bfloat16 give 5e-3


def test_it_computes_what_the_merged_kernels_do_and_so_do_its_gradients(tiny):
    model, params = tiny
    plan = _plan(model, scaling="rslora")
    trained, frozen = plan.split(params, jax.random.key(1))
    trained = _moved(trained)
    beside = jax.jit(jax.value_and_grad(lambda t: _loss(model, plan.join(t, frozen))))(
        trained
    )
    merged = jax.jit(
        jax.value_and_grad(lambda t: _loss(model, plan.merged(t, frozen)))
    )(trained)
    np.testing.assert_allclose(beside[0], merged[0], rtol=1e-6)
    assert len(jax.tree.leaves(merged[1])) == 14  # seven kernels
    _assert_same_but_rounded(beside[1], merged[1])


def test_merged_kernels_differ_by_the_scaled_product(tiny):
    model, params = tiny
    plan = _plan(model, targets="out|down")
    trained, frozen = plan.split(params, jax.random.key(1))
    trained = _moved(trained)
    merged = plan.merged(trained, frozen)
    of = trained["lora"]["blocks"]
    expected_LNHD = params["blocks"]["attention"]["out"]["kernel"] + 15 / 5 * np.einsum(
        "lnhr,lrd->lnhd", of["attention"]["out"]["a"], of["attention"]["out"]["b"]
    )
    found_LNHD = merged["blocks"]["attention"]["out"]["kernel"]
    np.testing.assert_allclose(found_LNHD, expected_LNHD, rtol=1e-5, atol=1e-5)
    for path, leaf in trees.leaves_by_path(params).items():
        if not path.endswith(("out/kernel", "down/kernel")):
            same = trees.leaves_by_path(merged)[path]
            np.testing.assert_array_equal(same, leaf, err_msg=path)


def test_a_is_uniform_within_the_root_of_its_inputs_and_b_zero(tiny):
    model, params = tiny
    trained, _ = _plan(model, rank=50).split(params, jax.random.key(1))
    of = trained["lora"]["blocks"]["attention"]["out"]
    most = 1 / np.sqrt(4 * 6)
    assert of["a"].shape == (3, 4, 6, 50)
    assert of["b"].shape == (3, 50, 12)
    assert 0.99 * most < np.abs(of["a"]).max() <= most
    assert np.std(of["a"]) == pytest.approx(most / np.sqrt(3), rel=0.03)
    assert not np.any(of["b"])
    assert len({float(x) for x in of["a"][:, 0, 0, 0]}) == 3


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_an_update_computes_what_pefts_does(scaling):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    net = torch.nn.Sequential()
    net.add_module("up", torch.nn.Linear(12, 20, bias=False))
    how = {"lora_alpha": 15, "use_rslora": scaling == "rslora"}
    wrapped = peft.get_peft_model(
        net, peft.LoraConfig(r=5, target_modules=["up"], **how)
    )
    up = wrapped.base_model.model.up
    a_RK, b_NR = up.lora_A["default"].weight, up.lora_B["default"].weight
    with torch.no_grad():
        b_NR.normal_()
        x_MK = torch.randn(7, 12)
        expected_MN = wrapped(x_MK).numpy()
    base_NK, a_RK, b_NR = (x.detach().numpy() for x in (up.weight, a_RK, b_NR))
    assert np.abs(a_RK).max() <= 1 / np.sqrt(12)
    scale = lora.scale(asked.lora(scaling=scaling))
    kernel = products.Adapted(base_NK.T, a_RK.T, b_NR.T, None, scale, 0.0)
    found_MN = products.linear(x_MK.numpy(), kernel, jnp.dtype("float32"))
    np.testing.assert_allclose(found_MN, expected_MN, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "scaling, expected", [("lora", 16 / 9), ("rslora", 16 / 3)], ids=str
)
def test_the_update_is_scaled_by_its_rank(scaling, expected):
    given = asked.lora(rank=9, alpha=16.0, scaling=scaling)
    assert lora.scale(given) == pytest.approx(expected)


def test_dropout_follows_from_its_rng_and_ends_without_one(tiny):
    model, params = tiny
    plan = _plan(model, dropout=0.4)
    trained, frozen = plan.split(params, jax.random.key(1))
    trained = _moved(trained)

    @jax.jit
    def loss(rng):
        return _loss(model, plan.join(trained, frozen, rng))

    one, same, other = (loss(jax.random.key(n)) for n in (1, 1, 2))
    assert one == same != other
    still = loss(None)
    np.testing.assert_allclose(still, _loss(model, plan.merged(trained, frozen)), 1e-6)
    assert abs(one - still) > 1e-5


def test_each_layer_and_kernel_has_a_key_of_its_own(tiny):
    model, params = tiny
    plan = _plan(model, dropout=0.4)
    parts = plan.split(params, jax.random.key(1))
    attention = plan.join(*parts, jax.random.key(5))["blocks"]["attention"]
    keys = [attention[name]["kernel"].rng for name in ("query", "key", "value", "out")]
    words = np.concatenate([jax.random.key_data(key) for key in keys])
    assert len(np.unique(words, axis=0)) == 4 * 3
    assert plan.join(*parts)["blocks"]["attention"]["key"]["kernel"].rng is None


def test_without_updates_the_base_is_left(tiny):
    model, params = tiny
    plan = _plan(model)
    trained, frozen = plan.split(params, jax.random.key(1))
    base = lora.without(plan.join(_moved(trained), frozen))
    jax.tree.map(np.testing.assert_array_equal, base, params)


def test_a_base_in_eight_bits_computes_what_its_rounded_weights_do(tiny):
    model, params = tiny
    plan = _plan(model, base="int8")
    trained, frozen = plan.split(params, jax.random.key(1))
    trained = _moved(trained)
    kernels = frozen["blocks"]["attention"]
    assert kernels["query"]["kernel"].scale.shape == (3, 1, 4, 6)
    assert kernels["out"]["kernel"].scale.shape == (3, 1, 1, 12)
    assert not quantise.is_eight(frozen["head"])
    beside = jax.jit(jax.value_and_grad(lambda t: _loss(model, plan.join(t, frozen))))(
        trained
    )
    merged = jax.jit(
        jax.value_and_grad(lambda t: _loss(model, plan.merged(t, frozen)))
    )(trained)
    np.testing.assert_allclose(beside[0], merged[0], rtol=1e-6)
    _assert_same_but_rounded(beside[1], merged[1])


def test_experts_in_eight_bits_are_off_by_half_a_step_at_most(
    model_config, random_params
):
    model = zoo.build(model_config(**ARCHITECTURES["shared_expert"]))
    params = random_params(model.abstract)
    plan = _plan(model, base="int8")
    trained, frozen = plan.split(params, jax.random.key(1))
    up = frozen["blocks"]["mlp"]["experts"]["up"]["kernel"]
    assert up.whole.dtype == jnp.int8
    assert up.scale.shape == (3, 4, 1, 20)
    assert frozen["blocks"]["mlp"]["router"]["kernel"].dtype == jnp.float32

    @jax.jit
    def both(trained, frozen):
        beside = asked.logits(model, plan.join(trained, frozen))
        return beside, asked.logits(model, plan.merged(trained, frozen))

    np.testing.assert_allclose(*both(trained, frozen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["fsdp", "tensor"])
@pytest.mark.parametrize("base", ["compute", "int8"])
def test_numbers_do_not_depend_on_the_mesh(preset, base, model_config, random_params):
    config = model_config(
        vocab_size=40, embed_dim=16, num_heads=8, num_kv_heads=8, mlp_dim=24
    )
    model = zoo.build(config)
    params = random_params(model.abstract)
    plan = _plan(model, base=base)
    trained, frozen = plan.split(params, jax.random.key(1))
    trained = _moved(trained)
    rows = asked.rows(8, 9)

    def grads(trained, frozen, *rows):
        def loss(trained):
            params = plan.join(trained, frozen)
            return jnp.mean(jax.nn.logsumexp(asked.logits(model, params, *rows), -1))

        return jax.value_and_grad(loss)(trained)

    expected = jax.jit(grads)(trained, frozen, *rows)
    held = sharding.layout(meshes.make(meshes.sizes(preset, {}, 8)))
    shard = functools.partial(sharding.tree_shardings, layout=held)
    with held.active():
        trained = jax.device_put(trained, shard(plan.axes, plan.abstract))
        places = shard(plan.frozen_axes, plan.frozen_abstract)
        frozen = jax.device_put(frozen, places)
        names = ("tokens", "positions", "segment_ids")
        batch = {n: np.asarray(x) for n, x in zip(names, rows, strict=True)}
        batch = sharding.put_batch(batch, 8, held)
        found = jax.jit(grads)(trained, frozen, *batch.values())
    query = frozen["blocks"]["attention"]["query"]["kernel"]
    whole = query.whole if base == "int8" else query
    assert whole.addressable_shards[0].data.size * 8 == whole.size
    assert trees.leaves_by_path(places).keys() == trees.leaves_by_path(frozen).keys()
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for ours, theirs in zip(
        *map(jax.tree.leaves, (found[1], expected[1])), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_every_kernel_of_attention_and_mlps_can_have_an_update(architecture):
    paths = trees.leaves_by_path(zoo.build(architecture).abstract)
    found = lora.targets(paths, asked.lora(targets=".*"))
    assert set(found) == {
        path
        for path in paths
        if path.endswith("kernel") and "experts" not in path and "router" not in path
    }


PATHS = (QUERY, "blocks/mlp/experts/up/kernel", "blocks/mlp/router/kernel", "head")


def _refused(targets):
    with pytest.raises(UserError) as error:
        lora.targets(PATHS, asked.lora(targets=targets))
    return str(error.value)


def test_targets_that_find_no_kernel_are_refused_with_the_nearest():
    assert _refused("atention/query") == (
        "lora.targets must find kernels; got 'atention/query'. Nearest: "
        "blocks/attention/query/kernel."
    )


def test_targets_that_find_only_what_cannot_have_one_are_refused():
    assert _refused("mlp|head") == (
        "lora.targets must find kernels that can have an update; got 'mlp|head', which "
        "finds only blocks/mlp/experts/up/kernel, blocks/mlp/router/kernel, head. "
        "Those of attention, of an MLP and of a shared expert can; experts, routers, "
        "embeddings and the head cannot."
    )


def test_targets_that_are_no_regular_expression_are_refused():
    assert _refused("*") == (
        "lora.targets must be a regular expression; got '*' (nothing to repeat at "
        "position 0)."
    )
