"""DeepSpeed behind four verbs: accumulate a micro-batch, apply the update, read a parameter, restore one.

Nothing else in the package knows which ZeRO stage is running. Three things differ from DeepSpeed's defaults:

- The caller says which micro-batch is the last (``set_gradient_accumulation_boundary``) and gives each loss its final
  weight, because a mean of means is wrong when micro-batches hold different numbers of labelled tokens.
- At stage 0 DeepSpeed neither reports a gradient norm nor refuses a non-finite one; it is done here.
- What a rank holds of parameters and optimizer states is named: slices of the flattened parameter. So a checkpoint does
  not depend on world size or ZeRO stage, and writing or reading one needs no communication.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
)
from torch import Tensor, nn

from keye_train.checkpoints import AVERAGE, MOMENTS, WEIGHTS, CheckpointReader
from keye_train.settings import Precision, SettingsError, StageSettings, TrainSettings
from keye_train.training.distributed import World
from keye_train.training.optimizer import build_optimizer, set_learning_rates


@dataclass(frozen=True)
class Outcome:
    """What became of an update."""

    applied: bool
    grad_norm: float  # global norm before clipping; inf or nan where the update was refused


@dataclass(frozen=True)
class HeldSlice:
    """What this rank holds of a trained parameter: the engine's own memory, not a copy."""

    name: str
    start: int  # in the flattened parameter
    values: Mapping[str, Tensor]  # weights, exp_avg, ... -> fp32 [elements], on the device or, offloaded, on the host

    @property
    def elements(self) -> int:
        """Its length."""
        return self.values[WEIGHTS].numel()

    def narrow(self, start: int, stop: int) -> HeldSlice:
        """The part of it from ``start`` to ``stop`` of the flattened parameter."""
        begin = start - self.start
        return HeldSlice(
            self.name, start, {state: flat[begin : stop - self.start] for state, flat in self.values.items()}
        )


def deepspeed_config(settings: TrainSettings) -> dict[str, Any]:
    """The DeepSpeed configuration of a run."""
    ds = settings.deepspeed
    zero: dict[str, Any] = {
        "stage": ds.zero_stage,
        "overlap_comm": ds.overlap_comm,
        "contiguous_gradients": True,
        "reduce_bucket_size": ds.bucket_elements,
    }
    if ds.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = ds.bucket_elements
    if ds.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = ds.bucket_elements
        zero["stage3_param_persistence_threshold"] = ds.param_persistence_threshold
    if ds.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if ds.offload_parameters and ds.nvme_path is None:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    elif ds.offload_parameters:
        _check_nvme(ds.nvme_path)
        zero["offload_param"] = {"device": "nvme", "nvme_path": ds.nvme_path, "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        # Bookkeeping only: packs are of one row, and accumulation is steered by set_gradient_accumulation_boundary.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.stage.optimizer.clip_norm if ds.zero_stage else 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast on the host, and needs no compiler
        "zero_optimization": zero,
    }
    if ds.precision == Precision.bf16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # bf16 sums of many micro-batches lose the small gradients
    return config


def _check_nvme(folder: str | None) -> None:
    """DeepSpeed would say so in the middle of its start, and not which setting asked for it."""
    if not AsyncIOBuilder().is_compatible():
        raise SettingsError(
            f"deepspeed.nvme_path={folder}: DeepSpeed's async_io extension cannot be built on this machine; install "
            "libaio with its headers (apt: libaio-dev, conda: libaio), or leave the parameters in host memory with "
            "deepspeed.nvme_path=null"
        )


class Engine:
    """A model in training.

    The model is built whole on the CPU of every rank and partitioned by ``deepspeed.initialize``, which also
    broadcasts rank 0's values. ``zero.Init`` would save host memory, but it loses every initialisation that a module
    does after its submodules are made. Peak host memory is therefore one model in fp32 for each rank.

    Args:
        module: what a forward runs; frozen parameters have ``requires_grad=False``.
        model: the part of ``module`` that owns all its parameters; checkpoints use its names.
        groups: parameter groups of the trainable parameters (:func:`keye_train.training.optimizer.parameter_groups`).
    """

    def __init__(
        self, module: nn.Module, model: nn.Module, groups: list[dict[str, Any]], settings: TrainSettings, world: World
    ) -> None:
        self.world = world
        self.updates = 0
        """Updates applied so far; AdamW's own step count, which every parameter shares."""
        self._settings = settings
        self._zero_stage = settings.deepspeed.zero_stage
        self._clip_norm = settings.stage.optimizer.clip_norm
        self._ema_decay = settings.stage.optimizer.ema_decay
        self.moments = (*MOMENTS, AVERAGE) if self._ema_decay else MOMENTS
        """What AdamW keeps of each trained parameter; the average is one more state of it."""
        self._group_modules = [group["module"] for group in groups]
        self._module_of = {id(p): group["module"] for group in groups for p in group["params"]}
        grouped = {id(parameter) for group in groups for parameter in group["params"]}
        named = dict(model.named_parameters())
        self.trainable = {name: parameter for name, parameter in named.items() if id(parameter) in grouped}
        self.frozen = {name: parameter for name, parameter in named.items() if id(parameter) not in grouped}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        optimizer = build_optimizer(groups, settings.stage.optimizer)
        self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(settings)
        )
        self._adam = self._optimizer if self._zero_stage == 0 else self._optimizer.optimizer
        self._create_moments()
        self._deepspeed.train()

    def forward(self, *inputs: Any) -> Any:
        """Run the module. Collective under ZeRO-3."""
        return self._deepspeed(*inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forwards inside leave no trace: no gradients, no activations recomputed or kept."""
        self._deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._deepspeed.train()

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Backward of one micro-batch.

        Args:
            loss: scalar; the micro-batches' losses of all ranks are *averaged over ranks* and summed over micro-steps.
            last: whether this is the last micro-batch before :meth:`apply`. Collective: the same on every rank.
        """
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss)

    def apply(self) -> Outcome:
        """Clip and apply the accumulated gradient, or drop it where its norm is not finite. Collective."""
        if self._zero_stage == 0:
            outcome = self._apply_unsharded()
        else:
            self._deepspeed.step()
            outcome = Outcome(self._deepspeed.was_step_applied(), float(self._deepspeed.get_global_grad_norm()))
            if not outcome.applied:
                self._forget_refused_gradients()
        self.updates += outcome.applied
        if outcome.applied and self._ema_decay:
            self._update_average()
        return outcome

    def module_gradient_squares(self) -> dict[str, Tensor]:
        """This rank's share of the squared gradient norm of each trained module, after the last micro-batch.

        Summed over the ranks they are the squares of :attr:`Outcome.grad_norm`'s parts. Nothing is communicated and
        nothing waits for the device: scalars float64, on the device.
        """
        gradients: dict[str, list[Tensor]] = {module: [] for module in self._group_modules}
        if self._zero_stage == 0:
            for parameter in self.trainable.values():
                if parameter.grad is not None:
                    gradients[self._module_of[id(parameter)]].append(parameter.grad)
        else:
            for number, part in enumerate(self._gradient_partitions()):
                group = self._optimizer.sub_group_to_group_id[number] if self._zero_stage == 3 else number
                gradients[self._group_modules[group]] += part
        # Without sharding every rank holds all gradients: each brings its share of one sum.
        shares = self.world.size if self._zero_stage == 0 else 1
        zero = torch.zeros((), dtype=torch.float64, device=self.world.device)
        return {
            module: sum((nn.utils.get_total_norm([t]).to(zero).square() for t in tensors), zero) / shares
            for module, tensors in gradients.items()
        }

    def _gradient_partitions(self) -> list[list[Tensor]]:
        """This rank's part of the accumulated gradient, for each of :meth:`_optimized_tensors`; sharded stages only.

        DeepSpeed keeps it in a third place with bf16 at stage 1, and beside the master weights where those are on the
        host.
        """
        if hasattr(self._optimizer, "fp32_groups_gradient_flat_partition"):
            return [[part] for part in self._optimizer.fp32_groups_gradient_flat_partition]
        averaged = self._optimizer.averaged_gradients
        return [
            averaged.get(number) or ([] if flat.grad is None else [flat.grad])
            for number, flat in enumerate(self._optimized_tensors())
        ]

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the average towards the new weights; in the first updates faster, as a mean of all of them so far."""
        kept = min(self._ema_decay, self.updates / (self.updates + 1))
        for flat in self._optimized_tensors():
            self._adam.state[flat][AVERAGE].lerp_(flat.detach(), 1.0 - kept)

    def _forget_refused_gradients(self) -> None:
        """With an optimizer on the host, DeepSpeed 0.19 keeps a refused fp32 sum and would add to it for ever."""
        sums = getattr(self._optimizer, "averaged_gradients", None)
        if self._zero_stage in (1, 2) and sums is not None:
            for group in sums:
                sums[group] = None

    def _apply_unsharded(self) -> Outcome:
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            self._deepspeed.zero_grad()
            return Outcome(False, grad_norm)
        if self._clip_norm > 0:
            nn.utils.clip_grads_with_norm_(list(self.trainable.values()), self._clip_norm, norm)
        self._deepspeed.step()
        return Outcome(True, grad_norm)

    def set_learning_rates(self, step: int, stage: StageSettings) -> dict[str, float]:
        """Set the learning rates of ``step``; return them by module."""
        return set_learning_rates(self._optimizer, step, stage)

    # Whole parameters by name. The next three are collective: all ranks call them in the same order.

    def full_parameter(self, name: str) -> Tensor:
        """The whole parameter, fp32 master where it trains, on every rank. Valid until the next call."""
        parameter = self.trainable.get(name)
        if parameter is None:
            parameter = self.frozen[name]
            if self._zero_stage != 3:
                return parameter.detach()
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        if self._zero_stage == 0:
            return parameter.detach()
        value = safe_get_full_fp32_param(parameter)
        assert value is not None, f"{name} is trainable but DeepSpeed holds no master weights for it"
        return value.view(self.shapes[name])

    def full_average(self, name: str) -> Tensor:
        """The moving average of a parameter, fp32, on every rank; of a frozen one the parameter itself."""
        return self.full_moment(name, AVERAGE) if name in self.trainable else self.full_parameter(name)

    def full_moment(self, name: str, moment: str) -> Tensor:
        """A state of AdamW of a trained parameter, in its shape, fp32, on every rank. Valid until the next call."""
        parameter = self.trainable[name]
        if self._zero_stage == 0:
            return self._adam.state[parameter][moment]
        value = safe_get_full_optimizer_state(parameter, moment)
        assert value is not None, f"{name} is trainable but DeepSpeed holds no {moment} for it"
        return value.view(self.shapes[name])

    # What this rank holds. Nothing below communicates.

    def held_slices(self) -> list[HeldSlice]:
        """All that this rank holds: its partition, or without sharding every parameter whole."""
        if self._zero_stage == 0:
            return [
                HeldSlice(
                    name, 0, {WEIGHTS: parameter.detach().view(-1)} | self._moments_of(parameter, 0, parameter.numel())
                )
                for name, parameter in self.trainable.items()
            ]
        held = self._held_in_partitions if self._zero_stage == 3 else self._held_in_fragments
        return [one for name, parameter in self.trainable.items() if (one := held(name, parameter)) is not None]

    def owned_slices(self) -> list[HeldSlice]:
        """This rank's share of a checkpoint: all ranks' shares together are every trained parameter, once.

        Without sharding, where every rank holds everything, each takes an equal run of the elements.
        """
        held = self.held_slices()
        if self._zero_stage != 0:
            return held
        total = sum(one.elements for one in held)
        first, last = (total * rank // self.world.size for rank in (self.world.rank, self.world.rank + 1))
        owned, before = [], 0
        for one in held:
            start, stop = max(first - before, 0), min(last - before, one.elements)
            if start < stop:
                owned.append(one.narrow(start, stop))
            before += one.elements
        return owned

    @torch.no_grad()
    def restore(self, reader: CheckpointReader, updates: int) -> None:
        """Put back masters and states; world size and ZeRO stage may differ from those that wrote them.

        Each rank reads what it holds. The 16-bit copies of the weights are not touched: build the module with the
        checkpoint's weights first, so that DeepSpeed rounds them itself.

        Args:
            reader: of a checkpoint that fits (:meth:`CheckpointReader.check_fits`).
            updates: value of :attr:`updates` at that time.

        Raises:
            ValueError: the checkpoint lacks a state that the recipe asks for.
        """
        lacking = [state for state in self.moments if state not in reader.states]
        if lacking:
            raise ValueError(f"{reader.folder} holds no {lacking[0]}: it was written with another stage.optimizer")
        self.updates = updates
        for flat in self._optimized_tensors():
            self._adam.state[flat]["step"].fill_(float(updates))
        for held in self.held_slices():
            for state, values in held.values.items():
                values.copy_(reader.read(held.name, state, held.start, held.start + held.elements))

    def _held_in_fragments(self, name: str, parameter: nn.Parameter) -> HeldSlice | None:
        """ZeRO 1 and 2: the flat partition of a rank holds a run of whole parameters, the outermost ones cut."""
        fragment = parameter._hp_mapping  # type: ignore[attr-defined]
        if fragment is None:  # it lies in the partitions of other ranks
            return None
        moments = {moment: fragment.get_hp_fragment(moment) for moment in self.moments}
        return HeldSlice(name, fragment.lp_fragment_address.start, {WEIGHTS: fragment.get_hp_fragment()} | moments)

    def _held_in_partitions(self, name: str, parameter: nn.Parameter) -> HeldSlice | None:
        """ZeRO 3: every parameter is divided over all ranks; the last parts are padded."""
        number, offset, padded = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        start = padded * self.world.rank
        elements = min(padded, math.prod(self.shapes[name]) - start)
        if elements <= 0:
            return None
        flat = self._optimizer.fp32_partitioned_groups_flat[number]
        weights = {WEIGHTS: flat.detach()[offset : offset + elements]}
        return HeldSlice(name, start, weights | self._moments_of(flat, offset, offset + elements))

    def _moments_of(self, optimized: Tensor, begin: int, end: int) -> dict[str, Tensor]:
        states = self._adam.state[optimized]
        return {moment: states[moment].view(-1)[begin:end] for moment in self.moments}

    def _create_moments(self) -> None:
        """Make AdamW's states now, with the values torch would give them at the first step.

        A checkpoint can then be restored into them before any step. Besides, DeepSpeed 0.19 links parameters to their
        part of the flat states once, after the first parameter *group* has stepped, when those of the other groups
        would not exist yet. Each flat tensor gets its own step count: torch raises it in place.
        """
        for flat in self._optimized_tensors():
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            self._adam.state[flat] = {"step": step} | {moment: torch.zeros_like(flat) for moment in MOMENTS}
            if self._ema_decay:
                self._adam.state[flat][AVERAGE] = flat.detach().clone()
        if self._zero_stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _optimized_tensors(self) -> list[Tensor]:
        """What AdamW sees: parameters, or this rank's flat fp32 partitions of them."""
        if self._zero_stage == 0:
            return list(self.trainable.values())
        if self._zero_stage == 3:  # param_groups are empty between steps there
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self._optimizer.param_groups for flat in group["params"]]

    def close(self) -> None:
        """Remove DeepSpeed's hooks and buffers."""
        self._deepspeed.destroy()
