import math
import subprocess
import sys

import pytest
import torch

from p2p.errors import RemoteProtocolError
from p2p.wire.tensor import WireTensor, decode_tensor, encode_tensor_header
from petald.tensors import from_wire, to_wire

CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def read(tensor: WireTensor, *, dtype=torch.float32, hidden_size=4, max_tokens=3):
    return from_wire(
        tensor, hidden_size=hidden_size, max_tokens=max_tokens, dtype=dtype, device=CPU
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_round_trip_is_exact_wherever_the_bytes_stand(dtype, offset):
    hidden = torch.randn(3, 4).to(dtype)
    sent = to_wire(hidden)
    assert (sent.dtype, sent.shape, sent.codec) == (str(dtype)[6:], (3, 4), "raw")
    frame = memoryview(b"x" * offset + bytes(sent.data))
    came = read(WireTensor(sent.dtype, sent.shape, frame[offset:]), dtype=dtype)
    assert came.dtype == dtype
    assert torch.equal(came, hidden)


def test_round_trip_through_the_wires_own_encoding():
    hidden = torch.randn(2, 4, dtype=torch.bfloat16)
    sent = to_wire(hidden)
    came = decode_tensor(encode_tensor_header(sent) + bytes(sent.data))
    assert torch.equal(read(came), hidden.float())


def test_to_wire_shares_memory_and_takes_rows_that_are_not_contiguous():
    hidden = torch.zeros(2, 4)
    sent = to_wire(hidden)
    hidden[0, 0] = 1
    assert bytes(sent.data)[:4] == b"\0\0\x80?"
    whole = torch.arange(12.0).view(3, 4)
    assert torch.equal(read(to_wire(whole.t()), hidden_size=3, max_tokens=4), whole.t())
    assert torch.equal(read(to_wire(whole[1:2])), whole[1:2])


@pytest.mark.parametrize(
    ("tensor", "fragment"),
    [
        (WireTensor("float32", (4,), bytes(16)), "shape [4]"),
        (WireTensor("float32", (1, 1, 4), bytes(16)), "shape [1, 1, 4]"),
        (WireTensor("float32", (1, 5), bytes(20)), "[1 to 3, 4] was expected"),
        (WireTensor("float32", (0, 4), b""), "shape [0, 4]"),
        (WireTensor("float32", (4, 4), bytes(64)), "shape [4, 4]"),
        (WireTensor("int32", (1, 4), bytes(16)), "came as int32"),
        (WireTensor("uint8", (1, 4), bytes(4)), "came as uint8"),
        (WireTensor("float32", (1, 4), b"?", "zip"), "codec 'zip'"),
    ],
)
def test_what_is_no_hidden_state_is_refused(tensor, fragment):
    with pytest.raises(RemoteProtocolError) as caught:
        read(tensor)
    assert fragment in str(caught.value)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(dtype, number):
    hidden = torch.zeros(2, 4, dtype=dtype)
    hidden[1, 2] = number
    with pytest.raises(RemoteProtocolError, match="not finite"):
        read(to_wire(hidden))


def test_reading_warns_of_nothing():
    program = (
        "import torch\nfrom petald.tensors import *\n"
        "t = WireTensor('float32', (1, 2), memoryview(bytes(8)))\n"
        "from_wire(t, hidden_size=2, max_tokens=1, dtype=torch.float32, "
        "device=torch.device('cpu'))\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_each_codec_crosses_the_wire(codec):
    hidden = torch.randn(3, 4)
    sent = to_wire(hidden, codec)
    came = decode_tensor(encode_tensor_header(sent) + bytes(sent.data))
    torch.testing.assert_close(read(came), hidden, rtol=0, atol=0.05)


def test_encoded_rows_of_the_wrong_length_are_refused():
    sent = to_wire(torch.randn(3, 4), "int8")
    with pytest.raises(RemoteProtocolError, match="3 rows take 18"):
        read(WireTensor(sent.dtype, sent.shape, bytes(sent.data) + b"x", "int8"))
