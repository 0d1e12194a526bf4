"""Reports as they are opened: what is on a page, and what a browser makes of it."""

import csv
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
import yaml
from command import TINY, call

from dlops_dist.command_line import read_sweep
from dlops_dist.sweep.folder import SweepFolder

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = ["<script>boom()</script>", "a|b & 'c' \"d\"", "W" * 90, "n01443537 goldfish, Carassius auratus"]
LOOKS = """<script>
addEventListener("load", () => {
  const found = [], whole = document.documentElement, inside = (b, w, h) =>
    b.x > -1 && b.y > -1 && b.x + b.width < w + 1 && b.y + b.height < h + 1;
  for (const part of document.querySelectorAll("details")) part.open = true;
  for (const image of document.images) if (!image.naturalWidth) found.push("not loaded: " + image.alt);
  if (whole.scrollWidth > innerWidth) found.push("the page is as wide as " + whole.scrollWidth);
  for (const element of document.querySelectorAll("body *:not(svg *)")) {
    const scrolls = element.closest(".scrolls"), style = getComputedStyle(element);
    if (scrolls && scrolls !== element) continue;
    const box = element.getBoundingClientRect();
    if (box.right > innerWidth + 1 || box.left < -1) found.push("outside: " + element.outerHTML.slice(0, 90));
    if (!scrolls && style.display !== "inline" && element.scrollWidth > element.clientWidth + 1)
      found.push("cut off: " + element.outerHTML.slice(0, 90));
  }
  for (const text of document.querySelectorAll("svg text")) {
    const view = text.ownerSVGElement.viewBox.baseVal;
    if (!inside(text.getBBox(), view.width, view.height)) found.push("cut off: " + text.textContent);
  }
  for (const link of document.querySelectorAll("a[href^='#']"))
    if (!document.getElementById(link.getAttribute("href").slice(1))) found.push("leads nowhere: " + link.href);
  found.push(`${document.images.length} ${document.querySelectorAll("svg").length} ${innerWidth}`);
  parent.postMessage(JSON.stringify(found), "*");
});
</script></body>"""
FRAMED = """<!doctype html><pre id="found"></pre><script>
addEventListener("message", (event) => document.getElementById("found").textContent = event.data);
</script><iframe src="page.html" width="%d" height="900" style="border: 0"></iframe>"""


class Links(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found, self.tags = [], []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("href", "src")]


def third_seed(run, copy):
    """What another seed might have come to."""
    shutil.copytree(run, copy)
    config, metrics = copy / "config.yaml", copy / "metrics.jsonl"
    config.write_text(config.read_text().replace("seed: 1", "seed: 2"))
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps({**row, "test/top1": row["test/top1"] + 0.02}) + "\n" for row in rows))


def swept(folder, shards):
    """A sweep of two seeds for each of four rates, one of which failed."""
    given = ["--data.shards", str(shards), "--space", "optimizer.lr grid 0.01 0.1 1 10", "--seeds", "2"]
    sweep = read_sweep("q1", [*given, "--epochs", "3"])
    place = SweepFolder(folder, "q1", sweep)
    place.create()
    for number, settings in enumerate(place.known_trials()):
        (folder / settings.name).mkdir()
        (folder / settings.name / "config.yaml").write_text(yaml.safe_dump({"task": "q1", **settings.model_dump()}))
        rows = [{"epoch": n, "step": n, "val/top1": number / 10 + n / 100} for n in range(1, 4 - (number > 5))]
        (folder / settings.name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / settings.name / "ended.json").write_text(
        json.dumps({"failed": "the loss became <nan>", "stopped": False})
    )


@pytest.fixture(scope="module")
def reported(shapes_shards, tmp_path_factory):
    """Runs of two losses with three seeds each, a sweep, and their reports; classes are named in HTML."""
    folder = tmp_path_factory.mktemp("reported")
    shutil.copytree(shapes_shards, folder / "shards")
    manifest = json.loads((folder / "shards/manifest.json").read_text())
    manifest["classes"][: len(NASTY)] = NASTY
    (folder / "shards/manifest.json").write_text(json.dumps(manifest))
    data = ("--data.shards", folder / "shards", "--runs-dir", folder / "runs")
    for loss in ("ce", "triplet"):
        for seed in range(2):
            given = ("--loss", loss, "--seed", seed, "--name", f"{loss}-s{seed}", "--epochs", "2", "--log-every", "4")
            code, output = call("train", "q1", "--local", *data, *TINY, *given)
            assert code == 0, output
            assert (folder / f"runs/{loss}-s{seed}/report/index.html").is_file(), output
        third_seed(folder / f"runs/{loss}-s1", folder / f"runs/{loss}-s2")
    code, output = call("report", *(folder / f"runs/{loss}-s{seed}" for loss in ("ce", "triplet") for seed in range(3)))
    assert code == 0, output
    (folder / "runs/sweep").mkdir()
    swept(folder / "runs/sweep", folder / "shards")
    assert call("report", folder / "runs/sweep")[0] == 0
    return folder / "runs", output


PAGES = ["ce-s0/report/index.html", "triplet-s1/report/index.html", "report/index.html", "sweep/report/index.html"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_needs_nothing_else_and_its_links_lead_to_files(name, reported):
    page = reported[0] / name
    links = Links(page)
    assert "script" not in links.tags
    assert "link" not in links.tags
    files = [link for link in links.found if not link.startswith(("data:image/", "#"))]
    assert {"index.md", "index.csv"} <= set(files)
    for file in files:
        assert (page.parent / unquote(file)).is_file(), file


def test_a_runs_page_holds_what_is_to_be_known_of_it(reported):
    text = (reported[0] / "triplet-s1/report/index.html").read_text()
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles == ["Result", "By epoch", "By step", "Classes", "What is taken for what", "Map of the embeddings",
                      "Nearest neighbours", "Samples", "Settings"]  # fmt: skip
    for words in ("Parts of the loss", "Part of the triplets that are active", "Learning rate", "Norm of the gradient",
                  "Spread of the embeddings", "of the same class", "goldfish", "triplet.margin"):  # fmt: skip
        assert words in text, words
    assert all(html.escape(name) in text for name in NASTY[:3])
    assert (reported[0] / "triplet-s1/report/confusion.png").is_file()
    assert (reported[0] / "triplet-s1/report/classes.png").is_file()


def test_the_page_of_several_says_what_their_seeds_show(reported):
    runs, output = reported
    text, markdown = (runs / "report/index.html").read_text(), (runs / "report/index.md").read_text()
    for words in ("ce-s0", "mean of 3 seeds", "95 % interval", "ce - triplet", "What differs"):
        assert words in text, words
    assert "| ce | ce | 3 |" in markdown
    assert "By test top-1: ce" in " ".join(output.split())
    with (runs / "report/index.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["run"], line["seeds"]) for line in lines] == [("ce", "0 1 2"), ("triplet", "0 1 2")]
    assert 0 <= float(lines[0]["test/top1"]) <= 1
    assert (runs / "report/curves.png").is_file()


def test_the_page_of_a_sweep_ranks_its_points(reported):
    text = (reported[0] / "sweep/report/index.html").read_text()
    failed = "failed: the loss became &lt;nan&gt;"
    for words in ("3 of 4 points", "best point is optimizer.lr 1:", failed, "How the points learnt", "(seed 1)"):
        assert words in text, words
    with (reported[0] / "sweep/report/index.csv").open() as file:
        best = next(csv.DictReader(file))
    assert (best["optimizer.lr"], best["seeds"]) == ("1.0", "0 1")
    assert float(best["val/top1"]) == pytest.approx(0.45 + 0.03)
    assert len(best["runs"].split()) == 2


def test_tables_are_printed_for_programs_and_pages_go_where_they_are_wanted(reported, tmp_path):
    runs = [reported[0] / name for name in ("ce-s0", "triplet-s0")]
    code, output = call("report", *runs, "--format", "json", "--html", tmp_path / "both.html")
    assert code == 0, output
    read, _ = json.JSONDecoder().raw_decode(output)
    assert [record["run"] for record in read] == ["ce-s0", "triplet-s0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.csv", "both.html", "both.md", "both_files"]
    code, output = call("report", *runs, "--html", "/proc/page.html")
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "name a file elsewhere" in output


def test_what_cannot_be_written_fails_no_run_and_what_is_gone_is_said(reported, shapes_shards, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report").write_text("in the way")
    data = ("--data.shards", shapes_shards, "--runs-dir", tmp_path, "--name", "run", "--epochs", "1")
    code, output = call("train", "q1", "--local", *data, *TINY)
    assert code == 0, output
    assert "File exists" in output
    assert "report: none: report: " in output
    assert output.splitlines()[-1].startswith("result: q1 ce after 1 epochs: test loss ")
    for wrong, words in {"run": "cannot be written to", "typo": "is not a run"}.items():
        code, output = call("report", tmp_path / wrong)
        assert (code, "Traceback" in output) == (2, False), output
        assert words in output.splitlines()[-1]
    assert not (tmp_path / "typo").exists()

    shutil.copytree(reported[0] / "ce-s0", tmp_path / "moved")
    (tmp_path / "moved/report/gallery.npz").write_bytes(b"damaged")
    config = tmp_path / "moved/config.yaml"
    config.write_text(config.read_text().replace(str(reported[0].parent / "shards"), str(tmp_path / "gone")))
    code, output = call("report", tmp_path / "moved")
    assert code == 0, output
    assert (
        f"No test images are shown: data.shards: {tmp_path / 'gone'}"
        in (tmp_path / "moved/report/index.html").read_text()
    )
    config.write_text(config.read_text().replace(str(tmp_path / "gone"), str(reported[0].parent / "shards")))
    code, output = call("report", tmp_path / "moved")
    assert code == 0, output
    assert "its result looks at test images" in output
    assert "Nearest neighbours" in (tmp_path / "moved/report/index.html").read_text()


def seen_in_a_browser(text, width, folder):
    """(what is wrong with a page, how many pictures and drawings it has), in a frame: no window is as narrow as a
    phone's."""
    (folder / "page.html").write_text(text.replace("</body>", LOOKS))
    (folder / "frame.html").write_text(FRAMED % width)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    flags += ["--window-size=1600,1000", "--virtual-time-budget=9000", "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run([BROWSER, *flags], capture_output=True, timeout=120, check=True)
    (told,) = re.findall('<pre id="found">(.*?)</pre>', done.stdout.decode(), re.DOTALL)
    *found, counts = json.loads(html.unescape(told))
    images, drawings, seen = map(int, counts.split())
    assert seen == width
    return found, images, drawings


in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here")


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("name", PAGES)
def test_in_a_browser_every_picture_loads_and_no_text_is_cut_off(name, width, reported, tmp_path):
    found, images, drawings = seen_in_a_browser((reported[0] / name).read_text(), width, tmp_path)
    assert found == []
    least = {"report": (0, 5), "sweep": (2, 1)}.get(name.split("/")[0], (50, 5))
    assert images >= least[0]
    assert drawings >= least[1]


@pytest.mark.slow
@in_a_browser
def test_the_browser_tells_what_is_wrong(tmp_path):
    wrong = "<img alt=x src='data:image/png;base64,AA'><p style='width: 900px'>wide</p><a href='#none'>link</a>"
    wrong += (
        "<p style='overflow: hidden; width: 2em'>Donaudampfschiff</p><svg viewBox='0 0 9 9'><text>long</text></svg>"
    )
    found, *_ = seen_in_a_browser(f"<!doctype html><body>{wrong}</body>", 390, tmp_path)
    begins = ["not loaded: x", "the page is as wide", "outside: <p", "cut off: <p", "cut off: long", "leads nowhere: "]
    assert all(any(text.startswith(begin) for text in found) for begin in begins), found
