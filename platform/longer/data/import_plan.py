"""What an import reads, given what the served version of the events table holds, and what its own version's manifest says."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from longer.config import Settings
from longer.data.events import iso_time
from longer.data.import_report import PartReport
from longer.datasets.source import Part
from longer.errors import UserError
from longer.storage import TABLE_FORMAT, Version, fingerprint

_NOTHING: dict[str, Any] = {"num_rows": 0, "reasons": {}}
"""Of the manifest of a base that is not there."""


@dataclass(frozen=True)
class ImportPlan:
    """Parts to read, on top of `base` if there is one."""

    parts: list[Part]
    base: Version | None
    duplicates: dict[str, str]
    """Names of files that are not read, and the name of the one with the same bytes."""
    inputs: dict[str, str]
    """Names by content id of every file that the new version holds."""
    joined: dict[str, str]
    """Content ids by name of the files that rows are joined with."""
    settings: dict[str, Any]
    schema_hash: str
    folder: str
    """Where the first import found the files that have short names."""

    @property
    def described(self) -> dict[str, Any]:
        """All that decides the content of the version, as its manifest has it."""
        return {
            "schema_hash": self.schema_hash,
            "settings": self.settings,
            "inputs": self.inputs,
            "joined": self.joined,
            "base": self.base.id if self.base else None,
        }

    @property
    def version_id(self) -> str:
        return fingerprint("events", TABLE_FORMAT, self.described)

    def manifest(self, reports: Sequence[PartReport]) -> dict[str, Any]:
        """Counts and times of the whole new version, the base's in them; skipped files are not among its inputs."""
        last = self.base.manifest if self.base else _NOTHING
        reasons = sum((report.reasons for report in reports), Counter(last["reasons"]))
        spans = [
            (iso_time(r.first_ts), iso_time(r.last_ts))
            for r in reports
            if r.first_ts is not None and r.last_ts is not None
        ]
        spans += [(last["first_event_ts"], last["watermark"])] if self.base else []
        num_new_rows = sum(report.num_rows for report in reports)
        skipped = {report.content_id: report.name for report in reports if report.problem}
        return {
            **self.described,
            "inputs": {content_id: name for content_id, name in self.inputs.items() if content_id not in skipped},
            "num_rows": last["num_rows"] + num_new_rows,
            "num_new_rows": num_new_rows,
            "num_quarantined": reasons.total(),
            "reasons": dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
            "folder": self.folder,
            "skipped": sorted(skipped.values()),
            "num_skipped_files": len(skipped),
            "first_event_ts": min((first for first, _ in spans), default=None),
            "watermark": max((last for _, last in spans), default=None),
        }


def plan_import(settings: Settings, parts: Sequence[Part], base: Version | None) -> ImportPlan:
    """All of the log's files, or with a `base` those that it does not hold; the same bytes are read once.

    Files of another folder than the base's, say a folder a day, go by their whole path. Raises UserError if the base was
    imported with other settings, or if a file that it holds has other content now: the earlier rows cannot be told from the
    new ones.
    """
    chosen = settings.import_events.model_dump(mode="json", exclude={"source"})
    held: dict[str, str] = base.manifest["inputs"] if base else {}
    folder = base.manifest.get("folder", _folder(parts[0])) if base else _folder(parts[0])
    kinds = {_kind(part.content_id) for part in parts}
    if kinds.issuperset(map(_kind, held)):  # else no file is known again, and one of the same name must be refused
        parts = [part if _folder(part) == folder else replace(part, name=part.path) for part in parts]
    first_name = dict(held)
    duplicates = {}
    for part in parts:
        name = first_name.setdefault(part.content_id, part.name)
        if name != part.name:
            duplicates[part.name] = name
    joined = {file.name: file.content_id for part in parts for file in part.joined}
    if base:
        _check_settings(base, chosen, settings.import_events.section)
        _check_unchanged(base, {part.name: part.content_id for part in parts}, joined)
    unread = [part for part in parts if part.content_id not in held and first_name[part.content_id] == part.name]
    return ImportPlan(unread, base, duplicates, first_name, joined, chosen, settings.event_schema.hash(), folder)


def _folder(part: Part) -> str:
    return part.path.removesuffix(part.name)


def _kind(content_id: str) -> str:
    return content_id.partition(":")[0]


def _check_settings(base: Version, chosen: dict[str, Any], section: str) -> None:
    for name in ("dataset", "columns", "time_unit"):
        if (before := base.manifest["settings"].get(name)) != chosen[name]:
            raise UserError(
                f"{section}.{name}: version {base.id} was imported with {before!r}, not {chosen[name]!r}: "
                "use its settings, or import the whole log, without --since-last"
            )


def _check_unchanged(base: Version, files: dict[str, str], joined: dict[str, str]) -> None:
    held = base.manifest["inputs"]
    names = set(held.values())
    changed = sorted(name for name, content_id in files.items() if name in names and content_id not in held)
    changed += sorted(name for name, content_id in base.manifest["joined"].items() if joined.get(name) != content_id)
    if changed:
        raise UserError(
            f"{changed[0]}: has changed since version {base.id}, which holds its earlier rows: "
            "import the whole log, without --since-last"
        )
