"""One small export that many tests read."""

import pytest


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The directory of an export: two layers of 4 experts, a char vocabulary, 24 tokens at most. Not to be changed."""
    from oracles.tiny_export import save_export

    return save_export(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def model(exported):
    """The same, opened."""
    from oracles.tiny_export import quiet

    from switchyard.inference.mindir import open_model

    return open_model(exported, say=quiet)
