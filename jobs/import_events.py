"""Imports a log into the events table: python -m jobs.import_events --config configs/quickstart.yaml [--since-last]

With --since-last only the files that the served version does not hold are read; all others are shared with it.
"""

from collections import Counter
from datetime import UTC, datetime
from typing import Any

from longer.config import Settings
from longer.data.events import iso_time
from longer.data.import_plan import ImportPlan, plan_import
from longer.data.ray_events import PartImporter, PartReport, fits_one_task, remove_files, write_events
from longer.data.tables import open_version
from longer.datasets import source_of
from longer.errors import UserError
from longer.progress import say
from longer.runner import run_job, start_ray
from longer.storage import TABLE_FORMAT, Table, Version, fingerprint


def run(settings: Settings, since_last: bool = False) -> Version:
    """The events table of the settings' log; its unfit rows are in the quarantine table with their reasons."""
    table = Table(settings.path("tables", "events"))
    base = _base(settings, table) if since_last else None
    plan = plan_import(source_of(settings.import_events).locate(settings.import_events.source), base)
    for name, first in plan.duplicates.items():
        say("import_events", f"{name}: the same bytes as {first}, imported once")
    if base and not plan.parts:
        return _unchanged(base)
    described = _described(settings, plan, base)
    version_id = fingerprint("events", TABLE_FORMAT, described)
    if published := table.reuse(version_id):
        return _unchanged(published)
    quarantine = Table(settings.path("tables", "quarantine"))
    table.claim()
    quarantine.claim()
    quarantine.discard(version_id)  # an earlier attempt may have got this far
    say("import_events", source_of(settings.import_events).PROVENANCE)
    if not fits_one_task(plan.parts):
        start_ray(settings.ray)
    paths = table.begin(version_id), f"{quarantine.path}/{version_id}"
    importer = PartImporter(settings.import_events, settings.event_schema, datetime.now(UTC), *paths)
    try:
        reports = _read_whole(write_events(plan.parts, importer), importer)
        if base and not any(report.problem is None for report in reports):
            table.discard(version_id)
            return _unchanged(base)
        manifest = {**described, **_counts(reports, base), "provenance": source_of(settings.import_events).PROVENANCE}
        skipped = {report.content_id for report in reports if report.problem}
        manifest["inputs"] = {key: name for key, name in plan.inputs.items() if key not in skipped}
        _publish_quarantine(quarantine, version_id, manifest, reports, base)
        _check_share(settings, reports)
        if not manifest["num_rows"]:
            problem = (
                f"no row of the log is fit: see {quarantine.path}"
                if manifest["num_quarantined"]
                else "the log has no events"
            )
            raise UserError(f"{settings.import_events.source}: {problem}: import a log with at least one")
    except BaseException:
        table.discard(version_id)
        raise
    files = [file for report in reports for file in report.events]
    version = table.publish(version_id, manifest, [*(base.data_files() if base else []), *files])
    new = f" ({manifest['num_new_rows']} of them new)" if base else ""
    say(
        "import_events",
        f"version {version_id}: {manifest['num_rows']} events{new}, {manifest['num_quarantined']} quarantined",
    )
    return version


def _base(settings: Settings, table: Table) -> Version | None:
    """The served version, which the new one goes on from; None if there is none yet."""
    if table.current() is None:
        return None
    base = open_version(table.path, settings.event_schema, None, "jobs.import_events")
    for name in ("dataset", "columns", "time_unit"):
        before, now = base.manifest["settings"].get(name), settings.import_events.model_dump(mode="json")[name]
        if before != now:
            raise UserError(
                f"import_events.{name}: version {base.id} was imported with {before!r}, not {now!r}: "
                "use its settings, or import the whole log, without --since-last"
            )
    return base


def _unchanged(version: Version) -> Version:
    say("import_events", f"version {version.id} is already built, nothing changed")
    return version


def _described(settings: Settings, plan: ImportPlan, base: Version | None) -> dict[str, Any]:
    """All that decides the content of the version."""
    return {
        "schema_hash": settings.event_schema.hash(),
        "settings": settings.import_events.model_dump(mode="json", exclude={"source"}),
        "inputs": plan.inputs,
        "joined": plan.joined,
        "base": base.id if base else None,
    }


def _read_whole(reports: list[PartReport], importer: PartImporter) -> list[PartReport]:
    """The same reports without stretches of files that could not be read to their end; skipped files are named."""
    problems = {report.content_id: report.problem for report in reports if report.problem}
    for problem in problems.values():
        say("import_events", f"skipped {problem}")
    for report in reports:
        if report.content_id in problems and not report.problem:
            remove_files(report, importer.events_path, importer.quarantine_path)
    return [report for report in reports if report.problem or report.content_id not in problems]


def _counts(reports: list[PartReport], base: Version | None) -> dict[str, Any]:
    """Of the whole new version; the base's are in it."""
    before = base.manifest if base else {"num_rows": 0, "reasons": {}, "num_skipped_files": 0}
    num_new_rows = sum(report.num_rows for report in reports)
    reasons = Counter(before["reasons"])
    for report in reports:
        reasons.update(report.reasons)
    times = [iso_time(time) for report in reports for time in (report.first_ts, report.last_ts) if time is not None]
    times += [base.manifest["first_event_ts"], base.manifest["watermark"]] if base else []
    return {
        "num_rows": before["num_rows"] + num_new_rows,
        "num_new_rows": num_new_rows,
        "num_quarantined": reasons.total(),
        "reasons": dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
        "num_skipped_files": len({report.content_id for report in reports if report.problem}),
        "first_event_ts": min(times, default=None),
        "watermark": max(times, default=None),
    }


def _publish_quarantine(
    table: Table, version_id: str, manifest: dict[str, Any], reports: list[PartReport], base: Version | None
) -> None:
    earlier = table.find(base.id) if base else None
    files = [*(earlier.data_files() if earlier else []), *(file for report in reports for file in report.quarantine)]
    table.publish(version_id, {**manifest, "num_rows": manifest["num_quarantined"]}, files)


def _check_share(settings: Settings, reports: list[PartReport]) -> None:
    """Raises UserError if too much of what was read now is unfit."""
    reasons: Counter[str] = sum((report.reasons for report in reports), Counter())
    num_rows = sum(report.num_rows for report in reports) + reasons.total()
    most = settings.import_events.max_quarantined_share
    if reasons.total() > most * num_rows:
        reason, count = reasons.most_common(1)[0]
        raise UserError(
            f"import_events.max_quarantined_share={most}: {reasons.total()} of {num_rows} rows are unfit, {count} of them: "
            f"{reason}; see {settings.path('tables', 'quarantine')}, then repair the log or raise the share"
        )


if __name__ == "__main__":
    flags = (("since-last", "read only files that the served version does not hold"),)
    run_job(__doc__, run, flags=flags, needs_ray=False)
