"""The page as a reader's browser shows it, and the pictures as pixels."""

import html.parser
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from dip_jax import config
from dip_jax.reporting import figures, report
from dip_jax.sampling import trajectories

NAMES = ["astronaut", "coffee & <cream>", "rocket"]
SIZE = 32


def pictures(count=30, size=SIZE, seed=0):
    """Images in one flat colour per class: red, green, blue."""
    labels = np.arange(count) % 3
    images = np.full((count, size, size, 3), 40, np.uint8)
    images[np.arange(count), :, :, labels] = 220
    return figures.Labelled(images, labels)


def frames(count=2):
    noise = np.random.default_rng(0).integers(0, 256, (4, count, SIZE, SIZE, 3)).astype(np.uint8)
    times = np.linspace(0, 0.9, 4, dtype=np.float32)
    shown = pictures(count)
    return trajectories.Frames(labels=shown.labels, times=times, noisy=noise, expected=noise // 2, images=shown.images)


def history(steps=200):
    rows = [{"step": k, "loss": 1 / k + 0.1, "images_per_second": 170.0, "grad_norm": 2.0} for k in range(1, steps)]
    return [*rows, {"step": steps, "loss": None, "images_per_second": 171.0}]


def write(path, **changes):
    settings = {
        "title": "Three <colours>",
        "samples": pictures(),
        "real": pictures(),
        "class_names": NAMES,
        "trajectory": frames(),
        "history": history(),
        "metrics": [
            {"samples": "EMA", "N": 500, "fid_lite0": 31.4159, "is_lite0": None},
            {"samples": "train crops", "N": 500, "fid_lite0": 2.0, "is_lite0": 5.5},
        ],
        "config": config.Config(),
        "notes": ["Train and validation crops overlap."],
    }
    return report.write_report(path, **{**settings, **changes})


class _Tags(html.parser.HTMLParser):
    """Every tag is closed, and none loads anything or runs."""

    def __init__(self):
        super().__init__()
        self.open, self.images = [], 0

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href"):
            value = attributes.get(name, attributes.get(f"xlink:{name}", "data:"))
            assert value.startswith(("data:", "#")), value
        self.images += tag == "img"
        assert tag != "img" or attributes["alt"]
        if tag not in ("meta", "link", "img", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_escaped_and_loads_nothing(tmp_path):
    text = write(tmp_path / "report.html").read_text()
    tags = _Tags()
    tags.feed(text)
    assert not tags.open
    assert tags.images == 2 * 3 * 8 + 2 * 2 * 5  # samples and real images; two trajectories of 4 frames and the end
    assert "Three &lt;colours&gt;" in text and "coffee &amp; &lt;cream&gt;" in text and "<cream>" not in text
    assert "31.42" in text and "Train and validation crops overlap." in text
    assert not re.search(r"url\(\s*[\"']?http|@import", text)


def test_the_last_rows_numbers_stand_at_the_top(tmp_path):
    top = write(tmp_path / "report.html").read_text().split("<h2", 1)[0]
    assert "<b>5.500</b><span>is_lite0</span>" in top and "<b>2.000</b><span>fid_lite0</span>" in top
    assert "train crops; all rows are below" in top and "31.42" not in top


def test_a_run_without_metrics_or_history_still_has_a_page(tmp_path):
    text = write(tmp_path / "report.html", trajectory=None, history=[], metrics=[], notes=[]).read_text()
    assert "Samples" in text and "Training</h2>" not in text and "Metrics</h2>" not in text


def test_curve_takes_the_colour_of_the_page_and_skips_what_is_not_a_number():
    svg = figures.curve([*history(), {"step": 999}, {"step": 1000, "loss": float("nan")}], "loss", title="Loss")
    root = xml.etree.ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and "currentColor" in svg and "#010203" not in svg and "nan" not in svg.lower()
    assert figures.curve(history(), "absent", title="") is None
    assert figures.curve([{"step": 1, "loss": 2.0}], "loss", title="") is None


def test_two_curves_in_one_page_share_no_ids():
    ids = [re.findall(r'id="([^"]+)"', figures.curve(history(), key, title=key)) for key in ("loss", "grad_norm")]
    drawn = [{name for name in each if re.match(r"[mp][0-9a-f]{10}", name)} for each in ids]
    assert drawn[0] and not drawn[0] & drawn[1]


def test_class_grid_puts_each_class_in_its_row():
    shown = pictures(9)
    pixels = np.asarray(figures.class_grid(shown, NAMES))
    for label in range(3):
        colour = shown.images[label, 0, 0]
        rows = np.flatnonzero((pixels == colour).all(-1).sum(1) > SIZE)
        assert len(rows) == 96 and np.all(np.diff(rows) == 1)  # one band, 3 x 32 pixels high
        assert rows[0] > label * 96
    assert (pixels[:, :60] < 100).any()  # the names


def test_heads_of_a_class_grid_stand_above_its_columns():
    shown = pictures(9)
    plain, headed = (np.asarray(figures.class_grid(shown, NAMES, heads=heads)) for heads in ((), ("left", "middle", "right")))
    more = len(headed) - len(plain)
    assert more > 0 and (headed[:more] < 200).any()
    np.testing.assert_array_equal(headed[2 * more :], plain[more:])  # the images are where they were, further down


def test_trajectory_runs_from_noise_to_the_sample():
    way = frames(1)
    pixels = np.asarray(figures.trajectory(way, NAMES))
    right = pixels[:, -20]  # a column inside the last image
    assert (right == way.images[0, 0, 0]).all(-1).sum() == 2 * 96


def test_large_images_are_embedded_as_jpeg():
    rng = np.random.default_rng(0)
    kind, data = figures.encode(rng.integers(0, 255, (256, 256, 3)).astype(np.uint8))
    assert kind == "image/jpeg" and data[:2] == b"\xff\xd8"
    assert figures.encode(pictures(1).images[0])[0] == "image/png"


def _chromium(tmp_path, *arguments):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium here: the page is not shown (Debian: apt-get install chromium)")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_browser_shows_every_picture_without_a_console_message(tmp_path):
    page = write(tmp_path / "report.html")
    # A copy asks the browser how large each picture came out and says so in the title; the page itself has no script.
    probe = tmp_path / "probe.html"
    script = """<script>addEventListener("load", () => {
      const wide = [...document.images].map(i => i.complete ? i.naturalWidth : 0);
      const curves = [...document.querySelectorAll("figure svg")].map(s => s.getBoundingClientRect().width);
      document.title = JSON.stringify({wide, curves, overflow: document.body.scrollWidth - innerWidth});
    })</script></body>"""
    probe.write_text(page.read_text().replace("</body>", script))
    done = _chromium(tmp_path, "--window-size=1280,1000", "--virtual-time-budget=5000", "--dump-dom", probe.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout).group(1)))
    assert seen["wide"] == [SIZE] * (2 * 3 * 8 + 2 * 2 * 5)
    assert len(seen["curves"]) == 3 and min(seen["curves"]) > 300
    assert seen["overflow"] <= 0


def test_screenshot_shows_the_samples_colours(tmp_path):
    page = write(tmp_path / "report.html")
    shot = tmp_path / "shot.png"
    _chromium(tmp_path, "--window-size=1280,1400", f"--screenshot={shot}", page.as_uri())
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    for colour in pictures(3).images[:, 0, 0]:
        assert (np.abs(pixels.astype(int) - colour).max(-1) < 8).mean() > 0.01


def test_a_run_that_began_with_a_model_is_not_called_untrained():
    fresh, begun = config.Config(), config.Config(train=config.Train(init_from="runs/dit"))
    assert report.titles(fresh, "ema", None)["initial"] == "untrained (step 0)"
    assert report.titles(begun, "ema", None)["initial"] == "as it began (step 0)"
    assert report.titles(begun, "ema_1", 0.99)["ema_1"] == "averaged weights (EMA 0.99)"
