"""SigLIP as a classifier of pixels in [0, 1], with the class names as a part of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import SiglipModel, SiglipProcessor

from ..prompts.access import num_vision_prompts
from .pretrained import PretrainedClassifier
from .texts import tokenize_padded


class SiglipForZeroShotClassification(PretrainedClassifier, SiglipModel):
    """`SiglipModel` (SigLIP, and SigLIP2 of fixed resolution) that maps pixels in [0, 1] to one logit per class:

        z_c = s * cos(f((x - mean) / std), t_c) + b

    with s = exp(logit_scale) and b = logit_bias of the checkpoint: the logits are `SiglipModel`'s `logits_per_image`,
    and sigmoid(z_c) is the probability that class c, by itself, describes the image. Over several classes b cancels:
    attacks, objectives and probabilities that compare classes, softmax(z), are the same with any b. Trainings leave b
    as it was; they compare classes, so that afterwards sigmoid(z_c) is no calibrated probability.

    Texts are lower-cased, as they were when SigLIP was trained (transformers' pipeline does so only where the
    tokenizer does), and padded to the whole context. The text tower isn't causal, reads its padding, and is pooled at
    the last token, mostly padding too; so nothing is cut and nothing shared, and there is no start token after which
    learned text prompts could stand.

    f is pooled by attention: a learned query looks at all tokens, those of vision prompts included, and there is no
    class token. Everything else is as in `CLIPForZeroShotClassification`.

    Raises ValueError for a configuration without the pooling head, or with texts of another width than images.
    Source: arXiv 2303.15343, arXiv 2502.14786.
    """

    plain_cls: ClassVar[type[SiglipModel]] = SiglipModel
    processor_cls: ClassVar[type[SiglipProcessor]] = SiglipProcessor
    first_word: ClassVar[int] = 0

    def __init__(self, config: Any):
        vision, text = config.vision_config, config.text_config
        if not vision.vision_use_head:
            raise ValueError("vision_use_head=False: this SigLIP has no pooled image feature to compare with texts.")
        if text.projection_size != vision.hidden_size:
            raise ValueError(
                f"projection_size={text.projection_size} of texts must be the images' {vision.hidden_size}."
            )
        super().__init__(config)

    @classmethod
    def from_siglip(cls, siglip: SiglipModel, processor: SiglipProcessor) -> SiglipForZeroShotClassification:
        """Give a `SiglipModel` that is already in memory this interface. The weights are shared, not copied."""
        return cls.around(siglip, processor)

    @property
    def text_modules(self) -> tuple[nn.Module, ...]:
        """The text side: the tower, its projection included."""
        return (self.text_model,)

    @property
    def image_modules(self) -> tuple[nn.Module, ...]:
        """The image encoder: the tower, its pooling head included."""
        return (self.vision_model,)

    @property
    def image_layers(self) -> nn.ModuleList:
        """The image tower's layers."""
        return self.vision_model.encoder.layers

    @property
    def image_head(self) -> tuple[nn.Module, ...]:
        """What follows the image tower's layers: norm and pooling head."""
        return self.vision_model.post_layernorm, self.vision_model.head

    @property
    def num_image_tokens(self) -> int:
        """The patches."""
        return self.vision_model.embeddings.num_positions

    @property
    def embedding_width(self) -> int:
        """Of images and texts."""
        return self.config.vision_config.hidden_size

    def prepared_texts(self, texts: Sequence[str]) -> list[str]:
        """Texts in lower case."""
        return [text.lower() for text in texts]

    def tokenize(self, texts: Sequence[str], whole: bool = True, cut: bool = False) -> Tensor:
        """Token ids (R, L), padded to the whole context L of 64 tokens in any case. See `tokenize_padded` for `cut`,
        and for what is refused.
        """
        text, tokenizer = self.config.text_config, self.require_processor().tokenizer
        length, own = text.max_position_embeddings, self.prepared_texts(texts)
        return tokenize_padded(tokenizer, own, length, text.vocab_size, cut)

    def encode_texts(self, ids_RL: Tensor, groups: int) -> Tensor:
        """Features (G, R, D) of texts, for groups with words of their own."""
        features = self.get_text_features(input_ids=ids_RL.repeat(groups, 1)).pooler_output
        return features.view(groups, len(ids_RL), -1)

    def can_pack_texts(self) -> bool:
        """No: every token reads all others, padding included."""
        return False

    def encode_pixels(self, pixels_BCHW: Tensor, interpolate_pos_encoding: bool = False) -> tuple[Tensor, Tensor]:
        """Pooled features (B, D) of normalised pixels, and the tower's last hidden states (B, T, D), normed."""
        found = self.get_image_features(pixel_values=pixels_BCHW, interpolate_pos_encoding=interpolate_pos_encoding)
        return found.pooler_output, found.last_hidden_state

    def project_patches(self, hidden_BTW: Tensor) -> Tensor:
        """(B, P, D) of hidden states (B, T, D), in which prompts come last: each patch is sent through the pooling
        head as if it were the only token. Attention to a single token returns its value, whatever the query; so this
        is what f would be if all tokens were equal to this one, a vector in the space of f and of the texts.
        """
        end = hidden_BTW.shape[1] - num_vision_prompts(self.vision_model)
        patches_BPW = hidden_BTW[:, :end]
        return self.vision_model.head(patches_BPW.flatten(0, 1)[:, None]).unflatten(0, patches_BPW.shape[:2])

    def score(self, image_embeds_BD: Tensor, class_embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in every classifier, with b added to the logits."""
        logits_BC, cosine_BC, image_embeds_BD = super().score(image_embeds_BD, class_embeds)
        return logits_BC + self.logit_bias.to(logits_BC), cosine_BC, image_embeds_BD
