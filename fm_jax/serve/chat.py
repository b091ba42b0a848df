"""The chat template of a run: where it is, and messages into its ids."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fm_jax.errors import UserError
from fm_jax.hf import carried
from fm_jax.runs import Run
from fm_jax.serve.refused import Refused, must
from fm_jax.tokenizers import template as templates
from fm_jax.tokenizers.template import Template


def find(folder: Path, file: str = "") -> Template | None:
    """Return the template in `file`, else that of a run.

    A run that was tuned has its own, one imported from Hugging Face what came with it.
    `folder` is the run's. Raises UserError on a file that is not there or is not what
    it should be.
    """
    kept = folder / "hf"
    if file:
        tokens = templates.special_tokens(kept)
        return Template(templates.read(Path(file)), tokens, Path(file))
    own = folder / templates.FILE
    if own.exists():
        return Template(templates.read(own), templates.special_tokens(kept), own)
    return templates.find(kept)


def begin_ids(folder: Path, of_texts: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ids that stand before a chat, beside what its template says.

    of_texts: those before a text. The template of others, and that which a run was
    tuned with, says itself what a chat begins with.
    """
    is_imported = carried.origin_of(Run(folder)) is not None
    return () if is_imported or (folder / templates.FILE).exists() else of_texts


def render(template: Template, messages: Sequence[dict], values: dict[str, Any]) -> str:
    """Return the text of a chat up to where the answer begins.

    Raises Refused when the template does not take the messages, in its own words.
    """
    if taken := sorted(values.keys() & {*templates.RESERVED}):
        raise must("chat_template_kwargs", f"leave out {taken[0]}", values)
    try:
        return template.render(messages, values)
    except UserError as error:
        raise Refused(str(error), param="messages") from error


def ids(
    text: str, encode_special: Callable[[str], list[int]], begin: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the ids of a chat's text, with `begin` before them, once.

    Raises UserError on text that the tokenizer does not take.
    """
    found = tuple(encode_special(text))
    return found if found[: len(begin)] == begin else begin + found
