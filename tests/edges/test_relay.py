"""Cables that are pulled and put back: real sockets, no nodes."""

import asyncio
import contextlib

import pytest

from deca_node.relay import Cables, Relay

DEADLINE = 20.0  # a bound on failure


class Bench:
    """An echo server behind a relay; callers are told apart by their local ports."""

    def __init__(self):
        self.cables = Cables()
        self.names = {}
        self.port = None
        self.relay = Relay("server", self.cables, lambda: self.port, self.names.get)
        self.writers = []

    async def open(self):
        self.server = await asyncio.start_server(self.echo, "127.0.0.1")
        self.port = self.server.sockets[0].getsockname()[1]
        self.listening = await self.relay.listen()

    async def echo(self, reader, writer):
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def call(self, name):
        """A connection through the relay, whose first bytes went there and back when not cut."""
        # The name must be known before the relay sees the connection.
        import socket

        plain = socket.socket()
        plain.bind(("127.0.0.1", 0))
        plain.setblocking(False)
        self.names[plain.getsockname()[1]] = name
        await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", self.listening))
        return await asyncio.open_connection(sock=plain)

    async def close(self):
        await self.relay.close()
        self.server.close()
        for writer in self.writers:
            writer.close()


@pytest.fixture
async def bench():
    made = Bench()
    await made.open()
    async with asyncio.timeout(DEADLINE):
        yield made
    await made.close()


async def said(end, text):
    reader, writer = end
    writer.write(text)
    return await reader.readexactly(len(text))


async def silent(end):
    """Whether nothing arrives: after many turns of the loop, in which a whole cable brings it."""
    waiting = asyncio.create_task(end[0].read(1))
    await asyncio.sleep(0.2)
    arrived = waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    return not arrived


async def test_bytes_go_both_ways_in_order(bench):
    """More than any buffer holds."""
    end = await bench.call("a")
    data = bytes(range(256)) * 40_000
    reader, writer = end
    writer.write(data)
    assert await reader.readexactly(len(data)) == data


async def test_a_cut_holds_what_is_sent_and_healing_brings_it(bench):
    """Nothing is lost or closed; a caller that is not cut notices nothing."""
    end, other = await bench.call("a"), await bench.call("b")
    assert await said(end, b"one") == b"one"
    bench.cables.cut([("a", "server")])
    end[1].write(b"two")
    assert await silent(end)
    assert await said(other, b"here") == b"here"
    bench.cables.heal([("a", "server")])
    assert await end[0].readexactly(3) == b"two"


async def test_a_cable_cut_twice_is_whole_when_healed_twice(bench):
    end = await bench.call("a")
    bench.cables.cut([("a", "server")])
    bench.cables.cut([("a", "server"), ("server", "a")])
    bench.cables.heal([("a", "server")])
    end[1].write(b"x")
    assert await silent(end)
    bench.cables.heal([("a", "server"), ("server", "a")])
    assert await end[0].readexactly(1) == b"x"


async def test_a_new_connection_waits_for_the_cable(bench):
    bench.cables.cut([("a", "server")])
    end = await bench.call("a")
    end[1].write(b"x")
    assert await silent(end)
    assert not bench.writers  # the server knows nothing of it
    bench.cables.heal([("a", "server")])
    assert await end[0].readexactly(1) == b"x"


async def test_the_other_way_of_calling_is_another_cable(bench):
    end = await bench.call("a")
    bench.cables.cut([("server", "a")])
    assert await said(end, b"x") == b"x"


async def test_a_pulled_cable_does_not_tell_that_an_end_has_gone(bench):
    """Neither end hears of it before it is healed."""
    end = await bench.call("a")
    assert await said(end, b"x") == b"x"
    bench.cables.cut([("a", "server")])
    bench.writers[0].transport.abort()
    assert await silent(end)
    bench.cables.heal([("a", "server")])
    with contextlib.suppress(ConnectionError):
        assert await end[0].read() == b""


async def test_a_dead_end_closes_the_other(bench):
    """At once, as a killed neighbour's does."""
    end = await bench.call("a")
    assert await said(end, b"x") == b"x"
    bench.writers[0].transport.abort()
    with contextlib.suppress(ConnectionError):
        assert await end[0].read() == b""


async def test_nobody_listening_is_told_at_once(bench):
    """Whether its port is not known, or nobody has it."""
    for port in (None, 1):
        bench.port = port
        reader, _ = await bench.call("a")
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""


async def test_who_is_no_node_has_no_cable(bench):
    bench.cables.cut([("a", "server")])
    end = await bench.call(None)
    assert await said(end, b"x") == b"x"


async def test_a_relay_ends_while_a_cable_is_pulled():
    """Also where bytes wait for the cable: a chaos run that fails under a cut is to end."""
    bench = Bench()
    await bench.open()
    end = await bench.call("a")
    assert await said(end, b"one") == b"one"
    bench.cables.cut([("a", "server")])
    end[1].write(b"two")
    assert await silent(end)
    closing = asyncio.create_task(bench.close())
    done, _ = await asyncio.wait([closing], timeout=DEADLINE)
    bench.cables.heal([("a", "server")])  # or this test would not end, either
    await closing
    assert done
