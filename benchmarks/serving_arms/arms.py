"""What was measured of one arm, and how two that were measured in turn compare."""

from collections import Counter
from dataclasses import dataclass
from statistics import median

from benchmarks.serving_arms.load import Sample

MOST_P99_MS = 50.0


@dataclass(frozen=True)
class Arm:
    """One line of the table: in `rounds` a sample by number of clients, and perhaps one at constant arrival."""

    name: str
    rounds: list[dict[int, Sample]]
    at_load: Sample | None = None

    @property
    def samples(self) -> dict[int, Sample]:
        """Those of all rounds together, by number of clients."""
        return {num: Sample.together([one[num] for one in self.rounds]) for num in self.rounds[0]}

    @property
    def one_client(self) -> Sample:
        samples = self.samples
        return samples[min(samples)]

    @property
    def num_clients(self) -> int:
        return best_of(self.samples)

    @property
    def best(self) -> Sample:
        """With most requests a second, within the latency at some number of clients, or else at any."""
        return self.samples[self.num_clients]

    @property
    def rps(self) -> float:
        return self.best.rps

    @property
    def is_within(self) -> bool:
        return is_within(self.best)

    def row(self) -> str:
        best = self.best
        mark = "" if self.is_within else f" (p99 {best.percentile_ms(99):.0f} ms)"
        at_load = "-" if self.at_load is None else times(self.at_load)
        failed = sum((one.failed for one in (*self.samples.values(), self.at_load) if one), Counter[str]())
        states = " ".join(f"{count} {source}" for source, count in sorted(best.sources.items())) or "-"
        return (
            f"| {self.name} | {times(self.one_client)} | {best.rps:.0f}{mark} | {self.num_clients} | {at_load} | {states} | "
            f"{dict(failed) or 'none'} |"
        )


def times(sample: Sample) -> str:
    return f"{sample.percentile_ms(50):.1f} / {sample.percentile_ms(99):.1f}"


def is_within(sample: Sample) -> bool:
    return sample.percentile_ms(99) <= MOST_P99_MS


def best_of(samples: dict[int, Sample]) -> int:
    """The number of clients with most requests a second at p99 within bounds; at any p99 if it never is."""
    within = [num for num, sample in samples.items() if is_within(sample)]
    return max(within or samples, key=lambda num: samples[num].rps)


def throughput_ratio(arm: Arm, other: Arm) -> float | None:
    """How many times the other's most requests a second with p99 within bounds: the median of the rounds, in each of which both
    met the same load of the machine. None where one of them is never within."""
    if not (arm.is_within and other.is_within):
        return None
    pairs = zip(arm.rounds, other.rounds, strict=True)
    return median(own[arm.num_clients].rps / others[other.num_clients].rps for own, others in pairs)


def told_ratio(what: str, arm: Arm, other: Arm) -> str:
    """A line of the page."""
    if (ratio := throughput_ratio(arm, other)) is not None:
        return f"- {what}: {ratio:.2f}, the median of {len(arm.rounds)} rounds"
    late = " and ".join(one.name for one in (arm, other) if not one.is_within)
    most = [max(sample.rps for sample in one.samples.values()) for one in (arm, other)]
    return (
        f"- {what}: no ratio, as {late} is not within {MOST_P99_MS:.0f} ms at any; "
        f"at any p99 {most[0]:.0f} and {most[1]:.0f} a second"
    )


def extra_ms(arm: Arm, other: Arm) -> float:
    """By how much one client's p50 is above the other's: the median of the rounds."""
    pairs = zip(arm.rounds, other.rounds, strict=True)
    return median(own[min(own)].percentile_ms(50) - others[min(others)].percentile_ms(50) for own, others in pairs)
