"""One run of ``keye-train``: stage, optimizer, engine, checkpoints, logging."""

from __future__ import annotations

from dataclasses import dataclass, field

from keye_train.settings.basics import (
    MODULES,
    ActivationCheckpointing,
    LossWeighting,
    Objective,
    Precision,
    ScheduleShape,
    SettingsError,
)
from keye_train.settings.checkpoint import CheckpointSettings, check_checkpoint
from keye_train.settings.data import DataSettings, check_data
from keye_train.settings.guards import GuardSettings, check_guards
from keye_train.settings.logging import (
    LoggingSettings,
    TrainEvaluationSettings,
    check_logging,
    check_train_evaluation,
)
from keye_train.settings.model import ModelSettings, check_model


@dataclass
class ModuleRateSettings:
    """A learning rate or weight decay for single modules; null takes the one of ``optimizer``."""

    vision: float | None = None
    projector: float | None = None
    language: float | None = None
    text_tower: float | None = None
    caption_decoder: float | None = None


@dataclass
class OptimizerSettings:
    """AdamW and its parameter groups."""

    lr: float = 1e-5
    module_lr: ModuleRateSettings = field(default_factory=ModuleRateSettings)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.05
    """Applied to matrices only: never to norms, biases and one-dimensional parameters."""
    module_weight_decay: ModuleRateSettings = field(default_factory=ModuleRateSettings)
    vision_layer_decay: float = 1.0
    """Factor on the learning rate from each layer of the vision tower to the one below it; 1: all alike. The norm
    behind the layers, and a pooling head, keep the tower's rate; the embeddings lie below the lowest layer."""
    ema_decay: float = 0.0
    """Share that a moving average of the weights keeps at each update (0.9999, say); 0: no average. It costs one more
    fp32 copy of the trained weights, sharded like them, and is exported beside the model, as RUN/export_ema."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def rate(self, module: str) -> float:
        """Learning rate of ``module`` before the schedule."""
        own = getattr(self.module_lr, module)
        return self.lr if own is None else own

    def decay(self, module: str) -> float:
        """Weight decay of the matrices of ``module``."""
        own = getattr(self.module_weight_decay, module)
        return self.weight_decay if own is None else own


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
    """Modules that train (vision, projector, language, text_tower, caption_decoder); everything else is frozen."""
    mixture: str
    """Name of a mixture of the data recipe."""
    steps: int
    max_tokens: int
    """Budget of language tokens (Stage 0: caption tokens) of a pack."""
    max_patches: int
    """Budget of vision patches of a pack."""
    global_batch_packs: int
    """Packs of one optimizer step over all ranks; accumulation = global_batch_packs / world size."""
    loss_weighting: LossWeighting = LossWeighting.per_token
    """What the labelled tokens of a sample weigh; always divided by the sum of the weights in the global batch."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    caption_weight: float = 0.0
    """Stage 0: weight of the caption loss beside the contrastive one (Kimi-VL: 2); 0: no caption decoder."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    compile_layers: bool = False
    """Compile each layer with torch.compile: a minute at the start, fewer passes over memory afterwards."""


@dataclass
class DeepSpeedSettings:
    """How the training state is spread over the ranks."""

    zero_stage: int = 3
    precision: Precision = Precision.bf16
    offload_optimizer: bool = False
    offload_parameters: bool = False
    nvme_path: str | None = None
    """ZeRO-3 with offload_parameters: a folder on a local NVMe disk of each node, where the 16-bit parameters lie
    instead of in host memory. Masters and moments stay in host memory (offload_optimizer) or on the GPU, where
    checkpoints read them. Needs libaio and its headers."""
    overlap_comm: bool = True
    bucket_elements: int = 500_000_000
    """Size of the reduce and all-gather buckets."""
    param_persistence_threshold: int = 100_000
    """ZeRO-3: parameters smaller than this stay whole on every rank."""
    timeout_minutes: float = 30.0
    """Deadline of a collective."""


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
    guards: GuardSettings = field(default_factory=GuardSettings)
    evaluation: TrainEvaluationSettings = field(default_factory=TrainEvaluationSettings)
    parent: str | None = None
    """Run folder or export of the stage before; null: first weights from ``model.start``."""
    seed: int = 0

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        check_model(self.model)
        check_data(self.data)
        _check_stage(self.stage, self.data)
        _check_numbers(self)
        if self.deepspeed.zero_stage not in (0, 1, 2, 3):
            raise SettingsError(f"deepspeed.zero_stage={self.deepspeed.zero_stage}: use 0, 1, 2 or 3")
        if self.deepspeed.zero_stage == 0 and self.deepspeed.precision == Precision.bf16:
            raise SettingsError(
                "deepspeed.zero_stage=0 keeps no fp32 master weights, so deepspeed.precision=bf16 would lose small "
                "updates: use deepspeed.precision=bf16_autocast, or deepspeed=zero1"
            )
        if self.deepspeed.offload_parameters and self.deepspeed.zero_stage != 3:
            raise SettingsError("deepspeed.offload_parameters=true needs deepspeed.zero_stage=3")
        if self.deepspeed.nvme_path is not None and not self.deepspeed.offload_parameters:
            raise SettingsError(
                f"deepspeed.nvme_path={self.deepspeed.nvme_path} has no effect without "
                "deepspeed.offload_parameters=true: it is where the parameters go"
            )
        if self.deepspeed.offload_optimizer and self.deepspeed.zero_stage == 0:
            raise SettingsError("deepspeed.offload_optimizer=true needs deepspeed.zero_stage=1, 2 or 3")
        if self.stage.compile_layers and self.stage.activation_checkpointing != ActivationCheckpointing.none:
            raise SettingsError(
                "stage.compile_layers=true has no effect inside activation checkpointing: set one of "
                "stage.compile_layers=false and stage.activation_checkpointing=none"
            )
        if self.stage.compile_layers and self.deepspeed.zero_stage == 3:
            raise SettingsError(
                "stage.compile_layers=true does not go with deepspeed.zero_stage=3, which gathers weights inside the "
                "layers: use deepspeed.zero_stage=2 or less, or stage.compile_layers=false"
            )
        check_checkpoint(self.checkpoint)
        check_guards(self.guards, self.deepspeed.timeout_minutes)
        check_logging(self.logging)
        check_train_evaluation(self.evaluation, self.stage.objective, self.data)
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


def _decoder_hint(module: str) -> str:
    return "; captions are read where stage.caption_weight > 0" if module == "caption_decoder" else ""


def _check_stage(stage: StageSettings, data: DataSettings) -> None:
    if not stage.trainable:
        raise SettingsError(f"stage.trainable is empty: name at least one of {MODULES}")
    for name in stage.trainable:
        if name not in MODULES:
            raise SettingsError(f"stage.trainable: unknown module '{name}'; modules: {MODULES}")
        if stage.trainable.count(name) > 1:
            raise SettingsError(f"stage.trainable={stage.trainable} names '{name}' twice: name it once")
    _check_optimizer(stage.optimizer, stage.trainable)
    allowed: tuple[str, ...] = MODULES[:3]
    if stage.objective == Objective.contrastive:
        allowed = ("vision", "text_tower", "caption_decoder") if stage.caption_weight else ("vision", "text_tower")
    elif stage.caption_weight:
        raise SettingsError(
            f"stage.caption_weight={stage.caption_weight} has no effect with objective={stage.objective.value}: set it "
            "to 0, it belongs to the contrastive Stage 0"
        )
    if stage.caption_weight > 0 and "caption_decoder" not in stage.trainable:
        raise SettingsError(
            f"stage.caption_weight={stage.caption_weight} with a frozen decoder teaches noise: add caption_decoder to "
            f"stage.trainable ({stage.trainable})"
        )
    if stage.objective == Objective.contrastive and stage.loss_weighting != LossWeighting.per_token:
        raise SettingsError(
            f"stage.loss_weighting={stage.loss_weighting.value} has no effect with objective=contrastive, which has "
            "one loss for each pair: use stage.loss_weighting=per_token"
        )
    if stage.caption_weight < 0:
        raise SettingsError(f"stage.caption_weight={stage.caption_weight} must not be negative")
    for name in stage.trainable:
        if name not in allowed:
            raise SettingsError(
                f"stage.trainable has '{name}', which objective={stage.objective.value} does not use: "
                f"choose from {allowed}" + _decoder_hint(name)
            )
    if stage.mixture not in data.mixtures:
        raise SettingsError(
            f"stage.mixture={stage.mixture} is not a mixture of data={data.name}; mixtures: {sorted(data.mixtures)}"
        )
    if min(stage.steps, stage.max_tokens, stage.global_batch_packs) < 1 or stage.max_patches < 4:
        raise SettingsError("stage.steps, max_tokens, global_batch_packs are at least 1 and max_patches at least 4")
    scheduled = stage.schedule.warmup_steps + stage.schedule.decay_steps
    if scheduled > stage.steps:
        warmup = stage.schedule.warmup_steps * stage.steps // scheduled
        decay = stage.schedule.decay_steps * stage.steps // scheduled
        raise SettingsError(
            f"stage.schedule: warmup_steps={stage.schedule.warmup_steps} + decay_steps={stage.schedule.decay_steps} "
            f"exceed stage.steps={stage.steps}: take more steps, or at most stage.schedule.warmup_steps={warmup} "
            f"stage.schedule.decay_steps={decay}"
        )
    if stage.schedule.shape == ScheduleShape.wsd and stage.schedule.decay_steps < 1:
        raise SettingsError("stage.schedule.shape=wsd needs stage.schedule.decay_steps >= 1")
    if stage.schedule.shape != ScheduleShape.wsd and stage.schedule.decay_steps:
        raise SettingsError(
            "stage.schedule.decay_steps has an effect with stage.schedule.shape=wsd only: leave it at 0"
        )


def _check_numbers(settings: TrainSettings) -> None:
    """Refuse what torch and DeepSpeed would refuse late, or take for something else."""
    optimizer, schedule, ds = settings.stage.optimizer, settings.stage.schedule, settings.deepspeed
    of_modules = {
        f"stage.optimizer.{key}.{name}": value
        for key in ("module_lr", "module_weight_decay")
        for name, value in vars(getattr(optimizer, key)).items()
        if value is not None
    }
    at_least_0 = of_modules | {
        "stage.optimizer.lr": optimizer.lr,
        "stage.optimizer.weight_decay": optimizer.weight_decay,
        "stage.optimizer.clip_norm": optimizer.clip_norm,
        "stage.schedule.warmup_steps": schedule.warmup_steps,
        "stage.schedule.decay_steps": schedule.decay_steps,
        "deepspeed.param_persistence_threshold": ds.param_persistence_threshold,
        "seed": settings.seed,
    }
    above_0 = {
        "stage.optimizer.eps": optimizer.eps,
        "deepspeed.bucket_elements": ds.bucket_elements,
        "deepspeed.timeout_minutes": ds.timeout_minutes,
    }
    for key, value in at_least_0.items():
        if not value >= 0:
            raise SettingsError(f"{key}={value} must be at least 0")
    for key, value in above_0.items():
        if not value > 0:
            raise SettingsError(f"{key}={value} must be above 0")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise SettingsError(f"stage.optimizer.betas={optimizer.betas}: both lie between 0 and below 1")
    if not 0 <= schedule.final_fraction <= 1:
        raise SettingsError(f"stage.schedule.final_fraction={schedule.final_fraction} must lie between 0 and 1")
    if not settings.run_dir:
        raise SettingsError("run_dir is empty: name a folder for what the run writes")


def _check_optimizer(optimizer: OptimizerSettings, trainable: list[str]) -> None:
    for key in ("module_lr", "module_weight_decay"):
        for name, value in vars(getattr(optimizer, key)).items():
            if value is not None and name not in trainable:
                raise SettingsError(f"stage.optimizer.{key}.{name} has no effect: '{name}' is not in stage.trainable")
    if len(optimizer.betas) != 2:
        raise SettingsError("stage.optimizer.betas has two numbers")
    if not 0 < optimizer.vision_layer_decay <= 1:
        raise SettingsError(f"stage.optimizer.vision_layer_decay={optimizer.vision_layer_decay}: use above 0, up to 1")
    if optimizer.vision_layer_decay < 1 and "vision" not in trainable:
        raise SettingsError("stage.optimizer.vision_layer_decay has no effect: 'vision' is not in stage.trainable")
    if not 0 <= optimizer.ema_decay < 1:
        raise SettingsError(f"stage.optimizer.ema_decay={optimizer.ema_decay}: use 0 (no average) up to below 1")


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
