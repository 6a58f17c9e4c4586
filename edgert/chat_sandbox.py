"""The Jinja environment chat templates run in, and what bounds them.

Owns: the globals, filters and tags that templates of published models use, and the limits.
Must not know messages. jinja2's own sandbox hides Python's internals and caps `range`, but nested
loops run for hours in it and `"x" * 10**9` takes all memory, both before any output could be
counted. So loops and calls take their steps from one allowance per rendering, and operations that
multiply a text or a number are checked before they run. It bounds mistakes and plain malice; it is
no replacement for a process with a memory limit.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, nodes, pass_context, pass_eval_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

__all__ = ["ALLOWANCE", "Allowance", "LimitError", "RefusedError", "make_environment"]

ALLOWANCE = " allowance"  # render with {ALLOWANCE: Allowance()}; no template can spell this name

_STEPS_MAX = 300_000  # a conversation of 1,000 messages takes some 10,000
_SECONDS_MAX = 5.0
_CHARS_MAX = 2**24  # of one text or printed list
_CHARS_PER_STEP = 4096  # copying long texts counts as steps
_ITEMS_MAX = 100_000
_BITS_MAX = 4096  # of a whole number
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(?:\d{6}|\*)")
_WIDE_BRACES = re.compile(r"\{[^{}]*(?:\d{6}|\{)")


class LimitError(TemplateError):
    """The template goes beyond its limits."""


class RefusedError(TemplateError):
    """The template called raise_exception: it does not accept these messages."""


class Allowance:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self._left = _STEPS_MAX
        self._deadline = time.monotonic() + _SECONDS_MAX

    def take(self, chars: int = 0) -> None:
        """Use one step, and more for handling `chars` characters. Raises `LimitError`."""
        if chars > _CHARS_MAX:
            raise LimitError(f"it makes a text of more than {_CHARS_MAX:,} characters")
        self._left -= 1 + chars // _CHARS_PER_STEP
        if self._left < 0:
            raise LimitError(f"it takes more than {_STEPS_MAX:,} steps")
        if time.monotonic() > self._deadline:
            raise LimitError(f"it runs for more than {_SECONDS_MAX:.0f} seconds")


def make_environment() -> Environment:
    """An environment for templates; white space is treated as Transformers does."""
    environment = _ChatEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
        extensions=[LoopControlExtension, _GenerationTag],
    )
    environment.globals["raise_exception"] = _refuse
    del environment.globals["lipsum"]  # makes as much text as it is asked for
    filters = environment.filters
    filters["edgert_steps"] = _steps
    filters["edgert_concat"] = _concat
    filters["tojson"] = _to_json
    filters["format"] = _format
    filters["join"] = _join(filters["join"])
    filters["string"] = lambda value: str(_printable(value))
    filters["replace"] = _replace
    for name in ("center", "indent", "wordwrap", "batch", "slice"):
        filters[name] = _narrow(filters[name])
    return environment


class _ChatEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Bounding().visit(tree)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        chars = 0
        if operator == "%":
            if isinstance(left, str):
                _check_format(left, _WIDE_PERCENT, left.count("%"), right)
        elif operator == "+":
            if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
                chars = len(left) + len(right)
        else:
            _check_product(operator, left, right)
        _allowance(context).take(chars)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        _allowance(__context).take()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_method(owner, method.__name__, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


class _GenerationTag(Extension):
    """{% generation %} marks what an assistant says, for training; here it only passes through."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounding(NodeTransformer):
    """Leads every loop and every `~` of a template through the filters below."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        if node.recursive:
            raise LimitError(f"line {node.lineno} has a recursive loop, which is not supported")
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "edgert_steps")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "edgert_concat")


def _filtered(expression: nodes.Node, name: str) -> nodes.Expr:
    return nodes.Filter(expression, name, [], [], None, None, lineno=expression.lineno)


def _allowance(context: Context) -> Allowance:
    allowance = context.parent[ALLOWANCE]
    assert isinstance(allowance, Allowance)
    return allowance


@pass_context
def _steps(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    allowance = _allowance(context)
    for item in items:
        allowance.take()
        yield item


@pass_context
def _concat(context: Context, parts: list[Any]) -> str:
    texts = [str(_printable(part)) for part in parts]
    _allowance(context).take(sum(map(len, texts)))
    return "".join(texts)


def _printable(value: Any) -> Any:
    """The value itself, once it is certain that its text is not too long."""
    if isinstance(value, (list, tuple, Mapping)):
        _check_size(value)
    return value


def _check_size(*values: Any) -> None:
    """Raise `LimitError` when the texts inside, counted as often as they occur, are too long."""
    left = _CHARS_MAX
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        left -= len(value) if isinstance(value, str) else 4
        if isinstance(value, Mapping):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        if left < 0 or len(waiting) > _CHARS_MAX // 4:
            raise LimitError(f"it makes a text of more than {_CHARS_MAX:,} characters")


def _check_product(operator: str, left: Any, right: Any) -> None:
    for text, times in ((left, right), (right, left)):
        if isinstance(text, (str, list, tuple)) and isinstance(times, int):
            most = _CHARS_MAX if isinstance(text, str) else _ITEMS_MAX
            if len(text) * times > most:
                raise LimitError(f"it repeats a text or list to more than {most:,}")
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length()
        if bits + right.bit_length() > _BITS_MAX:
            raise LimitError(f"it computes a number of more than {_BITS_MAX:,} bits")


def _check_format(form: str, wide: re.Pattern[str], fields: int, values: Any) -> None:
    _check_size(form, values)
    if wide.search(form):
        raise LimitError("a field of a format is too wide")
    if fields > 100:
        raise LimitError("a format has more than 100 fields")


def _check_method(owner: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Texts that a method of a text could make too long."""
    if name in ("format", "format_map"):
        _check_format(owner, _WIDE_BRACES, owner.count("{"), [args, kwargs])
    elif name in ("ljust", "rjust", "center", "zfill", "expandtabs"):
        if any(isinstance(arg, int) and arg > _ITEMS_MAX for arg in (*args, *kwargs.values())):
            raise LimitError("a text is padded too far")
    elif name == "replace" and len(args) >= 2:
        _check_replace(owner, args[0], args[1])
    elif name == "join" and args:
        _check_join(owner, args[0])


def _check_replace(text: str, old: Any, new: Any) -> None:
    old, new = str(old), str(new)
    found = text.count(old) if old else len(text) + 1
    if len(text) + found * len(new) > _CHARS_MAX:
        raise LimitError(f"it makes a text of more than {_CHARS_MAX:,} characters")


def _check_join(separator: Any, items: Any) -> None:
    _check_size(items)
    if isinstance(items, (list, tuple, str)) and len(items) * len(str(separator)) > _CHARS_MAX:
        raise LimitError(f"it makes a text of more than {_CHARS_MAX:,} characters")


def _refuse(message: object) -> NoReturn:
    raise RefusedError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Transformers': no HTML escapes, non-ASCII characters as they are."""
    _check_size(value)
    if indent is not None and indent > 100:
        raise LimitError("JSON is indented too far")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _format(form: Any, *args: Any, **kwargs: Any) -> str:
    values = kwargs or args
    _check_format(str(form), _WIDE_PERCENT, str(form).count("%"), values)
    return str(form) % values


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    _check_replace(str(text), old, new)
    return str(text).replace(str(old), str(new), -1 if count is None else count)


def _join(plain: Callable[..., str]) -> Callable[..., str]:
    """jinja2's filter `join`, with the size of its result checked first."""

    @pass_eval_context
    def join(context: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
        items = value if isinstance(value, (str, Mapping)) else list(value)
        _check_join(d, items)
        return plain(context, items, d, attribute)

    return join


def _narrow(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pads, with the widths it is given checked first."""

    def narrow(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(arg, int) and arg > 10_000 for arg in (*args, *kwargs.values())):
            raise LimitError("a text is padded too far")
        return plain(*args, **kwargs)

    return wraps(plain)(narrow)  # also carries over what jinja2 is to pass first
