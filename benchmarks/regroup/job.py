"""One contender's job, and the process it runs in: python -m benchmarks.regroup.job CONTENDER '{...}'

The last line it prints is JSON: seconds of getting ready (imports, Ray's start and a first small Ray Data run), seconds of the
job itself, and the files that hold the result.
"""

import glob
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

LISTS = ("item_id", "event_ts", "action")
COLUMNS = ("user_id", *LISTS)


@dataclass(frozen=True)
class Job:
    """Regroup a log: one row a user, a list column each for item, time and action, oldest to newest, as zstd Parquet."""

    log: str
    """Folder of the log's version in its events table: `dt=YYYY-MM-DD/*.parquet`."""
    out: str
    """Empty folder for the result."""
    scratch: str
    """Empty folder to spill to."""
    num_events: int
    num_cores: int
    memory_bytes: int | None
    """What the contender may use at most, if limited; each is told in its own way, besides being held to it."""

    @property
    def log_files(self) -> str:
        return f"{self.log}/dt=*/*.parquet"

    @property
    def num_partitions(self) -> int:
        """For libraries' two-pass forms: as few as leave a partition small beside a laptop's memory."""
        return max(16, self.num_events // 5_000_000)

    def written(self) -> list[str]:
        """What a contender has written directly into `out`."""
        return sorted(glob.glob(f"{self.out}/*.parquet"))


Contender = Callable[[Job], Callable[[], list[str]]]
"""Gets ready, then returns the work that is timed, which returns the files of the result."""


def main() -> None:
    from benchmarks.regroup import libraries, on_ray

    contender: Contender = (libraries.FORMS | on_ray.FORMS)[sys.argv[1]]
    job = Job(**json.loads(sys.argv[2]))
    started = time.perf_counter()
    work = contender(job)
    ready = time.perf_counter()
    files = work()
    done = time.perf_counter()
    print(json.dumps({"startup_seconds": ready - started, "seconds": done - ready, "files": files}))


if __name__ == "__main__":
    main()
