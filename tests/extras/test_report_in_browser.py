"""examples/report: the page works in a real browser, which fetches nothing."""

import base64
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from figures import at_size
from matplotlib import colormaps
from test_report import CLASSES, attention, data, report, seed  # noqa: F401  (four are fixtures)
from test_voc_pipeline import trained, voc  # noqa: F401  (fixtures)

FLAGS = ("sandbox", "first-run")
QUIET = ("disable-gpu", "disable-quic", "disable-background-networking", "disable-component-update", "disable-sync")


@pytest.fixture(scope="module")
def browser():
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        if os.environ.get("OAA_BROWSER") == "required":
            pytest.fail("OAA_BROWSER=required, and neither chromium nor google-chrome is on the PATH")
        pytest.skip("neither chromium nor google-chrome is on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:  # its user data live in a fresh folder
        flags = [*(f"--no-{flag}" for flag in FLAGS), *(f"--{flag}" for flag in QUIET)]
        browser = playwright.chromium.launch(executable_path=found[0], args=flags)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, report):
    """Opens the page; at the end: nothing was fetched, nothing went wrong."""
    contexts, requests, wrong = [], [], []

    def call(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield call
    for context in contexts:
        context.close()
    assert {url for url in requests if not url.startswith("data:")} == {report.as_uri()}
    assert wrong == []


def picture(page, title, card=0):
    """The pixels of a panel's overlay, (H, W, 4)."""
    panel = page.locator(".pair").nth(card).locator("figure", has_text=title)
    height, width, pixels = panel.locator("canvas").evaluate(
        """(shown) => {
            const copy = new OffscreenCanvas(shown.width, shown.height);  // to read the page's own would warn
            const context = copy.getContext("2d", { willReadFrequently: true });
            context.drawImage(shown, 0, 0);
            const pixels = context.getImageData(0, 0, copy.width, copy.height).data;
            const text = pixels.reduce((text, value) => text + String.fromCharCode(value), "");
            return [copy.height, copy.width, btoa(text)];
        }"""
    )
    return np.frombuffer(base64.b64decode(pixels), dtype=np.uint8).reshape(height, width, 4)


def slider(page, card=0):
    return page.locator(".pair").nth(card).get_by_role("slider", name="Epoch")


def focused(page):
    return page.evaluate("document.activeElement.getAttribute('aria-label')")


def shown(page):
    return [text.split(" in ")[1] for text in page.locator(".pair:not([hidden]) h3").all_inner_texts()]


@pytest.mark.slow
def test_the_slider_shows_attention_as_it_was(opened, seed, data):
    page = opened()
    state = torch.load(seed / "attention" / "checkpoint.pt", weights_only=True)["snapshots"]
    photograph = np.zeros((60, 90, 3))
    pictures = []
    for epoch in (2, 1, 0):
        assert page.locator(".pair output").first.inner_text() == f"epoch {['1', '2', '2.8'][epoch]} of 2.8"
        for title, kind in (("Accumulated", "cumulative"), ("Latest attention", "latest")):
            values = at_size(state[kind]["c"][epoch][1], photograph, True).numpy()  # the card of c's second class
            expected = colormaps["inferno"]((255 * values).round().astype(np.uint8), bytes=True)
            slider(page, 2).evaluate("(s, e) => { s.value = e; s.dispatchEvent(new Event('input')) }", epoch)
            found = picture(page, title, 2)
            assert np.abs(found.astype(int) - expected).max() <= 8  # one level, where rounding differs
            assert np.abs(found.astype(int) - expected).mean() < 0.1
        pictures.append(picture(page, "Accumulated"))
        slider(page).press("ArrowLeft")
    assert not np.array_equal(pictures[0], pictures[2])
    assert picture(page, "CAM", 5)[20, 10, 0] > 100 > picture(page, "CAM", 5)[1, 1, 0]


@pytest.mark.slow
def test_keys_go_from_image_to_image_and_through_the_epochs(opened):
    page = opened()
    red, green = CLASSES
    page.keyboard.press("j")
    assert focused(page) == f"{red} in a"
    for key, name in (
        ("j", f"{red} in c"),
        ("ArrowDown", f"{green} in c"),
        ("k", f"{red} in c"),
        ("ArrowUp", f"{red} in a"),
    ):
        page.keyboard.press(key)
        assert focused(page) == name
    page.keyboard.press("k")  # there is none before the first
    assert focused(page) == f"{red} in a"
    assert slider(page).input_value() == "2"
    page.keyboard.press("ArrowLeft")
    assert slider(page).input_value() == "1"
    assert slider(page).get_attribute("aria-valuetext") == "epoch 2 of 2.8"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert slider(page).input_value() == "2"
    slider(page).focus()
    page.keyboard.press("ArrowLeft")  # the slider's own, once
    assert slider(page).input_value() == "1"
    page.keyboard.press("ArrowDown")
    assert focused(page) == f"{red} in c"
    page.keyboard.press("Control+j")
    assert focused(page) == f"{red} in c"


@pytest.mark.slow
def test_space_and_the_button_play_from_the_first_epoch_to_the_last(opened):
    from playwright.sync_api import expect

    page = opened()
    button = page.locator(".pair button").first
    before = picture(page, "Accumulated")
    page.keyboard.press("j")
    page.keyboard.press(" ")
    assert slider(page).input_value() == "0"
    assert "Pause" in button.inner_text()
    assert not np.array_equal(picture(page, "Accumulated"), before)
    page.keyboard.press(" ")
    assert "Play" in button.inner_text()
    button.click()
    expect(slider(page)).to_have_value("2")
    assert "Play" in button.inner_text()
    np.testing.assert_array_equal(picture(page, "Accumulated"), before)
    button.focus()
    page.keyboard.press(" ")  # pressed once, not twice
    assert "Pause" in button.inner_text()


@pytest.mark.slow
def test_filters_leave_what_they_say(opened):
    page = opened()
    assert shown(page) == ["a", "c", "c", "b", "e", "d"]
    assert page.locator("#class option").all_inner_texts() == ["all", *sorted(CLASSES)]
    for label, choice, expected in (
        ("Class", CLASSES[0], ["a", "c", "e"]),
        ("Class", CLASSES[1], ["c", "b", "d"]),
        ("Gain", "10 or more", ["a", "c", "c", "b", "e"]),
        ("Gain", "above 0", ["a", "c", "c", "b", "e"]),
        ("Gain", "below 0", ["d"]),
        ("Kind", "watched", ["a", "c", "c"]),
        ("Kind", "failures", ["d"]),
        ("Kind", "no failures", ["a", "c", "c", "b", "e"]),
    ):
        page.get_by_role("combobox", name=label).select_option(label=choice)
        assert shown(page) == expected, choice
        assert page.locator("#count").inner_text() == f"{len(expected)} of 6 shown"
        if choice == "failures":
            page.keyboard.press("Escape")
            page.locator("h1").click()
            page.keyboard.press("j")
            assert focused(page) == f"{CLASSES[1]} in d"  # keys pass over what is hidden
        page.get_by_role("combobox", name=label).select_option(index=0)


@pytest.mark.slow
def test_opacity_and_threshold_change_what_lies_over_the_photograph(opened):
    page = opened()
    canvas = page.locator(".pair canvas").first
    assert canvas.evaluate("c => getComputedStyle(c).opacity") == "0.65"
    page.get_by_label("Opacity").press("Home")
    assert canvas.evaluate("c => getComputedStyle(c).opacity") == "0"
    assert (picture(page, "CAM")[..., 3] == 255).all()
    page.get_by_label("only above the threshold").check()
    visible = picture(page, "CAM")[..., 3] == 255
    assert visible.sum() == 25 * 10  # the half of the object that this map shows


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_is_the_systems_until_the_button_is_pressed(opened, scheme):
    page = opened(color_scheme=scheme)

    def brightness():
        return page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")

    was_dark = scheme == "dark"
    assert (brightness() < 100) == was_dark
    page.locator("#theme").click()
    assert (brightness() < 100) != was_dark
    assert page.locator("#theme").inner_text() == ("Dark" if was_dark else "Light")
    page.locator("#theme").click()
    assert (brightness() < 100) == was_dark


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390])
def test_nothing_is_wider_than_a_phone(opened, width):
    page = opened(viewport={"width": width, "height": 844}, has_touch=True, is_mobile=True)
    for details in page.locator("details > summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator(".pair button").first.tap()
    assert slider(page).input_value() == "0"
    assert page.locator(".pair figure").first.bounding_box()["width"] > 120


@pytest.mark.slow
def test_the_page_may_not_fetch_anything(browser, report):
    page = browser.new_page()
    finished = []
    page.on("requestfinished", lambda request: finished.append(request.url))
    page.goto(report.as_uri())
    refused = """new Promise((done) => {
        document.addEventListener("securitypolicyviolation", (event) => done(event.blockedURI));
        setTimeout(() => done("nothing was refused"), 5000);
    })"""
    for attempt in ("fetch('http://localhost:9/').catch(() => 0)", "new Image().src = 'http://localhost:9/'"):
        blocked = page.evaluate(f"() => {{ const refused = {refused}; {attempt}; return refused }}")
        assert blocked.startswith("http://localhost:9/")
    page.close()
    assert {url for url in finished if not url.startswith("data:")} == {report.as_uri()}


def test_without_a_browser_the_tests_are_skipped_unless_it_is_required(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent / "nowhere"))
    start = browser.__wrapped__ if hasattr(browser, "__wrapped__") else browser._get_wrapped_function()
    monkeypatch.delenv("OAA_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="on the PATH"):
        next(start())
    monkeypatch.setenv("OAA_BROWSER", "required")
    with pytest.raises(pytest.fail.Exception, match="OAA_BROWSER=required"):
        next(start())
