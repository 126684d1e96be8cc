"""Turns a conversation into a prompt's text by the model's own chat template, a program that nobody here has read.

The template runs in jinja's immutable sandbox, with budgets on processor time and on what it makes. Knows nothing of
tokenizers or models. Imports jinja2 and errors.
"""

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from types import MappingProxyType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from tfinfer.errors import CorruptModelError, InputError, ModelError, UnsafeModelError

MAX_TEMPLATE = 64 * 1024  # characters of source
MAX_OUTPUT = 1024 * 1024  # characters of rendered text, and of messages
_MAX_SECONDS = 1.0  # of this thread's processor time, so that a busy machine refuses nothing
_MAX_VALUE = 4 * MAX_OUTPUT  # characters in one value, each element counted as _ELEMENT
_MAX_MADE = 64 * MAX_OUTPUT  # the same over everything that one rendering makes
_MAX_BITS = 4096  # of an integer
_ELEMENT = 16

# What makes something as large as one operand times another; that is estimated before it happens.
_AMPLIFIERS = {"batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust"}
_AMPLIFIERS |= {"round", "slice", "to_bytes", "tojson", "translate", "zfill"}
_UNNEEDED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")  # slow on hostile text; no prompt has them
_WIDTH = re.compile(r"[%)][^a-zA-Z%)]*(?:\d{4}|\*)")  # '%9999999d' is a short text that makes a long one


class _Exhausted(Exception):
    """The template does more than a prompt can need."""


class _Raised(Exception):
    """The template called raise_exception."""


class ChatTemplate:
    """A chat template, compiled once; `render` may be called from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE:
            got = f"{len(source)}" if isinstance(source, str) else type(source).__name__
            raise CorruptModelError(f"chat template: expected a text of at most {MAX_TEMPLATE} characters; got {got}")
        if not all(isinstance(item, str) for pair in special_tokens.items() for item in pair):
            raise CorruptModelError(f"chat template: expected special tokens to be strings; got {special_tokens!r}")
        self._special_tokens = dict(special_tokens)
        try:
            self._code = _BudgetedEnvironment().compile(source)
        except Exception as cause:  # besides its own errors jinja lets those of Python's compiler through
            raise CorruptModelError(f"chat template: does not compile: {_brief(cause)}") from cause

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the prompt of `messages`, a list of {"role": ..., "content": ...}."""
        variables = self._special_tokens | {
            "messages": _check_messages(messages),
            "tools": _check_tools(tools),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        try:
            return self._run(variables)
        except SecurityError as cause:
            raise UnsafeModelError(f"chat template: tries to leave its sandbox: {_brief(cause)}") from cause
        except _Raised as cause:
            raise InputError(f"chat template: refuses these messages: {cause}") from cause
        except _Exhausted as cause:
            raise ModelError(f"chat template: {cause}; the folder's template is broken or hostile") from cause
        except Exception as cause:  # the template is a program; whatever it does wrong ends here
            raise ModelError(f"chat template: fails on these messages: {_brief(cause)}") from cause

    def _run(self, variables: Mapping[str, Any]) -> str:
        environment = _BudgetedEnvironment()  # one per rendering, since it holds the budgets
        environment.learn(variables["messages"])
        template = jinja2.Template.from_code(environment, self._code, environment.make_globals(None))
        pieces, size = [], 0
        for piece in template.generate(variables):
            size += len(piece)
            if size > MAX_OUTPUT:
                raise _Exhausted(f"writes more than {MAX_OUTPUT} characters")
            pieces.append(piece)
        return "".join(pieces)


def _check_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"messages: expected a list of at least one message; got {_shorten(messages)}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"messages[{index}]: expected a mapping with role and content; got {_shorten(message)}")
        if not isinstance(message.get("role"), str):
            raise InputError(f"messages[{index}]: expected a string as role; got {_shorten(message.get('role'))}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise InputError(f"messages[{index}]: expected a string as content; got {_shorten(content)}")
    size = sum(len(message.get("content") or "") for message in messages)
    if size > MAX_OUTPUT:
        raise InputError(f"messages: expected at most {MAX_OUTPUT} characters in all; got {size}; leave some out")
    return [dict(message) for message in messages]


def _check_tools(tools: object) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"tools: expected a list of mappings or None; got {_shorten(tools)}")
    return [dict(tool) for tool in tools]


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _brief(cause: BaseException) -> str:
    line = getattr(cause, "lineno", None)
    text = f"{type(cause).__name__}: {cause}"[:300]
    return f"line {line}: {text}" if line else text


class _BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that also counts: every turn of a loop, call, filter and operator looks at the clock and at its result.

    A value is refused when it is too large as a whole, so that what one operation can do stays small; all values
    together are counted, so that memory stays bounded.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
            finalize=self.show,
        )
        self._end = time.thread_time() + _MAX_SECONDS
        self._made = 0
        self._known: dict[int, int] = {}  # the weight of each message, by identity: they live as long as this
        for name in _UNNEEDED_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = _to_json
        self.filters = {name: self._watch(name, function) for name, function in self.filters.items()}
        del self.globals["lipsum"]
        self.globals |= {"namespace": _Namespace, "raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Instrument().visit(tree)
        tree.set_environment(self)
        return tree

    def learn(self, messages: list[dict[str, Any]]) -> None:
        """Weigh the messages once; templates copy lists of them in every turn of a loop."""
        self._known = {id(message): _weigh(message) for message in messages}

    def turn(self, size: int) -> bool:
        """Charge one turn of a loop or one macro call, and the template's own text in it."""
        self._charge(size)
        return True

    def keep(self, value: Any) -> Any:
        """Charge a list, tuple or mapping that the template wrote out."""
        return value  # `call` has weighed it

    def concatenate(self, *values: Any) -> str:
        """Do what `~` does, but stop before the whole is too large."""
        pieces, size = [], 0
        for value in values:
            pieces.append(str(value))
            size += len(pieces[-1])
            _check_size(size)
        return "".join(pieces)

    def show(self, value: Any) -> str:
        """Charge what an expression writes; some of it is captured by macros and set blocks, never seen outside."""
        text = str(value)
        self._charge(len(text))
        return text

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(__obj, "__name__", "")
        given = [value for key, value in kwargs.items() if not key.startswith("_")]  # jinja adds its own variables
        _before(name, [getattr(__obj, "__self__", None), *args, *given])
        return __self._admit(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str | bytes):
            _before("format", [left, right])
        elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            _check_product([left, right])
        return self._admit(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text, is_map = value.__self__, value.__name__ == "format_map"

        def formatted(*args: Any, **kwargs: Any) -> str:
            if is_map:
                (kwargs,) = args
            given = {key: value for key, value in kwargs.items() if not key.startswith("_")}
            _check_product([text, *args, *given.values()])
            return _Formatter(self).vformat(text, () if is_map else args, given)

        return formatted

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        # jinja would return a value that fails only when it is used; the attempt itself is reason to stop.
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__!r} object")

    def _watch(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # keeps jinja's mark of who is passed the context
        def watched(*args: Any, **kwargs: Any) -> Any:
            if name == "join":  # its elements may come one by one from where nobody has weighed them
                args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
            _before(name, [*args, *kwargs.values()])
            return self._admit(function(*args, **kwargs))

        return watched

    def _admit(self, value: Any) -> Any:
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise _Exhausted(f"computes an integer of more than {_MAX_BITS} bits")
        if isinstance(value, str | bytes):
            self._charge(_weigh(value))
        elif isinstance(value, Collection) and not isinstance(value, range):
            _weigh(value, self._known)
            self._charge(_ELEMENT * len(value))
        else:
            self._charge(1)
        return value

    def _charge(self, size: int) -> None:
        self._made += size
        if self._made > _MAX_MADE:
            raise _Exhausted(f"makes more than {_MAX_MADE} characters on the way")
        if time.thread_time() > self._end:
            raise _Exhausted(f"runs for more than {_MAX_SECONDS:g} s")


class _Instrument(NodeTransformer):
    """Puts the calls that count into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:  # a test that is never true would keep the body from counting
            node.test = nodes.And(_call("turn", [nodes.Const(1)], node), node.test, lineno=node.lineno)
        return self._count_body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        return self._count_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        return self._count_body(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("concatenate", node.nodes, node)

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else _call("keep", [node], node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _call("keep", [node], node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _call("keep", [node], node)

    def _count_body(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        texts = [text.data for text in node.find_all(nodes.TemplateData)]
        texts += [const.value for const in node.find_all(nodes.Const) if isinstance(const.value, str)]
        size = nodes.Const(sum(map(len, texts)) + _ELEMENT)
        node.body.insert(0, nodes.ExprStmt(_call("turn", [size], node), lineno=node.lineno))
        return node


def _call(method: str, arguments: list[nodes.Expr], at: nodes.Node) -> nodes.Call:
    """Return the node that calls a method of the environment; templates themselves cannot name it."""
    call = nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)
    return call.set_lineno(at.lineno)  # type: ignore[return-value]


class _GenerationTag(Extension):
    """Lets {% generation %} ... {% endgeneration %} pass, which marks the answers in templates meant for training."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if re.search(r"\d{4}", format_spec):
            raise _Exhausted("formats with a width of four digits or more")
        return str(super().format_field(value, format_spec))


class _Namespace(Namespace):
    def __repr__(self) -> str:  # jinja's shows what is inside, which can be nested without end
        return "<Namespace>"


def _raise_exception(message: object) -> None:
    raise _Raised(str(message))


def _strftime_now(form: str) -> str:
    _before("format", [form])
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is; jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _before(name: str, operands: list[Any]) -> None:
    """Refuse an operation whose result would be out of proportion before it is made."""
    if name not in _AMPLIFIERS:
        return
    if name == "format" and isinstance(operands[0], str | bytes) and _WIDTH.search(str(operands[0])):
        raise _Exhausted("formats with a width of four digits or more")
    _check_product(operands)


def _check_product(operands: list[Any]) -> None:
    machinery = (jinja2.Environment, Context, nodes.EvalContext)
    sizes = sorted(_magnitude(operand) for operand in operands if not isinstance(operand, machinery))
    if len(sizes) > 1 and sizes[-1] * sizes[-2] > _MAX_MADE:
        raise _Exhausted(f"makes more than {_MAX_MADE} characters at once")


def _magnitude(value: Any) -> int:
    return max(1, abs(value) if isinstance(value, int) else _weigh(value))


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > _MAX_BITS:
        raise _Exhausted(f"computes an integer of more than {_MAX_BITS} bits")


def _weigh(value: Any, known: Mapping[int, int] = MappingProxyType({})) -> int:
    """Return the size of a value written out; one object that stands in many places counts in each."""
    size, rest = 0, [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str | bytes):
            size += len(item)
        elif id(item) in known:
            size += known[id(item)]
        elif isinstance(item, Collection):
            size += _ELEMENT * len(item)
            _check_size(size)
            if not isinstance(item, range):
                rest.extend(item)
            if isinstance(item, Mapping):
                rest.extend(item.values())
        _check_size(size)
    return size


def _check_size(size: int) -> None:
    if size > _MAX_VALUE:
        raise _Exhausted(f"makes a value of more than {_MAX_VALUE} characters")
