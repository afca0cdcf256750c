"""A toy model and recipe, and ``python toy.py OUT [CHECKPOINTS]``: what the engine tests run on one and on two ranks.

The script trains the toy through every ZeRO stage and writes, from rank 0, tensors and figures that the tests compare.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from keye_train.settings import (
    CheckpointSettings,
    DataSettings,
    DeepSpeedSettings,
    LoggingSettings,
    ModelSettings,
    Objective,
    Precision,
    ScheduleSettings,
    StageSettings,
    TrainSettings,
)

PACKS, STEPS, STOP = 4, 6, 3
# Case -> ZeRO stage, precision, and whether optimizer (and parameters, at stage 3) live in host memory.
CASES = {
    "zero0": (0, "fp32", False),
    "zero1": (1, "fp32", False),
    "zero2": (2, "fp32", False),
    "zero3": (3, "fp32", False),
    "zero1-bf16": (1, "bf16", False),
    "zero2-bf16": (2, "bf16", False),
    "zero3-bf16": (3, "bf16", False),
    "zero2-offload-bf16": (2, "bf16", True),
    "zero3-offload": (3, "fp32", True),
}

# Case -> case whose checkpoint, written at another world size, it also starts from.
CROSSINGS = {
    "zero0": "zero2",
    "zero1": "zero0",
    "zero2": "zero3",
    "zero3": "zero1",
    "zero3-bf16": "zero2-bf16",
    "zero3-offload": "zero2",
    "zero2-offload-bf16": "zero3-bf16",
}


def stage(steps: int, **schedule: object) -> StageSettings:
    """A stage recipe with the given schedule."""
    return StageSettings(
        name="toy",
        objective=Objective.language,
        trainable=["vision", "language"],
        mixture="all",
        steps=steps,
        max_tokens=8,
        max_patches=8,
        global_batch_packs=PACKS,
        schedule=ScheduleSettings(**schedule),  # type: ignore[arg-type]
    )


def settings(zero_stage: int, precision: str, offload: bool) -> TrainSettings:
    """A run of the toy."""
    recipe = TrainSettings(
        stage=stage(STEPS),
        model=ModelSettings(name="toy", tokenizer=""),
        data=DataSettings(name="toy", root="", sources={}, mixtures={}),
        deepspeed=DeepSpeedSettings(
            zero_stage=zero_stage,
            precision=Precision(precision),
            offload_optimizer=offload,
            offload_parameters=offload and zero_stage == 3,
            overlap_comm=False,
            bucket_elements=1000,
            param_persistence_threshold=50,  # some parameters stay whole, some are partitioned
            timeout_minutes=5,
        ),
        logging=LoggingSettings(),
        run_dir="",
    )
    recipe.stage.optimizer.lr = 1e-2
    recipe.stage.optimizer.module_lr.vision = 5e-3
    recipe.stage.optimizer.clip_norm = 0.5
    recipe.stage.optimizer.ema_decay = 0.6
    return recipe


class Toy(nn.Module):
    """Sizes that no number of ranks divides, a norm, a frozen layer between trained ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.frozen = nn.Linear(13, 13)
        self.head = nn.Linear(13, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 7] -> [N, 5]."""
        return self.head(torch.tanh(self.frozen(self.norm(self.tower(x.to(self.tower.weight.dtype))))))

    def modules_of_recipe(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters by module."""
        named = dict(self.named_parameters())
        tower = [(name, named[name]) for name in named if name.startswith(("tower", "norm"))]
        return {"vision": tower, "language": [(n, named[n]) for n in named if n.startswith("head")]}


def packs_of(step: int) -> list[Tensor]:
    """The global batch of a step: packs of unequal length."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(rows, 7, generator=generator) for rows in (3, 9, 1, 6)]


def main(out: Path, elsewhere: Path | None = None) -> None:
    """Train every case; see the module. ``elsewhere`` holds the checkpoints of another world size."""
    from keye_train.checkpoints import CheckpointReader
    from keye_train.training import checkpoint, distributed
    from keye_train.training.checkpoint import TrainState
    from keye_train.training.engine import Engine, Outcome
    from keye_train.training.optimizer import parameter_groups
    from keye_train.training.saver import Saver

    world = distributed.start(timeout_minutes=5)

    def engine(recipe: TrainSettings, resume: checkpoint.Checkpoint | None = None) -> Engine:
        model = Toy()
        if resume is not None:
            read = resume.reader()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(read.tensor(name))
        groups = parameter_groups(model.modules_of_recipe(), recipe.stage)
        built = Engine(model, model, groups, recipe, world)
        if resume is not None:
            built.restore(resume.reader(), resume.state.updates)
        return built

    def step(built: Engine, number: int, recipe: TrainSettings, poison: bool = False) -> Outcome:
        mine = packs_of(number)[world.rank :: world.size]
        rows = world.sum_int([sum(len(pack) for pack in mine)])[0]
        built.set_learning_rates(number, recipe.stage)
        for place, pack in enumerate(mine):
            if poison and world.rank == 0 and place == 0:
                pack = pack * float("nan")
            loss = built.forward(pack).float().square().sum() * world.size / rows
            built.accumulate(loss, last=place == len(mine) - 1)
        squares = built.module_gradient_squares()
        summed = torch.stack([squares[module].double() for module in sorted(squares)])
        torch.distributed.all_reduce(summed)
        module_norms.append(summed.sqrt().tolist())
        return built.apply()

    def snapshot(built: Engine) -> dict[str, Tensor]:
        held = {}
        for name in built.trainable:
            held[name] = built.full_parameter(name).detach().float().clone()
            held |= {f"{name}#{moment}": built.full_moment(name, moment).float().clone() for moment in built.moments}
        return held

    def differing(state: dict[str, Tensor], reader: CheckpointReader) -> list[str]:
        """Where the checkpoint is not the state, to the last bit."""
        stored = {name: reader.tensor(name) for name in reader.names()}
        moments = reader.states[1:]
        stored |= {f"{name}#{moment}": reader.tensor(name, moment) for name in reader.names() for moment in moments}
        return [name for name in stored | state if not torch.equal(stored[name], state[name].cpu())]

    module_norms: list[list[float]] = []
    figures: dict[str, dict] = {}
    for case, shape in CASES.items():
        recipe = settings(*shape)
        module_norms.clear()
        built = engine(recipe)
        norms = [step(built, number, recipe).grad_norm for number in range(STOP)]
        stopped = snapshot(built)
        saver = Saver(out / case, built, world, CheckpointSettings(background=case != "zero1"), {})
        saver.save(TrainState(STOP, built.updates, {}))  # written while the next steps run
        norms += [step(built, number, recipe).grad_norm for number in range(STOP, STEPS)]
        saver.wait()
        end = snapshot(built)
        frozen = {name: built.full_parameter(name).detach().float().clone() for name in built.frozen}
        refused = step(built, STEPS, recipe, poison=True)
        after = snapshot(built)
        recovered = step(built, STEPS, recipe)
        built.close()

        found = checkpoint.newest_whole(out / case, world)
        assert found is not None
        again = engine(recipe, found)
        crossed = None
        if elsewhere is not None and case in CROSSINGS:  # written by another world size and ZeRO stage
            other = checkpoint.newest_whole(elsewhere / CROSSINGS[case], world)
            assert other is not None
            moved = engine(recipe, other)
            crossed = differing(snapshot(moved), other.reader())
            moved.close()
        for number in range(STOP, STEPS):
            step(again, number, recipe)
        resumed = snapshot(again)
        again.close()
        figures[case] = {
            "norms": norms,
            "module_norms": module_norms[:STEPS],
            "stored_otherwise": differing(stopped, found.reader()),
            "crossed": crossed,
            "refused": [refused.applied, all(torch.equal(end[name], after[name]) for name in end), recovered.applied],
        }
        if world.is_main:
            tensors = {f"end/{k}": v for k, v in end.items()} | {f"resumed/{k}": v for k, v in resumed.items()}
            save_file(tensors | {f"frozen/{k}": v for k, v in frozen.items()}, out / f"{case}.safetensors")
    if world.is_main:
        (out / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
