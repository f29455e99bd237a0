"""`engrain ui`: the dashboard, served on this machine."""

from __future__ import annotations

from engrain.cli.common import StoreOption, open_store
from engrain.cli.serving import HostOption, PortOption, check_extra, serve


def command(host: HostOption = None, port: PortOption = None, store: StoreOption = None) -> None:
    """Show rounds, items, knowledge, episodes and lineage in the browser, and the running round as it goes.

    Prints an address with a token; whoever has it may read the store, and retire and restore items. Needs
    engrain\\[ui]. Nothing is fetched from elsewhere. Ctrl-C ends it.
    """
    check_extra()
    with open_store(store, create=False) as memory:
        serve(memory, host, port, f"the dashboard of {memory.url} is")
