"""Gates put into the source of a block's methods: the second way to convert, which keeps all that a forward does.

An addition is known by its place, the characters of the source that the running code belongs to. The method is compiled
again with a call of the gate in that place, and with nothing else changed: control flow, random numbers, contexts and
values that a forward keeps are what they were.
"""

import __future__

import ast
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from cmpe_se.conversion.unconvertible import Unconvertible

_FUTURE = functools.reduce(
    int.__or__,
    (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names if name != "nested_scopes"),
)
"""Compiler's flags of ``from __future__ import``."""


class Place(NamedTuple):
    """Where in the methods of a class something is written.

    Args:
        method: name of the method.
        start: line in its file and column, counted in bytes.
        end: likewise, of what follows.
    """

    method: str
    start: tuple[int, int]
    end: tuple[int, int]


class Edit(NamedTuple):
    """An addition that becomes a call of a gate.

    Args:
        place: of the addition.
        child: name of the gate among the block's children.
        residual_argument: 0 or 1, which of its operands is the residual.
    """

    place: Place
    child: str
    residual_argument: int


def place_in(kind: type[nn.Module], frame: FrameType | None) -> Place | None:
    """The place in the methods of a class that called a function of PyTorch's; None if something else called it."""
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("torch.", f"{__package__}.")):
        frame = frame.f_back
    if frame is None or sys.version_info < (3, 11):  # older ones know the line alone
        return None
    method = _methods(kind).get(frame.f_code)  # type: ignore[arg-type]
    positions = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    if method is None or None in positions:
        return None
    line, last_line, column, last_column = positions
    return Place(method, (line, column), (last_line, last_column))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _methods(kind: type[nn.Module]) -> dict[CodeType, str]:
    """Names of the methods that a class finds under their names, by their code and that of functions inside them."""
    methods: dict[CodeType, str] = {}
    for name in dir(kind):
        function = inspect.getattr_static(kind, name)
        if isinstance(function, FunctionType):
            methods |= dict.fromkeys(_codes(function.__code__), name)
    return methods


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def rewritten(kind: type[nn.Module], edits: list[Edit]) -> dict[str, str]:
    """Source of the methods that hold the additions, with calls of gates in their places.

    Raises:
        Unconvertible: there is no source, it is not what runs, or it writes the addition in a way that is not known.
    """
    methods = {edit.place.method for edit in edits}
    return {name: _rewritten(kind, name, [edit for edit in edits if edit.place.method == name]) for name in methods}


def _rewritten(kind: type[nn.Module], name: str, edits: list[Edit]) -> str:
    function = inspect.getattr_static(kind, name)
    definition = _definition(function)
    arguments = [*definition.args.posonlyargs, *definition.args.args]
    if not arguments or _is_bound_again(definition, arguments[0].arg):
        raise Unconvertible(f"its {name} does not keep what it calls {arguments[0].arg if arguments else 'self'}")
    editor = _Editor(arguments[0].arg, {(edit.place.start, edit.place.end): edit for edit in edits})
    definition = editor.visit(definition)
    if editor.edits:
        raise Unconvertible(f"its {name} writes the addition in a way that is not known")
    return ast.unparse(ast.fix_missing_locations(definition))


def _definition(function: FunctionType) -> ast.FunctionDef:
    """A method's definition, with the places that it has in its file.

    Raises:
        Unconvertible: there is none, or the file is not what was compiled.
    """
    code = function.__code__
    try:
        text = "".join(inspect.findsource(function)[0])
        tree = ast.parse(text)
        whole = compile(text, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    except (OSError, SyntaxError, ValueError):
        raise Unconvertible(f"there is no source of its {function.__name__}") from None
    if not any(_same_code(other, code) for other in _codes(whole) if other.co_firstlineno == code.co_firstlineno):
        raise Unconvertible(f"the source of its {function.__name__} is not what runs")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first == code.co_firstlineno:
                node.decorator_list = []  # what they made of it is the function itself
                return node
    raise Unconvertible(f"there is no source of its {function.__name__}")


def compiled(source: str, function: FunctionType, kind: type[nn.Module], file: str = "<source>") -> FunctionType:
    """A function in the place of another: with its globals, its defaults and what it closes over.

    Args:
        source: its definition.
        function: the one that it replaces.
        kind: class of that; where the source asks for ``super()``, it is the class that the function knows.
        file: name of the code's file.
    """
    code = function.__code__
    owner = code.co_qualname.rpartition(".")[0].rpartition(".")[2]
    owner = owner if owner.isidentifier() else kind.__name__
    # In a class, for the sake of __private names and super(); in a function that has what it closes over.
    tree = ast.parse(f"class {owner}:\n  pass")
    tree.body[0].body = ast.parse(source).body  # type: ignore[attr-defined]
    if closed_over := [name for name in code.co_freevars if name != "__class__"]:
        inside = tree.body if owner in closed_over else [ast.Global([owner]), *tree.body]
        tree = ast.parse(f"def outside({', '.join(name for name in closed_over if name != owner)}): pass")
        tree.body[0].body = inside  # type: ignore[attr-defined]
    whole = compile(ast.fix_missing_locations(tree), file, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    new = next(inner for inner in _codes(whole) if inner.co_name == code.co_name)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    if missing := [name for name in new.co_freevars if name not in cells]:
        raise Unconvertible(f"its {code.co_name} closes over {missing[0]}, which it did not before")
    closure = tuple(cells[name] for name in new.co_freevars)
    again = FunctionType(new, function.__globals__, function.__name__, function.__defaults__, closure)
    again.__kwdefaults__ = function.__kwdefaults__
    for name in functools.WRAPPER_ASSIGNMENTS:
        setattr(again, name, getattr(function, name))
    return again


def _same_code(one: CodeType, other: CodeType) -> bool:
    """Whether two functions do the same, wherever they are written."""
    inner = [[constant for constant in code.co_consts if isinstance(constant, CodeType)] for code in (one, other)]
    plain = [
        [repr(constant) for constant in code.co_consts if not isinstance(constant, CodeType)] for code in (one, other)
    ]
    same = (
        one.co_name == other.co_name
        and one.co_code == other.co_code
        and one.co_names == other.co_names
        and one.co_varnames == other.co_varnames
    )
    return same and plain[0] == plain[1] and len(inner[0]) == len(inner[1]) and all(map(_same_code, *inner))


def _is_bound_again(definition: ast.FunctionDef, name: str) -> bool:
    """Whether something inside a method gives the name of its first argument to another value."""
    inside = (node for statement in definition.body for node in ast.walk(statement))
    return any(
        (isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load))
        or (isinstance(node, ast.arg) and node.arg == name)
        for node in inside
    )


class _Editor(ast.NodeTransformer):
    """Replaces additions by calls of gates."""

    def __init__(self, owner: str, edits: Mapping[tuple[Any, Any], Edit]):
        self.owner, self.edits = owner, dict(edits)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        edit = self._take(node) if isinstance(node.op, ast.Add) else None
        self.generic_visit(node)
        return self._call(edit, node.left, node.right) if edit else node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        named = isinstance(node.op, ast.Add) and isinstance(node.target, ast.Name)
        edit = self._take(node) if named else None
        self.generic_visit(node)
        if not edit:
            return node
        read = ast.Name(node.target.id, ast.Load())  # type: ignore[union-attr]
        return ast.Assign([node.target], self._call(edit, read, node.value), lineno=node.lineno)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        operands = _operands(node)
        edit = self._take(node) if operands else None
        self.generic_visit(node)
        return self._call(edit, *_operands(node)) if edit else node

    def _take(self, node: ast.expr | ast.stmt) -> Edit | None:
        place = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        return self.edits.pop(place, None)

    def _call(self, edit: Edit, first: ast.expr, second: ast.expr) -> ast.expr:
        gate = ast.Attribute(ast.Name(self.owner, ast.Load()), edit.child, ast.Load())
        if edit.residual_argument == 0:
            return ast.Call(gate, [first, second], [])
        if isinstance(first, ast.Name) or isinstance(second, ast.Name):
            return ast.Call(gate, [second, first], [])
        # What comes first may draw random numbers before the other: it still comes first.
        turned = ast.parse("(first, second)[::-1]", mode="eval").body
        turned.value.elts = [first, second]  # type: ignore[attr-defined]
        return ast.Call(gate, [ast.Starred(turned, ast.Load())], [])


def _operands(node: ast.Call) -> list[ast.expr]:
    """What ``torch.add(x, y)``, ``x.add(y)`` and ``x.add_(y)`` add; nothing for other calls."""
    if not isinstance(node.func, ast.Attribute) or node.func.attr not in ("add", "add_"):
        return []
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    given = [*node.args, *(keywords[name] for name in ("input", "other") if name in keywords)]
    if any(isinstance(value, ast.Starred) for value in given) or not keywords.keys() <= {"input", "other", "alpha"}:
        return []
    return given if len(given) == 2 else [node.func.value, *given] if len(given) == 1 else []
