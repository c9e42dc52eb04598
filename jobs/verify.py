"""Proves that no request sees its future, and that the tables keep their promises; exit code 1 if they do not.

Requests made from impressions are compared with all of them: candidates, labels, features, and that none is lost.

python -m jobs.verify --config configs/quickstart.yaml
python -m jobs.verify --verify.sequences mine/sequences --verify.requests mine/requests    (plain Parquet folders)
"""

import sys

from longer.config import Settings
from longer.data.events import iso_ms
from longer.data.findings import KINDS, BucketReport, Findings
from longer.data.items import read_items
from longer.data.ray_verification import verify_tables
from longer.data.requests import SplitTimes
from longer.data.sequences import KeepRule
from longer.data.tables import SequenceTable
from longer.data.verification import Promises
from longer.data.verified_files import Source, open_source
from longer.data.verified_impressions import ShownRequests
from longer.data.verified_manifests import NOT_CHECKED
from longer.data.verified_tables import BucketVerifier
from longer.errors import UserError
from longer.files import exists
from longer.progress import say
from longer.runner import run_job
from longer.storage import Table
from longer.windows import WindowRule


def run(settings: Settings) -> BucketReport:
    """What was checked and what is wrong, printed too. Without a request table under root, the sequences alone."""
    requests = _requests(settings)
    named = requests.version.manifest["inputs"]["sequences"] if requests and requests.version else None
    sequences = _sequences(settings, named)
    if requests and requests.is_bucketed != sequences.is_bucketed:
        loose, other = (sequences, requests) if requests.is_bucketed else (requests, sequences)
        raise UserError(
            f"{loose.path}: lies in no buckets, but {other.path} does: put both under bucket=NNNN/, or neither"
        )
    shown = _impressions(settings, sequences, requests)
    verifier = BucketVerifier(_promises(settings, sequences, requests), settings.verify.max_shown, shown)
    report = verify_tables(sequences, requests, verifier)
    if requests and named and sequences.version and sequences.version.id != named:
        report.found.add_one("sequence_version", f"{requests.title}: made from version {named}")
    asked = requests.version.manifest["inputs"].get("impressions") if requests and requests.version else None
    if requests and asked and shown is None:
        report.found.add_one("impressions_version", f"{requests.title}: made from version {asked}")
    _print(report, sequences, requests)
    return report


def _requests(settings: Settings) -> Source | None:
    chosen, path = settings.verify, settings.verify.requests or settings.path("tables", "requests")
    if not (chosen.requests or chosen.requests_version or exists(path)):
        return None
    return open_source(path, settings.event_schema, chosen.requests_version, "jobs.build_requests")


def _sequences(settings: Settings, named: str | None) -> Source:
    """The pinned version, else the one that the requests name if this table has it, else the one served."""
    path = settings.verify.sequences or settings.path("tables", "sequences")
    version_id = settings.verify.sequences_version or (named if named and Table(path).find(named) else None)
    return open_source(path, settings.event_schema, version_id, "jobs.build_sequences")


def _impressions(settings: Settings, sequences: Source, requests: Source | None) -> ShownRequests | None:
    """The impressions that the requests name, if they are there, and those of them that the sequences let be requests."""
    named = requests.version.manifest["inputs"] if requests and requests.version else {}
    if "impressions" not in named or sequences.version is None or sequences.version.id != named["sequences"]:
        return None
    schema, group_id = settings.event_schema, settings.import_impressions.group_id
    path = settings.path("impressions", "tables", "sequences")
    if Table(path).find(named["impressions"]) is None:
        return None
    table = SequenceTable(path, schema.of_impressions(group_id), named["impressions"], "jobs.import_impressions")
    has_items = bool(schema.features_of("item"))
    items = read_items(settings.path("tables", "items"), sequences.version.id, schema) if has_items else None
    return ShownRequests(table, schema, group_id, items, iso_ms(sequences.version.manifest["watermark"]))


def _promises(settings: Settings, sequences: Source, requests: Source | None) -> Promises:
    """What the manifests say the tables were built with; of a plain folder, what the settings say."""
    built = sequences.version.manifest["settings"] if sequences.version else {}
    asked = requests.version.manifest if requests and requests.version else {}
    windows = asked.get("settings", {}).get("windows")
    stride_events = built.get("stride_events", settings.model.windows.stride_events)
    return Promises(
        schema=settings.event_schema,
        num_buckets=built.get("num_buckets") or (_num_buckets(settings) if sequences.is_bucketed else 1),
        stride_events=stride_events,
        windows=WindowRule(**windows) if windows else settings.model.windows,
        keep=KeepRule(built["keep_events"], stride_events) if "keep_events" in built else None,
        splits=SplitTimes(iso_ms(asked["valid_from"]), iso_ms(asked["test_from"])) if "test_from" in asked else None,
        ordered_ties=sequences.version is not None,
        complete_histories="inputs" in asked,
    )


def _num_buckets(settings: Settings) -> int:
    """Of tables without a manifest."""
    if settings.sequences.num_buckets is None:
        raise UserError(
            "sequences.num_buckets: tables without a manifest do not say how many buckets they have: set it"
        )
    return settings.sequences.num_buckets


def _print(report: BucketReport, sequences: Source, requests: Source | None) -> None:
    say("verify", f"sequences: {sequences.title}")
    say("verify", f"requests: {requests.title if requests else 'none yet under this root: sequences alone'}")
    say("verify", "checked " + ", ".join(f"{number} {name}" for name, number in sorted(report.checked.items())))
    if sequences.version:
        say("verify", f"not checked: {NOT_CHECKED}")
    _print_findings(report.found, "violations")
    _print_findings(report.noted, "not promised, only counted")
    say("verify", f"{report.found.num_violations} violations" if report.found.counts else "no violation")


def _print_findings(findings: Findings, title: str) -> None:
    for kind, count in sorted(findings.counts.items()):
        say("verify", f"{title}: {kind}, {count}: {KINDS[kind]}")
        for text in findings.shown[kind]:
            say("verify", f"  {kind}: {text}")
        if (rest := count - len(findings.shown[kind])) > 0:
            say("verify", f"  {kind}: and {rest} more")


if __name__ == "__main__":
    sys.exit(1 if run_job(__doc__, run).found.counts else 0)
