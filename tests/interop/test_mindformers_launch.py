"""What is said before MindFormers is imported: files that cannot be trained, a package that is missing."""

from pathlib import Path

import pytest
import yaml

from switchyard import cli
from switchyard.config.loader import read_sections
from switchyard.errors import UserError
from switchyard.interop.mindformers import quiet
from switchyard.interop.mindformers.__main__ import main
from switchyard.interop.mindformers.launch import check, with_overrides

YAML = Path(__file__).parents[2] / "config/mindformers/quickstart.yaml"


def test_the_file_of_the_repository_is_taken():
    check(read_sections(YAML), "quickstart.yaml")


def test_an_override_reaches_what_an_alias_repeats():
    """The data set stands twice in files of MindFormers, once as an alias."""
    tree = with_overrides(read_sections(YAML), ["train_dataset.data_loader.steps=7", "seed=3"])
    assert tree["train_dataset_task"]["dataset_config"]["data_loader"]["steps"] == 7
    assert tree["seed"] == 3


@pytest.mark.parametrize("override", ["model.model_config.colour=1", "nothing.at.all=1", "seed"])
def test_an_override_of_a_key_that_is_not_there_is_refused(override):
    with pytest.raises(UserError, match="no such key to change"):
        with_overrides(read_sections(YAML), [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer=null"], "has no section 'trainer'"),
        (["runner_config.gradient_accumulation_steps=2"], "runner_config.gradient_accumulation_steps: 2"),
        (["do_eval=True"], "do_eval: True; only train.py evaluates"),
        (["micro_batch_interleave_num=2"], "micro_batch_interleave_num: 2"),
        (["model.model_config.moe.router=sigmoid", "callbacks=[]"], "no SwitchyardMonitor"),
    ],
)
def test_a_file_that_would_train_otherwise_is_refused(overrides, message):
    with pytest.raises(UserError) as caught:
        check(with_overrides(read_sections(YAML), overrides), "file")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_package_gets_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quiet, "is_installed", lambda name: False)
    tree = read_sections(YAML) | {"output_dir": str(tmp_path / "run")}
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert cli.run(main, ["train", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: mindformers: not installed; pip install")
    assert not (tmp_path / "run").exists()


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(quiet, "is_installed", lambda name: True)
    monkeypatch.setattr(quiet.importlib.metadata, "version", lambda name: "2.0.0")
    with pytest.raises(UserError, match=r"mindformers: 2\.0\.0; only 1\.9\.0 was tested"):
        quiet.require_installed()


def test_files_of_other_ranks_have_names_of_their_own(monkeypatch):
    assert quiet.of_rank("mindformers.log") == "mindformers.log"
    monkeypatch.setenv("RANK_ID", "3")
    assert quiet.of_rank("mindformers.log") == "mindformers_rank_3.log"
