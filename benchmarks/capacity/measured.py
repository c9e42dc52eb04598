"""The measured constants of a plan, read from the results pages: a page that is written anew updates every plan made from it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"


@dataclass(frozen=True)
class Constant:
    """A number as it stands in `source`, a file of this repository: `text` is there to be found."""

    value: float
    text: str
    what: str
    at: str
    source: str


@dataclass(frozen=True)
class Measured:
    """All that plans are made from."""

    build_events_per_s: Constant
    build_events_per_s_20m: Constant
    build_growth: Constant
    build_peak_gb: Constant
    increment_events_per_s: Constant
    log_mb: Constant
    sequences_mb: Constant
    read_ms: Constant
    read_bytes: Constant
    train_step_ms: Constant
    train_users: Constant
    train_mean_events: Constant
    captured_step_ms: Constant
    full_step_ms: Constant
    full_step_users: Constant
    score_ms: Constant
    score_model_ms: Constant
    score_graph_ms: Constant
    served_score_ms: Constant
    served_encode_ms: Constant
    served_append_ms: Constant
    block_events: Constant
    most_blocks: Constant
    bucket_events: Constant
    most_buckets: Constant

    def constants(self) -> list[Constant]:
        return list(vars(self).values())


BUILD_CORES = 2
"""Cores of every sequences and point-read figure: their pages' names say cpu2."""
BUILD_EVENTS = 200_000_000
SCORE_REQUESTS, SCORE_CANDIDATES = 32, 500


def measured(root: Path = ROOT) -> Measured:
    """The constants of the newest page, by name, of each benchmark. ValueError: a page lacks a figure, which it names."""
    sequences, reads, model = (
        newest(root, what) for what in ("sequences_cpu2", "point_reads_cpu2", "model_speed_h100")
    )
    page, cpu = _Page(root, sequences), "2 cores of AMD EPYC, local disk"
    small, large = page.section("20,000,000"), page.section("200,000,000")
    at_200m = f"200 M events, 100,000 users, {cpu}"
    points, gpu = _Page(root, reads), _Page(root, model)
    train, full = ("training", "width256_L10000_zipf"), ("training", "width256_L2000_full")
    scored = ("scoring_ms", "width256_L10000_32x500")
    at_train = "one H100, D = 256, L = 10,000, 32 candidates a request, bf16"
    at_full = at_train.replace("L = 10,000", "L = 2,000")
    states = _Page(root, newest(root, "user_state_h200"))
    at_states = f"one H200, {SCORE_REQUESTS} users of 10,000 events, D = 256, bf16, from NumPy to NumPy"
    at_score = f"one H100, {SCORE_REQUESTS} users of 10,000 events x {SCORE_CANDIDATES} candidates, bf16, states ready"
    return Measured(
        page.cell(large, "longer", "events/s", "sequence build, events/s", at_200m),
        page.cell(small, "longer", "events/s", "the same at a tenth of the size", f"20 M events, 100,000 users, {cpu}"),
        page.figure(("growth_10x",), "time of the build for ten times the events", "20 M to 200 M events"),
        page.cell(large, "longer", "peak GB", "sequence build, peak memory in GB, Ray included", at_200m),
        page.cell(large, "longer: one more day", "events/s", "one more day, new events/s", f"a 30th of {at_200m}"),
        page.match(large, r"Log: ([\d,]+) MB", "event log, MB", at_200m),
        page.cell(large, "longer", "result MB", "sequence table, MB", at_200m),
        points.figure(("p50_ms",), "point read of one user, p50 ms", f"1 M users of 20 events, {cpu}, one at a time"),
        points.figure(("s3_bytes",), "bytes of the one ranged read it is over S3", "a local S3 server, not timed"),
        gpu.figure((*train, "ms_per_step", "ours"), "training step, kernel by kernel, ms", at_train),
        gpu.figure((*train, "users"), "users of that step, one request each", at_train),
        gpu.figure((*train, "mean_events"), "their mean events", "Zipf lengths up to 10,000"),
        gpu.figure((*train, "ms_per_step", "ours captured"), "the step as a CUDA graph, now in `jobs.train`, ms", at_train),
        gpu.figure((*full, "ms_per_step", "ours"), "training step of full histories of 2,000 events, ms", at_full),
        gpu.figure((*full, "users"), "users of that step, one request each", at_full),
        gpu.figure((*scored, "score"), "`score()` of one batch, ms", at_score),
        gpu.figure((*scored, "model"), "its model part, ms", at_score),
        gpu.figure((*scored, "graph"), "its model part as a CUDA graph, now in serving, ms", at_score),
        states.ms("hit", SCORE_CANDIDATES, f"scoring {SCORE_CANDIDATES} candidates a user, as served, ms", at_states),
        states.ms("encode", None, "`encode()` of one batch, as served, ms", at_states),
        states.ms("append 8, mixed", None, "`append()` of 8 events each, anywhere in their strides, as served, ms", at_states),
        *_limits(root),
    )  # fmt: skip


def newest(root: Path, what: str) -> str:
    """The page of the latest date in its name, relative to `root`."""
    pages = sorted(file.name for file in (root / RESULTS).glob(f"{what}_[0-9]*.md"))
    if not pages:
        raise ValueError(f"{RESULTS} has no {what}_DATE.md")
    return f"{RESULTS}/{pages[-1]}"


class _Page:
    """A results page: sections with a table each, and a last JSON line."""

    def __init__(self, root: Path, source: str) -> None:
        self.source, self.text = source, (root / source).read_text()
        self.json: dict[str, Any] = json.loads(self.text.strip().splitlines()[-1])

    def section(self, num_events: str) -> str:
        found = re.search(rf"^## {num_events} events.*?(?=^## |\Z)", self.text, re.M | re.S)
        if not found:
            raise ValueError(f"{self.source} has no section of {num_events} events")
        return found[0]

    def match(self, section: str, pattern: str, what: str, at: str) -> Constant:
        found = re.search(pattern, section)
        if not found:
            raise ValueError(f"{self.source} has no '{pattern}'")
        return Constant(_number(found[1]), found[1], what, at, self.source)

    def cell(self, section: str, contender: str, column: str, what: str, at: str) -> Constant:
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"
        ]
        of_name = {row[0]: row for row in rows}
        if contender not in of_name or column not in rows[0]:
            raise ValueError(f"{self.source} has no '{column}' of '{contender}'")
        text = of_name[contender][rows[0].index(column)].split(" ")[0]
        return Constant(_number(text), text, what, at, self.source)

    def ms(self, arm: str, candidates: int | None, what: str, at: str) -> Constant:
        """Of a page of user states: its model, the longest histories, and batches as scored here."""
        cells = " | ".join(["256", "10000", str(SCORE_REQUESTS), str(candidates or ""), arm, "graph"])
        found = re.search(rf"^\| {re.escape(cells)} \| ([\d.]+) \|", self.text, re.M)
        if not found:
            raise ValueError(f"{self.source} has no '{arm}' of {SCORE_REQUESTS} users as a graph")
        return Constant(_number(found[1]), found[1], what, at, self.source)

    def figure(self, path: tuple[str, ...], what: str, at: str) -> Constant:
        value: Any = self.json
        for name in path:
            if name not in value:
                raise ValueError(f"{self.source} has no {'.'.join(path)} in its last line")
            value = value[name]
        return Constant(value, json.dumps(value), what, at, self.source)


def _limits(root: Path) -> list[Constant]:
    """What the build cuts tables into: from the code, not measurements."""
    named = [
        ("data/segments.py", "_BLOCK_ROWS", "events of a block of the log"),
        ("data/segments.py", "_MOST_BLOCKS", "blocks of one build; beyond it they grow"),
        ("data/build_plan.py", "_EVENTS_PER_BUCKET", "events of a bucket of users"),
        ("data/build_plan.py", "_MOST_BUCKETS", "buckets of a table; beyond it they grow"),
    ]
    limits = []
    for file, name, what in named:
        source = f"platform/longer/{file}"
        found = re.search(rf"^{name} = ([\d_]+)(?: << (\d+))?", (root / source).read_text(), re.M)
        if not found:
            raise ValueError(f"{source} has no {name}")
        limits.append(Constant(int(found[1]) << int(found[2] or 0), found[0], what, "a limit of the code", source))
    return limits


def _number(text: str) -> float:
    return float(text.replace(",", ""))
