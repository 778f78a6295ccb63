"""``python -m deca_node`` is ``deca-node``."""

from deca_node.cli import main

if __name__ == "__main__":
    main()
