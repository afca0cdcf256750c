"""Every trainable parameter is in one group with its module's rate; frozen ones are in none; vectors never decay."""

from __future__ import annotations

import torch
from torch import nn
from toy import stage

from keye_train.settings import OptimizerSettings
from keye_train.training.optimizer import build_optimizer, parameter_groups, set_learning_rates


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 2)


def groups_of(trainable: list[str]) -> list[dict]:
    model = Toy()
    recipe = stage(10)
    recipe.trainable = trainable
    recipe.optimizer = OptimizerSettings(lr=1.0, weight_decay=0.1)
    recipe.optimizer.module_lr.vision = 0.5
    modules = {"vision": list(model.tower.named_parameters()), "language": list(model.head.named_parameters())}
    return parameter_groups(modules, recipe)


def test_groups_hold_rates_and_decay_of_their_module() -> None:
    groups = {group["name"]: group for group in groups_of(["vision", "language"])}
    assert set(groups) == {"vision/decay", "vision/no_decay", "language/decay", "language/no_decay"}
    assert groups["vision/decay"]["lr"] == 0.5
    assert groups["language/decay"]["lr"] == 1.0
    assert [group["weight_decay"] for group in groups.values()] == [0.1, 0.0, 0.1, 0.0]
    assert [tuple(p.shape) for p in groups["vision/decay"]["params"]] == [(4, 4)]
    assert [tuple(p.shape) for p in groups["vision/no_decay"]["params"]] == [(4,), (4,), (4,)]  # bias and norm


def test_frozen_modules_are_absent() -> None:
    assert {group["module"] for group in groups_of(["language"])} == {"language"}


def test_schedule_scales_each_module_by_its_own_rate() -> None:
    recipe = stage(10, warmup_steps=2)
    optimizer = build_optimizer(groups_of(["vision", "language"]), recipe.optimizer)
    assert set_learning_rates(optimizer, 0, recipe) == {"vision": 0.25, "language": 0.5}
    assert set_learning_rates(optimizer, 1, recipe) == {"vision": 0.5, "language": 1.0}
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 1.0}


def test_layers_of_the_tower_learn_slower_the_deeper_they_lie() -> None:
    tower = "visual.vision_model."
    names = [f"{tower}embeddings.a.weight", *(f"{tower}encoder.layers.{n}.b.weight" for n in range(3))]
    parameters = [(name, nn.Parameter(torch.zeros(2, 2))) for name in (*names, f"{tower}post_layernorm.weight")]
    recipe = stage(10)
    recipe.trainable = ["vision"]
    recipe.optimizer = OptimizerSettings(lr=1.0, vision_layer_decay=0.5)
    groups = parameter_groups({"vision": parameters}, recipe)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert [rates[id(parameter)] for _, parameter in parameters] == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
    assert len({group["name"] for group in groups}) == len(groups)
    assert set_learning_rates(build_optimizer(groups, recipe.optimizer), 9, recipe) == {"vision": 0.1}


def test_a_module_may_have_its_own_weight_decay() -> None:
    model, recipe = Toy(), stage(10)
    recipe.trainable = ["vision", "language"]
    recipe.optimizer = OptimizerSettings(weight_decay=0.1)
    recipe.optimizer.module_weight_decay.vision = 0.0
    modules = {"vision": list(model.tower.named_parameters()), "language": list(model.head.named_parameters())}
    decays = {group["name"]: group["weight_decay"] for group in parameter_groups(modules, recipe)}
    assert decays == {"vision/decay": 0.0, "vision/no_decay": 0.0, "language/decay": 0.1, "language/no_decay": 0.0}
