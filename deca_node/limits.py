"""Every bound on what a peer can make a node hold or do, with its reason."""

# Payload of one streamed message: large enough that the per-message cost of gRPC (about 50 µs)
# vanishes, small enough that mixing overlaps receiving and that a damaged message costs little.
CHUNK_BYTES = 1 << 20
# A message is a payload and its prefix; the rest is room for another writer's framing.
MAX_MESSAGE_BYTES = CHUNK_BYTES + 1024
# A block of a model holds at most some thousand tensors of a line each.
MAX_HEADER_BYTES = 4 << 20
# Of that, what a stream's header may have for each tensor that the reader knows, beside its name:
# dtype, shape, two offsets, and another writer's spaces. JSON can take thirty times its size once
# it is read, so that a header of 4 MB would cost 100 MB.
MAX_HEADER_BYTES_PER_TENSOR = 512
# And for what it says of itself beside the tensors and the note: four short fields.
MAX_ABOUT_BYTES = 4 << 10
# HTTP/2 metadata: we use none of our own.
MAX_METADATA_BYTES = 16 << 10
# Members of a run. Everybody greets everybody; beyond this the greetings alone are a load.
MAX_MEMBERS = 256
# Addresses greeted at once. What peers say of others takes at most half of them, and what was
# announced where nobody of the run was met a quarter, so that liars cannot crowd out those that
# call us, or that the operator named. A caller takes the place of an address where no peer was met.
MAX_CONTACTS = 2 * MAX_MEMBERS
# Of that half, what one peer may have proposed at once.
MAX_PROPOSALS = 64
# Addresses that one caller has said, or was seen, to call from: of both protocols, on two networks.
# A further one replaces one where it was not met.
MAX_CLAIMS = 4
# Of those that were announced on the local network, where anybody can announce: those at which no
# peer was met. A further one replaces the oldest that was tried. Honest nodes answer at once.
MAX_ANNOUNCED = MAX_CONTACTS // 4
# Longest node or run name that is looked at (config allows 48).
MAX_NAME_BYTES = 64
# How a run or a node may be called. A name becomes part of a DNS label (63 bytes, RFC 1035), a
# folder and a log line.
NAME = r"[a-z0-9][a-z0-9-]{0,47}"
NAME_RULE = "1 to 48 characters of a-z, 0-9 and -, beginning with a letter or digit"
# What a header may say beside its block in final agreement: some numbers, and broken edges by the
# names of their two ends. Who is missing from a graph that lost more of them is told in part.
MAX_LOST_EDGES = 64
MAX_NOTE_BYTES = 16 << 10
# Longest address: a DNS name (255 bytes, RFC 1035) and a port.
MAX_ADDRESS_BYTES = 262
# Fields of a fingerprint, and bytes in one: a run has about 25 of at most 100 bytes.
MAX_FINGERPRINT_FIELDS = 64
MAX_FINGERPRINT_BYTES = 512
# Longest text of a peer that enters the log or status.
MAX_REASON_BYTES = 300
# Of one text of a node, or of a list of them, on a terminal: the names of all members.
MAX_SHOWN_CHARACTERS = MAX_MEMBERS * (MAX_NAME_BYTES + 2)
# Longest program version that is shown.
MAX_VERSION_BYTES = 32
# Neighbours' whole blocks kept at once where the mix is clipped or trimmed (robust.py): 4 bytes a
# value each, so that a crowd of neighbours does not fill the memory. Who comes on top counts for
# nothing in that step. A graph on which every node has so many needs no more to be robust.
MAX_KEPT_ARRIVALS = 32
# Latest time of a clock that is believed to be one, in seconds since 1970: the year 4147.
MAX_TIME = 1 << 36
# Pulls served to one peer at once: the one under way and the next, asked for early.
MAX_PULLS_PER_PEER = 2
# A pull stays open while this node computes, for a neighbour that is slower; its step ends it.
# However long that takes, a stream is held open no longer than this, and a step_deadline: what a
# node computes beside an exchange, a gradient at most, takes minutes.
MAX_PULL_SECONDS = 3600.0
# Blocks streamed at once to all neighbours: each holds one message beside the snapshot that all
# share. Further ones wait for their turn, as the link is full long before.
MAX_PULLS = 64
# A stream's window: what a neighbour may send ahead of our reading. Without it every message waits
# for a window of its own, a trip there and back each; this much is what a peer that we pull from
# can make us hold, beside the message being looked at and the next one.
STREAM_WINDOW_BYTES = 8 << 20
# What a caller may send in one call: a greeting with its fingerprint and 256 known members has
# 120 kB. With MAX_STREAMS_PER_CONNECTION it bounds what a connection can make us hold.
MAX_REQUEST_BYTES = 256 << 10
# Calls that are open at once over all connections: of each member the pulls and transfers that it
# may have, a greeting and a handshake, and the watchers. With MAX_REQUEST_BYTES this is what
# callers can make a node hold that send the first bytes of calls and no more: 400 MB, for as long
# as REQUEST_SECONDS.
MAX_CALLS = 6 * MAX_MEMBERS + 64
# Of those, from one address: half, so that one machine cannot shut out all others, and the whole
# swarm can still be on one.
MAX_CALLS_PER_ADDRESS = MAX_CALLS // 2
# A request must be there so many seconds after its call was opened. The largest takes less on a
# line of 64 kB/s; who sends it byte by byte keeps a place that others wait for.
REQUEST_SECONDS = 10.0
# Connections. Members need one each way, and under TLS a second one each to learn a name; watchers
# one each; the rest is for when nodes restart and their old connections are not known to be dead.
MAX_CONNECTIONS = 4 * MAX_MEMBERS
# What a new connection has for the first exchange of HTTP/2 and TLS: milliseconds of computing and
# three trips.
HANDSHAKE_SECONDS = 10
# One on which nothing was called for so long is closed: members greet at least every
# 20 s, and who is refused calls every two minutes (network.heartbeat has a bound).
IDLE_SECONDS = 300
# Greetings per second of callers that are not known, from one address: 256 nodes of another run on
# one machine make 52 of them, for as long as they are refused.
STRANGER_GREETINGS = 64.0
# And at once: the whole swarm starts again on one machine, each with two addresses.
STRANGER_GREETINGS_BURST = 2 * MAX_MEMBERS
# Greetings of one peer a second, in the long run and at once: the fastest preset makes one, which
# need not be ours, and it greets anew whenever its phase changes, which is a few times in a run,
# and when it catches up. A greeting is answered with all that we know, up to 80 kB.
PEER_GREETINGS = 5.0
PEER_GREETINGS_BURST = 60
# Lines of the log about callers that were refused, a second in the long run and at once: whoever
# gives another address each time must not fill a disk. All are counted.
REFUSAL_LINES = 0.2
REFUSAL_LINES_BURST = 50
# Of those, and of the lines about a peer's state (alive, suspect, gone, ...), what one name may
# have: a peer that restarts makes three; two nodes of one name are refused in turn at every beat.
PEER_LINES = 1 / 30
PEER_LINES_BURST = 12
# Lines about states of all peers: everybody comes, is suspect, gone and there again, twice. A
# caller that takes a new name each time has no more.
STATE_LINES = 0.2
STATE_LINES_BURST = 8 * MAX_MEMBERS
# A list of blocks that is asked for "once you are past this visit" is held back for so long: half
# the shortest time that a preset gives a call, as the asker's need not be ours.
LIST_HOLD_SECONDS = 2.5
# Who asks for a block queues for so long for a place: half the shortest step_deadline of a preset.
QUEUE_SECONDS = 15.0
# Streams that one connection may open at once: pulls, greetings and a few status watchers.
MAX_STREAMS_PER_CONNECTION = 32
# Calls answered at once on the port that serves health checks alone: those of an orchestrator.
MAX_HEALTH_CHECKS = 16
# Nodes that one look at a swarm asks, whatever others say that they know.
MAX_SURVEYED = MAX_MEMBERS
# Watchers of WatchStatus over all connections, ...
MAX_WATCHERS = 64
# ... of one member, or in plain text of one address: as many desks as a person may have; ...
MAX_WATCHERS_PER_CALLER = 16
# ... and those that are kept for operators and this machine's own tools, whatever members do.
KEPT_WATCHERS = 16
# Addresses of one DNS name that are called: those of a run's members, as many as there may be.
MAX_NAMED_ADDRESSES = MAX_MEMBERS
# Network names seen by discovery that are kept at once.
MAX_SIGHTINGS = MAX_CONTACTS
# Blocks streamed at once to nodes that catch up, over all of them: two fill a link, and one node
# that reads slowly must not keep the others waiting.
MAX_TRANSFERS = 4
# Asked for by one node at once: it fetches one block at a time from each peer; one more may still
# be closing.
MAX_TRANSFERS_PER_PEER = 2
# Transfers that wait for their turn.
MAX_QUEUED_TRANSFERS = 64
# Bytes per second below which a transfer is given up: a block of 100 MB would take two hours.
MIN_TRANSFER_RATE = 16_384
# Revoked nodes of a run that are remembered: each is a name and a signature of 72 bytes.
MAX_REVOKED = 4 * MAX_MEMBERS
# Of their list on disk, whose signatures are hexadecimal.
MAX_REVOKED_BYTES = MAX_REVOKED * 256
# Longest invitation: a fingerprint, a secret, a run's name and a few addresses, in base64.
MAX_TOKEN_BYTES = 2048
# Addresses of the inviter that an invitation names.
MAX_TOKEN_ADDRESSES = 4
# Longest certificate, or request for one, that is read: ours have 900 bytes.
MAX_CERTIFICATE_BYTES = 4096
# What either end of an invitation reads at most: a certificate, and the list of revoked nodes.
MAX_JOIN_BYTES = MAX_REVOKED_BYTES + 4 * MAX_CERTIFICATE_BYTES
# Callers that an inviter hears at once, for a few seconds each, ...
MAX_JOINERS = 64
# ... and of one address: a joiner calls twice, one after the other, and others may be behind its
# router. Who has no certificate must come from many to keep the joiner out.
MAX_JOINERS_PER_ADDRESS = 8
# Wrong secrets until an invitation ends. None of them could have been right by chance (128 bits),
# but a person who waits should know. Also lines at once about callers that were not let in; in the
# long run they are as many as a node's (REFUSAL_LINES).
MAX_JOIN_ATTEMPTS = 16
# What a node tells of its past: the latest events, each a line, in every status, ...
MAX_EVENTS = 64
# ... and the points of its curve in one answer, of 60 bytes each: more than a screen is wide.
MAX_HISTORY_POINTS = 1024
# Labels whose counts are told, with data.share_label_counts.
MAX_LABELS = 64
# What a browser sends to operate a node: a name and a verb.
MAX_ORDER_BYTES = 1024
# Warnings of one node that a dashboard shows; health and the node itself tell fewer.
MAX_WARNINGS_SHOWN = 64
# Blocks of a model that a dashboard draws: the deepest known have some 130 layers.
MAX_BLOCKS_SHOWN = 1024
# Edges in a dashboard's picture: a full graph of 90 nodes; of more, those in trouble come first.
MAX_LINKS_SHOWN = 4096
# Events that a dashboard keeps, of all nodes.
MAX_EVENTS_KEPT = 500
# Points of all curves together that a dashboard keeps and a browser draws.
MAX_POINTS_SHOWN = 30_000
# Browsers that one dashboard serves at once.
MAX_BROWSERS = 32
