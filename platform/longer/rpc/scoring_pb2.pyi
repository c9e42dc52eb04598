from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Id(_message.Message):
    __slots__ = ("number", "text")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    number: int
    text: str
    def __init__(self, number: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class Ids(_message.Message):
    __slots__ = ("numbers", "texts")
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    numbers: _containers.RepeatedScalarFieldContainer[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, numbers: _Optional[_Iterable[int]] = ..., texts: _Optional[_Iterable[str]] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("number", "integer", "text")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    number: float
    integer: int
    text: str
    def __init__(self, number: _Optional[float] = ..., integer: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class Column(_message.Message):
    __slots__ = ("name", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, name: _Optional[str] = ..., values: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("item_id", "event_ts", "action", "features")
    class FeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_TS_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    item_id: Id
    event_ts: int
    action: str
    features: _containers.MessageMap[str, Value]
    def __init__(self, item_id: _Optional[_Union[Id, _Mapping]] = ..., event_ts: _Optional[int] = ..., action: _Optional[str] = ..., features: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("user_id", "candidates", "features", "request_ts", "events", "top_k", "request_features")
    class RequestFeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_TS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FEATURES_FIELD_NUMBER: _ClassVar[int]
    user_id: Id
    candidates: Ids
    features: _containers.RepeatedCompositeFieldContainer[Column]
    request_ts: int
    events: _containers.RepeatedCompositeFieldContainer[Event]
    top_k: int
    request_features: _containers.MessageMap[str, Value]
    def __init__(self, user_id: _Optional[_Union[Id, _Mapping]] = ..., candidates: _Optional[_Union[Ids, _Mapping]] = ..., features: _Optional[_Iterable[_Union[Column, _Mapping]]] = ..., request_ts: _Optional[int] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., top_k: _Optional[int] = ..., request_features: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class TaskScores(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class UserState(_message.Message):
    __slots__ = ("source", "num_events", "last_event_ts")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NUM_EVENTS_FIELD_NUMBER: _ClassVar[int]
    LAST_EVENT_TS_FIELD_NUMBER: _ClassVar[int]
    source: str
    num_events: int
    last_event_ts: int
    def __init__(self, source: _Optional[str] = ..., num_events: _Optional[int] = ..., last_event_ts: _Optional[int] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("candidates", "scores", "model_version", "user_state")
    class ScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: TaskScores
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[TaskScores, _Mapping]] = ...) -> None: ...
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    USER_STATE_FIELD_NUMBER: _ClassVar[int]
    candidates: Ids
    scores: _containers.MessageMap[str, TaskScores]
    model_version: str
    user_state: UserState
    def __init__(self, candidates: _Optional[_Union[Ids, _Mapping]] = ..., scores: _Optional[_Mapping[str, TaskScores]] = ..., model_version: _Optional[str] = ..., user_state: _Optional[_Union[UserState, _Mapping]] = ...) -> None: ...

class ScoreBatchRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[ScoreRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[ScoreRequest, _Mapping]]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("error", "status")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    error: str
    status: int
    def __init__(self, error: _Optional[str] = ..., status: _Optional[int] = ...) -> None: ...

class ScoreResult(_message.Message):
    __slots__ = ("response", "refusal")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    response: ScoreResponse
    refusal: Refusal
    def __init__(self, response: _Optional[_Union[ScoreResponse, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class ScoreBatchResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ScoreResult]
    def __init__(self, results: _Optional[_Iterable[_Union[ScoreResult, _Mapping]]] = ...) -> None: ...

class AddEventsRequest(_message.Message):
    __slots__ = ("user_id", "events")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    user_id: Id
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, user_id: _Optional[_Union[Id, _Mapping]] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class AddEventsResponse(_message.Message):
    __slots__ = ("received", "new", "replica")
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    NEW_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    received: int
    new: int
    replica: str
    def __init__(self, received: _Optional[int] = ..., new: _Optional[int] = ..., replica: _Optional[str] = ...) -> None: ...

class ForgetUserRequest(_message.Message):
    __slots__ = ("user_id",)
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: Id
    def __init__(self, user_id: _Optional[_Union[Id, _Mapping]] = ...) -> None: ...

class ForgetUserResponse(_message.Message):
    __slots__ = ("replicas", "held")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    replicas: int
    held: int
    def __init__(self, replicas: _Optional[int] = ..., held: _Optional[int] = ...) -> None: ...

class ModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Task(_message.Message):
    __slots__ = ("name", "kind")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class ModelResponse(_message.Message):
    __slots__ = ("model_version", "refused_rollout", "schema_hash", "encoding", "tasks", "item_features", "event_fields", "history_events", "sequences_version", "request_features")
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    REFUSED_ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_HASH_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    ITEM_FEATURES_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELDS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_EVENTS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FEATURES_FIELD_NUMBER: _ClassVar[int]
    model_version: str
    refused_rollout: bool
    schema_hash: str
    encoding: str
    tasks: _containers.RepeatedCompositeFieldContainer[Task]
    item_features: _containers.RepeatedScalarFieldContainer[str]
    event_fields: _containers.RepeatedScalarFieldContainer[str]
    history_events: int
    sequences_version: str
    request_features: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model_version: _Optional[str] = ..., refused_rollout: _Optional[bool] = ..., schema_hash: _Optional[str] = ..., encoding: _Optional[str] = ..., tasks: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., item_features: _Optional[_Iterable[str]] = ..., event_fields: _Optional[_Iterable[str]] = ..., history_events: _Optional[int] = ..., sequences_version: _Optional[str] = ..., request_features: _Optional[_Iterable[str]] = ...) -> None: ...
