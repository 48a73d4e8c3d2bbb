"""The names of codecs, for whoever checks a configuration and needs no torch for it."""

CODECS: dict[str, str] = {
    "raw": "as they are in memory",
    "bfloat16": "16 bits with float32's range",
    "float16": "16 bits with more digits and less range",
    "int8": "8 bits in equal steps, scaled in small groups",
    "dynamic8": "8 bits with finer steps for small values",
    "int4": "4 bits, for links on which nothing else is usable",
}
"""By name: how each writes hidden states."""
