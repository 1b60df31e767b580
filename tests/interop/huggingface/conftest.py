"""Run folders that fixtures of Hugging Face become."""

from collections.abc import Callable
from pathlib import Path

import pytest
from oracles.hf_models import FIXTURES

from switchyard.interop.huggingface.importer import import_model


def quiet(line: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="session")
def imported(tmp_path_factory) -> Callable[[str], Path]:
    """Gives the run folder of a case, imported once."""
    folder = tmp_path_factory.mktemp("imported")

    def run_of(case: str) -> Path:
        if not (folder / case).exists():
            import_model(FIXTURES / case, folder / case, say=quiet)
        return folder / case

    return run_of
