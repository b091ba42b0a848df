"""Jinja as chat templates have it: sandboxed, for they come from strangers."""

import datetime
import json

from fm_jax.errors import UserError


def environment(marks: tuple[str, str], today: datetime.datetime | None):
    """Return what a template may use, as `transformers` has it.

    marks: what is written before and after the text of a generation block. The
    environment's `has_generation` becomes True where a template has one.
    """
    jinja2 = library()
    from jinja2 import nodes, sandbox
    from jinja2.ext import Extension

    class Generation(Extension):
        """Takes the block that marks an assistant's text in training."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            self.environment.has_generation = True
            begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in marks)
            return nodes.Scope([begin, *body, end]).set_lineno(line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(
        value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(form):
        return (today or datetime.datetime.now()).strftime(form)

    found = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    found.has_generation = False
    found.filters["tojson"] = tojson
    found.globals["raise_exception"] = raise_exception
    found.globals["strftime_now"] = strftime_now
    return found


def library():
    """Return the jinja2 package. Raises UserError where it is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise UserError(
            "chats need jinja2, which is not installed. pip install 'fm_jax[serve]'"
        ) from error
    return jinja2
