"""The store: everything Engrain remembers, in one database."""

from __future__ import annotations

from memory.ancestry import AncestryTable
from memory.arrivals import ArrivalTable
from memory.episodes import EpisodeTable
from memory.forget import ForgetTable
from memory.leases import LeaseTable
from memory.overview import Kind, OverviewTable
from memory.transfer import TransferTable
from memory.verify import VerifyTable

__all__ = ["Kind", "Store"]


class Store(
    AncestryTable, ArrivalTable, EpisodeTable, ForgetTable, LeaseTable, OverviewTable, TransferTable, VerifyTable
):
    """Episodes, items, knowledge, checkpoints, evaluations and rounds, with what came from what.

    `with Store.open("runs.db") as store: ...`. Every write is one transaction; several processes may write at once.
    All methods raise `StoreError` when the database fails under them. `url` is for people: its password is hidden.
    """
