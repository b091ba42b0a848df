"""How far a model's features have moved from where fine-tuning began."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fm_jax.finetune import features
from fm_jax.models.zoo import Model

LEAST = 1e-12  # of a norm: features of nothing but zeros have no direction


class Drift:
    """Compares features with those of the first weights, on the same examples.

    The distortion of features that Kumar et al. 2022 (arXiv 2202.10054)
    measure: they move more where fine-tuning has seen examples than where it has not.
    """

    def __init__(
        self,
        model: Model,
        make_batches: Callable[[], Iterable[dict]],
        names: Sequence[str],
        max_batches: int,
        first: list[features.Found],
    ):
        self._model, self._make_batches = model, make_batches
        self._names, self._max_batches = tuple(names) or ("eval",), max_batches
        self._first = first

    @classmethod
    def begin(
        cls,
        model: Model,
        params: dict,
        make_batches: Callable[[], Iterable[dict]],
        names: Sequence[str] = (),
        *,
        max_batches: int,
    ) -> "Drift":
        """Return what measures from `params`, whose features are kept on the host.

        make_batches() gives the same batches each time, on the mesh, of which the first
        `max_batches` are taken; names: of the components that their rows have. To be
        called, as `measure` is, within the layout's `active()`.
        """
        assert max_batches > 0, max_batches
        batches = itertools.islice(make_batches(), max_batches)
        first = list(features.by_batch(model, params, batches))
        return cls(model, make_batches, names, max_batches, first)

    def measure(self, params: dict) -> dict[str, float]:
        """Return by component the means over examples of what has become of features.

        `drift/NAME`: ||f - f_0|| / ||f_0||, 0 where nothing moved; `cosine/NAME`: that
        of the angle between f and f_0. A component without an example has none.
        """
        batches = itertools.islice(self._make_batches(), self._max_batches)
        now = features.by_batch(self._model, params, batches)
        rows = []
        for new, old in zip(now, self._first, strict=True):
            assert np.array_equal(new.y, old.y), "batches are not the same"
            rows.append((*_compared(new.x, old.x), old.components))
        change, cosine, components = map(np.concatenate, zip(*rows, strict=True))
        found = {}
        for number, name in enumerate(self._names):
            if np.any(is_its := components == number):
                found[f"drift/{name}"] = float(np.mean(change[is_its]))
                found[f"cosine/{name}"] = float(np.mean(cosine[is_its]))
        return found


def _compared(new_ND: np.ndarray, old_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the relative changes and the cosines of features, [N], in float64."""
    new_ND, old_ND = new_ND.astype(np.float64), old_ND.astype(np.float64)

    def norm(x_ND):
        return np.maximum(np.linalg.norm(x_ND, axis=-1), LEAST)

    change_N = np.linalg.norm(new_ND - old_ND, axis=-1) / norm(old_ND)
    return change_N, np.sum(new_ND * old_ND, axis=-1) / norm(new_ND) / norm(old_ND)
