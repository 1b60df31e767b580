"""Defines the base class of sections, and the sections of image networks, optimizer, parallelism, device and export."""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from switchyard.errors import UserError

LARGEST = 2**31 - 1  # what MindSpore's int32 holds


def _fits(number: int) -> int:
    if number > LARGEST:
        raise ValueError(f"input should be at most {LARGEST}")
    return number


Positive = Annotated[int, Field(ge=1), AfterValidator(_fits)]
NotNegative = Annotated[int, Field(ge=0), AfterValidator(_fits)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
SpeedUp = Literal[  # keys of MindSpore's parallel_speed_up.json
    "recomputation_communication_overlap",
    "grad_matmul_communication_overlap",
    "grad_fa_allgather_overlap",
    "enable_communication_fusion",
    "grad_computation_allreduce_overlap",
    "computation_allgather_overlap",
    "computation_communication_fusion_level",
    "dataset_broadcast_opt_level",
    "allreduce_and_biasadd_swap",
    "enable_allreduce_slice_to_reducescatter",
    "enable_interleave_split_concat_branch",
    "enable_interleave_parallel_branch",
]


class Section(BaseModel):
    """Holds one section of the configuration. A section refuses unknown keys, and its values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses `true` where a number is expected."""
        if isinstance(value, bool) and bool not in _kinds(cls.model_fields[info.field_name].annotation):
            raise ValueError("input should not be true or false")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("input should hold no NUL character")  # no file name and no C string can
        return value


def messages(problems: list[dict[str, Any]], path: tuple) -> str:
    """Returns what pydantic's problems at `path`, or inside, say is allowed."""
    here = [one["msg"].removeprefix("Value error, ") for one in problems if one["loc"][: len(path)] == tuple(path)]
    return " or ".join(dict.fromkeys(text[0].lower() + text[1:] for text in here))


def _kinds(annotation: Any) -> tuple:
    """Returns the types of a union, or the type itself."""
    return get_args(annotation) or (annotation,)


def subsections(annotation: Any) -> dict[str, type[Section]]:
    """Returns type -> class of the sub-sections that a key with this annotation may hold, such as those of
    model.rotary_scaling; "" is the type of those of one kind, such as train.lora."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        kind = annotation.model_fields.get("type")
        return {_kinds(kind.annotation)[0] if kind else "": annotation}
    return {name: kind for part in get_args(annotation) for name, kind in subsections(part).items()}


class VisionConfig(Section):
    """Describes images and the tasks on them."""

    image_size: Positive = Field(8, description="height and width of an image")
    channels: Positive = Field(1, description="channels of an image")
    classes: Annotated[int, Field(ge=2), AfterValidator(_fits)] = Field(10, description="classes of the labels")
    tasks: Annotated[list[Literal["identity", "parity", "half"]], Field(min_length=1)] = Field(
        ["identity"], description="one head per task: the class, whether it is odd, whether it is in the upper half"
    )
    pool: Positive = Field(1, description="side of the squares that are averaged after layer 0")
    regions: Positive = Field(2, description="region: parts of each side; 2 = quadrants")
    channel_groups: Positive = Field(4, description="channel: groups that the channels are split into")

    @property
    def task_classes(self) -> tuple[int, ...]:
        """Returns the number of classes of each task."""
        return tuple(self.classes if task == "identity" else 2 for task in self.tasks)


class CascadeConfig(Section):
    """Stages of growing cost; a sample leaves at the first that is sure."""

    stages: Annotated[list[Positive], Field(min_length=1)] = Field(
        [4, 16, 48], description="channels of each stage; a stage continues from the features of the previous stage"
    )
    threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="evaluation: a sample leaves where its most probable class has at least this probability"
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


class LoraConfig(Section):
    """Describes low-rank adapters, which alone are trained (LoRA, arXiv 2106.09685)."""

    rank: Positive = Field(8, description="width r of the product A B that is added to a weight")
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="the product is multiplied by alpha / rank")
    targets: Annotated[list[Literal["attention.qkv", "attention.out", "experts", "router"]], Field(min_length=1)] = (
        Field(
            ["attention.qkv", "attention.out", "experts"],
            description="what gets adapters; experts: every feed-forward; router: trained in full, without an adapter",
        )
    )


class DistillConfig(Section):
    """Describes training by the outputs of a teacher (arXiv 1503.02531; of experts: arXiv 2101.03961, section 4.2)."""

    teacher: str = Field(description="run folder or checkpoint of the teacher")
    soft_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.25, description="weight of the teacher's probabilities; 1 minus it is that of the next token"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="divides both logits of the soft loss, which is multiplied by its square"
    )


class CorpusConfig(Section):
    """Describes one corpus of a mixture."""

    path: str = Field(description="folder of token shards, of python -m switchyard.data.prepare")
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="share of the windows, in any unit; null = as many windows as `epochs` of the corpus have"
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="how often training may read the corpus; a run that would read more is refused; null = any"
    )


class ParallelConfig(Section):
    """Describes how the model is sharded over devices."""

    data_parallel: Positive | None = Field(
        None, description="slices of the batch; null = all devices that the other degrees leave"
    )
    expert_parallel: Positive = Field(1, description="slices of the experts; divides data_parallel")
    model_parallel: Positive = Field(1, description="slices of heads and hidden width (tensor parallel)")
    pipeline_stage: Positive = Field(1, description="stages of layers")
    micro_batch_num: Positive = Field(1, description="micro-batches of a pipeline")
    optimizer_shard: Literal[0, 1, 3] = Field(0, description="ZeRO level; on several GPUs the default is 1")
    sequence_parallel: bool = Field(False, description="shards norms and dropout along the sequence")
    recompute: bool = Field(False, description="recomputes activations in the backward pass")
    comm_fusion: dict[Literal["allreduce", "allgather", "reducescatter"], Literal["auto"] | Positive] = Field(
        {},
        description="Ascend, GPU: fuses collectives of one kind up to this size in MB; "
        "auto = 64; {} = MindSpore's default",
    )
    transformer_opt: dict[SpeedUp, bool | NotNegative | str] = Field(
        {},
        description="Ascend: switches of MindSpore's transformer_opt, which overlap and fuse collectives",
    )

    @model_validator(mode="after")
    def _with_data_parallel(self, info: ValidationInfo) -> "ParallelConfig":
        """Replaces null by a number, so that every `ParallelConfig` holds one.

        The context names the `devices`. Where it does not, the number is the smallest that the other degrees allow.
        """
        if self.data_parallel is None:
            devices = (info.context or {}).get("devices")
            data = self.expert_parallel if devices is None else self._left_of(devices)
            self.__dict__["data_parallel"] = data  # the section is frozen; `model_fields_set` stays what was written
        return self

    def _left_of(self, devices: int) -> int:
        """Returns the slices of the batch that use all devices (UserError: the other degrees do not divide them)."""
        tensor, stages = self.model_parallel, self.pipeline_stage
        if devices % (tensor * stages):
            key, value = ("model_parallel", tensor) if tensor > 1 else ("pipeline_stage", stages)
            product = f"model_parallel * pipeline_stage ({tensor} * {stages})"
            raise UserError(f"parallel.{key}: {value}; {product} must divide the number of devices ({devices})")
        return max(1, devices // (tensor * stages))


class ContextConfig(Section):
    """Describes the device and the execution mode."""

    device_target: Literal["auto", "Ascend", "GPU", "CPU"] = Field("auto", description="auto = Ascend, then GPU, CPU")
    device_id: NotNegative | None = Field(None, description="which device of this host; null = MindSpore's choice")
    fused_operators: bool = Field(
        True,
        description="operators and gradients that are fast on the device, see nn/fused.py; false = plain ones",
    )
    mode: Literal["graph", "pynative"] = Field("graph", description="graph compiles; pynative is for debugging")
    compile_cache: str | None = Field(
        None,
        description="one device: folder for the compiled training step; the next run of the same configuration "
        "and code starts in seconds; null = no cache",
    )
    launch_blocking: bool | None = Field(
        None,
        description="several GPUs: synchronous kernel launches; null = only where AllReduce could race with kernels",
    )


class ExportConfig(Section):
    """Describes the exported directory."""

    max_length: Positive | None = Field(None, description="longest prompt plus answer; null = model.seq_length")
    key_file: str | None = Field(None, description="file with 16, 24 or 32 bytes: encrypts the MindIR with AES-GCM")
