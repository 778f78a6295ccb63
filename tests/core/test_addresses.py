"""What an address is, and what is none."""

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deca_node.addresses import (
    as_called_here,
    checked_address,
    is_address,
    is_host,
    is_own,
    joined,
    split,
)
from deca_node.limits import MAX_ADDRESS_BYTES

_EDGE = st.sampled_from("abcxyzABC019_")
_LABELS = st.builds(
    lambda first, middle, last: first + middle + last,
    _EDGE,
    st.text("abcXYZ019_-", max_size=61),
    _EDGE,
)
_NAMES = st.lists(_LABELS, max_size=3).map(lambda labels: ".".join([*labels, "host"]))
_IPV4 = st.ip_addresses(v=4).map(str)
_IPV6 = st.builds(
    lambda address, zone: f"{address}%{zone}" if zone else str(address),
    st.ip_addresses(v=6),
    st.sampled_from(["", "eth0", "en0", "wlp3s0", "12"]),
)
_HOSTS = st.one_of(_NAMES, _IPV4, _IPV6)
_PORTS = st.integers(1, 65535)


@given(_HOSTS, _PORTS)
def test_what_is_joined_comes_apart_again(host, port):
    address = joined(host, port)
    assert split(address) == (host, port)
    assert is_address(address)
    assert checked_address(address) == address


@given(st.text(max_size=300))
@example("unix:/tmp/x:80")
@example("1.2.3.4:٣")
@example("[::1%\x1b]:80")
def test_what_passes_is_one_host_and_nothing_else(text):
    """Whatever it is made of."""
    _look_at(text)


def _look_at(text):
    """No scheme, no list, no path, no control character, one spelling."""
    if not is_address(text):
        with pytest.raises(ValueError, match="is not HOST:PORT"):
            split(text)
        return
    host, port = split(text)
    assert joined(host, port) == text
    assert len(text) <= MAX_ADDRESS_BYTES
    assert text.isascii()
    assert text.isprintable()
    assert not set(text) & set("/,\\@?#'\" \t")
    if ":" in host:
        assert ipaddress.ip_address(host).version == 6
    else:
        assert all(0 < len(label) <= 63 for label in host.removesuffix(".").split("."))


# Near misses: what an address is made of, put together at random.
@given(
    st.lists(
        st.sampled_from(
            ["[", "]", ":", "::1", "%", "eth0", ".", "a", "-", "127", "1", "80", "0x7f", "/", ","]
        ),
        max_size=8,
    ).map("".join)
)
def test_near_misses_are_addresses_only_where_all_fits(text):
    _look_at(text)


@pytest.mark.parametrize(
    "text",
    [
        "host:1",
        "HOST-2.lan:65535",
        "deca.default.svc.cluster.local:7430",
        "deca.default.svc.cluster.local.:7430",
        "deca_node_1:7430",
        "192.0.2.7:7430",
        "[2001:db8::7]:7430",
        "[fe80::1%eth0]:7430",
        "unix:80",  # a machine may be called so; the door does not take it for a scheme
        "a" * 63 + ":1",
    ],
)
def test_what_an_address_is(text):
    assert is_address(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        ":7430",
        "host:",
        "host:0",
        "host:65536",
        "host:07",
        "host:+7",
        "host:٣",
        "ho\nst:1",
        "host:1\n",
        "\x1b[2Jhost:1",
        "h" * 1000 + ":1",
        "a" * 64 + ":1",
        "a..b:80",
        ".a:80",
        "-a:80",
        "a-:80",
        "münchen:80",
        "unix:/tmp/x:80",
        "unix:x:80",
        "dns://10.0.0.1/h:80",
        "dns:h:80",
        "ipv4:1.2.3.4,5.6.7.8:80",
        "1.2.3.4,5.6.7.8:80",
        "ipv6:[::1]:80",
        "::1:80",
        "[::1:80",
        "::1]:80",
        "[[::1]]:80",
        "[1.2.3.4]:80",
        "[host]:80",
        "[fe80::1%]:80",
        "[fe80::1%a/b]:80",
        "[fe80::1%aaaaaaaaaaaaaaaa]:80",
        "1.2.3.4%eth0:80",
        "127.1:80",
        "2130706433:80",
        "0x7f000001:80",
        "127.0.0.1.:80",
        "127.0.0.01:80",
        "host.0x7f:80",
        "user@host:80",
    ],
)
def test_what_is_none(text):
    assert not is_address(text)


def test_a_host_of_ipv6_has_no_brackets():
    assert is_host("::1")
    assert not is_host("[::1]")


@pytest.mark.parametrize(
    ("listening", "called"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("", "127.0.0.1"),
        ("::", "::1"),
        ("192.0.2.7", "192.0.2.7"),
        ("node", "node"),
    ],
)
def test_every_interface_is_reached_through_the_loopback(listening, called):
    """A host to listen on is not always one to call."""
    assert as_called_here(listening) == called


@pytest.mark.parametrize(
    ("host", "own"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.9.1", "::1", "0.0.0.0", "::", "LocalHost")),
        *((host, True) for host in ("localhost.", "a.localhost", "::ffff:127.0.0.1")),
        *((host, False) for host in ("192.0.2.7", "fe80::1%eth0", "host", "notlocalhost")),
    ],
)
def test_what_means_the_callers_own_machine(host, own):
    assert is_own(host) is own
