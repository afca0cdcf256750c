"""Options of the commands that decode samples of strangers: what one sample may take."""

from __future__ import annotations

import argparse

from keye_train.data.limits import DecodeLimits

LEAST_BYTES = 2**20
LIMITS = DecodeLimits(60.0, 4 * 2**30, "--decode-seconds", "--decode-bytes")
"""Of one sample, unless the options say otherwise."""


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``decode_limits_from`` reads."""
    parser.add_argument(
        "--decode-seconds", type=float, default=LIMITS.seconds, metavar="S", help="CPU time of a sample (%(default)g)"
    )
    parser.add_argument(
        "--decode-bytes", type=int, default=LIMITS.memory_bytes, metavar="N", help="memory of a sample (%(default)s)"
    )


def decode_limits_from(arguments: argparse.Namespace) -> DecodeLimits:
    """The limits that the options mean.

    Raises:
        ValueError: they let nothing through.
    """
    if not arguments.decode_seconds > 0 or arguments.decode_bytes < LEAST_BYTES:
        raise ValueError(f"--decode-seconds is above 0, --decode-bytes at least {LEAST_BYTES} (1 MiB)")
    return DecodeLimits(arguments.decode_seconds, arguments.decode_bytes, LIMITS.seconds_setting, LIMITS.bytes_setting)
