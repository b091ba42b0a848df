"""Tokenizers of every kind, tiny, and the texts that are hard on them."""

import base64
import io
import json

import pytest
import tokenizers as library
from hypothesis import strategies
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fm_jax.errors import UserError
from fm_jax.tokenizers import load as loading
from fm_jax.tokenizers import plain, ranks, splits, training
from fm_jax.tokenizers.protocol import END

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
    "folds_to_ascii": "it'\u017f it'S \u212a'll 'RE I'd'\u017ft",
}
# Text as fonts, keyboards and editors make it, with no half of a surrogate pair.
TEXT = strategies.lists(
    strategies.one_of(
        strategies.text(max_size=8),
        strategies.sampled_from(list(TORTURE.values())),
        strategies.sampled_from(
            ["the cat", " sat", "\r\n", "\n", "\t", " " * 7, "'s", "'LL", "12345",
             "e\u0301", "\U0001f468\u200d\U0001f4bb", "\u0627\u0644", "\x00", "\x85",
             "\u3000", "_", "."]
        ),
    ),
    max_size=9,
).map("".join)  # fmt: skip

CORPUS = [f"the cat {n} sat\n    on the mat, was glad\t" * 3 for n in range(40)]
ENGLISH = "the cat sat on a mat"
BYTES = plain.ByteTokenizer()
BPE = training.train_bpe(CORPUS, vocab_size=300)
SPECIAL = ("<|im_start|>", "<pad>")


def trained(kind="bpe", vocab_size=300, **options):
    """Return a tokenizer of CORPUS."""
    return training.train(CORPUS, kind=kind, vocab_size=vocab_size, **options)


def ranks_of(tokenizer):
    """Return the ids of a byte-level BPE by the bytes of its tokens, not special."""
    letters = splits.byte_letters()
    vocab = json.loads(tokenizer.to_json())["model"]["vocab"].items()
    return {
        bytes(letters[letter] for letter in token): index
        for token, index in vocab
        if index not in tokenizer.special_ids
    }


def rank_lines(found):
    """Return ranks as a file has them."""
    tokens = sorted(found.items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(t).decode()} {rank}\n" for t, rank in tokens]
    return "".join(lines).encode()


RANKS = ranks.RanksTokenizer(
    ranks_of(BPE), pattern=splits.CL100K, special_tokens={END: 0, "<|im|>": 317}
)
EXACT = {
    "bytes": BYTES,
    "bpe": BPE,
    "unigram": trained("unigram"),
    "options": trained(
        vocab_size=280, special_tokens=SPECIAL, digits="single", whitespace="single"
    ),
    "ranks": RANKS,
}


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


def unigram(*special):
    """Return the JSON of a tokenizer with its end token in the model, as T5's."""
    letters = [(letter, -9.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz</>."]
    words = [("\u2581the", -3.0), ("\u2581cat", -4.0), ("at", -5.0)]
    ours = [(token, 0.0) for token in ("<unk>", "</s>", *special)]
    inner = library.Tokenizer(models.Unigram([*ours, *letters, *words], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens([token for token, _ in ours])
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


def sentence_model(**options):
    """Return a SentencePiece model of CORPUS, as its own library trains it."""
    import sentencepiece

    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=stream,
        minloglevel=2,
        hard_vocab_limit=False,
        **{"vocab_size": 320, "model_type": "bpe", "byte_fallback": True} | options,
    )
    return stream.getvalue()


def load(folder, text, **options):
    """Return the tokenizer in a file of this text."""
    path = folder / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    return loading.load(path, **options)


def refusal(function, *args, **kwargs):
    """Return the text of the UserError that a call ends in."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    return str(error.value)
