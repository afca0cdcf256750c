"""Hydra recipes: groups stage, model, data, deepspeed, logging, merge and pipeline."""
