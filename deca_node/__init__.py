"""deca-node: machines with private data fine-tune one language model together, nobody in charge."""

__version__ = "0.1.0"
