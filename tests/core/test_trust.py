"""Who has a say in a run: decisions on what a certificate says, and invitations as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deca_node.errors import REASONS, TrustError
from deca_node.limits import MAX_TOKEN_ADDRESSES, MAX_TOKEN_BYTES
from deca_node.trust import (
    CLOCK_SECONDS,
    Certificate,
    Holder,
    Invitation,
    barred,
    holder,
    is_renewal_due,
    node_uri,
    objection,
    operator_uri,
    read_token,
    token,
)

DAY = 86400.0
ALICE = Certificate(Holder("run", "alice", operator=False), 0.0, 90 * DAY, 1)
OPERATOR = Certificate(Holder("run", None, operator=True), 0.0, 90 * DAY, 2)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([node_uri("run", "alice")], Holder("run", "alice", operator=False)),
        (["run.deca.internal", node_uri("r", "b-1")], Holder("r", "b-1", operator=False)),
        ([operator_uri("run")], Holder("run", None, operator=True)),
        ([], None),
        (["https://run/node/alice"], None),
        (["deca://run/node/"], None),
        (["deca://run/node/a/b"], None),
        (["deca://run/node/Alice"], None),
        (["deca:///node/alice"], None),
        (["deca://run/operators"], None),
        (["deca://run\n/operator"], None),
    ],
)
def test_names_say_who_holds_a_certificate(names, found):
    """Only the exact forms count; anything near them is nobody."""
    assert holder(names) == found


@pytest.mark.parametrize(
    ("shown", "revoked", "allow", "now", "reason"),
    [
        (ALICE, (), (), DAY, ""),
        (OPERATOR, (), (), DAY, ""),
        (ALICE, ("bob",), (), DAY, ""),
        (ALICE, (), ("alice",), DAY, ""),
        (OPERATOR, (), ("bob",), DAY, ""),  # the list is of nodes
        (ALICE, ("alice",), (), DAY, "revoked"),
        (ALICE, ("alice",), ("alice",), DAY, "revoked"),
        (ALICE, (), ("bob",), DAY, "not_allowed"),
        (ALICE, (), (), 90 * DAY, "expired"),
        (OPERATOR, (), (), 91 * DAY, "expired"),
        (ALICE, (), (), -CLOCK_SECONDS, ""),
        (ALICE, (), (), -CLOCK_SECONDS - 1, "expired"),
        (Certificate(None, 0.0, DAY, 3), (), (), 1.0, "no_certificate"),
        (Certificate(Holder("other", "alice", operator=False), 0, DAY, 4), (), (), 1.0,
         "no_certificate"),
    ],
)  # fmt: skip
def test_who_has_a_say(shown, revoked, allow, now, reason):
    """A node of this run, in time, not revoked, on the list if there is one."""
    said = objection(shown, "run", revoked, allow, now)
    assert said.partition(": ")[0] == reason
    assert not reason or reason in REASONS


def test_an_expired_certificates_holder_is_told_what_helps_where_it_is():
    """Only the authority's machine can renew, and there only its own nodes."""
    for whose, words in (
        (Holder("run", "bob", operator=False), "authority's machine `deca-node swarm invite --n"),
        (Holder("run", None, operator=True), "copy operator.pem and operator.key"),
    ):
        assert words in objection(Certificate(whose, 0.0, 1.0, 1), "run", (), (), 2.0)


def test_a_barred_node_is_told_apart():
    """Revoked wins over not on the list."""
    assert barred("eve", {"eve"}, {"bob"}).startswith("revoked: ")
    assert barred("eve", (), {"bob"}).startswith("not_allowed: ")
    assert barred("bob", {"eve"}, {"bob"}) == ""


def test_the_last_third_is_for_renewal():
    """Sixty of ninety days are not."""
    assert not is_renewal_due(ALICE, 59 * DAY)
    assert is_renewal_due(ALICE, 60 * DAY)


names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,47}", fullmatch=True)
invitations = st.builds(
    Invitation,
    run=names,
    fingerprint=st.binary(min_size=32, max_size=32),
    secret=st.binary(min_size=16, max_size=16),
    expires=st.integers(0, 2**40),
    addresses=st.lists(
        st.sampled_from(["10.0.0.1:7", "[fe80::1]:9", "host.lan:1"]), max_size=4
    ).map(tuple),
)


@given(invitations)
def test_a_token_says_what_it_was_made_of(invitation):
    """There and back, in one word within the bound."""
    word = token(invitation)
    assert word.replace("-", "").replace("_", "").isalnum()
    assert len(word) <= MAX_TOKEN_BYTES
    assert read_token(f" {word}\n") == invitation


@given(invitations, st.integers(0, 2000), st.sampled_from("aB3-_ é"))
def test_a_damaged_token_is_refused(invitation, at, letter):
    """One letter more, less or other is noticed, and nothing else than TrustError comes of it."""
    word = token(invitation)
    at %= len(word)
    for damaged in (word[:at], word[:at] + letter + word[at + 1 :], word[:at] + letter + word[at:]):
        if damaged.strip() == word:
            continue
        try:
            read = read_token(damaged)
        except TrustError:
            continue
        # Bits after the last whole byte of base64 say nothing.
        assert read == invitation


def test_a_token_names_few_addresses_and_is_short():
    """Whoever reads it calls all that it names, and it may be anybody's."""
    addresses = tuple(f"10.0.0.{n}:7" for n in range(MAX_TOKEN_ADDRESSES + 1))
    many = Invitation("run", bytes(32), bytes(16), 9, addresses)
    assert read_token(token(many)).addresses == addresses[:-1]
    with pytest.raises(TrustError, match="no invitation"):
        read_token(token(Invitation("run", bytes(32), bytes(16), 9, ("a" * MAX_TOKEN_BYTES,))))


@given(st.text(max_size=100))
def test_any_text_is_no_token(text):
    """With and without the prefix."""
    for word in (text, f"deca1-{text}"):
        with pytest.raises(TrustError):
            read_token(word)
