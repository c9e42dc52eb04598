"""Imports a log into the events table: python -m jobs.import_events --config configs/quickstart.yaml [--since-last]

With --since-last only the files that the served version does not hold are read; all others are shared with it.
"""

from collections import Counter
from datetime import UTC, datetime

from longer.config import Settings
from longer.data.import_plan import ImportPlan, plan_import
from longer.data.import_report import PartReport
from longer.data.ray_events import PartImporter, fits_one_task, write_events
from longer.data.tables import open_version
from longer.datasets import source_of
from longer.errors import UserError
from longer.progress import say
from longer.runner import run_job, start_ray
from longer.storage import Table, Version


def run(settings: Settings, since_last: bool = False) -> Version:
    """The events table of the settings' log; its unfit rows are in the quarantine table with their reasons.

    With `since_last`, the last version with the files added that have come since.
    """
    table, asked, schema = Table(settings.path("tables", "events")), settings.import_events, settings.event_schema
    has_base = since_last and table.current()
    base = open_version(table.path, schema, None, f"jobs.{asked.section}") if has_base else None
    source = source_of(asked)
    plan = plan_import(settings, source.locate(asked.source), base)
    for name, first in plan.duplicates.items():
        say(asked.section, f"{name}: the same bytes as {first}, imported once")
    published = base if base and not plan.parts else table.reuse(plan.version_id)
    if published:
        say(asked.section, f"version {published.id} is already built, nothing changed")
        return published
    say(asked.section, source.PROVENANCE)
    quarantine = Table(settings.path("tables", "quarantine"))
    reports = _write(settings, plan, table, quarantine)
    if base and all(report.problem for report in reports):
        table.discard(plan.version_id)
        say(asked.section, f"version {base.id}: no new file could be read, nothing changed")
        return base
    manifest = {**plan.manifest(reports), "provenance": source.PROVENANCE}
    unfit = [*_files_of(quarantine, base), *(file for report in reports for file in report.quarantine)]
    quarantine.publish(plan.version_id, {**manifest, "num_rows": manifest["num_quarantined"]}, unfit)
    try:
        _check_rows(settings, reports, manifest["num_rows"])
    except UserError:
        table.discard(plan.version_id)
        raise
    files = [*_files_of(table, base), *(file for report in reports for file in report.events)]
    version = table.publish(plan.version_id, manifest, files)
    counts = (
        f"{manifest['num_rows']} {asked.rows}, {manifest['num_new_rows']} of them new"
        if base
        else f"{manifest['num_rows']} {asked.rows}"
    )
    say(asked.section, f"version {version.id}: {counts}, {manifest['num_quarantined']} quarantined")
    return version


def _write(settings: Settings, plan: ImportPlan, table: Table, quarantine: Table) -> list[PartReport]:
    """Reports of the plan's parts, whose files are below the two tables' unpublished versions; skipped files are named."""
    quarantine.claim()
    quarantine.discard(plan.version_id)  # an earlier attempt may have got this far
    paths = table.begin(plan.version_id), f"{quarantine.path}/{plan.version_id}"
    importer = PartImporter(settings.import_events, settings.event_schema, datetime.now(UTC), *paths)
    try:
        if not fits_one_task(plan.parts):
            start_ray(settings.ray)
        reports = write_events(plan.parts, importer)
    except BaseException:
        table.discard(plan.version_id)
        quarantine.discard(plan.version_id)
        raise
    problems = {report.content_id: report.problem for report in reports if report.problem}
    for problem in problems.values():
        say(settings.import_events.section, f"skipped {problem}")
    torn = [report for report in reports if report.content_id in problems and not report.problem]
    for report in torn:  # other stretches of such a file
        report.remove_files(*paths)
    return [report for report in reports if report not in torn]


def _files_of(table: Table, base: Version | None) -> list:
    version = table.find(base.id) if base else None
    return version.data_files() if version else []


def _check_rows(settings: Settings, reports: list[PartReport], num_rows: int) -> None:
    """Raises UserError if too much of what was read now is unfit, or if the table would have no events."""
    asked, see = settings.import_events, f"see {settings.path('tables', 'quarantine')}"
    reasons: Counter[str] = sum((report.reasons for report in reports), Counter())
    num_read = sum(report.num_rows for report in reports) + reasons.total()
    if reasons.total() > asked.max_quarantined_share * num_read:
        reason, count = reasons.most_common(1)[0]
        raise UserError(
            f"{asked.section}.max_quarantined_share={asked.max_quarantined_share}: {reasons.total()} of {num_read} rows are "
            f"unfit, {count} of them: {reason}; {see}, then repair the log, or what {asked.section} says of it, or raise the share"
        )
    if not num_rows:
        problem = "the log has no events: import a log with at least one"
        if num_read:
            problem = f"no row of the log is fit: {see}"
        elif skipped := [report.problem for report in reports if report.problem]:
            problem = f"every file was skipped, one because of {skipped[0]}"
        raise UserError(f"{asked.source}: {problem}")


if __name__ == "__main__":
    flags = (("since-last", "read only files that the served version does not hold"),)
    run_job(__doc__, run, flags=flags, needs_ray=False)
