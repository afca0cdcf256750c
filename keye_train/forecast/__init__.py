"""What a run will take: memory by part, time, traffic, checkpoints; and what would fit where it does not."""

from keye_train.forecast.forecast import Change, Forecast, forecast, problems, remedies

__all__ = ["Change", "Forecast", "forecast", "problems", "remedies"]
