"""python tests/demo/screenshot.py MODEL PICTURE [FLAG ...]    the page of a model beside digits-clip, as a PNG.

It takes the first example on which the undefended model is fooled and the other one isn't, if there is one.
"""

import sys
import time
from io import BytesIO
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from browser import Browser, browsing

from hf_robust_clip.demo.command import open_page

WIDTH = 1300
COLOURS = 200  # of the PNG, which is small then


def telling(browser: Browser) -> None:
    """Attack examples until the models differ."""
    for number in range(len(browser.all("#examples button.gallery-item"))):
        browser.choose_example(number)
        browser.attack()
        if browser.all("#undefended .fell") and browser.all("#robust .held"):
            return


def main(model: str, picture: str, *flags: str) -> None:
    page = open_page(["--model_name_or_path", model, "--reference", "digits-clip", *flags])
    try:
        with browsing(page.serve(wait=False), WIDTH, 1620) as browser:
            telling(browser)
            browser.driver.execute_script("window.scrollTo(0, 0); document.activeElement.blur()")
            height = browser.driver.execute_script("return document.querySelector('gradio-app').scrollHeight")
            browser.driver.set_window_size(WIDTH, height + 160)
            time.sleep(2)  # what fades has faded
            browser.wait(lambda: not browser.all("[data-testid=status-tracker].translucent"))
            whole = Image.open(BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")
    finally:
        page.blocks.close()
    whole.quantize(COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)
    print(f"wrote {picture}, {Path(picture).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
