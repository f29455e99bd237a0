"""One holder at a time, on both databases; a dead one does not stand in the way for ever."""

import io
import threading
import time

from memory.store import Store

HOST = {"host": "here", "machine": "here/1", "pid": 1}


def test_a_lease_is_held_by_one_until_it_is_given_back(store):
    first = store.take_lease("n", "a", seconds=60, **HOST)
    assert first.token == "a"
    assert abs(first.since - time.time()) < 5  # these databases run on this machine
    second = store.take_lease("n", "b", seconds=60, **HOST)
    assert second == first
    assert "process 1 on here, since 20" in str(second)
    assert store.take_lease("other", "b", seconds=60, **HOST).token == "b"
    store.drop_lease("n", "b")  # not b's to give back
    assert store.lease("n") == first
    store.drop_lease("n", "a")
    assert store.lease("n") is None
    assert store.take_lease("n", "b", seconds=60, **HOST).token == "b"


def test_a_lease_that_is_not_renewed_expires(store):
    store.take_lease("n", "a", seconds=0.0, **HOST)
    assert store.take_lease("n", "b", seconds=60, **HOST).token == "b"
    assert not store.renew_lease("n", "a", 60)
    before = store.lease("n").expires
    assert store.renew_lease("n", "b", 120)
    assert store.lease("n").expires > before + 30


def test_a_holder_known_to_be_dead_is_replaced_at_once(store):
    store.take_lease("n", "a", seconds=60, **HOST)
    assert store.take_lease("n", "b", seconds=60, **HOST, is_gone=lambda held: held.token == "a").token == "b"


def test_of_many_that_ask_at_once_one_gets_it(store_url):
    Store.open(store_url).close()
    got: list[str] = []

    def ask(me: str) -> None:
        with Store.open(store_url) as store:
            got.append(store.take_lease("n", me, seconds=60, **HOST).token)

    threads = [threading.Thread(target=ask, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(set(got)) == 1


def test_leases_are_not_exported(store):
    store.take_lease("n", "a", seconds=60, **HOST)
    out = io.StringIO()
    store.export_jsonl(out)
    assert '"table": "leases"' not in out.getvalue()
