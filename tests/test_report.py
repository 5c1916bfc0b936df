"""report.html: of a plan, of a run, of both; what is in it, and how a browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers.ranks import run_on_ranks
from helpers.runs import train, working_in, write_run
from titan_ulysses.__main__ import run
from titan_ulysses.checkpoint.folder import exported_step
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.observability import pictures, report_page
from titan_ulysses.observability.metrics import MetricsLogger
from titan_ulysses.observability.run_page import write_run_page
from titan_ulysses.observability.run_pictures import loss_label, read_runs
from titan_ulysses.plan import report
from titan_ulysses.plan.planner import Plan, Setup, make_plan
from titan_ulysses.plan.search import SearchResult

pytest.importorskip("matplotlib")
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


class Outline(HTMLParser):
    """What is in a page: figures, headings, ids, and whatever it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures, self.ids, self.loads, self.open = 0, [], [], []
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.figures += tag == "figure"
        if tag == "svg":
            self.labels.append(found["aria-label"] or "")
        if "id" in found:
            self.ids.append(found["id"])
        links = (found.get(key) or "" for key in ("src", "href", "xlink:href", "data"))
        self.loads += [link for link in links if link and not link.startswith(("#", "data:"))]
        if tag in ("script", "iframe"):
            self.loads.append(tag)
        if tag not in ("meta", "link"):  # which HTML does not close
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(path: Path) -> Outline:
    """The outline of a page that is whole, loads nothing, and has no id twice."""
    text = path.read_text()
    found = Outline(text)
    assert not found.open and not found.loads
    assert len(found.ids) == len({*found.ids})
    # What refers to an id, as clips do, finds it.
    used = re.findall(r'(?:url\(#|href="#)([^)"]+)', text)
    assert used and {*used} <= {*found.ids}
    return found


def few(setup: Setup, first: Plan | SearchResult | None) -> Iterator[SearchResult]:
    """In place of a search and of a ladder, which take longer than such a test may."""
    plan = first if isinstance(first, Plan) else make_plan(setup)
    yield SearchResult("as configured", {}, plan)
    yield SearchResult("+ offload", {"activation_checkpoint.offload": "host"}, plan)
    yield SearchResult("+ nothing", {}, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plan with all that can be asked, and then of a run, on two ranks."""
    place = tmp_path_factory.mktemp("report")
    config = write_run(place)
    with working_in(place), pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "search", few)
        patch.setattr(report, "ladder", few)
        run(["--config", str(config), "--plan", "--plan.ladder", "--plan.search", "longest"])
    shutil.copy(place / "outputs/run/report.html", place / "plan_alone.html")
    more = {"metrics.enable_report": True, "training.steps": 3, "validation.enable": True}
    more |= {"validation.interval": 1, "checkpoint.enable": False}
    more |= {"parallelism.data_parallel_shard_degree": 2}
    run_on_ranks(2, train, config, more)
    return place


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (tmp_path / "outputs/run/report.html").mkdir(parents=True)
    more = {"metrics.enable_report": True, "training.steps": 3, "checkpoint.export": True}
    run_on_ranks(1, train, config, more)
    assert exported_step(tmp_path / "outputs/run/export") == 3
    assert not [*(tmp_path / "outputs/run").glob(".report*")]


def test_the_page_of_a_plan(folder: Path) -> None:
    found = outline(folder / "plan_alone.html")
    assert found.labels[0].startswith("By part, over the planned time")
    assert found.figures == 4 and len(found.labels) == 4
    text = (folder / "plan_alone.html").read_text()
    values = json.loads((folder / "outputs/run/plan.json").read_text())
    assert values["fits"] and "It fits. What binds:" in text
    for one in values["ladder"] + values["search"]:
        assert f"<td>{one['what']}</td>" in text
    assert f"{values['longest_seq_len']:,} tokens" in text
    assert "optimizer state" in text and "[training]" in text


def test_a_run_adds_its_section_and_keeps_that_of_the_plan(folder: Path) -> None:
    path = folder / "outputs/run/report.html"
    found, text = outline(path), path.read_text()
    plan = (folder / "plan_alone.html").read_text()
    section = plan[plan.index('<section id="plan">') : plan.index("<!-- end of plan -->")]
    assert section in text and text.index('id="run"') < text.index('id="plan"')
    lines = [json.loads(x) for x in (folder / "outputs/run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert f"{losses[0]:.4f}, {losses[-1]:.4f}" in text
    assert found.figures == 9, found.labels  # loss, position, speed, memory, balance; the plan's
    assert any("spread evenly" in label for label in found.labels)
    # Again: the same page.
    write_run_page(folder / "outputs/run")
    assert path.read_text() == text


def test_a_page_that_is_damaged_is_written_anew(folder: Path, tmp_path: Path) -> None:
    (tmp_path / report_page.PAGE).write_bytes(b"\xff<section id='plan'>")
    section = report_page.PageSection("run")
    section.text("1 < 2 & <b>bold</b>")
    section.table(["a", "b", "c"], [["x", "1", "z" * 201], ["<y>", "22", ""]])
    written = report_page.write_page(tmp_path, section, title="<job>").read_text()
    assert "1 &lt; 2 &amp; &lt;b&gt;bold" in written and "<h1>&lt;job&gt;</h1>" in written
    assert '<td class="number">22</td>' in written and "<td>&lt;y&gt;</td>" in written
    assert f'<td class="long">{"z" * 201}</td>' in written
    assert not Outline(written).open


def log(folder: Path, *lines: dict[str, Any]) -> str:
    """Write the metrics of a run, step after step, and return its page."""
    logger = MetricsLogger(folder, steps_done=0, total_steps=9, console=Console(quiet=True))
    known = {"grad_norm": 1.0, "lr": 1.0, "tokens_per_second": 1.0, "peak_memory_gib": 1.0}
    for step, line in enumerate(lines):
        logger.log(step, {**(known | {"mfu": None} if "loss" in line else {}), **line})
    logger.close()
    return write_run_page(folder).read_text()


def test_a_run_of_pairs_has_their_rewards(tmp_path: Path) -> None:
    """A loss of pairs is not one of tokens."""
    pairs = [{"margins": 0.25, "accuracies": 0.5}, {"margins": 1.5, "accuracies": 1.0}]
    text = log(
        tmp_path,
        {"validation_loss": 0.6, "validation_rewards": pairs[0]},
        {"loss": 0.5, "rewards": pairs[0]},
        {"loss": 0.25, "rewards": pairs[1]},
    )
    assert "<td>rewards, first and last: margins</td><td" in text
    assert ">0.2500, 1.5000</td>" in text and ">0.5000, 1.0000</td>" in text
    assert "validation rewards, first and last: margins" in text
    of_pairs = read_runs([tmp_path])
    assert loss_label(of_pairs) == "loss, nats a pair"
    of_tokens = {"other": [{"step": 1, "loss": 1.0}]}
    assert loss_label(of_tokens) == "loss, nats a token"
    assert loss_label(of_pairs | of_tokens) == "loss"


def test_several_runs_are_compared_and_linked(tmp_path: Path) -> None:
    """And the page of a run has its data and its samples."""
    from titan_ulysses.tools.report import main

    held_out = {"validation_loss": 3.0, "validation_by_position": [[0, 3.0, 1]]}
    for name, loss in (("a b", 2.0), ("<c>", float("nan"))):
        samples = {"validation_samples": {"Once": " upon\n<a> time"}}
        mixture = {"epoch": {"books": 0.25, "code": 1.5}, "loss_by_source": {"books": 2.0}}
        (tmp_path / name).mkdir()
        text = log(tmp_path / name, held_out | samples, {"loss": loss} | mixture)
        assert "<td>books</td>" in text and ">1.500</td>" in text
        assert "<td>&quot; upon\n&lt;a&gt; time&quot;</td>" in text
    folders = [str(tmp_path / name) for name in ("a b", "<c>")]
    with pytest.raises(UserError, match="name one with --output FOLDER"):
        main(folders)
    main([*folders, "--output", str(tmp_path / "both")])
    text = (tmp_path / "both/report.html").read_text()
    assert '<a href="../a%20b/report.html">a b</a>' in text and text.count("<figure") == 4
    assert '<a href="../%3Cc%3E/report.html">&lt;c&gt;</a>' in text and "not finite" in text
    assert "prefers-color-scheme: dark" in text


def test_numbers_that_are_not_finite_are_null_wherever_they_are(tmp_path: Path) -> None:
    """Other programs read the file, and the page leaves them out."""
    ranges = [(0, float("nan"), 3), (1, 2.5, 3)]
    nothing = {"validation_loss": float("nan"), "validation_by_position": ranges[:1]}
    text = log(
        tmp_path,
        nothing,
        {"loss": float("inf"), "rewards": {"margins": float("nan")}},
        {"validation_loss": 2.5, "validation_by_position": ranges},
    )

    def refuse(name: str) -> None:
        raise AssertionError(name)

    file = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=refuse) for line in file]
    assert lines[1]["rewards"] == {"margins": None}
    assert lines[2]["validation_by_position"] == [[0, None, 3], [1, 2.5, 3]]
    assert ">2.5000</td>" in text and "not finite" in text


def test_without_matplotlib_the_page_has_its_tables(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("metrics.jsonl", "config.toml"):
        shutil.copy(folder / "outputs/run" / name, tmp_path / name)
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    text = write_run_page(tmp_path).read_text()
    assert "matplotlib is not installed" in text and "<svg" not in text and "<table>" in text


def test_a_browser_draws_every_figure(folder: Path, tmp_path: Path) -> None:
    """In a headless browser: nothing on its console, and each figure has its size and is not blank.

    A copy of the page tells its own figures' sizes; the picture of the screen is kept.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no headless browser: none of {', '.join(BROWSERS)} is installed")
    text = (folder / "outputs/run/report.html").read_text()
    probe = (
        "<pre id='sizes'></pre><script>document.getElementById('sizes').textContent = "
        "JSON.stringify([...document.querySelectorAll('figure svg')].map(s => {const b = "
        "s.getBoundingClientRect(); const d = [...s.querySelectorAll('path,use')].filter(p => "
        "{const r = p.getBoundingClientRect(); return r.width + r.height > 1}).length; return "
        "[b.width, b.height, d]}))</script></body>"
    )
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe))
    options = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path}/profile", "--window-size=1100,6000", "--v=0"]
    done = subprocess.run(
        [*options, "--dump-dom", f"file://{tmp_path}/probe.html"],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    sizes = json.loads(re.search(r"<pre id=.sizes.>(.*?)</pre>", done.stdout)[1])
    assert len(sizes) == outline(folder / "outputs/run/report.html").figures
    for width, height, drawn in sizes:
        assert width > 500 and height > 60 and drawn > 10
