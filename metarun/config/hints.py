"""Type hints of settings: whether a value fits one, and one in words; names that are close to a word."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union


def type_hints(cls: type) -> dict[str, Any]:
    """The type hints of a class's constructor; none if they cannot be resolved."""
    try:
        return typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except Exception:  # hints may name types that are not imported at run time
        return {}


def matches(value: Any, hint: Any) -> bool:
    """Whether a plain value fits a type hint; unsupported hints accept any value."""
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(matches(value, argument) for argument in arguments)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        if arguments[-1:] == (Ellipsis,):
            return all(matches(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(matches, value, arguments))
    if origin is dict:
        return isinstance(value, dict) and all(matches(item, arguments[1]) for item in value.values())
    if origin in (list, Sequence, Iterable):
        return isinstance(value, (list, tuple)) and all(matches(item, arguments[0]) for item in value)
    if isinstance(hint, type):  # an object, which only a node with a `_target_` can describe
        return isinstance(value, (hint, dict))
    return True


def describe(hint: Any) -> str:
    """A type hint in words, for messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        plain = [a for a in arguments if not isinstance(a, type) or a.__module__ == "builtins"]
        return " or ".join(map(describe, plain or arguments))
    if hint in (None, type(None)):
        return "null"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in words:
        return words[hint]
    if origin is dict:
        return f"names, each with {describe(arguments[1])}: 'KEY={{a:1,b:2}}', in quotes"
    plurals = {int: "whole numbers", float: "numbers", Any: "values"}
    kinds = " and ".join(sorted({plurals.get(a) or describe(a) for a in arguments if a is not Ellipsis}))
    return f"a list of {kinds}" if arguments else str(hint)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of a message: `; did you mean 'x'?`, or the list of known words."""
    known = list(known)
    if close := difflib.get_close_matches(str(word), known, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; it has {', '.join(known)}" if known else ""
