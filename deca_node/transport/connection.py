"""What both ends of a connection share: services, settings, and who is believed."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

import grpc

from deca_node.limits import (
    HANDSHAKE_SECONDS,
    IDLE_SECONDS,
    MAX_CONNECTIONS,
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    MAX_REQUEST_BYTES,
    MAX_STREAMS_PER_CONNECTION,
    STREAM_WINDOW_BYTES,
)
from deca_node.pb import node_pb2 as pb
from deca_node.transport import Caller
from deca_node.trust import common_name, node_name

# What a handshake may take; a cut that heals is noticed so much later.
HANDSHAKE_MS = 4_000

PEER = pb.DESCRIPTOR.services_by_name["Peer"]
STATUS = pb.DESCRIPTOR.services_by_name["Status"]
CONTROL = pb.DESCRIPTOR.services_by_name["Control"]

_COMMON: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    # Else that is where gRPC begins to refuse some of them, and all only from twice as much.
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # Bandwidth probing and small frames halve the rate of long streams.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.max_frame_size", 16_777_215),
    # A peer that goes silent without closing is noticed within 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
SERVER_OPTIONS = [
    *_COMMON,
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.so_reuseport", 0),  # two nodes on one port would share its callers
    ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # under the client's keepalive
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
    ("grpc.http2.settings_timeout", HANDSHAKE_SECONDS * 1000),
]
CLIENT_OPTIONS = [
    *_COMMON,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.lookahead_bytes", STREAM_WINDOW_BYTES),
    ("grpc.enable_http_proxy", 0),  # peers are on this network
    ("grpc.use_local_subchannel_pool", 1),
    # The default backoff grows to two minutes; a restarted neighbour is wanted back sooner.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
# That least pause is also what a connection has to be made in, and the other end of a handshake may
# be a machine that trains.
_SECURE_CLIENT = [
    *(option for option in CLIENT_OPTIONS if option[0] != "grpc.min_reconnect_backoff_ms"),
    ("grpc.min_reconnect_backoff_ms", HANDSHAKE_MS),
]

# What a caller is told for whom there is no place.
BUSY = "too many calls are open"


def target(address: str) -> str:
    """What gRPC is to call.

    Of a bare ``unix:80`` or ``ipv4:80`` it would take the host for a scheme. A socket file of this
    machine's own list (registry.py) is one in earnest, and no address has its slash.
    """
    if address.startswith("unix:/"):
        return address
    return f"dns:///{quote(address, safe=':')}"


@dataclass(frozen=True)
class Credentials:
    """What is shown on connections, and by whom those of others must be signed. All PEM.

    Attributes:
        key: private.
        certificate: of the key.
        authority: certificate of the run's authority.
        run: the run's name.
    """

    key: bytes
    certificate: bytes
    authority: bytes
    run: str

    def channel(self, address: str, node: str | None = None) -> grpc.aio.Channel:
        """A channel to a node of the run, or to the one of that name only."""
        ours = grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)
        name = common_name(self.run) if node is None else node_name(self.run, node)
        named = ("grpc.ssl_target_name_override", name)
        return grpc.aio.secure_channel(target(address), ours, options=[*_SECURE_CLIENT, named])

    def configuration(self) -> Any:
        """The same for a server's port."""
        pair = [(self.key, self.certificate)]
        return grpc.ssl_server_certificate_configuration(pair, self.authority)


class Guard(Protocol):
    """Whom a node believes, beyond what TLS checks when a connection is made.

    Attributes:
        refused: calls that were refused for who made them, by reason.
    """

    refused: Counter[str]

    def credentials(self) -> Credentials:
        """What to show now; another object once it has changed."""
        ...

    def admit(self, certificate: bytes) -> Caller:
        """Who shows a certificate (PEM) in a call; PeerRefused when its holder has no say."""
        ...

    def vouch(self, node: str) -> None:
        """Raises PeerRefused when a node is not to be called either."""
        ...

    def digest(self) -> int:
        """Of the names of revoked nodes, 0 when there are none."""
        ...

    def revocations(self) -> pb.Revocations:
        """All that are known."""
        ...

    def learn(self, told: pb.Revocations) -> None:
        """Keep those that are new and signed; PeerRefused when one is not signed."""
        ...

    def renew_for(self, certificate: bytes, request: bytes) -> bytes:
        """A new certificate for who shows an old one; PeerRefused when it gets none here."""
        ...
