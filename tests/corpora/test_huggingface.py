"""Tests of Hugging Face datasets in folders: rows, splits, identity, refusals."""

import json
import os
import shutil
import subprocess
import sys

import pytest

# Before the library is imported, by whichever test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from fm_jax.corpora import documents, huggingface, sources
from fm_jax.corpora.documents import fraction, text_hash
from tests.corpora.made import met, read, refusal

TRAIN = [f"text {n} é" for n in range(31)]
HELD_OUT = [f"held {n}" for n in range(5)]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Have the library keep what it makes in a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def table(texts, **columns):
    import datasets

    labels = {"label": list(range(len(texts)))}
    return datasets.Dataset.from_dict({"text": texts} | labels | columns)


@pytest.fixture
def saved(tmp_path):
    """Return a folder of save_to_disk: two splits, the first in three files."""
    import datasets

    both = {"train": table(TRAIN), "validation": table(HELD_OUT)}
    shards = {"train": 3, "validation": 1}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved", num_shards=shards)
    return tmp_path / "saved"


def talk(name, **fields):
    given = {
        "name": str(name),
        "split": "train",
        "eval_split": "validation",
        "eval_fraction": 0.3,
        "text_field": "text",
        "cache": None,
    }
    return huggingface.make(**given | fields)


# What is read.


def test_a_saved_dataset_is_read_whole_in_its_order(saved):
    source = talk(saved)
    assert read(source) == TRAIN
    assert read(source, "eval") == HELD_OUT
    assert source.is_held_out_apart
    assert source.share("train") == source.share("eval") == (0.0, 1.0)


def test_a_folder_of_data_files_is_read_whole_in_its_order(tmp_path):
    folder = tmp_path / "parquet"
    folder.mkdir()
    table(TRAIN).to_parquet(folder / "train-00000.parquet")
    table(HELD_OUT).to_parquet(folder / "validation-00000.parquet")
    source = talk(folder)
    assert read(source) == TRAIN
    assert read(source, "eval") == HELD_OUT


def test_a_dataset_that_was_saved_by_itself_is_the_split_train(tmp_path):
    table(TRAIN).save_to_disk(tmp_path / "one")
    assert read(talk(tmp_path / "one")) == TRAIN
    table(TRAIN).select([4, 2]).save_to_disk(tmp_path / "chosen")
    assert read(talk(tmp_path / "chosen")) == [TRAIN[4], TRAIN[2]]


def test_places_are_rows_of_the_dataset(saved):
    found, _ = met(talk(saved))
    assert found == [(f"saved row {n}", text) for n, text in enumerate(TRAIN)]
    found, _ = met(talk(f"{saved}/../saved/", split="train[50%:]"))
    assert found == [(f"saved row {n}", text) for n, text in enumerate(TRAIN[16:])]


def test_pieces_of_any_size_are_the_same_rows(saved, monkeypatch):
    assert len(talk(saved).pieces("train")) == 3  # a file each
    monkeypatch.setattr(documents, "PIECE_BYTES", 40)
    assert len(talk(saved).pieces("train")) > 9
    assert read(talk(saved)) == TRAIN


def test_rows_in_many_batches_are_the_same(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 4)
    made = table(TRAIN).map(lambda row: row, writer_batch_size=4)
    made.save_to_disk(tmp_path / "small")
    monkeypatch.setattr(documents, "PIECE_BYTES", 60)
    pieces = talk(tmp_path / "small").pieces("train")
    assert len(pieces) > 4
    assert read(talk(tmp_path / "small")) == TRAIN


def test_another_process_reads_a_piece_by_the_spec_without_the_library(saved):
    source = talk(saved)
    told = {"spec": source.spec("train"), "piece": source.pieces("train")[1].to_json()}
    code = """if True:
        import json, sys
        sys.modules["datasets"] = None
        from fm_jax.corpora import sources
        from fm_jax.corpora.documents import Piece, Reading
        told = json.load(sys.stdin)
        reading = Reading(on_bad_text="error", max_document_bytes=1000)
        read = sources.open_reader(told["spec"])
        print(json.dumps(list(read(Piece.from_json(told["piece"]), reading))))
    """
    ran = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        check=True,
    )
    piece = source.pieces("train")[1]
    assert json.loads(ran.stdout) == [
        [n, TRAIN[n]] for n in range(piece.start, piece.stop)
    ]


def test_several_fields_are_a_json_object_labels_by_their_names(tmp_path):
    import datasets

    chats = [[{"role": "user", "content": f"hé {n}"}] * (n % 3) for n in range(31)]
    made = table(TRAIN, messages=chats).cast_column(
        "label", datasets.ClassLabel(names=[f"name {n}" for n in range(31)])
    )
    made.save_to_disk(tmp_path / "chats", num_shards=2)
    source = talk(tmp_path / "chats", text_field=("messages", "label", "none"))
    assert [json.loads(text) for text in read(source)] == [
        {"messages": chat, "label": f"name {n}"} for n, chat in enumerate(chats)
    ]
    found, _ = met(talk(tmp_path / "chats", text_field=("label",), split="train[30:]"))
    assert found == [("chats row 0", '{"label": "name 30"}')]
    assert refusal(read, talk(tmp_path / "chats", text_field=("x", "y"))) == (
        "data.fields must name fields of the data; got x, y, none of which is in "
        f"{tmp_path}/chats: text, label, messages. Say where each stands: "
        '--config.data.fields=\'(("name", "its field"), ...)\'.'
    )


def test_nulls_in_fields_of_many_batches_are_left_out(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 4)
    answers = [None if n % 2 else f"a{n}" for n in range(31)]
    made = table(TRAIN, answer=answers).map(lambda row: row, writer_batch_size=4)
    made.save_to_disk(tmp_path / "small")
    monkeypatch.setattr(documents, "PIECE_BYTES", 60)
    source = talk(tmp_path / "small", text_field=("text", "answer"))
    assert len(source.pieces("train")) > 4
    assert [json.loads(text) for text in read(source)] == [
        {"text": text} | ({"answer": answer} if answer else {})
        for text, answer in zip(TRAIN, answers, strict=True)
    ]


def test_one_split_is_shared_out_by_a_hash_of_the_text(saved):
    source = talk(saved, eval_split="train")
    assert not source.is_held_out_apart
    assert (source.share("train"), source.share("eval")) == ((0.3, 1.0), (0.0, 0.3))
    held = [text for text in TRAIN if fraction(text_hash(text)) < 0.3]
    assert 0 < len(held) < len(TRAIN)
    assert read(source, "eval") == held
    assert read(source) == [text for text in TRAIN if text not in held]


def test_slices_and_sums_of_splits_are_splits(saved):
    source = talk(saved, split="train[13:]", eval_split="train[:13]")
    assert (read(source), read(source, "eval")) == (TRAIN[13:], TRAIN[:13])
    source = talk(saved, split="validation+train[-2:]")
    assert read(source) == HELD_OUT + TRAIN[-2:]


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_missing_text_follows_the_policy(kind, tmp_path):
    import datasets

    texts = ["a", None, "", "b\0", "c"]
    made = table(texts, other=texts).cast_column("text", datasets.Value(kind))
    made.save_to_disk(tmp_path / "odd")
    source = talk(tmp_path / "odd")
    found, seen = met(source, on_bad_text="skip")
    assert found == [("odd row 0", "a"), ("odd row 4", "c")]
    assert seen["skipped"] == {"NUL bytes": 1, "missing text": 1}
    assert seen["empty"] == 1
    assert read(source, on_bad_text="replace") == ["a", "b\ufffd", "c"]
    assert refusal(read, source) == (
        "document must have text under data.text_field; got odd row 1 (null in its "
        "place). Set --config.data.text_field (of examples: data.fields) or "
        "--config.data.on_bad_text=skip."
    )


def test_bytes_that_are_not_utf8_follow_the_policy(tmp_path):
    table(["good", "bad!"]).save_to_disk(tmp_path / "odd")
    [file] = (tmp_path / "odd").glob("*.arrow")
    file.write_bytes(file.read_bytes().replace(b"bad!", b"bad\xff"))
    assert read(talk(tmp_path / "odd"), on_bad_text="skip") == ["good"]
    assert refusal(read, talk(tmp_path / "odd")) == (
        "text must be UTF-8; got odd row 1 (a bad byte at offset 3). Mend it, or set "
        "--config.data.on_bad_text=skip or =replace."
    )


# What it is known by.


def test_identity_is_split_field_and_content_wherever_it_lies(saved, tmp_path):
    identity = talk(saved).identity("train")
    assert identity["hf"] == "saved"
    rows = [11, 10, 10]
    names = [f"data-0000{n}-of-00003.arrow" for n in range(3)]
    assert [file[:3] for file in identity["files"]] == [
        [name, 0, count] for name, count in zip(names, rows, strict=True)
    ]
    shutil.copytree(saved, tmp_path / "far" / "saved")
    assert talk(tmp_path / "far" / "saved").identity("train") == identity
    table(TRAIN, other=TRAIN).save_to_disk(tmp_path / "wide" / "saved")
    seen = [
        identity,
        talk(saved).identity("eval"),
        talk(saved, split="train[:30]").identity("train"),
        talk(tmp_path / "wide" / "saved").identity("train"),
        talk(tmp_path / "wide" / "saved", text_field="other").identity("train"),
    ]
    assert len({json.dumps(i) for i in seen}) == len(seen)


def test_data_files_have_one_identity_wherever_they_lie(tmp_path, monkeypatch):
    import datasets

    for place in "ab":
        folder = tmp_path / place / "files"
        folder.mkdir(parents=True)
        table(TRAIN).to_parquet(folder / "train.parquet")
    one = talk(tmp_path / "a" / "files").identity("train")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    assert talk(tmp_path / "b" / "files").identity("train") == one
    table(TRAIN[::-1]).to_parquet(folder / "train.parquet")
    assert talk(tmp_path / "b" / "files").identity("train") != one


def test_files_are_counted_once_where_there_is_a_cache(saved, tmp_path, monkeypatch):
    for file in saved.rglob("*.arrow"):
        os.utime(file, (1, 1))  # settled long ago
    pieces = talk(saved, cache=tmp_path).pieces("train")
    monkeypatch.setattr(huggingface, "_counts", None)
    assert talk(saved, cache=tmp_path).pieces("train") == pieces


# What is refused.


def test_an_unknown_split_or_column_is_refused_nearest_first(saved):
    assert refusal(talk(saved, split="trian").pieces, "train") == (
        "data.split must be one of the known names; got 'trian'. Did you mean 'train'? "
        "Known: train, validation"
    )
    assert refusal(talk(saved, eval_split="test[:3]").pieces, "eval") == (
        "data.eval_split must be one of the known names; got 'test'. "
        "Known: train, validation"
    )
    assert refusal(talk(saved, text_field="txt").pieces, "train") == (
        "data.text_field must be one of the known names; got 'txt'. "
        "Did you mean 'text'? Known: text, label"
    )
    assert refusal(talk(saved, text_field="label").pieces, "train") == (
        f"data.text_field must name text; got 'label' of '{saved}', which holds int64."
    )


def test_a_slice_that_is_none_is_refused(saved):
    text = refusal(talk(saved, split="train[:200%]").pieces, "train")
    assert text == (
        "data.split must be a split or a slice of one, as train[:5%]; got "
        "'train[:200%]' (Percent slice boundaries must be > -100 and < 100.)."
    )
    text = refusal(talk(saved, split="train[").pieces, "train")
    assert "got 'train[' (Unrecognized instruction format: train[)." in text


def test_splits_of_different_columns_are_refused_by_what_is_asked_for(tmp_path):
    import datasets

    both = {"train": table(TRAIN), "other": table(TRAIN).rename_column("text", "body")}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    assert read(talk(tmp_path / "both")) == TRAIN
    text = refusal(talk(tmp_path / "both", eval_split="other").pieces, "eval")
    assert text.endswith("got 'text'. Known: body, label")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("org/name", "Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)"),
        (
            "org/name:subset@v1",
            "Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)",
        ),
        ("./nothing", "there is no such folder"),
        ("a:b:c", "there is no such folder"),
        ("", "there is no such folder"),
    ],
)
def test_what_is_not_there_or_out_of_reach_is_one_line(name, reason):
    assert refusal(talk(name).identity, "train") == (
        "data.name must be a folder of a Hugging Face dataset, or one on the hub as "
        f"org/name[:subset][@revision]; got {name!r} ({reason})."
    )


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    text = refusal(talk(tmp_path / "empty").identity, "train")
    assert text.startswith("data.name must be a folder of a Hugging Face dataset, or ")
    assert "doesn't contain any data files" in text


def test_a_damaged_file_is_refused(saved, tmp_path):
    file = saved / "train" / "data-00001-of-00003.arrow"
    file.write_bytes(file.read_bytes()[:300])
    text = refusal(talk(saved).identity, "train")
    assert text.startswith("data.name must be a folder of a Hugging Face dataset, or ")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train.parquet").write_bytes(b"PAR1 but not for long")
    text = refusal(talk(broken).identity, "train")
    assert text.startswith("data.name must be a folder of a Hugging Face dataset, or ")
    assert "\n" not in text


def test_a_file_that_changes_after_its_digest_is_refused(saved):
    source = talk(saved)
    source.pieces("train")
    file = saved / "train" / "data-00001-of-00003.arrow"
    file.write_bytes(file.read_bytes() + b"more")
    text = refusal(read, source, on_bad_text="skip")
    assert text.startswith(f"data file must not change until it is read; got {file} (")


def test_without_the_library_its_extra_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal(talk(saved).identity, "train") == (
        "data.source=hf must have the library `datasets` installed; got none. "
        "pip install 'fm_jax[hf]'."
    )


def test_the_section_of_a_config_makes_it(saved, tmp_path):
    made = sources.make(
        source="hf",
        paths=(),
        eval_paths=(),
        eval_fraction=0.3,
        name=str(saved),
        tfds_dir="",
        split="train",
        eval_split="validation",
        text_field="text",
        synthetic={},
        cache=tmp_path,
    )
    assert made == talk(saved, cache=tmp_path)
    assert read(made) == TRAIN
