"""test_page.py - the page that sample.py --html and train.py write, in chromium, driven by playwright.

    python -m pytest -q geometry/test_page.py
"""
import re
import shutil

import numpy as np
import pytest
import torch

import sample
from conftest import HERE, once, run
from geometry import page, surface

CHROMIUM = shutil.which("chromium")
FLAGS = "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-background-networking", "--no-sandbox"
TWO_FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"      # after `redraw`
COUNT = 4           # samples
# the share of pixels that are not empty
DRAWN = """canvas => { const { width, height } = canvas, copy = new OffscreenCanvas(width, height).getContext("2d");
    copy.drawImage(canvas, 0, 0);
    return copy.getImageData(0, 0, width, height).data.filter((x, i) => i % 4 == 3 && x).length / width / height; }"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """A page of four samples in all four representations, open in a browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="to test the page: pip install playwright")
    if not CHROMIUM:
        pytest.skip("to test the page: apt-get install chromium")

    def fill(out):
        flags = "--rep", "all", "--resolution", 32, "--points", 2048, "--html", "--out", out
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(surface, "COARSE", 8)
            assert run(sample.main, "--text", "a chair", *flags) == 0
        text = (out / "a-chair.html").read_text()
        samples = re.search(r'"samples": \[(.*)\]\}</script>', text, re.S)[1]
        (out / "four.html").write_text(text.replace(samples, ", ".join([samples] * COUNT)))
    out = once(tmp_path_factory, "page", fill)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1200, "height": 1100})
        tab.faults = []
        tab.on("console", lambda message: tab.faults.append(message.text))
        tab.on("pageerror", lambda error: tab.faults.append(str(error)))
        tab.on("request", lambda request: tab.faults.append(request.url) if request.url[:5] != "file:" else None)
        tab.add_init_script(f"addEventListener('load', () => {TWO_FRAMES}.then(() => opened = performance.now()))")
        tab.goto((out / "four.html").as_uri())
        yield tab
        browser.close()


def picture(tab, i=0):
    tab.evaluate(TWO_FRAMES)
    return tab.locator("canvas").nth(i).screenshot()


def test_a_page_opens_quickly(tab):
    """To the pictures of all samples: a second on two free cores, three where a busy core draws them."""
    tab.reload()
    tab.wait_for_function("window.opened")
    assert tab.evaluate("opened") < 10_000, "milliseconds"
    assert tab.locator("canvas").count() == COUNT


def test_every_representation_is_drawn(tab):
    """Each differs from the others, and no canvas is empty; nothing is requested, no error."""
    seen = set()
    for name in ("surface", "points", "low-poly", "Gaussians"):
        for button in tab.get_by_role("button", name=name, exact=True).all():
            button.click()
        seen.add(picture(tab))
        shares = tab.evaluate(f"[...document.querySelectorAll('canvas')].map({DRAWN})")
        assert min(shares) > .05, name
    assert len(seen) == 4 and not tab.faults


def test_a_drag_turns_all_shapes_and_the_wheel_zooms(tab):
    before = picture(tab, 1)
    tab.locator("canvas").first.hover()
    tab.mouse.down()
    tab.mouse.move(220, 250)
    tab.mouse.up()
    turned = picture(tab, 1)
    tab.mouse.wheel(0, 300)
    tab.wait_for_function("view.zoom < 1")
    assert len({before, turned, picture(tab, 1)}) == 3
    assert tab.evaluate("[zoomBy(1e9), zoomBy(1e-9)]") == [8, .3]        # within limits
    tab.evaluate("view.zoom = 1")


def test_the_slider_shows_how_a_sample_came_to_be(tab):
    """Its last position is the sample; the one before, all tokens; each step is another picture, with its own words."""
    slider, words = tab.locator("input").first, set()
    steps, seen = int(slider.get_attribute("max")), set()
    assert steps == 10
    for step in range(steps + 1):
        slider.fill(str(step))
        seen.add(picture(tab))
        words.add(tab.locator("small").first.inner_text())
    assert len(seen) == len(words) == steps + 1 and {"64 of 64 tokens", "seed 0"} <= words


def test_a_link_saves_the_file(tab, tmp_path):
    with tab.expect_download() as download:
        tab.locator("a").first.click()
    download.value.save_as(tmp_path / "saved.glb")
    assert download.value.suggested_filename == "a-chair-0-sdf.glb"
    assert (tmp_path / "saved.glb").read_bytes()[:4] == b"glTF"


# ---------------------------------------------------------------------------- without a browser

@pytest.mark.parametrize("name, options", [("tiny", {"rounds": 0}), ("vat", {}), ("lost", {"registers": 5})])
def test_the_last_step_is_the_sample(name, options):
    """For LTM3D after as many steps as `generate` takes; of LoST with all registers that are asked for."""
    model = sample.load(HERE / "checkpoints" / name)
    tokens = model.sample("a chair", seed=3, **options)[0]
    steps = model.steps(["a chair"], [(3, 0)], **options)
    assert torch.allclose(steps[-1][1].float(), tokens.float(), atol=1e-5)
    assert all(not torch.equal(one[1], other[1]) for one, other in zip(steps, steps[1:]))
    if name == "tiny":
        states = [np.array([*states], int) for _, _, states in steps]
        assert len(steps) == 10 and (states[-1] > 0).all()
        for before, after in zip(states, states[1:]):
            assert ((after == 1) == (before > 0)).all()       # what was new is known


def test_a_prompt_is_text(tmp_path):
    """One style and one script; a prompt cannot end the script."""
    page.write(tmp_path / "page.html", "</script><b>", "", [])
    text = (tmp_path / "page.html").read_text()
    parts = re.findall(r"<style>.*?</style>|<script>.*?</script>", text, re.S)
    assert len(parts) == 2 and "<b>" not in text


def test_a_run_keeps_a_page(overfitted):
    """train.py: losses and pictures of its stages."""
    text = (overfitted / "index.html").read_text()
    assert all(f'"name": "{name}"' in text for name in ("losses", "tokenizer", "backbone"))
