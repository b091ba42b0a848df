"""Tests of the examples of a config: from files to rows, the same from the cache."""

import json

import numpy as np
import pytest

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.data.chats import BadRow
from fm_jax.errors import UserError
from fm_jax.prepare import opened
from fm_jax.tokenizers import template
from tests.tokenizers import made as tokenizers

END = "<|endoftext|>"


@pytest.fixture
def write(tmp_path):
    """Return `write(name, rows)`: the path of a file of JSON lines."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def open_data(tmp_path):
    """Return `open_data(**values)`: the data of a config with these in its section."""

    def checked(init_from="base", **values):
        raw = configfile.load_base()
        raw["train"]["steps"] = 3
        raw["init"]["from"] = init_from
        raw["data"] |= {
            "source": "text", "tokenizer": "bytes", "packing": "best_fit",
            "max_length": 64, "cache_dir": str(tmp_path / "cache"),
            "eval_fraction": 0.3,
        } | values  # fmt: skip
        return configs.check(raw)

    def open_data(say=lambda line: None, may_build=True, **values):
        return opened.open_data(checked(**values), say, may_build=may_build)

    open_data.checked = checked
    return open_data


def _segments(data, split="train", component=0):
    """Return (text read, what of it is trained on) of all segments of a component."""
    rows = getattr(data, split).windows[component]
    batch, found = rows.rows(np.arange(len(rows))), []
    for row in range(len(rows)):
        numbers = batch["segment_ids"][row]
        for number in range(1, numbers.max() + 1):
            here = numbers == number
            is_trained = here & (batch["loss_weights"][row] > 0)
            found.append((
                data.tokenizer.decode(batch["tokens"][row][here]),
                data.tokenizer.decode(batch["targets"][row][is_trained]),
            ))  # fmt: skip
    return found


SUMS = [{"prompt": f"{n}+{n}=", "completion": f"{2 * n}"} for n in range(30)]


def test_completions_are_split_by_a_hash_and_all_there(open_data, write):
    data = open_data(examples="completion", paths=(write("a.jsonl", SUMS),))
    held_out, trained = _segments(data, "eval"), _segments(data, "train")
    assert len(held_out) > 3
    assert len(trained) > 3
    assert sorted(held_out + trained) == sorted(
        (row["prompt"] + row["completion"], row["completion"]) for row in SUMS
    )
    assert (data.kind, data.begin_ids, data.end_ids) == ("completion", (256,), (256,))
    assert (data.labels, data.label_ids, data.chat_template) == ((), (), "")
    rows = (data.train.windows[0], data.eval.windows[0])
    assert data.num_segments == max(r.num_segments for r in rows)
    assert data.train.num_targets == sum(1 + len(text) for text, _ in trained)
    assert data.train.gzip_bits_per_byte is None


def test_each_held_out_file_is_a_component_the_first_one_first(open_data, write):
    train = write("train.jsonl", SUMS[:20])
    files = tuple(
        write(f"held/{name}", SUMS[n : n + 2])
        for name, n in (("zebra.jsonl", 20), ("ood.v1.jsonl", 22), ("a.ndjson", 24))
    )
    data = open_data(examples="completion", paths=(train,), eval_paths=files)
    assert data.eval.names == ("zebra", "ood.v1", "a")
    assert data.train.names == ("all",)
    for component, n in enumerate((20, 22, 24)):
        expected = [(f"{i}+{i}={2 * i}", f"{2 * i}") for i in (n, n + 1)]
        assert sorted(_segments(data, "eval", component)) == expected
    assert data.eval.name == "+".join(s.header["name"] for s in data.eval.stores)
    assert data.eval.windows[1].where(1) == "ood.v1.jsonl line 2"
    twice = (files[0], write("other/zebra.jsonl", SUMS[26:]))
    with pytest.raises(UserError, match="got two named 'zebra', "):
        open_data(examples="completion", paths=(train,), eval_paths=twice)


def test_what_is_held_out_elsewhere_is_not_trained_on(open_data, write):
    paths = {"paths": (write("train.jsonl", SUMS),)}
    paths["eval_paths"] = tuple(
        write(f"{n}.jsonl", [SUMS[n], {"prompt": f"{n}", "completion": "c"}])
        for n in (3, 7)
    )
    data = open_data(examples="completion", **paths)
    assert len(_segments(data)) == 28
    assert not {*_segments(data)} & {*_segments(data, "eval", 1)}


def test_rows_that_stand_twice_may_be_taken_once(open_data, write):
    paths = (write("a.jsonl", SUMS * 2),)
    sizes = [
        len(_segments(open_data(examples="completion", paths=paths, deduplicate=once)))
        for once in (False, True)
    ]
    assert sizes[0] == 2 * sizes[1]


def test_labels_are_those_of_training_in_order(open_data, write):
    rows = [{"sentence": f"s{n}", "y": n % 11} for n in range(33)]
    given = {"examples": "classify", "fields": (("text", "sentence"), ("label", "y"))}
    given["paths"] = (write("a.jsonl", rows),)
    held = (write("b.jsonl", [{"sentence": "z", "y": "10"}]),)
    data = open_data(**given, eval_paths=held)
    assert data.labels == tuple(map(str, range(11)))
    batch = data.eval.windows[0].rows(np.array([0]))
    assert batch["tokens"][0, :4].tolist() == [256, ord("z"), 0, 0]
    assert batch["targets"][0, :4].tolist() == [0, 10, 0, 0]
    assert batch["loss_weights"][0, :4].tolist() == [0, 1, 0, 0]
    assert not batch["target_bytes"].any()
    strange = (
        write("c.jsonl", [{"sentence": "z", "y": 0}, {"sentence": "", "y": 11}]),
    )
    with pytest.raises(
        UserError, match=r"^c.jsonl line 2 must have a label .*got '11'"
    ):
        open_data(**given, eval_paths=strange)
    words = tuple((str(n), chr(97 + n)) for n in range(11))
    assert open_data(**given, label_words=words).label_ids == tuple(range(97, 108))
    with pytest.raises(UserError, match="must have a word for each label and no other"):
        open_data(**given, label_words=words[1:])


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
CHATS = [
    {"messages": [MESSAGES[0] | {"content": f"{n}"}, MESSAGES[1]]} for n in range(9)
]


def test_chats_without_a_template_are_written_by_the_plain_one(open_data, write):
    pytest.importorskip("jinja2")
    said = []
    data = open_data(said.append, examples="chat", paths=(write("a.jsonl", CHATS),))
    both = _segments(data) + _segments(data, "eval")
    # A byte of an end id is none: it is not shown.
    assert sorted(both) == [(f"User:\n{n}\n\nAssistant:\nho", "ho") for n in range(9)]
    assert "Chats are written by the plain chat template" in said
    alone = template.Template(data.chat_template, {}, "alone")
    text = alone.render(MESSAGES[:1])
    assert text == f"{END}User:\nhi\n\nAssistant:\n"


@pytest.mark.parametrize("folder", ["", "hf/"])
def test_the_template_is_that_beside_the_tokenizer(folder, open_data, write, tmp_path):
    pytest.importorskip("jinja2")
    base = tmp_path / "base"
    (base / "hf").mkdir(parents=True)
    (base / "tokenizer.json").write_text(tokenizers.BPE.to_json())
    source = (
        "{{ bos_token }}{% for m in messages %}[{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}]{% endfor %}"
    )
    fields = {"chat_template": source, "eos_token": END, "bos_token": {"content": "@"}}
    (base / f"{folder}tokenizer_config.json").write_text(json.dumps(fields))
    given = {"examples": "chat", "paths": (write("a.jsonl", CHATS),)}
    given |= {"tokenizer": str(base / "tokenizer.json"), "end_token": END}
    data = open_data(**given)
    assert data.chat_template.endswith(source)
    assert ("@[7][ho", "7ho") in _segments(data) + _segments(data, "eval")
    file = tmp_path / "mine.jinja"
    file.write_text(source.replace("[", "<"))
    data = open_data(**given, chat_template=str(file))
    assert ("@<7]<ho", "7ho") in _segments(data) + _segments(data, "eval")
    # A run that is tuned keeps it, and one that is tuned from that one takes it.
    (base / "chat_template.jinja").write_text(data.chat_template)
    assert open_data(**given).chat_template == data.chat_template


def test_a_run_of_bytes_has_its_template_where_the_run_begins(
    open_data, write, tmp_path
):
    pytest.importorskip("jinja2")
    base = tmp_path / "base"
    base.mkdir()
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}{% generation "
                                              "%}a{% endgeneration %}")  # fmt: skip
    given = {"examples": "chat", "paths": (write("a.jsonl", CHATS),)}
    for name in (str(base), f"{base}@latest"):
        data = open_data(init_from=name, **given)
        assert ("7", "a") in _segments(data) + _segments(data, "eval")


def test_rows_of_a_table_are_the_same_examples(open_data, write, tmp_path):
    pytest.importorskip("jinja2")
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(CHATS), file)
    both = [
        open_data(examples="chat", paths=(path,))
        for path in (write("a.jsonl", CHATS), str(file))
    ]
    for split in ("train", "eval"):
        assert _segments(both[0], split) == _segments(both[1], split)
    rows = both[1].train.windows[0]
    assert rows.where(0).startswith("rows.parquet row ")


def test_a_bad_row_is_refused_with_its_line_or_skipped(open_data, write):
    pytest.importorskip("jinja2")
    bad = {"messages": [MESSAGES[0], MESSAGES[1] | {"role": "bot"}]}
    given = {"examples": "chat", "paths": (write("chats.jsonl", [*CHATS, bad]),)}
    given["eval_paths"] = (write("held.jsonl", CHATS[:2]),)
    with pytest.raises(BadRow, match=r"^chats.jsonl line 10 must have roles among"):
        open_data(**given)
    said = []
    data = open_data(said.append, **given, on_bad_text="skip")
    assert len(_segments(data)) == 7
    assert "WARNING: train: 1 examples bad, left out: chats.jsonl line 10" in said


def test_the_cache_is_of_all_that_examples_follow_from(open_data, write, tmp_path):
    pytest.importorskip("jinja2")
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages[0].content }}{% generation %}a{% endgeneration %}")
    given = {"examples": "chat", "paths": (write("a.jsonl", CHATS),)}
    first = open_data(**given)
    assert open_data(may_build=False, **given).train.name == first.train.name
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "a.jsonl").rename(moved / "a.jsonl")
    given["paths"] = (str(moved / "a.jsonl"),)
    assert open_data(may_build=False, **given).train.name == first.train.name
    changes = [
        {"max_length": 65}, {"on_long": "drop"}, {"chat_template": str(file)},
        {"eval_fraction": 0.5}, {"on_bad_text": "skip"}, {"deduplicate": True},
        {"paths": (write("b.jsonl", CHATS[1:]),)},
    ]  # fmt: skip
    names = {first.train.name} | {open_data(**given | c).train.name for c in changes}
    assert len(names) == 1 + len(changes)
    with pytest.raises(UserError, match="must be prepared; got nothing there"):
        open_data(may_build=False, **given | {"max_length": 66})


def test_a_preference_of_texts_needs_no_jinja(open_data, write, monkeypatch):
    from fm_jax.prepare import tuned

    monkeypatch.setattr(tuned.importlib.util, "find_spec", lambda name: None)
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(9)]
    data = open_data(examples="preference", paths=(write("a.jsonl", rows),))
    found = _segments(data) + _segments(data, "eval")
    assert found[::2] == [(text[:-1] + "a", "a") for text, _ in found[1::2]]
    assert data.num_segments % 2 == 0


def test_preferences_have_a_template_where_they_are_of_chats(open_data, write):
    pytest.importorskip("jinja2")
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(9)]
    data = open_data(examples="preference", paths=(write("a.jsonl", rows),))
    assert data.chat_template == ""
    rows = [
        {**row, "prompt": [MESSAGES[0] | {"content": row["prompt"]}]} for row in rows
    ]
    data = open_data(examples="preference", paths=(write("b.jsonl", rows),))
    assert "Assistant" in data.chat_template


def test_what_does_not_go_with_examples_is_refused(open_data, write):
    given = {"examples": "completion", "paths": (write("a.jsonl", SUMS),)}
    config = open_data.checked(**given)
    with pytest.raises(
        UserError, match=r"must be text for what reads text alone; got c"
    ):
        opened.source_of(config)
    with pytest.raises(UserError, match=r"must be the model's .*; got bpe"):
        open_data(**given, tokenizer="bpe")
    with pytest.raises(UserError, match=r"a name in data.fields of completion must be"):
        open_data(**given, fields=(("text", "prompt"),))
    with pytest.raises(
        UserError, match=r"a chat template must be a text file; got .*no"
    ):
        open_data(**given | {"examples": "chat"}, chat_template="no.jinja")
