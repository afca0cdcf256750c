"""The typed settings behind every recipe, and their cross-checks.

A recipe is YAML under ``recipes/``; ``keye_train.compose`` turns it, with the overrides of the command line, into
the dataclasses below. Unknown keys and wrong types are refused there; pairs of values that cannot work together are
refused here, in ``check``. No other module reads YAML, and this one imports nothing heavy.

Units stand in the names: ``_tokens`` are tokens of the language model (one token = 2 x 2 patches = 28 x 28 pixels),
``_patches`` are patches of the vision tower (14 x 14 pixels), ``_steps`` are optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePath

MODULES = ("vision", "projector", "language", "text_tower")


class SettingsError(ValueError):
    """A setting that cannot work; the message names the setting and the way to mend it."""


class Objective(str, Enum):
    """What a stage minimises."""

    language = "language"  # next-token cross entropy on assistant turns
    contrastive = "contrastive"  # SigLIP loss between the vision tower and a text tower (Stage 0)


class ScheduleShape(str, Enum):
    """Shape of the learning rate after the linear warm-up."""

    cosine = "cosine"
    wsd = "wsd"  # warm-up, stable, decay (linear over the last ``decay_steps``)
    constant = "constant"


class Precision(str, Enum):
    """Arithmetic of forward and backward."""

    fp32 = "fp32"
    bf16 = "bf16"  # bf16 weights, fp32 master weights in the ZeRO optimizer
    bf16_autocast = "bf16_autocast"  # fp32 weights, bf16 matrix products


class MergeMethod(str, Enum):
    """How checkpoints are averaged."""

    uniform = "uniform"
    weighted = "weighted"


@dataclass
class VisionTowerSettings:
    """Shape of the SigLIP vision tower."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384
    """Side in pixels of the square image that the learned position table belongs to: (384 // 14)^2 = 729 places."""


@dataclass
class LanguageModelSettings:
    """Shape of the Qwen3 language model."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 40960
    rope_theta: float = 1_000_000.0
    mrope_section: list[int] = field(default_factory=lambda: [16, 24, 24])
    """Rotary frequencies given to time, height and width; they sum to head_dim / 2."""
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02


@dataclass
class SpecialTokenSettings:
    """Ids of the special tokens; they are checked against the tokenizer when it is loaded."""

    bos: int = 151643
    eos: int = 151645
    pad: int = 151643
    vision_start: int = 151652
    vision_end: int = 151653
    vision_pad: int = 151654
    image_pad: int = 151655
    video_pad: int = 151656


@dataclass
class TextTowerSettings:
    """Shape of the SigLIP text tower, which only Stage 0 uses."""

    vocab_size: int = 32000
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    max_tokens: int = 64
    tokenizer: str | None = None
    """Folder of the text tower's tokenizer; null: the tokenizer of the language model."""


@dataclass
class StartWeightsSettings:
    """Where the first weights come from when a stage has no parent."""

    siglip: str | None = None
    """Folder in the layout of google/siglip-so400m-patch14-384."""
    qwen3: str | None = None
    """Folder in the layout of Qwen/Qwen3-8B."""
    random: bool = False
    """Allow random weights for every part that has no source. Only toy models learn from nothing."""


@dataclass
class ModelSettings:
    """The model: its shape, its tokenizer and its first weights."""

    name: str
    tokenizer: str
    """Folder with tokenizer.json and tokenizer_config.json."""
    vision: VisionTowerSettings = field(default_factory=VisionTowerSettings)
    language: LanguageModelSettings = field(default_factory=LanguageModelSettings)
    special_tokens: SpecialTokenSettings = field(default_factory=SpecialTokenSettings)
    text_tower: TextTowerSettings = field(default_factory=TextTowerSettings)
    start: StartWeightsSettings = field(default_factory=StartWeightsSettings)


@dataclass
class ResolutionSettings:
    """How many tokens an image or a video may take. The size of any media follows from these without decoding it."""

    image_min_tokens: int = 4
    image_max_tokens: int = 16384
    video_frame_min_tokens: int = 128
    video_frame_max_tokens: int = 768
    video_max_tokens: int = 24576
    video_fps: float = 2.0
    video_min_frames: int = 4
    video_max_frames: int = 768


@dataclass
class SourceSettings:
    """One named set of shards."""

    shards: list[str]
    """Paths or glob patterns of WebDataset .tar files; each has its index beside it (``keye-data index``)."""


@dataclass
class DataSettings:
    """Sources, how they are mixed, and how they are read."""

    name: str
    root: str
    """Folder of the data; the paths below are written as ``${data.root}/...``, so one override moves them all."""
    sources: dict[str, SourceSettings]
    mixtures: dict[str, dict[str, float]]
    """Name of a mixture -> source -> weight. Weights are shares of the samples drawn; they need not sum to 1."""
    heldout: dict[str, SourceSettings] = field(default_factory=dict)
    """Task -> shards that no stage trains on; ``keye-eval`` generates on them."""
    heldout_pairs: SourceSettings | None = None
    """Image-caption pairs for the retrieval score of Stage 0."""
    resolution: ResolutionSettings = field(default_factory=ResolutionSettings)
    window_samples: int = 65536
    """Samples drawn, as metadata only, before they are packed together."""
    workers: int = 2
    """Reader processes for each rank; 0 reads in the training process."""
    prefetch_steps: int = 2
    """Steps that the readers work ahead."""
    max_skipped_fraction: float = 0.05
    """The run stops when more than this share of the samples, over all ranks, could not be read."""


@dataclass
class ModuleRateSettings:
    """Learning rates of single modules; null takes ``optimizer.lr``."""

    vision: float | None = None
    projector: float | None = None
    language: float | None = None
    text_tower: float | None = None


@dataclass
class OptimizerSettings:
    """AdamW and its parameter groups."""

    lr: float = 1e-5
    module_lr: ModuleRateSettings = field(default_factory=ModuleRateSettings)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.05
    """Applied to matrices only: never to norms, biases and one-dimensional parameters."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def rate(self, module: str) -> float:
        """Learning rate of ``module`` before the schedule."""
        own = getattr(self.module_lr, module)
        return self.lr if own is None else own


@dataclass
class ScheduleSettings:
    """Learning rate over the steps, as a factor of each group's own rate."""

    shape: ScheduleShape = ScheduleShape.cosine
    warmup_steps: int = 0
    decay_steps: int = 0
    """Length of the decay at the end; wsd only."""
    final_fraction: float = 0.1
    """Factor at the last step."""


@dataclass
class StageSettings:
    """One stage of training."""

    name: str
    objective: Objective
    trainable: list[str]
    """Modules that train (vision, projector, language, text_tower); everything else is frozen."""
    mixture: str
    """Name of a mixture of the data recipe."""
    steps: int
    max_tokens: int
    """Budget of language tokens (Stage 0: caption tokens) of a pack."""
    max_patches: int
    """Budget of vision patches of a pack."""
    global_batch_packs: int
    """Packs of one optimizer step over all ranks; accumulation = global_batch_packs / world size."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    activation_checkpointing: bool = False


@dataclass
class DeepSpeedSettings:
    """How the training state is spread over the ranks."""

    zero_stage: int = 3
    precision: Precision = Precision.bf16
    offload_optimizer: bool = False
    offload_parameters: bool = False
    overlap_comm: bool = True
    bucket_elements: int = 500_000_000
    """Size of the reduce and all-gather buckets."""
    param_persistence_threshold: int = 100_000
    """ZeRO-3: parameters smaller than this stay whole on every rank."""
    timeout_minutes: float = 30.0
    """Deadline of a collective."""


@dataclass
class LoggingSettings:
    """Where the numbers of each step go. metrics.jsonl is always written."""

    every_steps: int = 1
    progress: bool = True
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "keye_train"


@dataclass
class CheckpointSettings:
    """When the state of the training is saved."""

    every_steps: int = 500
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted once a newer one is whole."""


@dataclass
class TrainSettings:
    """One run of ``keye-train``: one stage of one model on one data recipe."""

    stage: StageSettings
    model: ModelSettings
    data: DataSettings
    deepspeed: DeepSpeedSettings
    logging: LoggingSettings
    run_dir: str
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    parent: str | None = None
    """Run folder or export of the stage before; null: first weights from ``model.start``."""
    seed: int = 0

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        _check_model(self.model)
        _check_data(self.data)
        _check_stage(self.stage, self.data)
        if self.deepspeed.zero_stage not in (0, 1, 2, 3):
            raise SettingsError(f"deepspeed.zero_stage={self.deepspeed.zero_stage}: use 0, 1, 2 or 3")
        if self.deepspeed.zero_stage == 0 and self.deepspeed.precision == Precision.bf16:
            raise SettingsError(
                "deepspeed.zero_stage=0 keeps no fp32 master weights, so deepspeed.precision=bf16 would lose small "
                "updates: use deepspeed.precision=bf16_autocast, or deepspeed=zero1"
            )
        if self.deepspeed.offload_parameters and self.deepspeed.zero_stage != 3:
            raise SettingsError("deepspeed.offload_parameters=true needs deepspeed.zero_stage=3")
        if self.deepspeed.offload_optimizer and self.deepspeed.zero_stage == 0:
            raise SettingsError("deepspeed.offload_optimizer=true needs deepspeed.zero_stage=1, 2 or 3")
        if self.checkpoint.every_steps < 1 or self.checkpoint.keep < 1:
            raise SettingsError("checkpoint.every_steps and checkpoint.keep must be at least 1")
        if self.logging.every_steps < 1:
            raise SettingsError("logging.every_steps must be at least 1")
        if self.parent is None and not self.model.start.random:
            _check_start_weights(self)

    def gradient_accumulation(self, world_size: int) -> int:
        """Micro-steps of one optimizer step on ``world_size`` ranks.

        Raises:
            SettingsError: the global batch cannot be divided evenly over the ranks.
        """
        packs = self.stage.global_batch_packs
        if packs % world_size:
            raise SettingsError(
                f"stage.global_batch_packs={packs} does not divide over {world_size} ranks: set it to a multiple of "
                f"{world_size} or launch a number of ranks that divides {packs}"
            )
        return packs // world_size


@dataclass
class MergeSettings:
    """One run of ``keye-merge``."""

    models: list[str]
    """Exports (folders with config.json and safetensors) to average."""
    out: str
    method: MergeMethod = MergeMethod.uniform
    weights: list[float] | None = None
    """method=weighted: one weight for each model; they are normalised to sum to 1."""
    dtype: str | None = None
    """Data type of the result (float32, bfloat16, float16); null: that of the first model."""
    max_shard_bytes: int = 5_000_000_000

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        if len(self.models) < 2:
            raise SettingsError(f"models={self.models}: name at least two checkpoints to average")
        if self.method == MergeMethod.weighted:
            if self.weights is None or len(self.weights) != len(self.models):
                raise SettingsError(
                    f"method=weighted needs one weight for each of the {len(self.models)} models: set weights=[...]"
                )
            if not all(weight >= 0 for weight in self.weights) or sum(self.weights) <= 0:
                raise SettingsError(f"weights={self.weights}: use numbers >= 0 with a positive sum")
        elif self.weights is not None:
            raise SettingsError("weights has no effect with method=uniform: drop it or set method=weighted")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise SettingsError(f"dtype={self.dtype}: use float32, bfloat16, float16 or null")


@dataclass
class EvaluationSettings:
    """One run of ``keye-eval``."""

    models: list[str]
    """Run folders or exports; each is named after its folder."""
    data: DataSettings
    out: str
    samples_per_task: int = 100
    batch_size: int = 32
    max_new_tokens: int = 48
    seed: int = 0

    def named_models(self) -> dict[str, str]:
        """Name in the tables -> run folder or export.

        Raises:
            SettingsError: two models would share a name.
        """
        named: dict[str, str] = {}
        for model in self.models:
            folder = PurePath(model)
            name = folder.parent.name if folder.name == "export" else folder.name
            if name in named:
                raise SettingsError(f"models: {named[name]} and {model} share the name '{name}'; rename a folder")
            named[name] = model
        return named

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        _check_data(self.data)
        if not self.models:
            raise SettingsError("models is empty: name at least one, e.g. models=[runs/demo/merge]")
        self.named_models()
        for name in ("samples_per_task", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1")


@dataclass
class PipelineStageSettings:
    """One entry of the chain: one run, or one for each of its branches."""

    stage: str
    """Recipe of the group ``stage``."""
    parent: str | None = None
    """Name of an earlier run whose export this one starts from."""
    overrides: list[str] = field(default_factory=list)
    mixtures: list[str] = field(default_factory=list)
    """Branches: one run for each of these mixtures, all from the same parent, named NAME_MIXTURE."""
    enabled: bool = True


@dataclass(frozen=True)
class PipelineRun:
    """One run of the chain, branches written out."""

    name: str  # folder below the pipeline's ``out``
    stage: str
    parent: str | None
    overrides: tuple[str, ...]


@dataclass
class PipelineEvaluationSettings:
    """What the pipeline passes on to the evaluation."""

    samples_per_task: int = 100
    batch_size: int = 32
    max_new_tokens: int = 48
    seed: int = 0


@dataclass
class PipelineSettings:
    """The chain stage 0 -> 1 -> 2 -> 3 x K -> merge -> evaluate -> report."""

    name: str
    out: str
    model: str
    """Recipe of the group ``model``."""
    data: str
    """Recipe of the group ``data``."""
    stages: dict[str, PipelineStageSettings]
    """Name -> entry, in the order in which they run."""
    merged: list[str]
    """Entries whose exports are averaged; one with branches stands for all of them. Empty: no merge."""
    merge_recipe: str = "uniform"
    prepare: list[str] = field(default_factory=list)
    """Command that makes the data; it is called each time and returns at once when nothing is missing."""
    launcher: list[str] = field(default_factory=list)
    """Words put before ``-m keye_train``, e.g. [torchrun, --nproc-per-node, "8"]; empty: one process."""
    overrides: list[str] = field(default_factory=list)
    """Overrides that every stage gets."""
    merge_overrides: list[str] = field(default_factory=list)
    """Overrides that the merge gets, e.g. ``weights=[0.5,0.3,0.2]`` with merge_recipe=weighted."""
    evaluation: PipelineEvaluationSettings = field(default_factory=PipelineEvaluationSettings)

    def runs(self) -> list[PipelineRun]:
        """Every run in order, with branches written out."""
        return [run for name in self.stages for run in self._runs_of(name)]

    def merged_runs(self) -> list[str]:
        """Names of the runs that are averaged."""
        return [run.name for name in self.merged for run in self._runs_of(name)]

    def _runs_of(self, name: str) -> list[PipelineRun]:
        entry = self.stages[name]
        if not entry.enabled:
            return []
        if not entry.mixtures:
            return [PipelineRun(name, entry.stage, entry.parent, tuple(entry.overrides))]
        return [
            PipelineRun(f"{name}_{mixture}", entry.stage, entry.parent, (*entry.overrides, f"stage.mixture={mixture}"))
            for mixture in entry.mixtures
        ]

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        for name in self.merged:
            if name not in self.stages:
                raise SettingsError(f"merged: '{name}' is not an entry of stages; entries: {list(self.stages)}")
        if len(self.merged_runs()) == 1:
            raise SettingsError(f"merged={self.merged}: name at least two runs to average, or none")
        names: list[str] = []
        for run in self.runs():
            if run.name in names:
                raise SettingsError(f"stages: two runs share the name {run.name}")
            if run.parent is not None and run.parent not in names:
                raise SettingsError(
                    f"stages.{run.name} starts from parent={run.parent}, which is not an earlier run; earlier: {names}"
                )
            names.append(run.name)
        if not names:
            raise SettingsError("stages: every entry is disabled")


def _check_model(model: ModelSettings) -> None:
    language, vision, text = model.language, model.vision, model.text_tower
    if sum(language.mrope_section) * 2 != language.head_dim:
        raise SettingsError(
            f"model.language.mrope_section={language.mrope_section} must sum to head_dim / 2 = {language.head_dim // 2}"
        )
    if language.num_attention_heads % language.num_key_value_heads:
        raise SettingsError(
            f"model.language.num_attention_heads={language.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={language.num_key_value_heads}"
        )
    if vision.hidden_size % (vision.num_attention_heads * 4):
        raise SettingsError(
            f"model.vision.hidden_size={vision.hidden_size} must be a multiple of 4 x num_attention_heads="
            f"{vision.num_attention_heads * 4}: 2D RoPE splits each head into row and column pairs"
        )
    if text.hidden_size % text.num_attention_heads:
        raise SettingsError(
            f"model.text_tower.hidden_size={text.hidden_size} must be a multiple of num_attention_heads="
            f"{text.num_attention_heads}"
        )
    for name, token_id in vars(model.special_tokens).items():
        if not 0 <= token_id < language.vocab_size:
            raise SettingsError(
                f"model.special_tokens.{name}={token_id} is outside model.language.vocab_size={language.vocab_size}"
            )


def _check_data(data: DataSettings) -> None:
    for mixture, weights in data.mixtures.items():
        for source, weight in weights.items():
            if source not in data.sources:
                raise SettingsError(
                    f"data.mixtures.{mixture} names the source '{source}', which data.sources does not have; "
                    f"sources: {sorted(data.sources)}"
                )
            if weight < 0:
                raise SettingsError(f"data.mixtures.{mixture}.{source}={weight}: weights are >= 0")
        if not any(weight > 0 for weight in weights.values()):
            raise SettingsError(f"data.mixtures.{mixture} has no source with a weight above 0")
    resolution = data.resolution
    pairs = (
        ("image_min_tokens", "image_max_tokens"),
        ("video_frame_min_tokens", "video_frame_max_tokens"),
        ("video_frame_min_tokens", "video_max_tokens"),
        ("video_min_frames", "video_max_frames"),
    )
    for low, high in pairs:
        if not 0 < getattr(resolution, low) <= getattr(resolution, high):
            raise SettingsError(f"data.resolution.{low} must be above 0 and at most data.resolution.{high}")
    if resolution.video_fps <= 0:
        raise SettingsError("data.resolution.video_fps must be above 0")
    if data.window_samples < 1 or data.prefetch_steps < 1 or data.workers < 0:
        raise SettingsError("data.window_samples and data.prefetch_steps are at least 1, data.workers at least 0")


def _check_stage(stage: StageSettings, data: DataSettings) -> None:
    if not stage.trainable:
        raise SettingsError(f"stage.trainable is empty: name at least one of {MODULES}")
    for name in stage.trainable:
        if name not in MODULES:
            raise SettingsError(f"stage: unknown module '{name}'; modules: {MODULES}")
    for name, rate in vars(stage.optimizer.module_lr).items():
        if rate is not None and name not in stage.trainable:
            raise SettingsError(f"stage.optimizer.module_lr.{name} has no effect: '{name}' is not in stage.trainable")
    allowed = ("vision", "text_tower") if stage.objective == Objective.contrastive else MODULES[:3]
    for name in stage.trainable:
        if name not in allowed:
            raise SettingsError(
                f"stage.trainable has '{name}', which objective={stage.objective.value} does not use: "
                f"choose from {allowed}"
            )
    if stage.mixture not in data.mixtures:
        raise SettingsError(
            f"stage.mixture={stage.mixture} is not a mixture of data={data.name}; mixtures: {sorted(data.mixtures)}"
        )
    if min(stage.steps, stage.max_tokens, stage.global_batch_packs) < 1 or stage.max_patches < 4:
        raise SettingsError("stage.steps, max_tokens, global_batch_packs are at least 1 and max_patches at least 4")
    if stage.schedule.warmup_steps + stage.schedule.decay_steps > stage.steps:
        raise SettingsError(
            f"stage.schedule: warmup_steps={stage.schedule.warmup_steps} + decay_steps={stage.schedule.decay_steps} "
            f"exceed stage.steps={stage.steps}"
        )
    if stage.schedule.shape == ScheduleShape.wsd and stage.schedule.decay_steps < 1:
        raise SettingsError("stage.schedule.shape=wsd needs stage.schedule.decay_steps >= 1")
    if stage.schedule.shape != ScheduleShape.wsd and stage.schedule.decay_steps:
        raise SettingsError("stage.schedule.decay_steps has an effect with stage.schedule.shape=wsd only")
    if len(stage.optimizer.betas) != 2:
        raise SettingsError("stage.optimizer.betas has two numbers")


def _check_start_weights(settings: TrainSettings) -> None:
    start = settings.model.start
    needed = ["siglip"] if settings.stage.objective == Objective.contrastive else ["siglip", "qwen3"]
    missing = [name for name in needed if getattr(start, name) is None]
    if missing:
        raise SettingsError(
            f"nothing to start {settings.stage.name} from: set parent=<run of the stage before>, or "
            + " and ".join(f"model.start.{name}=<folder>" for name in missing)
            + ", or model.start.random=true for a toy model"
        )
