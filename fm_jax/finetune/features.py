"""Features of examples: what a model's last hidden states say where a label stands.

Legend beside the usual dims: P places of a row with weight, n examples in all.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import sharding
from fm_jax.models.zoo import Model


class Found(NamedTuple):
    """Examples of a batch: features [n, D] float32, targets [n], components [n].

    components: numbers of components, as the batch says of each row; 0 where it does
    not.
    """

    x: np.ndarray
    y: np.ndarray
    components: np.ndarray


def of(
    model: Model, params: dict, batches: Iterable[dict]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the features [n, D] float32 and the targets [n] int32 of all examples.

    An example is a place with loss_weights above 0, of a classifier's batch the last
    token of a text; its features are the model's normalised last hidden state there,
    which the head reads. batches: on the mesh already, as evaluation has them, within
    the layout's `active()`; all of a shape. The order is that of the batches and their
    rows. Raises ValueError where there is no example.
    """
    found = list(by_batch(model, params, batches))
    if not sum(len(one.y) for one in found):
        raise ValueError("batches must have places with weight; got none.")
    x = np.concatenate([one.x for one in found])
    return x, np.concatenate([one.y for one in found])


def by_batch(model: Model, params: dict, batches: Iterable[dict]) -> Iterator[Found]:
    """Yield the examples of each batch, with their components."""
    num_places = 1  # compiled for: of rows that are packed it grows, by powers of two
    for batch in batches:
        most = int(_most(batch["loss_weights"]))
        while num_places < most:
            num_places *= 2
        names = ("tokens", "targets", "loss_weights", "positions", "segment_ids")
        rows = {name: batch[name] for name in names}
        if "components" in batch:
            rows["components"] = batch["components"]
        found = _places(model, params, rows, num_places)
        has_weight_BP, x_BPD, y_BP, components_B = map(np.asarray, found)
        components_BP = np.broadcast_to(components_B[:, None], y_BP.shape)
        yield Found(
            x_BPD[has_weight_BP], y_BP[has_weight_BP], components_BP[has_weight_BP]
        )


@jax.jit
def _most(weights_BT: jax.Array) -> jax.Array:
    """Return the places with weight of the row that has most."""
    return jnp.max(jnp.sum(weights_BT > 0, axis=1))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _places(model: Model, params: dict, batch: dict, num_places: int):
    """Return of each row which places are real, their features, targets, component.

    Every device gets all of them, [B, P, ...]: few beside what they are chosen from.
    """
    batch = sharding.cut_rows(batch)
    rows = (batch[name] for name in ("tokens", "positions", "segment_ids"))
    x_BTD, _ = model.hidden(params, *rows)
    has_weight_BT = batch["loss_weights"] > 0
    num_places = min(num_places, has_weight_BT.shape[1])
    # Stable: those with weight first, in their order.
    at_BP = jnp.argsort(~has_weight_BT, axis=1, stable=True)[:, :num_places]

    def take(values_BT):
        return jnp.take_along_axis(values_BT, at_BP, axis=1)

    x_BPD = jnp.take_along_axis(x_BTD, at_BP[..., None], axis=1)
    components_B = batch.get("components", jnp.zeros(len(at_BP), jnp.int32))
    found = (
        take(has_weight_BT),
        x_BPD.astype(jnp.float32),
        take(batch["targets"]),
        components_B,
    )
    return jax.tree.map(lambda x: sharding.constrain(x, *[None] * x.ndim), found)
