import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache for each test, where copies of packed files go."""
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path_factory.mktemp("cache")))
