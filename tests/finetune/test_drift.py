"""Tests of the drift of features, against turns and stretches that are known."""

import jax
import numpy as np
import pytest

from fm_jax.finetune import drift, heads
from fm_jax.models import zoo
from tests.finetune.test_features import batches_of

BATCHES = batches_of(
    [(1, 2, 0), (1, 0, 1), (4, 0, 0)], components=[(1, 0, 1), (0, 1, 1), (2, 2, 2)]
)


@pytest.fixture(scope="module")
def model(model_config):
    return heads.with_classifier(zoo.build(model_config(num_layers=1)), 3)


def _scaled(params, factors):
    """Return params whose features are those of `params`, each dim by a factor."""
    scale = params["final_norm"]["scale"] * np.asarray(factors, np.float32)
    return params | {"final_norm": {"scale": scale}}


def _begin(model, params, max_batches=2, names=("id", "ood")):
    return drift.Drift.begin(
        model, params, lambda: iter(BATCHES), names, max_batches=max_batches
    )


def test_nothing_that_moved_is_no_drift(model, random_params):
    params = random_params(model.abstract)
    head = jax.tree.map(lambda x: x + 1, params["classifier"])
    found = _begin(model, params).measure(params | {"classifier": head})
    assert list(found) == ["drift/id", "cosine/id", "drift/ood", "cosine/ood"]
    assert found["drift/id"] == found["drift/ood"] == 0
    assert found["cosine/id"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("factor, cosine", [(1.25, 1), (0.5, 1), (-1, -1)])
def test_a_stretch_is_a_drift_of_as_much(factor, cosine, model, random_params):
    params = random_params(model.abstract)
    found = _begin(model, params).measure(_scaled(params, [factor] * 12))
    for name in ("id", "ood"):
        assert found[f"drift/{name}"] == pytest.approx(abs(factor - 1), rel=1e-5)
        assert found[f"cosine/{name}"] == pytest.approx(cosine, rel=1e-5)


def test_drift_is_the_mean_over_each_components_examples(model, random_params):
    params = random_params(model.abstract)
    factors = np.linspace(0.4, 1.9, 12)
    found = _begin(model, params).measure(_scaled(params, factors))
    rows = {"id": [], "ood": []}
    for batch in BATCHES[:2]:
        names = ("tokens", "positions", "segment_ids")
        x_BTD = np.asarray(model.hidden(params, *(batch[n] for n in names))[0])
        for row, place in np.argwhere(batch["loss_weights"]):
            rows[("id", "ood")[batch["components"][row]]].append(x_BTD[row, place])
    for name, x in rows.items():
        old, new = np.array(x), np.array(x) * factors
        sizes = [np.sqrt(np.sum(v**2, axis=1)) for v in (new - old, old, new)]
        cosine = np.sum(new * old, axis=1) / sizes[1] / sizes[2]
        assert len(x) == {"id": 3, "ood": 2}[name]
        assert found[f"drift/{name}"] == pytest.approx(
            np.mean(sizes[0] / sizes[1]), rel=1e-5
        )
        assert found[f"cosine/{name}"] == pytest.approx(np.mean(cosine), rel=1e-5)


def test_a_component_without_an_example_has_no_drift(model, random_params):
    params = random_params(model.abstract)
    begun = _begin(model, params, 1, ("id", "ood", "none"))
    assert "drift/none" not in begun.measure(params)
    assert "drift/none" in _begin(model, params, 3, ("id", "ood", "none")).measure(
        params
    )


def test_rows_of_one_component_need_no_name(model, random_params):
    params = random_params(model.abstract)
    bare = [{k: v for k, v in b.items() if k != "components"} for b in BATCHES]
    begun = drift.Drift.begin(model, params, lambda: bare, max_batches=9)
    assert set(begun.measure(params)) == {"drift/eval", "cosine/eval"}


def test_other_examples_are_noticed(model, random_params):
    params = random_params(model.abstract)
    turns = iter([BATCHES, batches_of([(3, 2, 3), (1, 3, 2), (0, 1, 1)])])
    begun = drift.Drift.begin(model, params, lambda: next(turns), max_batches=2)
    with pytest.raises(AssertionError, match="batches are not the same"):
        begun.measure(params)
