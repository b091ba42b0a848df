"""Ready stores are found by their folders, named, and checked against each other."""

import shutil

import pytest

from fm_jax import cli
from fm_jax.data import store
from fm_jax.errors import UserError
from fm_jax.prepare import ready


def refusal(*args):
    with pytest.raises(UserError) as error:
        ready.find(*args)
    return str(error.value)


def test_a_folder_of_both_splits_gives_each_its_store_and_both_its_name(stores):
    animals = stores["animals"]
    tokenizer, found = ready.find((str(animals),), ())
    assert found == {
        "train": [("animals", animals / "train")],
        "eval": [("animals", animals / "eval")],
    }
    assert tokenizer.vocab_size == 257


def test_a_training_store_by_itself_takes_the_held_out_one_beside_it(stores):
    animals = stores["animals"]
    both = [ready.find((str(p),), ())[1] for p in (animals / "train", animals)]
    assert both[0] == both[1]


def test_held_out_stores_may_be_others(stores):
    animals, numbers = stores["animals"], stores["numbers"]
    _, found = ready.find((str(animals),), (str(numbers),))
    assert found["eval"] == [("numbers", numbers / "eval")]


def test_a_store_that_is_not_there_is_refused(stores, tmp_path):
    assert refusal((), ()) == (
        "data.paths must name token stores; got none. Example: "
        "--config.data.paths='(\"stores/mine\",)'. fm data build --out makes them."
    )
    assert refusal((str(tmp_path),), ()) == (
        f"data.paths must name token stores; got {str(tmp_path)!r}, which has no "
        "header.json, and no folder train with one. fm data build --out makes them."
    )
    alone = shutil.copytree(stores["animals"] / "train", tmp_path / "alone")
    assert refusal((str(alone),), ()) == (
        f"a token store to train on must have its held-out one in {tmp_path}/eval; got "
        "nothing there. Name one in --config.data.eval_paths."
    )


def test_two_stores_of_one_name_are_refused(stores, tmp_path):
    other = shutil.copytree(stores["animals"], tmp_path / "animals")
    assert refusal((str(stores["animals"]), str(other)), ()) == (
        "token stores of a mixture must have names of their own; got two train stores "
        "named 'animals'. Rename a folder."
    )


def test_a_store_is_not_both_trained_on_and_held_out(stores):
    train, held_out = (stores["animals"] / split for split in ("train", "eval"))
    for path, args in (
        (held_out, ((str(held_out),), ())),
        (train, ((str(train),), (str(train),))),
    ):
        assert refusal(*args) == (
            f"a token store must not be both trained on and held out; got {path}. Take "
            "it out of data.paths or data.eval_paths."
        )


def test_stores_of_two_tokenizers_are_refused(stores, flags_of, tmp_path):
    flags = flags_of("numbers", data__tokenizer="bpe", data__vocab_size=300)
    assert cli.main(["data", "build", *flags, f"--out={tmp_path / 'bpe'}"]) == 0
    animals, bpe = stores["animals"] / "train", tmp_path / "bpe" / "train"
    first, second = (store.open_store(p).header["tokenizer"] for p in (animals, bpe))
    assert refusal((str(animals), str(bpe)), ()) == (
        f"token stores of one run must share a tokenizer; got {animals} made with "
        f"{first}, {bpe} with {second}. Build both with one tokenizer file."
    )


def test_documents_that_are_held_out_and_trained_on_are_counted(stores):
    train, held_out = (
        store.open_store(stores["animals"] / split) for split in ("train", "eval")
    )
    other = store.open_store(stores["numbers"] / "train")
    assert ready.shared_documents([train], [held_out]) == 0
    count = train.header["num_documents"]
    assert ready.shared_documents([other, train], [held_out, train]) == count
