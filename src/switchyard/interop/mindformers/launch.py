"""Trains by a YAML file of MindFormers, through its `Trainer`."""

import sys
from pathlib import Path
from typing import Any

import yaml

from switchyard.config.loader import read_sections
from switchyard.config.router_options import readers
from switchyard.errors import UserError, represented, shortened
from switchyard.file_errors import writing
from switchyard.interop.mindformers import quiet

CONFIG = "mindformers.yaml"  # in the run folder: what was trained, with overrides


def train(path: str | Path, overrides: list[str] | None = None) -> Path:
    """Trains by a YAML file of MindFormers and returns the run folder, `output_dir` of the file.

    The current folder and stdout stay as they are, but for the lines of `SwitchyardMonitor`. What MindFormers logs
    stands in mindformers.log of the run folder.

    Args:
        path: of the file.
        overrides: `section.key=value`, values in YAML.

    Raises:
        UserError: MindFormers is missing; a file that is no YAML of MindFormers; what the configuration refuses.
    """
    tree = with_overrides(read_sections(path), overrides or [])
    check(tree, shortened(str(path), 200))
    folder = Path(tree.get("output_dir") or "output")
    quiet.require_installed()
    with quiet.logs_to(folder) as log:
        print(f"run: {folder}; MindFormers' log: {log}", file=sys.__stdout__, flush=True)
        _train(write_yaml(tree | {"output_dir": str(folder)}, folder / quiet.of_rank(CONFIG)))
    print(f"done: {folder}", flush=True)
    return folder


def check(tree: dict[str, Any], name: str) -> None:
    """Refuses a file that MindFormers, or the model of this package, would take otherwise than it says (UserError)."""
    for section in ("trainer", "model", "train_dataset", "runner_config"):
        if not isinstance(tree.get(section), dict):
            raise UserError(f"config file '{name}': has no section '{section}', as files of MindFormers have")
    halves, sums = tree.get("micro_batch_interleave_num"), tree["runner_config"].get("gradient_accumulation_steps")
    for key, value in (("micro_batch_interleave_num", halves), ("runner_config.gradient_accumulation_steps", sums)):
        if value not in (None, 1):
            raise UserError(f"{key}: {represented(value)}; router statistics would be those of a part: set it to 1")
    if tree.get("do_eval"):
        raise UserError("do_eval: True; only train.py evaluates this model: set it to False")
    callbacks = tree.get("callbacks") or []
    if balances_by_bias(tree) and not any(one.get("type") == "SwitchyardMonitor" for one in callbacks):
        raise UserError("callbacks: no SwitchyardMonitor, which moves the bias of the router: add it")


def balances_by_bias(tree: dict[str, Any]) -> bool:
    """Returns whether the router of a file is balanced by a bias that the host moves."""
    model = tree["model"].get("model_config") or {}
    router = (model.get("moe") or {}).get("router", "")
    name = router.get("name") if isinstance(router, dict) else router
    return name in readers("topk_bias_update_rate") or bool((tree.get("moe_config") or {}).get("balance_via_topk_bias"))


def write_yaml(tree: dict[str, Any], path: Path) -> Path:
    """Writes the configuration of a run into its folder, and returns the file: MindFormers adds defaults to files."""
    with writing(path):
        path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def _train(path: Path) -> None:
    """Does what MindFormers' own launcher does with a file."""
    from mindformers import MindFormerConfig, Trainer
    from mindformers.core.context import build_context

    config = MindFormerConfig(str(path))
    build_context(config)
    try:
        Trainer(config).train()
    except SystemExit as end:  # how `only_save_strategy` stops once the step is compiled
        if end.code:
            raise


def with_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Returns a tree with `section.key=value` set, the last of a key counts (UserError: a key that is not there)."""
    for override in overrides:
        key, equals, text = override.partition("=")
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict) or name not in place:
            raise UserError(f"{shortened(key)}: {represented(text)}; the file has no such key to change")
        place[name] = yaml.safe_load(text)
    return tree
