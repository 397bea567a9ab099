"""The page at /, as somebody uses it in a browser: what it shows is what the model says."""

import os
import re
import shutil
import threading
import time

import numpy as np
import pytest
import uvicorn
from PIL import Image

from mdn.serving.app import make_app

CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)

# On one worker, which makes the fixtures once.
pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("serving"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]


class Background(uvicorn.Server):
    """The service in a thread of this process."""

    def __init__(self, model):
        super().__init__(uvicorn.Config(make_app(model, "mdn"), port=0, log_level="error"))
        self.thread = threading.Thread(target=self.run)

    def __enter__(self):
        self.thread.start()
        deadline = time.monotonic() + 10
        while not self.started and time.monotonic() < deadline:
            time.sleep(0.01)
        (port,) = {s.getsockname()[1] for server in self.servers for s in server.sockets}
        return f"http://127.0.0.1:{port}/"

    def __exit__(self, *_):
        self.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, exports, served):
    """Return a function that opens the page of a case, and fails for any error in its console."""
    said, open_contexts = [], []

    def open_case(case, **options):
        server = Background(served[case])
        url = server.__enter__()
        context = browser.new_context(**options)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda r: r.url.startswith((url, "data:")) or said.append(r.url))
        page.goto(url)
        open_contexts.append((server, context))
        ready(page)
        return exports[case][0], page

    yield open_case
    for server, context in open_contexts:
        context.close()
        server.__exit__()
    assert said == []


def ready(page):
    page.wait_for_selector("body[data-state=ready]", timeout=20_000)


def value_of(text):
    return float(text.replace("\N{MINUS SIGN}", "-"))


def number(page, selector):
    return value_of(page.inner_text(selector))


def move(page, selector, value):
    """Drag a slider to a value, as a browser reports it."""
    page.eval_on_selector(
        selector,
        "(slider, value) => { slider.value = value; "
        "slider.dispatchEvent(new Event('input', {bubbles: true})); }",
        str(value),
    )
    ready(page)


def curve(page, target):
    """Return the values of the target along the curve, and its heights, the greatest 1."""
    points = np.array(
        re.findall(r"[ML](\S+?) ([\d.]+)", page.get_attribute("path.curve", "d")), float
    )
    low, high = (
        float(page.get_attribute(f"#given-{target}-slider", end)) for end in ("min", "max")
    )
    share = (points[:, 0] - 72) / (760 - 18 - 72)
    heights = 440 - 52 - points[:, 1]
    return low + share * (high - low), heights / heights.max()


def contours(page, across, up):
    """Return the points of each contour, in the units of the targets."""
    low, high = (
        np.array([float(page.get_attribute(f"#given-{d}-slider", end)) for d in (across, up)])
        for end in ("min", "max")
    )
    for path in page.locator("path.contour").all():
        points = np.array(re.findall(r"[ML](\S+?) ([\d.]+)", path.get_attribute("d")), float)
        share = (points - [72, 440 - 52]) / [760 - 18 - 72, 26 + 52 - 440]
        yield low + share * (high - low)


def assert_picture(page, path):
    """Assert that the chart is drawn: of more than a few colours, most of them not the paper's."""
    page.screenshot(path=str(path), full_page=True)
    page.locator("#chart").screenshot(path=str(path.with_suffix(".chart.png")))
    colours = np.asarray(Image.open(path.with_suffix(".chart.png")).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 50


def test_one_target(open_page, tmp_path):
    model, page = open_page("one")

    def density(space, kind):
        x = {"floor space": np.array([space]), "kind": np.array([kind], object)}
        return model.predict_distribution(x)

    assert page.inner_text("#title") == "p(price | x)"
    assert page.locator("option").all_inner_texts() == [
        *("house", "flat", "<b>boat</b>", "missing, or another one"), "price", "price", "density"
    ]  # fmt: skip
    assert page.locator("select b").count() == 0
    page.get_by_label("floor space", exact=True).fill("120.5")
    page.get_by_label("kind").select_option("<b>boat</b>")
    ready(page)
    expected = density(120.5, "<b>boat</b>")
    assert number(page, "#mean-0") == pytest.approx(float(expected.mean()[0, 0]), rel=1e-3)
    assert number(page, "#stddev-0") == pytest.approx(float(expected.stddev()[0, 0]), rel=1e-3)
    # The sliders: of the interval, and of the feature.
    move(page, "#level", 60)
    low, high = (value_of(t) for t in page.inner_text("#interval-0").split(" to "))
    assert [low, high] == pytest.approx(expected.interval(0.6)[0, 0].numpy(), rel=1e-3)
    assert page.inner_text("#interval") == "60 % interval"
    before = page.get_attribute("path.curve", "d")
    move(page, "#feature-0-slider", 60)
    value = float(page.input_value("#feature-0"))
    expected = density(value, "<b>boat</b>")
    assert number(page, "#mean-0") == pytest.approx(float(expected.mean()[0, 0]), rel=1e-3)
    assert page.get_attribute("path.curve", "d") != before
    # The modes that are marked are maxima of the density.
    for text in page.locator("text.mode").all_text_contents():
        mode = value_of(text)
        around = mode + np.array([-0.02, 0.0, 0.02]) * float(expected.stddev()[0, 0])
        log_prob = np.array([expected.log_prob(np.array([[v]], "f"))[0] for v in around])
        assert log_prob.argmax() == 1
    assert_picture(page, tmp_path / "one.png")


def test_several_targets_are_conditioned_by_sliders(open_page, tmp_path):
    model, page = open_page("three", color_scheme="dark")
    page.get_by_label("u", exact=True).fill("0.5")
    page.get_by_label("v", exact=True).fill("-1")
    ready(page)
    density = model.predict_distribution(np.array([[0.5, -1.0]]))
    assert page.inner_text("#title") == "p(a, b, <i>c</i> | x)"
    pair = density.marginal([0, 1])
    draws = pair.log_prob(pair.sample(20_000, seed=(1, 2))).numpy()
    found = list(contours(page, 0, 1))
    for share, points in zip((0.5, 0.8, 0.95), found, strict=True):
        along = pair.log_prob(points[:, np.newaxis].astype("f")).numpy()
        assert along.std() < 0.05
        assert (draws > along.mean()).mean() == pytest.approx(share, abs=0.02)
    move(page, "#given-2-slider", 1.0)
    given = float(page.input_value("#given-2-slider"))
    expected = density.condition({2: given})
    assert number(page, "#mean-0") == pytest.approx(float(expected.mean()[0, 0]), rel=1e-3)
    assert number(page, "#stddev-1") == pytest.approx(float(expected.stddev()[0, 1]), rel=1e-3)
    assert page.inner_text("#stddev-2") == "given"
    assert page.is_checked("#given-2")
    assert_picture(page, tmp_path / "two.png")
    # Any pair; and one alone, given another.
    page.select_option("#axis-y", label="<i>c</i>")
    ready(page)
    assert page.is_hidden("#given-2-slider")
    assert page.is_visible("#given-1-slider")
    page.select_option("#axis-y", label="density")
    page.uncheck("#given-2")
    move(page, "#given-1-slider", 0.5)
    given = float(page.input_value("#given-1-slider"))
    expected = density.condition({1: given}).marginal([0])
    assert_picture(page, tmp_path / "conditional.png")
    values, heights = curve(page, 0)
    prob = np.exp([float(expected.log_prob(np.array([[v]], "f"))[0]) for v in values[::10]])
    np.testing.assert_allclose(heights[::10], prob / prob.max(), atol=0.02)
    # A feature that no train row lacked.
    page.get_by_label("u", exact=True).fill("")
    ready(page)
    assert page.inner_text("#status") == (
        "no answer: a feature is missing that no train row lacked"
    )
