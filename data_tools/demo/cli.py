"""``keye-data demo``: build the demo's corpus."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.demo.build import build_demo

DESCRIPTION = """\
Build the demo's corpus: chat samples, image-text pairs, clips and texts whose answers are known by construction, from
pictures and fonts that ship inside PyPI packages. Train and held-out shards with their indexes, and the
tokenizer. Nothing is downloaded. The same seed and scale give the same samples.
"""
EXAMPLES = """\
examples:
  keye-data demo --out data/demo
  keye-data demo --out data/small --scale 0.02
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``demo``."""
    parser = subparsers.add_parser(
        "demo",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder of the corpus (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of samples (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Build and tell what there is; the exit status."""
    manifest = build_demo(arguments.out, arguments.scale, arguments.seed, arguments.workers)
    total_samples, total_bytes = sum(manifest["samples"].values()), sum(manifest["bytes"].values())
    print(f"{arguments.out}: {total_samples} samples, {total_bytes / 1e6:.0f} MB")
    return 0
