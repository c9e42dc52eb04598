"""Builds the sequence table, one row a user, and the item catalogue:

python -m jobs.build_sequences --config configs/quickstart.yaml [--since-last]
"""

from longer.config import Settings
from longer.data.build_plan import BuildPlan, plan_build
from longer.data.ray_items import publish_items
from longer.data.ray_sequences import Build, readable_files, write_sequences
from longer.data.tables import open_version
from longer.errors import UserError
from longer.files import remove_tree
from longer.progress import say
from longer.runner import run_job, user_error_in
from longer.storage import Table, Version
from longer.table_settings import ImportSettings


def run(settings: Settings, since_last: bool = False) -> Version:
    """The sequence table of the served events; beside it, the catalogue of its items.

    With `since_last`, the last version with the events merged in that have come since.
    """
    table, schema = Table(settings.path("tables", "sequences")), settings.event_schema
    base = table.current() if since_last else None
    version = build(settings, table, base)
    publish_items(settings.path("tables", "items"), settings.path("tables", "events"), version, base, schema)
    return version


def build(settings: Settings, table: Table, base: Version | None) -> Version:
    """The sequence table alone, of the rows that were imported: events or impressions."""
    schema, asked, about = settings.event_schema, settings.sequences, settings.import_events
    events = imported(settings)
    rows_of = readable_files(events.files(), schema, True, type(about)) if asked.skip_unreadable_files else None
    unreadable = set(events.files()) - set(rows_of) if rows_of is not None else set()
    plan = plan_build(settings, events, unreadable, base)
    if base and not plan.files and base.manifest["inputs"]["events"] == events.id:
        say(about.sequences_job, f"version {base.id} has all {about.rows}, nothing changed")
        return base
    if published := table.reuse(plan.version_id):
        remove_tree(Build(plan, schema, published.path).scratch)  # if a run was killed before it could
        say(about.sequences_job, f"version {published.id} is already built, nothing changed")
        return published
    rows_of = rows_of or readable_files(plan.files, schema, False, type(about))
    if not base and not any(sum(rows_of[path]) for path in plan.files):
        raise UserError(f"{events.path}: the log of {about.rows} is empty: import one with at least one row")
    passes = Build(plan, schema, _folder(table, plan))
    try:
        blocks, buckets = write_sequences(passes, {path: rows_of[path] for path in plan.files}, about.rows)
    except Exception as error:
        if user_error_in(error):  # otherwise a rerun goes on from what is there
            table.discard(plan.version_id)
        raise
    version = table.publish(plan.version_id, *plan.content(blocks, buckets))
    remove_tree(passes.scratch)
    _tell(version, base, about)
    return version


def imported(settings: Settings) -> Version:
    """The rows that are served: events or impressions."""
    job = f"jobs.{settings.import_events.section}"
    return open_version(settings.path("tables", "events"), settings.event_schema, None, job)


def _folder(table: Table, plan: BuildPlan) -> str:
    """Where to write: what a killed run of this build has done is there, what is left of others is removed."""
    if table.find(plan.version_id):  # it lost files: its records cannot be trusted
        return table.begin(plan.version_id)
    path = table.resume(plan.version_id)
    table.sweep(but=plan.version_id)
    return path


def _tell(version: Version, base: Version | None, about: ImportSettings) -> None:
    counts = version.manifest
    late = counts["num_too_late"] - (base.manifest["num_too_late"] if base else 0)
    told = f"version {version.id}: {counts['num_users']} users, {counts['num_events_kept']} {about.rows} kept"
    say(about.sequences_job, told + (f"; {late} came too late and are left out" if late else ""))


if __name__ == "__main__":
    since_last = ("since-last", "merge what has come since the last version into it")
    run_job(__doc__, run, flags=(since_last,), check=imported)
