"""Secrets stay out of logs and stored settings: passwords in URLs, bearer tokens, and the keys from the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engrain.settings import Settings

HIDDEN = "***"
_IN_URL = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<who>[^\s/@:]*):(?P<secret>[^\s/]+)@")
_NAMED = re.compile(
    r"""(?ix) \b (?P<name> [a-z0-9_-]*(?:password|passwd|secret|api[_-]?key|token|authorization) )
        (?P<sign> ["']? \s* [=:] \s* ["']? (?:bearer\s+)? ) (?P<secret> [^\s"'&,;}]+ )"""
)
_BEARER = re.compile(r"(?i)\b(bearer)\s+[^\s\"',;]+")
_SECRET_KEY = re.compile(r"(?i)(password|passwd|secret|api[_-]?key|authorization)$|^(engrain_)?(ui_)?token$")


def redact(text: str) -> str:
    """The text with `***` in the place of each secret that can be known as one."""
    settings = Settings()
    for secret in (settings.api_key, settings.coach_api_key, settings.ui_token):
        if key := secret.get_secret_value():
            text = text.replace(key, HIDDEN)
    text = _IN_URL.sub(rf"\g<scheme>\g<who>:{HIDDEN}@", text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    return _NAMED.sub(_named, text)


def _named(match: re.Match[str]) -> str:
    # `max_tokens=64` and `token 7` are no secrets, and a number is none of ours
    if match["secret"].isdigit():
        return match[0]
    return f"{match['name']}{match['sign']}{HIDDEN}"


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret."""
    return _SECRET_KEY.search(name) is not None


def redacted(value: Any) -> Any:
    """JSON values without secrets: those under a telling key, and those inside texts."""
    if isinstance(value, Mapping):
        return {key: HIDDEN if is_secret(str(key)) and item else redacted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value
