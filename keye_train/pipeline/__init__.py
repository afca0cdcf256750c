"""The whole chain as one resumable job. ``run_pipeline`` is the way in."""

from keye_train.pipeline.chain import run_pipeline
from keye_train.pipeline.plan import stage_settings

__all__ = ["run_pipeline", "stage_settings"]
