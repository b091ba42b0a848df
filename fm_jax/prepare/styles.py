"""One hidden process written in several styles: toy data for studies of transfer.

A seed makes a world of NUM_SYMBOLS symbols. It has one Markov chain over them: row i of
its matrix is proportional to u**4, u uniform on [0, 1), a fresh draw for each entry. Of
each label it has favourites, as many symbols for each, no symbol twice. And of each
style letters, one for a symbol, in an order of their own:

    A  lower case a to l, spaces between      B  upper case A to L, nothing between
    C  lower case m to x, hyphens between     D  upper case M to X, nothing between

A document: a label is drawn, all alike; its length, all of SHORTEST to LONGEST alike; a
first symbol, all alike; then each next one, with the probability FAVOUR, is one of the
label's favourites, all alike, and else by the chain's row of the symbol before it. It
is written in its style, and ends with a space and a mark, one of as many as there are
labels. Of a document that switches style, the first part has one style and the rest
another, the two drawn from all pairs and the place from all places; the chain goes on.

So the label follows from the symbols, whatever the style, as a topic does from words.
That a and Q may be the same symbol can be learnt only from documents that switch.
Whoever knows the world reads the label as `posterior` does.

    pretrain.jsonl   {"text"}: all styles, half of the documents switch, any mark
    train.jsonl      {"text", "label"}: styles A and B
    id.jsonl         the same, other documents
    ood.jsonl        the same labels in styles C and D

In train.jsonl and id.jsonl the mark is that of the label with a probability of
`spurious`, else any, all alike; in the others always any. What learns the mark in place
of the process is right there, and wrong in ood.jsonl.
"""

import dataclasses

import numpy as np

STYLES = {
    "A": ("abcdefghijkl", " "),
    "B": ("ABCDEFGHIJKL", ""),
    "C": ("mnopqrstuvwx", "-"),
    "D": ("MNOPQRSTUVWX", ""),
}  # letters, and what stands between them
LABELS = ("north", "east", "south", "west")
MARKS = "!?.;"
NUM_SYMBOLS = 12
FAVOUR = 0.4
SHORTEST, LONGEST = 8, 20  # symbols in a document
SPURIOUS = 0.5  # how often the mark is the label's own in training
KNOWN, NEW = "AB", "CD"  # styles that have labels in training, and that have none


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """What all files share.

    `chains` are the probabilities of the next symbol by the label and the symbol before
    it, float64 `[labels, symbols, symbols]`; `favourites` the symbols of each label.
    """

    chains: np.ndarray
    favourites: np.ndarray
    letters: dict[str, str]


def world(seed: int) -> World:
    """Return the world of a seed."""
    rng = np.random.default_rng([seed, 0])
    weights = rng.random((NUM_SYMBOLS, NUM_SYMBOLS))
    weights = weights * weights * weights * weights
    favourites = np.argsort(rng.random(NUM_SYMBOLS)).reshape(len(LABELS), -1)
    favoured = np.zeros((len(LABELS), 1, NUM_SYMBOLS))
    np.put_along_axis(favoured, favourites[:, None], 1 / favourites.shape[1], axis=2)
    chain = weights / weights.sum(1, keepdims=True)
    letters = {
        style: "".join(known[i] for i in np.argsort(rng.random(NUM_SYMBOLS)))
        for style, (known, _) in STYLES.items()
    }
    return World(FAVOUR * favoured + (1 - FAVOUR) * chain, favourites, letters)


def rows(
    seed: int, *, draw: int, num_pretrain: int, num_train: int, num_held_out: int,
    spurious: float,
) -> dict[str, list[dict]]:  # fmt: skip
    """Return the rows of each file; another `draw` is other documents of the world."""
    made, found = world(seed), {}
    plans = {
        "pretrain": (num_pretrain, "ABCD", 0.5, 0.0),
        "train": (num_train, KNOWN, 0.0, spurious),
        "id": (num_held_out, KNOWN, 0.0, spurious),
        "ood": (num_held_out, NEW, 0.0, 0.0),
    }
    for number, (name, (count, styles, switching, tied)) in enumerate(plans.items()):
        rng = np.random.default_rng([seed, 1, draw, number])
        drawn = documents(
            made, rng, count, styles=styles, switching=switching, spurious=tied
        )
        if name == "pretrain":
            found[name] = [{"text": text} for text, _, _ in drawn]
        else:
            found[name] = [
                {"text": text, "label": LABELS[label]} for text, label, _ in drawn
            ]
    return found


def documents(
    made: World,
    rng: np.random.Generator,
    count: int,
    *,
    styles: str,
    switching: float,
    spurious: float,
) -> list[tuple[str, int, np.ndarray]]:
    """Return documents: the text, the number of its label, and its symbols `[n]`.

    switching: the probability that one switches style. spurious: that its mark is the
    label's own, and not just any.
    """
    labels = _uniform(rng, count, len(LABELS))
    sizes = SHORTEST + _uniform(rng, count, LONGEST + 1 - SHORTEST)
    symbols = np.zeros((count, LONGEST), np.int64)
    symbols[:, 0] = _uniform(rng, count, NUM_SYMBOLS)
    reached = np.cumsum(made.chains, axis=2)
    for place in range(1, LONGEST):
        row = reached[labels, symbols[:, place - 1], :-1]
        symbols[:, place] = (rng.random(count)[:, None] >= row).sum(1)
    first = _uniform(rng, count, len(styles))
    second = (first + 1 + _uniform(rng, count, len(styles) - 1)) % len(styles)
    switches = rng.random(count) < switching
    places = np.where(switches, 1 + _uniform(rng, count, sizes - 1), sizes)
    is_own = rng.random(count) < spurious
    marks = np.where(is_own, labels, _uniform(rng, count, len(MARKS)))
    found = []
    for n in range(count):
        held, place = symbols[n, : sizes[n]], places[n]
        text = _written(made, styles[first[n]], held[:place])
        if place < sizes[n]:
            text += " " + _written(made, styles[second[n]], held[place:])
        found.append((f"{text} {MARKS[marks[n]]}", int(labels[n]), held))
    return found


def posterior(made: World, symbols: np.ndarray) -> np.ndarray:
    """Return the probabilities of labels, `[labels]`, of symbols `[n]`."""
    logs = np.log(made.chains[:, symbols[:-1], symbols[1:]]).sum(1)
    logs = np.exp(logs - logs.max())
    return logs / logs.sum()


def _written(made: World, style: str, symbols: np.ndarray) -> str:
    _, between = STYLES[style]
    return between.join(made.letters[style][symbol] for symbol in symbols)


def _uniform(rng: np.random.Generator, count: int, limits) -> np.ndarray:
    """Return integers from 0 to below the limits, int64 `[count]`."""
    # By rng.random, whose numbers are the same with every NumPy.
    return (rng.random(count) * limits).astype(np.int64)
