"""Eight bits a weight on an NVIDIA GPU: LLM.int8() as bitsandbytes computes it.

Activations are quantised as well, but for their outliers: large features are multiplied in 16 bits.
Which features these are depends on all rows of a step, so what one row gives changes a little, by
an error of the same size as that of int8 itself, with the rows beside it. Gradients are those of
the product with the dequantised weights, as everywhere.

Source: Dettmers et al. 2022, arXiv:2208.07339. `kernels.quant.llm_int8` is the plain reference.

Shapes: S rows, I width in, O width out, T rows of a tile.
"""

from __future__ import annotations

import torch

from kernels.quant.bnb import import_bitsandbytes
from kernels.quant.int8 import LARGEST_CODE
from kernels.quant.llm_int8 import OUTLIER_THRESHOLD
from kernels.quant.matrix import multiply_by_tiles


class Int8GpuMatrix:
    """Weights ``[O, I]`` in 8 bits, on a GPU; a `kernels.quant.matrix.QuantisedMatrix`.

    Args:
        codes_OI: int8, contiguous.
        scales_O: what a code of one is worth.
        dtype: of the activations. In more than 16 bits they stay as they are, and only the weights
            are quantised.

    Raises:
        UnknownWeightFormat: bitsandbytes is missing.
    """

    row_step = 1
    is_fixed = False  # which features are outliers, the device tells the host at every product

    def __init__(self, codes_OI: torch.Tensor, scales_O: torch.Tensor, dtype: torch.dtype) -> None:
        self.shape = (codes_OI.shape[0], codes_OI.shape[1])
        self._codes_OI = codes_OI
        self._largest_O = scales_O.float() * LARGEST_CODE  # as bitsandbytes has it
        self._is_small = dtype in (torch.float16, torch.bfloat16)
        self._functional = import_bitsandbytes().functional

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Codes, and the largest weight of each row."""
        return self._codes_OI, self._largest_O

    def multiply(self, x_SI: torch.Tensor) -> torch.Tensor:
        """See `kernels.quant.matrix.QuantisedMatrix.multiply`."""
        if not self._is_small:
            return multiply_by_tiles(self, x_SI)
        x_SI = x_SI.contiguous()
        # bitsandbytes.matmul does the same, but logs a warning for each product in bfloat16.
        codes_SI, largest_S, outlier_columns = self._functional.int8_vectorwise_quant(
            x_SI.to(torch.float16), threshold=OUTLIER_THRESHOLD
        )
        output_SO: torch.Tensor = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            x_SI, codes_SI, self._codes_OI, largest_S, self._largest_O, outlier_columns
        )[0]
        return output_SO

    def read_rows(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """See `kernels.quant.matrix.QuantisedMatrix.read_rows`."""
        wide = torch.promote_types(dtype, torch.float32)
        scales_T1 = self._largest_O[start:end, None].to(wide) / LARGEST_CODE
        return self._codes_OI[start:end].to(wide).mul_(scales_T1).to(dtype)
