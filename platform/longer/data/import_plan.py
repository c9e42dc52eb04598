"""Which files of a log an import has to read, given what the served version of the events table already holds."""

from collections.abc import Sequence
from dataclasses import dataclass

from longer.datasets.source import Part
from longer.errors import UserError
from longer.storage import Version


@dataclass(frozen=True)
class ImportPlan:
    """What is read, and what the manifest will say of the files."""

    parts: list[Part]
    inputs: dict[str, str]
    """Names by content id: of every file that the new version holds."""
    joined: dict[str, str]
    """Content ids by name, of the files that rows are joined with."""
    duplicates: dict[str, str]
    """Names of files that are not read, by the name of the one with the same bytes."""


def plan_import(parts: Sequence[Part], base: Version | None) -> ImportPlan:
    """All of the log's files, or with a `base` those that it does not hold; the same bytes are read once.

    Raises UserError if a file that the base holds has other content now: its earlier rows cannot be told from the new ones.
    """
    held: dict[str, str] = base.manifest["inputs"] if base else {}
    first_name = dict(held)
    duplicates = {}
    for part in parts:
        name = first_name.setdefault(part.content_id, part.name)
        if name != part.name:
            duplicates[part.name] = name
    joined = {file.name: file.content_id for part in parts for file in part.joined}
    if base:
        names = set(held.values())
        now = {part.name: part.content_id for part in parts}
        changed = sorted(name for name, content_id in now.items() if name in names and content_id not in held)
        changed += sorted(name for name, content_id in base.manifest["joined"].items() if joined[name] != content_id)
        if changed:
            raise UserError(
                f"{changed[0]}: has changed since version {base.id}, which holds its earlier rows: "
                "import the whole log, without --since-last"
            )
    unread = [part for part in parts if part.content_id not in held and first_name[part.content_id] == part.name]
    return ImportPlan(unread, first_name, joined, duplicates)
