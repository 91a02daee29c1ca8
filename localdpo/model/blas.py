"""Give MLX on Linux a fast matrix product: its wheel bundles the reference BLAS, some 70 times slower.

``libmlx.so`` imports ``cblas_sgemm``, ``cblas_dgemm`` and ``cblas_cgemm``. The dynamic linker has written the
addresses of those three functions into slots of the library's global offset table; this module writes the
addresses of OpenBLAS's functions (from the ``scipy-openblas32`` wheel) into the same slots, checks the result
numerically through MLX itself, and puts the old addresses back if anything differs. No other symbol, file or
process is touched. ``LOCALDPO_BLAS=off`` switches it off; on macOS and on a GPU it does nothing.

It knows nothing about models. This is the only module that is specific to Linux.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
PREFIX = "scipy_"
OFF_VALUES = frozenset({"off", "0", "no", "false"})
FAST_LIBRARIES = ("openblas", "mkl", "blis", "armpl", "accelerate")

# ELF constants (System V gABI; psABI supplements for x86-64 and AArch64).
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_STRSZ, _DT_PLTRELSZ, _DT_JMPREL = 5, 6, 7, 8, 10, 2, 23
_SLOT_RELOCATIONS = {62: (6, 7), 183: (1025, 1026)}  # e_machine -> (GLOB_DAT, JUMP_SLOT)
_RELA_SIZE, _SYMBOL_SIZE = 24, 24

_MLX_DTYPES = {"float32": mx.float32, "float64": mx.float64, "complex64": mx.complex64}

Elf = bytes | mmap.mmap
BlasState = Literal["replaced", "off", "not needed", "failed"]


@dataclass(frozen=True)
class BlasStatus:
    """What ``enable_fast_blas`` did. ``detail`` is a sentence for people; ``library`` names the BLAS in use."""

    state: BlasState
    detail: str
    library: str = ""
    threads: int = 0

    @property
    def fast(self) -> bool:
        """False when matrix products on the CPU run on the slow bundled BLAS."""
        return self.state in ("replaced", "not needed")


class _BlasError(Exception):
    """The slots cannot be replaced; the message says why."""


_lock = threading.Lock()
_status: BlasStatus | None = None
_openblas: ctypes.CDLL | None = None


def enable_fast_blas() -> BlasStatus:
    """Point MLX at OpenBLAS once per process; later calls return the first answer.

    Never raises: a failure leaves MLX as it was and is reported in the status.
    """
    global _status
    with _lock:
        if _status is None:
            _status = _enable()
        return _status


def set_blas_threads(threads: int) -> None:
    """Set how many threads OpenBLAS uses; no effect where OpenBLAS is not in use."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if _openblas is not None:
        _openblas.scipy_openblas_set_num_threads(ctypes.c_int(threads))


def blas_threads() -> int:
    """The number of threads OpenBLAS uses, 0 where it is not in use."""
    return int(_openblas.scipy_openblas_get_num_threads()) if _openblas is not None else 0


@contextmanager
def blas_threads_within(threads: int) -> Iterator[None]:
    """Use ``threads`` OpenBLAS threads within the block.

    One thread suits small products: OpenBLAS's threads wait for each other by spinning, and when another program
    wants a core that costs more than the second thread brings (measured: 30 times slower on a busy machine).
    """
    before = blas_threads()
    set_blas_threads(threads)
    try:
        yield
    finally:
        set_blas_threads(max(before, 1))


def measure_gflops(repeats: int = 3) -> float:
    """Speed of a float32 product ``[512, 576] @ [576, 1536]`` on the CPU, in 10^9 operations per second."""
    m, k, n = 512, 576, 1536
    with mx.stream(mx.cpu):
        a, b = mx.random.normal((m, k)), mx.random.normal((n, k))
        mx.eval(a, b, a @ b.T)
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            mx.eval(a @ b.T)
            best = min(best, time.perf_counter() - start)
    return 2 * m * k * n / best / 1e9


def _enable() -> BlasStatus:
    if sys.platform != "linux":
        return BlasStatus("not needed", "MLX uses Accelerate here")
    if mx.default_device().type == mx.gpu:
        return BlasStatus("not needed", "MLX runs on the GPU")
    if os.environ.get("LOCALDPO_BLAS", "").strip().lower() in OFF_VALUES:
        return BlasStatus("off", "switched off by LOCALDPO_BLAS")
    try:
        return _replace()
    except (_BlasError, OSError, ImportError, AttributeError, struct.error) as error:
        return BlasStatus("failed", f"MLX keeps its slow bundled BLAS: {error}")


def _replace() -> BlasStatus:
    global _openblas
    library = _load_openblas()
    path = _libmlx_path()
    mapping = _memory_map(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as elf:
        slots = find_slots(elf, SYMBOLS)
    missing = [name for name in SYMBOLS if name not in slots]
    if missing:
        raise _BlasError(f"libmlx.so does not import {', '.join(missing)}")
    owner = _owner(mapping + slots["cblas_sgemm"])
    if any(word in owner.lower() for word in FAST_LIBRARIES):
        return BlasStatus("not needed", f"MLX was built with {owner}", owner)
    targets = {name: _address(library, PREFIX + name) for name in SYMBOLS}
    saved = {name: _write_slot(mapping + slots[name], targets[name]) for name in SYMBOLS}
    _openblas = library
    problem = _verify()
    if problem:
        for name, address in saved.items():
            _write_slot(mapping + slots[name], address)
        _openblas = None
        raise _BlasError(f"OpenBLAS gave a different result ({problem})")
    config = library.scipy_openblas_get_config
    config.restype = ctypes.c_char_p
    words = config().decode("ascii", "replace").split()
    return BlasStatus("replaced", "MLX's bundled BLAS replaced by OpenBLAS", " ".join(words[:2]), blas_threads())


def _load_openblas() -> ctypes.CDLL:
    package = importlib.import_module("scipy_openblas32")  # installed on Linux only
    return ctypes.CDLL(str(Path(package.get_lib_dir(), package.get_library(fullname=True))))


def _libmlx_path() -> Path:
    """The file of the ``libmlx.so`` loaded in this process."""
    for _, path in _mapped_files():
        if path.name.startswith("libmlx.so"):
            return path
    raise _BlasError("libmlx.so is not loaded in this process")


def _mapped_files() -> Iterator[tuple[int, Path]]:
    """Start address and file of every mapping that begins at file offset 0."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and int(fields[2], 16) == 0:
            yield int(fields[0].split("-")[0], 16), Path(fields[5])


def _memory_map(path: Path) -> int:
    starts = [start for start, mapped in _mapped_files() if mapped == path]
    if not starts:
        raise _BlasError("libmlx.so is not mapped from its file")
    return min(starts)


def _address(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    if not address:
        raise _BlasError(f"OpenBLAS does not export {name}")
    return address


def find_slots(elf: Elf, names: tuple[str, ...]) -> dict[str, int]:
    """Offsets, from the load address, of the table slots through which a shared library calls ``names``.

    Reads the dynamic segment (what the dynamic linker itself reads), so stripped section headers do not matter.
    Raises ``_BlasError`` for anything that is not a little-endian ELF64 library for x86-64 or AArch64, and for
    tables that point outside the file.
    """
    library = _ElfLibrary(elf)
    slots = {name: slot for name, slot in library.imports() if name in names}
    if any(not library.holds(slot) for slot in slots.values()):
        raise _BlasError("a relocation points outside the library")
    return slots


class _ElfLibrary:
    """The parts of an ELF file that bind imported functions to slots."""

    def __init__(self, elf: Elf) -> None:
        self._elf = elf
        self._machine, segments = _program_headers(elf)
        self._loads = [segment for segment in segments if segment.kind == _PT_LOAD]
        if not self._loads or self._loads[0].address != 0 or self._loads[0].offset != 0:
            raise _BlasError("libmlx.so is not laid out from address 0")
        self._dynamic = _dynamic_table(elf, segments)

    def holds(self, address: int) -> bool:
        """Whether an 8-byte slot at ``address`` lies in the loaded library."""
        return any(load.address <= address <= load.address + load.memory - 8 for load in self._loads)

    def imports(self) -> Iterator[tuple[str, int]]:
        """Name and slot of every function or object that the library imports."""
        strings = _slice(self._elf, self._table(_DT_STRTAB), self._dynamic.get(_DT_STRSZ, 0))
        symbols = self._table(_DT_SYMTAB)
        for table, size in ((_DT_RELA, _DT_RELASZ), (_DT_JMPREL, _DT_PLTRELSZ)):
            if table not in self._dynamic:
                continue
            length = self._dynamic.get(size, 0) // _RELA_SIZE * _RELA_SIZE
            for slot, info, _ in struct.iter_unpack("<QQq", _slice(self._elf, self._table(table), length)):
                if info & 0xFFFFFFFF in _SLOT_RELOCATIONS[self._machine]:
                    entry = _slice(self._elf, symbols + (info >> 32) * _SYMBOL_SIZE, 4)
                    yield _name(strings, struct.unpack("<I", entry)[0]), slot

    def _table(self, tag: int) -> int:
        """File offset of a table that the dynamic segment gives the address of."""
        address = self._dynamic.get(tag, -1)
        for load in self._loads:
            if load.address <= address < load.address + load.size:
                return address - load.address + load.offset
        raise _BlasError(f"dynamic table entry {tag} is missing or points outside the file")


def _slice(data: Elf, start: int, length: int) -> bytes:
    if start < 0 or length <= 0 or start + length > len(data):
        raise _BlasError("libmlx.so has a table outside the file")
    return data[start : start + length]


def _name(strings: bytes, start: int) -> str:
    end = strings.find(b"\0", start)
    return strings[start:end].decode("ascii", "replace") if 0 <= start < end else ""


class _Segment(NamedTuple):
    """A program header; ``size`` is its bytes in the file, ``memory`` once loaded."""

    kind: int
    offset: int
    address: int
    size: int
    memory: int


def _program_headers(elf: Elf) -> tuple[int, list[_Segment]]:
    header = _slice(elf, 0, 64)
    if header[:6] != b"\x7fELF\x02\x01":
        raise _BlasError("libmlx.so is not a little-endian ELF64 file")
    (machine,) = struct.unpack_from("<H", header, 18)
    if machine not in _SLOT_RELOCATIONS:
        raise _BlasError(f"processor type {machine} is not supported")
    (table,) = struct.unpack_from("<Q", header, 32)
    entry, count = struct.unpack_from("<HH", header, 54)
    if entry != 56:
        raise _BlasError("libmlx.so has an unknown program header size")
    rows = struct.iter_unpack("<IIQQQQQQ", _slice(elf, table, entry * count))
    return machine, [_Segment(kind, off, vaddr, size, mem) for kind, _, off, vaddr, _, size, mem, _ in rows]


def _dynamic_table(elf: Elf, segments: list[_Segment]) -> dict[int, int]:
    for segment in segments:
        if segment.kind == _PT_DYNAMIC:
            return dict(struct.iter_unpack("<QQ", _slice(elf, segment.offset, segment.size // 16 * 16)))
    raise _BlasError("libmlx.so has no dynamic segment")


def _page_protection(address: int) -> int:
    """The protection bits of the mapping that holds ``address``, as mprotect takes them."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split(maxsplit=2)[:2]
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            bits = zip("rwx", (mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC), strict=True)
            return sum(bit for letter, bit in bits if letter in permissions)
    raise _BlasError("the slot is not mapped")


def _protect(address: int, protection: int) -> None:
    page = address & ~(mmap.PAGESIZE - 1)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), ctypes.c_int(protection)) != 0:
        raise _BlasError(f"mprotect was refused: {os.strerror(ctypes.get_errno())}")


def _write_slot(address: int, value: int) -> int:
    """Store ``value`` in one slot and restore the page's protection (RELRO pages are read-only); the old value."""
    protection = _page_protection(address)
    _protect(address, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        slot = ctypes.c_uint64.from_address(address)
        old = slot.value
        slot.value = value
    finally:
        _protect(address, protection)
    return old


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


def _owner(slot: int) -> str:
    """File name of the library that the slot's function lives in, empty if unknown."""
    target = ctypes.c_uint64.from_address(slot).value
    info = _DlInfo()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(target), ctypes.byref(info)) or not info.dli_fname:
        return ""
    return Path(os.fsdecode(info.dli_fname)).name


def _verify() -> str:
    """Compare MLX's products with float64 NumPy over the call forms MLX uses; the first difference in words."""
    with blas_threads_within(1):  # small products: threads would take longer to start than to multiply
        problem = _compare(((1, 7, 5), (5, 1, 3), (33, 65, 17), (64, 128, 96), (1, 576, 200)))
    return problem or _compare(((160, 192, 176),), (np.float32,))


def _compare(
    shapes: Sequence[tuple[int, int, int]], dtypes: Sequence[type] = (np.float32, np.float64, np.complex64)
) -> str:
    rng = np.random.default_rng(0)
    for dtype in dtypes:
        for m, k, n in shapes:
            a, b, c = (_random(rng, shape, dtype) for shape in ((m, k), (k, n), (m, n)))
            for form, got, want in _forms(a, b, c):
                tolerance = (1e-12 if dtype is np.float64 else 1e-5) * k**0.5 * 4
                if not np.allclose(got, want, rtol=0, atol=tolerance):
                    return f"{form}, {m}x{k}x{n}, {np.dtype(dtype).name}"
    return ""


def _random(rng: np.random.Generator, shape: tuple[int, int], dtype: type) -> np.ndarray:
    values = rng.standard_normal(shape)
    if dtype is np.complex64:
        return (values + 1j * rng.standard_normal(shape)).astype(dtype)
    return values.astype(dtype)


def _forms(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    exact = a.astype(wide) @ b.astype(wide)
    with mx.stream(mx.cpu):
        x, y, z = (mx.array(value, dtype=_MLX_DTYPES[a.dtype.name]) for value in (a, b, c))
        x_t, y_t = mx.contiguous(x.T), mx.contiguous(y.T)
        padded = mx.concatenate([x, x], axis=1)[:, : a.shape[1]]  # rows further apart than their length
        yield "plain", np.array(x @ y), exact
        yield "left transposed", np.array(x_t.T @ y), exact
        yield "right transposed", np.array(x @ y_t.T), exact
        yield "both transposed", np.array(x_t.T @ y_t.T), exact
        yield "strided", np.array(padded @ y), exact
        yield "batched", np.array(mx.stack([x, 2 * x]) @ mx.stack([y, y]))[1], 2 * exact
        if a.dtype == np.float32:
            yield "accumulating", np.array(mx.addmm(z, x, y, 0.5, 2.0)), 0.5 * exact + 2.0 * c.astype(wide)
