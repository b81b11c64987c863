"""What the package promises by name."""

import inspect
import pkgutil
from importlib import import_module

import pytest

import cacheinval
from cacheinval import errors


def test_all_is_exact() -> None:
    given: dict[str, object] = {}
    exec("from cacheinval import *", given)
    del given["__builtins__"]
    assert sorted(cacheinval.__all__) == sorted(given)
    made_here = {
        name
        for name in dir(cacheinval)
        if not name.startswith("_")
        and str(getattr(getattr(cacheinval, name), "__module__", "")).startswith("cacheinval")
    }
    assert made_here <= set(given), "public without being named in __all__"


def test_every_error_is_public_and_speaks_for_itself() -> None:
    made_here = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == errors.__name__
    }
    assert set(errors.__all__) == made_here
    assert made_here <= set(cacheinval.__all__)
    for name in made_here:
        error = getattr(errors, name)
        assert issubclass(error, errors.CacheinvalError)
        assert error.__doc__, f"{name} has no docstring of its own"
        assert str(error()) == error.__doc__.splitlines()[0]
        assert str(error("something else")) == "something else"


@pytest.mark.parametrize("name", cacheinval.__all__)
def test_every_public_name_and_method_has_a_docstring(name: str) -> None:
    value = getattr(cacheinval, name)
    assert "__doc__" in vars(value)
    assert value.__doc__
    for attribute, member in vars(value).items():
        if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            assert inspect.getdoc(member), f"{name}.{attribute} has no docstring"


def test_every_module_says_what_it_is_and_what_it_gives() -> None:
    for found in pkgutil.walk_packages(cacheinval.__path__, "cacheinval."):
        if found.name.endswith("__main__"):
            continue
        module = import_module(found.name)
        assert module.__doc__, f"{found.name} has no docstring"
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{found.name}.__all__ names {name}, which it has not"


def test_no_name_is_one_of_those_that_say_nothing() -> None:
    for found in pkgutil.walk_packages(cacheinval.__path__, "cacheinval."):
        words = found.name.lower().replace("_", ".").split(".")
        assert not {"manager", "helper", "helpers", "utils", "util"} & set(words)
