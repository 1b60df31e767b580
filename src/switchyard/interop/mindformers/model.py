"""The decoder as a model of MindFormers: its configuration and its network, in MindFormers' registry.

Legend: B batch, S sequence, N = B * S tokens, D width, J noise slices, W figures of a step (see training.loss).
"""

from typing import Any

import mindspore as ms
import numpy as np
from mindformers import PretrainedConfig, PreTrainedModel
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config, build
from switchyard.config.schema import ModelConfig
from switchyard.distributed.mesh import LOCAL, CompiledMesh, LocalMesh
from switchyard.errors import UserError, represented
from switchyard.interop.mindformers.sections import moe_section, parallel_section
from switchyard.models import create_model
from switchyard.training.limits import refusals, refuse
from switchyard.training.loss import LOSS, TrainLoss, figures_num

LARGEST_UNIFORM = 1.0 - 2.0**-24  # some devices draw 1, of which a logarithm is taken
# what MindFormers puts beside the keys of `model_config`, and does not concern a model of this package
OF_MINDFORMERS = ("checkpoint_name_or_path", "disable_lazy_inline", "input_sliced_sig", "name_or_path")


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class SwitchyardConfig(PretrainedConfig):
    """Holds `model.model_config` of a MindFormers YAML: the keys of the section `model` under their own names.

    Experts are described in one of two places: `moe`, with the keys of this package's section `moe`, or MindFormers'
    `moe_config` beside the model, whose keys are translated and whose defaults are MindFormers'.

    Args:
        vocab_size: V of the tokens.
        seed: of the initial weights, as train.seed.
        moe: the section `moe`.
        moe_config, parallel_config, dataset_config, batch_size: as MindFormers hands them over.
        keys: of the section `model`.

    Attributes:
        switchyard: the checked configuration of this package.

    Raises:
        UserError: an unknown key, or a value that this package does not have.
    """

    model_type = "switchyard"

    def __init__(
        self,
        vocab_size: int = 256,
        seed: int = 1,
        moe: dict | None = None,
        moe_config: Any = None,
        parallel_config: Any = None,
        dataset_config: Any = None,
        batch_size: int | None = None,
        calculate_per_token_loss: bool = False,
        **keys: Any,
    ):
        known = {name: keys.pop(name) for name in OF_MINDFORMERS if name in keys}
        super().__init__(**known)
        if calculate_per_token_loss:
            raise UserError("calculate_per_token_loss: True; the loss of this model is a mean already: set it to False")
        for name, value in keys.items():
            if name not in ModelConfig.model_fields:
                raise UserError(f"model.model_config.{name}: {represented(value)}; unknown key")
            setattr(self, name, value)
        parallel = parallel_section(as_dict(parallel_config))
        size = (batch_size or (dataset_config or {}).get("batch_size") or 1) * parallel.get("data_parallel", 1)
        self.vocab_size, self.seed, self.moe_config, self.parallel_config = (
            vocab_size,
            seed,
            moe_config,
            parallel_config,
        )
        self.num_layers, self.hidden_size = keys.get("num_layers", 4), keys.get("hidden_size", 128)
        tree = {"model": keys, "moe": experts_of(moe, moe_config, self.num_layers), "parallel": parallel}
        self.switchyard = build({**tree, "data": {"batch_size": size}, "train": {"seed": seed}})
        if self.switchyard.model.type != "decoder":
            raise UserError(f"model.model_config.type: {self.switchyard.model.type}; only a decoder trains here")


def as_dict(section: Any) -> dict[str, Any]:
    """Returns a section of MindFormers, an object or a mapping, as a dict of what is not at its default."""
    if section is None:
        return {}
    return section.to_diff_dict() if hasattr(section, "to_diff_dict") else dict(section)


def experts_of(moe: dict | None, moe_config: Any, num_layers: int) -> dict[str, Any]:
    """Returns the section `moe`, which stands in one of two places (UserError: in both)."""
    theirs = as_dict(moe_config)
    if theirs.get("expert_num", 1) == 1:
        return plain(moe or {})
    if moe:
        raise UserError("model.model_config.moe: given beside moe_config; describe the experts in one of the two")
    return moe_section(theirs, num_layers)


def plain(tree: Any) -> Any:
    """Returns mappings of MindFormers as dicts."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class SwitchyardForCausalLM(PreTrainedModel):
    """Computes the training loss of the decoder of this package: windows of S + 1 tokens -> [] float32.

    The names of its parameters are those of a checkpoint of this package. In semi-automatic parallel mode it is
    sharded by the layouts that `train.py` uses on a cluster.

    Args:
        config: see SwitchyardConfig.

    Attributes:
        figures: what the last training pass has found on all devices [W], see training.loss.
    """

    config_class = SwitchyardConfig
    base_model_prefix = "switchyard"

    def __init__(self, config: SwitchyardConfig):
        super().__init__(config, auto_prefix=False)
        full = config.switchyard
        self.mesh, self.data = mesh_of(full), full.parallel.data_parallel
        self.decoder = create_model(full, config.vocab_size, mesh=self.mesh)
        self.mesh.place(self.decoder)
        self.train_loss = TrainLoss(self.decoder, full, self.mesh)
        self.routers = routers_of(self.decoder)
        if self.routers and ms.get_auto_parallel_context("enable_parallel_optimizer"):
            raise UserError(
                f"parallel.enable_parallel_optimizer: True; would divide the bias of router '{full.moe.router}': set "
                "it to False"
            )
        self.slices, self.width = self.decoder.noise_slices, full.model.hidden_size
        if self.slices and self.mesh is not LOCAL:
            key = "moe.jitter" if full.moe.jitter else "model.dropout or the router"
            raise UserError(f"{key}: draws noise, which MindFormers' Trainer does not shard: switch it off")
        self.uniform = ops.UniformReal(seed=config.seed % 2**31 or 1, seed2=1)
        found = Tensor(np.zeros(figures_num(full), np.float32))
        self.figures = Parameter(found, name="figures", requires_grad=False, parallel_optimizer=False)
        self.keep = ops.Assign().shard(((1,), (1,)))  # in full on every device
        self.one = Tensor(np.ones((1, 1), np.float32))
        self.local_windows = self.windows
        self.shard_windows()

    def construct(self, input_ids: Tensor) -> Tensor:
        """Takes windows [B, S + 1]: predicts each token but the first."""
        tokens, labels, valid, noise = self.local_windows(input_ids)
        if self.slices > 0:
            noise = self.draw(tokens)
        found = self.train_loss(tokens, labels, valid, noise, self.one)  # [W]
        return ops.depend(found[LOSS], self.keep(self.figures, ops.stop_gradient(found)))

    def draw(self, tokens: Tensor) -> Tensor:
        """Draws the noise of a pass over tokens [B, S]: [J, N, D] of U(0, 1)."""
        rows = tokens.shape[0] * tokens.shape[1]
        return ops.minimum(self.uniform((self.slices, rows, self.width)), LARGEST_UNIFORM)

    # ---- local to one device
    def windows(self, input_ids: Tensor) -> tuple:
        """Splits windows [B, S + 1] into tokens, labels, valid [B, S], and the noise that nobody reads [1, 1, 1]."""
        tokens, labels = input_ids[:, :-1], input_ids[:, 1:]  # [B, S] each
        return tokens, labels, ops.ones_like(tokens).astype(mstype.float32), ops.zeros((1, 1, 1), mstype.float32)

    def shard_windows(self) -> None:
        """Shards windows by data shards."""
        mesh, data = self.mesh, self.data
        pair = mesh.layout("data", None)

        def shapes(windows):
            shorter = [windows[0], windows[1] - 1]
            return shorter, shorter, shorter, [1, data, 1]

        def types(windows):
            return windows, windows, mstype.float32, mstype.float32

        self.local_windows = mesh.local(self.windows, (pair,), (pair, pair, pair, mesh.noise), shapes, types)


def routers_of(decoder: nn.Cell) -> list[nn.Cell]:
    """Returns the routers that balance by a bias, one for each conditional layer; none where no router does."""
    routers = [cell.router for _, cell in decoder.cells_and_names() if hasattr(cell, "train_dispatcher")]
    return routers if any(router.state() for router in routers) else []


def mesh_of(config: Config) -> LocalMesh:
    """Returns the mesh that MindFormers has set up (UserError: a mode of parallelism that this model does not know)."""
    mode, stages = ms.get_auto_parallel_context("parallel_mode"), config.parallel.pipeline_stage
    if mode == "semi_auto_parallel":
        refuse(refusals(config))
        if stages > 1:
            raise UserError(f"parallel_config.pipeline_stage: {stages}; only train.py makes stages of this model: 1")
        return CompiledMesh(config)
    if mode not in ("stand_alone", "data_parallel"):
        raise UserError(f"parallel.parallel_mode: {mode}; 0 (one device) or 1 (semi-automatic)")
    return LOCAL
