"""Two loops on one store: the second refuses and names the first; a dead one is replaced."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engrain.errors import LoopAtWorkError, LoopReplacedError
from engrain.lease import LoopLease, machine
from memory.records import digest
from memory.store import Store

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from engrain.lease import LoopLease
from memory.store import Store
with Store.open(sys.argv[1]) as store, LoopLease(store, "tiny"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "store.db")


def test_a_second_loop_is_told_who_the_first_is_until_that_one_is_killed(url: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", HOLDER, url], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with Store.open(url) as store:
            with pytest.raises(LoopAtWorkError, match=rf"improves tiny in .*: process {first.pid} on .*, since 20"):
                LoopLease(store, "tiny").__enter__()
            with LoopLease(store, "another model"):
                pass
            first.kill()
            first.wait()
            with LoopLease(store, "tiny") as lease:  # its process is gone: no need to wait for the minute to pass
                lease.check()
    finally:
        first.kill()
        first.wait()


def test_one_process_does_not_hold_it_twice(url: str) -> None:
    with Store.open(url) as store:
        with LoopLease(store, "tiny"), pytest.raises(LoopAtWorkError, match=f"process {os.getpid()} "):
            LoopLease(store, "tiny").__enter__()
        with LoopLease(store, "tiny"):
            pass
        assert store.lease(digest("improve", "tiny")) is None


def test_a_restarted_container_does_not_wait_for_its_own_former_self(url: str) -> None:
    with Store.open(url) as store:
        name = digest("improve", "tiny")
        store.take_lease(name, "former", host="h", machine=machine(), pid=os.getpid(), seconds=60)
        with LoopLease(store, "tiny") as lease:
            assert store.lease(name).token == lease.token


def test_the_heartbeat_holds_the_lease_and_notices_its_loss(url: str) -> None:
    with Store.open(url) as store, LoopLease(store, "tiny", seconds=1.0) as lease:
        before = store.lease(lease.name).expires
        deadline = time.monotonic() + 30
        while store.lease(lease.name).expires == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        lease.check()
        taken = store.take_lease(
            lease.name, "other", host="h", machine="m", pid=1, seconds=60, is_gone=lambda held: True
        )
        assert taken.token == "other"
        while not lease.lost:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(LoopReplacedError, match="another loop took over"):
            lease.check()
    with Store.open(url) as store:
        assert store.lease(lease.name).token == "other"  # leaving gives back only what is one's own
