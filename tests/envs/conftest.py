import pytest


@pytest.fixture(scope="session")
def _games_home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def engrain_home(_games_home, monkeypatch):
    """One home for these tests instead of one each, so that no game is made twice and none lands in the user's."""
    monkeypatch.setenv("ENGRAIN_HOME", str(_games_home))
    return _games_home
