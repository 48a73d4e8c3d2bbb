"""The names of codecs, for whoever checks a configuration and needs no torch for it."""

CODECS: dict[str, str] = {
    "raw": "as they are in memory",
    "bfloat16": "16 bits with float32's range",
    "float16": "16 bits with more digits and less range",
    "int8": "8 bits in equal steps, scaled in small groups",
    "dynamic8": "8 bits with finer steps for small values",
    "hadamard5": "5 bits, rotated, a third of bfloat16's bytes",
    "hadamard4": "4 bits, rotated, less than that, at a price in quality",
}
"""By name: how each writes hidden states."""
