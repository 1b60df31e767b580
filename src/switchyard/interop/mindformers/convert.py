"""Translates YAML files of MindFormers into those of this package. No MindSpore in here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from switchyard.config import build
from switchyard.config.loader import read_sections
from switchyard.errors import UserError, shortened
from switchyard.file_errors import writing
from switchyard.interop.mindformers.model_section import describes_experts, read_experts, read_model, read_own
from switchyard.interop.mindformers.reader import UNKNOWN, Left, Reader
from switchyard.interop.mindformers.run_sections import read_run, read_top
from switchyard.interop.mindformers.sections import read_moe, read_parallel

SECTIONS = ("model", "moe_config", "parallel_config")  # a file of MindFormers has one of them


@dataclass
class Converted:
    """Holds what a file was translated to.

    Attributes:
        tree: sections of this package.
        left: keys without a counterpart, and unknown ones.
        decided: keys that this package needs no counterpart for, because it decides the same by itself.
        problem: why the sections cannot be trained as they are; None where they can.
    """

    tree: dict[str, dict[str, Any]]
    left: list[Left] = field(default_factory=list)
    decided: list[str] = field(default_factory=list)
    problem: str | None = None

    def to_yaml(self, source: str) -> str:
        """Returns the sections as YAML, with all that was left as comments."""
        lines = [f"# Translated from {source}, a YAML file of MindFormers."]
        lines += [f"# not translated: {one}" for one in self.left]
        lines += [f"# to be changed: {self.problem}"] if self.problem else []
        return "\n".join(lines) + "\n" + yaml.safe_dump(self.tree, sort_keys=False, allow_unicode=True)


def convert(theirs: dict[str, Any]) -> Converted:
    """Translates the sections of a file of MindFormers.

    Raises:
        UserError: no file of MindFormers, a section that is no mapping, or a value of a wrong type.

    Examples:
        >>> found = convert({"moe_config": {"expert_num": 8, "routing_policy": "TopkRouterV2", "colour": 1}})
        >>> found.tree["moe"]["expert_num"], [str(one) for one in found.left]
        (8, ['moe_config.colour: 1; unknown key'])
    """
    if not any(name in theirs for name in SECTIONS):
        raise UserError(f"config file: no section of {', '.join(SECTIONS)}, of which a file of MindFormers has one")
    model = section_of(theirs, "model")
    of_model = Reader("model_config", section_of(model, "model_config"))
    of_moe = Reader("moe_config", section_of(theirs, "moe_config"))
    of_parallel = Reader("parallel_config", section_of(theirs, "parallel_config"))
    own = of_model.values.get("type") == "SwitchyardConfig"
    tree = read_own(of_model) if own else {"model": read_model(of_model)} if of_model.values else {}
    layers = tree.get("model", {}).get("num_layers", 4)
    if own and tree["moe"]:
        of_moe.leave(tuple(of_moe.values), "model_config.moe describes the experts")
    elif describes_experts(of_model.values):
        tree["moe"] = read_experts(of_model, layers)
        of_moe.leave(tuple(of_moe.values), "model_config describes the experts, and MindFormers reads that")
    elif of_moe.values:
        tree["moe"] = read_moe(of_moe, layers)
    if of_parallel.values:
        tree["parallel"] = read_parallel(of_parallel)
    readers = [of_model, of_moe, of_parallel]
    readers += read_run(theirs, tree)
    top, decided = read_top(theirs, model)
    left = [one for reader in readers for one in reader.finish()]
    decided = [name for reader in readers for name in reader.decided] + decided
    return Converted(tree, left + top, decided, problem_of(tree))


def section_of(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a section, {} where there is none (UserError: it is no mapping)."""
    section = tree.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(f"{name}: {shortened(section)}; must be a mapping of keys")
    return section


def problem_of(tree: dict[str, Any]) -> str | None:
    """Returns why sections are no configuration that trains, in one line; None where they are."""
    try:
        build(tree)
    except UserError as error:
        return str(error)
    return None


def convert_file(path: Path, out: Path | None) -> Converted:
    """Translates a file and writes the result, which must not exist; without `out` nothing is written.

    Raises:
        UserError: as `convert`; the result exists, or cannot be written.
    """
    if out is not None and out.exists():
        raise UserError(f"--out: '{shortened(str(out))}': exists; give another name")
    found = convert(read_sections(path))
    if out is not None:
        with writing(out):
            out.write_text(found.to_yaml(path.name), encoding="utf-8")
    return found


def report(found: Converted) -> list[str]:
    """Returns what a translation has to say, line by line: keys that were left, and what is to be changed."""
    known = [one for one in found.left if one.why != UNKNOWN]
    unknown = [one for one in found.left if one.why == UNKNOWN]
    lines = [f"not translated: {one}" for one in known] + [f"unknown: {one.key}" for one in unknown]
    lines += [f"decided by this package itself: {', '.join(found.decided)}"] if found.decided else []
    lines += [f"to be changed: {found.problem}"] if found.problem else []
    keys = sum(len(section) for section in found.tree.values())
    return [*lines, f"{keys} keys written; {len(known)} keys have no counterpart, {len(unknown)} are unknown"]
