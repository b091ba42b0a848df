"""Jinja as chat templates have it: sandboxed, for they come from strangers."""

import datetime
import json

from fm_jax.errors import UserError
from fm_jax.tokenizers import limits


def environment(marks: tuple[str, str], today: datetime.datetime | None):
    """Return what a template may use, as `transformers` has it.

    marks: what is written before and after the text of a generation block. The
    environment's `has_generation` becomes True where a template has one.
    """
    jinja2 = library()
    from jinja2 import nodes, sandbox, visitor
    from jinja2.ext import Extension

    class Limited(sandbox.ImmutableSandboxedEnvironment):
        """Refuses what would take for ever, or all memory."""

        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def call_binop(self, context, operator, left, right):
            limits.check_operator(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context, __obj, *args, **kwargs):
            name = getattr(__obj, "__name__", "")
            owner = getattr(__obj, "__self__", None)
            limits.check_use(name, owner, (*args, *kwargs.values()))
            return limits.small(super().call(__context, __obj, *args, **kwargs))

        def compile(self, source, *rest, **how):
            if isinstance(source, str):
                if len(source) > limits.MOST_SOURCE:
                    raise jinja2.TemplateError("it has too many letters")
                source = Counting().visit(self.parse(source))
            return super().compile(source, *rest, **how)

    class Generation(Extension):
        """Takes the block that marks an assistant's text in training."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            self.environment.has_generation = True
            begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in marks)
            return nodes.Scope([begin, *body, end]).set_lineno(line)

    class Limits(Extension):
        """What a template calls that has been through Counting."""

        step = staticmethod(limits.step)
        small = staticmethod(limits.small)

        def of(self, name, *given):
            return self.call_method(name, list(given))

    class Counting(visitor.NodeTransformer):
        """Puts calls into a template that count its steps and weigh what it makes."""

        def _of_steps(self, node):
            node = self.generic_visit(node)
            letters = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
            call = found.extensions[Limits.identifier].of("step", nodes.Const(letters))
            node.body.insert(0, nodes.ExprStmt(call))
            return node

        visit_For = visit_Macro = visit_CallBlock = _of_steps

        def _weighed(self, node):
            node = self.generic_visit(node)
            if getattr(node, "ctx", "load") != "load":
                return node
            return found.extensions[Limits.identifier].of("small", node)

        visit_List = visit_Tuple = visit_Dict = _weighed

        def visit_Concat(self, node):
            node = self.generic_visit(node)
            weigh = found.extensions[Limits.identifier].of
            node.nodes = [weigh("small", one) for one in node.nodes]
            return weigh("small", node)

        def visit_AssignBlock(self, node):
            node, target = self.generic_visit(node), node.target
            if isinstance(target, nodes.NSRef):
                name = nodes.Name(target.name, "load")
                value = nodes.Getattr(name, target.attr, "load")
            else:
                value = nodes.Name(target.name, "load")
            weigh = found.extensions[Limits.identifier].of("small", value)
            return [node, nodes.ExprStmt(weigh)]

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

    found = Limited(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, Limits, "jinja2.ext.loopcontrols"],
        finalize=limits.written,
    )
    found.has_generation = False
    found.filters["tojson"] = tojson
    for name, function in found.filters.items():
        found.filters[name] = limits.limited(name, function)
    del found.globals["lipsum"]  # text at random, any amount of it
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
