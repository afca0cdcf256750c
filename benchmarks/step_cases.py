"""What ``benchmarks.model_step`` runs, and what each case should cost before any of it runs: parameters, operations,
memory. Needs no accelerator.

Legend: B bytes, T packed tokens, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.samples import draw_samples, full_pack
from keye_train import compose
from keye_train.data.collate import collate_samples
from keye_train.data.packing import Budget
from keye_train.model import KeyeForConditionalGeneration, PackedInputs, keye_config, module_parameters
from keye_train.model.flops import TOWERS, FlopCoefficients
from keye_train.model.loss import CHUNK_LOGITS
from keye_train.settings import TrainSettings

GIB = 2**30
H200_MEMORY = 139 * GIB
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
USABLE = 0.92  # of the memory: the rest is for kernels' work space and fragments
SAMPLES_TO_CHOOSE_FROM = 64

# Bytes a parameter keeps. Engine in bf16: weight 2, gradient 2, its float32 sum 4, float32 master 4, two moments 8.
STATE_BYTES = {("engine", "bf16"): 20, ("engine", "fp32"): 16, ("module", "bf16"): 8, ("module", "fp32"): 16}


@dataclass(frozen=True)
class Case:
    """One configuration of a training step."""

    model: str  # recipe
    max_tokens: int  # T; the patch budget is 4 T
    packs: int  # micro-batches of a step
    precision: str  # fp32 or bf16
    checkpointing: bool
    path: str  # "engine": DeepSpeed with float32 masters, as in training; "module": forward, backward, AdamW on bf16
    layers: int | None = None  # of the language model; None: all
    scale: float = 1.0  # of the sample lengths

    @property
    def name(self) -> str:
        """For tables."""
        layers = "" if self.layers is None else f" ({self.layers} layers)"
        return f"{self.model}{layers}"

    def settings(self) -> TrainSettings:
        """The recipe, stage 2: everything trains."""
        overrides = [
            "stage=2_multitask",
            f"model={self.model}",
            f"deepspeed={'zero1' if self.precision == 'bf16' else 'cpu'}",
            "model.tokenizer=none",
            "model.start.random=true",
            f"stage.max_tokens={self.max_tokens}",
            f"stage.max_patches={4 * self.max_tokens}",
            f"stage.global_batch_packs={self.packs}",
            f"stage.activation_checkpointing={'full' if self.checkpointing else 'none'}",
        ]
        if self.layers is not None:
            overrides.append(f"model.language.num_hidden_layers={self.layers}")
        return compose.load_settings(TrainSettings, "train", overrides)

    def inputs(self) -> list[PackedInputs]:
        """The packs of a step, on the CPU; the same at every call."""
        model, budget = self.settings().model, Budget(self.max_tokens, 4 * self.max_tokens)
        packs = []
        for seed in range(self.packs):
            samples = draw_samples(model, SAMPLES_TO_CHOOSE_FROM, self.scale, self.max_tokens // 2, seed)
            packs.append(collate_samples(full_pack(samples, budget), model))
        return packs


CPU_CASES = [
    Case("tiny", 1024, 2, "fp32", checkpointing, path, scale=1 / 16)
    for checkpointing, path in ((False, "engine"), (False, "module"), (True, "module"))
]


def cuda_cases(memory: float) -> list[Case]:
    """The 2B model and as much of the 8B model as the memory takes; short and long packs, recomputed or not."""
    cases = []
    for tokens in (8_192, 32_768):
        for checkpointing in (False, True):
            cases += [Case("keye_2b", tokens, 1, "bf16", checkpointing, path) for path in ("module", "engine")]
            for path in ("module", "engine"):
                whole = Case("keye_8b", tokens, 1, "bf16", checkpointing, path)
                cases.append(_largest_that_fits(whole, memory))
    return cases


def _largest_that_fits(whole: Case, memory: float) -> Case:
    """The case with as many language layers as the memory takes, in fours; at least four."""
    layers = whole.settings().model.language.num_hidden_layers
    if forecast(whole).memory_bytes <= USABLE * memory:
        return whole
    fewer = (replace(whole, layers=count) for count in range(layers - 4, 3, -4))
    return next((c for c in fewer if forecast(c).memory_bytes <= USABLE * memory), replace(whole, layers=4))


@dataclass(frozen=True)
class Forecast:
    """What a case should cost."""

    parameters: int  # that learn
    flops: float  # operations of a step, recomputation not counted
    tokens: int
    patches: int
    labelled_tokens: int
    state_bytes: float  # weights, gradients, optimizer
    activation_bytes: float  # what the forward of one pack keeps, or with checkpointing the inputs and one layer
    loss_bytes: float  # of the backward of the token loss, above its inputs and the gradient of the matrix

    @property
    def memory_bytes(self) -> float:
        """Peak: all together."""
        return self.state_bytes + self.activation_bytes + self.loss_bytes


@cache
def forecast(case: Case) -> Forecast:
    """Parameters by building the model without memory, operations by the formula, activations by ``layer_bytes``."""
    settings = case.settings()
    config = keye_config(settings.model)
    with torch.device("meta"):
        model = KeyeForConditionalGeneration(config)
    learning = module_parameters(model)
    parameters = sum(parameter.numel() for tower in TOWERS for _, parameter in learning[tower])
    packs = case.inputs()
    item = 2 if case.precision == "bf16" else 4
    per_token, per_patch = layer_bytes(case.model, case.precision)
    depth, vision_depth = config.num_hidden_layers, config.vision.num_hidden_layers
    width, inner = config.hidden_size, config.vision.hidden_size

    def activations(pack: PackedInputs) -> float:
        tokens, patches = len(pack.input_ids), len(pack.vision.pixel_patches)
        if case.checkpointing:
            kept = item * (depth * tokens * width + vision_depth * patches * inner)
            kept += max(tokens * per_token, patches * per_patch)
        else:
            kept = depth * tokens * per_token + vision_depth * patches * per_patch
        kept += patches * 588 * 4 + patches // 4 * 4 * inner * item * 3  # pixels as floats, the projector's states
        return float(kept)

    return Forecast(
        parameters=parameters,
        flops=step_flops(case),
        tokens=sum(len(pack.input_ids) for pack in packs),
        patches=sum(len(pack.vision.pixel_patches) for pack in packs),
        labelled_tokens=sum(len(pack.loss_rows) for pack in packs),
        state_bytes=float(parameters * STATE_BYTES[case.path, case.precision]),
        activation_bytes=max(activations(pack) for pack in packs),
        loss_bytes=float(max(loss_bytes(len(pack.loss_rows), width, config.vocab_size, item) for pack in packs)),
    )


def loss_bytes(rows: int, width: int, vocab: int, item: int) -> int:
    """Peak of ``linear_cross_entropy``: what its backward holds at the worst place of a block of the vocabulary.

    For 4096 wide bfloat16 states and 32,768 rows of 8,192 words 0.94 GB, for 1,024 rows of 151,936 words 0.185 GB;
    measured are 0.94 and 0.186 (``benchmarks/results``, loss).

    Args:
        rows: labelled tokens.
        width, vocab: of the output matrix.
        item: bytes of a weight.
    """
    block = min(vocab, max(1, CHUNK_LOGITS // max(rows, width)))
    cast = item if item < 4 else 0  # float32 needs no second copy of the slopes
    slopes = rows * block * (4 + cast)
    product = (rows + width) * block * item  # slopes, and the block of the weight's gradient before it is stored
    return rows * width * 4 + max(slopes, product)


def step_flops(case: Case) -> float:
    """Operations of forward and backward of all packs of a step; see ``keye_train.model.flops``."""
    cost = FlopCoefficients.of(keye_config(case.settings().model)).for_training()
    return sum(
        cost.pack(
            pack.cu_seqlens.diff().tolist(), pack.vision.cu_seqlens.diff().tolist(), labelled_tokens=len(pack.loss_rows)
        )
        for pack in case.inputs()
    )


@cache
def layer_bytes(model: str, precision: str) -> tuple[float, float]:
    """What autograd keeps for the backward of one layer: bytes a token, and bytes a patch.

    Measured, not derived: real widths, a short pack, one layer against two, on the CPU. (The fused attention of a GPU
    keeps query, key, value, output and the log-sums, as the CPU's does.)
    """
    whole = Case(model, 128, 1, precision, False, "module", scale=1 / 32)
    settings, pack = whole.settings(), whole.inputs()[0]

    def kept(language: int, vision: int) -> int:
        config = keye_config(settings.model)
        config.vocab_size, config.num_hidden_layers, config.vision.num_hidden_layers = 64, language, vision
        with torch.random.fork_rng():
            built = KeyeForConditionalGeneration(config).to(DTYPES[precision])
        small = replace(
            pack, input_ids=pack.input_ids % 64, loss_rows=pack.loss_rows[:1], loss_targets=pack.loss_targets[:1] % 64
        )
        return saved_bytes(built, small)

    one = kept(1, 1)
    tokens, patches = len(pack.input_ids), len(pack.vision.pixel_patches)
    return (kept(2, 1) - one) / tokens, (kept(1, 2) - one) / patches


def saved_bytes(model: Any, pack: PackedInputs) -> int:
    """Bytes of all storages, parameters left out, that a forward keeps for its backward."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.forward_packed(pack).sum()
    total = sum(t.untyped_storage().nbytes() for place, t in storages.items() if place not in parameters)
    del loss
    return total
