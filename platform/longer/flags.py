"""Which flags of a command line a mistake is about: its line names them, not a settings file that says nothing of it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any


class Flags:
    """The flags of a command line, and those that a mistake asks for."""

    def __init__(self, overrides: dict[str, Any], short: Mapping[str, str], known: set[str]) -> None:
        """Of nested `overrides`; `short` has the flags without a section by setting, `known` all settings, sections too."""
        self._short = {name: f"--{flag}" for name, flag in short.items()}
        self._given = {name: self._short.get(name, f"--{name}") for name in _leaves(overrides, known)}

    def where(self, field: str, message: str) -> tuple[list[str], bool]:
        """Those whose values the mistake is about, and whether it is about nothing else."""
        if own := [flag for name, flag in self._given.items() if f"{field}.".startswith(f"{name}.")]:
            return own, True
        return self._named(self._given, field, message), False

    def missing(self, field: str, message: str) -> list[str]:
        """Short ones that the remedy names; none if it names one that is given, which is then to go."""
        remedy = message.rpartition(": ")[2]
        return [] if self._named(self._given, field, remedy) else self._named(self._short, field, remedy)

    @staticmethod
    def _named(flags: Mapping[str, str], field: str, text: str) -> list[str]:
        section = f"{field}." if field else ""
        words = [f"{section}{word}." for word in re.findall(r"[\w.]*\w(?!['\w])", text)]
        return [flag for name, flag in flags.items() if any(word.startswith(f"{name}.") for word in words)]


def _leaves(tree: dict[str, Any], known: set[str], prefix: str = "") -> Iterator[str]:
    """Dotted names of the settings in a nested tree, whose values may be mappings too."""
    for key, value in tree.items():
        name = prefix + key
        if isinstance(value, dict) and any(other.startswith(f"{name}.") for other in known):
            yield from _leaves(value, known, f"{name}.")
        else:
            yield name
