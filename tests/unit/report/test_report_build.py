"""The report as a whole: what the page holds, what it leaves out, and that foreign text stays text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_run import EVIL, LocalFiles, make_run

from pocl_ray.errors import StorageError
from pocl_ray.report.build import build_report

_VOID = {"meta", "link", "br", "img", "hr", "input"}


class _Outline(HTMLParser):
    """Collects ids, tags and attributes, and checks that tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in _VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def _outline(page: str) -> _Outline:
    outline = _Outline()
    outline.feed(page)
    assert not outline.open
    return outline


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> LocalFiles:
    files = make_run(tmp_path_factory.mktemp("whole"), num_rows=512)
    assert build_report(files) == files.uri_of("report.html")
    return files


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the figures, but spare their rendering, where a test looks at the text alone."""
    from pocl_ray.report import plots

    def stub(name: str, title: str, figure: object) -> plots.Plot:
        return plots.Plot(name, title, "<svg></svg>", b"")

    monkeypatch.setattr(plots, "render", stub)


def _page(files: LocalFiles) -> str:
    return files.read_bytes("report.html").decode()


def _without(files: LocalFiles, *names: str) -> LocalFiles:
    for name in names:
        (files.root / name).unlink()
    return files


def test_whole_run_has_every_section_and_every_plot(whole: LocalFiles) -> None:
    outline = _outline(_page(whole))
    assert {"results", "training", "difficulty", "examples", "pipeline", "setup"} <= set(outline.ids)
    names = {path.stem for path in (whole.root / "plots").iterdir()}
    assert {"evaluation", "stage_rows", "stage_settings", "dev_rouge_l", "dev_ce_loss", "dev_kd_loss"} <= names
    assert {"train_loss", "train_kd_loss", "train_ce_loss", "topics", "difficulty_rouge_l"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (whole.root / "plots").iterdir())


def test_page_asks_nothing_of_the_outside_and_runs_no_script(whole: LocalFiles) -> None:
    page = _page(whole)
    outline = _outline(page)
    assert "script" not in outline.tags
    assert all(link.startswith(("#", "data:")) for link in outline.links)
    assert "http://" not in page and "https://" not in page
    assert "url(" not in re.sub(r"url\(#[^)]+\)", "", page)


def test_ids_are_unique_and_every_reference_inside_the_page_leads_somewhere(whole: LocalFiles) -> None:
    page = _page(whole)
    outline = _outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    targets = {link[1:] for link in outline.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", page))
    assert targets <= set(outline.ids)


def test_drawings_follow_the_theme(whole: LocalFiles) -> None:
    drawings = re.findall(r"<svg.*?</svg>", _page(whole), flags=re.DOTALL)
    assert len(drawings) >= 12
    for drawing in drawings:
        colours = set(re.findall(r"#[0-9a-f]{6}\b", " ".join(re.findall(r'style="[^"]*"', drawing))))
        assert not colours, f"{colours} would stay as they are in the dark"


def test_markdown_refers_to_plots_that_exist(whole: LocalFiles) -> None:
    links = re.findall(r"\]\((plots/[^)]+)\)", whole.read_bytes("report.md").decode())
    assert len(links) >= 12
    assert all(whole.exists(link) for link in links)


def test_headline_is_honest_whichever_side_wins(whole: LocalFiles) -> None:
    page = _page(whole)
    assert re.search(r"POCL is ahead by [\d.]+\s±\s[\d.]+ in sampled ROUGE-L", page)
    assert "behind by 3.60 in greedy ROUGE-L" in page


def test_rejects_are_counted_by_reason(whole: LocalFiles) -> None:
    page = _page(whole)
    assert re.search(r'empty output</td><td class="clip">train.jsonl</td><td class="n">2</td><td class="n">203', page)


def test_text_of_rows_topics_rejects_and_config_never_becomes_markup(tmp_path: Path) -> None:
    files = make_run(tmp_path, num_rows=64)
    table = pa.ipc.open_file(files.read_bytes("rows/train.arrow")).read_all()
    columns = {
        "id": table.column("id"),
        "topic": pa.array([EVIL if i % 2 else "</text><img src=x>" for i in range(64)]),
        "prompt": pa.array([f"{i}\n{EVIL}" for i in range(64)]),
        "references": pa.array([["</pre><script>alert(1)</script>\n```\n# heading"] for _ in range(64)]),
    }
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.table(columns).schema) as writer:
        writer.write_table(pa.table(columns))
    files.write_bytes("rows/train.arrow", sink.getvalue().to_pybytes())
    files.write_text("config.yaml", files.read_bytes("config.yaml").decode() + "# <script>alert(2)</script>\n")
    files.write_text("rejects.jsonl", json.dumps({"source": "<b>", "row": 1, "reason": EVIL + "\ud800"}) + "\n")
    build_report(files)
    page = _page(files)
    outline = _outline(page)
    assert "script" not in outline.tags and "img" not in outline.tags
    assert "&lt;script&gt;alert(1)" in page and "&lt;script&gt;alert(2)" in page
    report = files.read_bytes("report.md").decode()
    unindented = [line for line in report.splitlines() if not line.startswith("    ")]
    assert not any("<script" in line or "<b>" in line for line in unindented)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("gone", "step", "section"),
    [
        (("evaluation.json",), "evaluation", "results"),
        (("scores.parquet",), "scores", "difficulty"),
        (("metrics.jsonl", "control/metrics.jsonl", "plan.json"), "distill", "training"),
        (("manifest.json",), "", "pipeline"),
        (("rows/train.arrow",), "rows", "examples"),
    ],
)
def test_section_of_a_step_that_was_not_run_is_left_out_and_named(
    tmp_path: Path, gone: tuple[str, ...], step: str, section: str
) -> None:
    files = _without(make_run(tmp_path, num_rows=64), *gone)
    build_report(files)
    page = _page(files)
    assert section not in _outline(page).ids
    assert f"#{section}" not in page
    if step:
        assert f"<code>{step}</code>" in page


def test_scores_alone_make_a_report_without_buckets(tmp_path: Path) -> None:
    files = make_run(tmp_path, num_rows=64)
    for path in sorted(files.root.rglob("*")):
        if path.is_file() and path.name != "scores.parquet":
            path.unlink()
    build_report(files)
    page = _page(files)
    assert "not divided into buckets yet" in page and "all rows" in page


@pytest.mark.usefixtures("undrawn")
def test_empty_run_directory_gives_a_page_that_says_so(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    build_report(files)
    assert "neither environment.json nor config.yaml" in _page(files)


@pytest.mark.usefixtures("undrawn")
def test_run_without_control_topics_and_with_one_stage(tmp_path: Path) -> None:
    files = make_run(tmp_path, num_rows=64, num_stages=1, topics=False, control=False)
    text = files.read_bytes("config.yaml").decode().replace("control: {}\n", "")
    files.write_text("config.yaml", text)
    build_report(files)
    page = _page(files)
    assert "plain KD" not in page and "Topics by bucket" not in page
    assert "Left out" not in page


@pytest.mark.usefixtures("undrawn")
def test_many_sets_are_tallied_and_all_in_the_table(tmp_path: Path) -> None:
    files = make_run(tmp_path, num_rows=64, num_sets=5)
    build_report(files)
    page = _page(files)
    assert "Over all 5 sets, POCL against plain KD: sampled ROUGE-L, ahead on 5, level on 0, behind on 0" in page
    assert "greedy ROUGE-L, ahead on 0, level on 0, behind on 5" in page
    assert len(re.findall(r'<tr class="own">', page)) == 5


def test_values_that_are_not_finite_are_drawn_around_and_reported(tmp_path: Path) -> None:
    files = make_run(tmp_path, num_rows=128)
    lines = [json.loads(line) for line in files.read_bytes("metrics.jsonl").decode().splitlines()]
    for line, value in zip([x for x in lines if "train/loss" in x], (float("nan"), float("inf"), None), strict=False):
        line["train/loss"] = value
    files.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    scores = pq.read_table(files.root / "scores.parquet").to_pydict()
    scores["ce_loss"][:3] = [float("nan"), float("inf"), None]
    scores["teacher_ce_loss"] = [float("nan")] * 128
    pq.write_table(pa.table(scores), files.root / "scores.parquet")
    sets = json.loads(files.read_bytes("evaluation.json"))["sets"]
    sets["dev"]["teacher"]["rouge_l"] = {"mean": None, "std": float("nan"), "by_seed": {}}
    files.write_json("evaluation.json", {"sets": sets})
    build_report(files)
    page = _page(files)
    assert "3 optimizer steps of the distillation logged a training loss that is not finite" in page
    assert "3 rows without a finite value" in page
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL), flags=re.IGNORECASE)


def test_hundred_thousand_rows_stay_a_small_page(tmp_path: Path) -> None:
    files = make_run(tmp_path, num_rows=2_000)
    rng, n = np.random.default_rng(1), 100_000
    scores = {"id": np.arange(n), "rank": rng.permutation(n) + 1, "rouge_l": rng.random(n), "ce_loss": rng.random(n)}
    pq.write_table(pa.table(scores), files.root / "scores.parquet")
    build_report(files)
    assert len(_page(files)) < 1_500_000


@pytest.mark.usefixtures("undrawn")
def test_torn_last_line_of_metrics_is_forgiven_and_a_broken_file_named(tmp_path: Path) -> None:
    files = make_run(tmp_path, num_rows=64)
    files.write_bytes("metrics.jsonl", files.read_bytes("metrics.jsonl") + b'{"step": 99, "train/lo')
    build_report(files)
    files.write_text("evaluation.json", "{")
    with pytest.raises(StorageError, match=r"/evaluation\.json: cannot be read, it is damaged .*; delete it to"):
        build_report(files)
