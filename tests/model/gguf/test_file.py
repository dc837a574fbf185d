"""The GGUF reader: what gguf's own writer wrote comes back, and no file can hurt it."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from model.gguf.file import GGUFError, GGUFFile

KINDS = [
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q8_0,
]


def write_gguf(path: Path, *, alignment: int | None = None) -> dict[str, np.ndarray]:
    """A small file with every kind of value; returns the tensors' values."""
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_string("text", "häé😀")
    writer.add_bool("yes", True)
    for name, value in {"add_uint8": 200, "add_int8": -3, "add_uint16": 60000}.items():
        getattr(writer, name)(name, value)
    for name, value in {"add_int16": -3000, "add_uint32": 1 << 31, "add_int32": -5}.items():
        getattr(writer, name)(name, value)
    for name, value in {"add_uint64": 1 << 63, "add_int64": -(1 << 62)}.items():
        getattr(writer, name)(name, value)
    writer.add_float32("add_float32", 0.5)
    writer.add_float64("add_float64", 0.1)
    writer.add_array("strings", ["a", "", "ü"])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("bools", [True, False])
    values = {"norm.weight": rng.standard_normal(64, np.float32)}
    writer.add_tensor("norm.weight", values["norm.weight"])
    for kind in KINDS:
        value = rng.standard_normal((6, 64), np.float32)
        packed = quantize(value, kind)
        if kind == GGMLQuantizationType.F16:
            writer.add_tensor(kind.name, packed)
        else:
            writer.add_tensor(kind.name, packed, raw_dtype=kind)
        values[kind.name] = gguf.quants.dequantize(packed, kind)
    values["cube"] = rng.standard_normal((2, 3, 32), np.float32)
    writer.add_tensor("cube", values["cube"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    write_gguf(path)
    return path


class TestReads:
    @pytest.mark.parametrize("alignment", [None, 64, 4096])
    def test_tensors_are_the_writers(self, tmp_path: Path, alignment: int | None) -> None:
        values = write_gguf(tmp_path / "a.gguf", alignment=alignment)
        file = GGUFFile.open(tmp_path / "a.gguf")
        assert list(file.tensors) == list(values)
        for name, value in values.items():
            assert file.tensors[name].shape == value.shape
            np.testing.assert_array_equal(file.dequantize(name), value)
            assert file.dequantize(name).dtype == np.float32

    def test_raw_views(self, small: Path) -> None:
        file = GGUFFile.open(small)
        assert file.read("Q4_1").shape == (6, 2 * 20)
        assert file.read("norm.weight").shape == (64 * 4,)
        assert file.read("cube").shape == (6, 32 * 4)
        view = file.read("Q4_1")
        assert not view.flags.owndata and not view.flags.writeable
        tensor = file.tensors["Q4_1"]
        stored = small.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert view.tobytes() == stored

    def test_metadata(self, small: Path) -> None:
        metadata = GGUFFile.open(small).metadata
        assert metadata == {
            "general.architecture": "llama",
            "text": "häé😀",
            "yes": True,
            "add_uint8": 200,
            "add_int8": -3,
            "add_uint16": 60000,
            "add_int16": -3000,
            "add_uint32": 1 << 31,
            "add_int32": -5,
            "add_uint64": 1 << 63,
            "add_int64": -(1 << 62),
            "add_float32": 0.5,
            "add_float64": 0.1,
            "strings": ["a", "", "ü"],
            "ints": [1, -2, 3],
            "floats": [0.5, 1.5],
            "bools": [True, False],
        }
        assert metadata["yes"] is True and metadata["bools"] == [True, False]

    def test_a_view_outlives_the_file(self, small: Path) -> None:
        view = GGUFFile.open(small).read("norm.weight")
        assert view.view(np.float32).shape == (64,)

    def test_unknown_tensor(self, small: Path) -> None:
        with pytest.raises(GGUFError, match="no tensor 'nope'"):
            GGUFFile.open(small).read("nope")

    def test_a_vocabulary_is_read_fast(self, tmp_path: Path) -> None:
        path = tmp_path / "vocab.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_array("tokens", [f"token{index}" for index in range(100_000)])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            tokens = GGUFFile.open(path).metadata["tokens"]
            times.append(time.perf_counter() - start)
        assert isinstance(tokens, list) and tokens[99_999] == "token99999"
        assert min(times) < 0.25


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def header(*parts: bytes, keys: int = 0, tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def info(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return (
        string(name)
        + struct.pack("<I", len(dims))
        + b"".join(struct.pack("<Q", dim) for dim in dims)
        + struct.pack("<IQ", kind, offset)
    )


U8 = struct.pack("<IB", 0, 1)
FAULTS = {
    "empty": (b"", "too short"),
    "short": (b"GGUF\3\0\0\0", "too short"),
    "magic": (b"GGML" + bytes(40), "not a GGUF file"),
    "version": (header(version=1), "version 1 "),
    "big endian": (header(version=3 << 24), "big-endian"),
    "many keys": (header(keys=1 << 60), "number of keys"),
    "many tensors": (header(tensors=1 << 60), "number of tensors"),
    "keys missing": (header(string("a"), U8, keys=2), "ends inside|is 0|needed"),
    "long key": (header(struct.pack("<Q", 1 << 63), keys=1), "length of a key"),
    "key beyond": (header(struct.pack("<Q", 900), b"abc", keys=1), "ends inside a key"),
    "bad utf-8": (header(string(b"\xff\xfe"), U8, keys=1), "not valid UTF-8"),
    "twice": (header(string("a"), U8, string("a"), U8, keys=2), "'a' is there twice"),
    "type": (header(string("a"), struct.pack("<I", 13), keys=1), "unknown value type 13"),
    "bool": (header(string("a"), struct.pack("<IB", 7, 2), keys=1), "neither 0 nor 1"),
    "nested": (header(string("a"), struct.pack("<IIQ", 9, 9, 1), keys=1), "array of type 9"),
    "array": (header(string("a"), struct.pack("<IIQ", 9, 4, 1 << 23), keys=1), "claims"),
    "array cap": (header(string("a"), struct.pack("<IIQ", 9, 4, 1 << 62), keys=1), "limit"),
    "strings": (header(string("a"), struct.pack("<IIQ", 9, 8, 999), keys=1), "claims"),
    "string in array": (
        header(string("a"), struct.pack("<IIQQ", 9, 8, 1, 1 << 63), keys=1),
        "beyond the end",
    ),
    "string value": (
        header(string("a"), struct.pack("<IQ", 8, (1 << 64) - 1), keys=1),
        "over the limit",
    ),
    "no dims": (header(info("t", []), bytes(64), tensors=1), "has 0 dimensions"),
    "five dims": (header(info("t", [1] * 5), bytes(64), tensors=1), "has 5 dimensions"),
    "zero dim": (header(info("t", [4, 0]), bytes(64), tensors=1), "empty, or too large"),
    "overflow": (header(info("t", [1 << 32] * 2), bytes(64), tensors=1), "empty, or too large"),
    "overflow to zero": (header(info("t", [1 << 40] * 4), bytes(64), tensors=1), "too large"),
    "huge dim": (header(info("t", [1 << 63]), bytes(64), tensors=1), "over the limit"),
    "kind": (header(info("t", [4], 4), bytes(64), tensors=1), "unknown type 4"),
    "rows": (header(info("t", [33], 3), bytes(64), tensors=1), "multiple of the 32 of Q4_1"),
    "unaligned": (header(info("t", [4], 0, 8), bytes(99), tensors=1), "not a multiple of 32"),
    "offset": (header(info("t", [4], 0, 1 << 63), bytes(99), tensors=1), "needs the file"),
    "cut data": (header(info("t", [64]), bytes(64), tensors=1), "needs the file"),
    "same name": (
        header(info("t", [4]), info("t", [4], 0, 32), bytes(128), tensors=2),
        "same name",
    ),
    "overlap": (header(info("a", [9]), info("b", [4], 0, 32), bytes(128), tensors=2), "overlap"),
    "alignment": (
        header(string("general.alignment"), struct.pack("<II", 4, 24), keys=1),
        "power of two",
    ),
    "alignment text": (
        header(string("general.alignment"), struct.pack("<I", 8), string("32"), keys=1),
        "power of two",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_clear_line(tmp_path: Path, fault: str) -> None:
    content, message = FAULTS[fault]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=message) as error:
        GGUFFile.open(path)
    assert str(error.value).startswith("bad.gguf") and "\n" not in str(error.value)


def test_what_cannot_be_dequantised_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(header(info("t", [4], 28), bytes(99), tensors=1))
    file = GGUFFile.open(path)
    assert file.read("t").shape == (32,)
    with pytest.raises(GGUFError, match="F64, which cannot be dequantised"):
        file.dequantize("t")


def mutate(data: bytes, header_bytes: int, draw: random.Random) -> bytes:
    """Flips bits, cuts, or overwrites with random or extreme values, mostly in the header."""
    kind = draw.randrange(5)
    if kind == 0:
        return data[: draw.randrange(len(data))]
    content = bytearray(data)
    at = draw.randrange(header_bytes if draw.random() < 0.9 else len(data))
    if kind == 1:
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(header_bytes)] ^= 1 << draw.randrange(8)
    elif kind == 2:
        content[at : at + 8] = draw.randbytes(8)
    elif kind == 3:
        extreme = draw.choice([0, 1, 0x7FFFFFFF, 1 << 31, (1 << 63) - 1, (1 << 64) - 1])
        content[at : at + 8] = struct.pack("<Q", extreme)
    else:
        del content[at : at + draw.randint(1, 40)]
    return bytes(content)


def test_fuzz(tmp_path: Path) -> None:
    """A broken file is a GGUFError, or it is one whose tensors lie inside it: nothing else."""
    source = tmp_path / "small.gguf"
    write_gguf(source)
    data = source.read_bytes()
    header_bytes = min(tensor.offset for tensor in GGUFFile.open(source).tensors.values())
    draw = random.Random(4)
    path = tmp_path / "mutant.gguf"
    refused = accepted = 0
    for case in range(2200):
        mutant = mutate(data, header_bytes, draw)
        path.write_bytes(mutant)
        start = time.perf_counter()
        try:
            file = GGUFFile.open(path)
            for name, tensor in file.tensors.items():
                assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(mutant), case
                assert file.read(name).size == tensor.nbytes, case
                try:
                    assert file.dequantize(name).shape == tensor.shape, case
                except GGUFError as error:
                    assert "cannot be dequantised" in str(error), case
            accepted += 1
        except GGUFError:
            refused += 1
        assert time.perf_counter() - start < 1, case
    assert refused > 1000 and accepted > 100
