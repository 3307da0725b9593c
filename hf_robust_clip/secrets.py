"""Access tokens: recognised wherever they stand, and kept out of files, logs and error lines."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}|hf_(?:jwt|oauth)_[\w.-]{20,}|api_org_[A-Za-z0-9]{20,}")
CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+(?=@)")  # https://user:password@host
TOKEN_KEY = re.compile(r"(?:^|[._-])(?:token|api_key|password|secret)$", re.IGNORECASE)
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
SHOWN = "<token>"


def is_token_key(key: Any) -> bool:
    """Whether a setting of this name is meant to hold a token."""
    return isinstance(key, str) and TOKEN_KEY.search(key) is not None


def holds_token(text: str) -> bool:
    """Whether a text holds what looks like an access token, or an address with a password in it."""
    return TOKEN.search(text) is not None or any(":" in found for found in CREDENTIALS.findall(text))


def without_tokens(text: str) -> str:
    """The text with `<token>` in the place of every token and password: for what is printed.

    Tokens of the environment are known whatever they look like.
    """
    for value in (os.environ.get(name, "") for name in VARIABLES):
        if len(value) >= 8:
            text = text.replace(value, SHOWN)
    return CREDENTIALS.sub(SHOWN, TOKEN.sub(SHOWN, text))


def without_token_keys(settings: Any) -> Any:
    """Nested settings without the keys that are meant for tokens: for what is written to files."""
    if isinstance(settings, Mapping):
        return {key: without_token_keys(value) for key, value in settings.items() if not is_token_key(key)}
    return [without_token_keys(value) for value in settings] if isinstance(settings, list | tuple) else settings


def refuse_tokens(value: Any, name: str) -> None:
    """Raise ValueError, without repeating it, if a token stands anywhere in nested settings, in a key or a value.

    Values of keys that are meant for a token are left alone.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_tokens(str(key), f"a key of {name}")
            if not is_token_key(key):
                refuse_tokens(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            refuse_tokens(inner, f"{name}[{number}]")
    elif holds_token(str(value)):
        raise ValueError(f"{name} holds an access token or a password; take it out, and give tokens by HF_TOKEN.")


def hide_arguments() -> None:
    """Take tokens out of this process's own list of arguments, which some trackers write down."""
    for i, word in enumerate(sys.argv[1:], start=1):
        key, equals, _ = word.partition("=")
        if equals and is_token_key(key):
            word = f"{key}={SHOWN}"
        elif is_token_key(sys.argv[i - 1]) and sys.argv[i - 1].startswith("--"):
            word = SHOWN
        sys.argv[i] = without_tokens(word)
