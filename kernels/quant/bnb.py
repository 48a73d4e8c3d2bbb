"""The border to bitsandbytes: imported when first needed, for that takes seconds."""

from __future__ import annotations

import functools
import logging
from typing import Any

from kernels.errors import UnknownWeightFormat

_PROBING_LOGGER = "bitsandbytes.backends.cpu.ops"


class _NoProbing(logging.Filter):
    """Drops a warning that says nothing to a user of petald.

    On some CPUs bitsandbytes looks for a package named ``kernels`` from Hugging Face, finds ours,
    and advises to install the other one. It goes on with its own code, which is what we want.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return "gemm_4bit_forward from kernels-community" not in record.msg


@functools.cache
def import_bitsandbytes() -> Any:
    """The package ``bitsandbytes``.

    Raises:
        UnknownWeightFormat: it is not installed, or does not work here.
    """
    logger = logging.getLogger(_PROBING_LOGGER)
    no_probing = _NoProbing()
    logger.addFilter(no_probing)
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UnknownWeightFormat(
            f"bitsandbytes cannot be used ({error}); install it, or choose another weight format"
        ) from error
    finally:
        logger.removeFilter(no_probing)
    return bitsandbytes
