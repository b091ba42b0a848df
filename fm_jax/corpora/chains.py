"""A source whose every probability is known, and so the best loss on what it writes.

A document comes from one of a few chains, equally likely; it starts in the chain's
stationary distribution, and after every symbol it ends with the same probability
1/mean_length. So its length says nothing of its symbols, and a place inside a document
has the same distribution wherever it is: what a window that opens there can know is
exact.

Dims besides the usual: C chains, Z states of one, V symbols (the end id is not among
them), I documents that are drawn together.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

KINDS = ("markov", "hmm")
STREAMS = {"train": 0, "eval": 1}  # whose documents are drawn independently
RANGES = {"num_symbols": (2, 50_000), "mean_length": (1, 100_000)}
MAX_ENTRIES = 1 << 26  # of all tables of a chain: half a GiB
FLOOR = 1e-6  # of the base in each row, so that no state is ever left for good
BLOCK_SYMBOLS = 1 << 18  # about as many are drawn together


def num_entries(kind: str, symbols: int, states: int, components: int) -> int:
    """Return how many probabilities the tables of a chain hold."""
    row = symbols if kind == "markov" else states + symbols
    return components * (symbols if kind == "markov" else states) * row


@dataclasses.dataclass(frozen=True)
class Tables:
    """The probabilities of a chain; each of the last dims sums to one.

    start_CZ is the stationary distribution of step_CZZ. emit_CZV is None where a state
    is a symbol.
    """

    start_CZ: np.ndarray
    step_CZZ: np.ndarray
    emit_CZV: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """Markov chains over symbols, or hidden Markov models, that documents come from.

    Rows of probabilities are Dirichlet: `concentration` is the mean of the parameters,
    which fall as rank^-zipf over symbols (over hidden states they are alike). Rank is
    not the id: symbols are shuffled. Everything follows from `seed`.
    """

    kind: str
    num_symbols: int
    num_states: int
    num_components: int
    concentration: float
    zipf: float
    mean_length: float
    seed: int

    @property
    def end_id(self) -> int:
        """The id that stands before each document and after the last."""
        return self.num_symbols

    @property
    def hazard(self) -> float:
        """The probability that a document ends after a symbol."""
        return 1 / self.mean_length

    @functools.cached_property
    def tables(self) -> Tables:
        """All probabilities of symbols; made when first asked for."""
        rng = self._rng(len(STREAMS))
        base_V = np.arange(1, self.num_symbols + 1, dtype=np.float64) ** -self.zipf
        base_V = rng.permutation(base_V / base_V.sum())
        base_Z, emits = base_V, None
        if self.kind == "hmm":
            base_Z = np.full(self.num_states, 1 / self.num_states)
        num_states, chains = len(base_Z), range(self.num_components)
        steps = [self._rows(rng, base_Z, num_states) for _ in chains]
        if self.kind == "hmm":
            emits = np.stack([self._rows(rng, base_V, num_states) for _ in chains])
        starts = [_stationary(step_ZZ) for step_ZZ in steps]
        return Tables(np.stack(starts), np.stack(steps), emits)

    def sample(self, split: str) -> Iterator[np.ndarray]:
        """Yield the symbols of document 0, 1, 2, ... of a split, for ever."""
        tables, count = self.tables, self.num_components
        start, step = _Draws(tables.start_CZ), _Draws(tables.step_CZZ)
        emit = None if tables.emit_CZV is None else _Draws(tables.emit_CZV)
        together = int(np.clip(BLOCK_SYMBOLS / self.mean_length, 16, 4096))
        states = tables.start_CZ.shape[1]
        for block in itertools.count():
            rng = self._rng(STREAMS[split], block)
            lengths_I = self._lengths(rng.random(together))
            chain_I = (rng.random(together) * count).astype(np.int64)
            # The longest first: those that go on are the first ones.
            order_I = np.argsort(-lengths_I, kind="stable")
            chain_I, sorted_I = chain_I[order_I], lengths_I[order_I]
            symbols_TI = np.zeros((sorted_I[0], together), np.int32)
            state_I = start(chain_I, rng.random(together))
            for place in range(sorted_I[0]):
                if place:
                    going = np.searchsorted(-sorted_I, -place, side="left")
                    row_I = chain_I[:going] * states + state_I[:going]
                    state_I = step(row_I, rng.random(going))
                symbols_I = state_I
                if emit is not None:
                    row_I = chain_I[: len(state_I)] * states + state_I
                    symbols_I = emit(row_I, rng.random(len(state_I)))
                symbols_TI[place, : len(state_I)] = symbols_I
            places_I = np.argsort(order_I, kind="stable")
            for place, length in zip(places_I, lengths_I, strict=True):
                yield symbols_TI[:length, place]

    # ---- what is known

    def entropy_rate(self) -> float | None:
        """Return the entropy rate in nats per token, end ids among them; exact.

        It is the least loss of any model that sees a whole document up to a token.
        None where there is no closed form: of all but one Markov chain.
        """
        if self.kind != "markov" or self.num_components > 1:
            return None
        start_V, step_VV = self.tables.start_CZ[0], self.tables.step_CZZ[0]
        later = self.mean_length - 1  # symbols that follow another in the document
        symbols = _entropy(start_V) + later * start_V @ _entropy(step_VV)
        ends = self.mean_length * _entropy(np.array([self.hazard, 1 - self.hazard]))
        return float((symbols + ends) / (self.mean_length + 1))

    def bayes_nll(
        self, tokens_BT: np.ndarray, targets_BT: np.ndarray, weights_BT: np.ndarray
    ) -> np.ndarray:
        """Return -ln p(target | the row's tokens up to there), [B, T] float64; exact.

        No model can do better on average that sees a row and no more. Rows are windows
        of the stream. An end id opens a document, of which the ones before it say
        nothing, masked or not; a row that opens with a symbol is inside a document, of
        which that symbol is all that is known. 0 where the weight is 0.
        """
        ended_BT = tokens_BT == self.end_id
        ends_BT = targets_BT == self.end_id
        x_TB = np.where(ended_BT, 0, tokens_BT).T
        y_TB = np.where(ends_BT, 0, targets_BT).T
        forward = self._forward_markov if self.kind == "markov" else self._forward_hmm
        p_BT = np.stack(list(forward(x_TB, y_TB, ended_BT.T)), axis=1)
        goes_on_BT = np.where(ended_BT, 1.0, 1 - self.hazard)
        p_BT = np.where(ends_BT, 1 - goes_on_BT, goes_on_BT * p_BT)
        with np.errstate(divide="ignore"):  # what the source never writes: infinite
            return np.where(weights_BT > 0, -np.log(p_BT), 0.0)

    def _forward_markov(self, x_TB, y_TB, ended_TB) -> Iterator[np.ndarray]:
        """Yield p(y) of each place: a mixture over what is known of the chain."""
        start_CV, step_CVV = self.tables.start_CZ, self.tables.step_CZZ
        prior_C1 = np.full((self.num_components, 1), 1 / self.num_components)
        opens_B, last_B, belief_CB = True, x_TB[0], prior_C1
        for x_B, y_B, ended_B in zip(x_TB, y_TB, ended_TB, strict=True):
            step_CB = step_CVV[:, last_B, x_B]
            seen_CB = np.where(opens_B, start_CV[:, x_B], step_CB)
            seen_CB *= np.where(opens_B, prior_C1, belief_CB)
            belief_CB = np.where(ended_B, prior_C1, seen_CB / seen_CB.sum(0))
            after_CB = np.where(ended_B, start_CV[:, y_B], step_CVV[:, x_B, y_B])
            yield (belief_CB * after_CB).sum(0)
            opens_B, last_B = ended_B, x_B

    def _forward_hmm(self, x_TB, y_TB, ended_TB) -> Iterator[np.ndarray]:
        """Yield p(y) of each place, by the forward algorithm, scaled at every step."""
        tables = self.tables
        emit_VCZ = np.ascontiguousarray(np.moveaxis(tables.emit_CZV, 2, 0))
        fresh_CZ = ahead_BCZ = tables.start_CZ / self.num_components
        for x_B, y_B, ended_B in zip(x_TB, y_TB, ended_TB, strict=True):
            seen_BCZ = ahead_BCZ * emit_VCZ[x_B]
            seen_BCZ /= seen_BCZ.sum((1, 2), keepdims=True)
            moved_CBZ = np.matmul(np.moveaxis(seen_BCZ, 1, 0), tables.step_CZZ)
            ahead_BCZ = np.where(
                ended_B[:, None, None], fresh_CZ, np.moveaxis(moved_CBZ, 0, 1)
            )
            yield np.einsum("bcz,bcz->b", ahead_BCZ, emit_VCZ[y_B])

    # ---- chance

    def _rng(self, *purpose: int) -> np.random.Generator:
        sequence = np.random.SeedSequence(self.seed, spawn_key=purpose)
        return np.random.Generator(np.random.Philox(sequence))

    def _rows(self, rng, base_V: np.ndarray, num_rows: int) -> np.ndarray:
        """Return Dirichlet rows around `base_V`, [num_rows, V]."""
        alpha_V = self.concentration * len(base_V) * base_V
        rows = np.empty((num_rows, len(base_V)))
        for row in range(num_rows):
            # A gamma of shape a is one of shape a + 1 times u^(1/a). By logarithms:
            # at small shapes whole rows would be too small for float64.
            with np.errstate(divide="ignore"):
                log_V = np.log(rng.standard_gamma(alpha_V + 1))
                log_V += np.log(rng.random(len(base_V))) / alpha_V
            rows[row] = np.exp(log_V - log_V.max())
            rows[row] /= rows[row].sum()
        return (1 - FLOOR) * rows + FLOOR * base_V

    def _lengths(self, u_I: np.ndarray) -> np.ndarray:
        if self.hazard == 1:
            return np.ones(len(u_I), np.int64)
        return 1 + (np.log1p(-u_I) / np.log1p(-self.hazard)).astype(np.int64)


class _Draws:
    """Draws from rows of probabilities, many at a time.

    The rows' running sums stand one after another, row r between r and r + 1, so that
    one search finds a draw of any row.
    """

    def __init__(self, rows: np.ndarray):
        self.width = rows.shape[-1]
        sums = np.cumsum(rows.reshape(-1, self.width), axis=1)
        sums /= sums[:, -1:]
        sums += np.arange(len(sums))[:, None]
        self.sums = sums.ravel()

    def __call__(self, row_I: np.ndarray, u_I: np.ndarray) -> np.ndarray:
        """Return the column that number u in [0, 1) falls on in each row."""
        found_I = np.searchsorted(self.sums, row_I + u_I, side="right")
        # row + u may round up to the next row.
        return np.minimum(found_I - row_I * self.width, self.width - 1)


def _stationary(step_ZZ: np.ndarray) -> np.ndarray:
    """Return the distribution that a step leaves as it is."""
    equations_ZZ = np.eye(len(step_ZZ)) - step_ZZ.T
    equations_ZZ[-1] = 1  # one of the equations follows from the others
    found_Z = np.linalg.solve(equations_ZZ, np.eye(len(step_ZZ))[-1])
    found_Z = np.maximum(found_Z, 0.0)
    return found_Z / found_Z.sum()


def _entropy(p: np.ndarray) -> np.ndarray:
    """Return the entropy in nats over the last dim."""
    return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)
