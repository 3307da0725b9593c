"""CLIP as a classifier of pixels in [0, 1], with the class names as a part of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from ..prompts.access import num_vision_prompts
from .pretrained import PretrainedClassifier
from .shared_prefix import PackedTexts, can_run_packed, encode_packed
from .texts import tokenize_prompts


class CLIPForZeroShotClassification(PretrainedClassifier, CLIPModel):
    """`CLIPModel` that maps pixels in [0, 1] to one logit per class: z_c = s * cos(f((x - mean) / std), t_c).

    Mean and std are read from the checkpoint's image processor, s from its `logit_scale`. The class embeddings t_c are
    those of the names given to `set_classes`, by the text side as it is: while any parameter of it is trainable they
    are computed in every forward; else they are kept, and computed again when anything that they depend on has changed
    (weights in any way, prompts, the active adapter and its scale), which every forward looks at, or none inside
    `fixed_class_embeds`. Neither is written into the weights: the checkpoint is a plain `CLIPModel` with its
    `CLIPProcessor`.

    With prompts in it (`ClipPromptConfig`) that have a leading dimension B, every sample has class embeddings of its
    own, (B, C, D), and the images are B groups of equal size.

        model = CLIPForZeroShotClassification.from_pretrained(path)
        model.set_classes(["cat", "dog"])
        logits = model(pixel_values).logits          # pixel_values: (B, 3, H, W) in [0, 1]
    """

    plain_cls: ClassVar[type[CLIPModel]] = CLIPModel
    processor_cls: ClassVar[type[CLIPProcessor]] = CLIPProcessor

    first_word: ClassVar[int] = 1

    @classmethod
    def from_clip(cls, clip: CLIPModel, processor: CLIPProcessor) -> CLIPForZeroShotClassification:
        """Give a `CLIPModel` that is already in memory this interface. The weights are shared, not copied."""
        return cls.around(clip, processor)

    @property
    def text_modules(self) -> tuple[nn.Module, ...]:
        """The text side: tower and projection."""
        return self.text_model, self.text_projection

    @property
    def image_modules(self) -> tuple[nn.Module, ...]:
        """The image encoder: tower and projection."""
        return self.vision_model, self.visual_projection

    @property
    def image_layers(self) -> nn.ModuleList:
        """The image tower's layers."""
        return self.vision_model.encoder.layers

    @property
    def image_head(self) -> tuple[nn.Module, ...]:
        """What follows the image tower's layers: norm and projection."""
        return self.vision_model.post_layernorm, self.visual_projection

    @property
    def num_image_tokens(self) -> int:
        """The class token and the patches."""
        return self.vision_model.embeddings.num_positions

    @property
    def embedding_width(self) -> int:
        """Of images and texts."""
        return self.config.projection_dim

    def tokenize(self, texts: Sequence[str], whole: bool = False, cut: bool = False) -> Tensor:
        """Token ids (R, L), padded after the end token to the longest text, or to the `whole` context. See
        `tokenize_prompts` for `cut`, and for what is refused.
        """
        text, tokenizer = self.config.text_config, self.require_processor().tokenizer
        end, length = self.text_model.eos_token_id, text.max_position_embeddings
        ids_RL = tokenize_prompts(tokenizer, texts, length, end, text.vocab_size, cut)
        return F.pad(ids_RL, (0, length - ids_RL.shape[1]), value=tokenizer.eos_token_id) if whole else ids_RL

    def encode_texts(self, ids_RL: Tensor, groups: int) -> Tensor:
        """Features (G, R, D) of texts, each as a whole, for groups with text prompts of their own."""
        features = self.get_text_features(input_ids=ids_RL.repeat(groups, 1)).pooler_output
        return features.view(groups, len(ids_RL), -1)

    def can_pack_texts(self) -> bool:
        """Whether texts may share what they begin with: the tower is causal."""
        return can_run_packed(self.text_model)

    def encode_packed_texts(self, texts: PackedTexts) -> Tensor:
        """Features (G, R, D) of packed texts."""
        return self.text_projection(encode_packed(self.text_model, texts))

    def encode_pixels(self, pixels_BCHW: Tensor, interpolate_pos_encoding: bool = False) -> tuple[Tensor, Tensor]:
        """Projected features (B, D) of normalised pixels, and the tower's last hidden states (B, T, W)."""
        found = self.get_image_features(pixel_values=pixels_BCHW, interpolate_pos_encoding=interpolate_pos_encoding)
        return found.pooler_output, found.last_hidden_state

    def project_patches(self, hidden_BTW: Tensor) -> Tensor:
        """(B, P, D) of hidden states (B, T, W), in which the class token comes first and prompts last; they are taken
        before the tower's last norm, which is made up for here.
        """
        end = hidden_BTW.shape[1] - num_vision_prompts(self.vision_model)
        return self.visual_projection(self.vision_model.post_layernorm(hidden_BTW[:, 1:end]))
