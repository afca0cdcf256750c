"""``keye-train plan``: what a run will take."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from keye_train.cli.common import recipe_command
from keye_train.settings.cluster import ForecastSettings

HELP = """\
Forecast a run without running it: memory of a rank by part, time of a step, utilisation, length of the run, what the
loader must read, size of a checkpoint. Needs no GPU and no weights; with indexed shards, steps are those of the real
plan. Where the run cannot fit, it says which settings would, and leaves with exit code 3.

  keye-train plan stage=2_multitask model=keye_8b data=keye_example model.tokenizer=keye-tokenizer \\
      model.start.random=true cluster=h100 cluster.nodes=16
  keye-train plan stage=2_multitask model=tiny data=demo deepspeed=cpu cluster=laptop
  keye-train plan ... cluster=h100 --json > forecast.json

Rates of devices and links are the makers'; the shares of them that a run reaches (cluster.efficiency, cluster.overlap)
are ours, to be replaced by what you measure.
"""

DOES_NOT_FIT = 3


def main(argv: Sequence[str]) -> None:
    """Compose, forecast, print."""
    words = [word for word in argv if word != "--json"]

    def work(settings: ForecastSettings) -> int:
        from keye_train.forecast import forecast, problems, remedies
        from keye_train.forecast.text import render, values

        found = forecast(settings)
        wrong = problems(found, settings.cluster)
        changes = remedies(settings, found) if wrong else []
        if len(words) < len(argv):
            json.dump(values(found, settings, wrong, changes), sys.stdout, indent=2)
            print()
        else:
            print(render(found, settings, wrong, changes))
        return DOES_NOT_FIT if wrong else 0

    groups = ("stage", "model", "data", "deepspeed", "cluster")
    recipe_command("keye-train plan", HELP, ForecastSettings, "forecast", groups, work, words)
