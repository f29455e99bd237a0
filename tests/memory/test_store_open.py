from pathlib import Path

import pytest
import sqlalchemy as sa

from envs.errors import EngrainError, UsageError
from memory.database import VERSION_TABLE, parse_url
from memory.errors import BadStoreError, StoreError
from memory.store import Store


def test_what_is_stored_is_there_after_reopening(store_url, make_episode):
    with Store.open(store_url) as store:
        store.add_episodes([make_episode()])
    with Store.open(store_url, create=False) as store:
        assert store.episode("e1") == make_episode()


def test_what_is_settled_outlasts_the_log(tmp_path, make_episode):
    path, left = tmp_path / "whole.db", tmp_path / "left.db"
    with Store.open(str(path)) as store:
        store.add_episodes([make_episode()])
        store.settle()
        left.write_bytes(path.read_bytes())  # without the log beside it
    with Store.open(str(left), create=False) as store:
        assert store.episode("e1") == make_episode()


def test_opening_does_not_wait_for_a_writer(store_url):
    with Store.open(store_url) as writer, writer._write() as connection:
        writer._one_at_a_time(connection)
        writer._log(connection, "item", "i", "seen", "ada", "")
        with Store.open(store_url) as reader:
            assert reader.events() == []


def test_a_newer_store_is_refused(store_url):
    with Store.open(store_url) as store, store._write() as connection:
        connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = 'r9999'")
    with pytest.raises(UsageError, match=r"newer version of Engrain .*r9999"):
        Store.open(store_url)


def test_another_programs_tables_are_left_alone(tmp_path):
    path = tmp_path / "theirs.db"
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE tasks (todo TEXT)")
    with pytest.raises(BadStoreError, match="'tasks'"):
        Store.open(str(path))
    with engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["tasks"]


def test_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to be taken for one" * 100)
    with pytest.raises(UsageError, match="not a database") as caught:
        Store.open(str(path))
    assert "\n" not in str(caught.value)
    assert path.read_text().startswith("not a database")


@pytest.mark.parametrize(
    "url",
    [
        "mysql://me:hunter2@host/db",
        "http://me:hunter2@host",
        "postgresql://me:hun@ter2@host/db",
        "sqlite:////dev/null/store.db",
        "",
        "a\0b",
    ],
)
def test_a_url_that_is_no_database_is_one_line_without_password(url):
    with pytest.raises(UsageError) as caught:
        Store.open(url)
    assert "\n" not in str(caught.value)
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["postgresql://me:hunter2@127.0.0.1:1/db", "postgresql://me@127.0.0.1:1/db?password=hunter2"]
)
def test_a_dead_server_is_one_line_without_password(url):
    with pytest.raises(StoreError) as caught:
        Store.open(url)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_database_that_the_server_lacks(postgres_url):
    missing = sa.make_url(postgres_url).set(database="missing").render_as_string(hide_password=False)
    with pytest.raises(UsageError, match="missing"):
        Store.open(missing)


def test_urls():
    assert parse_url("postgresql://h/d").drivername == "postgresql+psycopg"
    assert parse_url("runs.db").database == "runs.db"
    with pytest.raises(BadStoreError, match="no store at"):
        Store.open("does-not-exist.db", create=False)
    assert not Path("does-not-exist.db").exists()


def test_sqlite_settings(tmp_path):
    with Store.open(str(tmp_path / "s.db")) as store, store._read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() >= 1000


def test_a_failing_database_is_one_of_our_errors(tmp_path, make_episode):
    with Store.open(str(tmp_path / "s.db")) as store:
        with store._write() as connection:
            connection.exec_driver_sql("DROP TABLE events")
        with pytest.raises(EngrainError, match="no such table"):
            store.create_round({}, 0, "tiny")
        assert store.rounds() == []
