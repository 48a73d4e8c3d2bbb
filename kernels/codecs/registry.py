"""The codecs by their names on the wire."""

from __future__ import annotations

from kernels.codecs.cast import CastCodec
from kernels.codecs.codec import Codec
from kernels.codecs.dynamic8 import Dynamic8Codec
from kernels.codecs.hadamard import HadamardCodec
from kernels.codecs.int8 import Int8Codec
from kernels.codecs.raw import RawCodec
from kernels.errors import UnknownCodec

_ALL: tuple[Codec, ...] = (
    RawCodec(),
    CastCodec("bfloat16"),
    CastCodec("float16"),
    Int8Codec(),
    Dynamic8Codec(),
    HadamardCodec(5),
    HadamardCodec(4),
)

_CODECS = {codec.name: codec for codec in _ALL}

CODEC_NAMES = tuple(_CODECS)


def find_codec(name: str) -> Codec:
    """The codec of a name.

    Raises:
        UnknownCodec: there is none.
    """
    codec = _CODECS.get(name)
    if codec is None:
        raise UnknownCodec(f"the codec {name[:32]!r} is not known; there are {', '.join(_CODECS)}")
    return codec
