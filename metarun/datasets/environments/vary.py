"""Which numbers of an environment may differ between tasks: attributes, and what follows from them.

The constructor of an environment may compute further attributes from an attribute, such as the total mass in
CartPole from the mass of the pole. Its source tells which: they are computed again where that is possible,
and the attribute is refused where it is not.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

import numpy as np

#: The parts of the names of methods that do not decide what happens in an episode.
ASIDE = ("__init__", "render", "close")


class CannotVary(Exception):
    """An attribute cannot differ between tasks; the message says why."""


@dataclass(frozen=True)
class Assignment:
    """An attribute that the constructor computes from other attributes.

    Args:
        name: of the attribute.
        code: of its value.
        me: what the code calls the environment.
        module: that the code is from.
    """

    name: str
    code: CodeType
    me: str
    module: str

    def run(self, environment: Any) -> None:
        """Compute the attribute again."""
        value = eval(self.code, vars(sys.modules[self.module]), {self.me: environment})
        setattr(environment, self.name, value)


def is_number(value: Any) -> bool:
    """Whether a value is a number, and no switch."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.bool_))


def numbers_of(environment: Any) -> dict[str, Any]:
    """The attributes of an environment, and of its class, that are numbers."""
    names = [name for name in dir(type(environment)) if not name.startswith("__")] + list(vars(environment))
    static = {name: inspect.getattr_static(environment, name) for name in names}
    return {name: value for name, value in static.items() if is_number(value)}


def following(cls: type, name: str) -> list[Assignment]:
    """The attributes that the constructor of a class computes from attribute `name`, in order.

    Raises:
        CannotVary: some cannot be computed again, or nothing reads the attribute in an episode.
    """
    try:
        read = {attribute for method, reads in methods(cls) for attribute in reads if beside(method)}
        found = list(assignments(cls, name))
    except (OSError, TypeError, SyntaxError):
        raise CannotVary(f"the source of {cls.__name__} is not there to see what follows from it") from None
    if not read & {name, *(each.name for each in found)}:
        raise CannotVary("nothing reads it in an episode")
    return found


def check_kept(environment: Any, name: str, values: Iterable[float]) -> None:
    """Raise CannotVary if an environment does not keep a value of attribute `name` when an episode begins."""
    for value in values:
        setattr(environment.unwrapped, name, value)
        environment.reset(seed=0)
        if getattr(environment.unwrapped, name) != value:
            raise CannotVary("an episode begins by setting it")


def beside(method: str) -> bool:
    return not any(part in method for part in ASIDE)


def classes(cls: type) -> list[type]:
    """The classes of an environment whose code is its own, base classes first."""
    common = ("gymnasium.core", "gymnasium.utils.ezpickle", "typing", "builtins")
    return [base for base in reversed(cls.__mro__) if base.__module__ not in common]


def methods(cls: type) -> Iterator[tuple[str, set[str]]]:
    """The methods of a class and its base classes, with the attributes that each reads."""
    for base in classes(cls):
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else value
            if inspect.isfunction(function):
                tree = tree_of(function)
                yield name, {read[1:] for read in reads_of(tree, first_argument(tree)) if read[0] == "."}


def assignments(cls: type, name: str) -> Iterator[Assignment]:
    """See `following`."""
    changed, reads = {f".{name}"}, dict(methods(cls))
    for base in classes(cls):
        if "__init__" not in vars(base):
            continue
        tree = tree_of(base.__init__)  # type: ignore[misc]
        me = first_argument(tree)
        arguments = {each.arg for each in ast.walk(tree.args) if isinstance(each, ast.arg)} - {me}
        for statement in tree.body:
            read, written = reads_of(statement, me), writes_of(statement, me)
            if f".{name}" in written and (read & arguments):
                source = sorted(read & arguments)[0]
                raise CannotVary(f"its value is from the argument {source} of the constructor")
            called = [each[1:] for each in read if each[1:] in reads and each != ".reset"]
            read = read.union(*({f".{attribute}" for attribute in reads[method]} for method in called))
            if not read & changed:
                continue
            attributes = [each for each in written if each[0] == "."]
            changed |= written
            if written and not attributes:
                continue  # a local name
            if (
                not isinstance(statement, ast.Assign)
                or len(written) > 1
                or read & (written | local_names(tree))
            ):
                what = attributes[0][1:] if attributes else ast.unparse(statement).split("\n")[0]
                raise CannotVary(f"its constructor computes {what} from it")
            code = compile(ast.Expression(statement.value), base.__module__, "eval")
            yield Assignment(attributes[0][1:], code, me, base.__module__)


def tree_of(function: Any) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    if not isinstance(tree, ast.FunctionDef):  # of a lambda
        raise TypeError
    return tree


def first_argument(tree: ast.FunctionDef) -> str:
    return tree.args.args[0].arg if tree.args.args else ""


def local_names(tree: ast.FunctionDef) -> set[str]:
    """The arguments and the local names of a function, without the first argument."""
    names = {each.arg for each in ast.walk(tree.args) if isinstance(each, ast.arg)}
    stored = {
        each.id for each in ast.walk(tree) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
    }
    return (names | stored) - {first_argument(tree)}


def reads_of(tree: ast.AST, me: str) -> set[str]:
    """What code reads: names, and attributes of `me` with a dot before them."""
    return names_in(tree, me, ast.Load)


def writes_of(tree: ast.AST, me: str) -> set[str]:
    """What code assigns to, as in `reads_of`."""
    return names_in(tree, me, ast.Store)


def names_in(tree: ast.AST, me: str, context: type) -> set[str]:
    found = set()
    for each in ast.walk(tree):
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == me:
            if isinstance(each.ctx, context):
                found.add(f".{each.attr}")
        elif isinstance(each, ast.Name) and isinstance(each.ctx, context) and each.id != me:
            found.add(each.id)
        elif isinstance(each, ast.AugAssign) and context is ast.Load:  # it reads what it writes
            found |= names_in(each.target, me, ast.Store)
    return found
