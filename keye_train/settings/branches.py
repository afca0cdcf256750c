"""Annealing branches: several mixtures, one parent."""

from __future__ import annotations

from dataclasses import dataclass

from keye_train.settings.basics import SettingsError


@dataclass(kw_only=True)
class DrawnMixturesSettings:
    """Mixtures drawn around one of the data recipe: Dirichlet(concentration * base), base normalised to sum to 1.

    The mean of the draw is the base. The standard deviation of a share p is sqrt(p (1 - p) / (concentration + 1)):
    with a concentration of 30, a share of 0.2 varies by 0.07.
    """

    base: str = ""
    """Name of a mixture of the data recipe."""
    count: int = 0
    """How many: NAME_drawn1, NAME_drawn2, ... Each depends on seed and number alone, so more can be added later.
    0: none."""
    concentration: float = 30.0
    seed: int = 0

    def check(self, entry: str) -> None:
        """Raise SettingsError for values out of range."""
        where = f"stages.{entry}.drawn"
        if self.count < 0:
            raise SettingsError(f"{where}.count={self.count}: 0 for none, or how many")
        if bool(self.count) != bool(self.base):
            raise SettingsError(
                f"{where}: base={self.base!r} and count={self.count}: name a mixture to draw around and how many to "
                "draw, or neither"
            )
        if not 0 < self.concentration < 1e9:
            raise SettingsError(f"{where}.concentration={self.concentration}: above 0; large values stay near the base")
        if self.seed < 0:
            raise SettingsError(f"{where}.seed={self.seed}: 0 or more")
