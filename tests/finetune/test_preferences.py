"""Tests of preference objectives: formulas, closed-form optima, batches, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax import meshes, objectives, sharding
from fm_jax.compiled import estimates, program
from fm_jax.finetune import preferences
from fm_jax.models import zoo

BETA = 0.3
VOCAB = 38
KINDS = tuple(preferences.KINDS)

# ---- each objective by itself

POLICY = np.array([[-7.0, -3.0], [-2.0, -9.0], [-4.0, -4.5]])
REFERENCE = np.array([[-6.0, -3.5], [-5.0, -8.0], [-4.0, -4.0]])
TOKENS = np.array([[4.0, 2.0], [1.0, 3.0], [2.0, 5.0]])


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _by_hand(kind, policy, reference, tokens, beta):
    """Return a pair's loss and margin as the papers write them, in float64."""
    chosen, rejected = (np.float64(x) for x in policy)
    if kind == "orpo":
        p, q = np.exp(chosen / tokens[0]), np.exp(rejected / tokens[1])
        odds_ratio = (p / (1 - p)) / (q / (1 - q))
        ranked = -beta * np.log(_sigmoid(np.log(odds_ratio)))
        return -np.log(p) + ranked, beta * np.log(odds_ratio)
    ratios = chosen - reference[0], rejected - reference[1]
    if kind == "ipo":
        ratios = [ratio / n for ratio, n in zip(ratios, tokens, strict=True)]
        gap = ratios[0] - ratios[1]
        return (gap - 1 / (2 * beta)) ** 2, beta * gap
    margin = beta * (ratios[0] - ratios[1])
    return -np.log(_sigmoid(margin)), margin


@pytest.mark.parametrize("beta", [0.1, 1.7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_s_loss_and_margin_are_the_paper_s(kind, beta):
    do = preferences.KINDS[kind]
    losses, margins = do(*map(jnp.asarray, (POLICY, REFERENCE, TOKENS)), beta=beta)
    for n, given in enumerate(zip(POLICY, REFERENCE, TOKENS, strict=True)):
        loss, margin = _by_hand(kind, *given, beta)
        np.testing.assert_allclose(losses[n], loss, rtol=2e-6)
        np.testing.assert_allclose(margins[n], margin, rtol=2e-6)


def _slope(kind, beta=BETA):
    """Return the gradient of all losses in the policy's log-probabilities."""

    def loss(policy):
        others = jnp.asarray(REFERENCE), jnp.asarray(TOKENS)
        return jnp.sum(preferences.KINDS[kind](policy, *others, beta=beta)[0])

    return np.asarray(jax.grad(loss)(jnp.asarray(POLICY)))


def test_dpo_moves_a_pair_apart_by_how_wrong_its_rewards_are():
    gap = POLICY - REFERENCE
    wrong = _sigmoid(-BETA * (gap[:, 0] - gap[:, 1]))
    expected = BETA * wrong[:, None] * [-1, 1]
    np.testing.assert_allclose(_slope("dpo"), expected, rtol=1e-5)


def test_ipo_stops_where_the_gap_of_mean_log_ratios_is_half_over_beta():
    reference, tokens = jnp.array([-6.0, -8.0]), jnp.array([3.0, 5.0])
    gap = jnp.array([1 / (2 * BETA) + 0.25, 0.25])

    def loss(policy):
        return preferences.ipo(policy, reference, tokens, beta=BETA)[0]

    at, slope = jax.value_and_grad(loss)(reference + tokens * gap)
    assert float(at) < 1e-11
    np.testing.assert_allclose(slope, [0, 0], atol=1e-5)
    assert loss(reference) == pytest.approx(1 / (2 * BETA) ** 2, rel=1e-6)


def test_orpo_raises_the_chosen_and_lowers_the_rejected_by_the_odds():
    expected = np.zeros_like(POLICY)
    for n, (policy, tokens) in enumerate(zip(POLICY, TOKENS, strict=True)):
        p, q = np.exp(policy / tokens)
        wrong = 1 / (1 + (p / (1 - p)) / (q / (1 - q)))  # delta(d) of the paper's eq. 8
        by_odds = BETA * wrong * np.array([-1 / (1 - p), 1 / (1 - q)])
        expected[n] = (np.array([-1, 0]) + by_odds) / tokens
    np.testing.assert_allclose(_slope("orpo"), expected, rtol=1e-5)


def test_orpo_of_a_response_that_is_certain_is_finite():
    def loss(policy):
        return preferences.orpo(policy, None, jnp.ones(2), beta=BETA)[0]

    for policy in ([0.0, -1.0], [-1.0, 0.0], [0.0, 0.0]):
        at, slope = jax.value_and_grad(loss)(jnp.array(policy))
        assert np.isfinite(at)
        assert np.all(np.isfinite(slope))


# ---- a bandit, whose optimum has a closed form

ARMS = 5
# What each arm is worth in two contexts. An arm that is worth w is preferred to one
# that is worth v in w of w + v comparisons: Bradley and Terry's rule of r = log w.
WORTH = np.array([[1, 2, 3, 6, 4], [7, 1, 2, 1, 3]])
BANDIT_BETA = 0.5


def _optimum(reference_XA, beta):
    """Return DPO's: reference * exp(r / beta), normalised (arXiv 2305.18290, eq. 4)."""
    scores_XA = reference_XA * np.float64(WORTH) ** (1 / beta)
    return scores_XA / scores_XA.sum(axis=1, keepdims=True)


def _divergence(p_XA, q_XA):
    """Return KL(p || q) in nats, the larger of the two contexts'."""
    return np.max(np.sum(p_XA * (np.log(p_XA) - np.log(q_XA)), axis=1))


def _contests():
    """Return (context, winner, loser, how often) of every contest there can be."""
    return [
        (x, i, j, int(WORTH[x, i]))
        for x in range(len(WORTH))
        for i in range(ARMS)
        for j in range(ARMS)
        if i != j
    ]


def _newton(loss, start):
    """Return the least point of a smooth convex loss that may be flat along lines."""

    @jax.jit
    def better(point):
        return point - jnp.linalg.pinv(jax.hessian(loss)(point)) @ jax.grad(loss)(point)

    point = start
    for _ in range(30):
        point = better(point)
    return point


def _tabular_optimum(kind, reference_XA, beta, frequency):
    """Return the policy that a table of logits ends at, over all contests.

    frequency: of a winner's contests with a loser, given what they are worth.
    """
    found = []
    for x, reference_A in enumerate(reference_XA):
        contests = [(i, j) for y, i, j, _ in _contests() if y == x]
        pairs_C2 = np.array(contests)
        often_C = np.array([frequency(*WORTH[x, pair]) for pair in pairs_C2])

        def loss(logits_A, reference_A=reference_A, pairs=pairs_C2, often=often_C):
            policy_C2 = jax.nn.log_softmax(logits_A)[pairs]
            reference_C2 = jnp.log(jnp.asarray(reference_A))[pairs]
            do = preferences.KINDS[kind]
            losses, _ = do(policy_C2, reference_C2, jnp.ones_like(policy_C2), beta=beta)
            return jnp.sum(often * losses)

        found.append(jax.nn.softmax(_newton(loss, jnp.zeros(ARMS))))
    return np.stack(found)


@pytest.fixture
def reference_XA():
    draws = np.random.default_rng(4).standard_normal((len(WORTH), ARMS))
    return np.exp(draws) / np.exp(draws).sum(axis=1, keepdims=True)


def test_dpo_on_a_bandit_ends_at_the_closed_form_optimum(reference_XA):
    with jax.enable_x64(True):
        found = _tabular_optimum(
            "dpo", reference_XA, BANDIT_BETA, lambda w, v: w / (w + v)
        )
    expected = _optimum(reference_XA, BANDIT_BETA)
    assert _divergence(reference_XA, expected) > 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_ipo_on_a_bandit_ends_at_the_closed_form_optimum(reference_XA):
    beta = 0.1
    with jax.enable_x64(True):
        found = _tabular_optimum("ipo", reference_XA, beta, lambda w, v: w / (w + v))
    # reference * exp(how often an arm wins against a random one / beta): arXiv
    # 2310.12036, eq. 9, which compares an arm with itself too.
    wins = WORTH[:, :, None] / (WORTH[:, :, None] + WORTH[:, None, :])
    scores = reference_XA * np.exp(wins.mean(axis=2) / beta)
    expected = scores / scores.sum(axis=1, keepdims=True)
    assert _divergence(reference_XA, expected) > 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-9)


# ---- batches of pairs


def _batch(examples, rows, length=17, num_rows=5):
    """Return a batch of rows of examples, given by number, -1 for an absent one.

    An example is (prompt, chosen, rejected, reference of both). The last rows are
    padding. Most batches here have one shape, and so one program.
    """
    shape = (num_rows, length)
    ints = ("tokens", "targets", "positions", "segment_ids", "target_bytes")
    batch = {name: np.zeros(shape, np.int32) for name in ints}
    batch |= {n: np.zeros(shape, np.float32) for n in ("loss_weights", "reference")}
    for b, numbers in enumerate(rows):
        at = 0
        for place, number in enumerate(numbers):
            if number < 0:
                continue
            prompt, *responses, reference = examples[number]
            for which, response in enumerate(responses):
                ids = [*prompt, *response]
                stop = at + len(ids) - 1
                assert stop <= length
                batch["tokens"][b, at:stop] = ids[:-1]
                batch["targets"][b, at:stop] = ids[1:]
                batch["positions"][b, at:stop] = np.arange(stop - at)
                batch["segment_ids"][b, at:stop] = 2 * place + which + 1
                batch["loss_weights"][b, stop - len(response) : stop] = 1
                batch["reference"][b, stop - 1] = reference[which]
                at = stop
    return batch


def _examples(number):
    rng = np.random.default_rng(1)

    def ids(low, high):
        return rng.integers(0, VOCAB, rng.integers(low, high)).tolist()

    return [
        (ids(1, 3), ids(1, 4), ids(1, 4), -rng.uniform(1, 9, 2)) for _ in range(number)
    ]


@pytest.fixture(scope="module")
def model(model_config):
    sizes = {"vocab_size": VOCAB, "embed_dim": 8, "mlp_dim": 16, "num_layers": 2}
    return zoo.build(model_config(**sizes, logits_softcap=4.0))


@pytest.fixture(scope="module")
def params(model, random_params):
    return random_params(model.abstract)


@functools.cache
def _compiled(model, **how):
    options = {"kind": "dpo", "beta": BETA, "num_segments": 4, "loss_chunk": 3} | how
    sums_of = preferences.sums_of(model, **options)
    return jax.jit(jax.value_and_grad(sums_of, has_aux=True))


def _run(model, params, batch, **how):
    """Return the sums, the total among them, and the gradients."""
    (total, sums), slopes = _compiled(model, **how)(params, batch)
    assert float(total) == pytest.approx(float(sums["nll"]), rel=1e-6)
    return sums, slopes


def _close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def _plain_logp(model, params, prompt, response):
    """Return a response's log-probability, alone in a row, from all its logits."""
    ids = np.array([[*prompt, *response]], np.int32)
    tokens = ids[:, :-1]
    positions = np.arange(tokens.shape[1])[None]
    x, _ = model.hidden(params, tokens, positions, np.ones_like(tokens))
    logps = jax.nn.log_softmax(model.logits(params, x))
    picked = np.take_along_axis(np.asarray(logps), ids[:, 1:, None], axis=-1)
    return np.sum(np.float64(picked[0, -len(response) :]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_sums_are_those_of_each_pair_by_itself(kind, model, params):
    examples = _examples(5)
    batch = _batch(examples, [[0, 1], [2], [], [3, 4]])
    expected = dict.fromkeys(
        ("nll", "weight", "correct", "margin", "chosen_logp", "rejected_logp"), 0.0
    )
    for prompt, chosen, rejected, reference in examples:
        policy = [_plain_logp(model, params, prompt, x) for x in (chosen, rejected)]
        tokens = [len(chosen), len(rejected)]
        loss, margin = _by_hand(kind, policy, reference, tokens, BETA)
        values = loss, 1, margin > 0, margin, *policy
        expected = {
            n: x + y for (n, x), y in zip(expected.items(), values, strict=True)
        }
    sums, _ = _run(model, params, batch, kind=kind)
    assert 0 < expected["correct"] < 5
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_how_pairs_are_packed_and_cut_up_changes_nothing(kind, model, params):
    examples = _examples(6)
    batch = _batch(examples, [[0, 1], [2, 3], [4, 5]])
    whole = _run(model, params, batch, kind=kind)
    # Another order, a place left empty, padding, more room, and chunks of another size.
    other = _batch(examples, [[5], [3, -1, 0], [], [-1, 4, 2], [1]], 24)
    how = {"kind": kind, "num_segments": 8, "loss_chunk": 0}
    _close(_run(model, params, other, **how), whole, rtol=2e-4, atol=2e-5)
    # And batch by batch.
    parts = [_batch(examples, [row]) for row in ([0, 1], [2, 3], [4, 5])]
    found = [_run(model, params, part, kind=kind) for part in parts]
    added = jax.tree.map(lambda *x: sum(x), *found)
    _close(added, whole, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_whole_pair_counts_for_nothing(kind, model, params):
    examples = _examples(3)
    whole = _run(model, params, _batch(examples, [[0, 1]]), kind=kind)
    more = _batch(examples, [[0, 1], [2]])
    more["loss_weights"][1][more["segment_ids"][1] == 2] = 0
    _close(_run(model, params, more, kind=kind), whole, rtol=2e-5, atol=1e-6)
    nothing = _batch(examples, [])
    sums, slopes = _run(model, params, nothing, kind=kind)
    assert not any(np.any(x) for x in jax.tree.leaves((sums, slopes)))


@pytest.mark.parametrize("kind", KINDS)
def test_components_have_sums_of_their_own(kind, model, params):
    examples = _examples(6)
    rows, components = [[0, 1], [2], [], [3, 4], [5]], np.array([2, 0, 1, 0, 2])
    batch = _batch(examples, rows) | {"components": components}
    sums, slopes = _run(model, params, batch, kind=kind, num_components=4)
    del batch["components"]
    whole, same = _run(model, params, batch, kind=kind)
    _close({name: sums[name] for name in whole}, whole, rtol=1e-6)
    _close(slopes, same, rtol=1e-5, atol=1e-6)
    names = ("nll", "weight", "correct")
    assert sums.keys() - whole.keys() == {f"component_{name}" for name in names}
    for k in range(4):
        own_BT = batch["loss_weights"] * (components == k)[:, None]
        alone, _ = _run(model, params, batch | {"loss_weights": own_BT}, kind=kind)
        for name in names:
            np.testing.assert_allclose(
                sums[f"component_{name}"][k], alone[name], rtol=1e-5, err_msg=name
            )


def _base(params):
    """Return other weights of the same model, made of these."""
    return jax.tree.map(lambda x: 0.7 * x, params)


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_a_reference_made_in_the_step_is_one_that_the_batch_brings(kind, model, params):
    examples = [
        (*texts, [_plain_logp(model, _base(params), texts[0], x) for x in texts[1:]])
        for *texts, _ in _examples(5)
    ]
    batch = _batch(examples, [[0, 1], [2], [], [3, 4]])
    expected = _run(model, params, batch, kind=kind)
    del batch["reference"]
    found = _run(model, params, batch, kind=kind, without=_base)
    _close(found, expected, rtol=2e-4, atol=2e-5)


def test_orpo_asks_for_no_reference(model, params):
    batch = _batch(_examples(4), [[0, 1], [2, 3]])
    expected = _run(model, params, batch, kind="orpo")
    del batch["reference"]
    _close(_run(model, params, batch, kind="orpo"), expected, rtol=0)
    assert preferences.REFERENCE_FREE == ("orpo",)


def test_pairs_of_experts_bring_the_losses_of_their_load(model_config, random_params):
    sparse = zoo.build(
        model_config(embed_dim=8, num_layers=2, num_experts=3, num_experts_per_token=2)
    )
    params = random_params(sparse.abstract)
    batch = _batch(_examples(4), [[0, 1], [2, 3]])
    weights = {"balance_loss": 0.5, "router_z_loss": 0.0}
    options = {"kind": "dpo", "beta": BETA, "num_segments": 4, "loss_chunk": 0}
    plain = preferences.sums_of(sparse, **options)
    told = preferences.sums_of(sparse, **options, expert_losses=weights)
    total, sums = jax.jit(plain)(params, batch)
    more, told_sums = jax.jit(told)(params, batch)
    assert told_sums.keys() - sums.keys() == {"experts", *weights}
    names = ("tokens", "positions", "segment_ids")
    _, numbers = sparse.hidden(params, *(batch[name] for name in names))
    balance = 4 * float(objectives.expert_losses(numbers)["balance_loss"])  # four pairs
    assert float(told_sums["balance_loss"]) == pytest.approx(balance, rel=1e-5)
    assert float(more) == pytest.approx(float(total) + 0.5 * balance, rel=1e-5)


# ---- on meshes of eight devices

MESHES = {
    "ddp": {"data": 8},
    "fsdp_tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "context": {"data": 2, "context": 4},
}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_neither_sums_nor_gradients(name, model, params):
    examples = _examples(13)
    rows = [[0, 1], [2], [], [3, 4], [5, 6], [7, 8], [9], [10, 11, 12]]
    batch = _batch(examples, rows, 32, len(rows))
    batch["components"] = np.array([1, 0, 2, 1, 0, 1, 1, 2], np.int32)
    how = {"kind": "ipo", "num_segments": 6, "num_components": 3, "loss_chunk": 4}
    expected = _run(model, params, batch, **how)
    layout = sharding.layout(meshes.make(meshes.sizes("ddp", MESHES[name], 8)))
    places = sharding.tree_shardings(model.axes, model.abstract, layout)
    with layout.active():
        put = sharding.put_batch(batch, len(rows), layout)
        do = _compiled.__wrapped__(model, **how)  # traced for this mesh
        arguments = jax.device_put(params, places), put
        compiled = do.lower(*arguments).compile()
        (_, sums), slopes = compiled(*arguments)
    _close((sums, slopes), expected, rtol=2e-4, atol=2e-5)
    # Devices tell each other gradients, sums and, in attention, keys: no activations.
    found = estimates.traffic(program.read(compiled.as_text()), layout.mesh)
    kinds = {t.kind for t in found if t.axes and "fsdp" not in t.axes}
    assert kinds <= {"all-reduce", "collective-permute"}


# ---- and through a decoder


def _policy(model, params):
    """Return the probabilities of all arms in each context."""
    contexts = np.array([[x] for x in range(len(WORTH))], np.int32)
    x, _ = model.hidden(params, contexts, 0 * contexts, 0 * contexts + 1)
    return np.float64(jax.nn.softmax(model.logits(params, x)[:, 0]))


def test_dpo_brings_a_decoder_to_the_closed_form_optimum(model_config):
    model = zoo.build(
        model_config(vocab_size=ARMS, embed_dim=16, mlp_dim=32, num_layers=1)
    )
    params = model.init(jax.random.key(2))
    reference_XA = _policy(model, params)
    examples = []
    for x, i, j, times in _contests():
        told = np.log(reference_XA[x, [i, j]])
        examples += times * [([x], [i], [j], told)]
    pairs = 15
    rows = [
        list(range(n, min(n + pairs, len(examples))))
        for n in range(0, len(examples), pairs)
    ]
    batch = _batch(examples, rows, 2 * pairs, len(rows))
    sums_of = preferences.sums_of(
        model, kind="dpo", beta=BANDIT_BETA, num_segments=2 * pairs, loss_chunk=10
    )
    tx = optax.adam(optax.cosine_decay_schedule(0.03, 600))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            slopes, sums = jax.grad(sums_of, has_aux=True)(params, batch)
            slopes = jax.tree.map(lambda g: g / sums["weight"], slopes)
            updates, state = tx.update(slopes, state, params)
            return (optax.apply_updates(params, updates), state), sums["nll"]

        return jax.lax.scan(step, (params, tx.init(params)), length=600)[0][0]

    found = _policy(model, train(params))
    expected = _optimum(reference_XA, BANDIT_BETA)
    assert _divergence(reference_XA, expected) > 0.5
    assert _divergence(found, expected) < 1e-6
