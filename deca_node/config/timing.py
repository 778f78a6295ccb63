"""Deadlines and intervals, by where the machines are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Deadlines and intervals in seconds.

    ``step_deadline`` bounds what a missing neighbour can cost one step; ``visit_deadline`` what it
    can cost the start of a visit (shorter, so that those who wait are not given up meanwhile);
    ``wait_budget`` bounds how long the steps of a visit wait for one neighbour alone, which is what
    one that is later than all others again and again can cost it; ``gone_after`` is the silence
    after which a peer leaves the member set. Longer is kinder to slow machines, shorter loses less
    when one dies without a word (a closed connection is noticed at once in any case).
    """

    step_deadline: float
    visit_deadline: float
    heartbeat: float
    gone_after: float
    wait_budget: float
    rpc: float
    browse: float
    redial: float
    redial_max: float

    @classmethod
    def local(cls) -> "Timing":
        """Several nodes share one machine: steps are slow, the network is not."""
        return cls(60.0, 40.0, 1.0, 60.0, 600.0, rpc=10.0, browse=3.0, redial=0.5, redial_max=2.0)

    @classmethod
    def lan(cls) -> "Timing":
        """Machines of one room."""
        return cls(30.0, 20.0, 1.5, 30.0, 300.0, rpc=5.0, browse=5.0, redial=1.0, redial_max=4.0)

    @classmethod
    def wan(cls) -> "Timing":
        """Machines of several sites."""
        return cls(
            180.0, 120.0, 10.0, 180.0, 900.0, rpc=20.0, browse=15.0, redial=3.0, redial_max=15.0
        )
