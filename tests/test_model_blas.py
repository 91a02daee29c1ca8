"""The fast BLAS: what the ELF reader accepts, what a replacement changes, and how it is undone."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdpo.model import blas

linux = pytest.mark.skipif(sys.platform != "linux", reason="the BLAS is only replaced on Linux")


def _run(code: str, **environment: str) -> str:
    """Run ``code`` in a process of its own: the replacement lasts as long as a process."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@linux
def test_it_is_faster_and_right() -> None:
    code = """if True:
        from localdpo.model import blas
        slow = blas.measure_gflops(1)
        status = blas.enable_fast_blas()
        print(status.state, status.fast, status.library.split()[0], blas.measure_gflops() > 3 * slow)
        assert blas.enable_fast_blas() is status
    """
    assert _run(code) == "replaced True OpenBLAS True"


@linux
def test_it_can_be_switched_off() -> None:
    code = "from localdpo.model import blas; s = blas.enable_fast_blas(); print(s.state, s.fast, blas.blas_threads())"
    assert _run(code, LOCALDPO_BLAS="off") == "off False 0"


@linux
def test_a_wrong_result_puts_the_old_functions_back() -> None:
    code = """if True:
        from localdpo.model import blas
        path = blas._libmlx_path()
        base = blas._memory_map(path)
        slots = blas.find_slots(path.read_bytes(), blas.SYMBOLS)
        read = lambda: [blas.ctypes.c_uint64.from_address(base + slots[n]).value for n in blas.SYMBOLS]
        import mlx.core as mx
        mx.eval(mx.ones((4, 4)) @ mx.ones((4, 4)))
        before, kept = read(), [blas._page_protection(base + slots[n]) for n in blas.SYMBOLS]
        blas._verify = lambda: "made to fail"
        status = blas.enable_fast_blas()
        assert read() == before
        assert [blas._page_protection(base + slots[n]) for n in blas.SYMBOLS] == kept
        print(status.state, "made to fail" in status.detail, (mx.ones((2, 3)) @ mx.ones((3, 2)))[0, 0].item())
    """
    assert _run(code) == "failed True 3.0"


@linux
def test_slots_end_read_only_again() -> None:
    code = """if True:
        from localdpo.model import blas
        path = blas._libmlx_path()
        base = blas._memory_map(path)
        slot = base + blas.find_slots(path.read_bytes(), ("cblas_sgemm",))["cblas_sgemm"]
        before = blas._page_protection(slot)
        blas.enable_fast_blas()
        print(blas._page_protection(slot) == before)
    """
    assert _run(code) == "True"


@linux
def test_missing_package_is_said_in_words() -> None:
    code = """if True:
        import sys
        sys.modules["scipy_openblas32"] = None
        from localdpo.model import blas
        status = blas.enable_fast_blas()
        print(status.state, "slow bundled BLAS" in status.detail)
    """
    assert _run(code) == "failed True"


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    status = blas._enable()
    assert status.state == "not needed"
    assert status.fast


@linux
def test_threads_within() -> None:
    if not blas.enable_fast_blas().threads:
        pytest.skip("OpenBLAS is not in use")
    blas.set_blas_threads(2)
    with blas.blas_threads_within(1):
        assert blas.blas_threads() == 1
    assert blas.blas_threads() == 2
    with pytest.raises(ValueError, match="at least 1"):
        blas.set_blas_threads(0)


@linux
@pytest.mark.parametrize("shape", [(1, 576, 1536), (24, 64, 48), (130, 257, 33)])
def test_products_match_numpy(shape: tuple[int, int, int]) -> None:
    blas.enable_fast_blas()
    m, k, n = shape
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((m, k)), rng.standard_normal((n, k))
    got = np.array(mx.array(a, dtype=mx.float32) @ mx.array(b, dtype=mx.float32).T)
    np.testing.assert_allclose(got, a @ b.T, atol=1e-5 * k**0.5 * 4)


def _library() -> bytes:
    path = Path(mx.__file__).parent / "lib" / "libmlx.so"
    if not path.is_file():
        pytest.skip("no libmlx.so in this mlx")
    return path.read_bytes()


@linux
def test_the_three_functions_are_found() -> None:
    slots = blas.find_slots(_library(), blas.SYMBOLS)
    assert set(slots) == set(blas.SYMBOLS)
    assert all(slot % 8 == 0 for slot in slots.values())
    assert blas.find_slots(_library(), ("no_such_function",)) == {}


@pytest.mark.parametrize(
    "elf",
    [
        b"",
        b"MZ" + b"\0" * 100,
        b"\x7fELF\x01\x01" + b"\0" * 100,  # 32 bits
        b"\x7fELF\x02\x02" + b"\0" * 100,  # big-endian
        b"\x7fELF\x02\x01" + b"\0" * 12 + struct.pack("<H", 243) + b"\0" * 100,  # RISC-V
        b"\x7fELF\x02\x01" + b"\0" * 12 + struct.pack("<H", 62) + b"\0" * 100,  # no headers
    ],
)
def test_other_files_are_refused(elf: bytes) -> None:
    with pytest.raises(blas._BlasError):
        blas.find_slots(elf, blas.SYMBOLS)


def _small_library(machine: int, relocation: int) -> bytearray:
    """A minimal shared library: one segment, one symbol named cblas_sgemm, one relocation at 0x300."""
    image = bytearray(0x400)
    image[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<HH", image, 16, 3, machine)
    struct.pack_into("<Q", image, 32, 64)
    struct.pack_into("<HH", image, 54, 56, 2)
    struct.pack_into("<IIQQQQQQ", image, 64, 1, 6, 0, 0, 0, 0x400, 0x400, 0x1000)
    struct.pack_into("<IIQQQQQQ", image, 120, 2, 6, 0x100, 0x100, 0x100, 0x70, 0x70, 8)
    table = [(5, 0x180), (10, 16), (6, 0x1A0), (7, 0x200), (8, 24), (0, 0)]
    for number, entry in enumerate(table):
        struct.pack_into("<QQ", image, 0x100 + 16 * number, *entry)
    image[0x180:0x190] = b"\0cblas_sgemm\0\0\0\0"
    struct.pack_into("<I", image, 0x1A0 + 24, 1)
    struct.pack_into("<QQq", image, 0x200, 0x300, 1 << 32 | relocation, 0)
    return image


@pytest.mark.parametrize(("machine", "relocation"), [(62, 6), (62, 7), (183, 1025), (183, 1026)])
def test_both_processors_and_both_kinds_of_slot(machine: int, relocation: int) -> None:
    assert blas.find_slots(bytes(_small_library(machine, relocation)), blas.SYMBOLS) == {"cblas_sgemm": 0x300}


@pytest.mark.parametrize(("machine", "relocation"), [(62, 1), (62, 8), (183, 257)])
def test_other_relocations_are_not_touched(machine: int, relocation: int) -> None:
    assert blas.find_slots(bytes(_small_library(machine, relocation)), blas.SYMBOLS) == {}


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 0x3FF), value=st.integers(0, 255), length=st.integers(0, 0x400))
def test_damage_is_refused_or_bounded(position: int, value: int, length: int) -> None:
    image = _small_library(62, 7)
    image[position] = value
    for elf in (bytes(image), bytes(image[:length])):
        try:
            slots = blas.find_slots(elf, blas.SYMBOLS)
        except blas._BlasError:
            continue
        assert all(slot >= 0 for slot in slots.values())
