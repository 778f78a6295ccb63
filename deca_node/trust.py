"""Who may take part in a run, and what a certificate must say for it.

Pure: certificates are read in identity.py; here are the decisions about what they say.
"""

from collections.abc import Iterable
from dataclasses import dataclass

# Names in certificates end in a domain that ICANN keeps free for private use, so that no
# certificate of ours could ever be mistaken for one of a host on the internet.
DOMAIN = "deca.internal"
SCHEME = "deca://"
# Renewed when less than this share of a certificate's time is left.
RENEW_SHARE = 1 / 3
# The clocks of two machines of a run may differ by this: certificates begin so much earlier.
CLOCK_SECONDS = 300.0


def common_name(run: str) -> str:
    """The DNS name that all nodes of a run have in their certificates."""
    return f"{run}.{DOMAIN}"


def node_name(run: str, node: str) -> str:
    """The DNS name that one node alone has in its certificate."""
    return f"{node}.{run}.{DOMAIN}"


def pairing_name(run: str) -> str:
    """The DNS name of an invitation, which no node has."""
    return f"{run}.pairing.{DOMAIN}"


def node_uri(run: str, node: str) -> str:
    """What a node's certificate says that its holder is."""
    return f"{SCHEME}{run}/node/{node}"


def operator_uri(run: str) -> str:
    """What an operator's certificate says that its holder is."""
    return f"{SCHEME}{run}/operator"


@dataclass(frozen=True)
class Holder:
    """Whom a certificate of a run's authority names.

    Attributes:
        run: the run.
        node: the node's name; None for an operator.
        operator: whether it may control nodes.
    """

    run: str
    node: str | None
    operator: bool


def holder(names: Iterable[str]) -> Holder | None:
    """Whom a certificate names by its subject alternative names; None when it is none of ours."""
    for name in names:
        run, _, who = name.removeprefix(SCHEME).partition("/")
        if not name.startswith(SCHEME) or not run:
            continue
        if who == "operator":
            return Holder(run, None, operator=True)
        kind, _, node = who.partition("/")
        if kind == "node" and node and "/" not in node:
            return Holder(run, node, operator=False)
    return None
