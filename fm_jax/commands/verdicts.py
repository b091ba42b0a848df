"""fm classify: texts read, the label of each printed with its probability."""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax import jsonfiles
from fm_jax.errors import UserError, reason

NUM_ROWS = 32  # texts together
WIDTH = 32  # the fewest tokens of a row that a program is compiled for; then doubled
SHOWN = 60  # characters of a text


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Probabilities of a text's labels; was its end cut off for want of room?"""

    text: str
    probabilities: dict[str, float]
    is_cut: bool

    @property
    def label(self) -> str:
        return max(self.probabilities, key=self.probabilities.get)

    def as_line(self) -> str:
        """Return label, probability and the beginning of the text, tabs between."""
        text = " ".join(self.text.split())
        text = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
        return f"{self.label}\t{self.probabilities[self.label]:.4f}\t{text}"

    def as_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "label": self.label,
            "probability": self.probabilities[self.label],
            "probabilities": self.probabilities,
            "cut": self.is_cut,
        }


def run(flags: Any) -> None:
    """Print the verdicts that the flags of `fm classify` ask for.

    Raises UserError on a run that is no classifier, texts that cannot be read, and
    none.
    """
    from fm_jax import configfile
    from fm_jax.data import sides
    from fm_jax.runs import Run

    path = Path(flags.run).expanduser()
    record = configfile.read_run(Run(path))
    if not record["data"].get("labels"):
        raise UserError(
            f"--run must be a run that was tuned to classify; got {path}. Tune one: "
            "--config.data.examples=classify."
        )
    named = record["config"]["data"]["fields"]
    field = sides.fields("classify", [tuple(pair) for pair in named])["text"]
    texts = read_texts(flags.text, flags.input, field)
    from fm_jax.train import restore

    verdicts = of(restore.load(path, flags.step), texts)
    for number, verdict in enumerate(verdicts, 1):
        if verdict.is_cut:
            print(
                f"fm: text {number} is longer than data.max_length; its end is cut off",
                file=sys.stderr,
            )
        print(json.dumps(verdict.as_json()) if flags.json else verdict.as_line())


def of(held: Any, texts: Sequence[str]) -> list[Verdict]:
    """Return the verdict on each text of a run that was restored.

    Ids are made as in training, with data.prompt around the text; what is longer than
    data.max_length loses the end of the text. A verdict depends on its text alone: not
    on the others, nor on how many experts they fill. Raises UserError on a text that
    the tokenizer does not take.
    """
    from fm_jax.finetune import answers

    rows, cuts = _ids(held, texts)
    config = dataclasses.replace(held.config.model, expert_capacity=0.0)
    model = answers.model(config, held.answers)
    num_rows = min(NUM_ROWS, _bucket(len(rows), 1))
    num_rows = -(-num_rows // held.layout.mesh.size) * held.layout.mesh.size
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    for start in range(0, len(rows), num_rows):
        chosen = by_length[start : start + num_rows]
        batch = _padded([rows[index] for index in chosen], num_rows)
        with held.layout.active():
            probs_BC = _probabilities(model, held.params, batch, held.layout)
        for index, probs_C in zip(chosen, probs_BC, strict=False):  # then padding
            found[index] = probs_C
    labels = held.answers.labels
    return [
        Verdict(text, dict(zip(labels, map(float, probs_C), strict=True)), is_cut)
        for text, probs_C, is_cut in zip(texts, found, cuts, strict=True)
    ]


def read_texts(given: Sequence[str], file: str, field: str) -> list[str]:
    """Return the texts of flags and of a file.

    A .jsonl file has an object with `field` on each line, others a text. Raises
    UserError on a file that is not there or is something else, and where no text is.
    """
    found = list(given)
    if file:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--input must be a file of UTF-8 text; got {file!r} ({reason(error)})."
            ) from error
        numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
        if file.endswith(".jsonl"):
            found += [_field(line, field, f"{file}:{n}") for n, line in numbered]
        else:
            found += [line.rstrip("\r") for _, line in numbered]
    if not found:
        raise UserError("--text or --input must give a text; got none.")
    return found


def _field(line: str, field: str, where: str) -> str:
    try:
        found = jsonfiles.parse(line)
    except ValueError as error:
        raise UserError(f"{where} must be JSON; got {line[:40]!r}.") from error
    if not isinstance(found, dict) or not isinstance(found.get(field), str):
        raise UserError(
            f"{where} must be an object with a text `{field}`; got {line[:40]!r}."
        )
    return found[field]


def _ids(held: Any, texts: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
    """Return the ids of texts, as training has them, and which texts were cut."""
    from fm_jax.data import sides
    from fm_jax.data.examples import Maker

    data = held.config.data
    reader = sides.Reader("classify", sides.fields("classify", ()), prompt=data.prompt)
    maker = Maker(reader, held.tokenizer, data.max_length, "truncate", ("",))
    assert maker.begin_ids == held.begin_ids, (maker.begin_ids, held.begin_ids)
    made = maker.make(({"text": text, "label": ""}, f"text {n}")
                      for n, text in enumerate(texts, 1))  # fmt: skip
    return [one.segments[0].tokens for one in made], [one.is_cut for one in made]


def _padded(rows: Sequence[np.ndarray], num_rows: int) -> dict[str, np.ndarray]:
    """Return rows padded at their ends, to one of few widths, and more of one token."""
    tokens_BT = np.zeros((num_rows, _bucket(max(map(len, rows)), WIDTH)), np.int32)
    lengths_B = np.ones(num_rows, np.int32)
    for row, ids in enumerate(rows):
        tokens_BT[row, : len(ids)] = ids
        lengths_B[row] = len(ids)
    return {"tokens": tokens_BT, "lengths": lengths_B}


def _bucket(size: int, least: int) -> int:
    while least < size:
        least *= 2
    return least


def _probabilities(model: Any, params: dict, batch: dict, layout: Any) -> np.ndarray:
    """Return the probabilities of classes [B, C] of padded rows."""
    from fm_jax import sharding

    rows = sharding.put_batch(batch, len(batch["lengths"]), layout)
    return np.asarray(_compiled()(model, params, **rows))


@functools.cache
def _compiled():
    import jax
    import jax.numpy as jnp

    @functools.partial(jax.jit, static_argnums=0)
    def probabilities(model, params, tokens, lengths):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments_BT = (positions_BT < lengths[:, None]).astype(jnp.int32)
        x_BTD, _ = model.hidden(params, tokens, positions_BT, segments_BT)
        x_B1D = jnp.take_along_axis(x_BTD, lengths[:, None, None] - 1, axis=1)
        return jax.nn.softmax(model.logits(params, x_B1D)[:, 0], axis=-1)

    return probabilities
