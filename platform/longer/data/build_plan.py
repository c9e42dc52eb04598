"""What a build of the sequence table reads and what decides its content: everything, or what has come since the last version."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from longer.arrays import MS_PER_HOUR
from longer.config import Settings
from longer.data.events import iso_ms, iso_time
from longer.data.layout import BucketFiles, bucket_files
from longer.data.records import Record
from longer.data.sequences import KeepRule
from longer.errors import UserError
from longer.storage import TABLE_FORMAT, DataFile, Table, Version, fingerprint

_COUNTS = ("num_users", "num_events", "num_events_kept")
_FEWEST_BUCKETS = 16
_MOST_BUCKETS = 4096
_EVENTS_PER_BUCKET = 1 << 20


@dataclass(frozen=True)
class BuildPlan:
    """Event files to read, on top of `base` if there is one, under settings that were completed and are part of the version."""

    files: list[str]
    base: Version | None
    rule: KeepRule
    settings: dict[str, Any]
    inputs: dict[str, Any]
    schema_hash: str

    @property
    def version_id(self) -> str:
        return fingerprint("sequences", TABLE_FORMAT, self.settings, self.inputs, self.schema_hash)

    @property
    def not_before_ms(self) -> int | None:
        """Of an increment: the oldest time that an event may still have."""
        if self.base is None:
            return None
        return round(iso_ms(self.base.manifest["watermark"]) - self.inputs["late_allowance_hours"] * MS_PER_HOUR)

    @cached_property
    def base_files(self) -> dict[int, BucketFiles]:
        return bucket_files(self.base) if self.base else {}

    def content(self, blocks: list[Record], written: list[Record]) -> tuple[dict[str, Any], list[DataFile]]:
        """The manifest and the files of the version: the buckets written, and those of the base that got no news."""
        last: dict[str, Any] = self.base.manifest if self.base else {"buckets": [], "num_too_late": 0}
        files = [DataFile(**file) for record in written for file in record["files"]]
        counts = {record["bucket"]: {name: record[name] for name in ("bucket", *_COUNTS)} for record in written}
        for bucket in last["buckets"]:
            if bucket["bucket"] not in counts:
                counts[bucket["bucket"]] = bucket
                kept = self.base_files[bucket["bucket"]]
                files += [file for file in (kept.rows, kept.news) if file]
        totals = {name: sum(bucket[name] for bucket in counts.values()) for name in _COUNTS}
        spans = [(iso_time(b["first_ts"]), iso_time(b["last_ts"])) for b in blocks if b["num_events"]]
        spans += [(last["first_event_ts"], last["watermark"])] if self.base else []
        manifest = {
            "schema_hash": self.schema_hash,
            "settings": self.settings,
            "inputs": self.inputs,
            "num_rows": totals["num_users"],
            **totals,
            "num_too_late": last["num_too_late"] + sum(record["num_too_late"] for record in [*blocks, *written]),
            "num_skipped_files": len(self.inputs.get("skipped", [])),
            "first_event_ts": min(first for first, _ in spans),
            "watermark": max(last for _, last in spans),
            "buckets": [counts[bucket] for bucket in sorted(counts)],
        }
        return manifest, files


def plan_build(settings: Settings, events: Version, unreadable: set[str], base: Version | None) -> BuildPlan:
    """The plan for the served events without the `unreadable` files.

    Raises UserError if `base` was built from other events, or with other settings, or skipped files that are readable now.
    """
    asked, schema_hash = settings.sequences, settings.event_schema.hash()
    names = {_name(file): events.path_of(file) for file in events.data_files()}
    skipped = sorted(name for name, path in names.items() if path in unreadable)
    rule = KeepRule(asked.keep_events, settings.model.windows.stride_events)
    num_buckets = asked.num_buckets or _num_buckets(events, base)
    chosen = {**vars(rule), "num_buckets": num_buckets, "row_group_events": asked.row_group_events}
    inputs: dict[str, Any] = {"events": events.id}
    if skipped:  # in the id: once they are restored, the table is built anew
        inputs["skipped"] = skipped
    files = set(names.values()) - unreadable
    if base:
        files -= _checked_base(base, chosen, schema_hash, events, set(skipped))
        inputs |= {
            "base": base.id,
            "late_allowance_hours": asked.late_allowance_hours,
            "merge_share": asked.merge_share,
        }
    return BuildPlan(sorted(files), base, rule, chosen, inputs, schema_hash)


def read_by(sequences: Version, events: Table) -> set[str]:
    """Full paths of the event files that a version of the sequence table holds."""
    version = events.find(sequences.manifest["inputs"]["events"])
    skipped = sequences.manifest["inputs"].get("skipped", [])
    return {version.path_of(f) for f in version.data_files() if _name(f) not in skipped} if version else set()


def _checked_base(
    base: Version, chosen: dict[str, Any], schema_hash: str, events: Version, skipped: set[str]
) -> set[str]:
    """The event files that `base` holds, if these settings and events go on from it."""
    _check_same("schema_hash", base.manifest["schema_hash"], schema_hash)
    for name, value in chosen.items():
        _check_same(f"sequences.{name}", base.manifest["settings"][name], value)
    if not base.is_whole():
        raise UserError(f"{base.path}: files of this version are gone: run without --since-last")
    read = read_by(base, Table(events.table_path))
    if not read or not read <= set(events.files()):
        raise UserError(
            f"{events.path}: does not continue the events that sequences {base.id} were built from: run without --since-last"
        )
    if restored := set(base.manifest["inputs"].get("skipped", [])) - skipped:
        raise UserError(
            f"{events.table_path}/{min(restored)}: skipped by the last sequences, readable now: run without --since-last, "
            "so that its events get their places"
        )
    return read


def _name(file: DataFile) -> str:
    """A file of the events table, below it."""
    return f"{file.version}/{file.path}"


def _check_same(name: str, last: Any, now: Any) -> None:
    if last != now:
        raise UserError(f"{name}: the last sequences were built with {last}, not {now}: run without --since-last")


def _num_buckets(events: Version, base: Version | None) -> int:
    if base:
        return base.manifest["settings"]["num_buckets"]
    wanted = -(-events.manifest["num_rows"] // _EVENTS_PER_BUCKET)
    return min(max(_FEWEST_BUCKETS, wanted), _MOST_BUCKETS)
