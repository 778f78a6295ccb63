from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_STARTING: _ClassVar[Phase]
    PHASE_WAITING: _ClassVar[Phase]
    PHASE_TRAINING: _ClassVar[Phase]
    PHASE_SERVING: _ClassVar[Phase]
    PHASE_DONE: _ClassVar[Phase]
    PHASE_STOPPING: _ClassVar[Phase]
    PHASE_CATCHING_UP: _ClassVar[Phase]
    PHASE_AGREEING: _ClassVar[Phase]
    PHASE_PAUSED: _ClassVar[Phase]

class WireFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WIRE_FORMAT_FP32: _ClassVar[WireFormat]
    WIRE_FORMAT_BF16: _ClassVar[WireFormat]
    WIRE_FORMAT_INT8: _ClassVar[WireFormat]
PHASE_UNSPECIFIED: Phase
PHASE_STARTING: Phase
PHASE_WAITING: Phase
PHASE_TRAINING: Phase
PHASE_SERVING: Phase
PHASE_DONE: Phase
PHASE_STOPPING: Phase
PHASE_CATCHING_UP: Phase
PHASE_AGREEING: Phase
PHASE_PAUSED: Phase
WIRE_FORMAT_FP32: WireFormat
WIRE_FORMAT_BF16: WireFormat
WIRE_FORMAT_INT8: WireFormat

class Sender(_message.Message):
    __slots__ = ("run", "node", "session")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    run: str
    node: str
    session: int
    def __init__(self, run: _Optional[str] = ..., node: _Optional[str] = ..., session: _Optional[int] = ...) -> None: ...

class FingerprintField(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class Contact(_message.Message):
    __slots__ = ("node", "address")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    node: str
    address: str
    def __init__(self, node: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("sender", "protocol", "fingerprint", "port", "phase", "visit", "host", "entry", "version", "time", "revoked")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    VISIT_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    protocol: int
    fingerprint: _containers.RepeatedCompositeFieldContainer[FingerprintField]
    port: int
    phase: Phase
    visit: int
    host: str
    entry: int
    version: str
    time: float
    revoked: int
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., protocol: _Optional[int] = ..., fingerprint: _Optional[_Iterable[_Union[FingerprintField, _Mapping]]] = ..., port: _Optional[int] = ..., phase: _Optional[_Union[Phase, str]] = ..., visit: _Optional[int] = ..., host: _Optional[str] = ..., entry: _Optional[int] = ..., version: _Optional[str] = ..., time: _Optional[float] = ..., revoked: _Optional[int] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("sender", "protocol", "fingerprint", "phase", "visit", "known", "refusal", "entry", "version", "time", "unreached", "revoked")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    VISIT_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    UNREACHED_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    protocol: int
    fingerprint: _containers.RepeatedCompositeFieldContainer[FingerprintField]
    phase: Phase
    visit: int
    known: _containers.RepeatedCompositeFieldContainer[Contact]
    refusal: str
    entry: int
    version: str
    time: float
    unreached: bool
    revoked: int
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., protocol: _Optional[int] = ..., fingerprint: _Optional[_Iterable[_Union[FingerprintField, _Mapping]]] = ..., phase: _Optional[_Union[Phase, str]] = ..., visit: _Optional[int] = ..., known: _Optional[_Iterable[_Union[Contact, _Mapping]]] = ..., refusal: _Optional[str] = ..., entry: _Optional[int] = ..., version: _Optional[str] = ..., time: _Optional[float] = ..., unreached: bool = ..., revoked: _Optional[int] = ...) -> None: ...

class VisitOffer(_message.Message):
    __slots__ = ("sender", "visit", "step", "wire_format")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    VISIT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WIRE_FORMAT_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    visit: int
    step: int
    wire_format: WireFormat
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., visit: _Optional[int] = ..., step: _Optional[int] = ..., wire_format: _Optional[_Union[WireFormat, str]] = ...) -> None: ...

class VisitDegree(_message.Message):
    __slots__ = ("sender", "visit", "degree", "graph")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    VISIT_FIELD_NUMBER: _ClassVar[int]
    DEGREE_FIELD_NUMBER: _ClassVar[int]
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    visit: int
    degree: int
    graph: int
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., visit: _Optional[int] = ..., degree: _Optional[int] = ..., graph: _Optional[int] = ...) -> None: ...

class VisitAnswer(_message.Message):
    __slots__ = ("verdict", "visit", "closed")
    class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        VERDICT_UNSPECIFIED: _ClassVar[VisitAnswer.Verdict]
        VERDICT_ACCEPTED: _ClassVar[VisitAnswer.Verdict]
        VERDICT_PASSED: _ClassVar[VisitAnswer.Verdict]
        VERDICT_NOT_WANTED: _ClassVar[VisitAnswer.Verdict]
    VERDICT_UNSPECIFIED: VisitAnswer.Verdict
    VERDICT_ACCEPTED: VisitAnswer.Verdict
    VERDICT_PASSED: VisitAnswer.Verdict
    VERDICT_NOT_WANTED: VisitAnswer.Verdict
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    VISIT_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    verdict: VisitAnswer.Verdict
    visit: int
    closed: bool
    def __init__(self, verdict: _Optional[_Union[VisitAnswer.Verdict, str]] = ..., visit: _Optional[int] = ..., closed: bool = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("sender", "serial", "wire_format", "base")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    WIRE_FORMAT_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    serial: int
    wire_format: WireFormat
    base: int
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., serial: _Optional[int] = ..., wire_format: _Optional[_Union[WireFormat, str]] = ..., base: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("serial", "offset", "xxh3", "data")
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    serial: int
    offset: int
    xxh3: int
    data: bytes
    def __init__(self, serial: _Optional[int] = ..., offset: _Optional[int] = ..., xxh3: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ListBlocksRequest(_message.Message):
    __slots__ = ("sender", "after")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    after: int
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., after: _Optional[int] = ...) -> None: ...

class BlockState(_message.Message):
    __slots__ = ("block", "visit", "bytes", "xxh3")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    VISIT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    block: int
    visit: int
    bytes: int
    xxh3: str
    def __init__(self, block: _Optional[int] = ..., visit: _Optional[int] = ..., bytes: _Optional[int] = ..., xxh3: _Optional[str] = ...) -> None: ...

class BlockList(_message.Message):
    __slots__ = ("sender", "visit", "closed", "blocks", "step")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    VISIT_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    visit: int
    closed: bool
    blocks: _containers.RepeatedCompositeFieldContainer[BlockState]
    step: int
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., visit: _Optional[int] = ..., closed: bool = ..., blocks: _Optional[_Iterable[_Union[BlockState, _Mapping]]] = ..., step: _Optional[int] = ...) -> None: ...

class FetchBlockRequest(_message.Message):
    __slots__ = ("sender", "block", "xxh3", "offset")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    block: int
    xxh3: str
    offset: int
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., block: _Optional[int] = ..., xxh3: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class GoodbyeRequest(_message.Message):
    __slots__ = ("sender", "finished")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    finished: bool
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., finished: bool = ...) -> None: ...

class GoodbyeReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Revocation(_message.Message):
    __slots__ = ("node", "signature")
    NODE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    node: str
    signature: bytes
    def __init__(self, node: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Revocations(_message.Message):
    __slots__ = ("revoked",)
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    revoked: _containers.RepeatedCompositeFieldContainer[Revocation]
    def __init__(self, revoked: _Optional[_Iterable[_Union[Revocation, _Mapping]]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    def __init__(self, request: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    def __init__(self, certificate: _Optional[bytes] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ("interval_seconds",)
    INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    interval_seconds: float
    def __init__(self, interval_seconds: _Optional[float] = ...) -> None: ...

class ListPeersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPeersReply(_message.Message):
    __slots__ = ("peers",)
    PEERS_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[PeerStatus]
    def __init__(self, peers: _Optional[_Iterable[_Union[PeerStatus, _Mapping]]] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("run", "node", "version", "phase", "round", "position", "step", "rounds", "blocks", "steps_per_visit", "block", "steps_done", "steps_total", "eta_seconds", "uptime_seconds", "loss", "gradient_norm", "disagreement", "degree", "own_weight", "incomplete_mixes", "device", "memory_bytes", "device_memory_bytes", "bytes_sent", "bytes_received", "send_rate", "receive_rate", "address", "model", "waiting_for", "peers", "refusals", "warnings", "pid", "members_wanted", "catch_up_bytes", "catch_up_total", "security", "certificate_ends", "revoked", "h_norm", "events", "label_counts", "block_disagreement", "round_order", "method", "topology")
    class RefusalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class LabelCountsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_VISIT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    STEPS_DONE_FIELD_NUMBER: _ClassVar[int]
    STEPS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ETA_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    DISAGREEMENT_FIELD_NUMBER: _ClassVar[int]
    DEGREE_FIELD_NUMBER: _ClassVar[int]
    OWN_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_MIXES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    SEND_RATE_FIELD_NUMBER: _ClassVar[int]
    RECEIVE_RATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_WANTED_FIELD_NUMBER: _ClassVar[int]
    CATCH_UP_BYTES_FIELD_NUMBER: _ClassVar[int]
    CATCH_UP_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SECURITY_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_ENDS_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    H_NORM_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    LABEL_COUNTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_DISAGREEMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_ORDER_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    run: str
    node: str
    version: str
    phase: Phase
    round: int
    position: int
    step: int
    rounds: int
    blocks: int
    steps_per_visit: int
    block: int
    steps_done: int
    steps_total: int
    eta_seconds: float
    uptime_seconds: float
    loss: float
    gradient_norm: float
    disagreement: float
    degree: int
    own_weight: float
    incomplete_mixes: int
    device: str
    memory_bytes: int
    device_memory_bytes: int
    bytes_sent: int
    bytes_received: int
    send_rate: float
    receive_rate: float
    address: str
    model: str
    waiting_for: str
    peers: _containers.RepeatedCompositeFieldContainer[PeerStatus]
    refusals: _containers.ScalarMap[str, int]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    pid: int
    members_wanted: int
    catch_up_bytes: int
    catch_up_total: int
    security: str
    certificate_ends: float
    revoked: _containers.RepeatedScalarFieldContainer[str]
    h_norm: float
    events: _containers.RepeatedCompositeFieldContainer[NodeEvent]
    label_counts: _containers.ScalarMap[str, int]
    block_disagreement: _containers.RepeatedScalarFieldContainer[float]
    round_order: _containers.RepeatedScalarFieldContainer[int]
    method: str
    topology: str
    def __init__(self, run: _Optional[str] = ..., node: _Optional[str] = ..., version: _Optional[str] = ..., phase: _Optional[_Union[Phase, str]] = ..., round: _Optional[int] = ..., position: _Optional[int] = ..., step: _Optional[int] = ..., rounds: _Optional[int] = ..., blocks: _Optional[int] = ..., steps_per_visit: _Optional[int] = ..., block: _Optional[int] = ..., steps_done: _Optional[int] = ..., steps_total: _Optional[int] = ..., eta_seconds: _Optional[float] = ..., uptime_seconds: _Optional[float] = ..., loss: _Optional[float] = ..., gradient_norm: _Optional[float] = ..., disagreement: _Optional[float] = ..., degree: _Optional[int] = ..., own_weight: _Optional[float] = ..., incomplete_mixes: _Optional[int] = ..., device: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., device_memory_bytes: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., send_rate: _Optional[float] = ..., receive_rate: _Optional[float] = ..., address: _Optional[str] = ..., model: _Optional[str] = ..., waiting_for: _Optional[str] = ..., peers: _Optional[_Iterable[_Union[PeerStatus, _Mapping]]] = ..., refusals: _Optional[_Mapping[str, int]] = ..., warnings: _Optional[_Iterable[str]] = ..., pid: _Optional[int] = ..., members_wanted: _Optional[int] = ..., catch_up_bytes: _Optional[int] = ..., catch_up_total: _Optional[int] = ..., security: _Optional[str] = ..., certificate_ends: _Optional[float] = ..., revoked: _Optional[_Iterable[str]] = ..., h_norm: _Optional[float] = ..., events: _Optional[_Iterable[_Union[NodeEvent, _Mapping]]] = ..., label_counts: _Optional[_Mapping[str, int]] = ..., block_disagreement: _Optional[_Iterable[float]] = ..., round_order: _Optional[_Iterable[int]] = ..., method: _Optional[str] = ..., topology: _Optional[str] = ...) -> None: ...

class NodeEvent(_message.Message):
    __slots__ = ("serial", "age_seconds", "kind", "text", "peer")
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    serial: int
    age_seconds: float
    kind: str
    text: str
    peer: str
    def __init__(self, serial: _Optional[int] = ..., age_seconds: _Optional[float] = ..., kind: _Optional[str] = ..., text: _Optional[str] = ..., peer: _Optional[str] = ...) -> None: ...

class GetHistoryRequest(_message.Message):
    __slots__ = ("after", "limit")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after: int
    limit: int
    def __init__(self, after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class HistoryReply(_message.Message):
    __slots__ = ("points",)
    POINTS_FIELD_NUMBER: _ClassVar[int]
    points: _containers.RepeatedCompositeFieldContainer[HistoryPoint]
    def __init__(self, points: _Optional[_Iterable[_Union[HistoryPoint, _Mapping]]] = ...) -> None: ...

class HistoryPoint(_message.Message):
    __slots__ = ("first", "last", "loss", "gradient_norm", "h_norm", "disagreement", "seconds")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    H_NORM_FIELD_NUMBER: _ClassVar[int]
    DISAGREEMENT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    first: int
    last: int
    loss: float
    gradient_norm: float
    h_norm: float
    disagreement: float
    seconds: float
    def __init__(self, first: _Optional[int] = ..., last: _Optional[int] = ..., loss: _Optional[float] = ..., gradient_norm: _Optional[float] = ..., h_norm: _Optional[float] = ..., disagreement: _Optional[float] = ..., seconds: _Optional[float] = ...) -> None: ...

class PeerStatus(_message.Message):
    __slots__ = ("node", "address", "state", "phase", "visit", "neighbour", "weight", "last_seen_seconds", "bytes_sent", "bytes_received", "refusals", "detail", "send_rate", "receive_rate", "waited_seconds", "retries", "wire_format")
    class RefusalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    VISIT_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOUR_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    SEND_RATE_FIELD_NUMBER: _ClassVar[int]
    RECEIVE_RATE_FIELD_NUMBER: _ClassVar[int]
    WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    WIRE_FORMAT_FIELD_NUMBER: _ClassVar[int]
    node: str
    address: str
    state: str
    phase: Phase
    visit: int
    neighbour: bool
    weight: float
    last_seen_seconds: float
    bytes_sent: int
    bytes_received: int
    refusals: _containers.ScalarMap[str, int]
    detail: str
    send_rate: float
    receive_rate: float
    waited_seconds: float
    retries: int
    wire_format: str
    def __init__(self, node: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., phase: _Optional[_Union[Phase, str]] = ..., visit: _Optional[int] = ..., neighbour: bool = ..., weight: _Optional[float] = ..., last_seen_seconds: _Optional[float] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., refusals: _Optional[_Mapping[str, int]] = ..., detail: _Optional[str] = ..., send_rate: _Optional[float] = ..., receive_rate: _Optional[float] = ..., waited_seconds: _Optional[float] = ..., retries: _Optional[int] = ..., wire_format: _Optional[str] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PauseReply(_message.Message):
    __slots__ = ("already",)
    ALREADY_FIELD_NUMBER: _ClassVar[int]
    already: bool
    def __init__(self, already: bool = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeReply(_message.Message):
    __slots__ = ("already",)
    ALREADY_FIELD_NUMBER: _ClassVar[int]
    already: bool
    def __init__(self, already: bool = ...) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckpointReply(_message.Message):
    __slots__ = ("visit", "step")
    VISIT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    visit: int
    step: int
    def __init__(self, visit: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopReply(_message.Message):
    __slots__ = ("pid",)
    PID_FIELD_NUMBER: _ClassVar[int]
    pid: int
    def __init__(self, pid: _Optional[int] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("name", "consensus")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONSENSUS_FIELD_NUMBER: _ClassVar[int]
    name: str
    consensus: bool
    def __init__(self, name: _Optional[str] = ..., consensus: bool = ...) -> None: ...

class ExportReply(_message.Message):
    __slots__ = ("path", "model")
    PATH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    path: str
    model: str
    def __init__(self, path: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...
