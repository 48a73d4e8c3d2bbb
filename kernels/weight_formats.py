"""The names of weight formats, for whoever checks a configuration and needs no torch for it.

`kernels.quant` makes them.
"""

WEIGHT_FORMATS: dict[str, str] = {
    "none": "as the checkpoint has them, in dtype",
    "int8": "8 bits for each weight, half of bfloat16's memory",
    "nf4": "4 bits for each weight, a quarter of bfloat16's memory, on CUDA and on processors with "
    "AVX-512",
    "int4": "4 bits for each weight on any processor",
}
"""By name: what each makes of the weights."""
