"""The keys of the configuration: typed, immutable sections with defaults and descriptions.

The vocabulary is MindFormers' where it has a word (`expert_num`, `num_experts_chosen`, `capacity_factor`,
`aux_loss_factor`, `data_parallel`, ...), else the field's own. Nothing here imports MindSpore.
"""

from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from switchyard.config.router_options import RouterField
from switchyard.config.sections import (
    CascadeConfig,
    ContextConfig,
    ExportConfig,
    Fraction,
    NotNegative,
    ParallelConfig,
    Positive,
    Section,
    VisionConfig,
    Weight,
)


class ModelConfig(Section):
    """Describes the network: a decoder-only Transformer, a convolutional image classifier, or a cascade of
    classifiers."""

    type: Literal["decoder", "vision", "cascade"] = Field(
        "decoder", description="the network: text decoder, image classifier, or image classifier with early exits"
    )
    num_layers: Annotated[int, Field(ge=1, le=10_000)] = Field(
        4, description="Transformer layers; vision: convolutional layers, 0 at the input"
    )
    hidden_size: Positive = Field(128, description="width D of the residual stream; vision: channels")
    num_heads: Positive = Field(4, description="query heads")
    n_kv_heads: Positive | None = Field(None, description="key/value heads; null = num_heads, fewer = grouped-query")
    intermediate_size: Positive | None = Field(None, description="hidden width F of a dense feed-forward; null = 4 D")
    seq_length: Positive = Field(64, description="tokens S of a training sequence")
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="pre-norm before attention and feed-forward")
    norm_eps: Annotated[float, Field(gt=0)] = Field(1e-5, description="added to the variance")
    position: Literal["rotary", "learned"] = Field("rotary", description="position encoding of the tokens")
    theta: Annotated[float, Field(gt=0)] = Field(10000.0, description="base of the rotary frequencies")
    activation: Literal["relu", "gelu", "swiglu"] = Field("relu", description="feed-forward non-linearity")
    tie_word_embeddings: bool = Field(True, description="the output head is the embedding table")
    dropout: Fraction = Field(0.0, description="probability, on the embedding and on each residual branch")
    init_method_std: Annotated[float, Field(gt=0)] = Field(0.02, description="standard deviation of initial weights")
    compute_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="type of matrix multiplications; parameters, router and loss stay float32"
    )


class MoEConfig(Section):
    """Describes the conditional layers. `expert_num: 1` is a dense model."""

    router: RouterField = Field(
        "switch",
        validate_default=True,
        description="the router, a name or {name: ..., option: ...}: `python -m switchyard.moe.routing` lists them",
    )
    granularity: Literal["token", "slice", "sample", "region", "channel", "task"] | None = Field(
        None, description="unit of routing, one row; null = token for the decoder, sample for vision"
    )
    slice_length: Positive = Field(
        8, description="slice: tokens of a window; the first token of a window chooses its experts"
    )
    expert_num: Positive = Field(1, description="experts E of a layer; 1 = dense feed-forward everywhere")
    experts: str | None = Field(
        None, description="experts of your own: module.Class of a file, which extends switchyard.Expert"
    )
    dispatcher: str | None = Field(
        None, description="a dispatcher of your own: module.Class of a file, which extends switchyard.Dispatcher"
    )
    num_experts_chosen: Positive = Field(1, description="experts K that each row is sent to")
    layers: Literal["all"] | Positive | list[NotNegative] = Field(
        "all", description="which layers are conditional: all, every n-th (the n-th, 2n-th, ...), or a list from 0"
    )
    moe_intermediate_size: Positive | None = Field(
        None, description="hidden width F of one expert; null = the dense width"
    )
    shared_expert_num: NotNegative = Field(0, description="shared experts, which process every row")
    use_shared_expert_gating: bool = Field(
        False, description="multiplies the output of the shared experts by a learned sigmoid gate of the row"
    )
    dispatch: Literal["capacity", "dropless", "dropless_static"] = Field(
        "capacity",
        description="training: slots limited by capacity, or no dropped choice; "
        "dropless_static: on a cluster, without dynamic shapes",
    )
    capacity_factor: Annotated[float, Field(gt=0)] = Field(
        1.25, description="training: slots of an expert divided by its fair share of choices"
    )
    eval_capacity_factor: Annotated[float, Field(gt=0)] | None = Field(
        None, description="capacity factor at evaluation; null = dropless, in blocks of one expert each"
    )
    drop_order: Literal["position", "token", "probability", "batch_priority", "random"] = Field(
        "position",
        description="choices that keep a slot in a full expert: first choices in token order, token by token, by "
        "largest gate, by surest row, or at random",
    )
    min_capacity: Positive = Field(1, description="smallest number of slots of an expert")
    reroute: NotNegative = Field(
        0, description="rounds in which a choice without a slot tries the row's next best expert with a free slot"
    )
    force_balance: bool = Field(
        False,
        description="for benchmarking: assigns experts round-robin instead of by the "
        "router; gates are still computed and trained",
    )
    copies: Positive = Field(
        1, description="replica groups of experts: each group routes every row to K of its own experts"
    )
    dropless_block_size: Positive | None = Field(
        None, description="rows of a dropless block; null = a quarter of an expert's fair share, 8 to 128"
    )
    aux_loss_factor: Weight = Field(0.01, description="weight of the load-balance loss of each layer")
    z_loss_factor: Weight = Field(0.001, description="weight of the router z-loss of each layer")
    record: str | None = Field(None, description="safetensors file to which the chosen experts of this run are written")
    replay: str | None = Field(
        None,
        description="recorded file whose choices replace those of the router; gates are still computed and trained",
    )
    jitter: Fraction = Field(
        0.0, description="training: router input times U(1 - jitter, 1 + jitter), drawn again at each step"
    )
    router_warmup_steps: NotNegative = Field(
        0,
        description="number of first steps that assign rows to experts at random and "
        "evenly; the router is trained but does not choose",
    )
    router_freeze_step: NotNegative | None = Field(
        None, description="steps after which the router is no longer updated; 0 = from the start, null = never"
    )
    losses: dict[str, Weight] = Field(
        {},
        description="additional balance losses and their weights: importance, load, mutual_information, sequence, or "
        "module.function of a file of your own",
    )
    groups: Positive | None = Field(
        None, description="groups G that are routed independently; null = the number of data-parallel shards"
    )

    @property
    def choices(self) -> int:
        """Returns the number of experts that a row goes to in all: K of each copy."""
        return self.num_experts_chosen * self.copies

    @property
    def consistency_loss_factor(self) -> float:
        """Weight of the loss between two passes; 0 for a router that has no such option."""
        return self.router.given().get("consistency_loss_factor", 0.0)


class DataConfig(Section):
    """Describes where text or images come from and how text becomes tokens."""

    path: str | None = Field(
        None,
        description="text file, folder, glob or MindRecord, folder of IDX images; null = "
        "the Python library, or scikit-learn's digits",
    )
    tokenizer: str = Field("byte", description="byte, char, or the path of a tokenizer.json")
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1,
        description="validation share: the last part of each file; with 100 files or more, "
        "full files by a hash of their path",
    )
    val_path: str | None = Field(
        None, description="text file, folder or glob for validation, read in full; null = a part of data.path"
    )
    batch_size: Positive = Field(12, description="sequences or images of a micro-batch, over all devices together")
    accept_changed: bool = Field(
        False, description="--resume: continues although data.path holds other data than the run was trained on"
    )


class OptimizerConfig(Section):
    """Describes AdamW (arXiv 1711.05101) with decay on matrices only."""

    type: Literal["adamw"] = Field("adamw", description="the optimizer")
    beta1: Fraction = Field(0.9, description="decay of the first moment")
    beta2: Fraction = Field(0.99, description="decay of the second moment")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="added to the root of the second moment")
    weight_decay: Weight = Field(0.1, description="decay of matrices; norms and vectors do not decay")
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(1.0, description="largest global gradient norm; null = off")


class ScheduleConfig(Section):
    """Describes the learning rate: linear warm-up, then a curve from `learning_rate` to `lr_end`."""

    type: Literal["cosine", "linear", "constant"] = Field("cosine", description="the curve after warm-up")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak")
    lr_end: Weight = Field(1e-4, description="value at total_steps and after")
    warmup_steps: NotNegative = Field(100, description="steps of linear warm-up from 0")
    total_steps: Positive | None = Field(None, description="steps at which the curve ends; null = train.steps")


class TrainConfig(Section):
    """Describes the run: its folder, its steps, its log and its checkpoints."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        "run", description="the run's folder is output_dir/name"
    )
    output_dir: str = Field("runs", description="folder of the run folders")
    steps: Positive = Field(2000, description="optimizer steps")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(1, description="seed of weights, batches and noise")
    gradient_accumulation_steps: Positive = Field(1, description="micro-batches of one optimizer step")
    loggers: list[Literal["tensorboard", "wandb", "mlflow", "swanlab"]] = Field(
        ["tensorboard"],
        description="what gets the figures besides metrics.jsonl; all but tensorboard are optional packages",
    )
    log_every: Positive = Field(20, description="steps between two lines of the log")
    eval_every: NotNegative = Field(500, description="steps between evaluations; 0 = only at the end")
    eval_batches: NotNegative = Field(20, description="batches of an evaluation during training; 0 = the whole set")
    sample_every: NotNegative = Field(0, description="steps between two short sampled texts; 0 = none")
    checkpoint_every: NotNegative = Field(500, description="steps between checkpoints; 0 = only at the end")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints kept, besides the best")
    init_loss_scale: Annotated[float, Field(gt=0)] = Field(65536.0, description="float16: first dynamic loss scale")
    replica_check_every: NotNegative = Field(
        100, description="steps between checks that replicated tensors are bit-equal on all devices; 0 = never"
    )


class Config(Section):
    """Holds the full configuration of a run."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    vision: VisionConfig = VisionConfig()
    cascade: CascadeConfig = CascadeConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    context: ContextConfig = ContextConfig()
    export: ExportConfig = ExportConfig()

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Returns the indices, from 0, of the layers that are conditional."""
        count, which = self.model.num_layers, self.moe.layers
        one_expert = self.moe.expert_num == 1 and self.moe.router != "mixture_of_depths"
        if one_expert or self.model.type == "cascade":
            return ()
        if which == "all":
            return tuple(range(count))
        if isinstance(which, int):
            return tuple(range(which - 1, count, which))
        return tuple(sorted(set(which)))

    @property
    def dense_width(self) -> int:
        """Returns the hidden width F of a dense feed-forward."""
        return self.model.intermediate_size or 4 * self.model.hidden_size

    @property
    def expert_width(self) -> int:
        """Returns the hidden width F of one expert."""
        return self.moe.moe_intermediate_size or self.dense_width

    @property
    def groups(self) -> int:
        """Groups G that route for themselves."""
        return self.moe.groups or self.parallel.data_parallel

    @property
    def granularity(self) -> str:
        """Returns what is routed as one row."""
        return self.moe.granularity or ("token" if self.model.type == "decoder" else "sample")

    @property
    def units(self) -> int:
        """Returns the number of rows that an image is split into."""
        vision = self.vision
        return {"region": vision.regions**2, "channel": vision.channel_groups}.get(self.granularity, 1)

    @property
    def row_tokens(self) -> int:
        """Returns the tokens of a routed row: those of a window where windows are routed, else 1."""
        return self.moe.slice_length if self.granularity == "slice" else 1

    @property
    def rows(self) -> int:
        """Returns the rows of a micro-batch, as noise is drawn for them: tokens, or units of images."""
        each = self.model.seq_length if self.model.type == "decoder" else self.units
        return self.data.batch_size * each

    @property
    def micro_batches(self) -> int:
        """Returns the micro-batches of a step: those one after the other, times those in a pipeline at a time."""
        parallel, each = self.parallel, self.train.gradient_accumulation_steps
        return each * parallel.micro_batch_num if parallel.pipeline_stage > 1 else each

    @property
    def predictions(self) -> int:
        """Returns the predictions of a micro-batch: tokens, or images."""
        return self.data.batch_size * (self.model.seq_length if self.model.type == "decoder" else 1)

    @property
    def unit(self) -> str:
        """Returns what is predicted, in logs."""
        return "tokens" if self.model.type == "decoder" else "images"

    @property
    def devices(self) -> int:
        """Returns the number of devices that the parallel degrees need."""
        parallel = self.parallel
        return parallel.data_parallel * parallel.model_parallel * parallel.pipeline_stage

    def value(self, key: str) -> Any:
        """Returns the value of `section.key`, or of the option `moe.router.key`."""
        section, _, name = key.partition(".")
        if name.startswith("router."):
            return self.moe.router.given()[name.removeprefix("router.")]
        return getattr(getattr(self, section), name)

    def to_yaml(self) -> str:
        """Returns all keys with their values as YAML, in the order of the sections."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, width=100)
