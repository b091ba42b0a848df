"""How likely a model finds held-out text: loss, bits per byte, accuracy."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

LN2 = math.log(2)
# Sums with a meaning of their own; the others are metrics when divided by `weight`.
SUMS = ("nll", "weight", "correct", "bytes")
# Below the best possible loss by chance: of one Markov chain's text a gain of this many
# nats has a probability of at most exp(-20), whatever the model. Of an hmm or several
# chains that holds of one row alone: the rows of a long document are alike.
CHANCE_NATS = 20
CHANCE_ERRORS = 5  # standard errors: more than rounding makes of much text


def evaluate(
    eval_step: Callable,
    params: dict,
    batches: Iterable,
    *,
    bayes: Sequence[float] | None = None,
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Return metrics of `params` over batches that are already on the mesh.

    eval_step(params, batch) gives sums `nll` (nats), `weight`, `correct` and, of text,
    `bytes`; without any bytes there is no bits_per_byte. Any other sum, as `margin` of
    preferences, becomes a metric of its name when it is divided by `weight`. Sums are
    added in float64 and divided once. loss is in nats per token, or per whatever
    `weight` counts, and `tokens` is how many of these there are. loss_se is its
    standard error as an estimate of the loss on all such text, batches taken as
    clusters; it says nothing of other seeds of training.

    bayes: the least nats of each batch, where the source's probabilities are known.
    Then `bayes_loss` is their mean, `excess_loss` what the loss is above it, with its
    own `excess_se`. Standard errors are left out where only one batch has weight.

    names: of the components of a mixture. Of several, eval_step gives `component_nll`,
    `component_weight`, `component_correct` and, of text, `component_bytes`, `[K]`, and
    there are loss, accuracy, tokens and bits_per_byte of each that has a token:
    `loss/wiki`.
    """
    rows = []
    for batch in batches:
        sums = eval_step(params, batch)
        rows.append({n: np.asarray(x, np.float64) for n, x in sums.items()})
    sums = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    nll, weight = sums["nll"], sums["weight"]
    found = {
        "loss": nll.sum() / weight.sum(),
        "accuracy": sums["correct"].sum() / weight.sum(),
        "tokens": weight.sum(),
    }
    if (size := np.sum(sums.get("bytes", 0))) > 0:
        found["bits_per_byte"] = nll.sum() / LN2 / size
    for name, value in sums.items():
        if name not in SUMS and not name.startswith("component_"):
            found[name] = value.sum() / weight.sum()
    clustered = {"loss_se": nll}
    if bayes is not None:
        excess = np.subtract(nll, bayes)
        found["bayes_loss"] = np.sum(bayes) / weight.sum()
        found["excess_loss"] = excess.sum() / weight.sum()
        clustered["excess_se"] = excess
    if np.count_nonzero(weight) > 1:
        found |= {name: _error(x, weight) for name, x in clustered.items()}
    if len(names) > 1:
        found |= _by_component(sums, names)
    return {name: float(value) for name, value in found.items()}


def below_bayes(metrics: dict[str, float]) -> str:
    """Return a line that says so where a loss is below the least by too much.

    "" where it is not, or the least loss is not known. One batch has no standard error:
    then the nats alone decide. Of one Markov chain it is not chance; of other sources
    standard errors take documents to be many, and shorter than a batch.
    """
    if "excess_loss" not in metrics:
        return ""
    excess, error = metrics["excess_loss"], metrics.get("excess_se", 0.0)
    nats = -excess * metrics["tokens"]
    if nats <= CHANCE_NATS or -excess <= CHANCE_ERRORS * error:
        return ""
    return (
        "the held-out loss must not be below the source's Bayes loss; got "
        f"{metrics['loss']:.6f} against {metrics['bayes_loss']:.6f} nats/token, "
        f"{nats:,.0f} nats in all and {error:.2g} nats/token of standard error. "
        "Held-out text has leaked into training, or evaluation has a bug; or, of an "
        "hmm or several chains, it is chance: where documents are few or longer than "
        "a batch."
    )


def _by_component(sums: dict[str, np.ndarray], names: Sequence[str]) -> dict:
    of = {n: sums[f"component_{n}"].sum(axis=0) for n in ("nll", "weight", "correct")}
    size = np.sum(sums.get("component_bytes", np.zeros((1, len(names)))), axis=0)
    found = {}
    for k, name in enumerate(names):
        if of["weight"][k]:
            found[f"loss/{name}"] = of["nll"][k] / of["weight"][k]
            found[f"accuracy/{name}"] = of["correct"][k] / of["weight"][k]
            found[f"tokens/{name}"] = of["weight"][k]
        if size[k]:
            found[f"bits_per_byte/{name}"] = of["nll"][k] / LN2 / size[k]
    return found


def _error(sums: np.ndarray, weights: np.ndarray) -> float:
    """Return the standard error of sum(sums) / sum(weights) over clusters.

    The linearised ratio estimator (Cochran, Sampling Techniques, 1977, ch. 6).
    """
    real = weights > 0
    count = np.count_nonzero(real)
    residuals = (sums - weights * sums.sum() / weights.sum())[real]
    spread = np.sum(residuals**2) * count / (count - 1)
    return math.sqrt(spread) / weights.sum()
