import pytest


@pytest.fixture(scope="session", autouse=True)
def _games_folder(tmp_path_factory):
    """One cache folder for the session, so that no game is made twice and none lands in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGRAIN_HOME", str(tmp_path_factory.mktemp("home")))
        yield
