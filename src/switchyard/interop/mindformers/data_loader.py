"""Training text for MindFormers' Trainer, in the order in which `train.py` reads it."""

from typing import Any

import numpy as np
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore.dataset import GeneratorDataset

from switchyard.config import build
from switchyard.data import load_data
from switchyard.errors import UserError, represented


class Windows:
    """Gives the windows [S + 1] of training by their number: sequence i % B of batch i // B of `TrainBatches`."""

    def __init__(self, batches: Any, batch_size: int, count: int):
        self.batches, self.batch_size, self.count = batches, batch_size, count
        self.kept = (-1, None)  # the newest batch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[np.ndarray]:
        index, place = divmod(int(number), self.batch_size)
        if self.kept[0] != index:
            self.kept = index, self.batches.at(index)
        tokens, labels, _ = self.kept[1]
        return (np.append(tokens[place], labels[place, -1:]).astype(np.int32),)  # [S + 1]


@MindFormerRegister.register(MindFormerModuleType.DATASET_LOADER)
class SwitchyardDataLoader:
    """Reads text, or a folder of `switchyard.data.prepare`, as windows of seq_length + 1 tokens.

    An epoch is `steps` batches, in the order that `train.py` has for the same seed, batch size and text. Every epoch
    reads the same batches: one epoch of as many steps as the run has goes on as `train.py` does.

    Args:
        steps: batches of an epoch.
        seq_length: tokens S of a sequence.
        seed: of the order.
        path, tokenizer, val_fraction: as in the section `data`; the validation share is left out.
        batch_size, num_shards, shard_id, column_names: as MindFormers hands them over, and dataset_dir, which must be
            None, and the numbers of workers: one thread reads windows, which takes microseconds.

    Raises:
        UserError: an unknown key; text that cannot be read.

    Examples:
        In YAML: `data_loader: {type: SwitchyardDataLoader, auto_register: switchyard_mindformers.SwitchyardDataLoader,
        steps: 200, seq_length: 192, path: text.txt}`
    """

    def __new__(
        cls,
        steps: int,
        seq_length: int,
        seed: int = 1,
        path: str | None = None,
        tokenizer: str = "byte",
        val_fraction: float = 0.1,
        batch_size: int = 1,
        num_shards: int | None = None,
        shard_id: int | None = None,
        column_names: list[str] | None = None,
        dataset_dir: str | None = None,
        python_multiprocessing: bool = False,
        num_parallel_workers: int = 1,
        **others: Any,
    ) -> GeneratorDataset:
        if dataset_dir is not None:
            others = {"dataset_dir": dataset_dir, **others}
        for name, value in others.items():
            where = "train_dataset.data_loader"
            raise UserError(f"{where}.{name}: {represented(value)}; unknown key; {where}.path names the text")
        shards, shard = num_shards or 1, shard_id or 0
        together = batch_size * shards
        data = {"path": path, "tokenizer": tokenizer, "val_fraction": val_fraction, "batch_size": together}
        config = build({"data": data, "model": {"seq_length": seq_length}, "train": {"seed": seed}})
        batches = load_data(config, None, shard, shards).train
        windows = Windows(batches, batch_size, steps * batch_size)
        return GeneratorDataset(windows, column_names or ["input_ids"], shuffle=False, num_parallel_workers=1)
