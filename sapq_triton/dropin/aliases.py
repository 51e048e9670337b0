"""Other spellings of keywords, as later packages have them."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TypeVar

Result = TypeVar("Result")


def accepts(aliases: Mapping[str, str]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """A function that also takes the keywords `aliases`, each for the parameter that it names.

    The function then raises TypeError for keywords of neither kind, ValueError for a parameter that
    is given twice; both name what is legal.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        parameters = list(inspect.signature(function).parameters)

        @wraps(function)
        def call(*args: object, **kwargs: object) -> Result:
            given: dict[str, object] = {}
            for name, value in kwargs.items():
                parameter = aliases.get(name, name)
                if parameter not in parameters:
                    raise TypeError(
                        f"{function.__qualname__} got an unexpected keyword {name!r}; "
                        f"legal are {[*parameters[1:], *aliases]}"
                    )
                if parameter in given or parameter in parameters[: len(args)]:
                    spellings = [parameter, *(key for key in aliases if aliases[key] == parameter)]
                    raise ValueError(f"{parameter} was given twice; give one of {spellings}")
                given[parameter] = value
            return function(*args, **given)

        return call

    return decorate
