"""Compares the kernels of decode attention with the plain way, in Triton's interpreter.

Run as a module, with ``TRITON_INTERPRET=1``; see `tests.helpers.triton_interpreted`. Prints how
many cases there were. Bfloat16 is for a GPU: the interpreter multiplies its bit patterns.
"""

from __future__ import annotations

import torch

from kernels.triton import decode_attention
from tests.helpers.decode_cases import errors_of, make_case

CPU = torch.device("cpu")
CASES = [
    # lengths, heads, kv_heads, head_size, window, scale
    ([0], 1, 1, 1, 0, None),
    ([0, 1, 15, 16, 17, 63, 64, 65], 6, 2, 16, 0, None),
    ([700, 3, 256], 4, 4, 10, 0, 0.3),
    ([129, 300, 5, 4, 3], 6, 2, 20, 5, None),
    ([90, 0, 31], 3, 1, 64, 1, 2.0),
    ([200], 17, 1, 96, 150, None),
]


def main() -> None:
    decode_attention.PROGRAMS = 64  # each takes long here
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        for lengths, heads, kv_heads, head_size, window, scale in CASES:
            case = make_case(
                lengths,
                heads=heads,
                kv_heads=kv_heads,
                head_size=head_size,
                dtype=dtype,
                device=CPU,
                window=window,
                scale=scale,
            )
            error = errors_of(decode_attention.attend, case)
            assert error < bound, (dtype, lengths, error)
    print(2 * len(CASES))


if __name__ == "__main__":
    main()
