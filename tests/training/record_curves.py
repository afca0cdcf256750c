"""Golden curves: a few seeded steps of each stage, from stage 0 to stage 3, on the tests' corpus.

    python -m tests.training.record_curves      after a change that is meant to change what is computed

``test_curves.py`` trains the same steps and compares. A commit that changes the file says why.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from corpus import ToyCorpus, write_corpus

from keye_train import runs
from keye_train.training.trainer import train

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "curves.json"
FIGURES = ("loss", "loss_by_task", "grad_norms", "lr")
STEPS = 5
OF_ALL = (f"stage.steps={STEPS}", "deepspeed.zero_stage=0", "seed=11")
STAGES = {
    "0_vision": (
        "stage.max_tokens=48",
        "stage.caption_weight=2",
        "stage.trainable=[vision,text_tower,caption_decoder]",
    ),
    "1_align": (),
    "2_multitask": ("stage.optimizer.vision_layer_decay=0.9", "stage.loss_weighting=square"),
    "3_anneal": (),
}


def train_stages(corpus: ToyCorpus, folder: Path) -> dict[str, list[dict[str, object]]]:
    """Train each stage from the export of the one before; the figures of each step."""
    curves: dict[str, list[dict[str, object]]] = {}
    parent: Path | None = None
    for stage, own in STAGES.items():
        run_dir = folder / stage
        more = () if parent is None else (f"parent={parent}",)
        assert train(corpus.settings(stage, run_dir, *OF_ALL, *own, *more)) == 0
        rows = runs.read_jsonl(run_dir / runs.METRICS)
        curves[stage] = [{figure: row[figure] for figure in FIGURES} for row in rows]
        parent = run_dir
    return curves


def main() -> None:
    """Write the golden file anew."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        curves = train_stages(write_corpus(Path(folder) / "corpus"), Path(folder))
    recorded = {"made_by": "python -m tests.training.record_curves", "versions": runs.versions(), "stages": curves}
    GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    print(f"written: {GOLDEN}")


if __name__ == "__main__":
    main()
