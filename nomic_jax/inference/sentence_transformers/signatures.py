"""Decorators for methods whose arguments go to another method, or have old names."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def same_parameters(method: Callable[Arguments, Result]) -> Callable[[Callable], Callable[Arguments, Result]]:
    """Gives a method that passes its arguments on the signature of the method that it passes them to."""

    def decorate(function: Callable) -> Callable[Arguments, Result]:
        function.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
        return cast(Callable[Arguments, Result], function)

    return decorate


def renamed(**names: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorator: passes arguments that are given under an old name, and warns."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Result:
            for old, new in names.items():
                if old in options:
                    warnings.warn(f"the argument {old} is called {new} now", DeprecationWarning, stacklevel=2)
                    options.setdefault(new, options.pop(old))
            return function(*args, **options)

        return cast(Callable[Arguments, Result], call)

    return decorate
