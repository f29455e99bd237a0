"""Every store ever written can be opened: revisions run one after the other, with data, on both databases."""

import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from memory.columns import pack_ids, pack_logprobs, pack_mask
from memory.database import VERSION_TABLE, Database, _alembic, _connectable, newest_revision, parse_url
from memory.schema import Base
from memory.store import Store

BEFORE, AFTER = "2026-01-01T00:00:00.000000+00:00", "2026-01-02T00:00:00.000000+00:00"
TEXTS = {"aaaa": "What is 1 + 1?", "bbbb": "2", "cccc": ""}


def at_revision(url, revision):
    """A database as that revision made it, not opened by this version."""
    database = Database(_connectable(parse_url(url), True))
    with database._write() as connection:
        command.upgrade(_alembic(connection), revision)
    return database


def fill_r0001(connection):
    """One of everything, with the columns that the first revision had."""
    metadata = sa.MetaData()
    metadata.reflect(connection)

    def insert(table, *rows):
        connection.execute(sa.insert(metadata.tables[table]), list(rows))

    round_ = {
        "id": "r", "number": 1, "model": "tiny", "seed": str(2**70), "config": '{"deep":[1]}', "stage": "judge",
        "state": "{}", "status": "finished", "verdict": "promoted", "created_at": BEFORE, "updated_at": AFTER,
    }  # fmt: skip
    insert("rounds", round_)
    insert("texts", *({"digest": key, "body": body} for key, body in TEXTS.items()))
    insert("tasks", {"id": "t", "env": "sums", "seed": "1", "parameters": "{}"})
    episode = {
        "id": "e1", "task_id": "t", "env": "sums", "split": "train", "round_id": "r", "stage": "play", "model": "tiny",
        "checkpoint": None, "knowledge": None, "success": True, "score": 1.0, "reward": 1.0, "stop_reason": "done",
        "error": None, "human": False, "turns": 1, "tokens": 3, "sampled": 1, "prompt_length": 2,
        "started_at": BEFORE, "seconds": 0.5, "added_at": BEFORE,
        "sampling": '{"temperature":1.0,"top_p":1.0,"top_k":0,"max_tokens":9,"seed":1}',
        "messages": '[["user","aaaa"],["assistant","bbbb"]]', "feedback": "", "token_ids": pack_ids([1, 2, 3]),
        "loss_mask": pack_mask([False, False, True]), "logprobs": pack_logprobs([0.0, 0.0, -0.5]),
    }  # fmt: skip
    insert("episodes", episode, {**episode, "id": "e2"})
    turn = {
        "number": 0, "observation": "aaaa", "action": "bbbb", "feedback": "cccc", "start": 2, "end": 3,
        "finish_reason": "stop", "reward": 1.0, "seconds": 0.0,
    }  # fmt: skip
    insert("turns", *({**turn, "episode_id": id_} for id_ in ("e1", "e2")))
    extraction = {
        "id": "x", "episode_id": "e1", "round_id": "r", "model": "tiny", "checkpoint": None, "mode": "paper",
        "prompt_version": "1", "seed": "1", "output": "- EXPERIENCE ITEM: Add.", "items": '["Add."]',
        "malformed": "[]", "created_at": BEFORE,
    }  # fmt: skip
    insert("extractions", extraction)
    item = {"text": "Add.", "status": "active", "round_id": "r", "created_at": BEFORE}
    insert("items", {"id": "i", **item}, {"id": "alone", **item})
    source = {"item_id": "i", "extraction_id": "x", "text": "Add.", "recalled": False, "created_at": BEFORE}
    insert(
        "item_sources",
        {"id": "s1", "episode_id": "e1", **source},
        {"id": "s2", "episode_id": "e2", **source, "created_at": AFTER},
        {"id": "s3", "episode_id": "e2", **source, "recalled": True, "created_at": AFTER.replace("2026", "2027")},
    )
    insert(
        "knowledge",
        {"id": "k", "version": 1, "text": "- Add.", "tokens": 3, "dropped": "[]", "round_id": "r", "parent": None,
         "created_at": BEFORE},
    )  # fmt: skip
    insert("knowledge_items", {"knowledge_id": "k", "position": 0, "item_id": "i", "text": "Add."})
    insert(
        "checkpoints",
        {"id": "c", "model": "tiny", "path": "/x", "kind": "lora", "parent": None, "knowledge": "k", "round_id": "r",
         "status": "promoted", "manifest": "{}", "created_at": BEFORE, "promoted_at": AFTER},
    )  # fmt: skip
    insert("events", {"at": BEFORE, "who": "ada", "kind": "item", "subject": "i", "action": "added", "why": "x"})


def test_a_store_of_the_first_revision_opens_with_all_it_held(store_url):
    old = at_revision(store_url, "r0001")
    with old._write() as connection:
        fill_r0001(connection)
    old.close()
    with Store.open(store_url) as store:
        assert [turn.observation for turn in store.episode("e2").turns] == ["What is 1 + 1?"]
        assert store.episode_rows()[0].run_id is None
        assert [tuple(tally.model_dump().values()) for tally in store.tallies()] == [("sums", "train", 2, 2, 2, 6, 2)]
        assert list(store.checks()["tallies"]()) == []
        item, alone = sorted(store.items(), key=lambda found: -found.support)
        assert (item.support, alone.support) == (2, 0)
        assert [(row.id, row.support, row.last_seen.isoformat()[:10]) for row in store.item_rows()] == [
            ("i", 2, "2026-01-02"),
            ("alone", 0, "2026-01-01"),
        ]
        assert (item.effect, item.flags, item.derived_from) == (None, (), None)
        assert store.extractions()[0].others == ()
        assert store.checkpoint("c").run_id is None
        assert store.events()[0].detail is None
        assert store.round(1).seed == 2**70
        assert store.set_item_status("i", "absorbed", "ada", "gap closed").status == "absorbed"
        assert_like_the_models(store)
        before = store.episode("e1")
        with store._write() as connection:
            command.downgrade(_alembic(connection), "r0001")
            count = connection.execute(sa.text("SELECT count(*) FROM turns")).scalar()
    assert count == 2
    with Store.open(store_url) as store:
        assert store.episode("e1") == before
        assert_like_the_models(store)


def assert_like_the_models(store):
    with store._read() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, Base.metadata) == []
        assert set(Base.metadata.tables) < set(sa.inspect(connection).get_table_names())


def test_the_newest_revision_is_known_without_alembic(store):
    with store._read() as connection:
        assert newest_revision() == ScriptDirectory.from_config(_alembic(connection)).get_current_head()


def test_migrations_from_empty_end_in_the_models(store):
    assert_like_the_models(store)


def test_migrations_go_back_to_empty(store):
    with store._write() as connection:
        command.downgrade(_alembic(connection), "base")
        assert sa.inspect(connection).get_table_names() == [VERSION_TABLE]
    store._migrate()
    assert store.counts()["episode"] == 0
