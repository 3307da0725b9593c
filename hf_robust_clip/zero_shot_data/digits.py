"""scikit-learn's handwritten digits as a `datasets.Dataset` with `image` and `label` columns, in a fixed split.

Source: the test part of the UCI ML hand-written digits (Alpaydin and Kaynak, 1998), 1,797 pictures of 8 x 8 pixels
with 17 grey levels, as shipped by `sklearn.datasets.load_digits`. Nothing is downloaded.
"""

from datasets import ClassLabel, Dataset, Features, Image

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GREY_LEVELS = 16  # scikit-learn stores 0 (background) .. 16 (ink)


def digits_split(split: str) -> Dataset:
    """The `"train"` (1,297 pictures) or `"test"` (500) part, stratified by class; the split never changes.

    Pictures are 8 x 8 RGB with value 255/16 per scikit-learn grey level; labels are the digits themselves.
    Raises ValueError for another split name.
    """
    import numpy as np
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} does not exist for the digits; choose 'train' or 'test'.")
    digits = load_digits()
    rows = train_test_split(np.arange(len(digits.target)), test_size=500, random_state=0, stratify=digits.target)
    chosen = np.sort(rows[split == "test"])
    grey = np.rint(digits.images[chosen] * (255 / GREY_LEVELS)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=list(DIGIT_NAMES))})
    images = [PILImage.fromarray(picture).convert("RGB") for picture in grey]
    return Dataset.from_dict({"image": images, "label": digits.target[chosen].tolist()}, features=features)
