"""A network laboratory: hosts on one machine, and between them links that can be made bad.

Every host is a network namespace with one TAP device. A switch in this package's server process
moves the frames, so that each direction between two hosts has its own delay, jitter, loss, rate
and cut. Root on Linux is needed, and the commands ``ip`` (iproute2), ``unshare`` and ``mount``
(util-linux); hosts.unavailable() says what is missing.
"""
