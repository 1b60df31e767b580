"""Imports and exports appear in full or not at all, and tell how far they are."""

import pytest
from oracles.hf_models import FIXTURES

from switchyard.errors import UserError
from switchyard.interop.huggingface.exporter import export_model
from switchyard.interop.huggingface.importer import import_model


class Bar:
    """Counts bytes as a tqdm bar does; raises an error once `limit` of them are there."""

    def __init__(self, limit: float = float("inf"), error: BaseException | None = None):
        self.total, self.count, self.limit, self.error = 0, 0, limit, error

    def reset(self, total: int) -> None:
        """Begins."""
        self.total = total

    def update(self, count: int) -> None:
        """Counts."""
        self.count += count
        if self.count >= self.limit:
            raise self.error


def quiet(line: str) -> None:
    """Says nothing."""


def test_the_bar_counts_every_byte(tmp_path):
    there, back = Bar(), Bar()
    import_model(FIXTURES / "mixtral", tmp_path / "run", say=quiet, bar=there)
    export_model(tmp_path / "run", tmp_path / "out", say=quiet, bar=back)
    assert there.count == there.total == 8_400 * 4
    assert back.count == back.total == 8_400 * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_what_ends_half_way_leaves_nothing(error, share, imported, tmp_path):
    raised = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
    with pytest.raises(raised):
        import_model(FIXTURES / "mixtral", tmp_path / "run", say=quiet, bar=Bar(share * 8_400 * 4, error))
    with pytest.raises(raised):
        export_model(imported("mixtral"), tmp_path / "out", say=quiet, bar=Bar(share * 8_400 * 2, error))
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_may_stand_below_others_that_are_made(tmp_path):
    import_model(FIXTURES / "llama2", tmp_path / "a" / "b" / "run", say=quiet)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["run"]
