"""Byte-level BPE by tiktoken, several times as fast as the library that trains it."""

import functools
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fm_jax import machine
from fm_jax.tokenizers import splits
from fm_jax.tokenizers.protocol import told

# Rust's regex runs out of its stack in a few 100,000 spaces that are looked ahead over.
LONG_RUN = 1 << 15
FEW = 1 << 15  # characters that are encoded in less time than threads take to start
# Planes of Unicode in which characters are, or will be, of a class; others have none.
PLANES = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))


class Encoder:
    """Merges bytes of pieces, the lowest rank first, into the ids that ranks are.

    `strangers` are characters that make `takes` refuse a text. `library` is tiktoken's
    own object.
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int], strangers: str = ""):
        import tiktoken

        # It wants a special token to look for; none is let through.
        special = {"<|none|>": 1 + max(ranks.values())}
        self.library = tiktoken.Encoding(
            "fm_jax", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self._strange = re.compile(f"[{re.escape(strangers)}]") if strangers else None

    def takes(self, text: str) -> bool:
        """Return whether the ids of a text are sure to be those of other engines."""
        return not has_long_run(text) and not (
            self._strange and self._strange.search(text)
        )

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int = 0
    ) -> list[np.ndarray]:
        """Return the ids of each text, uint32; `num_threads` 0 stands for all cores."""
        threads, total = num_threads or machine.num_cores(), sum(map(len, texts))
        if threads == 1 or len(texts) == 1 or total < FEW:
            return self._encode(texts)
        # Texts by the hundred in one task: handing over a task costs like a small text.
        size, groups, taken = total / (4 * threads), [[]], 0
        for text in texts:
            if taken > size:
                groups.append([])
                taken = 0
            groups[-1].append(text)
            taken += len(text)
        with ThreadPoolExecutor(threads) as pool:
            return [ids for rows in pool.map(self._encode, groups) for ids in rows]

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encode = self.library.encode_to_numpy
        with told():
            return [encode(text, disallowed_special=()) for text in texts]


def has_long_run(text: str) -> bool:
    """Return whether a text may have spaces enough in a row to be too many.

    True of each run of 2 * LONG_RUN, of none shorter than LONG_RUN.
    """
    starts = range(0, len(text) - LONG_RUN + 1, LONG_RUN)
    return any(text[i : i + LONG_RUN].isspace() for i in starts)


def find(spec: dict) -> Encoder | None:
    """Return what encodes as a tokenizer.json does; None where that is not proven.

    Of two neighbours, tiktoken merges those whose bytes together are a token T, the
    `tokenizers` library those that are a listed pair; both merge the lowest first, and
    the leftmost of equals. With every token encoding to itself alone these are the same
    rule: two neighbours that make up T stand on T's borders, so nothing was merged over
    these, and within them what was merged is what is merged of T alone. T alone comes
    down to two parts just once, and these are a listed pair, or it would not become T.
    So the pairs that ever meet are those of the list, one for each token; and their
    order is that of the ids, if the list's is.

    Characters that the two regex engines hold to be of different classes, as their
    tables of Unicode may be of different years, are not taken.
    """
    pattern, ranks = pattern_of(spec), _ranks(spec)
    return Encoder(pattern, ranks, _strangers(pattern)) if pattern and ranks else None


def pattern_of(spec: dict) -> str | None:
    """Return the known split that is all a tokenizer.json does before its model."""
    found = _pattern(spec.get("pre_tokenizer"))
    is_all = not spec.get("normalizer") and all(
        token["special"] for token in spec.get("added_tokens", [])
    )
    return found if is_all and found in splits.KNOWN else None


def _pattern(pre_tokenizer: dict | None) -> str | None:
    """Return the pattern of a split with bytes after it, and nothing else."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return splits.GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(pattern)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


def _ranks(spec: dict) -> dict[bytes, int] | None:
    """Return the ids of tokens by their bytes; None where they are not like ranks."""
    model, added = spec.get("model", {}), spec.get("added_tokens", [])
    if (
        model.get("type") != "BPE"
        or model.get("dropout")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        return None
    letters = splits.byte_letters()
    special = {token["content"] for token in added}
    ids = {t: i for t, i in model["vocab"].items() if t not in special}
    if not all(letters.keys() >= set(token) for token in ids) or letters.keys() - ids:
        return None
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    results = [ids.get("".join(pair), -1) for pair in pairs]
    if -1 in results or sorted(results) != results:
        return None
    if not _encode_to_themselves(ids, pairs):
        return None
    return {bytes(letters[x] for x in token): i for token, i in ids.items()}


def _encode_to_themselves(ids: dict[str, int], pairs: list[tuple[str, str]]) -> bool:
    """Return whether each token is what the library makes of it, merge by merge."""
    from tokenizers import models

    try:
        model = models.BPE(ids, pairs)
    except Exception:  # the library's own, of a part of a pair that has no id
        return False
    return all([t.id for t in model.tokenize(token)] == [ids[token]] for token in ids)


def _strangers(pattern: str) -> str:
    """Return the characters of which the two engines see different classes."""
    classes = {*re.findall(r"\\p\{\w+\}", pattern), r"\s", r"(?i:[sdmtlvre])"}
    return "".join(sorted(set().union(*map(_disputed, classes))))


@functools.cache
def _disputed(one: str) -> set[str]:
    """Return the characters that are of a class in one of the two engines alone."""
    # Of spaces, and of letters that fold to ASCII, none are further up.
    planes = PLANES if one.startswith(r"\p") else PLANES[:1]
    points = np.concatenate([np.arange(p.start, p.stop, dtype="<u4") for p in planes])
    every = points.tobytes().decode("utf-32-le")
    both = _of_class_by_rust(one, every) + _not_of_class_by_oniguruma(one, every)
    found = np.frombuffer(both.encode("utf-32-le"), "<u4")
    times = np.bincount(found, minlength=int(points[-1]) + 1)[points]
    return set(points[times != 1].tobytes().decode("utf-32-le"))


def _of_class_by_rust(one: str, every: str) -> str:
    """Return the characters of a class; what no pattern takes, tiktoken leaves out."""
    found = Encoder(one, {bytes([byte]): byte for byte in range(256)})
    return bytes(found.encode_batch([every])[0].astype(np.uint8)).decode()


def _not_of_class_by_oniguruma(one: str, every: str) -> str:
    from tokenizers import Regex, normalizers

    return normalizers.Replace(Regex(f"{one}+"), "").normalize_str(every)
