"""Pages of tables and figures: which values are best, what a page refuses, and how it looks in a headless browser."""

import base64
import html
import html.parser
import io
import json
import math
import re
import shutil
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from PIL import Image

from neurosde.cli import main
from neurosde.datasets import generate_activity_trials, sample_weight_matrix
from neurosde.datasets.recordings import Recording
from neurosde.evaluation import report as report_module
from neurosde.evaluation.evaluate import evaluate_posterior
from neurosde.evaluation.inference_methods import METHODS
from neurosde.evaluation.inference_metrics import METRICS
from neurosde.evaluation.inference_report import write_inference_report
from neurosde.evaluation.inference_tasks import suite_tasks
from neurosde.evaluation.page import DPI, Fold, Picture, Section, picture, render_page, write_page
from neurosde.evaluation.page_table import Table, best
from neurosde.models import InferenceConfig, infer
from neurosde.models.posterior_file import save_posterior

MADE = {"Results": {"history": "2026 neurosde bench", "neurosde_version": "0", "git_commit": "abc", "config": "{}"}}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def frame(**columns):
    count = len(next(iter(columns.values())))
    return pd.DataFrame(columns, index=pd.Index(list("abcdef")[:count], name="method"))


class Elements(html.parser.HTMLParser):
    """Every element of a page as (tag, attributes), and the text in it as far as its first child."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), ""))

    def handle_data(self, text):
        if self.found:
            tag, attributes, before = self.found[-1]
            self.found[-1] = (tag, attributes, before + text)

    def of(self, tag):
        return [(attributes, text.strip()) for name, attributes, text in self.found if name == tag]


# What is best


@pytest.mark.parametrize(
    ("values", "sense", "expected"),
    [
        ([3.0, 1.0, 2.0], "lower", "b"),
        ([3.0, 1.0, 2.0], "higher", "a"),
        ([-3.0, 1.0, -2.0], "lower", "a"),
        ([0.7, 0.95, 0.86], 0.9, "c"),
        ([0.2, -0.1, 0.4], 0, "b"),
        ([0.1, -0.1, 0.4], 0.0, "ab"),
        ([1.0, 1.00001, 2.0], "lower", "ab"),  # the same as they are shown
        ([1.0, 1.001, 2.0], "lower", "a"),
        ([np.nan, 2.0, 1.0], "lower", "c"),
        ([-np.inf, 2.0, 1.0], "lower", "c"),  # what diverged is no winner
        ([np.nan, np.nan, 1.0], "lower", ""),  # nor is what stands alone
        ([1.0, 1.0, 1.0], "lower", ""),
        ([3.0, 1.0, 2.0], None, ""),
        ([3, 1, 2], "higher", "a"),
        (["3", "diverged", "2"], "lower", "c"),
    ],
)
def test_the_best_of_a_column(values, sense, expected):
    marked = best(frame(x=values)["x"], sense)
    assert "".join(np.array(list("abc"))[marked]) == expected


def test_rows_of_one_task_are_compared_with_each_other():
    index = pd.MultiIndex.from_product([["one", "two"], [5, 10], ["exact", "ridge"]], names=["task", "N", "method"])
    values = pd.Series([1.0, 2, 4, 3, 10, 20, 40, 30], index)
    assert best(values, "lower").tolist() == [True, False, False, True, True, False, False, True]


def test_a_table_says_what_is_best_in_more_than_weight():
    data = frame(relative_error=[0.25, 0.5], correlation=[0.9, np.nan], coverage=[0.8, 0.91], where=["x", "y"])
    low, high = data[["relative_error"]] - 0.1, data[["relative_error"]] + 0.1
    senses = {"relative_error": "lower", "correlation": "higher", "coverage": 0.9}
    table = Table("Errors", data, senses, {"where": "place"}, low, high, "95 % interval")
    page = render_page("A & B", [Section("One", ("Some <text>.",), (table,))], MADE)
    assert '<strong>0.25</strong><span class="hidden"> (best)</span>' in page and page.count("<strong>") == 2
    assert "(0.15 … 0.35)" in page and "In brackets: 95 % interval." in page
    found = Elements(page)
    headers = [text for attributes, text in found.of("th") if attributes.get("scope") == "col"]
    assert headers == ["method", "relative error", "correlation", "coverage", "place"]
    senses = [text for attributes, text in found.of("span") if attributes.get("class") == "sense"]
    assert senses == ["lower is better", "higher is better", "nearest to 0.9 is best"]
    assert [text for attributes, text in found.of("th") if attributes.get("scope") == "row"][:2] == ["a", "b"]
    assert "A dash stands where there is no value." in page and "A &amp; B" in page and "Some &lt;text&gt;." in page


def test_words_may_stand_among_numbers():
    data = pd.DataFrame({"error": [0.5, "diverged", 0.25]}, pd.Index(["a", "b", "c"], name="method"))
    page = render_page("T", [Section("S", (), (Table("C", data, {"error": "lower"}),))], MADE)
    assert '<table class="numbers">' in page and "<td>diverged\n" in page
    assert '<td class="best"><strong>0.25</strong>' in page


def test_every_level_of_the_rows_is_a_header():
    index = pd.MultiIndex.from_tuples([("one", "ridge"), ("one", "exact")], names=["task", "method"])
    page = render_page("T", [Section("S", (), (Table("C", pd.DataFrame({"x": [1.0, 2.0]}, index)),))], MADE)
    rows = [text for attributes, text in Elements(page).of("th") if attributes.get("scope") == "row"]
    assert rows[:4] == ["one", "ridge", "one", "exact"] and "task" in page


def test_bad_tables_and_figures_are_refused():
    data = frame(x=[1.0, 2.0])
    for call, error, match in (
        (lambda: Table("C", {"x": [1.0]}), TypeError, "must be a pandas DataFrame; got dict"),
        (lambda: Table("", data), ValueError, "must have a caption"),
        (lambda: Table("C", data, {"y": "lower"}), ValueError, r"senses must name columns, \['x'\]; got \['y'\]"),
        (lambda: Table("C", data, {"x": "smaller"}), ValueError, "must be 'lower', 'higher', a number or None"),
        (lambda: Table("C", data, titles={"y": "Y"}), ValueError, "titles must name columns"),
        (lambda: Table("C", data, low=data, high=data), ValueError, "need low and high, or half alone, and a text"),
        (lambda: Table("C", data, low=data, interval="i"), ValueError, "need low and high, or half alone, and a text"),
        (lambda: Table("C", data, low=data, high=data[:1], interval="i"), ValueError, "must have the rows of the data"),
        (lambda: Table("C", data, half=data, low=data, high=data, interval="i"), ValueError, "or half alone"),
        (lambda: Table("C", data, half=data), ValueError, "and a text that says what they are"),
        (lambda: Fold(""), ValueError, "must have a title, by which it is opened"),
        (lambda: Picture("name", b"", "caption", ""), ValueError, "must have a caption and a text"),
    ):
        with pytest.raises(error, match=match):
            call()


# The page


def luminance(colour):
    """Of WCAG 2.2, in [0, 1]."""
    channels = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def test_contrast_is_that_of_the_guidelines_in_light_and_dark_mode():
    """At least 4.5 to 1 for text (WCAG 2.2, success criterion 1.4.3)."""
    blocks = re.findall(r":root \{([^}]*)\}", render_page("T", [], MADE))
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        for text, ground in [("text", "page"), ("text", "note"), ("text", "best"), ("muted", "page"),
                             ("muted", "best"), ("link", "page")]:  # fmt: skip
            light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 4.5, (text, ground)
    assert luminance("#ffffff") == pytest.approx(1) and luminance("#000000") == 0


@pytest.fixture(scope="module", params=["exact", "cfg", "refined"])
def report(request, posteriors, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    evaluate = ["evaluate", posteriors[request.param], "--truth", posteriors["cube"], "--out-dir", folder]
    assert main([str(word) for word in evaluate]) == 0
    return folder / "report.html"


def test_the_page_can_be_read_by_all(report):
    found = Elements(page := report.read_text("utf-8"))
    assert found.of("html")[0][0]["lang"] == "en" and found.of("title")[0][1].startswith("Posterior over")
    headings = [int(tag[1]) for tag, *_ in found.found if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1 and headings.count(1) == 1 and set(headings[1:]) == {2}
    first = found.of("a")[0]
    assert first == ({"class": "skip", "href": "#content"}, "Skip to the content")
    names = [attributes["id"] for _, attributes, _ in found.found if "id" in attributes]
    assert len(set(names)) == len(names)
    linked = [attributes["href"] for attributes, _ in found.of("a")]
    labelled = [
        f"#{attributes['aria-labelledby']}" for _, attributes, _ in found.found if "aria-labelledby" in attributes
    ]
    assert {link[1:] for link in linked + labelled} <= set(names)
    assert len(found.of("table")) == len(found.of("caption")) == 6 + ("refined" in str(report.parent))
    assert all(attributes.get("scope") in ("row", "col") for attributes, _ in found.of("th"))
    texts = [attributes["alt"] for attributes, _ in found.of("img")]
    assert len(texts) == 5 and all(len(re.findall(r"\d", text)) > 4 for text in texts)  # numbers are said
    (inside,) = re.findall(r"(\d+) of 36 intervals hold", " ".join(texts))
    with xr.open_dataset(report.with_name("results.nc")) as results:
        assert int(inside) / 36 == pytest.approx(float(results.coverage_90))
    assert "prefers-color-scheme: dark" in page and ":focus-visible" in page and '"viewport"' in page


def test_the_page_needs_nothing_from_elsewhere(report):
    page = report.read_text("utf-8")
    assert not re.findall(r"https?://", page) and "url(" not in page and "@import" not in page
    assert not re.findall(r"<(?:script|link|iframe|object|embed)\b", page)
    for attributes, _ in Elements(page).of("img"):
        kind, data = attributes["src"].split(",", 1)
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            assert kind == "data:image/png;base64" and image.format == "PNG"
            assert image.width / image.height == pytest.approx(
                int(attributes["width"]) / int(attributes["height"]), rel=0.02
            )


def test_the_page_says_how_it_was_made(report, posteriors):
    found = Elements(report.read_text("utf-8"))
    said = [text for _, text in found.of("code")]
    for what in (r"\d{4}-\d\d-\d\dT.* ", r"0\.\d+\.\d+", r"[0-9a-f]{40}|unknown", r'\{.*"draws": \d+.*\}'):
        assert any(re.match(what, text) for text in said), what


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """A function that opens a page without a network, takes its picture and returns it with the elements."""
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")

    def call(page, *options):
        folder = tmp_path_factory.mktemp("browser")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
        offline = [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        command = [CHROMIUM, *flags, *offline, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


# The page of many methods on many tasks


def invented(suite, methods, *, networks=8, draws=32):
    """A cube such as `neurosde benchmark inference` writes, of numbers that are drawn, with two further measures."""
    source = np.random.default_rng(0)
    tasks, metrics = suite_tasks(suite), list(METRICS)
    of_draws = [name.startswith("rank of") or name == "credibility" for name in metrics]
    values = source.lognormal(0, 0.3, (len(tasks), len(methods), networks, len(metrics)))
    values *= source.gamma(9, 1 / 9, (len(tasks), 1, 1, 1)) * source.gamma(4, 1 / 4, (1, len(methods), 1, len(metrics)))
    values[..., of_draws] = source.integers(draws + 1, size=(*values.shape[:3], sum(of_draws))) / draws
    values[..., metrics.index("seconds")] = values[:, :, :1, metrics.index("seconds")]
    values[0, 1] = np.nan  # diverged
    values[:, 0][..., of_draws] = np.nan  # an estimate without draws
    about = {"long_name": "divergence", "units": "nats", "better": "lower", "group": "Posterior"}
    names = ("ensemble", "neurons", "times", "trials", "gain", "noise_std", "observed")
    return xr.Dataset(
        {
            "results": (("task", "method", "network", "metric"), values),
            "divergence": (("task", "method", "network"), source.random(values.shape[:3]), about),
            "local_c2st_overall_p": ("method", source.random(len(methods))),
            "l_c2st": (("task", "method"), source.random(values.shape[:2]), {"long_name": "p of L-C2ST"}),
        },
        {"task": [task.name for task in tasks], "method": list(methods), "metric": metrics}
        | {name: ("task", [getattr(task, name) for task in tasks]) for name in names},
        {"config": json.dumps({"draws": draws}), "history": "invented"},
    )


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    results = invented("quick", list(METHODS)[:6])
    return write_inference_report(results, tmp_path_factory.mktemp("comparison")), results


def test_a_comparison_begins_with_a_table_for_each_group(comparison):
    path, results = comparison
    page = path.read_text("utf-8")
    titles = [text for _, text in Elements(page).of("h2")]
    assert titles == ["Summary", "Recovery", "Posterior", "Exact posterior", "Prediction", "Cost", "Further measures",
                      "Calibration",
                      "Task by task", "How it was made"]  # fmt: skip
    summary = page[page.index('id="section-1"') : page.index('id="section-2"')]
    captions = [text for attributes, text in Elements(summary).of("span") if "id" in attributes]
    assert [caption.split(":")[0] for caption in captions] == [
        "Relative error", "Energy score, relative", "KL of normal laws from the exact posterior, nats a weight",
        "Log-likelihood of a held-out trial, nats per transition",
        "Seconds a network", "P of L-C2ST",
    ]  # fmt: skip
    first = summary[: summary.index("</table>")]
    heads = [text for attributes, text in Elements(first).of("th") if attributes["scope"] == "col"]
    assert heads == ["method", "gaussian", "dale", "sparse", "low-rank", "block", "all"]
    error = results["results"].sel(metric="relative_error")
    dale = error.isel(task=[1, 6], method=2).mean().item()
    row = first[first.index("lagged covariances") :].split("</tr>")[0]
    assert f"{dale:#.3g}" in row.split("<td")[2]
    ridge = first[first.index("ridge") :].split("</tr>")[0].split("<td")
    assert "(1/2)" in ridge[1] and "±" not in ridge[1] and "(7/8)" in ridge[6] and "best" not in ridge[1]


def test_all_that_is_measured_is_on_the_page_task_by_task(comparison):
    path, results = comparison
    page = path.read_text("utf-8")
    detail = page[page.index(">Task by task</h2>") :]
    found = Elements(detail)
    tasks = [text for _, text in found.of("summary")]
    assert {*results["task"].values, *results["ensemble"].values} == set(tasks)
    block = detail[detail.index("Posterior, block-N10") :]
    assert "divergence, nats" in block[: block.index("</table>")]
    cell = results["divergence"].isel(task=4, method=3).mean().item()
    assert f"{cell:#.3g}" in block[: block.index("</table>")]
    assert "by_axis" not in "".join(one.name for one in path.parent.iterdir())  # no two tasks differ in one thing
    assert len(found.of("table")) == 8 * 6 + 1 == len(found.of("caption"))  # of each group, and how it was made


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    results = invented("paper", list(METHODS))
    assert results["results"].sizes["task"] == 480
    began = time.perf_counter()
    path = write_inference_report(results, tmp_path_factory.mktemp("paper"))
    return path, time.perf_counter() - began


@pytest.mark.slow
def test_the_page_of_the_whole_grid_is_small_and_soon_made(paper):
    path, seconds = paper
    assert path.stat().st_size < 10e6
    assert seconds < 60  # 8 s on one core of a server
    page = path.read_text("utf-8")
    found = Elements(page)
    names = [attributes["id"] for _, attributes, _ in found.found if "id" in attributes]
    assert len(found.of("table")) > 2300 and len(set(names)) == len(names)
    assert not re.findall(r"https?://", page) and not re.findall(r"<(?:script|link|iframe|object|embed)\b", page)
    texts = [attributes["alt"] for attributes, _ in found.of("img")]
    assert len(texts) == 5 and all(len(re.findall(r"\d", text)) > 4 for text in texts)
    assert sum("times of a trial 1000: " in text and "noise σ 0.3: " in text for text in texts) == 3


def layout(browse, page, folder, width):
    """How a browser lays a page out in a frame of that width."""
    framed = folder / "framed.html"
    framed.write_text(FRAME.format(width=width, page=html.escape(page)), "utf-8")
    dumped = browse(framed, f"--window-size={width},1600", "--dump-dom")
    return json.loads(html.unescape(re.findall(r'data-measured="(.*?)"', dumped)[0]))


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_folds_closed_and_open(comparison, browse, tmp_path, width):
    """Nothing reaches beyond the margin, and what is folded takes no room."""
    page = comparison[0].read_text("utf-8")
    opened = page.replace("<details>", "<details open>")
    assert opened != page
    found = [layout(browse, one, tmp_path, width) for one in (page, opened)]
    for one in found:
        assert one["width"] == width and one["overflow"] == 0 and one["wide"] == []
    assert 2000 < found[0]["height"] < found[1]["height"] / 2


@pytest.mark.slow
def test_a_browser_shows_the_page_of_the_whole_grid(paper, browse, tmp_path):
    found = layout(browse, paper[0].read_text("utf-8"), tmp_path, 390)
    assert found["overflow"] == 0 and found["wide"] == [] and 2000 < found["height"] < 20000


FRAME = """<!DOCTYPE html><html><body style="margin: 0"><iframe style="border: 0; display: block; width: {width}px;
height: 1600px" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("body *")].filter(one =>
    !one.closest(".scroll *") && one.getBoundingClientRect().right > root.clientWidth + 1);
  document.body.dataset.measured = JSON.stringify({{
    width: root.clientWidth, height: root.scrollHeight, overflow: root.scrollWidth - root.clientWidth,
    wide: wide.map(one => one.outerHTML.slice(0, 80)),
    images: [...page.images].map(one => one.complete ? one.naturalWidth : 0)}});
}});
</script></body></html>"""


@pytest.mark.parametrize("report", ["refined"], indirect=True)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page(report, browse, tmp_path, width):
    """In a frame of that width, since windows cannot be made as narrow as a telephone."""
    shot = tmp_path / "page.png"
    found = layout(browse, report.read_text("utf-8"), tmp_path, width)
    browse(tmp_path / "framed.html", f"--window-size={width},1600", f"--screenshot={shot}")
    with Image.open(shot) as image:
        assert image.size == (width, 1600)
        pixels = np.asarray(image.convert("L"), dtype=float)
    # Text and figures on a light ground, in every fifth of the page.
    assert all(part.std() > 5 for part in np.array_split(pixels, 5)) and (pixels > 250).mean() > 0.5
    assert (pixels[:, -4:] == pixels[0, -1]).all()  # nothing reaches the right margin
    assert found["width"] == width and found["overflow"] == 0 and found["wide"] == []
    assert len(found["images"]) == 5 and min(found["images"]) > 300  # all are decoded


def test_few_draws_of_an_exact_posterior_cover_what_they_can(tmp_path):
    """The widest interval of 4 draws covers 0.6 of 256 weights, give or take 4 √(0.6 · 0.4/256), and not 0.9."""
    W = sample_weight_matrix(16, 1.2, generator=0, dtype=torch.float64)
    activity = generate_activity_trials(W, 2, 100, 0.1, noise_std=0.3, generator=1)
    config = InferenceConfig(noise_std=0.3, gain=1.2, draws=4, predictive_draws=2)
    save_posterior(infer(Recording(activity.numpy(), "here", dt=0.1), config), tmp_path / "posterior.nc")
    np.save(tmp_path / "W.npy", W.numpy())
    evaluation = evaluate_posterior(tmp_path / "posterior.nc", tmp_path / "W.npy")
    table = report_module._calibration(evaluation)
    low, high = (float(end.loc["coverage 90", "value"]) for end in (table.low, table.high))
    assert low < 0.6 < high and high < 0.7
    assert abs(evaluation.calibration["coverage_90"] - 0.6) < 4 * math.sqrt(0.6 * 0.4 / 256)


def test_the_truth_of_another_network_is_warned_of(posteriors):
    with pytest.warns(UserWarning, match="is of network 1; the truth is of network 0"):
        evaluate_posterior(posteriors["exact"], posteriors["cube"], 0)
    assert evaluate_posterior(posteriors["exact"], posteriors["cube"], 1).coverage is not None


def test_pictures_keep_the_rare_colours_at_the_ends_of_bars():
    """A channel is off by less than 4 % of its range, which is hard to see; by 19 % with colours cut at medians."""
    figure, drawn = Figure(figsize=(6, 3)), io.BytesIO()
    weights = np.random.default_rng(0).standard_normal((20, 20))
    for axes, shown, colours in zip(figure.subplots(1, 2), (weights, abs(weights)), ("RdBu_r", "viridis"), strict=True):
        figure.colorbar(axes.imshow(shown, cmap=colours))
    figure.savefig(drawn, format="png", dpi=DPI)
    kept = picture("weights", figure, "Weights.", "Two matrices.").png
    before, after = (np.asarray(Image.open(file).convert("RGB"), dtype=int) for file in (drawn, io.BytesIO(kept)))
    assert abs(before - after).max() <= 10


def test_a_page_of_a_benchmark(tmp_path):
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([0, 1], [1, 2])
    shown = picture("times", figure, "Times.", "A line from 1 to 2.")
    path = write_page(tmp_path / "out", "Benchmark", [Section("S", (), (), (shown,))], MADE, notes="Two cores.")
    assert path.read_text("utf-8").count('alt="A line from 1 to 2."') == 1 and "Two cores." in path.read_text("utf-8")
    with Image.open(path.with_name("times.png")) as image:
        assert image.size == (450, 300)
    assert Elements(path.read_text("utf-8")).of("img")[0][0]["width"] == "288"
