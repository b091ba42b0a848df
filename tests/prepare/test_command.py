"""The fm data commands, as a person types them."""

import json
import re
import shlex

import numpy as np
import pytest

from fm_jax import cli
from fm_jax.data import build, store
from fm_jax.errors import UserError
from fm_jax.prepare import opened, vocabulary
from fm_jax.tokenizers import load


@pytest.fixture
def fm(capsys):
    """Return `fm(*words)`: the exit status, what was printed, and what was said."""

    def run(*words):
        status = cli.main([str(word) for word in words])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_build_prints_what_the_stores_hold_and_how_to_train_on_them(
    fm, flags_of, tmp_path
):
    out = tmp_path / "mine"
    status, printed, said = fm("data", "build", *flags_of("animals"), f"--out={out}")
    assert status == 0
    for split in ("train", "eval"):
        header = store.open_store(out / split).header
        assert f"{split}: {out / split}" in printed
        assert re.search(rf"documents +{header['num_documents']:,}\n", printed)
        assert f"Building a token store in {out / split}" in said
    *_, command = printed.splitlines()
    status, _, _ = fm("data", "show", *shlex.split(command)[2:], "--rows=0")
    assert status == 0
    status, printed, said = fm("data", "build", *flags_of("animals"), f"--out={out}")
    assert status == 0 and said == ""


def test_build_prints_json(fm, flags_of):
    status, printed, _ = fm("data", "build", *flags_of("animals"), "--json")
    assert status == 0
    found = json.loads(printed)
    assert list(found) == ["train", "eval"]
    header = store.open_store(found["train"]["path"]).header
    assert found["train"]["documents"] == header["num_documents"]


def test_stores_are_verified_one_by_one(fm, stores, tmp_path):
    train, held_out = (stores["animals"] / split for split in ("train", "eval"))
    status, printed, _ = fm("data", "verify", train, held_out)
    assert status == 0
    assert [line.partition(":")[0] for line in printed.splitlines()] == [
        str(train), str(held_out)]  # fmt: skip
    assert all(": sound, " in line for line in printed.splitlines())


def test_a_damaged_shard_is_named(fm, flags_of, tmp_path):
    out = tmp_path / "mine"
    fm("data", "build", *flags_of("animals"), f"--out={out}")
    shard = out / "train" / "tokens-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[5] ^= 4
    shard.write_bytes(raw)
    status, printed, _ = fm("data", "verify", out / "train", out / "eval")
    assert status == 1
    bad = [line for line in printed.splitlines() if ": sound" not in line]
    assert bad and all(line.startswith(f"{out / 'train'}: ") for line in bad)
    assert any("tokens-00000.bin" in line for line in bad)


def test_overlap_of_a_store_with_itself_is_whole(fm, stores):
    train, held_out = (stores["animals"] / split for split in ("train", "eval"))
    status, printed, _ = fm("data", "overlap", train, train, "--n=5", "--json")
    assert status == 0
    found = json.loads(printed)
    assert found["num_distinct_shared"] == found["num_distinct"] > 0
    status, printed, _ = fm("data", "overlap", train, held_out, "--n=64")
    assert status == 0 and printed


def test_show_prints_the_text_of_a_step_and_its_files(fm, flags_of, corpora):
    flags = flags_of("animals", data__packing="single", data__max_length=600)
    status, printed, _ = fm("data", "show", *flags, "--step=3", "--rows=1:3")
    assert status == 0
    names = re.findall(r"\d\d\.txt", printed)
    assert len(names) == 2
    for name in names:
        assert (corpora["animals"] / name).read_text() in printed


def test_show_of_rows_and_steps_that_are_not_there_is_refused(fm, flags_of):
    for rows in ("6", "3:3", "-1", "a", "0:7"):
        status, _, said = fm("data", "show", *flags_of("animals"), f"--rows={rows}")
        assert status == 2
        assert said == (
            f"fm: --rows must be rows of a batch of 6, as 3 or 0:2; got {rows!r}.\n"
        )
    status, _, said = fm("data", "show", *flags_of("animals"), "--step=11")
    assert (status, said) == (
        2, "fm: --step must be at least 0 and below train.steps=11; got 11.\n"
    )  # fmt: skip


def test_a_tokenizer_is_trained_and_then_used(fm, flags_of, tmp_path):
    out = tmp_path / "deep" / "tokenizer.json"
    flags = flags_of("animals")
    status, printed, _ = fm(
        "data", "tokenizer", *flags, f"--out={out}", "--vocab_size=275",
        "--special_token=<|user|>", "--digits=single",
    )  # fmt: skip
    assert status == 0
    made = load.load(out)
    assert printed.startswith(f"{out}: {made.vocab_size} ids")
    (ids,) = made.encode_batch(["the cat <|user|>"])
    assert made.decode(ids) == "the cat <|user|>"
    assert not np.isin(ids, made.special_ids).any()
    status, _, _ = fm("data", "build", *flags_of("animals", data__tokenizer=str(out)))
    assert status == 0


def test_too_little_text_for_a_vocabulary_is_said(fm, flags_of, tmp_path):
    status, printed, _ = fm(
        "data", "tokenizer", *flags_of("numbers"), f"--out={tmp_path / 'x.json'}",
        "--vocab_size=5000",
    )  # fmt: skip
    assert status == 0
    assert ", fewer than 5,000: little text" in printed


def test_packed_text_is_a_tfds_dataset_with_the_same_documents(
    fm, flags_of, corpora, tmp_path
):
    status, printed, _ = fm(
        "data", "pack", *flags_of("animals"), f"--out={tmp_path}", "--name=animals"
    )
    assert status == 0
    again = flags_of(
        "animals", data__source="tfds", data__name="animals", data__tfds_dir=tmp_path
    )
    status, printed, _ = fm("data", "build", *again, "--json")
    assert status == 0
    found = json.loads(printed)
    assert sum(found[split]["documents"] for split in found) == 60


def test_ready_stores_are_not_tokenised_again(fm, flags_of, stores):
    flags = flags_of("animals", data__source="store", data__tokenizer="store")
    status, _, said = fm("data", "build", *flags)
    assert (status, said) == (
        2, "fm: data.source must be one of text, as text, hf or stdlib; got store, "
        "whose text is ids already.\n"
    )  # fmt: skip


def test_out_is_refused_before_anything_is_read_or_trained(fm, flags_of, tmp_path):
    flags = flags_of("animals", data__tokenizer="bpe", data__vocab_size=299)
    inside = tmp_path / "stores" / "train"
    inside.mkdir(parents=True)
    (inside / "header.json").write_text("{}")
    file = tmp_path / "file"
    file.touch()
    assert fm("data", "build", *flags, f"--out={inside}") == (
        2, "", "fm: --out must be a folder for the stores train and eval; got the "
        f"token store {inside}. Name its parent, or another folder.\n"
    )  # fmt: skip
    assert fm("data", "build", *flags, f"--out={file}") == (
        2, "", f"fm: --out must be a folder that can be written; got {file} "
        "(File exists).\n"
    )  # fmt: skip
    assert fm("data", "tokenizer", *flags, f"--out={tmp_path}") == (
        2, "", f"fm: --out must be a file that can be written; got {tmp_path} "
        "(Is a directory).\n"
    )  # fmt: skip


def test_a_folder_of_both_splits_stands_for_its_stores(fm, stores):
    folder = stores["animals"]
    train, held_out = (folder / split for split in ("train", "eval"))
    for command in ("verify", "overlap"):
        both = fm("data", command, folder)
        assert both[0] == 0 and both == fm("data", command, train, held_out)


def test_what_is_no_store_has_no_overlap(fm, stores, tmp_path):
    train = stores["animals"] / "train"
    assert fm("data", "overlap", train, tmp_path) == (
        2, "", f"fm: a token store must have a header.json; got {tmp_path} without "
        "one. fm data build makes them.\n"
    )  # fmt: skip
    assert fm("data", "overlap", train, tmp_path / "no") == (
        2, "", f"fm: a token store must be a folder; got '{tmp_path}/no'.\n"
    )  # fmt: skip
    assert fm("data", "overlap", train) == (
        2, "", "fm: fm data overlap must be given two token stores, of training and of "
        "held-out text; got 1.\n"
    )  # fmt: skip


def test_pack_says_what_it_left_out_and_how_to_read_the_rest(fm, flags_of, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"body": f"the cat saw {n}"}) for n in range(40)]
    (folder / "a.jsonl").write_text("\n".join([*lines, "{", ""]))
    (folder / "b.txt").touch()
    flags = flags_of(
        "animals",
        data__paths=(str(folder),),
        data__text_field="body",
        data__on_bad_text="skip",
    )
    status, printed, _ = fm("data", "pack", *flags, f"--out={tmp_path}", "--name=cats")
    assert status == 0
    for split in ("train", "validation"):
        assert f"  {split}: skipped 1 broken JSON: a.jsonl line 41\n" in printed
        assert f"  {split}: left out 1 without text\n" in printed
    *_, command = printed.splitlines()
    assert command.endswith(
        f" --config.data.source=tfds --config.data.name=cats "
        f"--config.data.tfds_dir={tmp_path} --config.data.text_field=text"
    )
    given = [*flags, *shlex.split(command)[3:]]
    status, printed, _ = fm("data", "build", *given, "--json")
    assert status == 0
    found = json.loads(printed)
    assert sum(found[split]["documents"] for split in found) == 40


def test_an_interrupted_build_says_what_the_next_goes_on_from(
    fm, flags_of, monkeypatch
):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "find_or_build", interrupted)
    assert fm("data", "build", *flags_of("animals")) == (
        130, "", "\nfm: interrupted. The same command goes on from the last "
        "checkpoint, or from the finished shards of a token store.\n"
    )  # fmt: skip


def test_a_held_out_split_that_is_wrong_is_told_before_training_a_tokenizer(
    config_of, monkeypatch
):
    config = config_of("animals", data__tokenizer="bpe", data__vocab_size=298)
    source = opened.source_of(config)

    def pieces(self, split):
        raise UserError(f"no split {split}")

    monkeypatch.setattr(type(source), "pieces", pieces)
    with pytest.raises(UserError, match="no split eval"):
        vocabulary.of(config, source, lambda line: None, may_build=True)
