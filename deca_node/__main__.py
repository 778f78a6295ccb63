"""The program: ``deca-node``, which ``python -m deca_node`` is as well."""

import os
import signal
import sys


def main() -> None:
    """Run a verb, before whose imports SIGTERM is heeded where the verb is ``start``.

    The first process of a container is spared by a signal that it has no handler for, and would be
    killed when whoever sent it has waited long enough. Nothing is lost: nothing is begun.
    """
    if "start" in sys.argv[1:]:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    from deca_node import cli  # noqa: PLC0415 - takes seconds on a small machine

    cli.main()


if __name__ == "__main__":
    main()
