"""The page holds the numbers of the run, needs nothing else, escapes everything, and works with any part missing."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from keye_train.report.collect import clock, read_root
from keye_train.report.page import write_report

VOID = {"meta", "img", "line", "circle", "rect", "path", "br"}


class Reader(HTMLParser):
    """Checks that tags close in order, and collects texts, ids and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: set[str] = set()
        self.addresses: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.add(value or "")
            if name in ("src", "href", "action", "data", "poster", "xlink:href"):
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in VOID, tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def written(root: Path) -> str:
    return write_report(root, root / "report.html").read_text(encoding="utf-8")


def plain(page: str) -> str:
    return " ".join(" ".join(Reader(page).text).split())


class TestContent:
    def test_accuracy_loss_chance_and_best(self, root: Path) -> None:
        page = written(root)
        text = plain(page)
        for number in ("51.2 %", "73.5 %", "70.0 %", "25.0 %", "65–75", "0.488"):
            assert number in text, number
        best = re.findall(r'class="best">([^<]+)<', page)
        assert best[:3] == ["73.5 %", "70.0 %", "70.0 %"]  # by rows: text of branch_b, then mean and ground of merge

    def test_merge_against_the_mean_of_its_parts(self, root: Path) -> None:
        assert "The merge scores 70.0 %, the mean of its parts 56.2 % (+13.8 points)" in plain(written(root))

    def test_retrieval(self, root: Path) -> None:
        text = plain(written(root))
        assert "87.5 %" in text
        assert "of all 50 candidates" in text

    def test_zeroshot(self, root: Path) -> None:
        text = plain(written(root))
        assert "digit: 10 classes, 64 images" in text
        assert "62.5 %" in text

    def test_stages_in_the_order_of_the_pipeline(self, root: Path) -> None:
        assert [run.name for run in read_root(root).stages] == ["stage0", "branch_b", "branch_a"]
        text = plain(written(root))
        assert "vision, projector" in text
        assert "1 min 00 s" in text  # 30 steps of 2 s
        assert "30k" in text  # tokens of one run

    def test_curves_of_every_stage_and_source(self, root: Path) -> None:
        page = written(root)
        for title in ("Training loss", "Training loss by source", "Learning rate", "Gradient norm", "Tokens a second"):
            assert page.count(f"<figcaption>{title}") >= 3, title
        for title in (
            "Held-out loss by set",
            "Training loss by task",
            "Gradient norm by module",
            "Model FLOPs",
            "Balance",
        ):
            assert page.count(f"<figcaption>{title}") == 3, title
        assert page.count("Memory of the rank that has most") == 6  # caption and accessible name
        assert page.count("</span>device, peak</li>") == 0  # a CPU has none
        assert "1 update refused" in plain(page)
        assert "loss spike" not in plain(page)
        assert page.count("Retrieval within the batch") == 0  # no run has logged it
        assert page.count("</span>caption</li>") == 2
        assert "NaN" not in page

    def test_ledger_counts_all_ranks(self, root: Path) -> None:
        assert "2 x image cannot be decoded" in plain(written(root))

    def test_gallery_draws_expected_and_found_boxes(self, root: Path) -> None:
        page = written(root)
        assert '<rect class="expected" x="100.0" y="200.0" width="200.0" height="200.0"/>' in page
        assert '<rect class="found" x="600.0" y="700.0" width="200.0" height="200.0"/>' in page
        assert page.count("data:image/jpeg;base64,") == 1
        assert "branch_a says" in plain(page)


class TestSafety:
    def test_nothing_is_fetched(self, root: Path) -> None:
        page = written(root)
        assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
        assert "@import" not in page
        assert "url(" not in page
        assert all(address.startswith(("#", "data:image/")) for address in Reader(page).addresses)

    def test_texts_are_escaped(self, root: Path) -> None:
        page = written(root)
        assert "<script" not in page
        assert "&lt;script&gt;alert" in page

    def test_links_lead_somewhere(self, root: Path) -> None:
        reader = Reader(written(root))
        assert {address[1:] for address in reader.addresses if address.startswith("#")} <= reader.ids


class TestMissingParts:
    def test_single_run(self, root: Path) -> None:
        page = written(root / "branch_a")
        assert "branch_a" in plain(page)
        assert 'id="curves"' in page
        for absent in ("results", "retrieval", "zeroshot", "merge", "gallery"):
            assert f'id="{absent}"' not in page

    @pytest.mark.parametrize("part", ["evaluation", "merge", "pipeline.json", "stage0", "branch_a/metrics.jsonl"])
    def test_any_part_may_be_absent(self, root: Path, part: str) -> None:
        path = root / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        Reader(written(root))

    def test_evaluation_alone(self, root: Path) -> None:
        for run in ("stage0", "branch_a", "branch_b", "merge"):
            shutil.rmtree(root / run)
        page = written(root)
        assert "51.2 %" in plain(page)
        assert 'id="curves"' not in page

    def test_run_that_has_just_begun(self, root: Path) -> None:
        run = root / "stage0"
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.5, "step_s"')
        manifest = json.loads((run / "manifest.json").read_text())
        (run / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
        assert "No step has been logged yet" in plain(written(root))

    def test_shard_that_is_gone(self, root: Path) -> None:
        (root.parent / "heldout.tar").unlink()
        assert "is not here any more" in plain(written(root))

    def test_empty_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="holds no run"):
            write_report(tmp_path, tmp_path / "report.html")
        assert not (tmp_path / "report.html").exists()


def test_clock() -> None:
    assert [clock(s) for s in (0.04, 9.4, 9.5, 59.6, 200, 7500)] == [
        "0.04 s",
        "9.4 s",
        "10 s",
        "1 min 00 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
