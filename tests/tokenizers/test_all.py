"""Tests of text to ids and back: exact round trips, bytes of ids, BPE, other files."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fm_jax.corpora import synthetic
from fm_jax.errors import UserError
from fm_jax.tokenizers import all as tokenizers

TORTURE = {
    "empty": "",
    "nul": "a\x00b\x00\x00",
    "controls": "".join(map(chr, range(32))) + "\x7f\x80\x85\xa0",
    "emoji": "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f1eb\U0001f1f7",
    "combining": "e\u0301 \u0301\u0301 a\u0308\u0323 \u1100\u1161\u11a8",
    "not_normalised": "\u212b \ufb01 \uff21 \u00e9 e\u0301",
    "right_to_left": "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u0645\u0631\u062d",
    "cjk": "\u4f60\u597d\u3002\u3000\u4e16\u754c",
    "edge_of_unicode": "\uffff\U0010ffff\ufeff\ufffd\ue000\u2028\u2029",
    "spaces": " " * 257 + "x" + " " * 3 + "\t" * 65 + "y ",
    "leading_and_trailing": "  a  ",
    "newlines": "a\r\nb\rc\n\n\n\r\n\r\n d\n",
    "code": "def f(x):\n\tif x:\n        return  {'a': [1, 23456.789e-10]}\r\n",
    "digits": "1234567 3.14159 \u0661\u0662\u0663 \u00bd",
    "end_token": "a<|endoftext|>b <|endoftext|><|endoftext|>",
    "byte_letters": "\u0120\u010a\u0100 \u2581a <0x0A>",
}
CORPUS = [f"the cat {n} sat\n    on the mat, was glad\t" * 3 for n in range(40)]
BYTES = tokenizers.ByteTokenizer()
BPE = tokenizers.train_bpe(CORPUS, vocab_size=300)
ENGLISH = "the cat sat on a mat"


def refusal(function, *args, **kwargs):
    """Return the text of the UserError that a call ends in."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    return str(error.value)


def word_piece(end="[SEP]"):
    """Return the JSON of a tokenizer that lowers case and drops spaces, as BERT's."""
    pieces = ["[UNK]", end, "the", "cat", "##s", "sat", "on", "a", "mat", "."]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    inner = library.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(["[UNK]", end])
    return inner.to_str()


def unigram():
    """Return the JSON of a tokenizer with its end token in the model, as T5's."""
    letters = [(letter, -9.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz</>."]
    words = [("\u2581the", -3.0), ("\u2581cat", -4.0), ("at", -5.0)]
    vocab = [("<unk>", 0.0), ("</s>", 0.0), *letters, *words]
    inner = library.Tokenizer(models.Unigram(vocab, unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["<unk>", "</s>"])
    return inner.to_str()


def byte_fallback():
    """Return the JSON of a BPE of letters that falls back to bytes, as Llama's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "t", "h", "e", "th", "the", "\u2581the"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    inner = library.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner.to_str()


def load(folder, text, **options):
    path = folder / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    return tokenizers.load(path, **options)


# Round trips.


@pytest.mark.parametrize("name", TORTURE)
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_any_text_survives_the_round_trip(tokenizer, name):
    text = TORTURE[name]
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.uint32


@pytest.mark.parametrize("name", TORTURE)
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_byte_lengths_add_up_to_the_bytes_of_the_text(tokenizer, name):
    text = TORTURE[name]
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.byte_lengths[tokenizer.end_id] == 0


def test_every_letter_of_unicode_survives_the_round_trip():
    letters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    text = "".join(letters[::7])
    for tokenizer in (BYTES, BPE):
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_bytes_are_their_own_ids():
    (ids,) = BYTES.encode_batch(["aé\U0001f642"])
    assert ids.tolist() == [0x61, 0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82]
    assert (BYTES.vocab_size, BYTES.end_id) == (257, 256)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_text_that_spells_the_end_token_does_not_become_it(tokenizer):
    for ids in tokenizer.encode_batch(list(TORTURE.values())):
        assert tokenizer.end_id not in ids
    (once,) = tokenizer.encode_batch([tokenizers.END])
    assert tokenizer.byte_lengths[once].sum() == len("<|endoftext|>")


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_decode_leaves_out_the_end_id_and_replaces_broken_bytes(tokenizer):
    (ids,) = tokenizer.encode_batch(["aé"])
    end = tokenizer.end_id
    assert tokenizer.decode([end, *ids, end]) == "aé"
    (half,) = tokenizer.encode_batch(["\u00e9"])
    assert tokenizer.decode(half[:1]) == "\ufffd"
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == "aé"


def test_a_batch_encodes_as_its_texts_one_by_one():
    texts = list(TORTURE.values())
    for tokenizer in (BYTES, BPE):
        for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode_batch([text])[0])


# BPE trained here.


def test_bpe_training_is_deterministic():
    again = tokenizers.train_bpe(iter(CORPUS), vocab_size=300)
    assert again.to_json() == BPE.to_json()


@pytest.mark.parametrize("vocab_size", [257, 258, 301])
def test_bpe_has_as_many_ids_as_were_asked_for(vocab_size):
    tokenizer = tokenizers.train_bpe(CORPUS, vocab_size=vocab_size)
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.byte_lengths.shape == (vocab_size,)
    (ids,) = tokenizer.encode_batch(["".join(CORPUS)])
    assert ids.max() < vocab_size


def test_a_small_corpus_gives_fewer_ids_and_never_more():
    tokenizer = tokenizers.train_bpe(["ab ab"], vocab_size=5000)
    assert 257 < tokenizer.vocab_size < 270


def test_bpe_learns_words_with_their_space_and_runs_of_spaces_as_one_id():
    for piece in [" the", " cat", "   "]:
        (ids,) = BPE.encode_batch([piece])
        assert len(ids) == 1, piece
    (ids,) = BPE.encode_batch(["\n    on"])
    assert [BPE.decode([i]) for i in ids] == ["\n", "   ", " on"]


def test_bpe_below_the_bytes_and_the_end_is_refused():
    assert refusal(tokenizers.train_bpe, CORPUS, vocab_size=256) == (
        "data.vocab_size must be >= 257 for BPE; got 256."
    )


def test_bpe_is_trained_once_and_then_found(tmp_path):
    calls, said = [], []

    def documents():
        calls.append(1)
        return CORPUS

    def find(vocab_size=300, **identity):
        return tokenizers.find_or_train_bpe(
            tmp_path,
            documents,
            vocab_size=vocab_size,
            identity={"files": "a"} | identity,
            say=said.append,
        )

    first = find()
    assert first.to_json() == tokenizers.train_bpe(CORPUS, vocab_size=300).to_json()
    assert find().fingerprint == first.fingerprint
    assert len(calls) == 1
    assert said == ["Training a BPE tokenizer of 300 ids on the train text"]
    find(vocab_size=301)
    find(files="b")
    assert len(calls) == 3
    files = [path.name for path in (tmp_path / "tokenizers").glob("*.json")]
    assert len(files) == 3
    assert all(name.startswith("bpe-30") for name in files)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    text = refusal(
        tokenizers.find_or_train_bpe,
        tmp_path / "cache",
        lambda: CORPUS,
        vocab_size=257,
        identity={},
        say=lambda line: None,
    )
    assert text.startswith(
        "data.cache_dir must be writable and have room; got "
        f"{tmp_path}/cache/tokenizers/bpe-257-"
    )
    assert text.endswith(".json (Not a directory).")


# Reads its documents, once it has said so, for as long as the other has not asked.
TRAINER = """
import pathlib, sys, time
from fm_jax.tokenizers import all as tokenizers
name, cache = sys.argv[1], pathlib.Path(sys.argv[2])
def documents():
    print("reads", flush=True)
    while not (cache / "asked").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    return [f"{name} " * 50]
if name == "second":
    (cache / "asked").touch()
found = tokenizers.find_or_train_bpe(
    cache, documents, vocab_size=262, identity={}, say=print
)
print(repr(found.decode([261])))
"""


def test_of_two_processes_one_trains_and_the_other_finds(tmp_path):
    def start(name):
        command = [sys.executable, "-c", TRAINER, name, str(tmp_path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with start("first") as first:
        said = [first.stdout.readline(), first.stdout.readline()]
        with start("second") as second:
            found, _ = second.communicate(timeout=60)
        said += first.communicate(timeout=60)[0].splitlines(keepends=True)
    whole = tokenizers.train_bpe(["first " * 50], vocab_size=262).decode([261])
    assert "irst" in whole
    line = "Training a BPE tokenizer of 262 ids on the train text\n"
    assert sorted(said) == sorted([line, "reads\n", f"{whole!r}\n"])
    assert found == f"{whole!r}\n"


def test_a_bpe_that_may_not_be_trained_is_refused_and_nothing_is_made(tmp_path):
    def find(may_build):
        return tokenizers.find_or_train_bpe(
            tmp_path / "cache",
            lambda: CORPUS,
            vocab_size=300,
            identity={},
            say=said.append,
            may_build=may_build,
        )

    said = []
    text = refusal(find, False)
    assert text.startswith(f"{tmp_path}/cache/tokenizers/bpe-300-")
    assert text.endswith(".json must be prepared; got nothing there. fm train does.")
    assert list(tmp_path.iterdir()) == []
    assert said == []
    assert find(True).fingerprint == find(False).fingerprint == BPE.fingerprint
    assert len(said) == 1


# Tokenizers from files.


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_a_saved_tokenizer_loads_as_itself(tokenizer, tmp_path):
    loaded = load(tmp_path, tokenizer.to_json())
    texts = list(TORTURE.values())
    for one, two in zip(
        tokenizer.encode_batch(texts), loaded.encode_batch(texts), strict=True
    ):
        np.testing.assert_array_equal(one, two)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.end_id == tokenizer.end_id


def test_fingerprints_differ_with_anything_that_decides_the_ids(tmp_path):
    two_ends = library.Tokenizer.from_str(word_piece())
    two_ends.add_special_tokens(["</s>"])
    found = [
        BYTES,
        BPE,
        tokenizers.train_bpe(CORPUS, vocab_size=301),
        tokenizers.train_bpe(CORPUS[:9], vocab_size=300),
        load(tmp_path, unigram()),
        load(tmp_path, two_ends.to_str(), end_token="[SEP]"),
        load(tmp_path, two_ends.to_str(), end_token="</s>"),
    ]
    assert len({tokenizer.fingerprint for tokenizer in found}) == len(found)


def test_a_word_piece_file_loads_with_its_known_end(tmp_path):
    tokenizer = load(tmp_path, word_piece())
    assert (tokenizer.vocab_size, tokenizer.end_id) == (10, 1)
    (ids,) = tokenizer.encode_batch(["The CATS  sat."])
    assert ids.tolist() == [2, 3, 4, 5, 9]
    assert tokenizer.decode(ids) == "the cats sat."


def test_a_unigram_file_loads_with_its_known_end(tmp_path):
    tokenizer = load(tmp_path, unigram())
    assert tokenizer.end_id == 1
    (ids,) = tokenizer.encode_batch(["the cat"])
    assert tokenizer.decode(ids) == "the cat"
    # Its own mark of the word's start is a space, and the first one is not text.
    assert tokenizer.byte_lengths[ids].tolist() == [4, 4]


def test_a_byte_fallback_file_counts_one_byte_for_each_of_its_byte_ids(tmp_path):
    tokenizer = load(tmp_path, byte_fallback())
    assert tokenizer.end_id == 2
    (ids,) = tokenizer.encode_batch(["the \u00e9\n"])
    assert tokenizer.decode(ids) == "the \u00e9\n"
    assert tokenizer.byte_lengths[ids].tolist() == [4, 1, 1, 1, 1]


@pytest.mark.parametrize("make", [word_piece, unigram, byte_fallback])
def test_text_that_spells_another_files_end_token_does_not_become_it(make, tmp_path):
    tokenizer = load(tmp_path, make())
    texts = ["</s>", "the</s>cat </s> sat", "[SEP]", "the [SEP]cat[SEP][SEP]."]
    for ids in tokenizer.encode_batch(texts):
        assert tokenizer.end_id not in ids


def test_a_spelt_end_token_keeps_its_letters_in_a_model_that_has_them(tmp_path):
    tokenizer = load(tmp_path, unigram())
    (ids,) = tokenizer.encode_batch(["the</s>cat"])
    assert tokenizer.decode(ids) == "the</s>cat"


def test_special_ids_and_ids_without_a_token_stand_for_no_bytes(tmp_path):
    vocab = {"[UNK]": 0, "the": 1, "[SEP]": 6}
    inner = library.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.add_special_tokens(["[UNK]", "[SEP]"])
    tokenizer = load(tmp_path, inner.to_str())
    assert tokenizer.byte_lengths.tolist() == [0, 3, 0, 0, 0, 0, 0]


def test_truncation_and_padding_in_a_file_are_turned_off(tmp_path):
    inner = library.Tokenizer.from_str(BPE.to_json())
    inner.enable_truncation(max_length=3)
    inner.enable_padding(length=50)
    tokenizer = load(tmp_path, inner.to_str())
    for ids, whole in zip(
        tokenizer.encode_batch([ENGLISH, ""]),
        BPE.encode_batch([ENGLISH, ""]),
        strict=True,
    ):
        np.testing.assert_array_equal(ids, whole)


def test_end_token_chooses_among_the_tokens_of_a_file(tmp_path):
    text = word_piece(end="<fin>")
    assert load(tmp_path, text, end_token="<fin>").end_id == 1
    assert refusal(load, tmp_path, text) == (
        "data.end_token must name the tokenizer's end-of-document token; got '', and "
        "none of <|endoftext|>, </s>, <|end_of_text|>, <eos>, [SEP] is in its "
        "vocabulary."
    )


def test_an_end_token_that_is_not_in_the_vocabulary_is_refused(tmp_path):
    assert refusal(load, tmp_path, word_piece(), end_token="<stop>").startswith(
        "data.end_token must name the tokenizer's end-of-document token; got '<stop>'"
    )


def test_an_end_token_that_text_is_full_of_is_refused(tmp_path):
    tokenizer = load(tmp_path, unigram(), end_token=".")
    assert refusal(tokenizer.encode_batch, ["the cat."]) == (
        "data.end_token must be a token that no text encodes to; got '.', which the "
        "text has."
    )


def test_a_missing_tokenizer_file_is_refused(tmp_path):
    path = tmp_path / "none.json"
    assert refusal(tokenizers.load, path) == (
        "data.tokenizer must be bytes, bpe or the path of a tokenizer.json; got "
        f"'{path}' ([Errno 2] No such file or directory: '{path}')."
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("not json", "Expecting value: line 1 column 1 (char 0)"),
        ("[1, 2]", ""),
        ('{"model": {}}', ""),
        (json.dumps({"vocab_size": 12}), ""),
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_refused(text, reason, tmp_path):
    path = tmp_path / "tokenizer.json"
    message = refusal(load, tmp_path, text)
    assert message.startswith(
        f"tokenizer file must be a tokenizer.json; got '{path}' ({reason}"
    )
    assert message.endswith(").")
    assert "\n" not in message


def test_a_tokenizer_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xff\xfe")
    assert refusal(tokenizers.load, path).startswith(
        "data.tokenizer must be bytes, bpe or the path of a tokenizer.json; got "
        f"'{path}' ("
    )


# Symbols of a synthetic source.


def test_symbols_are_ids_and_come_back_as_they_were(tmp_path):
    tokenizer = tokenizers.SymbolTokenizer(300)
    text = "".join(map(chr, synthetic.alphabet(300)))
    ids, empty = tokenizer.encode_batch([text, ""])
    assert ids.dtype == np.uint32
    np.testing.assert_array_equal(ids, np.arange(300))
    assert len(empty) == 0
    assert tokenizer.decode([300, *ids, 300]) == text
    assert (tokenizer.vocab_size, tokenizer.end_id) == (301, 300)
    lengths = [len(letter.encode()) for letter in text]
    assert set(lengths) == {1, 2}
    np.testing.assert_array_equal(tokenizer.byte_lengths, [*lengths, 0])
    again = load(tmp_path, tokenizer.to_json())
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(again.encode_batch([text])[0], ids)
    assert tokenizers.SymbolTokenizer(299).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("stranger", [" ", "#", "\n", "\U0001f642", "\ud800"])
def test_a_character_that_is_no_symbol_is_refused(stranger):
    tokenizer = tokenizers.SymbolTokenizer(2)
    text = f'!"{stranger}!'
    assert refusal(tokenizer.encode_batch, ['!"', text]) == (
        "text must be of the 2 symbols from '!' to '\"' alone; got "
        f"{stranger!r} in {text!r}."
    )
