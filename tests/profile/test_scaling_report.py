"""The page of a study: whole, without errors, from nothing but itself, with the numbers of the CSV; in a real browser where there is one."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from prottrans_hpc.errors import CheckpointError, DataError
from prottrans_hpc.profile.scaling_stage import report

SAMPLE = Path(__file__).with_name("scaling.json")
PROJECTION = {
    "points": [
        {"nodes": 936, "step_s": 1.12, "overhead": 0.12, "overhead_low": 0.08, "overhead_high": 0.15, "efficiency": 0.893},
        {"nodes": 64, "step_s": 1.1, "overhead": 0.11, "efficiency": 0.9},
    ],
    "fit": {"text": "ring"},
    "hold_out": {"nodes": 8, "predicted_s": 0.98, "measured_s": 1.0, "error": -0.02},
    "assumptions": ["links stay <as> they are"],
    "warnings": ["few sizes"],
}
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
VOID = {"meta", "img", "br", "link", "input", "hr"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A report of drawn numbers, with a projection."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copy(SAMPLE, folder)
    (folder / "projection.json").write_text(json.dumps(PROJECTION))
    report({"out": str(folder)})
    return folder


class Page(HTMLParser):
    """A page that must be well formed: its tables by id, its elements, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._table: list[list[str]] | None = None
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs).get("id", "unnamed"), [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"
        if tag == "table":
            self._table = None

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th") and self._table is not None:
            self._table[-1][-1] += data
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def check_numbers(page: Page, folder: Path) -> None:
    """What the page shows is what the CSV says, to the character."""
    with (folder / "scaling.csv").open(newline="") as file:
        assert page.tables["measured"] == list(csv.reader(file))
    assert [row[0] for row in page.tables["projected"]] == ["nodes", "64", "936"]
    inline = json.loads(next(script for script in page.scripts if script.startswith("{")))
    assert [float(row[2]) for row in page.tables["measured"][1:]] == [pytest.approx(row["step_s"], rel=1e-4) for row in inline["rows"]]


def test_the_page_is_well_formed_and_shows_the_numbers_of_the_csv(folder):
    page = Page((folder / "report.html").read_text())
    check_numbers(page, folder)
    ids = [attributes["id"] for _, attributes in page.attributes if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "n6 (node 5 of 8): 15 % slower" in (folder / "report.html").read_text()
    assert page.tables["projected"][2] == ["936", "1.12", "0.12", "0.08", "0.15", "0.893"]
    for said in ("an error of -2.0 %", "Assumed: links stay &lt;as&gt; they are.", "Beware: few sizes."):
        assert said in (folder / "report.html").read_text()


def test_the_page_loads_nothing(folder):
    page = Page((folder / "report.html").read_text())
    for _, attributes in page.attributes:
        for name in ("src", "href", "action", "data", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", (folder / "report.html").read_text())


def test_the_pictures_tell_measured_from_projected(folder):
    images = [attributes for tag, attributes in Page((folder / "report.html").read_text()).attributes if tag == "img"]
    assert [image["alt"] for image in images] == ["overhead", "throughput", "ledger", "ledger-share"]
    for image in images:
        svg = base64.b64decode((image["src"] or "").partition("base64,")[2])
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert (b"stroke-dasharray" in svg) == (image["alt"] in ("overhead", "throughput"))
    for name in ("overhead", "throughput", "ledger"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_opens_in_a_browser_without_script_errors(folder, tmp_path):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("NO BROWSER, so the report is not opened in one: `scripts/browser.sh` installs it")
    # The page runs its script and then this one, which uses the button and says what came of it.
    text = (folder / "report.html").read_text()
    probe = """<script>
    const toggle = document.getElementById("ledger-toggle"), found = document.documentElement.dataset;
    toggle.click();
    found.toggled = ["ledger-seconds", "ledger-share"].map((id) => document.getElementById(id).hidden) + " " + toggle.textContent;
    found.broken = [...document.images].filter((image) => !image.complete || !image.naturalWidth).length;
    </script></body>"""
    watch = "<head><script>addEventListener('error', (event) => { document.documentElement.dataset.error = event.message || 'not loaded'; }, true);</script>"
    page = tmp_path / "page.html"
    page.write_text(text.replace("<head>", watch, 1).replace("</body>", probe))
    options = [
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000",
        "--dump-dom",
    ]
    done = subprocess.run([browser, "--headless", *options, page.as_uri()], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    shown = Page(done.stdout)
    root = next(attributes for tag, attributes in shown.attributes if tag == "html")
    assert root == {"lang": "en", "data-ready": "yes", "data-toggled": "true,false Show seconds", "data-broken": "0"}
    assert "4 measured sizes, 2 projected." in done.stdout
    check_numbers(shown, folder)


def test_a_report_is_the_same_whenever_it_is_made(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report({"out": str(folder)})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_names_cannot_break_out_of_the_page(tmp_path):
    values = json.loads(SAMPLE.read_text())
    values["recipe"] = values["points"][0]["run_dir"] = "</script><script>alert(1)</script>"
    (tmp_path / "scaling.json").write_text(json.dumps(values))
    report({"out": str(tmp_path)})
    assert len(Page((tmp_path / "report.html").read_text()).scripts) == 2
    assert "projected" not in Page((tmp_path / "report.html").read_text()).tables


def test_what_is_no_study_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="no scaling study"):
        report({"out": str(tmp_path)})
    shutil.copy(SAMPLE, tmp_path)
    (tmp_path / "projection.json").write_text('{"points": [{"nodes": 4}]}')
    with pytest.raises(DataError, match="project-scaling"):
        report({"out": str(tmp_path)})
