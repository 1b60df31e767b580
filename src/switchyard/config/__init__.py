"""Typed, immutable configuration: YAML and dotted overrides in, cross-field checks, one-line errors."""

from switchyard.config.loader import build, check, load
from switchyard.config.schema import (
    CascadeConfig,
    Config,
    ContextConfig,
    DataConfig,
    ExportConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
    VisionConfig,
)
from switchyard.config.sections import Section
from switchyard.config.unread import notes, notes_of_checkpoint, unread_keys

__all__ = [
    "CascadeConfig",
    "Config",
    "ContextConfig",
    "DataConfig",
    "ExportConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "Section",
    "TrainConfig",
    "VisionConfig",
    "build",
    "check",
    "load",
    "notes",
    "notes_of_checkpoint",
    "unread_keys",
]
