"""The page in a browser: clicked through as a visitor would. Run by `make test-browser`."""

import re

import pytest
from browser import DRIVER, Browser, browsing
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio")
pytest.importorskip("selenium", reason="clicking needs selenium")
if DRIVER is None:
    pytest.skip("clicking needs chromedriver", allow_module_level=True)
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address():
    from hf_robust_clip.demo.command import open_page

    page = open_page(["--reference", "digits-clip", "--radius", "24/255", "--limits.seconds", "600"])
    yield page.serve(wait=False)
    page.blocks.close()


@pytest.fixture
def browser(address):
    with browsing(address) as found:
        yield found
        assert not [line for line in found.errors() if "favicon" not in line]


def shown_numbers(browser: Browser, column: str) -> list[str]:
    """Percentages as they are read on the page."""
    return re.findall(r"[<>]? ?[\d.]+ %", browser.one(column).text)


def test_attack_and_defence(browser):
    """Attacked without a defence, then behind one, blindly and through it: numbers are read from the page."""
    browser.choose_example(4)
    assert "PGD-20 at 24/255, 10 classes" in browser.attack()
    plain, robust = browser.shares("#undefended"), browser.shares("#robust")
    assert plain == robust and len(shown_numbers(browser, "#robust")) == 12  # the same model twice
    clean, attacked = zip(*plain.values(), strict=True)
    assert sum(clean) <= 1.00001 and max(clean) > 0.9 and clean != attacked
    assert len(browser.all("#robust figure img")) == 7
    browser.choose("#defence", "ttc")
    browser.choose("#attack", "apgd-ce")
    assert "APGD-CE at 24/255" in browser.attack()
    through = browser.shares("#robust")
    assert "with ttc" in browser.one("#robust").text and browser.shares("#undefended") != plain
    assert "through the whole defence" in browser.one("#robust").text
    browser.one("#through input").click()
    browser.choose("#attack", "pgd-N")
    browser.attack()
    assert "without its defence" in browser.one("#robust").text and browser.shares("#robust") != through


def test_radius_zero_and_a_hundred_names(browser):
    browser.choose_example(2)
    browser.type("#true-class", "")
    browser.type("#classes", ", ".join(f"class {i}" for i in range(100)))
    browser.type("#radius", "0")
    assert "100 classes" in browser.attack() and "94 more" in browser.one("#robust").text
    assert "Radius 0" in browser.one("#robust .verdict").text
    assert all(len(shares) == 1 for shares in browser.shares("#robust").values())


def test_wrong_uploads_and_names_are_refused_in_a_line(browser, tmp_path):
    (tmp_path / "text.png").write_bytes(b"hello")
    Image.new("RGB", (30, 30)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    Image.new("L", (900, 2)).save(tmp_path / "thin.png")
    assert "no picture" in browser.attack()
    for name, told in (("text.png", "no picture"), ("cut.png", "picture"), ("thin.png", "crop")):
        browser.upload(tmp_path / name)
        browser.wait(lambda: browser.all("#picture img"))
        assert told in browser.attack()
        assert browser.all("#status .wrong") and not browser.all("#robust .look")
    browser.choose_example(0)
    for names, told in (("", "no class names"), ("seven", "only"), ("one, two, One", "twice")):
        browser.type("#classes", names)
        assert told in browser.attack()
    assert "Traceback" not in browser.driver.page_source


def test_stop(browser):
    browser.choose_example(1)
    browser.type("#radius", "0.5")
    browser.choose("#attack", "square")
    browser.wait(lambda: browser.one("#run").is_enabled())
    browser.one("#run").click()
    browser.wait(lambda: browser.one("#stop").is_enabled())
    browser.wait(
        lambda: "model calls" in browser.one("#status").text or "square" in browser.one("#status").text.lower()
    )
    browser.one("#stop").click()
    browser.wait(lambda: browser.one("#run").is_enabled())
    assert "stopped after" in browser.status and not browser.all("#robust .look")


def test_two_visitors_at_once(browser, address):
    """Each sees his own classes."""
    with browsing(address) as other:
        for own, names in ((browser, "one, seven"), (other, "zero, four, five")):
            own.choose_example(3)
            own.type("#true-class", "")
            own.type("#classes", names)
        for own in (browser, other):
            own.one("#run").click()
        for own, names in ((browser, {"one", "seven"}), (other, {"zero", "four", "five"})):
            own.wait(lambda own=own: own.all("#robust .look"))
            assert set(own.shares("#robust")) == names == set(own.shares("#undefended"))
