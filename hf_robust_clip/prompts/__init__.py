"""Adversarial prompts as a PEFT method. Importing this registers it under the name `clip_prompt`."""

import peft.utils.peft_types as _peft_types
from peft.utils import register_peft_method


def _extend_enum(name: str) -> None:
    """PEFT takes only members of its enum `PeftType`, which has no door for other packages: add one."""
    enum = _peft_types.PeftType
    if name in enum.__members__:
        return
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    type.__setattr__(enum, name, member)


_extend_enum("CLIP_PROMPT")

from .config import ClipPromptConfig  # noqa: E402  # reads the enum
from .layer import ClipPromptLayer  # noqa: E402
from .model import ClipPromptModel, check_prompts  # noqa: E402

register_peft_method(name="clip_prompt", config_cls=ClipPromptConfig, model_cls=ClipPromptModel)
