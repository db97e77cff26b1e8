"""Claims about the report: one page that needs nothing else, says what the artifacts say, and survives odd text."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from pipelines.console import charts
from pipelines.inference.generator import GenerateSettings
from pipelines.stages import evaluate, export, report
from tests.stages.conftest import artifact
from tests.stages.grouping import by_kind, scored

pytestmark = pytest.mark.slow

VOID = {"meta", "br", "link", "img", "input", "hr"}


@pytest.fixture(scope="module")
def finished(small_run, tmp_path_factory, in_process):
    """The small run with evaluation, export and training logs: what the report is handed."""
    root = tmp_path_factory.mktemp("finished")
    made = dict(small_run)
    samples = evaluate.SampleSettings(
        prompts=("def ",), questions=("<script>alert(1)</script>",), generation=GenerateSettings(max_new_tokens=8)
    )
    settings = evaluate.EvaluateSettings(max_documents=2, bootstrap_resamples=20, tasks=("next_line",), samples=samples)
    stages = {
        "evaluate": (evaluate, settings),
        "export": (export, export.ExportSettings(sample_documents=1, generated_tokens=4)),
    }
    for name, (stage, chosen) in stages.items():
        out_dir = root / name
        out_dir.mkdir()
        metrics = stage.run(chosen, (scored if stage is evaluate else by_kind)(small_run), out_dir, in_process(out_dir))
        made[name] = artifact(name, out_dir, metrics)
    for name in ("pretrain", "finetune"):
        rows = [
            {"step": n, "tokens": n * 1024, "loss": 8 * n**-0.2, "lr": 1e-3 * (1 - n / 800), "grad_norm": 1.0}
            for n in range(1, 801)
        ]
        folder = root / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        manifest = {
            "metrics": {
                "warnings": [f"{name} diverged <b>early</b>"],
                "tokens": 819_200,
                "parameters": 5_012_345,
                "tokens_per_second": 5200.0,
                "loss": 2.1,
            },
            "inputs": {"shards": {"digest": "ab" * 32}},
            "files": {"model/model.safetensors": {"bytes": 20_000_000}, "metrics.jsonl": {"bytes": 80_000}},
            "identity": {"settings": {"lr": 1e-3}},
            "seconds": 93.4,
            "content_digest": "cd" * 32,
            "commit": "0123456789abcdef",
        }
        made[name] = replace(small_run[name], url=str(folder), manifest=manifest)
    out_dir = root / "report"
    out_dir.mkdir()
    report.run(report.ReportSettings(title="A run"), by_kind(made), out_dir, in_process(out_dir))
    return made, (out_dir / "report.html").read_text()


class Balance(HTMLParser):
    """Notices a tag that is closed without being open, or left open."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids = [], [], set()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [found[name] for name in ("href", "src") if name in found]
        self.ids.add(found.get("id"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass


def test_the_page_is_one_well_formed_file_that_refers_to_nothing_outside(finished):
    _, page = finished
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert parser.links
    assert all(link.startswith("#") and link[1:] in parser.ids for link in parser.links)
    assert "<script" not in page
    assert not re.search(r"https?://|@import|url\(", page)


def test_the_page_says_what_the_artifacts_say(finished):
    made, page = finished
    metrics = made["evaluate"].metrics
    for value in (metrics["bits_per_byte"], metrics["gzip_bits_per_byte"], metrics["finetuned_bits_per_byte"]):
        assert f"{value:.3f}" in page
    for text in (
        "A run",
        "5.01 M",
        "1 min 33 s",
        "next_line",
        "pretrain:</b> pretrain diverged &lt;b&gt;early",
        "&lt;script&gt;alert(1)",
        "&#34;lr&#34;: 0.001",
    ):
        assert text in page
    samples = json.loads((made["evaluate"].path / "samples.json").read_text())
    assert set(samples) == {"base", "finetuned"}
    card = json.loads((made["corpus"].path / "card.json").read_text())
    assert f"{card['train_documents']:,}" in page


def test_equal_artifacts_give_equal_pages(finished, tmp_path, in_process):
    made, page = finished
    report.run(report.ReportSettings(title="A run"), by_kind(made), tmp_path, in_process(tmp_path))
    assert (tmp_path / "report.html").read_text() == page


def test_a_run_without_finetuning_or_evaluation_has_a_report_too(small_run, tmp_path, in_process):
    inputs = {name: small_run[name] for name in ("corpus", "tokenizer")}
    report.run(report.ReportSettings(), by_kind(inputs), tmp_path, in_process(tmp_path))
    assert "Lineage" in (tmp_path / "report.html").read_text()


def test_a_run_with_a_failed_step_has_a_report_that_says_which(small_run, tmp_path, in_process):
    settings = report.ReportSettings(title="A run").without({"export": "no template <|x|> here", "extra": "not made"})
    report.run(
        settings, by_kind({name: small_run[name] for name in ("corpus", "tokenizer")}), tmp_path, in_process(tmp_path)
    )
    page = (tmp_path / "report.html").read_text()
    assert "What failed" in page and "no template &lt;|x|&gt; here" in page
    parser = Balance()
    parser.feed(page)
    assert parser.open == []


def test_whom_the_model_beats_is_told_by_the_interval_of_the_difference_and_not_without_one():
    def scored(low):
        return {"bits_per_byte": {"value": 2.0}, "worse_by": {"value": 0.1, "low": low, "high": 0.3}}

    assert report.verdict({"gzip": scored(0.05), "xz": scored(-0.01)})[1:] == ("gzip", "gzip 2.00, xz 2.00")
    assert report.verdict({"gzip": scored(-0.01)})[1] == "none of them"
    assert report.verdict({"gzip": scored(None)})[1] == "no verdict"
    assert report.between({"x_low": 1.0, "x_high": 2.0}, "x") == "95 % interval 1.000 – 2.000"
    assert "no interval" in report.between({}, "x")


def test_the_page_of_one_document_claims_no_interval_and_shows_chance(finished):
    _, page = finished  # evaluated on two documents
    assert "No intervals, and so no verdict: 2 documents, and an interval takes at least 5" in page
    assert "no verdict" in page and "95 % interval" not in page
    assert re.search(r"next_line</td><td>acc</td>.*<td class=\"n\">0\.25</td>", page)


def test_ticks_are_round_and_inside_the_range():
    assert charts.ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert charts.ticks(1.93, 2.31, 5) == pytest.approx([2.0, 2.1, 2.2, 2.3])
    assert len(charts.ticks(0.9e-4, 1.1e-4, 5)) >= 2


def test_a_long_run_is_drawn_with_few_points_and_its_last():
    xs = list(range(100_000))
    thin_xs, thin_ys = charts.thinned(xs, [float(x) for x in xs])
    assert len(thin_xs) <= charts.POINTS
    assert thin_xs[-1] == 99_999
    assert thin_ys == sorted(thin_ys)


def test_a_loss_that_is_not_a_number_leaves_a_gap_and_no_broken_picture():
    drawn = charts.curves([charts.Curve(xs=[1, 2, 3], ys=[2.0, math.nan, 1.0], style="raw")], label="loss")
    assert "nan" not in drawn
    assert charts.smoothed([2.0, math.nan, 2.0], 3) == pytest.approx([2.0, 2.0, 2.0])
    assert "No points" in charts.curves([], label="nothing")
