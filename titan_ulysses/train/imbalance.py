"""How evenly the attention of steps is spread over the data-parallel ranks (data/balance.py)."""

from __future__ import annotations

from titan_ulysses.data.loader import Loader

_TELL = 1.5
"""The balance of a step from which on one document is named, if it is the reason."""
_EXPECTED = 10
"""How many steps `expected_balance` looks at."""


def expected_balance(loader: Loader) -> str | None:
    """Return a sentence about the next steps; None where their balance is not known, or where one
    rank reads all data.
    """
    shares = [step.shares for step in loader.next_steps(_EXPECTED)]
    known = [one for one in shares if one is not None]
    if len(known) < len(shares):
        return None
    dealt, before = (
        sum(getattr(one, name) for one in known) / len(known) for name in ("balance", "in_order")
    )
    return (
        f"balance: in the next {len(known)} steps, attention takes {dealt:.3f} times as long as "
        f"evenly spread over the data-parallel ranks (in the order of the data {before:.3f})"
    )


class Imbalance:
    """Collects the balance of steps for the log, and tells once which document none can balance."""

    def __init__(self) -> None:
        self._balances: list[float] = []
        self._has_told = False

    def note(self, step: int, loader: Loader) -> str | None:
        """Note the step of the loader's last batch.

        Returns a sentence, the first time that one document costs more than all others of its step
        together and the ranks wait for it.
        """
        shares = loader.step_of_last_batch().shares
        if shares is None:
            return None
        self._balances.append(shares.balance)
        if self._has_told or shares.balance < _TELL or shares.part <= 0.5:
            return None
        self._has_told = True
        documents = loader.sequences.documents(shares.costliest)
        # Padding comes last and is no document of the data.
        name = [*map("document {}".format, documents), "padding"][shares.document]
        return (
            f"step {step}: {name} has {shares.part:.0%} of the step's attention, so that the step "
            f"takes {shares.balance:.2g} times as long there as evenly spread. No way to deal "
            "sequences to ranks changes that: raise parallelism.sequence_parallel_degree, or "
            "training.global_batch_size"
        )

    def take(self) -> float | None:
        """Return the mean balance since the last call; None if it is not known or there is none."""
        balances, self._balances = self._balances, []
        return sum(balances) / len(balances) if balances else None
