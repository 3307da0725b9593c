"""A small real CLIP (0.35 M parameters, 8 px) pretrained on handwritten digits by `recipes/pretrain.py`."""

from pathlib import Path

EMBEDDED_MODEL = "digits-clip"  # its name in recipes and cards


def digits_clip_path() -> str:
    """The folder of the checkpoint, for `from_pretrained`."""
    return str(Path(__file__).parent)
