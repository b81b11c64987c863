"""Modules with lines changed, importable by a name of their own, for worlds name the rules by which they go."""

import importlib
import inspect
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

__all__ = ["Changes", "changed", "part"]

Changes = tuple[tuple[str, str], ...]
"""Lines, each of which is in one place, and what is there instead."""


def changed(original: ModuleType, changes: Changes, name: str) -> ModuleType:
    """A copy of `original`, a package with all that is in it, with these lines changed."""
    if not changes:
        return original
    sources = {
        other: inspect.getsource(module)
        for other, module in sys.modules.items()
        if other == original.__name__ or other.startswith(original.__name__ + ".")
    }
    for line, instead in changes:
        places = [other for other, source in sources.items() for _ in range(source.count(line))]
        assert len(places) == 1, f"{name}: {line!r} is in {places}"
        sources[places[0]] = sources[places[0]].replace(line, instead)
    copy = "cacheinval_mutant_" + "".join(c if c.isalnum() else "_" for c in name)
    for other, source in sources.items():
        renamed = source.replace(original.__name__, copy)
        known = _CHANGED.sources.setdefault(other.replace(original.__name__, copy), renamed)
        assert known == renamed, f"two changes are called {name}"
    return importlib.import_module(copy)


def part(rules: ModuleType, name: str) -> ModuleType:
    """The module `name` of the package `rules`."""
    return importlib.import_module(f"{rules.__name__}.{name}")


class _Changed(MetaPathFinder, InspectLoader):
    """Finds and loads what is held here as text."""

    def __init__(self) -> None:
        self.sources: dict[str, str] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name in self.sources else None

    def get_source(self, name: str) -> str:
        return self.sources[name]

    def is_package(self, name: str) -> bool:
        return any(other.startswith(name + ".") for other in self.sources)


_CHANGED = _Changed()
sys.meta_path.append(_CHANGED)
