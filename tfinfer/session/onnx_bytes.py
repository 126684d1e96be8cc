"""Small ONNX graphs byte by byte: the runtime has no `onnx` package. The numbers are those of onnx.proto."""

from __future__ import annotations

from collections.abc import Sequence

INT64 = 7


def model(
    nodes: Sequence[bytes], inputs: Sequence[bytes], outputs: Sequence[bytes], constants: Sequence[bytes]
) -> bytes:
    """A whole model of opset 17 from what the functions below give."""
    parts = [(1, nodes), (5, constants), (11, inputs), (12, outputs)]
    graph = b"".join(field(number, part) for number, those in parts for part in those) + field(2, b"graph")
    return field(1, 8) + field(7, graph) + field(8, field(1, b"") + field(2, 17))


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **numbers: int) -> bytes:
    """One node of ONNX's own operators; numbers: its attributes, whole numbers."""
    names = [(1, name) for name in inputs] + [(2, name) for name in outputs] + [(4, operator)]
    attributes = (
        field(5, field(1, name.encode()) + field(3, number % (1 << 64)) + field(20, 2))
        for name, number in numbers.items()
    )
    return b"".join(field(number, text.encode()) for number, text in names) + b"".join(attributes)


def value(name: str, element_type: int, shape: Sequence[int | str]) -> bytes:
    """An input or output; sizes that vary have a name."""
    sizes = (field(1, size) if isinstance(size, int) else field(2, size.encode()) for size in shape)
    tensor = field(1, element_type) + field(2, b"".join(field(1, size) for size in sizes))
    return field(1, name.encode()) + field(2, field(1, tensor))


def constant(name: str, shape: Sequence[int], numbers: Sequence[int]) -> bytes:
    """A tensor of int64."""
    sizes = b"".join(field(1, size) for size in shape)
    raw = b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)
    return sizes + field(2, INT64) + field(8, name.encode()) + field(9, raw)


def field(number: int, value: bytes | int) -> bytes:
    """A protobuf field: an integer, or bytes with their length in front."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first, the top bit set on all but the last."""
    low = b""
    while value > 0x7F:
        low += bytes([value & 0x7F | 0x80])
        value >>= 7
    return low + bytes([value])
