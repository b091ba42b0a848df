"""Tests of sequences to learn from, against ids written by hand."""

import numpy as np
import pytest

from fm_jax.data import sides
from fm_jax.data.chats import BadRow
from fm_jax.data.examples import Maker
from fm_jax.data.sides import Reader
from fm_jax.errors import UserError
from fm_jax.tokenizers import load, special, template
from fm_jax.tokenizers.plain import ByteTokenizer
from tests.tokenizers import made as tokenizers

END = 256
TOKENIZER = ByteTokenizer()


def _maker(kind, max_length=99, on_long="error", labels=(), tokenizer=TOKENIZER, **how):
    reader = Reader(kind, sides.fields(kind, ()), **how)
    return Maker(reader, tokenizer, max_length, on_long, labels)


def _made(maker, *rows):
    return maker.make([(row, f"rows.jsonl line {n}") for n, row in enumerate(rows, 1)])


def _ids(text):
    return [END if letter == "$" else ord(letter) for letter in text]


def _told(segment, *, has_text=True):
    """Return tokens, targets and weights as text; $ is the end id, _ no weight."""
    for array in (segment.tokens, segment.targets, segment.weights):
        assert array.shape == (len(segment),)
    tokens, targets = (
        "".join("$" if i == END else chr(i) for i in array)
        for array in (segment.tokens, segment.targets)
    )
    marks = "".join("^" if weight else "_" for weight in segment.weights)
    return (tokens, targets, marks) if has_text else (tokens, marks)


def test_loss_is_on_the_completion_and_its_end():
    (made,) = _made(_maker("completion"), {"prompt": "ab", "completion": "cde"})
    (segment,) = made.segments
    assert _told(segment) == ("$abcde", "abcde$", "__^^^^")
    assert not made.is_cut


def test_an_empty_prompt_leaves_what_stands_before_a_text():
    (made,) = _made(_maker("completion"), {"prompt": "", "completion": "c"})
    assert _told(made.segments[0]) == ("$c", "c$", "^^")


def test_prompt_and_completion_are_encoded_one_by_one():
    maker = _maker("completion", tokenizer=tokenizers.BPE)
    (made,) = _made(maker, {"prompt": "the c", "completion": "at sat"})
    prompt, answer = (
        ids.tolist() for ids in tokenizers.BPE.encode_batch(["the c", "at sat"])
    )
    whole = tokenizers.BPE.encode_batch(["the cat sat"])[0].tolist()
    assert [*prompt, *answer] != whole  # one token would reach across the border
    end, (segment,) = tokenizers.BPE.end_id, made.segments
    assert segment.tokens.tolist() == [end, *prompt, *answer]
    assert segment.targets.tolist() == [*prompt, *answer, end]
    assert segment.weights.tolist() == [0] * len(prompt) + [1] * (len(answer) + 1)


def test_what_the_tokenizer_puts_before_a_text_stands_before_a_prompt():
    import tokenizers as library
    from tokenizers import processors

    inner = library.Tokenizer.from_str(tokenizers.BPE.to_json())
    inner.add_special_tokens(["<s>"])
    begin = inner.token_to_id("<s>")
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    tokenizer = load.JsonTokenizer(inner.to_str(), end_token="<|endoftext|>")
    maker = _maker("completion", tokenizer=tokenizer)
    (made,) = _made(maker, {"prompt": "", "completion": "the"})
    assert made.segments[0].tokens[0] == begin
    assert made.segments[0].targets[-1] == tokenizer.end_id


def test_text_that_spells_a_special_token_in_a_completion_stays_text():
    row = {"prompt": "a<|endoftext|>", "completion": "<|endoftext|>b"}
    for tokenizer in tokenizers.EXACT.values():
        (made,) = _made(_maker("completion", tokenizer=tokenizer), row)
        (segment,) = made.segments
        assert (segment.tokens == tokenizer.end_id).sum() == 1
        assert (segment.targets == tokenizer.end_id).sum() == 1


CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "bc"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]


def test_a_chat_learns_each_turn_of_the_assistant_and_its_end():
    pytest.importorskip("jinja2")
    maker = _maker("chat", template=template.plain(TOKENIZER))
    rest = [*CHAT, {"role": "user", "content": "more"}]
    for messages in (CHAT, rest):  # what comes after the last answer is left off
        (made,) = _made(maker, {"messages": messages})
        tokens = "$User:\na\n\nAssistant:\nbc$\n\nUser:\nd\n\nAssistant:\ne"
        marks = "_" * 20 + "^^^" + "_" * 22 + "^^"
        assert _told(made.segments[0]) == (tokens, tokens[1:] + "$", marks)


def test_the_ids_before_an_answer_are_those_of_generation():
    """What is trained on comes after just the ids that a prompt would have."""
    pytest.importorskip("jinja2")
    for tokenizer in tokenizers.EXACT.values():
        made_by = template.plain(tokenizer)
        maker = _maker("chat", max_length=999, tokenizer=tokenizer, template=made_by)
        (made,) = _made(maker, {"messages": CHAT[:2]})
        asked = special.special_encoder(tokenizer)(made_by.render(CHAT[:1]))
        (segment,) = made.segments
        first = int(np.flatnonzero(segment.weights)[0])
        assert segment.tokens[: first + 1].tolist() == asked
        assert (
            segment.tokens.tolist()[first + 1 :] == segment.targets[first:-1].tolist()
        )
        assert segment.targets[-1] == tokenizer.end_id


def test_a_chats_mask_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    import tokenizers as library

    inner = library.Tokenizer.from_str(tokenizers.BPE.to_json())
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    expected = theirs.apply_chat_template(
        CHAT, chat_template=template.PLAIN, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    maker = _maker(
        "chat", max_length=999, tokenizer=tokenizers.BPE,
        template=template.plain(tokenizers.BPE),
    )  # fmt: skip
    (made,) = _made(maker, {"messages": CHAT})
    (segment,) = made.segments
    assert segment.tokens.tolist() == expected["input_ids"][:-1]
    assert segment.targets.tolist() == expected["input_ids"][1:]
    assert segment.weights.tolist() == expected["assistant_masks"][1:]


def test_a_label_is_the_target_of_the_last_token_alone():
    maker = _maker("classify", labels=("no", "so", "yes"), prompt="<{text}>")
    (made,) = _made(maker, {"text": "ab", "label": "yes"})
    (segment,) = made.segments
    assert segment.tokens.tolist() == _ids("$<ab>")
    assert segment.targets.tolist() == [0, 0, 0, 0, 2]
    assert segment.weights.tolist() == [0, 0, 0, 0, 1]


def test_a_label_that_training_does_not_have_is_refused_with_its_line():
    maker = _maker("classify", labels=("0", "1"))
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    with pytest.raises(UserError, match=r"^rows.jsonl line 2 .* got '2'\. Known: 0, 1"):
        _made(maker, *rows)


def test_a_pair_is_two_segments_with_the_same_prompt():
    row = {"prompt": "p", "chosen": "ab", "rejected": "c"}
    (made,) = _made(_maker("preference"), row)
    chosen, rejected = made.segments
    assert _told(chosen) == ("$pab", "pab$", "_^^^")
    assert _told(rejected) == ("$pc", "pc$", "_^^")


def test_bad_rows_come_back_in_their_places():
    rows = [{"prompt": "a"}, {"prompt": "a", "completion": "b"}, {"completion": "b"}]
    found = _made(_maker("completion"), *rows)
    assert [isinstance(one, BadRow) for one in found] == [True, False, True]
    assert str(found[2]).startswith("rows.jsonl line 3 must have a field 'prompt'")


def test_a_template_that_leaves_the_answer_out_is_refused():
    pytest.importorskip("jinja2")
    source = "{{ messages[0].content }}{% generation %}{% endgeneration %}"
    maker = _maker("chat", template=template.Template(source, {}, "here"))
    (found,) = _made(maker, {"messages": CHAT})
    assert "must have an answer that its chat template writes" in str(found)


# ---- Examples that are too long

LONG = {
    "completion": {"prompt": "abcdef", "completion": "ghi"},  # 10 places
    "chat": {"messages": CHAT},  # 47 places
    "classify": {"text": "abcdef", "label": "y"},  # 7 and the prompt
    "preference": {"prompt": "abcd", "chosen": "efg", "rejected": "h"},  # 8 + 6 places
}


def _long(kind, max_length, on_long):
    how = {}
    if kind == "chat":
        pytest.importorskip("jinja2")
        how = {"template": template.plain(TOKENIZER)}
    if kind == "classify":
        how = {"labels": ("x", "y"), "prompt": "<{text}>"}
    return _maker(kind, max_length, on_long, **how)


@pytest.mark.parametrize(
    "kind, size",
    [("completion", 10), ("chat", 47), ("classify", 9), ("preference", 14)],
)
def test_an_example_of_just_a_row_is_taken_and_a_longer_one_met(kind, size):
    for on_long in ("error", "truncate", "drop"):
        (made,) = _made(_long(kind, size, on_long), LONG[kind])
        assert sum(map(len, made.segments)) == size
        assert not made.is_cut
    assert _made(_long(kind, size - 1, "drop"), LONG[kind])[0].segments == ()
    said = (
        rf"^rows.jsonl line 1 must take at most data.max_length={size - 1} tokens.*; "
        rf"got {size}\. Raise it, or set --config.data.on_long=truncate or drop\.$"
    )
    with pytest.raises(UserError, match=said):
        _made(_long(kind, size - 1, "error"), LONG[kind])


@pytest.mark.parametrize(
    "max_length, told",
    [
        (7, ("$defghi", "defghi$", "___^^^^")),
        (4, ("$ghi", "ghi$", "^^^^")),
        (2, ("$g", "gh", "^^")),  # no prompt is left to cut
    ],
)
def test_a_completion_loses_the_beginning_of_its_prompt(max_length, told):
    (made,) = _made(_long("completion", max_length, "truncate"), LONG["completion"])
    assert made.is_cut
    assert _told(made.segments[0]) == told


@pytest.mark.parametrize(
    "max_length, chosen, rejected",
    [
        (13, "$bcdefg", "$bcdh"),  # as much of both prompts
        (10, "$cdefg", "$cdh"),
        (6, "$efg", "$h"),
        (4, "$e", "$h"),
    ],
)
def test_a_pair_loses_as_much_of_both_prompts(max_length, chosen, rejected):
    (made,) = _made(_long("preference", max_length, "truncate"), LONG["preference"])
    assert made.is_cut
    assert [_told(segment)[0] for segment in made.segments] == [chosen, rejected]
    assert sum(map(len, made.segments)) <= max_length


def test_a_pair_that_a_cut_makes_the_same_is_left_out():
    row = {"prompt": "p", "chosen": "abcd", "rejected": "abef"}
    assert _made(_maker("preference", 5, "truncate"), row)[0].segments == ()


def test_a_chat_loses_its_end_and_is_left_out_where_no_answer_is_left():
    (made,) = _made(_long("chat", 40, "truncate"), LONG["chat"])
    assert made.is_cut
    tokens = "$User:\na\n\nAssistant:\nbc"  # nothing after it is learnt from
    assert _told(made.segments[0])[0] == tokens
    (made,) = _made(_long("chat", 21, "truncate"), LONG["chat"])
    assert _told(made.segments[0])[1][-1] == "b"
    assert _made(_long("chat", 20, "truncate"), LONG["chat"])[0].segments == ()


def test_a_text_to_classify_loses_its_end_but_nothing_around_it():
    (made,) = _made(_long("classify", 6, "truncate"), LONG["classify"])
    assert made.is_cut
    tokens = made.segments[0].tokens.tolist()
    assert tokens[:3] == _ids("$<a")
    assert tokens[-1] == ord(">")
    assert len(tokens) <= 6
    with pytest.raises(UserError, match=r"must take at most data\.max_length=2"):
        _made(_long("classify", 2, "truncate"), LONG["classify"])
