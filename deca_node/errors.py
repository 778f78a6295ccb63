"""Everything that can go wrong, as one tree; and how another library's error is quoted.

::

    DecaError                    exit code   what it means
    ├── ConfigError                   2      a setting is unknown, ill-typed or out of range
    ├── UnreachableError              3      no node answers at that address
    ├── DataError                     4      a data file is missing, broken or does not fit the task
    ├── ModelError                    5      a model is missing, not causal, or too large for memory
    ├── ListenError                   6      the port or interface cannot be used
    ├── DeviceError                   7      the device asked for is not there, or out of memory
    ├── OutputError                   8      the output folder holds another run, or is damaged
    ├── DiskFullError                 9      the disk has no room for what must be written
    ├── SwarmError                   10      a testbed's node failed, or a swarm died of chaos
    ├── CheckError                   11      a check of deca-node doctor failed
    ├── TrustError                   12      a key, certificate or invitation is missing or no good
    ├── ControlError                 13      a node refused what it was told to do
    └── PeerError                     -      a peer's fault: counted, never ends a run
        ├── PeerUnavailable                  nobody answers, or the connection broke
        ├── PeerTimeout                      it did not answer in time
        ├── PeerRefused                      it said no (other run, other settings, past step)
        └── PayloadError                     what it sent failed a check

Exit code 0 is success, 1 a defect of this program (with a traceback), 130 an interrupted verb.
Each outside library's exceptions are translated into these at its one door.
"""


class DecaError(Exception):
    """Base of all errors that a user can be told about in one line."""

    exit_code = 1


class ConfigError(DecaError):
    """A setting is unknown, ill-typed or out of range."""

    exit_code = 2


class UnreachableError(DecaError):
    """No node answers at the address."""

    exit_code = 3


class DataError(DecaError):
    """A data file is missing, broken or does not fit the task."""

    exit_code = 4


class ModelError(DecaError):
    """A model is missing, no causal language model, shows no layer stack, or outgrows memory."""

    exit_code = 5


class ListenError(DecaError):
    """The port or the interface cannot be used."""

    exit_code = 6


class DeviceError(DecaError):
    """The compute device asked for is not there, or out of memory."""

    exit_code = 7


class OutputError(DecaError):
    """The output folder belongs to another run, or what it holds is damaged."""

    exit_code = 8


class DiskFullError(DecaError):
    """The disk has no room for what must be written."""

    exit_code = 9


class SwarmError(DecaError):
    """The nodes of a testbed did not all finish, or did not live through what was done to them."""

    exit_code = 10


class CheckError(DecaError):
    """A check of ``deca-node doctor`` failed."""

    exit_code = 11


class TrustError(DecaError):
    """A key, a certificate or an invitation is missing, damaged, expired or another run's."""

    exit_code = 12


class ControlError(DecaError):
    """A running node refused what it was told to do."""

    exit_code = 13


# The words under which peers' faults and refusals are counted. A peer cannot add one.
REASONS = frozenset(
    {
        *("unavailable", "late", "incomplete", "malformed", "too_long", "wrong_step", "gap"),
        *("checksum", "digest", "header", "shape", "not_finite", "passed", "not_a_neighbour"),
        "ended",
        *("too_many_pulls", "too_many_watchers", "stopping", "starting", "stranger", "bad_degree"),
        *("other_run", "protocol", "bad_name", "bad_address", "bad_fingerprint"),
        "bad_visit",
        *("settings_differ", "name_taken", "full", "unmet"),
        *("bad_list", "too_many_transfers", "too_slow", "hung_up"),
        *("bad_format", "wrong_base", "bad_scale", "too_many_arrivals"),
        *("too_many_greetings", "busy"),
        # Of certificates: one that is missing, over, taken back, not on the list, or another's.
        *(
            "handshake",
            "no_certificate",
            "expired",
            "revoked",
            "not_allowed",
            "impostor",
            "not_a_node",
        ),
        *("bad_request", "not_due", "no_authority"),
        # Of what an operator asks for, and of a node that takes no part because it was asked to.
        *("paused", "not_now", "not_saved", "exists", "failed"),
        # gRPC's own: of another version's calls, of what is not ours, of a proxy between.
        *("unimplemented", "invalid_argument", "permission_denied", "unauthenticated"),
    }
)


def known_reason(text: str) -> str:
    """``text`` if it is one of our words for a refusal, else ``refused``."""
    return text if text in REASONS else "refused"


class PeerError(DecaError):
    """A peer's fault. ``reason`` is the short word under which status counts it."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


class PeerUnavailable(PeerError):  # noqa: N818 - reads as the state it names
    """Nobody answers at the peer's address, or the connection broke."""

    def __init__(self, message: str = "") -> None:
        super().__init__("unavailable", message)


class PeerTimeout(PeerError):  # noqa: N818
    """The peer did not answer within the deadline."""

    def __init__(self, message: str = "") -> None:
        super().__init__("late", message)


class PeerRefused(PeerError):  # noqa: N818
    """The peer said no; ``reason`` says to what."""


class PayloadError(PeerError):
    """What the peer sent failed a check; ``reason`` names the check."""


def first_line(error: Exception) -> str:
    """The first line of another library's error that is not blank; its repr where there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), repr(error)).strip(" :")
