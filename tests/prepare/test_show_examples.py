"""Tests of examples decoded: against the rows, lines written by hand, and colours."""

import dataclasses
import json
import re
import shlex

import numpy as np
import pytest

from fm_jax import cli
from fm_jax.errors import UserError
from fm_jax.prepare import opened, show, toys

END = "<|endoftext|>"
ROWS = {
    "completion": [
        {"prompt": "Où?\n", "completion": "là\nbas"},
        {"prompt": "", "completion": "x" * 9},
        {"prompt": "b", "completion": END},
    ],
    "chat": [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "Go"},
            ]
        }
    ],
    "classify": [
        {"text": "abc", "label": "good"},
        {"text": "\x1b[2Jx", "label": "b\x1b"},
    ],
    "preference": [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": "q\n", "chosen": "a", "rejected": "bcd"},
    ],
}
KINDS = tuple(ROWS)


@pytest.fixture
def of_kind(config_of, tmp_path):
    """Return `of_kind(kind, rows)`: the config of examples in a .jsonl file."""

    def of_kind(kind, rows, **values):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        held_out = tmp_path / "held.jsonl"
        odd = {
            "completion": {"prompt": "?", "completion": "."},
            "chat": {
                "messages": [
                    {"role": "user", "content": "?"},
                    {"role": "assistant", "content": "."},
                ]
            },
            "classify": rows[0] | {"text": "?"},
            "preference": {"prompt": "?", "chosen": "!", "rejected": "."},
        }[kind]
        held_out.write_text(json.dumps(odd))
        return config_of(
            "animals",
            **{
                "data__paths": (str(path),),
                "data__eval_paths": (str(held_out),),
                "data__examples": kind,
                "data__packing": "best_fit",
                "data__max_length": 101,
                "train__batch_size": 1,
                "finetune__preference": "orpo",  # which needs no base
            }
            | values,
        )

    return of_kind


def shown(config, *, reference=None, **options):
    """Return the lines of all rows of an epoch, in the order of the data's rows."""
    data = opened.open_data(config, lambda line: None)
    (rows,) = data.train.windows
    if reference is not None:
        rows = rows.with_reference(reference)
        data = dataclasses.replace(
            data, train=dataclasses.replace(data.train, windows=(rows,))
        )
    num_steps = len(rows)
    plan = opened.train_plan(data, config, num_steps=num_steps, rows=np.arange(1))
    found = [
        list(
            show.lines(
                plan, data.tokenizer, step, rows=[0], labels=data.labels, **options
            )
        )
        for step in range(num_steps)
    ]
    return sorted(found, key=lambda lines: lines[0].partition("packed row")[2])


def test_completions_are_shown_whole_and_what_is_trained_on_is_told(of_kind):
    (lines,) = shown(of_kind("completion", ROWS["completion"]))
    assert lines == [
        "row 0, epoch 0, packed row 0 of 1: targets trained on 32, padding 63",
        "  rows.jsonl line 1: 8 tokens trained on, 6 seen",
        f"    seen    : {END}",
        "            | Où?␊",
        "    trained | là␊",
        "            | bas",
        f"            : {END}",
        "  rows.jsonl line 2: 10 tokens trained on, 1 seen",
        f"    seen    : {END}",
        "    trained | xxxxxxxxx",
        f"            : {END}",
        "  rows.jsonl line 3: 14 tokens trained on, 2 seen",
        f"    seen    : {END}",
        "            | b",
        f"    trained | {END}",  # text that looks like it, and is not
        f"            : {END}",
    ]


def test_turns_of_a_chat_are_trained_on_and_the_rest_seen(of_kind):
    pytest.importorskip("jinja2")
    (lines,) = shown(of_kind("chat", ROWS["chat"]))
    assert lines == [
        "row 0, epoch 0, packed row 0 of 1: targets trained on 8, padding 48",
        "  rows.jsonl line 1: 8 tokens trained on, 46 seen",
        f"    seen    : {END}",
        "            | User:␊",
        "            | Hi␊",
        "            | ␊",
        "            | Assistant:␊",
        "    trained | Yes?",
        f"            : {END}",
        "    seen    | ␊",
        "            | ␊",
        "            | User:␊",
        "            | Bye␊",
        "            | ␊",
        "            | Assistant:␊",
        "    trained | Go",
        f"            : {END}",
    ]


def test_a_label_stands_after_the_text_that_it_is_of(of_kind):
    (lines,) = shown(of_kind("classify", ROWS["classify"]))
    assert lines == [
        "row 0, epoch 0, packed row 0 of 1: targets trained on 2, padding 91",
        "  rows.jsonl line 1: 4 tokens seen, and a label",
        f"    seen    : {END}",
        "            | abc",
        "    label   | good",
        "  rows.jsonl line 2: 6 tokens seen, and a label",
        f"    seen    : {END}",
        "            | ␛[2Jx",
        "    label   | b␛",
    ]


def test_both_sides_of_a_preference_are_shown_with_their_reference(of_kind):
    reference = np.array([[-1.25, -2.5], [-3.0, -4.125]], np.float32)
    (lines,) = shown(of_kind("preference", ROWS["preference"]), reference=reference)
    assert [line for line in lines if line.startswith("  rows")] == [
        f"  rows.jsonl line {told} nats"
        for told in (
            "1, chosen: 4 tokens trained on, 2 seen, reference -1.25",
            "1, rejected: 3 tokens trained on, 2 seen, reference -2.50",
            "2, chosen: 2 tokens trained on, 3 seen, reference -3.00",
            "2, rejected: 4 tokens trained on, 3 seen, reference -4.12",
        )
    ]
    (lines,) = shown(of_kind("preference", ROWS["preference"][:1]))
    assert lines[1:] == [
        "  rows.jsonl line 1, chosen: 4 tokens trained on, 2 seen",
        f"    seen    : {END}",
        "            | q",
        "    trained | yes",
        f"            : {END}",
        "  rows.jsonl line 1, rejected: 3 tokens trained on, 2 seen",
        f"    seen    : {END}",
        "            | q",
        "    trained | no",
        f"            : {END}",
    ]


@pytest.mark.parametrize("packing", ["best_fit", "single"])
@pytest.mark.parametrize("kind", ["completion", "preference"])
def test_an_epoch_shows_each_answer_where_it_stood(kind, packing, of_kind):
    rows = toys.ROWS[kind](2, 31)["train"]
    found = {}
    for head, *lines in shown(of_kind(kind, rows, data__packing=packing)):
        trained = int(re.search(r"targets trained on (\d+)", head)[1])
        told = 0
        for line in lines:
            if match := re.match(r"  (rows.*): (\d+) tokens trained on", line):
                name, last = match[1], ""
                told += int(match[2])
            elif match := re.match(r"    (trained|seen|       ) +\| (.*)$", line):
                last = match[1].strip() or last
                if last == "trained":
                    found[name] = found.get(name, "") + match[2]
        assert told == trained
    names = {"": "completion", ", chosen": "chosen", ", rejected": "rejected"}
    assert found == {
        f"rows.jsonl line {number}{said}": row[name]
        for number, row in enumerate(rows, 1)
        for said, name in names.items()
        if name in row
    }


# Colours.


def plainly(lines):
    """Return the text of lines without what commands a terminal."""
    return [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines]


def painted(line):
    """Return [(code, text)] of a coloured line after its margin."""
    found = re.findall(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", line)
    whole = "".join(f"\x1b[{code}m{text}\x1b[0m" for code, text in found)
    assert line.replace(" ", "") == whole.replace(" ", "")
    return found


def test_colours_tell_what_is_trained_on_and_underlines_what_is_no_text(of_kind):
    (lines,) = shown(of_kind("completion", ROWS["completion"][:1]), colour=True)
    legend, head, where, *rest = lines
    assert painted(legend) == [("32", "trained on"), ("2", "only seen")]
    assert (head[:5], where) == (
        "row 0",
        "  rows.jsonl line 1: 8 tokens trained on, 6 seen",
    )
    assert [painted(line) for line in rest] == [
        [("2;4", END), ("2", "Où?␊")],
        [("32", "là␊")],
        [("32", "bas"), ("32;4", END)],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_in_colour_the_same_text_is_shown_and_nothing_in_it_commands(kind, of_kind):
    if kind == "chat":
        pytest.importorskip("jinja2")
    config = of_kind(kind, ROWS[kind])
    (plain,), (coloured,) = shown(config), shown(config, colour=True)

    def text(lines, start):
        shown = (line[start:] for line in lines if line.startswith("    "))
        return "".join(shown).replace(" ", "")

    assert text(plainly(coloured), 4) == text(plain, 14)
    codes = {*re.findall(r"\x1b\[([\d;]*)m", "".join(coloured))}
    assert codes <= {"0", "32", "2", "32;4", "2;4", "1;33"}
    assert "\x1b" not in "".join(plainly(coloured))


def test_a_label_has_a_colour_of_its_own(of_kind):
    (lines,) = shown(of_kind("classify", ROWS["classify"]), colour=True)
    assert painted(lines[-1])[-1] == ("1;33", "b␛")


@pytest.mark.parametrize(
    "asked, is_terminal, no_colour, expected",
    [
        ("auto", True, "", True),
        ("auto", True, "1", False),
        ("auto", False, "", False),
        ("always", False, "1", True),
        ("never", True, "", False),
    ],
)
def test_colours_are_for_terminals_unless_said_otherwise(
    asked, is_terminal, no_colour, expected, monkeypatch
):
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    assert show.in_colour(asked) is expected


def test_an_unknown_colour_names_the_known(of_kind):
    with pytest.raises(UserError) as error:
        show.in_colour("sometimes")
    assert str(error.value).startswith(
        "--colour must be one of the known names; got 'sometimes'."
    )


# The commands.


@pytest.mark.parametrize("kind", ["chat", "completion", "preference", "styles"])
def test_the_command_that_a_toy_prints_shows_it(kind, tmp_path, capsys):
    if kind == "chat":
        pytest.importorskip("jinja2")
    out = tmp_path / "toy"
    toy = ["data", "toy", f"--kind={kind}", f"--out={out}", "--size=20"]
    assert cli.main(toy) == 0
    _, *words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    words += [f"--config.data.cache_dir={tmp_path}/cache", "--rows=0"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "train.jsonl line" in printed and "\x1b" not in printed
    assert cli.main([*words, "--colour=always"]) == 0
    assert "\x1b[" in capsys.readouterr().out
    words[1] = "build"
    assert cli.main(words[:-1]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^train: .*\n  20 examples of ", printed)
    assert cli.main([*words[:-1], f"--out={tmp_path}/x"]) == 2
    assert "--out must be of data.examples=text" in capsys.readouterr().err
    words[1] = "pack"
    assert cli.main([*words[:-1], f"--out={tmp_path}/x", "--name=x"]) == 2
    assert "data.examples must be text where documents" in capsys.readouterr().err
