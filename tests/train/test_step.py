"""Tests of the train step: accumulation, averages, a golden run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax import meshes, optimizers, sharding
from fm_jax.compiled import estimates, program
from fm_jax.finetune import tuning
from fm_jax.models import zoo
from fm_jax.train import step as steps

ROWS, LENGTH = 8, 5
GOLDEN_LOSSES = [4.963785, 3.900653, 3.247282, 2.887306]


@pytest.fixture(scope="module")
def model(model_config):
    return zoo.build(model_config(embed_dim=8, mlp_dim=16, num_layers=2))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    weights = rng.random((ROWS, LENGTH), np.float32)
    weights[0] = 0  # a row of padding, and uneven rows
    weights[5, 2:] = 0
    return {
        "tokens": rng.integers(0, 37, (ROWS, LENGTH), np.int32),
        "targets": rng.integers(0, 37, (ROWS, LENGTH), np.int32),
        "loss_weights": weights,
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "target_bytes": rng.integers(1, 6, (ROWS, LENGTH), np.int32),
    }


NO_EXPERT_LOSSES = {"balance_loss": 0.0, "router_z_loss": 0.0}


def _step(model, tx, **overrides):
    options = {"accumulation": 1, "ema_decay": 0.0} | overrides
    objective = {
        "z_loss": options.pop("z_loss", 0.0),
        "loss_chunk": options.pop("loss_chunk", 0),
        "expert_losses": options.pop("expert_losses", NO_EXPERT_LOSSES),
        "num_components": len(options.get("names", ())),
    }
    sums_of = steps.loss_sums(model, **objective)
    rate = lambda step: 0.125 * (step + 1)  # noqa: E731
    return steps.make_train_step(tuning.whole(model), sums_of, tx, rate, **options)


def _eval_step(model, *, loss_chunk=0, names=()):
    objective = {"loss_chunk": loss_chunk, "num_components": len(names)}
    sums_of = steps.loss_sums(model, z_loss=0.0, **objective)
    do = steps.make_eval_step(tuning.whole(model), sums_of)
    return lambda params, batch: do((params, {}), batch)


def _create(model, tx, *, ema_decay):
    begin = steps.begin(tuning.whole(model), tx, ema_decay=ema_decay)
    return lambda rng: begin(model.init(rng), rng)


def _gradient(model, params, batch, **overrides):
    """Return one step's gradient: what plain descent at rate 1 takes off."""
    tx = optax.sgd(1.0)
    state = steps.TrainState(jnp.int32(0), params, tx.init(params), None)
    after, metrics = jax.jit(_step(model, tx, **overrides))(state, batch)
    return jax.tree.map(lambda a, b: a - b, params, after.params), metrics


def _close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulated_gradient_is_that_of_the_whole_batch(
    model, batch, random_params, accumulation
):
    params = random_params(model.abstract)
    whole, numbers = _gradient(model, params, batch, z_loss=0.01)
    parts, same = _gradient(
        model, params, batch, z_loss=0.01, accumulation=accumulation
    )
    _close(parts, whole, rtol=2e-5, atol=2e-6)
    _close(same, numbers, rtol=1e-5)


def test_gradient_is_of_the_weighted_mean_over_all_tokens(model, batch, random_params):
    params = random_params(model.abstract)

    def mean_loss(params):
        x, _ = model.hidden(
            params, batch["tokens"], batch["positions"], batch["segment_ids"]
        )
        log_probs = jax.nn.log_softmax(model.logits(params, x))
        nll = -jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
        return jnp.average(nll, weights=batch["loss_weights"])

    loss, expected = jax.jit(jax.value_and_grad(mean_loss))(params)
    found, metrics = _gradient(model, params, batch)
    _close(found, expected, rtol=1e-4, atol=2e-6)
    assert float(metrics["train/loss"]) == pytest.approx(float(loss), rel=1e-6)
    counted = batch["target_bytes"][batch["loss_weights"] > 0].sum()
    bits = float(loss) * batch["loss_weights"].sum() / math.log(2) / counted
    assert float(metrics["train/bits_per_byte"]) == pytest.approx(bits, rel=1e-5)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(expected)))
    assert float(metrics["grads/norm"]) == pytest.approx(norm, rel=1e-5)


def test_the_average_follows_the_weights(model, batch):
    tx = optax.sgd(0.5)
    state = _create(model, tx, ema_decay=0.75)(jax.random.key(0))
    _close(state.ema, state.params, rtol=0)
    before = state.params
    after, _ = jax.jit(_step(model, tx, ema_decay=0.75))(state, batch)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, before, after.params)
    _close(after.ema, expected, rtol=1e-6, atol=1e-7)
    assert after.weights()[0] is after.ema


def test_without_an_average_the_weights_are_the_params(model):
    state = _create(model, optax.sgd(0.5), ema_decay=0.0)(jax.random.key(0))
    assert state.ema is None
    assert state.weights()[0] is state.params


def test_evaluation_sums_are_those_of_training_without_z_loss(
    model, batch, random_params
):
    params = random_params(model.abstract)
    sums = jax.jit(_eval_step(model, loss_chunk=0))(params, batch)
    _, metrics = _gradient(model, params, batch, z_loss=0.5)
    loss = float(sums["nll"] / sums["weight"])
    assert loss == pytest.approx(float(metrics["train/loss"]), rel=1e-6)
    assert (
        float(sums["bytes"]) == batch["target_bytes"][batch["loss_weights"] > 0].sum()
    )


# ---- components of a mixture

NAMES = ("wiki", "code", "rare", "web")
ABSENT = 2  # of the names: no row of it is in the batch


@pytest.fixture(scope="module")
def mixed():
    """Return a longer batch of three of four components, which any mesh here cuts.

    Even rows are of one component: so is every other micro-batch.
    """
    rng = np.random.default_rng(5)
    rows, length = 16, 24
    weights = rng.random((rows, length), np.float32)
    weights[2], weights[5, 7:] = 0, 0
    return {
        "tokens": rng.integers(0, 37, (rows, length), np.int32),
        "targets": rng.integers(0, 37, (rows, length), np.int32),
        "loss_weights": weights,
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
        "target_bytes": rng.integers(1, 6, (rows, length), np.int32),
        "components": np.array([3, 0, 3, 1] * 4, np.int32),
    }


def _only(batch, component):
    """Return a batch in which all but one component's rows are padding."""
    is_of_B = batch["components"] == component
    return batch | {"loss_weights": batch["loss_weights"] * is_of_B[:, None]}


@pytest.fixture(scope="module")
def by_themselves(model, mixed, random_params):
    """Return the evaluation sums of each component's rows, the rest without weight."""
    params = random_params(model.abstract)
    do = jax.jit(_eval_step(model, loss_chunk=0))
    return [do(params, _only(mixed, k)) for k in range(len(NAMES))]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_component_has_the_loss_of_its_rows_by_themselves(
    accumulation, model, mixed, random_params, by_themselves
):
    params = random_params(model.abstract)
    _, metrics = _gradient(
        model, params, mixed, z_loss=0.3, accumulation=accumulation, names=NAMES
    )
    for name, sums in zip(NAMES, by_themselves, strict=True):
        loss = sums["nll"] / max(sums["weight"], 1e-9)
        np.testing.assert_allclose(metrics[f"train/loss/{name}"], loss, rtol=1e-5)
        np.testing.assert_allclose(
            metrics[f"train/tokens/{name}"], sums["weight"], rtol=1e-6
        )
    tokens = sum(metrics[f"train/tokens/{name}"] for name in NAMES)
    np.testing.assert_allclose(tokens, metrics["train/tokens"], rtol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_telling_components_apart_changes_nothing_else(
    accumulation, model, mixed, random_params
):
    """Micro-batches of two hold one component, or two others: sums do not mind."""
    params = random_params(model.abstract)
    told, metrics = _gradient(
        model, params, mixed, accumulation=accumulation, names=NAMES
    )
    whole, numbers = _gradient(model, params, mixed)
    _close(told, whole, rtol=2e-5, atol=2e-6)
    _close({name: metrics[name] for name in numbers}, numbers, rtol=1e-5)


def test_evaluation_gives_the_sums_of_each_component(
    model, mixed, random_params, by_themselves
):
    params = random_params(model.abstract)
    do = jax.jit(_eval_step(model, loss_chunk=5, names=NAMES))
    found = do(params, mixed)
    for name in ("nll", "weight", "bytes"):
        expected = [sums[name] for sums in by_themselves]
        np.testing.assert_allclose(found[f"component_{name}"], expected, rtol=1e-5)


def test_a_single_component_compiles_to_the_program_without_any(model, mixed):
    tx = optax.sgd(1.0)
    state = jax.eval_shape(_create(model, tx, ema_decay=0.0), jax.random.key(0))
    without = {name: x for name, x in mixed.items() if name != "components"}
    trains = [
        jax.jit(_step(model, tx, accumulation=2, **names)).lower(state, without)
        for names in ({}, {"names": ()}, {"names": ("wiki",)})
    ]
    assert len({lowered.as_text() for lowered in trains}) == 1
    evals = [
        jax.jit(_eval_step(model, loss_chunk=5, **names)).lower(state.params, without)
        for names in ({}, {"names": ()}, {"names": ("wiki",)})
    ]
    assert len({lowered.as_text() for lowered in evals}) == 1


def test_a_loss_without_tokens_is_left_out(model, mixed, random_params):
    params = random_params(model.abstract)
    _, metrics = _gradient(model, params, mixed, names=NAMES)
    metrics = {name: float(value) for name, value in metrics.items()}
    assert np.all(np.isfinite(list(metrics.values())))
    kept = steps.present(metrics)
    assert metrics.keys() - kept.keys() == {f"train/loss/{NAMES[ABSENT]}"}
    assert kept[f"train/tokens/{NAMES[ABSENT]}"] == 0
    assert all(kept[name] == metrics[name] for name in kept)


MESHES = {
    "ddp": {"data": 8},
    "context": {"data": 1, "fsdp": 2, "context": 4},
}


def _lowered(model, mixed, layout, **options):
    """Return the lowered train step of a batch on a mesh, and its arguments."""
    tx = optax.sgd(1.0)
    state = _create(model, tx, ema_decay=0.0)(jax.random.key(3))
    put = sharding.put_batch(mixed, len(mixed["tokens"]), layout)
    step = jax.jit(_step(model, tx, **options), out_shardings=layout.sharding())
    state = jax.device_put(state, layout.sharding())
    return step.lower(state, put), (state, put)


def _layout(mesh):
    return sharding.layout(meshes.make(meshes.sizes("ddp", MESHES[mesh], 8)))


@pytest.mark.parametrize(
    "mesh, accumulation", [("ddp", 1), ("context", 1), ("context", 2)]
)
def test_a_mesh_does_not_change_the_losses_of_components(
    mesh, accumulation, model, mixed
):
    layout = _layout(mesh)
    options = {"names": NAMES, "accumulation": accumulation, "loss_chunk": 3}
    with layout.active():
        lowered, arguments = _lowered(model, mixed, layout, **options)
        _, found = lowered.compile()(*arguments)
    state = _create(model, optax.sgd(1.0), ema_decay=0.0)(jax.random.key(3))
    do = jax.jit(_eval_step(model, loss_chunk=0))
    for k, name in enumerate(NAMES):
        sums = do(state.params, _only(mixed, k))
        loss = sums["nll"] / max(sums["weight"], 1e-9)
        np.testing.assert_allclose(found[f"train/loss/{name}"], loss, rtol=1e-5)
        np.testing.assert_allclose(
            found[f"train/tokens/{name}"], sums["weight"], rtol=1e-6
        )


@pytest.mark.parametrize("mesh", MESHES)
def test_devices_talk_no_oftener_for_the_sums_of_components(mesh, model, mixed):
    layout = _layout(mesh)

    def said(names):
        with layout.active():
            lowered, _ = _lowered(model, mixed, layout, names=names)
        read = program.read(lowered.compile().as_text())
        found = estimates.traffic(read, layout.mesh)
        counts = {(t.kind, t.axes): t.count for t in found}
        return counts, sum(t.bytes for t in found)

    (counts, size), (told_counts, told_size) = said(()), said(NAMES)
    assert told_counts == counts
    # Nats, weights, hits and bytes of each.
    assert told_size == size + 4 * 4 * len(NAMES)


# ---- a golden run


def test_golden_steps(model, batch):
    """Four AdamW steps from a fixed seed: any change of the numbers shows here.

    The epsilon is large: where a gradient is next to nothing, Adam would otherwise blow
    the rounding of one compiler or another up to a whole step.
    """
    rate = optimizers.schedule(
        name="cosine", peak=0.03, num_steps=4, warmup_fraction=0.25,
        decay_fraction=0.0, final_fraction=0.1,
    )  # fmt: skip
    mask = optimizers.decay_mask(
        model.abstract, (("norm|bias|embedding", False), (".*", True))
    )
    tx = optimizers.make(
        rate, mask, name="adamw", weight_decay=0.1, beta1=0.9, beta2=0.95,
        epsilon=1e-2, mu_dtype="float32", nu_dtype="float32", clip_norm=1.0,
    )  # fmt: skip
    state = _create(model, tx, ema_decay=0.0)(jax.random.key(7))
    step = jax.jit(_step(model, tx, z_loss=1e-3))
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["train/loss"]))
    np.testing.assert_allclose(losses, GOLDEN_LOSSES, rtol=2e-5)


# ---- experts

LOSSES = {"balance_loss": 0.5, "router_z_loss": 0.25}


@pytest.fixture(scope="module")
def sparse(model_config):
    return zoo.build(
        model_config(
            vocab_size=38, embed_dim=8, mlp_dim=16, num_layers=2, num_experts=4,
            num_experts_per_token=2, biases=("head",),
        )
    )  # fmt: skip


def _expert_losses(model, params, batch):
    """Return both losses of the experts of a batch, by the formulas."""
    _, numbers = model.hidden(
        params, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    load_LE = jax.lax.stop_gradient(numbers["load"])
    tokens = batch["tokens"].size
    shares_LE, probs_LE = load_LE / (2 * tokens), numbers["probs"] / tokens
    balance = 4 * jnp.mean(jnp.sum(shares_LE * probs_LE, axis=1))
    return balance, jnp.mean(numbers["lse_squared"]) / tokens


def test_the_losses_of_experts_are_added_to_that_of_the_mean_token(
    sparse, batch, random_params
):
    params = random_params(sparse.abstract)

    def added(params):
        balance, z = _expert_losses(sparse, params, batch)
        return 0.5 * balance + 0.25 * z

    plain, without = _gradient(sparse, params, batch)
    whole, metrics = _gradient(sparse, params, batch, expert_losses=LOSSES)
    expected = jax.jit(jax.grad(added))(params)
    found = jax.tree.map(lambda a, b: a - b, whole, plain)
    _close(found, expected, rtol=1e-4, atol=3e-6)
    balance, z = _expert_losses(sparse, params, batch)
    np.testing.assert_allclose(metrics["train/balance_loss"], balance, rtol=1e-5)
    np.testing.assert_allclose(metrics["train/router_z_loss"], z, rtol=1e-5)
    assert float(metrics["train/loss"]) == float(without["train/loss"])
    assert 0 < metrics["router/load_entropy"] < 1
    assert metrics["router/max_load"] > 1
    assert metrics["router/dropped_fraction"] == 0


def test_the_balance_loss_is_that_of_each_micro_batch(sparse, batch, random_params):
    params = random_params(sparse.abstract)
    _, metrics = _gradient(sparse, params, batch, accumulation=2, expert_losses=LOSSES)
    halves = [{n: x[a::2] for n, x in batch.items()} for a in (0, 1)]
    weights = [half["loss_weights"].sum() for half in halves]
    for at, name in enumerate(LOSSES):
        values = [_expert_losses(sparse, params, half)[at] for half in halves]
        expected = np.average(values, weights=weights)
        np.testing.assert_allclose(metrics[f"train/{name}"], expected, rtol=1e-5)


def test_the_z_loss_of_the_router_does_not_mind_how_a_batch_is_cut(
    sparse, batch, random_params
):
    params = random_params(sparse.abstract)
    even = batch | {"loss_weights": np.ones_like(batch["loss_weights"])}
    only = {"balance_loss": 0.0, "router_z_loss": 0.5}
    whole, numbers = _gradient(sparse, params, even, expert_losses=only)
    parts, same = _gradient(sparse, params, even, expert_losses=only, accumulation=4)
    _close(parts, whole, rtol=2e-5, atol=2e-6)
    same.pop("train/balance_loss"), numbers.pop("train/balance_loss")
    _close(same, numbers, rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_balance_is_moved_by_the_load_and_by_nothing_else(
    accumulation, sparse, batch, random_params
):
    params = random_params(sparse.abstract)
    # Decays all there is, and pushes it: the balance is not the optimizer's.
    tx = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0))
    state = steps.TrainState(jnp.int32(0), params, tx.init(params), params)
    options = {"expert_losses": LOSSES, "accumulation": accumulation, "ema_decay": 0.75}
    _, numbers = sparse.hidden(
        params, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    load_LE = np.asarray(numbers["load"])
    before_LE = params["blocks"]["mlp"]["balance"]
    for rate in (0.0, 0.125):
        step = jax.jit(_step(sparse, tx, balance_rate=rate, **options))
        after, _ = step(state, batch)
        error_LE = np.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)
        assert np.any(error_LE != 0)
        np.testing.assert_array_equal(
            after.params["blocks"]["mlp"]["balance"], before_LE + rate * error_LE
        )
        np.testing.assert_allclose(  # the average follows the moved balance
            after.ema["blocks"]["mlp"]["balance"],
            before_LE + 0.25 * rate * error_LE,
            rtol=1e-6,
        )


def test_evaluation_leaves_the_losses_of_experts_out(sparse, batch, random_params):
    params = random_params(sparse.abstract)
    sums = jax.jit(_eval_step(sparse, loss_chunk=0))(params, batch)
    assert sums.keys() == {"nll", "weight", "correct", "bytes"}
    total, _ = steps.loss_sums(sparse, z_loss=0.0, loss_chunk=0)(params, batch)
    np.testing.assert_allclose(total, sums["nll"], rtol=1e-6)


def test_a_dense_model_compiles_to_the_program_without_experts(model, batch):
    tx = optax.sgd(1.0)
    state = jax.eval_shape(_create(model, tx, ema_decay=0.0), jax.random.key(0))
    texts = {
        jax.jit(_step(model, tx, **options)).lower(state, batch).as_text()
        for options in ({}, {"expert_losses": LOSSES, "balance_rate": 0.125})
    }
    assert len(texts) == 1
    _, metrics = jax.eval_shape(_step(model, tx, expert_losses=LOSSES), state, batch)
    assert not [n for n in metrics if n.startswith("router/") or "balance" in n]


def test_the_loss_knows_the_bias_of_the_head(sparse, batch, random_params):
    params = random_params(sparse.abstract)
    x, _ = sparse.hidden(
        params, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    log_probs = jax.nn.log_softmax(sparse.logits(params, x))
    nll = -jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    sums = _eval_step(sparse, loss_chunk=0)(params, batch)
    np.testing.assert_allclose(
        sums["nll"], jnp.sum(nll * batch["loss_weights"]), rtol=1e-5
    )
    grads, _ = _gradient(sparse, params, batch)
    assert np.all(np.any(grads["head_bias"] != 0))


EXPERT_MESHES = {
    "expert2": {"expert": 2},
    "expert4": {"data": 1, "fsdp": 2, "expert": 4},
    "expert_tensor": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
}


@pytest.mark.parametrize("mesh", EXPERT_MESHES)
def test_a_mesh_does_not_change_a_step_of_experts(mesh, sparse, mixed):
    batch = {n: x[:, :6] if x.ndim > 1 else x for n, x in mixed.items()}
    tx = optax.sgd(1.0)
    options = {"expert_losses": LOSSES, "balance_rate": 0.125, "accumulation": 2}
    state = _create(sparse, tx, ema_decay=0.0)(jax.random.key(3))
    expected, numbers = jax.jit(_step(sparse, tx, **options))(state, batch)
    sizes = meshes.sizes("ddp", {"data": -1} | EXPERT_MESHES[mesh], 8)
    layout = sharding.layout(meshes.make(sizes))
    abstract = jax.eval_shape(lambda: state)
    places = steps.state_shardings(abstract, tuning.whole(sparse), layout)
    whole = layout.sharding()
    with layout.active():
        put = sharding.put_batch(batch, len(batch["tokens"]), layout)
        step = jax.jit(_step(sparse, tx, **options), out_shardings=(places, whole))
        found, metrics = step(jax.device_put(state, places), put)
    _close(metrics, numbers, rtol=2e-5)
    _close(found.params, expected.params, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_is_not_finite_changes_nothing_but_counts(
    model, batch, random_params, accumulation
):
    """Fault 31, numbers: a step's loss or gradient is not finite.

    Promise: the step changes no parameter, moment or average, and the run goes on.
    """
    tx = optax.adamw(optax.linear_schedule(0.1, 0.2, 9))
    made = _step(model, tx, accumulation=accumulation, ema_decay=0.9)
    step = jax.jit(made)
    params = random_params(model.abstract)
    ema = jax.tree.map(jnp.copy, params)
    state = steps.TrainState(jnp.int32(0), params, tx.init(params), ema)
    state, _ = step(state, batch)
    weights = batch["loss_weights"].copy()
    weights[3, 1] = np.nan
    after, metrics = step(state, batch | {"loss_weights": weights})
    assert not np.isfinite(metrics["train/loss"])
    assert int(after.step) == int(state.step) + 1
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(old.dtype, jnp.floating):
            np.testing.assert_array_equal(old, new)
        else:  # schedules go by counts
            assert int(new) == int(old) + 1
    good, _ = step(after, batch)
    assert np.any(good.params["embedding"] != after.params["embedding"])


def test_votes_are_no_data(model, batch, random_params):
    params = random_params(model.abstract)
    votes = {steps.VOTES: np.array([0, 1, 1], np.int32)}
    _, metrics = _gradient(model, params, batch | votes, accumulation=2)
    _, without = _gradient(model, params, batch, accumulation=2)
    assert int(metrics.pop(steps.VOTES)) == 2
    assert metrics.keys() == without.keys()
