"""The keys of the configuration: typed, immutable sections with defaults and descriptions.

The vocabulary is MindFormers' where it has a word (`expert_num`, `num_experts_chosen`, `capacity_factor`,
`aux_loss_factor`, `data_parallel`, ...), else the field's own. Nothing here imports MindSpore.
"""

from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from switchyard.config.rotary_scaling import RotaryScaling
from switchyard.config.router_options import RouterField
from switchyard.config.sections import (
    CascadeConfig,
    ContextConfig,
    CorpusConfig,
    DistillConfig,
    ExportConfig,
    Fraction,
    LoraConfig,
    NotNegative,
    OptimizerConfig,
    ParallelConfig,
    Positive,
    ScheduleConfig,
    Section,
    VisionConfig,
    Weight,
)
from switchyard.config.seq2seq import Seq2SeqConfig

TEXT_MODELS = ("decoder", "seq2seq")


class ModelConfig(Section):
    """Describes the network: a decoder-only Transformer, an encoder-decoder, an image classifier, or a cascade of
    classifiers."""

    type: Literal["decoder", "seq2seq", "vision", "cascade"] = Field(
        "decoder",
        description="the network: text decoder, encoder and decoder (T5), image classifier, or image classifier with "
        "early exits",
    )
    num_layers: Annotated[int, Field(ge=1, le=10_000)] = Field(
        4, description="Transformer layers; seq2seq: of the encoder; vision: convolutional layers, 0 at the input"
    )
    hidden_size: Positive = Field(128, description="width D of the residual stream; vision: channels")
    num_heads: Positive = Field(4, description="query heads")
    n_kv_heads: Positive | None = Field(None, description="key/value heads; null = num_heads, fewer = grouped-query")
    head_size: Positive | None = Field(None, description="width h of a head; null = hidden_size / num_heads")
    qk_norm: Literal["head", "full"] | None = Field(
        None, description="RMSNorm of queries and keys before they rotate: of each head, or over all heads together"
    )
    attention_bias: Literal["qkv", "all"] | None = Field(
        None, description="biases of the projections to queries, keys and values; all: of the output projection too"
    )
    intermediate_size: Positive | None = Field(None, description="hidden width F of a dense feed-forward; null = 4 D")
    seq_length: Positive = Field(64, description="tokens S of a training sequence; seq2seq: of the encoder's input")
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="pre-norm before attention and feed-forward")
    norm_eps: Annotated[float, Field(gt=0)] = Field(1e-5, description="added to the variance")
    position: Literal["rotary", "learned"] = Field("rotary", description="position encoding of the tokens")
    theta: Annotated[float, Field(gt=0)] = Field(10000.0, description="base of the rotary frequencies")
    partial_rotary: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of a head, its first columns, that rotates"
    )
    rotary_scaling: RotaryScaling | None = Field(
        None, description="changes the rotary frequencies for longer text; null, or a mapping of the keys below"
    )
    sliding_window: Positive | None = Field(
        None, description="tokens that a position sees, itself and those just before it; null = all before it"
    )
    window_layers: Literal["all"] | list[NotNegative] = Field(
        "all", description="layers whose attention has model.sliding_window: all, or a list from 0"
    )
    activation: Literal["relu", "gelu", "swiglu"] = Field("relu", description="feed-forward non-linearity")
    tie_word_embeddings: bool = Field(True, description="the output head is the embedding table")
    dropout: Fraction = Field(0.0, description="probability, on the embedding and on each residual branch")
    init_method_std: Annotated[float, Field(gt=0)] = Field(0.02, description="standard deviation of initial weights")
    compute_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="type of matrix multiplications; parameters, router and loss stay float32"
    )

    @property
    def kv_heads(self) -> int:
        """Returns the number of key/value heads J."""
        return self.n_kv_heads or self.num_heads

    @property
    def size_of_head(self) -> int:
        """Returns the width h of a head."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def rotary_size(self) -> int:
        """Returns the columns of a head that rotate."""
        return int(self.size_of_head * self.partial_rotary)

    def window_of(self, layer: int) -> int | None:
        """Returns the tokens that a position of a layer, from 0, sees; None = all before it."""
        return self.sliding_window if self.window_layers == "all" or layer in self.window_layers else None


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
        "all",
        description="conditional layers: all, every n-th, or a list from 0; seq2seq: n-th of each stack; in a list the "
        "decoder's follow",
    )
    moe_intermediate_size: Positive | None = Field(
        None, description="hidden width F of one expert; null = the dense width"
    )
    shared_expert_num: NotNegative = Field(0, description="shared experts, which process every row")
    shared_intermediate_size: Positive | None = Field(
        None, description="hidden width of all shared experts together; null = shared_expert_num x the expert width"
    )
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
    expert_dropout: Fraction | None = Field(
        None, description="probability, on what the experts of a layer add to a token; null = model.dropout"
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
        description="text file, folder, glob, token shards or MindRecord, folder of IDX images; null = "
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
    mixture: list[CorpusConfig] = Field(
        [],
        description="corpora to train on in place of data.path: [{path: FOLDER, weight: 3, epochs: 2}, ...]",
    )
    document_mask: bool = Field(
        False, description="attention and loss stay within a document; false = a sequence is one text"
    )
    loss_mask: bool = Field(
        False, description="instruction data: learn and score the answers alone; false = all tokens of them"
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="a missing or truncated token shard: end the run, or leave the shard out and say so"
    )
    batch_size: Positive = Field(12, description="sequences or images of a micro-batch, over all devices together")
    accept_changed: bool = Field(
        False, description="--resume: continues although data.path holds other data than the run was trained on"
    )


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
    checkpoint_every: NotNegative = Field(
        500, description="steps between checkpoints; 0 = only at the end and at train.save_best"
    )
    keep_checkpoints: Positive = Field(2, description="newest checkpoints kept, besides the best")
    save_best: bool = Field(
        True,
        description="save a checkpoint at each evaluation during training whose loss is the lowest so far, and keep it",
    )
    checkpoint_wait_seconds: Weight = Field(
        3600.0, description="several devices: seconds that a checkpoint waits for the shards of all ranks"
    )
    keep_every_steps: NotNegative = Field(0, description="checkpoints at multiples of it are kept for good; 0 = none")
    keep_every_hours: Annotated[float, Field(ge=0)] = Field(
        0.0, description="one checkpoint in so many hours is kept for good; 0 = none"
    )
    async_checkpoint: bool = Field(False, description="write checkpoints in the background, from a copy in host memory")
    on_save_error: Literal["stop", "continue"] = Field(
        "stop", description="when a disk refuses a checkpoint: end the run, or warn and try again at the next one"
    )
    on_bad_loss: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="at a loss that is NaN or a spike: end, skip the batch, or go back to the last checkpoint",
    )
    max_bad_losses: Positive = Field(10, description="bad losses that a run goes on after; the next one ends it")
    spike_factor: Annotated[float, Field(gt=1)] | None = Field(
        None,
        description="a loss above so many times the median of the last losses is bad; null = NaN and infinity only",
    )
    spike_window: Positive = Field(50, description="good losses that the median of spike_factor is taken of")
    stall_seconds: Annotated[float, Field(ge=0)] = Field(
        0.0, description="seconds without a step after which the job ends with the stacks of its ranks; 0 = never"
    )
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak of a device's matrix products in 10^12 FLOP/s, for the metric mfu; null = measured"
    )
    init_loss_scale: Annotated[float, Field(gt=0)] = Field(65536.0, description="float16: first dynamic loss scale")
    lora: LoraConfig | None = Field(
        None,
        description="low-rank adapters, which alone are trained: {rank: 8, alpha: 16, targets: [...]}; null = none",
    )
    distill: DistillConfig | None = Field(
        None,
        description="teacher whose outputs are targets: {teacher: RUN, soft_weight: 0.25, temperature: 1}; null = none",
    )
    freeze: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="parameters that are not trained: patterns of their names, such as embedding.* or *.router.weight",
    )
    replica_check_every: NotNegative = Field(
        100, description="steps between checks that replicated tensors are bit-equal on all devices; 0 = never"
    )


class Config(Section):
    """Holds the full configuration of a run."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    seq2seq: Seq2SeqConfig = Seq2SeqConfig()
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
        stacks = (count, self.decoder_layers) if self.model.type == "seq2seq" else (count,)
        one_expert = self.moe.expert_num == 1 and self.moe.router != "mixture_of_depths"
        if one_expert or self.model.type == "cascade":
            return ()
        if isinstance(which, list):
            return tuple(sorted(set(which)))
        step = 1 if which == "all" else which
        first = [sum(stacks[:place]) for place in range(len(stacks))]  # layer of each stack
        return tuple(start + layer for start, size in zip(first, stacks) for layer in range(step - 1, size, step))

    @property
    def decoder_layers(self) -> int:
        """Returns the layers of an encoder-decoder's decoder."""
        return self.seq2seq.num_decoder_layers or self.model.num_layers

    @property
    def all_layers(self) -> int:
        """Returns the layers of all stacks."""
        return self.model.num_layers + (self.decoder_layers if self.model.type == "seq2seq" else 0)

    @property
    def stacks(self) -> tuple["Config", ...]:
        """Returns a configuration for each stack of layers: of an encoder-decoder two, of which each is that of a
        decoder with the stack's length and conditional layers; else this one."""
        if self.model.type != "seq2seq":
            return (self,)
        encoder, sizes = self.model.num_layers, (self.model.num_layers, self.decoder_layers)
        places = [[layer for layer in self.moe_layers if layer < encoder]]
        places.append([layer - encoder for layer in self.moe_layers if layer >= encoder])
        found = []
        for count, length, layers in zip(sizes, (self.model.seq_length, self.target_length), places):
            model = self.model.model_copy(update={"type": "decoder", "num_layers": count, "seq_length": length})
            moe = self.moe.model_copy(update={"layers": layers})
            found.append(self.model_copy(update={"model": model, "moe": moe}))
        return tuple(found)

    @property
    def ignores_labels(self) -> bool:
        """Returns whether some tokens of a text are read and not predicted."""
        return self.data.document_mask or self.data.loss_mask

    @property
    def reads_text(self) -> bool:
        """Returns whether the network reads text; the others read images."""
        return self.model.type in TEXT_MODELS

    @property
    def target_length(self) -> int:
        """Returns the predictions T of a sequence of text: of an encoder-decoder those of a corrupted window."""
        length = self.model.seq_length
        return self.seq2seq.corrupted(self.window)[1] if self.model.type == "seq2seq" else length

    @property
    def window(self) -> int:
        """Returns the tokens of the piece of text that a sequence is made of."""
        length = self.model.seq_length
        return self.seq2seq.window(length) if self.model.type == "seq2seq" else length + 1

    @property
    def token_length(self) -> int:
        """Returns the tokens of a sequence that a network reads: those of an encoder and of its decoder together."""
        return self.model.seq_length + (self.target_length if self.model.type == "seq2seq" else 0)

    @property
    def dense_width(self) -> int:
        """Returns the hidden width F of a dense feed-forward."""
        return self.model.intermediate_size or 4 * self.model.hidden_size

    @property
    def expert_width(self) -> int:
        """Returns the hidden width F of one expert."""
        return self.moe.moe_intermediate_size or self.dense_width

    def dropout_of(self, conditional: bool) -> float:
        """Returns the probability of dropout on what a feed-forward adds."""
        own = self.moe.expert_dropout if conditional else None
        return self.model.dropout if own is None else own

    @property
    def shared_width(self) -> int:
        """Returns the hidden width of all shared experts together; 0 where there are none."""
        width = self.moe.shared_intermediate_size or self.expert_width * self.moe.shared_expert_num
        return width if self.moe.shared_expert_num else 0

    @property
    def groups(self) -> int:
        """Groups G that route for themselves."""
        return self.moe.groups or self.parallel.data_parallel

    @property
    def granularity(self) -> str:
        """Returns what is routed as one row."""
        return self.moe.granularity or ("token" if self.reads_text else "sample")

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
        each = self.token_length if self.reads_text else self.units
        return self.data.batch_size * each

    @property
    def micro_batches(self) -> int:
        """Returns the micro-batches of a step: those one after the other, times those in a pipeline at a time."""
        parallel, each = self.parallel, self.train.gradient_accumulation_steps
        return each * parallel.micro_batch_num if parallel.pipeline_stage > 1 else each

    @property
    def predictions(self) -> int:
        """Returns the predictions of a micro-batch: tokens, or images."""
        return self.data.batch_size * (self.target_length if self.reads_text else 1)

    @property
    def unit(self) -> str:
        """Returns what is predicted, in logs."""
        return "tokens" if self.reads_text else "images"

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
        first, _, inner = name.partition(".")
        value = getattr(getattr(self, section), first)
        return getattr(value, inner) if inner else value

    def to_yaml(self) -> str:
        """Returns all keys with their values as YAML, in the order of the sections."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, width=100)
