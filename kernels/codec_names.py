"""The names of codecs, for whoever checks a configuration and needs no torch for it.

`kernels.codecs` makes them.
"""

CODECS: dict[str, str] = {
    "raw": "as they are in memory",
    "int8": "8 bits for each value, scaled in small groups",
}
"""By name: how each writes hidden states."""

CODEC_NAMES = tuple(CODECS)
