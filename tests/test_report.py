"""examples/report: what the page of a run holds, and that it works in a real browser, which fetches nothing."""

import base64
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data import VOCFolder, write_label
from evaluate_cues import evaluate_maps
from figures import at_size
from matplotlib import colormaps
from PIL import Image
from test_voc_pipeline import run, trained, voc  # noqa: F401  (two are fixtures)

REPORT = "../report"
CLASSES = ["red<script>alert(1)</script>", "green&amp;\"'"]  # what a data set may call its classes
FLAGS = ("sandbox", "first-run")
QUIET = ("disable-gpu", "disable-quic", "disable-background-networking", "disable-component-update", "disable-sync")


@pytest.fixture(scope="module")
def data(voc, tmp_path_factory):  # noqa: F811
    """The drawn images, with odd class names."""
    root = tmp_path_factory.mktemp("report") / "voc"
    shutil.copytree(voc, root)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture(scope="module")
def attention(data, trained, tmp_path_factory):  # noqa: F811
    """A run that has only stage 1: two images are watched, one of them with two classes."""
    seed = tmp_path_factory.mktemp("attention") / "seed0"
    shutil.copytree(trained, seed / "attention")
    settings = json.loads((seed / "attention" / "settings.json").read_text())
    settings["data"]["classes"] = CLASSES
    (seed / "attention" / "settings.json").write_text(json.dumps(settings))
    state = torch.load(seed / "attention" / "checkpoint.pt", weights_only=True)
    for kind in ("cumulative", "latest"):
        state["snapshots"][kind] = {name: state["snapshots"][kind][name] for name in ("a", "c")}
    torch.save(state, seed / "attention" / "checkpoint.pt")
    return seed


@pytest.fixture(scope="module")
def seed(data, attention, tmp_path_factory):
    """A run with maps: the CAM shows half of each object, OAA+ all of it, but d elsewhere, and of f as much."""
    seed = tmp_path_factory.mktemp("runs") / "seed0"
    shutil.copytree(attention, seed)
    train = VOCFolder(data, "train")
    for name in train.names:
        truth = train.mask(name).numpy()
        for c in train.class_ids(name):
            whole = truth == c + 1
            half = whole & (np.cumsum(whole, 1) <= 10)
            maps = {"cam": half, "max": whole, "hybrid": {"d": np.roll(whole, 30, 0), "f": half}.get(name, whole)}
            for method, shown in maps.items():
                path = seed / "maps" / method / f"{name}_{c}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((200 * shown).astype(np.uint8)).save(path)
        (seed / "labels" / "hybrid").mkdir(parents=True, exist_ok=True)
        write_label(seed / "labels" / "hybrid" / f"{name}.png", truth)
    for folder in (seed / "maps").iterdir():
        (folder / "scores.json").write_text(json.dumps(evaluate_maps(train, folder)))
    for stage in ("hybrid", "networks/hybrid_100"):
        (seed / stage).mkdir(parents=True)
        (seed / stage / "log.csv").write_text("step,epoch,loss,seconds\n4,1.0,2.5,1\n8,2.0,nan,1\n11,2.75,1.5,1\n")
    (seed / "val" / "hybrid_100").mkdir(parents=True)
    (seed / "val" / "hybrid_100" / "scores.json").write_text(json.dumps({"mean_iou": 0.4321}))
    return seed


@pytest.fixture(scope="module")
def report(data, seed, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert "done: " in run(REPORT, "--voc-root", data, "--run", seed, "--out", out)
    return out


def content(page):
    """What the page's script reads."""
    return json.loads(page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])


# What the page holds


@pytest.mark.slow
def test_watched_pairs_come_first_then_gains_then_failures(report):
    pairs = content(report)["pairs"]
    red, green = CLASSES
    assert [(p["name"], p["class"], p["kinds"]) for p in pairs] == [
        *[("a", red, ["watched", "gain"]), ("c", red, ["watched", "gain"]), ("c", green, ["watched", "gain"])],
        *[("b", green, ["gain"]), ("e", red, ["gain"]), ("d", green, ["failure"])],
    ]
    assert [pair["gain"] for pair in pairs] == [50, 50, 50, 50, 50, -50]
    assert [pair["iou"] for pair in pairs] == [100, 100, 100, 100, 100, 0]
    titles = ["Accumulated", "CAM", "OAA+", "Pseudo label", "Truth"]
    for pair in pairs:
        watched = "watched" in pair["kinds"]
        assert [panel["title"] for panel in pair["panels"]] == (["Latest attention"] if watched else []) + titles
        assert {panel.get("frames", 1) for panel in pair["panels"]} == ({1, 3} if watched else {1})
    assert content(report)["epochs"] == ["1", "2", "2.8"]
    assert [panel["notes"] for panel in pairs[0]["panels"][2:4]] == [["IoU 50 %"], ["IoU 100 %"]]


@pytest.mark.slow
def test_numbers_of_pairs_and_what_is_a_failure_are_chosen(data, seed, tmp_path):
    options = ["--voc-root", data, "--run", seed, "--out", tmp_path / "r.html"]
    run(REPORT, *options, "--images", 0)
    assert [pair["name"] for pair in content(tmp_path / "r.html")["pairs"]] == ["a", "c", "c"]
    run(REPORT, *options, "--failure", 60, "--images", 2)
    assert [pair["name"] for pair in content(tmp_path / "r.html")["pairs"]] == ["a", "c", "c", "d", "f"]


@pytest.mark.slow
def test_scores_and_logs_are_tables_and_curves(report):
    text = report.read_text(encoding="utf-8")
    for title in (
        *("Classifier: loss", "Does attention still move?", "Pairs that hold nothing"),
        *("Integral attention models: loss", "Segmentation networks: loss", "Cues over the threshold"),
        "Cues: precision over recall",
    ):
        assert f"<figcaption>{title}" in text
    assert "<td>43.2</td>" in text
    assert "Not in this run" not in text
    assert "highest 2.5" in text  # the text alternative; a NaN is a gap


@pytest.mark.slow
def test_a_run_of_stage_1_alone_has_its_page_which_says_what_is_missing(data, attention, tmp_path):
    run(REPORT, "--voc-root", data, "--run", attention, "--out", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    for missing in ("maps/cam", "maps/hybrid", "pseudo labels", "No segmentation network"):
        assert missing in text
    assert "Nothing has been scored" in text
    pairs = content(tmp_path / "r.html")["pairs"]
    assert [pair["gain"] for pair in pairs] == [None] * 3
    assert [panel["title"] for panel in pairs[0]["panels"]] == ["Latest attention", "Accumulated", "Truth"]

    (attention / "attention" / "log.csv").rename(tmp_path / "log.csv")
    try:
        run(REPORT, "--voc-root", data, "--run", attention, "--out", tmp_path / "r.html")
    finally:
        (tmp_path / "log.csv").rename(attention / "attention" / "log.csv")
    assert "no curves of stage 1" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_names_from_the_data_set_are_escaped(report):
    text = report.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "red&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "green&amp;amp;&quot;&#x27;" in text
    assert text.count("</script>") == 2  # the page's own two


@pytest.mark.slow
def test_wrong_folders_end_in_a_sentence(voc, data, seed, tmp_path):  # noqa: F811
    def told(**changed):
        options = {"--voc-root": data, "--run": seed, "--out": tmp_path / "r.html"} | changed
        return run(REPORT, *(part for option in options.items() for part in option), expect=1)

    assert "is no run: expected a folder attention" in told(**{"--run": tmp_path})
    assert "is not in VOC layout" in told(**{"--voc-root": tmp_path})
    assert "was trained on other classes" in told(**{"--voc-root": voc})
    assert "is a folder; expected a file" in told(**{"--out": tmp_path})
    assert "choose a place that can be written to" in told(**{"--out": seed / "attention" / "log.csv" / "r.html"})
    told(**{"--images": -1})
    told(**{"--failure": 101})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_page_that_cannot_be_completed_leaves_the_old_one(data, seed, tmp_path, monkeypatch):
    (tmp_path / "r.html").write_text("before")
    lost = tmp_path / "seed0"
    shutil.copytree(seed, lost)
    (lost / "maps" / "hybrid" / "e_0.png").write_bytes(b"no picture")
    options = ["--voc-root", data, "--out", tmp_path / "r.html"]
    assert "e_0.png cannot be read" in run(REPORT, *options, "--run", lost, expect=1)

    def full(path, text, **_):
        path.write_bytes(text[:1000].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device; make room" in run(REPORT, *options, "--run", seed, expect=1)
    assert (tmp_path / "r.html").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "seed0"]


# In a browser


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
