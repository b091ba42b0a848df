"""Chat templates: messages into the text that a model is tuned on.

A template is Jinja, as the `transformers` library renders it: sandboxed, for it comes
with the weights of a stranger.
"""

import datetime
import json
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fm_jax import jsonfiles
from fm_jax.errors import UserError, reason
from fm_jax.tokenizers import jinja, limits, special
from fm_jax.tokenizers.protocol import Tokenizer

FILE = "chat_template.jinja"
# What else a template that is none ends in: nested too deep, numbers too long.
BROKEN = (RecursionError, MemoryError, SyntaxError, ValueError)
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
           "mask_token")  # fmt: skip
# What `Template.text` begins with.
SETTINGS = re.compile(r'(?:\{% set \w+ = "(?:[^"\\]|\\.)*" %\})+\n')
NAMED = {"name": str, "template": str}  # where there are several
# What serves a tokenizer that has no template. A chat begins as a document does, and
# what an assistant says ends as one.
PLAIN = """\
{{ bos_token }}
{%- for message in messages %}
{{- "" if loop.first else "\\n\\n" }}
{%- if message.role == "assistant" %}
{{- "Assistant:\\n" }}
{%- generation %}
{{- message.content }}{{ eos_token }}
{%- endgeneration %}
{%- elif message.role == "system" or message.role == "user" %}
{{- message.role | capitalize }}{{ ":\\n" }}{{ message.content }}
{%- else %}
{{- raise_exception("roles are system, user and assistant") }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "\\n\\nAssistant:\\n" }}
{%- endif %}
"""

Message = dict[str, Any]


class Declined(UserError):
    """Messages that a template does not take; `said` are its own words."""

    def __init__(self, said: str):
        super().__init__(
            f"messages must be what the chat template takes; it says: {said}"
        )
        self.said = said


class Template:
    """A chat template with the special tokens that it may name.

    Raises UserError when jinja2 is not installed or `source` is not a template; `where`
    is the file that it was read from. `today`: the day that `strftime_now` tells, by
    default that of the rendering.
    """

    def __init__(
        self,
        source: str,
        special_tokens: dict[str, str],
        where: Path | str,
        *,
        today: datetime.datetime | None = None,
    ):
        self._source, self._special_tokens = source, special_tokens
        self._where, self._today = where, today
        self._plain, self.has_marks = self._compiled(marks=("", ""))

    def render(
        self,
        messages: Sequence[Message],
        values: dict[str, Any] | None = None,
        *,
        generation_prompt: bool = True,
    ) -> str:
        """Return the text of a chat, up to where the answer begins where there is one.

        values: what else the template knows by name. Raises Declined when the template
        does not take the messages.
        """
        return self._render(self._plain, messages, values or {}, generation_prompt)

    def marked(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """Return a chat as pieces (text, is in a `{% generation %}` block), in order.

        Raises Declined as `render` does, and UserError on a template that changes what
        it has marked.
        """
        (begin, end), compiled = self._marked
        text = self._render(compiled, messages, {}, False)
        first, *rest = text.split(begin)
        pieces, is_whole = [(first, False)], end not in first
        for part in rest:
            inside, found, outside = part.partition(end)
            pieces += [(inside, True), (outside, False)]
            is_whole &= bool(found) and end not in outside
        whole = self.render(messages, generation_prompt=False)
        if not is_whole or "".join(piece for piece, _ in pieces) != whole:
            raise UserError(
                "a chat template must write what is in its generation blocks once "
                f"and whole; got {self._where}, which changes it."
            )
        return [piece for piece in pieces if piece[0]]

    @property
    def text(self) -> str:
        """The template by itself: special tokens that it names are set in it."""
        return self._settings + self._source

    @property
    def where(self) -> str:
        """The file that it was read from, in words."""
        return str(self._where)

    @property
    def _settings(self) -> str:
        if SETTINGS.match(self._source):  # it is by itself already
            return ""
        named = {
            name: token
            for name, token in self._special_tokens.items()
            if re.search(rf"\b{name}\b", self._source)
        }
        sets = "".join(
            f"{{% set {name} = {json.dumps(token, ensure_ascii=False)} %}}"
            for name, token in named.items()
        )
        return f"{sets}\n" if sets else ""  # a line end after a block is not rendered

    @cached_property
    def _marked(self) -> tuple[tuple[str, str], Any]:
        nonce = secrets.token_hex(8)  # text that no message has
        marks = f"\ufdd0{nonce}", f"\ufdd1{nonce}"
        return marks, self._compiled(marks=marks)[0]

    def _compiled(self, *, marks: tuple[str, str]) -> tuple[Any, bool]:
        """Return the compiled template, and whether it has generation blocks."""
        library = jinja.library()
        environment = jinja.environment(marks, self._today)
        try:
            found = environment.from_string(self._source)
        except (library.TemplateError, *BROKEN) as error:
            raise UserError(
                f"a chat template must be Jinja; got {self._where} ({reason(error)})."
            ) from error
        return found, environment.has_generation

    def _render(self, compiled, messages, values, generation_prompt: bool) -> str:
        try:
            with limits.counted():
                return compiled.render(
                    **self._special_tokens
                    | values
                    | {
                        "messages": [_both_names(message) for message in messages],
                        "tools": None,
                        "documents": None,
                        "add_generation_prompt": generation_prompt,
                    }
                )
        except Exception as error:  # a template can fail as any program can
            raise Declined(reason(error)[:300]) from error


def plain(tokenizer: Tokenizer, **how: Any) -> Template:
    """Return the template that serves any tokenizer; `how` as of `Template`."""
    return Template(PLAIN, named_tokens(tokenizer), "the plain chat template", **how)


def named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the beginning and the end of a tokenizer's text, by templates' names."""
    return {
        "bos_token": special.begin_token(tokenizer),
        "eos_token": special.end_token(tokenizer),
    }


def find(
    folder: Path, tokens: dict[str, str] | None = None, **how: Any
) -> Template | None:
    """Return the template beside a tokenizer's files, or None where there is none.

    tokens: special tokens, where the files do not say them; `how` as of `Template`.
    Raises UserError on a file that is not what it should be.
    """
    kept = jsonfiles.read(folder / "tokenizer_config.json", must=False)
    tokens = (tokens or {}) | special_tokens(folder)
    beside = folder / FILE
    if beside.exists():
        return Template(read(beside), tokens, beside, **how)
    older = jsonfiles.read(folder / "chat_template.json", must=False)
    source = kept.get("chat_template") or older.get("chat_template")
    where = str(folder / "tokenizer_config.json")
    jsonfiles.check(source, (None, str, [NAMED]), f"the chat template of {where}")
    if isinstance(source, list):  # several, by name
        named = {one["name"]: one["template"] for one in source}
        source = named.get("default")
    if not source:
        return None
    return Template(source, tokens, folder / "tokenizer_config.json", **how)


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens of a tokenizer_config.json by their names."""
    kept, found = jsonfiles.read(folder / "tokenizer_config.json", must=False), {}
    for name in SPECIAL:
        token = kept.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def read(file: Path) -> str:
    """Return the text of a template's file. Raises UserError where it is none."""
    try:
        return jsonfiles.text(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"a chat template must be a text file; got {file} ({reason(error)})."
        ) from error


def _both_names(message: Message) -> Message:
    """Return a message whose reasoning stands under both names that templates use."""
    reasoning = message.get("reasoning_content")
    return ({"thinking": reasoning} if reasoning is not None else {}) | message
