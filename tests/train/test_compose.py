"""Tests that the programs of a run give the same numbers on every mesh."""

import copy
import functools
import math
import re

import jax
import numpy as np
import pytest

from fm_jax import config as configs
from fm_jax import configfile, trees
from fm_jax.models.config import REMAT_NAMES
from fm_jax.prepare import opened
from fm_jax.train import compose, feeds

ROWS, LENGTH, VOCAB, STEPS = 16, 24, 56, 3
# Eight devices divide every dim that a preset cuts; the epsilons are large, so that
# nothing divides by a rounding.
SIZES = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "embed_dim": 32,
    "num_heads": 8,
    "head_dim": 6,
    "mlp_dim": 40,
    "norm_epsilon": 1e-2,
    "embed_init_std": 0.5,
}
MODELS = {
    "dense": {},
    "grouped": {
        "num_heads": 16,
        "num_kv_heads": 8,
        "positions": "learned",
        "norm": "layernorm",
        "activation": "gelu",
        "use_bias": True,
    },
    "windowed": {
        "window": 5,
        "window_pattern": "LG",
        "attention_softcap": 2.0,
        "logits_softcap": 3.0,
        "norm_position": "sandwich",
        "qk_norm": True,
        "tied_embeddings": True,
    },
}
MESHES = {
    "ddp": {"preset": "ddp"},
    "fsdp": {"preset": "fsdp"},
    "hsdp": {"preset": "hsdp"},
    "tensor": {"preset": "tensor"},
    "fsdp_tensor": {"preset": "fsdp_tensor"},
    "context": {"preset": "context"},
    "mix": {"data": 2, "context": 2, "tensor": 2},
    "context_of_four": {"fsdp": 2, "context": 4},
}


def _config(model, **changes):
    """Return a checked config, with `section__key=value` changed."""
    raw = copy.deepcopy(configfile.load_base())
    raw["model"] |= SIZES | MODELS[model]
    raw["data"]["max_length"] = LENGTH
    raw["optimizer"] |= {"learning_rate": 0.03, "beta1": 0.5, "epsilon": 1e-2}
    raw["schedule"]["name"] = "constant"
    raw["train"] |= {"batch_size": ROWS, "steps": STEPS, "z_loss": 1e-3}
    for key, value in changes.items():
        section, name = key.split("__")
        raw[section][name] = value
    return configs.check(raw)


def _parts(config, devices=None):
    layout = compose.open_layout(config, devices)
    return compose.build(config, layout, corpus_tokens=10_000)


def _batch(seed):
    """Return rows of several documents of uneven lengths, padding and weights."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    opens_BT = rng.random(shape) < 0.15
    opens_BT[:, 0] = True
    step_T = np.arange(LENGTH)
    starts_BT = np.maximum.accumulate(np.where(opens_BT, step_T, 0), axis=1)
    real_BT = step_T < rng.integers(LENGTH // 2, 2 * LENGTH, (ROWS, 1))
    real_BT[3] = False
    weights_BT = rng.random(shape) * real_BT
    return {
        "tokens": rng.integers(0, VOCAB, shape, np.int32),
        "targets": rng.integers(0, VOCAB, shape, np.int32),
        "loss_weights": weights_BT.astype(np.float32),
        "positions": np.int32((step_T - starts_BT) * real_BT),
        "segment_ids": np.int32(np.cumsum(opens_BT, axis=1) * real_BT),
        "target_bytes": rng.integers(1, 5, shape, np.int32),
    }


def _run(parts, start=None):
    """Return the metrics of some steps, and the state before and after, on the host.

    start: the state to begin with, None for a fresh one.
    """
    history = []
    with parts.layout.active():
        if start is None:
            start = jax.device_get(parts.init(jax.random.key(3)))
        places = jax.tree.map(lambda leaf: leaf.sharding, parts.abstract)
        state = jax.device_put(start, places)
        for step in range(STEPS):
            state, metrics = parts.train_step(state, parts.put(_batch(step)))
            history.append(jax.device_get(metrics))
        sums = parts.eval_step(state.weights(), parts.put(_batch(STEPS)))
    assert parts.train_step._cache_size() == 1
    for found, expected in zip(
        jax.tree.leaves(state), jax.tree.leaves(parts.abstract), strict=True
    ):
        assert found.sharding == expected.sharding
    return [*history, jax.device_get(sums)], start, jax.device_get(state)


@functools.cache
def _on_one_device(model):
    """Return what `_run` gives on one device, whole batches and logits at once."""
    parts = _parts(_config(model), jax.devices()[:1])
    assert parts.layout.mesh.size == 1
    return _run(parts)


def _assert_same_trees(found, expected, what, *, tolerance):
    """Compare leaves to a tolerance relative to the largest entry of all of them.

    Some entries of a gradient are zero but for rounding: a key's bias moves all scores
    of a query alike.
    """
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a,
            b,
            rtol=0,
            atol=tolerance * largest,
            err_msg=f"{what} {trees.path_name(path)}",
        ),
        found,
        expected,
    )


def _assert_numbers_of_one_device(model, **changes):
    """Compare runs; the moments are sums of the gradients of all steps."""
    parts = _parts(_config(model, **changes))
    assert parts.layout.mesh.size == 8
    known, start, expected = _on_one_device(model)
    history, _, state = _run(parts, start)
    for step, (metrics, numbers) in enumerate(zip(history, known, strict=True)):
        for name, value in numbers.items():
            np.testing.assert_allclose(
                metrics[name], value, rtol=2e-6, err_msg=f"{name} of step {step}"
            )
    _assert_same_trees(state.params, expected.params, "params", tolerance=1e-6)
    for which in ("mu", "nu"):
        found, moments = (getattr(s.opt_state[1], which) for s in (state, expected))
        _assert_same_trees(found, moments, which, tolerance=5e-6)


def _on(mesh):
    return {f"mesh__{key}": value for key, value in MESHES[mesh].items()}


# Each axis for one model, and all together for another; the others are for CI.
FAST = {
    ("dense", "fsdp"),
    ("dense", "tensor"),
    ("dense", "fsdp_tensor"),
    ("dense", "context_of_four"),
    ("windowed", "mix"),
    ("grouped", "context"),
}


@pytest.mark.parametrize(
    "model, mesh",
    [
        pytest.param(
            model,
            mesh,
            marks=[] if (model, mesh) in FAST else pytest.mark.slow,
        )
        for model in MODELS
        for mesh in MESHES
    ],
)
def test_every_mesh_gives_the_numbers_of_one_device(model, mesh):
    _assert_numbers_of_one_device(model, **_on(mesh))


@pytest.mark.parametrize(
    "model, mesh, changes",
    [
        ("dense", "hsdp", {"train__accumulation": 2}),
        ("dense", "context", {"train__loss_chunk": 6}),
        ("windowed", "mix", {"train__accumulation": 2, "train__loss_chunk": 6}),
    ],
)
def test_cutting_up_a_batch_on_a_mesh_changes_no_number(model, mesh, changes):
    _assert_numbers_of_one_device(model, **_on(mesh), **changes)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots", "names", "offload"])
def test_remat_on_a_mesh_changes_no_number(remat):
    changes = {"model__remat": remat, "model__remat_names": REMAT_NAMES}
    _assert_numbers_of_one_device("dense", **_on("mix"), **changes)


@pytest.mark.slow
def test_weights_cut_by_other_rules_change_no_number():
    rules = (("vocab", ()), ("embed", ("fsdp", "context")), ("embed_vector", ("data",)))
    _assert_numbers_of_one_device("dense", **_on("mix"), mesh__rules=rules)


# ---- where the state lies


@pytest.fixture(
    scope="module", params=["ddp", "fsdp", "hsdp", "tensor", "fsdp_tensor", "mix"]
)
def born(request):
    """Return the parts of a mesh, the text of its compiled init and a fresh state."""
    parts = _parts(_config("dense", **_on(request.param)))
    with parts.layout.active():
        init = parts.init.lower(jax.random.key(3)).compile()
        return parts, init.as_text(), init(jax.random.key(3))


def _cuts(parts):
    """Return over how many devices each leaf is cut: dims of weights over the mesh."""
    mesh = parts.layout.mesh.shape
    fsdp, tensor = mesh["fsdp"], mesh["tensor"]
    weights = {"embedding", "head", "kernel"}
    return [
        fsdp * tensor if set(map(trees.key_of, path)) & weights else 1
        for path, _ in jax.tree_util.tree_leaves_with_path(parts.abstract)
    ]


def test_parameters_do_not_depend_on_the_mesh_that_they_are_born_on(born):
    _, start, _ = _on_one_device("dense")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(born[2]), start)


def test_a_device_holds_its_share_of_the_state_and_no_more(born):
    parts, _, state = born
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    shares = zip(jax.tree.leaves(state), _cuts(parts), strict=True)
    expected = sum(leaf.nbytes // cut for leaf, cut in shares)
    assert set(held.values()) == {expected}


def test_no_device_ever_has_more_of_a_weight_than_its_share(born):
    parts, text, _ = born
    sizes = [
        math.prod(map(int, dims.split(",")))
        for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    ]
    shares = zip(jax.tree.leaves(parts.abstract), _cuts(parts), strict=True)
    largest = max(leaf.size // cut for leaf, cut in shares)
    assert max(sizes) == largest


# ---- the best possible loss


@pytest.mark.parametrize("max_batches", [0, 1, 3, 1000])
@pytest.mark.parametrize("mask_documents", [True, False])
def test_each_held_out_batch_has_the_best_loss_of_its_own_rows(
    max_batches, mask_documents, tmp_path
):
    given = {
        "data__source": "synthetic",
        "data__tokenizer": "symbols",
        "data__mask_documents": mask_documents,
        "data__cache_dir": str(tmp_path),
        "synthetic__kind": "hmm",
        "synthetic__num_symbols": 21,
        "synthetic__mean_length": 9.0,
        "synthetic__num_tokens": 300,
        "synthetic__num_eval_tokens": 2000,
        "sample__num_tokens": 0,
    }
    config = _config("dense", **given)
    data = opened.open_data(config, lambda line: None)
    assert len(data.eval) % ROWS  # so that the last batch is padded
    layout = compose.open_layout(config)
    held = feeds.held_out(data.eval.windows, ROWS, layout, max_batches=max_batches)
    found = feeds.held_out_bayes(data, ROWS, max_batches=max_batches)
    for batch, nats in zip(held, found, strict=True):
        names = ("tokens", "targets", "loss_weights")
        expected = data.chain.bayes_nll(*(np.asarray(batch[n]) for n in names)).sum()
        assert nats == pytest.approx(expected, rel=1e-12)
    if max_batches in (0, 1000):
        assert sum(found) == pytest.approx(data.eval_bayes.sum(), rel=1e-12)


def test_other_text_has_no_best_loss_that_is_known(corpus, tmp_path):
    given = {"data__source": "text", "data__paths": (str(corpus),)}
    given |= {"data__tokenizer": "bytes", "data__eval_fraction": 0.2}
    config = _config("dense", **given, data__cache_dir=str(tmp_path))
    data = opened.open_data(config, lambda line: None)
    assert data.eval_bayes is None
    assert feeds.held_out_bayes(data, ROWS) is None


@pytest.mark.parametrize("packing", ["split", "best_fit", "single"])
def test_padding_is_no_token_of_a_duration(packing, corpus, tmp_path):
    length = 500  # a document fills half a row or two
    given = {"data__source": "text", "data__paths": (str(corpus),)}
    given |= {"data__tokenizer": "bytes", "data__eval_fraction": 0.2}
    given |= {
        "data__cache_dir": str(tmp_path),
        "data__packing": packing,
        "data__max_length": length,
    }
    given |= {"model__vocab_size": 0, "train__steps": 0}
    config = _config("dense", **given, train__epochs=1.0)
    data = opened.open_data(config, lambda line: None)
    (windows,) = data.train.windows
    row_tokens, count = feeds.row_tokens(data), len(windows)
    total = windows.rows(np.arange(count))["loss_weights"].sum()
    if packing == "split":  # whose last row is taken for a full one
        assert (row_tokens, feeds.tokens(data, 7, 3)) == (length, 21 * length)
        assert length * (count - 1) < total <= length * count
    else:
        assert row_tokens * count == pytest.approx(total, rel=1e-9)
        assert feeds.tokens(data, count, 3) == pytest.approx(3 * total, rel=1e-9)
        assert (row_tokens < 0.9 * length) == (packing == "single")
    layout = compose.open_layout(config)

    def built(**train):
        raw = copy.deepcopy(config.raw)
        raw["train"] |= {"epochs": 0.0} | train
        changed = compose.resolve(configs.check(raw), data.tokenizer)
        return compose.build(
            changed, layout, corpus_tokens=int(total), row_tokens=row_tokens
        )

    for epochs in (0.5, 1, 2, 3, 7):
        parts = built(epochs=float(epochs))
        rows = epochs * (count if packing != "split" else total / length)
        assert parts.num_steps == math.ceil(rows / ROWS - 1e-9)
        assert parts.tokens_per_step == ROWS * row_tokens
    assert built(tokens=float(5 * total)).num_steps == built(epochs=5.0).num_steps


def test_an_epoch_is_no_step_longer_by_rounding():
    layout = compose.open_layout(_config("dense"))
    config = _config("dense", train__steps=0, train__epochs=1.0)
    assert 143 / (16 * (143 / 112)) > 7
    parts = compose.build(config, layout, corpus_tokens=143, row_tokens=143 / 112)
    assert parts.num_steps == 7
