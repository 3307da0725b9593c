"""CLIP and SigLIP as classifiers of pixels in [0, 1], with the class names as a part of the model."""

from .auto import AutoModelForZeroShotClassification
from .checkpoints import adapter_config, base_of, with_adapter
from .classifier import ZeroShotClassifier, ZeroShotOutput, without_gradients
from .clip import CLIPForZeroShotClassification
from .siglip import SiglipForZeroShotClassification
from .texts import PAPER_TEMPLATE, check_classes, check_same_classes, resolution_of, tokenize_prompts
