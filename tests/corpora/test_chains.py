"""Tests of sources whose probabilities are known, against sums over all that can be."""

import functools
import itertools
import math

import numpy as np
import pytest

from fm_jax.corpora.chains import KINDS, Chain

TINY = {
    "num_symbols": 2,
    "num_states": 3,
    "num_components": 2,
    "concentration": 0.7,
    "zipf": 0.5,
    "mean_length": 1.6,
    "seed": 5,
}
SMALL = TINY | {"num_symbols": 23, "num_states": 7, "mean_length": 19.0}


def make(kind="markov", **fields):
    return Chain(kind=kind, **TINY | fields)


@functools.cache
def sequence_probability(chain, symbols):
    """Return p of the first symbols of a document, summed over all hidden paths."""
    tables, total = chain.tables, 0.0
    if not symbols:
        return 1.0
    for c in range(chain.num_components):
        start, step = tables.start_CZ[c], tables.step_CZZ[c]
        for path in itertools.product(range(len(start)), repeat=len(symbols)):
            p = start[path[0]]
            for a, b in itertools.pairwise(path):
                p *= step[a, b]
            for state, symbol in zip(path, symbols, strict=True):
                if tables.emit_CZV is None:
                    p *= state == symbol
                else:
                    p *= tables.emit_CZV[c, state, symbol]
            total += p / chain.num_components
    return total


def stream_probability(chain, ids):
    """Return p of the first ids of a stream, which opens with an end id."""
    end, stop = chain.num_symbols, 1 / chain.mean_length
    assert ids[0] == end
    documents = [[]]
    for token in ids[1:]:
        if token == end:
            documents.append([])
        else:
            documents[-1].append(token)
    p = 1.0
    for place, symbols in enumerate(documents):
        is_over = place < len(documents) - 1
        if is_over and not symbols:
            return 0.0
        p *= sequence_probability(chain, tuple(symbols))
        p *= (1 - stop) ** max(0, len(symbols) - 1)
        p *= stop if is_over else 1.0
    return p


def window_probability(chain, ids, place):
    """Return p that ids stand at a place of the stream, summed over all before it."""
    end = chain.num_symbols
    if place == 0:
        return stream_probability(chain, ids) if ids[0] == end else 0.0
    before = itertools.product(range(end + 1), repeat=place - 1)
    return sum(stream_probability(chain, (end, *some, *ids)) for some in before)


def nll_of(chain, ids_B):
    ids_BT1 = np.array(ids_B)
    tokens_BT, targets_BT = ids_BT1[:, :-1], ids_BT1[:, 1:]
    return chain.bayes_nll(tokens_BT, targets_BT, np.ones(targets_BT.shape))


def stream_of(chain, num_tokens, split="train"):
    parts, left = [], num_tokens
    for symbols in chain.sample(split):
        parts += [[chain.end_id], symbols]
        left -= 1 + len(symbols)
        if left <= 0:
            return np.concatenate([*parts, [chain.end_id]])


def windows_of(chain, num_tokens, length, split="train"):
    ids = stream_of(chain, num_tokens, split)
    count = (len(ids) - 1) // length
    tokens, targets = ids[: count * length], ids[1 : count * length + 1]
    return tokens.reshape(-1, length).copy(), targets.reshape(-1, length).copy()


# ---- the best loss


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_least_loss_of_a_window_is_that_of_a_sum_over_all_that_can_be(kind, place):
    chain = make(kind)
    windows = [
        ids
        for ids in itertools.product(range(chain.num_symbols + 1), repeat=5)
        if window_probability(chain, ids, place) > 0
    ]
    assert len(windows) > 20
    found = nll_of(chain, windows)
    for ids, nll_T in zip(windows, found, strict=True):
        p = [window_probability(chain, ids[:n], place) for n in range(1, 6)]
        expected = [math.log(a / b) for a, b in itertools.pairwise(p)]
        np.testing.assert_allclose(nll_T, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_what_may_come_next_sums_to_one(kind):
    chain = Chain(kind=kind, **SMALL)
    row = stream_of(chain, 40)[:31]
    rows = np.repeat(row[None], chain.num_symbols + 1, axis=0)
    for place in (1, 2, 17, 30):
        ids = rows[:, : place + 1].copy()
        ids[:, -1] = np.arange(chain.num_symbols + 1)
        p = np.exp(-nll_of(chain, ids)[:, -1])
        assert p.sum() == pytest.approx(1, abs=1e-13)
        assert p[chain.end_id] == pytest.approx(
            0 if row[place - 1] == chain.end_id else 1 / 19
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_documents_before_one_say_nothing_of_it(kind):
    chain = Chain(kind=kind, **SMALL)
    ids = stream_of(chain, 300)
    whole = nll_of(chain, ids[None])[0]
    opens = np.flatnonzero(ids[:-1] == chain.end_id)
    assert len(opens) > 5
    for start in opens:
        alone = nll_of(chain, ids[None, start:])[0]
        np.testing.assert_allclose(alone, whole[start:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_loss_in_any_batch_and_cut_short(kind):
    chain = Chain(kind=kind, **SMALL)
    tokens, targets = windows_of(chain, 1200, 29)
    ones = np.ones(tokens.shape, np.float32)
    whole = chain.bayes_nll(tokens, targets, ones)
    order = np.random.default_rng(0).permutation(len(tokens))
    np.testing.assert_array_equal(
        chain.bayes_nll(tokens[order], targets[order], ones), whole[order]
    )
    for row in (0, 3, len(tokens) - 1):
        one = slice(row, row + 1)
        alone = chain.bayes_nll(tokens[one, :11], targets[one, :11], ones[one, :11])
        np.testing.assert_allclose(alone[0], whole[row, :11], rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_loss_and_changes_none(kind):
    chain = Chain(kind=kind, **SMALL)
    tokens, targets = windows_of(chain, 100, 13)
    weights = np.ones(tokens.shape, np.float32)
    whole = chain.bayes_nll(tokens, targets, weights)
    weights[-1, 6:] = tokens[-1, 6:] = targets[-1, 6:] = 0
    weights = np.pad(weights, ((0, 2), (0, 0)))
    padded = [np.pad(x, ((0, 2), (0, 0))) for x in (tokens, targets)]
    found = chain.bayes_nll(*padded, weights)
    np.testing.assert_array_equal(found[weights == 0], 0)
    np.testing.assert_array_equal(found[:-3], whole[:-1])
    np.testing.assert_array_equal(found[-3, :6], whole[-1, :6])


def test_what_the_source_never_writes_has_an_infinite_loss():
    chain = make()
    end = chain.end_id
    assert nll_of(chain, [[end, end, 1]])[0, 0] == math.inf


# ---- entropy rates


def document_entropy(chain, longest):
    """Return the entropy of a document, those longer than `longest` left out."""
    stop, total = 1 / chain.mean_length, 0.0
    for length in range(1, longest + 1):
        over = (1 - stop) ** (length - 1) * stop
        for symbols in itertools.product(range(chain.num_symbols), repeat=length):
            p = over * sequence_probability(chain, symbols)
            total -= p * math.log(p)
    return total


@pytest.mark.parametrize("num_symbols", [2, 3])
def test_the_entropy_rate_is_that_of_a_sum_over_all_documents(num_symbols):
    # Of chance 1e-10 is a document left out.
    chain = make(num_components=1, num_symbols=num_symbols, mean_length=1 / 0.98)
    per_token = document_entropy(chain, 6) / (1 + chain.mean_length)
    assert chain.entropy_rate() == pytest.approx(per_token, rel=1e-8)


@pytest.mark.parametrize("kind, num_components", [("hmm", 1), ("markov", 2)])
def test_an_entropy_rate_without_a_closed_form_is_not_known(kind, num_components):
    assert make(kind, num_components=num_components).entropy_rate() is None


def mean_and_error(chain, nll_BT):
    rows = nll_BT.mean(1)
    return rows.mean(), rows.std(ddof=1) / math.sqrt(len(rows))


@pytest.mark.parametrize("mean_length", [1.0, 3.5, 60.0])
def test_text_has_the_entropy_that_the_chain_says(mean_length):
    fields = SMALL | {"mean_length": mean_length, "num_components": 1}
    chain = Chain(kind="markov", **fields)
    tokens, targets = windows_of(chain, 200_000, 64)
    nll_BT = chain.bayes_nll(tokens, targets, np.ones(tokens.shape))
    mean, error = mean_and_error(chain, nll_BT)
    assert error < 0.01
    assert abs(mean - chain.entropy_rate()) < 4 * error


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_row_can_be_known_better(kind):
    chain = Chain(kind=kind, **SMALL | {"mean_length": 60.0})
    tokens, targets = windows_of(chain, 200_000, 512)
    nll_BT = chain.bayes_nll(tokens, targets, np.ones(tokens.shape))
    shorter = [x[:, :256].reshape(-1, 8) for x in (tokens, targets)]
    short_BT = chain.bayes_nll(*shorter, np.ones(shorter[0].shape))
    assert short_BT.mean() > nll_BT[:, :256].mean() + 0.01


# ---- chance


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_drawn_from_the_tables(kind):
    chain = Chain(kind=kind, **SMALL)
    ids = stream_of(chain, 400_000)
    opens = np.flatnonzero(ids == chain.end_id)
    lengths = np.diff(opens) - 1
    assert lengths.min() == 1
    error = lengths.std() / math.sqrt(len(lengths))
    assert abs(lengths.mean() - 19) < 4 * error
    alone = np.mean(lengths == 1)
    assert abs(alone - 1 / 19) < 4 * math.sqrt(1 / 19 / len(lengths))
    inside = (ids[:-1] < chain.end_id) & (ids[1:] < chain.end_id)
    counts_VV = np.zeros((23, 23))
    np.add.at(counts_VV, (ids[:-1][inside], ids[1:][inside]), 1)
    expected_VV = np.zeros((23, 23))
    tables = chain.tables
    for c in range(2):
        emit = np.eye(23) if tables.emit_CZV is None else tables.emit_CZV[c]
        joint = tables.start_CZ[c][:, None] * tables.step_CZZ[c]
        expected_VV += emit.T @ joint @ emit / 2
    # A document's symbols share its chain, so counts spread more than by chance alone.
    often = expected_VV > 1e-3
    share_VV = counts_VV / counts_VV.sum()
    assert often.sum() > 50
    np.testing.assert_allclose(share_VV[often], expected_VV[often], rtol=0.2)
    assert abs(share_VV[often].sum() - expected_VV[often].sum()) < 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_is_stationary_and_rows_sum_to_one(kind):
    for concentration in (1e-7, 0.05, 30.0):
        tables = Chain(kind=kind, **SMALL | {"concentration": concentration}).tables
        moved_CZ = np.einsum("cz,czy->cy", tables.start_CZ, tables.step_CZZ)
        np.testing.assert_allclose(moved_CZ, tables.start_CZ, rtol=0, atol=1e-13)
        rows = [tables.start_CZ, tables.step_CZZ, tables.emit_CZV]
        for table in rows if kind == "hmm" else rows[:2]:
            assert table.min() > 0
            np.testing.assert_allclose(table.sum(-1), 1, rtol=1e-13)


def test_rows_are_close_to_the_symbols_frequencies_where_concentration_is_high():
    chain = make(num_symbols=50, concentration=1e6, zipf=1.0)
    rows = -np.sort(-chain.tables.step_CZZ[0], axis=1)
    expected = 1 / np.arange(1, 51)
    np.testing.assert_allclose(rows, [expected / expected.sum()] * 50, rtol=0.01)
    order = np.argsort(-chain.tables.step_CZZ[0, 0])
    assert not np.array_equal(order, np.arange(50))


def test_a_low_concentration_leaves_little_to_chance():
    rates = [
        make(num_symbols=30, num_components=1, concentration=c).entropy_rate()
        for c in (0.01, 0.1, 1.0, 10.0)
    ]
    assert rates == sorted(rates)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_follows_from_seed_split_and_number_alone(kind):
    def first(count, split="train", **changes):
        found = Chain(kind=kind, **SMALL | changes).sample(split)
        return [tuple(symbols) for symbols in itertools.islice(found, count)]

    few, many = first(9), first(4200)  # of which 4096 are drawn together
    assert many[:9] == few
    assert many[4096:4105] != few
    assert first(9, "eval") != few
    assert first(9, seed=6) != few


GOLDEN = {
    "markov": [[5], [21, 7, 1, 16, 15, 9, 14], [0, 6]],
    "hmm": [[9], [3, 6, 16, 16, 0, 5, 6], [5, 6]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_these_are_the_symbols_of_a_seed(kind):
    # Where they become others, stores and runs made of them are others too: then
    # synthetic.FORMAT must be raised.
    documents = Chain(kind=kind, **SMALL | {"mean_length": 5.0}).sample("train")
    assert [next(documents).tolist() for _ in GOLDEN[kind]] == GOLDEN[kind]
