"""Toy data by rules of our own: small files that are the same on every machine.

Words are made of consonants and vowels in turn. Those of held-out files stand in no
training file, forwards or backwards; what is asked of them is the same:

    Spell tibo.   t-i-b-o        Reverse tibo.  obit       Shout tibo.  TIBO
    Repeat tibo.  tibo tibo      Give the ends of tibo.  t and o

chat        {"messages"}: one question, or two about the same word: "Now reverse it."
completion  {"prompt", "completion"}: one question
preference  {"prompt", "chosen", "rejected"}: both answer rightly; the polite one,
            which begins with "Sure! ", is preferred to the bare one. sft.jsonl has
            completions to train on first, half of them polite.
styles      see styles.py
text        {"text"}: small tales, a domain to go on training on
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fm_jax import caches
from fm_jax.errors import UserError, reason, unknown
from fm_jax.prepare import styles as worlds

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
LENGTHS = (3, 4, 5)
SKILLS: dict[str, Callable[[str], str]] = {
    "Spell {}.": "-".join,
    "Reverse {}.": lambda word: word[::-1],
    "Shout {}.": str.upper,
    "Repeat {}.": lambda word: f"{word} {word}",
    "Give the ends of {}.": lambda word: f"{word[0]} and {word[-1]}",
}
POLITE = "Sure! "
PLACES = ("harbour", "market", "mill", "forest", "bridge", "tower", "garden", "well")
PEOPLE = ("baker", "sailor", "smith", "miller", "shepherd", "weaver", "piper", "cook")
KINDS_OF = ("grey", "young", "tall", "quiet", "merry", "weary")
THINGS = {
    "lamp": "it was dark",
    "coat": "it was cold",
    "boat": "the river was high",
    "rope": "the hill was steep",
    "loaf": "the way was long",
    "flute": "there was a feast",
}


def chat(seed: int, size: int) -> dict[str, list[dict]]:
    """Return chats, the files train and eval; a third of them have two turns."""

    def row(rng: np.random.Generator, word: str) -> dict:
        first, second = _pair(rng, len(SKILLS))
        messages = _turns(_asked(first).format(word), _answer(first, word))
        if rng.random() < 1 / 3:
            again = _asked(second).format("it")
            again = f"Now {again[0].lower()}{again[1:]}"
            messages += _turns(again, _answer(second, word))
        return {"messages": messages}

    return _split(seed, size, row)


def completion(seed: int, size: int) -> dict[str, list[dict]]:
    """Return prompts with their completions, the files train and eval."""

    def row(rng: np.random.Generator, word: str) -> dict:
        skill = _below(rng, len(SKILLS))
        prompt = f"{_asked(skill).format(word)}\n"
        return {"prompt": prompt, "completion": _answer(skill, word)}

    return _split(seed, size, row)


def preference(seed: int, size: int) -> dict[str, list[dict]]:
    """Return pairs of answers, the files train and eval, and completions, sft."""

    def row(rng: np.random.Generator, word: str) -> dict:
        skill = _below(rng, len(SKILLS))
        answer = _answer(skill, word)
        return {
            "prompt": f"{_asked(skill).format(word)}\n",
            "chosen": f"{POLITE}{answer}",
            "rejected": answer,
        }

    def first(rng: np.random.Generator, word: str) -> dict:
        pair = row(rng, word)
        answer = pair["chosen" if rng.random() < 0.5 else "rejected"]
        return {"prompt": pair["prompt"], "completion": answer}

    found = _split(seed, size, row)
    return found | {"sft": _split(seed, size, first)["train"]}


def text(seed: int, size: int) -> dict[str, list[dict]]:
    """Return tales, the files train and eval, which share none."""
    rng = np.random.default_rng([seed, 0])
    tales: dict[str, None] = {}  # each once
    while len(tales) < size + _held_out(size):
        tales[_tale(rng)] = None
    made = [{"text": tale} for tale in tales]
    return {"train": made[:size], "eval": made[size:]}


def styles(
    out: Path | str,
    seed: int = 0,
    *,
    draw: int = 0,
    num_pretrain: int = 40_000,
    num_train: int = 400,
    num_held_out: int = 1_000,
    spurious: float = worlds.SPURIOUS,
) -> dict[str, Path]:
    """Write one process in several styles; return the files by what they are.

    They are pretrain, train, id and ood, see `styles.py`. `seed` is the world's, `draw`
    that of the documents in it. spurious: how often in training the mark at the end of
    a document is that of its label, and not just any. A file without rows is not
    written. Raises UserError as `write` does.
    """
    if not 0 <= spurious <= 1:
        raise UserError(f"--spurious must be from 0 to 1; got {spurious}.")
    found = worlds.rows(
        seed,
        draw=draw,
        num_pretrain=num_pretrain,
        num_train=num_train,
        num_held_out=num_held_out,
        spurious=spurious,
    )
    return write({name: rows for name, rows in found.items() if rows}, Path(out))


def write(found: dict[str, list[dict]], out: Path) -> dict[str, Path]:
    """Write rows as .jsonl, a file for each name; return the files by their names.

    Raises UserError where one is there with other rows, or none can be written.
    """
    told = {
        out / f"{name}.jsonl": "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in rows
        )
        for name, rows in found.items()
    }
    try:
        for path, held in told.items():
            if path.exists() and path.read_bytes() != held.encode():
                raise UserError(
                    f"--out must have no other data; got {path}, which differs. Delete "
                    "it or name another folder."
                )
        out.mkdir(parents=True, exist_ok=True)
        for path, held in told.items():
            if not path.exists():
                caches.write_whole(path, held)
    except OSError as error:
        raise UserError(
            f"--out must be a folder that can be written; got {out} ({reason(error)})."
        ) from error
    return {path.stem: path for path in told}


def make(
    kind: str, out: Path, *, seed: int = 0, size: int = 0, **knobs
) -> dict[str, Path]:
    """Write the toy of a kind; return its files by what they are.

    size: training examples; 0: as many as the kind has by itself. knobs: of `styles`.
    Raises UserError on an unknown kind, a knob of another and as `write` does.
    """
    if kind not in KINDS:
        raise unknown("--kind", kind, KINDS)
    if seed < 0 or not 0 <= size <= MOST:
        raise UserError(
            f"--seed must be >= 0 and --size from 0 to {MOST:,}; got {seed} and {size}."
        )
    if kind == "styles":
        return styles(out, seed, **({"num_train": size} if size else {}), **knobs)
    if knobs:
        raise UserError(
            f"--{min(knobs)} must be given with --kind=styles alone; got {kind}."
        )
    return write(ROWS[kind](seed, size or SIZES[kind]), out)


def data_keys(kind: str, made: dict[str, Path]) -> dict[str, str]:
    """Return the keys of a config's data section that read the files of a toy.

    One of another section has a dot: of preferences what needs no base.
    """
    held_out = [made[name] for name in ("eval", "id", "ood") if name in made]
    data = {"source": "text", "paths": f'("{made["train"]}",)'}
    data["eval_paths"] = "(" + "".join(f'"{path}",' for path in held_out) + ")"
    if kind != "text":
        examples = "classify" if kind == "styles" else kind
        data |= {"examples": examples, "packing": "best_fit"}
    if kind == "preference":
        data["finetune.preference"] = "orpo"
    return data | {"tokenizer": "bytes"}


def words(seed: int, count: int) -> list[str]:
    """Return words, no two the same or each other backwards."""
    rng, found = np.random.default_rng([seed, 0]), {}
    while len(found) < count:
        length = LENGTHS[_below(rng, len(LENGTHS))]
        is_vowel = rng.random() < 0.5
        letters = []
        for place in range(length):
            held = VOWELS if (place % 2) != is_vowel else CONSONANTS
            letters.append(held[_below(rng, len(held))])
        word = "".join(letters)
        if word != word[::-1]:
            found.setdefault(min(word, word[::-1]), word)
    return list(found.values())


def _split(seed: int, size: int, row: Callable) -> dict[str, list[dict]]:
    """Return a row for each word, the first of them in train and the rest in eval."""
    rng = np.random.default_rng([seed, 1])
    made = [row(rng, word) for word in words(seed, size + _held_out(size))]
    return {"train": made[:size], "eval": made[size:]}


def _held_out(size: int) -> int:
    return max(1, size // 10)


def _asked(skill: int) -> str:
    return list(SKILLS)[skill]


def _answer(skill: int, word: str) -> str:
    return list(SKILLS.values())[skill](word)


def _turns(asked: str, answer: str) -> list[dict]:
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answer},
    ]


def _tale(rng: np.random.Generator) -> str:
    """Return a tale: who went where, with what and why, and who was met there."""
    who, other = (PEOPLE[n] for n in _pair(rng, len(PEOPLE)))
    place, further = (PLACES[n] for n in _pair(rng, len(PLACES)))
    kind = KINDS_OF[_below(rng, len(KINDS_OF))]
    things = list(THINGS)
    mine, theirs = (things[n] for n in _pair(rng, len(things)))
    name = words(int(rng.random() * 2**31), 1)[0].capitalize()
    return (
        f"There was once a {kind} {who} called {name}. One day {name} went to the "
        f"{place} with a {mine}, for {THINGS[mine]}. At the {place} a {other} asked "
        f"for the {mine} and gave a {theirs} for it. So the {who} went on to the "
        f"{further} with the {theirs}, and {THINGS[theirs]}.\n"
    )


def _pair(rng: np.random.Generator, limit: int) -> tuple[int, int]:
    """Return two different numbers below a limit."""
    first = _below(rng, limit)
    return first, (first + 1 + _below(rng, limit - 1)) % limit


def _below(rng: np.random.Generator, limit: int) -> int:
    # By rng.random, whose numbers are the same with every NumPy.
    return int(rng.random() * limit)


ROWS = {"chat": chat, "completion": completion, "preference": preference, "text": text}
MOST = 40_000  # examples: there are 51,380 words
SIZES = {"chat": 4000, "completion": 4000, "preference": 2000, "text": 4000}
KINDS = ("chat", "completion", "preference", "styles", "text")
