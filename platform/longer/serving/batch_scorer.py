"""The actor of an offline run: it loads the model once, and then answers one bucket of users after the other."""

import json
import os
import resource
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import torch
from ray.actor import ActorHandle

from longer.data.records import Record
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.serving.batch_answers import Answers
from longer.serving.batch_check import OnlineCheck, chosen_numbers, compare, num_left_out
from longer.serving.batch_input import Chunk, Reader
from longer.serving.batch_output import Run, remember_bucket, write_rows
from longer.serving.batch_plan import Plan
from longer.serving.batch_roll import sign
from longer.serving.batch_waiting import Waiting, Written
from longer.serving.batch_warm import FirstSweep, warm_up
from longer.serving.questions import Budget
from longer.serving.room import BATCH_USERS
from longer.serving.scorer import Scorer
from longer.serving.stages import collected_ms, stage
from longer.training.checkpoints import load_model
from longer.training.loader import prefetch

_CACHE_BYTES = 64 << 20
_SWITCH_S = 0.0005
"""How long who reads or lays out may hold Python while kernels wait to be launched: by default 5 ms each time."""
_CHECK_PART = 4
"""Of `batch_bytes` the check has a fourth, because on a GPU another bucket is scored meanwhile."""


class BucketScorer:
    """Writes the answers of the buckets it is given; one instance an actor, which loads the model once."""

    def __init__(self, plan: Plan, run: Run, actors: ActorHandle | None = None) -> None:
        if actors:
            sign(actors)
            sys.setswitchinterval(_SWITCH_S)
        self._plan, self._run, self._id, self._began = plan, run, uuid.uuid4().hex, time.perf_counter()
        self._checking, self._charging = threading.Lock(), threading.Lock()
        self._beside = torch.cuda.Stream() if plan.device == "cuda" else None
        self._charged, started = (0.0, 0.0), _clocks()
        with run.starting(plan.most_actors, plan.section), _memory_told(plan), collected_ms() as stages:
            self._start()
        self._peak_of_start = _peak_gpu_bytes(plan)
        if plan.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._held_bytes = torch.cuda.memory_allocated()
        else:
            self._held_bytes = _peak_bytes()
        self._actor = {
            "name": f"{socket.gethostname()}:{os.getpid()}:{self._id[:8]}",
            "start_ms": stages,
            **self._charge(started),
        }

    def _start(self) -> None:
        plan, run = self._plan, self._run
        sequences = f"{plan.root}/tables/sequences"
        with stage("load"):
            model, info = load_model(plan.checkpoint.path, plan.device)
        self._scorer: Scorer | None = None  # without user states, there is no serving path to compare with
        if info.model.is_appendable:
            self._scorer = Scorer(
                plan.checkpoint.path,
                sequences,
                _CACHE_BYTES,
                plan.items_path,
                plan.sequences.id,
                plan.device,
                state_precision=plan.precision,
                is_plain=True,  # compiled, a few requests of each bucket would cost more than all others
            )
            model = self._scorer.model
        check_bytes = plan.batch_bytes // _CHECK_PART
        answers = Answers.of(plan, Budget(model, plan.batch_bytes - check_bytes), run)
        self._answers = replace(answers, turn=_Turn(), before_sweep=FirstSweep(answers, run))
        num_groups = model.windows.history_groups + model.windows.stride_groups
        of_check = Budget(model, check_bytes)
        self._most_checked = of_check.candidates(num_groups)
        self._waiting = Waiting(min(BATCH_USERS, of_check.most_users) if self._scorer else 1, self._most_checked)
        self._reader = Reader(
            plan=plan,
            sequences=SequenceTable(sequences, plan.schema, plan.sequences.id),
            run=run,
            windows=model.windows,
            outputs_a_request=self._answers.values_a_user,
            bytes_a_request=self._answers.bytes_a_user,
        )
        with stage("warm up"):
            warm_up(self._answers, self._scorer, self._run)

    def __call__(self, rows: pa.Table) -> pa.Table:
        with _memory_told(self._plan):
            records = [record for bucket in rows["bucket"].to_pylist() for record in self.write_bucket(bucket)]
        return pa.table({"record": pa.array([json.dumps(record) for record in records], pa.string())})

    def write_bucket(self, bucket: int) -> list[Record]:
        """Writes one bucket's file, of which there is none if nobody is asked about in it; records of the buckets done by that.

        This one is among them, or waits for others that this actor is at, to be compared with them; until then it is not done.
        """
        self._run.begin(bucket, self._id, f"{self._plan.section}.batch_bytes")
        started = _clocks()
        with collected_ms() as stages:
            with self._waiting.at_work():
                written = self._written(bucket, stages, started)
            if not (due := self._waiting.due(written)):
                return []  # from here on its record is another thread's
            # not in a turn, and no wait for what is queued on the device: another bucket is scored meanwhile
            with self._checking, torch.cuda.stream(self._beside):
                compare([one.check for one in due])
        for name, seconds in self._charge(started).items():
            written.record[name] += seconds
        for one in due[:-1]:
            one.record["stages_ms"]["wait"] = (time.perf_counter() - one.ended_s) * 1000
        return [self._done(one) for one in due]

    def _written(self, bucket: int, stages: dict[str, float], started: tuple[float, float]) -> Written:
        record: Record = {"bucket": bucket, "begun_at": time.time(), "num_requests": 0, "num_users": 0, "num_scores": 0}
        num_checked = self._plan.check_requests if self._scorer else 0
        (num_requests, chunks), items = self._reader.bucket(bucket), self._answers.items
        seed = int(self._plan.version_id, 16), bucket
        numbers = chosen_numbers(num_requests, num_checked, seed)
        others = num_left_out(num_requests, len(items.item_id_I), len(numbers)) if items else 0
        check = OnlineCheck(self._plan, self._scorer, items, numbers, self._most_checked, seed, others)
        written = write_rows(self._run.version_path, self._run.file_of(bucket), self._parts(chunks, check, record))
        record |= {
            "stages_ms": stages,
            "actor": self._actor,
            "file": asdict(written) if written else None,
            "device": self._plan.device,
            "check_requests": self._plan.check_requests,
            "has_states": self._scorer is not None,
            **self._charge(started),
        }
        return Written(record, check, started[0])

    def _done(self, written: Written) -> Record:
        record = written.record | {
            "done_at": time.time(),
            "held_s": time.perf_counter() - self._began,
            "peak_bytes": _peak_bytes(),
            "peak_gpu_bytes": max(self._peak_of_start, _peak_gpu_bytes(self._plan)),
            "working_bytes": (_peak_gpu_bytes(self._plan) or _peak_bytes()) - self._held_bytes,
            "max_abs_diff": written.check.max_abs_diff,
            "num_compared": written.check.num_compared,
        }
        remember_bucket(self._run.version_path, record)
        self._run.end(record["bucket"], self._id)
        return record

    def _charge(self, started: tuple[float, float]) -> dict[str, float]:
        """Seconds since then, of the device and of CPUs, that neither the actor's start nor a bucket was charged for."""
        with self._charging:
            now = _clocks()
            device_s, cpu_s = (
                end - max(begin, last) for end, begin, last in zip(now, started, self._charged, strict=True)
            )
            self._charged = now
        return {"device_s": device_s * self._plan.device_share, "cpu_s": cpu_s}

    def _parts(self, chunks: Iterator[Chunk], check: OnlineCheck, record: Record) -> Iterator[pa.Table]:
        """The rows of each chunk, which is read while the one before it is scored; counts them, and compares some.

        Scored in the thread that asked for the bucket: others get memory for large tensors anew each time, which costs a tenth.
        """
        last_user, ahead = None, prefetch(chunks, 1)
        while True:
            with stage("read"):
                chunk = next(ahead, None)
            if chunk is None:
                break
            rows = self._answers.rows(chunk)
            check.see(chunk, rows)
            record["num_requests"] += len(rows)
            begun_before = (
                chunk.user_id_R[0] == last_user
            )  # the chunk goes on with the user that the last one ended with
            record["num_users"] += len(np.unique(chunk.questions.row_R)) - begun_before
            last_user = chunk.user_id_R[-1]
            record["num_scores"] += self._answers.num_scores(chunk)
            yield rows


class _Turn:
    """The device, which is given one bucket's work at a time; waiting for it is the stage `queue`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with stage("queue"):
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _clocks() -> tuple[float, float]:
    """Now, and the seconds that this process has had of CPUs."""
    return time.perf_counter(), time.process_time()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_gpu_bytes(plan: Plan) -> int:
    return torch.cuda.max_memory_allocated() if plan.device == "cuda" else 0


@contextmanager
def _memory_told(plan: Plan) -> Iterator[None]:
    """A GPU without room for what is computed is the settings' mistake."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{plan.section}: an actor's GPU has no memory left: lower {plan.section}.batch_bytes ({plan.batch_bytes}), or raise "
            f"num_gpus_per_scorer ({plan.device_share}) so that fewer actors share it: {error}".splitlines()[0]
        ) from error
