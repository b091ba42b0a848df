"""Tests of generated text, against the forward pass without a cache and NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fm_jax import generation
from fm_jax.generation import keep_likely
from fm_jax.models import zoo

NO_END = -1  # an id that no model writes
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
LENGTH = 16  # of the rows that the forward pass without a cache is compiled for


@pytest.fixture(scope="module")
def model(model_config, random_params):
    """Return a tiny model and its params."""
    built = zoo.build(model_config(num_layers=2))
    return built, random_params(built.abstract)


def _generate(model, prompts, **settings):
    built, params = model
    defaults = {
        "num_tokens": 7,
        "end_id": NO_END,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
    }
    return generation.generate(built, params, prompts, **defaults | settings)


@functools.partial(jax.jit, static_argnums=0)
def _forward(built, params, tokens_BT):
    """Return logits of rows that begin at slot 0; what follows a token is unseen."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    ones_BT = jnp.ones_like(tokens_BT)
    x_BTD, _ = built.hidden(params, tokens_BT, positions_BT, ones_BT)
    return built.logits(params, x_BTD)


def _next_logits(model, ids):
    """Return the logits after `ids`, from a forward pass without a cache."""
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(_forward(*model, row))[0, len(ids) - 1]


def _greedy(model, prompt, num_tokens):
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(np.argmax(_next_logits(model, ids))))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"positions": "learned", "max_length": LENGTH, "norm": "layernorm"},
        {"window": 3, "window_pattern": "LG", "attention_softcap": 1.5},
        {"parallel_block": True, "num_kv_heads": 1, "logits_softcap": 3.5},
    ],
    ids=["rope", "learned", "window", "parallel"],
)
def test_greedy_text_is_the_argmax_of_the_pass_without_cache(
    fields, model_config, random_params
):
    built = zoo.build(model_config(num_layers=2, **fields))
    model = built, random_params(built.abstract)
    found = _generate(model, PROMPTS)
    assert found == [_greedy(model, prompt, 7) for prompt in PROMPTS]
    assert len({i for row in found for i in row}) > 3


def test_a_prompt_gives_the_same_greedy_text_alone_and_among_longer_ones(model):
    together = _generate(model, PROMPTS)
    assert together == [_generate(model, [prompt])[0] for prompt in PROMPTS]


def test_text_after_a_prompt_of_two_buckets_is_right_too(model_config, random_params):
    built = zoo.build(model_config(num_layers=1, window=3))
    model = built, random_params(built.abstract)
    # One layer that sees three ids, and rope, which knows distances alone.
    tail = [7, 8, 30, 31, 2]
    rng = np.random.default_rng(0)
    long = [*rng.integers(0, 37, generation.BUCKET).tolist(), *tail]
    with_long, alone = _generate(model, [long, tail])
    assert with_long == alone == _greedy(model, tail, 7)


def test_the_same_seed_gives_the_same_text_and_another_another(model):
    first, again, other = (
        _generate(model, PROMPTS, temperature=1.0, seed=seed) for seed in (4, 4, 5)
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("settings", [{}, {"top_k": 9, "top_p": 0.9}])
def test_a_row_does_not_depend_on_the_other_rows(model, settings):
    settings = settings | {"temperature": 1.0, "seed": 2}
    first = _generate(model, PROMPTS, **settings)
    among_others = _generate(model, [[8, 8], PROMPTS[1], [5] * 8], **settings)
    fewer = _generate(model, PROMPTS[:2], **settings)
    assert among_others[1] == first[1]
    assert fewer == first[:2]
    assert among_others[0] != first[0]


def test_rows_of_one_prompt_draw_different_texts(model):
    rows = _generate(model, [[3, 1]] * 3, temperature=1.0)
    assert len({tuple(row) for row in rows}) == 3


def test_text_ends_before_the_end_id_and_other_rows_go_on(model):
    whole = _generate(model, PROMPTS)
    end_id = next(i for i in whole[0] if i not in whole[1])
    ended = _generate(model, PROMPTS, end_id=end_id)
    for before, after in zip(whole, ended, strict=True):
        stop = before.index(end_id) if end_id in before else len(before)
        assert after == before[:stop]
    assert len(ended[0]) < 7 == len(ended[1])


def test_a_text_may_end_at_once(model):
    (first, *_) = _generate(model, PROMPTS[:1])[0]
    assert _generate(model, PROMPTS[:1], end_id=first) == [[]]


def test_a_small_temperature_approaches_the_likeliest_text(model):
    greedy = _generate(model, PROMPTS)
    assert _generate(model, PROMPTS, temperature=1e-4) == greedy
    assert _generate(model, PROMPTS, temperature=1.0) != greedy


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}])
def test_a_choice_among_one_is_greedy_at_any_temperature(model, settings):
    hot = _generate(model, PROMPTS, temperature=5.0, **settings)
    assert hot == _generate(model, PROMPTS)


def _first_ids(model, prompt, **settings):
    """Return 3072 draws of the id after `prompt`."""
    draws = [
        _generate(model, [prompt] * 256, num_tokens=1, seed=seed, **settings)
        for seed in range(12)
    ]
    return np.array(draws).ravel()


def _chi_square(ids, probs):
    """Return the probability of a misfit this large, in cells of at least 5 draws."""
    expected = probs * len(ids)
    counts = np.bincount(ids, minlength=len(probs))
    common = expected >= 5
    cells = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    filled = wanted > 1e-9
    assert not cells[~filled].any()
    assert filled.sum() > 5
    return stats.chisquare(cells[filled], wanted[filled]).pvalue


def _softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draws_follow_the_softmax_of_logits_over_temperature(model, temperature):
    logits = _next_logits(model, PROMPTS[0])
    ids = _first_ids(model, PROMPTS[0], temperature=temperature)
    assert _chi_square(ids, _softmax(logits / temperature)) > 0.01
    # The test has the power to tell temperatures apart.
    assert _chi_square(ids, _softmax(logits / (1.5 * temperature))) < 1e-6


def test_draws_among_the_likeliest_follow_their_renormalised_softmax(model):
    logits = _next_logits(model, PROMPTS[2])
    logits = np.where(logits >= np.sort(logits)[-8], logits, -np.inf)
    ids = _first_ids(model, PROMPTS[2], temperature=1.0, top_k=8)
    assert _chi_square(ids, _softmax(logits)) > 0.01


def test_lengths_within_a_bucket_and_values_of_the_rules_share_one_program(model):
    settings = {"temperature": 1.0, "top_k": 3}
    _generate(model, [[1], [2, 3]], **settings)
    compiled = generation._decode._cache_size()
    _generate(model, [[1] * generation.BUCKET, [2]], **settings)
    _generate(model, [[5] * 9, [2] * 30], temperature=0.3, top_k=5, top_p=0.4, seed=6)
    assert generation._decode._cache_size() == compiled
    _generate(model, [[1] * (generation.BUCKET + 1), [2]], **settings)
    assert generation._decode._cache_size() == compiled + 1


# ---- keep_likely


def _keep_likely_numpy(logits_BV, top_k, top_p):
    """Return which ids stay, row by row; no two logits of a row may be equal."""
    kept_BV = np.zeros(logits_BV.shape, bool)
    for row, logits in enumerate(logits_BV.astype(np.float64)):
        order = np.argsort(-logits)[: top_k or None]
        probs = _softmax(logits[order])
        reached = 0.0
        for index, prob in zip(order, probs, strict=True):
            kept_BV[row, index] = True
            reached += prob
            if reached >= top_p:
                break
    return kept_BV


def _kept(logits_BV, top_k, top_p):
    """Return which ids stay, having checked that their logits are untouched."""
    logits_BV = np.asarray(logits_BV, np.float32)
    found_BV = np.asarray(keep_likely(logits_BV, jnp.int32(top_k), jnp.float32(top_p)))
    kept_BV = np.isfinite(found_BV)
    np.testing.assert_array_equal(found_BV[kept_BV], logits_BV[kept_BV])
    assert np.all(found_BV[~kept_BV] == -np.inf)
    return kept_BV


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 22, 23, 90])
@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.55, 0.9, 0.99, 1.0])
def test_the_likely_ids_are_those_of_the_reference(top_k, top_p):
    logits_BV = np.random.default_rng(top_k).standard_normal((11, 23)) * 2
    kept_BV = _kept(logits_BV, top_k, top_p)
    np.testing.assert_array_equal(kept_BV, _keep_likely_numpy(logits_BV, top_k, top_p))


def test_probabilities_are_renormalised_within_top_k_before_top_p():
    logits_BV = np.log([[0.4, 0.3, 0.2, 0.1]])
    # Of the first two, 4/7 are below 0.6; of all, 0.4 + 0.3 would be enough too.
    assert _kept(logits_BV, 2, 0.5).tolist() == [[True, False, False, False]]
    assert _kept(logits_BV, 0, 0.5).tolist() == [[True, True, False, False]]


def test_without_limits_every_id_stays():
    logits_BV = np.random.default_rng(1).standard_normal((3, 23))
    assert _kept(logits_BV, 0, 1.0).all()


def test_the_likeliest_id_always_stays():
    assert _kept([[0.0, 9.0, 1.0]], 0, 0.0).tolist() == [[False, True, False]]


def test_ids_as_likely_as_the_last_one_stay_too():
    kept = [[True, True, False, True]]
    assert _kept([[2.0, 2.0, 1.0, 2.0]], 1, 1.0).tolist() == kept
    assert _kept([[2.0, 2.0, 1.0, 2.0]], 0, 0.1).tolist() == kept


def test_an_id_that_was_ruled_out_stays_out():
    assert _kept([[1.0, -np.inf, 0.0]], 0, 0.99).tolist() == [[True, False, True]]
