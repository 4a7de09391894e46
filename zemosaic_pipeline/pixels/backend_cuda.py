"""A CUDA card: cupy's arrays, numba's kernels. The only file that imports cupy.

cupy serves as allocator and copier only: all arithmetic is in our own kernels, so that no run-time compiler besides
numba's is needed.

Whatever touches the device runs inside :meth:`CudaBackend.guard`, which turns what a device can do wrong (no driver,
out of memory, a failed launch, a lost device) into :class:`DeviceFailure`; anything else is a programming error and
surfaces. `pixels.backend_switch.BackendSwitch` is the one place that answers a failure: it says so once, never touches
the GPU again, and has the whole step done anew on the CPU.
"""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.pixels.backend_base import (
    CombineLimits,
    DeviceArray,
    DeviceFailure,
    Mesh,
    NoGpuSupport,
    TileCells,
    TilePart,
    trial,
)
from zemosaic_pipeline.pixels.backend_cpu import CpuBackend
from zemosaic_pipeline.pixels.methods import CombineMethod

#: Threads of a CUDA block, along x and y.
THREADS = (32, 8)
#: Parts of one launch are kept below this many pixels: a kernel that runs longer than 2 s is killed on desktops.
MAX_LAUNCH_PIXELS = 1 << 24
#: Bytes of uploads that may be under way at a time; two uploads may in any case.
STAGED_BYTES = 32 << 20
#: Bytes of meshes and weight maps kept on the device for the next block.
KEPT_BYTES = 64 << 20
#: An alpha plane that says nothing.
NO_ALPHA = np.ones((1, 1, 1), np.float32)
#: Packages whose own exception classes mean "the device failed"; their programming errors are Python's own classes.
DEVICE_PACKAGES = ("cupy", "cupy_backends", "cuda", "numba.cuda.cudadrv")


class CudaBackend:
    """Pixels in cupy arrays, the same kernels compiled for CUDA.

    ``cupy`` and ``cuda`` are the modules cupy and numba.cuda. Work is queued on cupy's current stream, copies to the
    device on a stream of their own. cupy makes the device current in every thread that calls; numba follows it.

    Raises
    ------
    DeviceFailure
        The kernels could not be compiled or run, or do not compute what the CPU does.
    """

    name = "gpu"
    parallel_blocks = False

    def __init__(self, cupy: Any, cuda: Any, device_id: int = 0, description: str = "") -> None:
        from numba.core.errors import NumbaError

        from zemosaic_pipeline.pixels.kernels import cuda_kernels

        self._cupy, self._cuda, self.device_id, self.description = cupy, cuda, device_id, description
        self._lost = ""
        self._staged: deque[tuple[Any, Any, Any]] = deque()
        self._kept: OrderedDict[int, tuple[np.ndarray, Any]] = OrderedDict()
        self._device = cupy.cuda.Device(device_id)
        # a library or a compiler that is missing or too old may say so in any of these ways
        with self.guard("start", ImportError, OSError, RuntimeError, NumbaError):
            self._copies = cupy.cuda.Stream(non_blocking=True)
            self._kernels = cuda_kernels(cuda)
            for kernel in self._kernels.values():
                if "lto" in kernel.targetoptions:
                    kernel.targetoptions["lto"] = False  # the linker would fuse what `uncontracted` keeps apart
            self._prove()

    @contextmanager
    def guard(self, what: str, *also: type[Exception]) -> Iterator[None]:
        """Turn device errors (and ``also``) during ``what`` into :class:`DeviceFailure`; a failed device is left alone."""
        if self._lost:
            raise DeviceFailure(self._lost)
        try:
            self._device.use()
            yield
        except Exception as error:
            if not (is_device_error(error) or isinstance(error, also)):
                raise
            self._lost = f"{what}: {sentence(error)}"
            raise DeviceFailure(self._lost) from error

    def _prove(self) -> None:
        """A GPU counts as present when all kernels have run on it and answered as the CPU does, bit for bit."""
        for found, expected in zip(trial(self), trial(CpuBackend(compiled=False)), strict=True):
            if not np.array_equal(found, expected, equal_nan=True):
                raise DeviceFailure("start: the device does not compute what the CPU does")

    def upload(self, array: np.ndarray) -> DeviceArray:
        """Copy to the device while the kernels already launched run.

        The pixels go through page-locked memory (no other copy is asynchronous) to a staging array of the copy stream
        and, once they have arrived, into an array of the kernels' stream. Both intermediate copies are held until then.
        """
        cupy = self._cupy
        with self.guard("upload"):
            out = cupy.empty(array.shape, dtype=array.dtype)
            if not array.nbytes:
                return out
            self._release(max(array.nbytes, STAGED_BYTES - array.nbytes))
            pinned = cupy.cuda.alloc_pinned_memory(array.nbytes)
            np.frombuffer(pinned, array.dtype, array.size).reshape(array.shape)[...] = array
            with self._copies:
                staged = cupy.empty(array.shape, dtype=array.dtype)
                staged.data.copy_from_host_async(pinned.ptr, array.nbytes, self._copies)
            stream = cupy.cuda.get_current_stream()
            stream.wait_event(self._copies.record())
            out.data.copy_from_device_async(staged.data, array.nbytes, stream)
            self._staged.append((stream.record(), staged, pinned))
            return out

    def _release(self, limit: int) -> None:
        """Let go of uploads that have arrived; wait for the oldest where more than ``limit`` bytes are under way."""
        while self._staged:
            arrived, _staged, _pinned = self._staged[0]
            if not arrived.done:
                if sum(staged.nbytes for _, staged, _ in self._staged) <= limit:
                    return
                arrived.synchronize()
            self._staged.popleft()

    def _resident(self, array: np.ndarray) -> DeviceArray:
        """Upload of an array that never changes and is asked for again with the next block; the latest are kept."""
        entry = self._kept.pop(id(array), None) or (array, self.upload(array))
        self._kept[id(array)] = entry
        while len(self._kept) > 1 and sum(host.nbytes for host, _ in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return entry[1]

    def download(self, array: DeviceArray) -> np.ndarray:
        """Copy to the host; waits for everything launched before."""
        with self.guard("download"):
            return self._cupy.asnumpy(array)

    def zeros(self, shape: tuple[int, ...], dtype: str = "float32") -> DeviceArray:
        with self.guard("allocate"):
            return self._cupy.zeros(shape, dtype=dtype)

    def scratch(self, shape: tuple[int, ...]) -> DeviceArray:
        """Float32 array of any content."""
        with self.guard("allocate"):
            return self._cupy.empty(shape, dtype="float32")

    def resample(
        self, source: DeviceArray, part: TilePart, values: DeviceArray, weights: DeviceArray, add: bool
    ) -> None:
        """As :meth:`Backend.resample`."""
        alpha = self._resident(NO_ALPHA) if part.alpha.size == 1 else self.upload(part.alpha)
        weight_map, mesh = self._resident(part.weight_map), self._mesh(part.mesh, part.rect)
        y0, y1, x0, x1 = part.rect
        for top, bottom in slabs(y0, y1, x1 - x0):
            self._launch(
                "resample", bottom - top, x1 - x0, source, part.origin, part.shape, int(part.kernel), alpha, weight_map,
                part.spacing, part.feather, part.scale, *mesh, part.block, (top, bottom, x0, x1), values, weights, add,
            )  # fmt: skip

    def measure(self, source: DeviceArray, cells: TileCells, sums: DeviceArray, counts: DeviceArray) -> None:
        """As :meth:`Backend.measure`."""
        rows, columns = cells.wanted.shape
        (row, column), cell_px = cells.corner, cells.cell_px
        y, x = row * cell_px, column * cell_px
        mesh = self._mesh(cells.mesh, (y, y + rows * cell_px, x, x + columns * cell_px))
        wanted = self.upload(cells.wanted)
        for top, bottom in slabs(0, rows, columns * cell_px**2):
            self._launch(
                "measure", bottom - top, columns, source, cells.origin, cells.shape, *mesh, cell_px, cells.every,
                (row + top, column), wanted[top:bottom], sums[:, top:bottom], counts[top:bottom],
            )  # fmt: skip

    def combine(
        self, values: DeviceArray, weights: DeviceArray, method: CombineMethod, limits: CombineLimits, out: DeviceArray
    ) -> None:
        """As :meth:`Backend.combine`."""
        layers, channels, rows, columns = values.shape
        if weights.ndim == 3:
            weights = self._every_channel(weights, channels)
        for top, bottom in slabs(0, rows, columns * -(-layers // 8)):
            part = np.s_[..., top:bottom, :]
            self._launch("combine", bottom - top, columns, values[part], weights[part], int(method), *limits, out[part])

    def _every_channel(self, weights: DeviceArray, channels: int) -> DeviceArray:
        """Layers of weights (K, h, w) as (K, C, h, w); plain copies, for which nothing need be compiled."""
        with self.guard("copy"):
            out = self._cupy.empty((len(weights), channels, *weights.shape[1:]), dtype=weights.dtype)
            stream = self._cupy.cuda.get_current_stream()
            for k in range(len(weights)):
                for channel in range(channels):
                    out[k, channel].data.copy_from_device_async(weights[k].data, weights[k].nbytes, stream)
            return out

    def _mesh(self, mesh: Mesh, rect: Rect) -> tuple[DeviceArray, int, int, int]:
        """The mesh on the device; of an exact one, which has a node for every pixel, the rectangle that is needed."""
        nodes, y, x, step = mesh
        if step > 1:
            return self._resident(nodes), y, x, step
        y0, y1, x0, x1 = rect
        return self.upload(nodes[:, y0 - y : y1 - y, x0 - x : x1 - x]), y0, x0, step

    def _launch(self, kernel: str, rows: int, columns: int, *arguments: Any) -> None:
        with self.guard(f"launch {kernel}"), uncontracted(self._cuda):
            pointer = self._cupy.cuda.get_current_stream().ptr
            stream = self._cuda.external_stream(pointer) if pointer else 0
            grid = (-(-columns // THREADS[0]), -(-rows // THREADS[1]))
            # numba would wait for the stream of every array that it is not told to trust
            trusted = [
                self._cuda.as_cuda_array(a, sync=False) if hasattr(a, "__cuda_array_interface__") else a
                for a in arguments
            ]
            self._kernels[kernel][grid, THREADS, stream](*trusted)

    def synchronize(self) -> None:
        """Wait for the device: failures of what was launched show here."""
        with self.guard("synchronise"):
            self._cupy.cuda.get_current_stream().synchronize()
            self._staged.clear()

    def free_bytes(self, fraction: float) -> int:
        """Bytes of device memory that a run may use: ``fraction`` of what is free now."""
        with self.guard("memory"):
            self._cupy.get_default_memory_pool().free_all_blocks()
            free, _total = self._cupy.cuda.runtime.memGetInfo()
        return int(free * fraction)

    def close(self) -> None:
        """Give the device memory back."""
        self.synchronize()
        with self.guard("release"):
            self._kept.clear()
            self._cupy.get_default_memory_pool().free_all_blocks()
            self._cupy.get_default_pinned_memory_pool().free_all_blocks()


def is_device_error(error: BaseException) -> bool:
    """Whether a library that drives the device defines the exception's class; the classes vary with its version."""
    modules = [cls.__module__ for cls in type(error).__mro__]
    return any(module == name or module.startswith(f"{name}.") for module in modules for name in DEVICE_PACKAGES)


def sentence(error: BaseException) -> str:
    """Class and message of an exception on one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 300 else f"{text[:297]}..."


def slabs(start: int, stop: int, row_work: int) -> Iterator[tuple[int, int]]:
    """Rows ``start:stop`` in parts of which each is one launch; ``row_work`` is the number of pixels in a row."""
    rows = max(MAX_LAUNCH_PIXELS // max(row_work, 1), 1)
    for top in range(start, stop, rows):
        yield top, min(top + rows, stop)


@contextmanager
def uncontracted(cuda: Any) -> Iterator[None]:
    """Have numba compile without fused multiply-add (NVVM's ``-fma=0``, for which it has no option), as for the CPU."""
    nvvm = cuda.cudadrv.nvvm
    compile_ir = getattr(nvvm, "compile_ir", None)
    if compile_ir is None:
        raise DeviceFailure("this version of numba-cuda is not supported: fused multiply-add cannot be switched off")
    nvvm.compile_ir = functools.partial(compile_ir, fma=0)
    try:
        yield
    finally:
        nvvm.compile_ir = compile_ir


def open_cuda(device_id: int = 0, selector: str = "") -> CudaBackend:
    """The CUDA backend on the card with this number, or on the first whose name holds ``selector``.

    Raises
    ------
    DeviceFailure
        With a reason that a user can act on.
    """
    try:
        import cupy  # pyright: ignore[reportMissingImports]: an optional library
        from numba import cuda
    except ModuleNotFoundError as error:
        raise NoGpuSupport(f"{error.name} is not installed (pip install 'zemosaic-worker[gpu-cuda12]')") from error
    except ImportError as error:
        raise DeviceFailure(f"cupy cannot be loaded: {sentence(error)}") from error
    # small blocks are no reason to warn
    warnings.filterwarnings("ignore", message="Grid size .* will likely result in GPU under-utilization")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        names = [cupy.cuda.runtime.getDeviceProperties(number)["name"].decode() for number in range(count)]
    except Exception as error:
        if not is_device_error(error):
            raise
        raise DeviceFailure(f"no usable CUDA driver or card: {sentence(error)}") from error
    if selector:
        device_id = next((k for k, name in enumerate(names) if selector.lower() in name.lower()), device_id)
    if not 0 <= device_id < count:
        raise DeviceFailure(f"there is no card number {device_id}: {count} found")
    return CudaBackend(cupy, cuda, device_id, names[device_id])
