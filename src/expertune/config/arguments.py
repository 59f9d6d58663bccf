"""Arguments of the public functions: a wrong name or type is one error that says what is wanted, before anything runs.

Types are those of the function's own annotations.
"""

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from pydantic import PositiveInt

from expertune.config.messages import nearest_key
from expertune.config.yaml_file import shortened
from expertune.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

# What a type is called in a message, by its own name; of a model, how to get one.
_WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "NoneType": "None",
    "Path": "a Path",
    "Sequence": "a list",
    "list": "a list",
    "Mapping": "a mapping",
    "dict": "a mapping",
    "Callable": "a function",
    "device": "a torch.device",
    "dtype": "a torch.dtype",
    "RunConfig": "a RunConfig",
    "PreTrainedModel": "a model from expertune.load_model or from_pretrained of an NF4 folder",
    "ExpertPeftModel": "what attach returned for it",
}


def checked(function: F) -> F:
    """A function that refuses arguments which it does not have, and values of other types than it declares.

    Options that are declared as `**options: Unpack[SomeTypedDict]` are arguments too.

    Raises:
        ConfigError: names the argument, what it has to be and what was given.
    """
    signature = inspect.signature(function)
    places = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    by_place = [name for name, parameter in signature.parameters.items() if parameter.kind in places]

    @functools.cache
    def wanted() -> dict[str, Any]:
        """The type of each argument by name; read at the first call, because types may be defined below a function."""
        found: dict[str, Any] = {}
        for name, hint in get_type_hints(function, include_extras=True).items():
            options = next((part for part in get_args(hint) if is_typeddict(part)), None)
            found |= get_type_hints(options) if options else {name: hint}
        return found

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > len(by_place):
            rest = f"takes {len(by_place)} arguments without a name ({', '.join(by_place)}), got {len(args)}"
            raise ConfigError(f"{function.__qualname__}: {rest}; give the others by name")
        given = dict(zip(by_place, args, strict=False)) | kwargs
        known = {name: hint for name, hint in wanted().items() if name != "return"}
        for name, value in given.items():
            if name not in known and name != "cls":
                raise ConfigError(f"{function.__qualname__}: no argument is called {name}{nearest_key(name, known)}")
            if name in known and not _is_of(known[name], value):
                wrong = f"{name} has to be {_words(known[name])}, got {_shown(value)}"
                raise ConfigError(f"{function.__qualname__}: {wrong}")
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigError(f"{function.__qualname__}: {error}") from None
        return function(*args, **kwargs)

    return cast(F, call)


def _is_of(hint: Any, value: Any) -> bool:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_is_of(part, value) for part in parts)
    if kind is Literal:
        return value in parts
    if hint == PositiveInt:
        return _is_of(int, value) and value > 0
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if kind in (Sequence, list) and isinstance(value, kind) and not isinstance(value, str):
        return all(_is_of(parts[0], item) for item in value)
    return isinstance(value, kind) and kind is not Sequence


def _words(hint: Any) -> str:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if kind is Literal:
        return " or ".join(map(str, parts))
    if hint == PositiveInt:
        return "a whole number above 0"
    words = _WORDS.get(kind.__name__, kind.__name__)
    return f"{words} of {_words(parts[0])}" if kind in (Sequence, list) else words


def _shown(value: Any) -> str:
    if value is None or isinstance(value, str | int | float | list | tuple | dict):
        return shortened(repr(value), 80)
    return f"an object of type {type(value).__name__}"
