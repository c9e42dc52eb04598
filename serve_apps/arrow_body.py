"""Candidates and scores as Arrow IPC streams: the compact body for thousands of candidates with features.

In:  columns `id` and any item features, one row a candidate; the schema's metadata holds, under `request`, the rest of the
     request as the JSON of /v1/score without `candidates`.
Out: columns `id` and one float32 column a task; under `answer` the JSON of /v1/score's answer without these.

A stream is read only as far as its declared sizes stay within the limits: its columns are plain, its buffers not compressed (a
small body must not become a large one), and every value is validated before it is used.
"""

import json
from collections.abc import Iterator

import pyarrow as pa

from longer.serving.requests import ScoreRequest, ScoreResult
from serve_apps.protocol import Asked, BodyError, Limits, about_result, chosen, event_columns, parse_about

ARROW = "application/vnd.apache.arrow.stream"

_MAX_COLUMNS = 256
_NOT_A_STREAM = "body: not an Arrow IPC stream of plain columns"


def parse_arrow_body(body: bytes, limits: Limits) -> Asked:
    """The request; BodyError says what it should be."""
    table = _table(body, limits)
    about = parse_about((table.schema.metadata or {}).get(b"request", b"{}"))
    if "id" not in table.column_names or not len(table):
        raise BodyError(422, "candidates: expected a column `id` with at least one row")
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    ids = columns.pop("id")
    if ids.null_count:
        raise BodyError(422, "candidates: an id is null")
    events = event_columns(about.events, limits)
    request = ScoreRequest(about.user_id, ids, columns, about.request_ts, events, about.request_features)
    return Asked(request, about.top_k)


def arrow_answer(asked: Asked, result: ScoreResult, model_version: str) -> bytes:
    """The answer as a stream of one batch."""
    places = chosen(result, asked.top_k)
    ids = asked.request.item_ids
    assert isinstance(ids, pa.Array)
    columns = {"id": ids.take(pa.array(places)), **{task: pa.array(s[places]) for task, s in result.scores.items()}}
    answer = json.dumps(about_result(result, model_version))
    batch = pa.record_batch(columns).replace_schema_metadata({"answer": answer})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _table(body: bytes, limits: Limits) -> pa.Table:
    """The stream's rows, values valid; 413 before more candidates than the limit are looked at."""
    try:
        messages = list(_messages(body))
        schema = pa.ipc.read_schema(messages[0])
        if len(schema) > _MAX_COLUMNS or len(set(schema.names)) < len(schema) or not all(map(_is_plain, schema.types)):
            raise BodyError(422, f"{_NOT_A_STREAM}: ids and features are numbers or strings, each name once")
        batches, num_rows = [], 0
        for message in messages[1:]:
            num_rows += _rows_declared(message.metadata)
            limits.check_candidates(num_rows)
            batches.append(pa.ipc.read_record_batch(message, schema))
            batches[-1].validate(full=True)
        return pa.Table.from_batches(batches, schema)
    except (pa.ArrowException, OSError, IndexError, ValueError):
        raise BodyError(400, _NOT_A_STREAM) from None


def _messages(body: bytes) -> Iterator[pa.ipc.Message]:
    """The schema's message and the record batches'; a dictionary or another kind of message is not plain."""
    reader = pa.ipc.MessageReader.open_stream(pa.py_buffer(body))
    for number, message in enumerate(reader):
        if message.type != ("record batch" if number else "schema"):
            raise ValueError("another kind of message")
        yield message


def _is_plain(column: pa.DataType) -> bool:
    is_text = pa.types.is_string(column) or pa.types.is_large_string(column)
    return is_text or pa.types.is_integer(column) or pa.types.is_floating(column)


def _rows_declared(metadata: pa.Buffer) -> int:
    """Rows of a record batch, from its flatbuffer; ValueError if its buffers are compressed.

    Message: version, header type, header, ...; RecordBatch: length, nodes, buffers, compression (Arrow's Message.fbs).
    """
    flat = metadata.to_pybytes()
    message = _int(flat, 0, 4)
    header_at = _field(flat, message, 2)
    header = header_at + _int(flat, header_at, 4)
    if _field(flat, header, 3):
        raise ValueError("compressed buffers")
    length_at = _field(flat, header, 0)
    return _int(flat, length_at, 8) if length_at else 0


def _field(flat: bytes, table: int, number: int) -> int:
    """Where a table's field lies, 0 if it has none."""
    vtable = table - int.from_bytes(_part(flat, table, 4), "little", signed=True)
    if 4 + 2 * number >= _int(flat, vtable, 2):
        return 0
    offset = _int(flat, vtable + 4 + 2 * number, 2)
    return table + offset if offset else 0


def _int(flat: bytes, at: int, size: int) -> int:
    return int.from_bytes(_part(flat, at, size), "little")


def _part(flat: bytes, at: int, size: int) -> bytes:
    if not 0 <= at <= len(flat) - size:
        raise ValueError("outside the message")
    return flat[at : at + size]
