"""Writes a configuration as TOML, which the standard library only reads."""

from __future__ import annotations

import json
from collections.abc import Mapping

Value = str | bool | int | float | list[str]


def format_toml(sections: Mapping[str, Mapping[str, Value]]) -> str:
    """The sections, in their order, as TOML."""
    parts = []
    for name, values in sections.items():
        lines = [f"{key} = {_format_value(value)}" for key, value in values.items()]
        parts.append("\n".join([f"[{name}]", *lines]) + "\n")
    return "\n".join(parts)


def _format_value(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A basic string of TOML escapes as JSON does, but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, list):
        return f"[{', '.join(map(_format_value, value))}]"
    return repr(value)
