"""Tests of toy data: the same bytes everywhere, right by its rules, nothing leaked."""

import collections
import hashlib
import json

import pytest

from fm_jax import cli
from fm_jax.errors import UserError
from fm_jax.prepare import styles as worlds
from fm_jax.prepare import toys

SIZE = 37


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(params=toys.KINDS)
def kind(request):
    """Return each kind of toy."""
    return request.param


def digest(made):
    """Return a digest of files' names and bytes."""
    whole = hashlib.sha256()
    for name, path in sorted(made.items()):
        whole.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


GOLDEN = {
    "chat": "7ec50546885a339f",
    "completion": "663f71d9e3bfe263",
    "preference": "1411fd7587431cf7",
    "styles": "245319693f636448",
    "text": "2a466a49e3f8bfbf",
}


def test_files_are_the_same_bytes_on_every_machine(kind, tmp_path):
    if kind == "styles":
        made = toys.styles(tmp_path, num_pretrain=41, num_train=SIZE, num_held_out=29)
    else:
        made = toys.make(kind, tmp_path, size=SIZE)
    assert digest(made) == GOLDEN[kind]


def test_another_seed_gives_other_rows_and_files_are_not_written_over(tmp_path):
    one = toys.make("chat", tmp_path / "one", size=SIZE)
    two = toys.make("chat", tmp_path / "two", size=SIZE, seed=1)
    assert digest(one) != digest(two)
    before = digest(one)
    assert digest(toys.make("chat", tmp_path / "one", size=SIZE)) == before
    with pytest.raises(UserError) as error:
        toys.make("chat", tmp_path / "one", size=SIZE, seed=1)
    assert str(error.value) == (
        f"--out must have no other data; got {tmp_path}/one/train.jsonl, which "
        "differs. Delete it or name another folder."
    )
    assert digest(one) == before


# Answers.


def test_held_out_words_are_in_no_training_row_in_no_direction(tmp_path):
    words = toys.words(3, 400)
    assert len({min(word, word[::-1]) for word in words}) == 400
    assert all(word != word[::-1] for word in words)
    for kind in ("chat", "completion", "preference"):
        made = toys.make(kind, tmp_path / kind, size=SIZE, seed=3)
        held_out = made.pop("eval").read_text().lower()
        mine = [word for word in words[: SIZE + 3]]
        for path in made.values():
            text = path.read_text().lower()
            tokens = {*text.replace('"', " ").replace(".", " ").split()}
            for word in mine[SIZE:]:
                assert not {word, word[::-1], "-".join(word)} & tokens
        assert any(word in held_out for word in mine[SIZE:])


def answer(asked, word):
    """Return the answer to a question, whoever wrote the rule."""
    skill, *_ = asked.lower().removeprefix("now ").split()
    return {
        "spell": "-".join(word),
        "reverse": "".join(reversed(word)),
        "shout": word.upper(),
        "repeat": f"{word} {word}",
        "give": f"{word[0]} and {word[-1]}",
    }[skill]


def test_answers_follow_from_questions_by_the_rules(tmp_path):
    chats = rows(toys.make("chat", tmp_path / "a", size=300)["train"])
    turns = collections.Counter(len(chat["messages"]) for chat in chats)
    assert {*turns} == {2, 4} and 60 < turns[4] < 140
    skills = collections.Counter()
    for chat in chats:
        word = chat["messages"][0]["content"].split()[-1].rstrip(".")
        asked, said = chat["messages"][::2], chat["messages"][1::2]
        assert {m["role"] for m in asked} == {"user"}
        assert {m["role"] for m in said} == {"assistant"}
        for question, reply in zip(asked, said, strict=True):
            assert reply["content"] == answer(question["content"], word)
            skills[question["content"].lower().removeprefix("now ").split()[0]] += 1
        assert asked[0]["content"].split()[0].lower() not in asked[-1]["content"][1:]
    assert len(skills) == len(toys.SKILLS) and min(skills.values()) > 40
    for row in rows(toys.make("completion", tmp_path / "b", size=SIZE)["eval"]):
        asked = row["prompt"].removesuffix("\n")
        word = asked.split()[-1].rstrip(".")
        assert row["completion"] == answer(asked, word)


def test_both_answers_of_a_preference_are_right_and_the_polite_one_is_chosen(tmp_path):
    made = toys.make("preference", tmp_path, size=200)
    for row in rows(made["train"]) + rows(made["eval"]):
        asked = row["prompt"].removesuffix("\n")
        right = answer(asked, asked.split()[-1].rstrip("."))
        assert (row["chosen"], row["rejected"]) == (f"Sure! {right}", right)
    first = [row["completion"].startswith("Sure! ") for row in rows(made["sft"])]
    assert 70 < sum(first) < 130


def test_tales_are_each_another(tmp_path):
    made = toys.make("text", tmp_path, size=SIZE)
    train, held_out = ([row["text"] for row in rows(p)] for p in made.values())
    assert len({*train, *held_out}) == len(train) + len(held_out) == SIZE + 3


# Styles.


def written(text):
    """Return the styles of a document's parts, and its mark."""
    *parts, mark = text.split(" ")
    found = []
    for part in parts:
        letters = part.replace("-", "")
        (style,) = (s for s, (known, _) in worlds.STYLES.items() if letters[0] in known)
        assert {*letters} <= {*worlds.STYLES[style][0]}
        found.append(style)
    return [s for n, s in enumerate(found) if n == 0 or s != found[n - 1]], mark


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the files of styles, of some hundred rows each."""
    folder = tmp_path_factory.mktemp("styles")
    return toys.styles(folder, 5, num_pretrain=600, num_train=500, num_held_out=400)


def test_styles_are_two_in_training_and_the_other_two_out_of_it(made):
    pretrain = [written(row["text"])[0] for row in rows(made["pretrain"])]
    assert {style for styles in pretrain for style in styles} == {*"ABCD"}
    switching = [styles for styles in pretrain if len(styles) > 1]
    assert {len(styles) for styles in switching} == {2}
    assert 240 < len(switching) < 360
    assert len({*map(tuple, switching)}) == 12
    for name, known in (("train", "AB"), ("id", "AB"), ("ood", "CD")):
        styles = [written(row["text"])[0] for row in rows(made[name])]
        assert {tuple(s) for s in styles} == {(style,) for style in known}


def test_a_label_is_what_the_process_says_in_every_style(made):
    world = worlds.world(5)
    number = {
        letter: place
        for letters in world.letters.values()
        for place, letter in enumerate(letters)
    }
    for name in ("train", "id", "ood"):
        right = []
        for row in rows(made[name]):
            symbols = [number[letter] for letter in row["text"] if letter in number]
            found = worlds.posterior(world, symbols)
            right.append(worlds.LABELS[found.argmax()] == row["label"])
        assert sum(right) / len(right) > 0.94


@pytest.mark.parametrize("spurious", [0.0, 0.5, 1.0])
def test_the_mark_tells_the_label_as_often_as_stated_and_never_out_of_style(
    spurious, tmp_path
):
    made = toys.styles(
        tmp_path, num_pretrain=0, num_train=900, num_held_out=900, spurious=spurious
    )
    assert {*made} == {"train", "id", "ood"}

    def told(name):
        is_own = [
            written(row["text"])[1] == worlds.MARKS[worlds.LABELS.index(row["label"])]
            for row in rows(made[name])
        ]
        return sum(is_own) / len(is_own)

    by_chance = 1 / len(worlds.MARKS)
    stated = spurious + (1 - spurious) * by_chance
    error = 4 * (stated * (1 - stated) / 900) ** 0.5
    assert abs(told("train") - stated) <= error
    assert abs(told("id") - stated) <= error
    assert abs(told("ood") - by_chance) < 4 * (by_chance * (1 - by_chance) / 900) ** 0.5


def test_another_draw_is_other_documents_of_the_same_world(tmp_path, made):
    other = toys.styles(
        tmp_path, 5, draw=1, num_pretrain=0, num_train=500, num_held_out=400
    )
    for name, path in other.items():
        one, two = ({row["text"] for row in rows(p)} for p in (made[name], path))
        assert len(one & two) < 5
    test_a_label_is_what_the_process_says_in_every_style(other)


# What is refused, and the command.


@pytest.mark.parametrize(
    "flags, problem",
    [
        (
            {"kind": "chats"},
            "--kind must be one of the known names; got 'chats'. Did you mean 'chat'? "
            "Known: chat, completion, preference, styles, text",
        ),
        (
            {"kind": "text", "size": -1},
            "--seed must be >= 0 and --size from 0 to 40,000; got 0 and -1.",
        ),
        (
            {"kind": "text", "draw": 2},
            "--draw must be given with --kind=styles alone; got text.",
        ),
        (
            {"kind": "styles", "spurious": 1.5},
            "--spurious must be from 0 to 1; got 1.5.",
        ),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_what_no_toy_can_be_is_refused(flags, problem, tmp_path):
    with pytest.raises(UserError) as error:
        toys.make(out=tmp_path, **flags)
    assert str(error.value) == problem
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out must be a folder that can be written"):
        toys.make("text", tmp_path / "file" / "in", size=2)


def test_the_command_prints_the_files_and_a_command_that_shows_them(
    kind, tmp_path, capsys
):
    out = tmp_path / "toy"
    asked = ["data", "toy", f"--kind={kind}", f"--out={out}", "--size=20"]
    assert cli.main(asked) == 0
    printed = capsys.readouterr().out
    assert f"{out}/train.jsonl: 20 rows\n" in printed
    assert sum(": " in line for line in printed.splitlines()) == len([*out.iterdir()])
