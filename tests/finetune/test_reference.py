"""Tests of what a reference says of all pairs: right, kept, and made once."""

import dataclasses
import math
import threading
import time

import jax
import numpy as np
import pytest

from fm_jax import digests, meshes, sharding
from fm_jax.data.example_rows import ExampleRows
from fm_jax.data.example_store import ExampleStore
from fm_jax.errors import UserError
from fm_jax.finetune import preferences, reference
from fm_jax.models import zoo
from fm_jax.tokenizers.plain import ByteTokenizer

VOCAB, LENGTH, PAIRS = 38, 16, 11


def _store(path, name="preference-a"):
    """Return a store of pairs of responses of one to four tokens."""
    rng = np.random.default_rng(6)
    tokens, targets, weights, offsets = [], [], [], [0]
    for _ in range(PAIRS):
        prompt = rng.integers(0, VOCAB, rng.integers(1, 4)).tolist()
        for _ in range(2):
            response = rng.integers(0, VOCAB, rng.integers(1, 5)).tolist()
            ids = prompt + response
            tokens += ids[:-1]
            targets += ids[1:]
            weights += [0] * (len(prompt) - 1) + [1] * len(response)
            offsets.append(len(tokens))
    header = {"name": name, "kind": "preference", "num_segments": 2, "labels": []}
    header |= {"num_examples": PAIRS, "num_tokens": len(tokens)}
    arrays = (tokens, targets, weights, offsets)
    kinds = (np.int32, np.int32, np.uint8, np.int64)
    held = [np.array(x, kind) for x, kind in zip(arrays, kinds, strict=True)]
    origins = np.stack([np.zeros(PAIRS, np.int64), np.arange(PAIRS)], axis=1)
    (path / "pieces.json").write_text('[["pairs.jsonl", ".jsonl"]]')
    return ExampleStore(path, header, *held, origins)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    store = _store(tmp_path_factory.mktemp("store"))
    return ExampleRows(store, ByteTokenizer(), LENGTH)


@pytest.fixture(scope="module")
def model(model_config):
    sizes = {"vocab_size": VOCAB, "embed_dim": 8, "mlp_dim": 16, "num_layers": 2}
    return zoo.build(model_config(**sizes))


@pytest.fixture(scope="module")
def params(model, random_params):
    return random_params(model.abstract)


def _layout(**sizes):
    number = math.prod(sizes.values())
    mesh = meshes.make(
        meshes.sizes("ddp", sizes, number), devices=jax.devices()[:number]
    )
    return sharding.layout(mesh)


def _options(folder, **overrides):
    options = {"layout": _layout(data=1), "batch_size": 3, "num_segments": 8}
    options |= {"loss_chunk": 4, "folder": folder, "run_id": "base-1", "step": 20}
    return options | {"say": lambda line: None} | overrides


@pytest.fixture(scope="module")
def by_hand(rows, model, params):
    """Return each response's log-probability, alone and from all its logits."""
    store, found = rows.store, []

    @jax.jit
    def logps_of(tokens, positions, segments):
        x, _ = model.hidden(params, tokens, positions, segments)
        return jax.nn.log_softmax(model.logits(params, x))[0]

    for start, stop in zip(store.offsets, store.offsets[1:], strict=False):
        size = stop - start
        tokens = np.pad(store.tokens[start:stop], (0, LENGTH - size))[None]
        segments = (np.arange(LENGTH) < size).astype(np.int32)[None]
        logps_TV = np.float64(logps_of(tokens, np.arange(LENGTH)[None], segments))
        logps_T = logps_TV[np.arange(size), store.targets[start:stop]]
        found.append(np.sum(logps_T * store.weights[start:stop]))
    return np.reshape(found, (PAIRS, 2))


def _computed(rows, model, params, **overrides):
    options = _options(None, **overrides)
    for name in ("folder", "run_id", "step", "say"):
        del options[name]
    return reference.computed(model, params, rows, **options)


@pytest.mark.parametrize("packing", ["best_fit", "single"])
def test_every_pair_has_the_log_probabilities_of_its_responses(
    packing, rows, model, params, by_hand
):
    rows = dataclasses.replace(rows, packing=packing)
    assert len(rows) % 3  # the last batch has padding
    found = _computed(rows, model, params)
    assert (found.shape, found.dtype) == ((PAIRS, 2), np.float32)
    np.testing.assert_allclose(found, by_hand, rtol=2e-5)


MESHES = {"fsdp_tensor": {"data": 2, "fsdp": 2, "tensor": 2},
          "context": {"data": 2, "context": 4}}  # fmt: skip


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_does_not_change_what_the_reference_says(
    name, rows, model, params, by_hand
):
    layout = _layout(**MESHES[name])
    places = sharding.tree_shardings(model.axes, model.abstract, layout)
    put = jax.device_put(params, places)
    found = _computed(rows, model, put, layout=layout, batch_size=4)
    np.testing.assert_allclose(found, by_hand, rtol=2e-5)
    assert digests.of(put) == digests.of(params)


def test_a_policy_that_is_its_reference_has_no_margin(rows, model, params, by_hand):
    rows = rows.with_reference(by_hand)
    batch = rows.rows(np.arange(len(rows)))
    sums_of = preferences.sums_of(
        model, kind="dpo", beta=2.0, num_segments=rows.num_segments, loss_chunk=0
    )
    _, sums = jax.jit(sums_of)(params, batch)
    assert float(sums["weight"]) == PAIRS
    assert float(sums["margin"]) == pytest.approx(0, abs=2e-4)
    assert float(sums["nll"]) == pytest.approx(PAIRS * math.log(2), rel=1e-4)
    np.testing.assert_allclose(sums["chosen_logp"], by_hand[:, 0].sum(), rtol=2e-5)


# ---- what is kept


@pytest.fixture
def counted(monkeypatch):
    """Count what is computed, which takes no model here."""
    made = []

    def computed(model, params, rows, **_):
        made.append(True)
        time.sleep(0.02)
        logps = -np.arange(1, 2 * rows.num_examples + 1, dtype=np.float32)
        return logps.reshape(-1, 2) / len(made)

    monkeypatch.setattr(reference, "computed", computed)
    return made


def test_what_is_in_the_cache_is_not_computed_again(
    rows, model, params, counted, tmp_path
):
    said = []
    options = _options(tmp_path / "kept", say=said.append)
    first = reference.logps(model, params, rows, **options)
    again = reference.logps(model, params, rows, **options)
    np.testing.assert_array_equal(again, first)
    assert again.dtype == np.float32
    assert again.flags.writeable
    assert len(counted) == 1
    assert said == ["Asking the reference, step 20 of base-1, about 11 pairs"]


def test_another_reference_or_other_pairs_are_computed_by_themselves(
    rows, model, params, counted, tmp_path
):
    options = _options(tmp_path)
    half = dataclasses.replace(model.config, dtype="bfloat16")
    begun_again = jax.tree.map(lambda x: 1.01 * x, params)
    renamed = dataclasses.replace(rows.store, header=rows.store.header | {"name": "b"})
    cases = [
        (model, params, rows, {}),
        (model, params, rows, {"run_id": "base-2"}),
        (model, params, rows, {"step": 30}),
        (zoo.build(half), params, rows, {}),
        (model, begun_again, rows, {}),
        (model, params, dataclasses.replace(rows, store=renamed), {}),
        (model, params, dataclasses.replace(rows, packing="single"), {}),
        (model, params, dataclasses.replace(rows, length=LENGTH + 2), {}),
    ]
    found = [
        reference.logps(model, params, rows, **options | more)
        for model, params, rows, more in cases
    ]
    assert len(counted) == len(cases)
    assert len({float(x[0, 0]) for x in found}) == len(cases)
    # How they are computed does not matter.
    more = {"batch_size": 7, "num_segments": 12, "loss_chunk": 0}
    reference.logps(model, params, rows, **options | more)
    assert len(counted) == len(cases)


def test_only_one_at_a_time_computes(rows, model, params, counted, tmp_path):
    found = []

    def ask():
        found.append(reference.logps(model, params, rows, **_options(tmp_path)))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counted) == 1
    assert all(np.array_equal(x, found[0]) for x in found)


@pytest.mark.parametrize(
    "held, got",
    [
        (b"", "no array of NumPy: EOF"),
        (np.ones((PAIRS, 3), np.float32), r"float32 \(11, 3\) for float32 \(11, 2\)"),
        (np.ones((PAIRS, 2)), r"float64 \(11, 2\) for float32 \(11, 2\)"),
        (np.full((PAIRS, 2), np.nan, np.float32), "numbers that are not finite"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(
    held, got, rows, model, params, counted, tmp_path
):
    reference.logps(model, params, rows, **_options(tmp_path))
    (file,) = tmp_path.glob("*.npy")
    if isinstance(held, bytes):
        file.write_bytes(held)
    else:
        np.save(file, held)
    with pytest.raises(UserError, match=rf"must be whole; got {file} \({got}"):
        reference.logps(model, params, rows, **_options(tmp_path))


def test_a_folder_that_cannot_be_written_is_refused(
    rows, model, params, counted, tmp_path
):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"data\.cache_dir must be writable and have"):
        reference.logps(model, params, rows, **_options(tmp_path / "file"))
    assert not counted


def test_a_full_disk_is_refused(rows, model, params, counted, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference.caches, "write_whole", full)
    with pytest.raises(UserError, match=r"have room; got .*No space left on device"):
        reference.logps(model, params, rows, **_options(tmp_path))


def test_a_reference_that_says_no_number_is_refused(rows, model, params):
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    with pytest.raises(UserError, match=r"finite .*; got \[nan, nan\] for pairs"):
        _computed(rows, model, broken)
