"""numpy or cupy: choose, move, launch, budget memory, fall back. The only file that imports cupy.

A backend holds pixels and runs the pixel functions of `zemosaic_kernels`; whatever else touches its arrays finds the
namespace from the array. :class:`CpuBackend` and :class:`CudaBackend` have the same methods, and nothing outside this
file asks which one it has got.

Every call to the device runs inside :meth:`CudaBackend.guard`, which turns what a device can do wrong (no driver, out
of memory, a failed launch, a lost device) into :class:`DeviceFailure`; anything else is a programming error and
surfaces. :class:`BackendSwitch` is the one place that answers a failure: it says so once, never touches the GPU again,
and has the whole step done anew on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from zemosaic_utils import UsageError

Result = TypeVar("Result")

#: Threads of a CUDA block, along x and y.
THREADS = (32, 8)
#: Parts of one launch are kept below this many pixels: a kernel that runs longer than 2 s is killed on desktops.
MAX_LAUNCH_PIXELS = 1 << 24


class DeviceFailure(Exception):
    """The GPU could not do what it was asked; the reason is the message."""


class NoGpuSupport(DeviceFailure):
    """The libraries that drive a GPU are not installed: nothing has failed."""


class CpuBackend:
    """Pixels in numpy arrays, kernels on the CPU (they release the interpreter lock: call them from many threads)."""

    name = "cpu"
    parallel_blocks = True

    def upload(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def download(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def zeros(self, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
        return np.zeros(shape, dtype)

    def resample(self, source, part, values, weights, add: bool) -> None:
        """Resample one tile into a block; ``part`` is a `zemosaic_reproject.Part`, see `zemosaic_kernels.resample_rect`."""
        from zemosaic_kernels import resample_rows

        resample_rows(
            source, part.origin, part.shape, part.method, part.alpha, part.weight_map, part.spacing, part.feather,
            part.scale, part.mesh, part.block, part.rect, values, weights, add,
        )  # fmt: skip

    def measure(self, source, origin, shape, mesh, cell_px, corner, wanted, sums, counts) -> None:
        """Sums and numbers of valid samples in coarse cells; see `zemosaic_kernels.cell_sums`."""
        from zemosaic_kernels import measure_cells

        measure_cells(source, origin, shape, mesh, cell_px, corner, wanted, sums, counts)

    def combine(self, values, weights, method, options, out) -> None:
        """Combine layers; ``options`` = (kappa_low, kappa_high, trim_low, trim_high)."""
        from zemosaic_kernels import combine_layers

        combine_layers(values, weights, method, *options, out)

    def free_bytes(self, fraction: float) -> int | None:
        """No limit of its own: the memory budget of the run holds."""
        return None

    def close(self) -> None:
        """Nothing to release."""


class CudaBackend:
    """Pixels in cupy arrays, the same kernels compiled for CUDA.

    Parameters
    ----------
    cupy, cuda : module
        ``cupy`` and ``numba.cuda``, or stand-ins with the same interface.
    device_id : int
        Which card.

    Raises
    ------
    DeviceFailure
        No kernel could be run on the device.
    """

    name = "gpu"
    parallel_blocks = False

    def __init__(self, cupy: Any, cuda: Any, device_id: int = 0) -> None:
        self._cupy, self._cuda, self.device_id = cupy, cuda, device_id
        with self.guard("start"):
            from zemosaic_kernels import cuda_kernels

            self._device = cupy.cuda.Device(device_id)
            self._device.use()
            cuda.select_device(device_id)
            self._kernels = cuda_kernels(cuda)
            self._copies = cupy.cuda.Stream(non_blocking=True)
            self._waiting: list[tuple[Any, Any]] = []
        self._prove()

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Turn what the device raises during ``what`` into :class:`DeviceFailure`."""
        try:
            yield
        except device_errors(self._cupy, self._cuda) as error:
            raise DeviceFailure(f"{what}: {type(error).__name__}: {error}") from error

    def _prove(self) -> None:
        """A GPU counts as present when a kernel has run on it and answered right."""
        values = self.upload(np.array([[[[3.0]]], [[[1.0]]], [[[2.0]]]], np.float32))
        weights = self.upload(np.ones((3, 1, 1, 1), np.float32))
        out = self.zeros((1, 1, 1))
        self.combine(values, weights, 1, (3.0, 3.0, 0.05, 0.05), out)
        if float(self.download(out)[0, 0, 0]) != 2.0:
            raise DeviceFailure("start: the device computed a wrong result")

    @property
    def description(self) -> str:
        """Name of the card."""
        with self.guard("identify"):
            name = self._cupy.cuda.runtime.getDeviceProperties(self.device_id)["name"]
        return name.decode() if isinstance(name, bytes) else str(name)

    def upload(self, array: np.ndarray):
        """Copy to the device on a stream of its own, so that the copy runs beside the kernels already launched."""
        with self.guard("upload"):
            self._device.use()
            host = self._pinned(array)
            with self._copies:
                out = self._cupy.empty(array.shape, dtype=array.dtype)
                out.set(host, stream=self._copies)
            event = self._copies.record()
            self._cupy.cuda.get_current_stream().wait_event(event)
            # the page-locked copy must outlive the transfer
            self._waiting = [pair for pair in self._waiting if not pair[0].done] + [(event, host)]
            return out

    def _pinned(self, array: np.ndarray) -> np.ndarray:
        """A copy of the array in page-locked memory, without which no copy is asynchronous."""
        memory = self._cupy.cuda.alloc_pinned_memory(max(array.nbytes, 1))
        host = np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
        host[...] = array
        return host

    def download(self, array) -> np.ndarray:
        """Copy to the host; waits for everything launched before."""
        with self.guard("download"):
            return self._cupy.asnumpy(array)

    def zeros(self, shape: tuple[int, ...], dtype: str = "float32"):
        with self.guard("allocate"):
            self._device.use()
            return self._cupy.zeros(shape, dtype=dtype)

    def resample(self, source, part, values, weights, add: bool) -> None:
        """As :meth:`CpuBackend.resample`."""
        nodes, mesh_y, mesh_x, step = part.mesh
        alpha, weight_map, nodes = self.upload(part.alpha), self.upload(part.weight_map), self.upload(nodes)
        y0, y1, x0, x1 = part.rect
        rows = max(MAX_LAUNCH_PIXELS // max(x1 - x0, 1), 1)
        for top in range(y0, y1, rows):
            rect = (top, min(top + rows, y1), x0, x1)
            self._launch(
                "resample", rect[1] - rect[0], x1 - x0, source, part.origin, part.shape, part.method, alpha,
                weight_map, part.spacing, part.feather, part.scale, nodes, mesh_y, mesh_x, step, part.block, rect,
                values, weights, add,
            )  # fmt: skip
        self._keep(source, alpha, weight_map, nodes)

    def measure(self, source, origin, shape, mesh, cell_px, corner, wanted, sums, counts) -> None:
        """As :meth:`CpuBackend.measure`; ``mesh`` and ``wanted`` are host arrays."""
        nodes, mesh_y, mesh_x, step = mesh
        nodes, wanted_there = self.upload(nodes), self.upload(wanted)
        self._launch(
            "measure", *wanted.shape, source, origin, shape, nodes, mesh_y, mesh_x, step, cell_px, corner,
            wanted_there, sums, counts,
        )  # fmt: skip
        self._keep(source, nodes, wanted_there)

    def combine(self, values, weights, method, options, out) -> None:
        """As :meth:`CpuBackend.combine`."""
        self._launch("combine", out.shape[1], out.shape[2], values, weights, method, *options, out)

    def _launch(self, kernel: str, rows: int, columns: int, *arguments) -> None:
        with self.guard(f"launch {kernel}"):
            grid = (-(-columns // THREADS[0]), -(-rows // THREADS[1]))
            stream = self._cuda.external_stream(self._cupy.cuda.get_current_stream().ptr)
            self._kernels[kernel][grid, THREADS, stream](*arguments)

    def _keep(self, *arrays) -> None:
        """Hold arrays that the copy stream allocated until the kernels that read them have run."""
        with self.guard("record"):
            event = self._cupy.cuda.get_current_stream().record()
            self._waiting = [pair for pair in self._waiting if not pair[0].done] + [(event, arrays)]

    def synchronize(self) -> None:
        """Wait for the device: failures of what was launched show here."""
        with self.guard("synchronise"):
            self._cupy.cuda.get_current_stream().synchronize()
            self._waiting = []

    def free_bytes(self, fraction: float) -> int:
        """Bytes of device memory that a run may use: ``fraction`` of what is free now."""
        with self.guard("memory"):
            self._cupy.get_default_memory_pool().free_all_blocks()
            free, _total = self._cupy.cuda.runtime.memGetInfo()
        return int(free * fraction)

    def close(self) -> None:
        """Give the device memory back."""
        self._waiting = []
        with self.guard("release"):
            self._cupy.get_default_memory_pool().free_all_blocks()
            self._cupy.get_default_pinned_memory_pool().free_all_blocks()


def device_errors(cupy: Any, cuda: Any) -> tuple[type[BaseException], ...]:
    """Exception classes that mean "the device failed", as far as the installed libraries have them."""
    paths = (
        (cupy, "cuda.runtime.CUDARuntimeError"),
        (cupy, "cuda.driver.CUDADriverError"),
        (cupy, "cuda.memory.OutOfMemoryError"),
        (cupy, "cuda.compiler.CompileException"),
        (cupy, "cuda.nvrtc.NVRTCError"),
        (cuda, "cudadrv.error.CudaSupportError"),
        (cuda, "cudadrv.error.CudaDriverError"),
        (cuda, "cudadrv.error.NvvmError"),
        (cuda, "cudadrv.error.NvrtcError"),
        (cuda, "cudadrv.driver.CudaAPIError"),
        (cuda, "cudadrv.driver.LinkerError"),
    )
    found = []
    for module, path in paths:
        for part in path.split("."):
            module = getattr(module, part, None)
        if isinstance(module, type) and issubclass(module, BaseException):
            found.append(module)
    return tuple(found)


def open_cuda(device_id: int = 0, selector: str = "") -> CudaBackend:
    """The CUDA backend.

    Parameters
    ----------
    device_id : int
    selector : str
        Part of the card's name; takes precedence where it is found.

    Raises
    ------
    DeviceFailure
        With a reason that a user can act on.
    """
    os.environ.setdefault("CUPY_ACCELERATORS", "")
    try:
        import cupy
        from numba import cuda
    except ImportError as error:
        raise NoGpuSupport(
            f"{error.name or error} is not installed (pip install 'zemosaic-worker[gpu-cuda12]')"
        ) from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except device_errors(cupy, cuda) as error:
        raise DeviceFailure(f"no usable CUDA driver or card: {error}") from error
    if selector:
        device_id = find_card(cupy, cuda, selector, count, device_id)
    if not 0 <= device_id < count:
        raise DeviceFailure(f"there is no card number {device_id}: {count} found")
    return CudaBackend(cupy, cuda, device_id)


def find_card(cupy: Any, cuda: Any, selector: str, count: int, default: int) -> int:
    """Number of the first card whose name holds ``selector``; ``default`` where there is none."""
    for number in range(count):
        try:
            name = cupy.cuda.runtime.getDeviceProperties(number)["name"]
        except device_errors(cupy, cuda) as error:
            raise DeviceFailure(f"card {number} does not answer: {error}") from error
        if selector.lower() in (name.decode() if isinstance(name, bytes) else str(name)).lower():
            return number
    return default


@dataclass
class BackendSwitch:
    """Which backend a run uses, and why; runs each step as a whole on one of them.

    Attributes
    ----------
    mode : {"auto", "on", "off"}
    opener : callable
        Opens the GPU backend or raises :class:`DeviceFailure`.
    tell : callable
        ``tell(key, text)``: receives the one message of a fallback (``phase5_gpu_fallback``).
    """

    mode: str = "auto"
    opener: Callable[[], Any] = open_cuda
    tell: Callable[[str, str], None] = lambda key, text: None
    reason: str = "the GPU was not asked for"
    gpu: Any = None
    cpu: CpuBackend = field(default_factory=CpuBackend)
    fell_back: bool = False

    def start(self) -> None:
        """Open the GPU where it is wanted. With ``auto``, a machine without GPU libraries uses its CPU without a word."""
        if self.mode not in ("auto", "on", "off"):
            raise UsageError(f"gpu must be auto, on or off, not {self.mode!r}")
        if self.mode == "off":
            return
        try:
            self.gpu = self.opener()
            self.reason = self.gpu.description
        except NoGpuSupport as absence:
            self._fall_back(str(absence), aloud=self.mode == "on")
        except DeviceFailure as failure:
            self._fall_back(str(failure), aloud=True)

    @property
    def name(self) -> str:
        """``gpu`` or ``cpu``: what the next step will run on."""
        return "cpu" if self.gpu is None else "gpu"

    def run(self, step: Callable[[Any], Result]) -> Result:
        """``step(backend)`` on the GPU, or, after any device failure, once more and wholly on the CPU."""
        if self.gpu is not None:
            try:
                result = step(self.gpu)
                self.gpu.synchronize()
                return result
            except DeviceFailure as failure:
                self._fall_back(str(failure), aloud=True)
        return step(self.cpu)

    def _fall_back(self, reason: str, aloud: bool) -> None:
        self.gpu = None
        self.fell_back = aloud
        self.reason = reason
        if aloud:
            self.tell("phase5_gpu_fallback", f"the GPU is not used, the CPU does the work: {reason}")

    def close(self) -> None:
        """Release the device; a device that fails while it is released has done its work."""
        if self.gpu is not None:
            gpu, self.gpu = self.gpu, None
            try:
                gpu.close()
            except DeviceFailure as failure:
                self.tell("", f"the GPU did not release its memory: {failure}")
