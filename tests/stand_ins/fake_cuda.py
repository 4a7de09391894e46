"""A CUDA card that is not there: strict stand-ins for ``cupy`` and ``numba.cuda``.

What they have is what the backend uses, under the names and in the packages of the real libraries; whatever else is
asked of them is an AttributeError. They are stricter than the real ones:

- Arrays refuse every conversion to numpy and every operation; a kernel takes nothing but device arrays and numbers.
- Nothing is done when it is queued. Each stream has its own queue, which advances when somebody waits for it, or at
  once where the card's ``pace`` says so. Freed memory is handed out again immediately. An array that is freed, or
  page-locked memory that is written to, while a queued operation still needs it, spoils the result.
- Work is refused in a thread whose current device is another one.

The kernels are those of `pixels.kernels.cuda_kernels`: their own source runs once for every thread of the grid, those
that stick out over the edge included. The pixel functions that they call run compiled for the CPU, or, with
``interpreted``, as the Python that they are.
"""

from __future__ import annotations

import ctypes
import threading
import types
from collections import Counter, defaultdict, deque
from types import SimpleNamespace

import numpy as np

PACES = ("at once", "late copies", "late kernels")


class CUDARuntimeError(RuntimeError):
    __module__ = "cupy_backends.cuda.api.runtime"


class OutOfMemoryError(MemoryError):
    __module__ = "cupy.cuda.memory"


class CudaAPIError(Exception):
    __module__ = "numba.cuda.cudadrv.driver"


class Card:
    """The machine's cards, what has been asked of them, and when they fail.

    Parameters
    ----------
    pace : one of PACES
        Which streams lag as far behind as they may.
    interpreted : bool
        Run the pixel functions as Python.
    names : sequence of str
        One for each card.
    """

    def __init__(self, pace="at once", interpreted=False, names=("Toy 1000",)):
        self.pace, self.interpreted, self.names = pace, interpreted, names
        self.calls = Counter()
        self.touched = 0
        self.failed_at = None
        self.fault = None
        self.compiled = []
        self.devices_used = set()
        self.threads = Counter()
        self.free_memory = 1 << 30
        self.local = threading.local()
        self.default_stream = Stream(self, 0)
        self.streams = [self.default_stream]
        self.device_pool, self.pinned_pool = Pool(), Pool()
        self.cupy, self.cuda = fake_cupy(self), fake_numba_cuda(self)

    def fail(self, kind, n, error):
        """Raise ``error`` at the n-th call of a kind (counted from now, from 1); kind "any" is every call."""
        self.calls.clear()
        self.fault = (kind, n, error)

    def touch(self, kind):
        """Count a call to the device."""
        self.touched += 1
        self.calls[kind] += 1
        self.calls["any"] += 1
        if self.fault and self.calls[self.fault[0]] == self.fault[1] and self.fault[0] in (kind, "any"):
            self.failed_at = self.touched
            error = self.fault[2]
            self.fault = None
            raise error

    @property
    def touched_after_failure(self):
        return self.touched - self.failed_at

    def check_current(self, device):
        assert getattr(self.local, "device", 0) == device, "another device is current in this thread"

    def current_device(self):
        return getattr(self.local, "device", 0)

    def current_stream(self):
        return getattr(self.local, "stream", None) or self.default_stream

    def advance(self):
        """Let the streams that do not lag do what they can."""
        moved = True
        while moved:
            moved = False
            for stream in self.streams:
                late = "late kernels" if stream is self.default_stream else "late copies"
                if self.pace != late:
                    moved |= stream.run_what_can_run()

    def install(self, monkeypatch):
        """Make ``import cupy`` and ``from numba import cuda`` find this card."""
        import sys

        import numba

        monkeypatch.setitem(sys.modules, "cupy", self.cupy)
        monkeypatch.setattr(numba, "cuda", self.cuda, raising=False)


# ---------------------------------------------------------------------------------------------------------- streams


class Event:
    def __init__(self, stream):
        self._stream, self._reached = stream, False

    @property
    def done(self):
        self._stream.card.touch("query")
        return self._reached

    def synchronize(self):
        self._stream.card.touch("synchronise")
        self._stream.run_until(self)

    def set_reached(self):
        self._reached = True

    @property
    def reached(self):
        return self._reached


class Stream:
    """A queue of operations, each a function or an :class:`Event` of another stream to wait for."""

    def __init__(self, card, ptr):
        self.card, self.ptr, self._queue = card, ptr, deque()

    def __enter__(self):
        self._outer = self.card.current_stream()
        self.card.local.stream = self
        return self

    def __exit__(self, *error):
        self.card.local.stream = self._outer

    def queue(self, operation):
        self._queue.append(operation)
        self.card.advance()

    def record(self):
        self.card.touch("record")
        event = Event(self)
        self.queue(event.set_reached)
        return event

    def wait_event(self, event):
        self.card.touch("wait")
        self.queue(event)

    def synchronize(self):
        self.card.touch("synchronise")
        self.run_until(None)

    def run_what_can_run(self):
        ran = False
        while self._queue and not (isinstance(self._queue[0], Event) and not self._queue[0].reached):
            operation = self._queue.popleft()
            if not isinstance(operation, Event):
                operation()
            ran = True
        return ran

    def run_until(self, event):
        """Run until an event of this stream is reached (None: to the end), other streams as far as that needs."""
        while self._queue and not (event and event.reached):
            operation = self._queue.popleft()
            if isinstance(operation, Event):
                operation._stream.run_until(operation)
            else:
                operation()
        self.card.advance()


# ----------------------------------------------------------------------------------------------------------- memory


class Pool:
    """Memory that is handed out again, last freed first, to the stream that freed it."""

    def __init__(self):
        self._free, self._all = defaultdict(list), []

    def take(self, stream, nbytes):
        size = max(512, 1 << (max(nbytes, 1) - 1).bit_length())
        free = self._free[stream, size]
        if not free:
            self._all.append(np.full(size, 0xFF, np.uint8))  # NaN, for those who believe that memory is 0
            free.append(self._all[-1])
        return Allocation(free, free.pop())

    def free_all_blocks(self):
        self._free.clear()


class Allocation:
    def __init__(self, home, memory):
        self._home, self.memory = home, memory

    def __del__(self):
        self._home.append(self.memory)


def pinned(allocation, nbytes):
    """Page-locked host memory: a buffer with an address."""
    kind = type("PinnedMemoryPointer", (ctypes.Array,), {"_type_": ctypes.c_ubyte, "_length_": nbytes})
    buffer = kind.from_address(allocation.memory.ctypes.data)
    buffer.ptr, buffer.allocation = allocation.memory.ctypes.data, allocation
    return buffer


class MemoryPointer:
    def __init__(self, card, device, memory):
        self._card, self._device, self._memory = card, device, memory

    def copy_from_host_async(self, mem, size, stream):
        self._card.touch("upload")
        self._card.check_current(self._device)
        assert isinstance(mem, int)
        there = self._memory[:size]
        stream.queue(lambda: ctypes.memmove(there.ctypes.data, mem, size))

    def copy_from_device_async(self, src, size, stream):
        self._card.touch("copy")
        self._card.check_current(self._device)
        there, here = self._memory[:size], src._memory[:size]
        stream.queue(lambda: np.copyto(there, here))


class ndarray:
    """A device array: shape, dtype, slices, a pointer; nothing that needs its values."""

    def __init__(self, card, device, allocation, values):
        self._card, self._device, self._allocation, self._values = card, device, allocation, values
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim
        self.size, self.nbytes = values.size, values.nbytes

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, key):
        view = self._values[key]
        assert isinstance(view, np.ndarray) and view.base is not None, "only slices"
        return ndarray(self._card, self._device, self._allocation, view)

    @property
    def data(self):
        assert self._values.flags.c_contiguous
        flat = self._values.reshape(-1).view(np.uint8)
        return MemoryPointer(self._card, self._device, flat)

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._values.ctypes.data, False),
            "strides": None if self._values.flags.c_contiguous else self._values.strides,
            "stream": 1,
            "version": 3,
            "device": self._device,
        }

    def _refuse(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    __array__ = __array_ufunc__ = __float__ = __int__ = __bool__ = __index__ = __iter__ = __dlpack__ = _refuse


def fake_cupy(card):
    """What the backend uses of ``cupy``."""

    def empty(shape, dtype):
        card.touch("allocate")
        device, dtype = card.current_device(), np.dtype(dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        card.devices_used.add(device)
        allocation = card.device_pool.take((device, card.current_stream().ptr), nbytes)
        return ndarray(card, device, allocation, allocation.memory[:nbytes].view(dtype).reshape(shape))

    def zeros(shape, dtype):
        out = empty(shape, dtype)
        values = out._values
        card.current_stream().queue(lambda: values.fill(0))
        return out

    def asnumpy(array):
        card.touch("download")
        card.check_current(array._device)
        card.current_stream().run_until(None)
        return array._values.copy()

    def alloc_pinned_memory(nbytes):
        card.touch("pin")
        return pinned(card.pinned_pool.take(None, nbytes), nbytes)

    class Device:
        def __init__(self, number):
            self._number = number

        def use(self):
            card.touch("select")
            card.local.device = self._number

    def new_stream(non_blocking=False):
        card.touch("stream")
        assert non_blocking, "it would wait for the default stream"
        card.streams.append(Stream(card, 1000 + len(card.streams)))
        return card.streams[-1]

    def device_count():
        card.touch("count")
        return len(card.names)

    def properties(number):
        card.touch("identify")
        return {"name": card.names[number].encode()}

    def memory_info():
        card.touch("memory")
        return card.free_memory, 2 * card.free_memory

    module = types.ModuleType("cupy")
    vars(module).update(empty=empty, zeros=zeros, asnumpy=asnumpy, ndarray=ndarray)
    module.get_default_memory_pool = lambda: card.device_pool
    module.get_default_pinned_memory_pool = lambda: card.pinned_pool
    module.cuda = SimpleNamespace(
        Device=Device,
        Stream=new_stream,
        get_current_stream=card.current_stream,
        alloc_pinned_memory=alloc_pinned_memory,
        runtime=SimpleNamespace(getDeviceCount=device_count, getDeviceProperties=properties, memGetInfo=memory_info),
    )
    return module


# ---------------------------------------------------------------------------------------------------------- kernels


class DeviceNDArray:
    """Numba's view of a device array."""

    def __init__(self, interface):
        self.device = interface["device"]
        shape, dtype = interface["shape"], np.dtype(interface["typestr"])
        strides = interface["strides"] or np.empty(shape, dtype).strides
        nbytes = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + dtype.itemsize
        buffer = (ctypes.c_char * nbytes).from_address(interface["data"][0])
        self.values = np.ndarray(shape, dtype, buffer, strides=strides)


class Kernel:
    """A kernel that runs thread by thread."""

    def __init__(self, card, function, options):
        self._card, self.targetoptions = card, {"lto": True, **options}
        replaced = {} if card.interpreted else compiled_pixel_functions()
        self._function = types.FunctionType(
            function.__code__,
            {**function.__globals__, **replaced},
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        self._known = set()

    def __getitem__(self, configuration):
        grid, threads, stream = configuration
        assert stream == 0, "the backend launches on cupy's default stream"

        def launch(*arguments):
            card = self._card
            card.touch("launch")
            values = [self._argument(argument) for argument in arguments]
            kinds = tuple(getattr(v, "ndim", type(v)) for v in values)
            if kinds not in self._known:
                self._known.add(kinds)
                card.cuda.cudadrv.nvvm.compile_ir("", fastmath=False, opt=3, lto=self.targetoptions["lto"])
            card.threads[self._function.__name__] += grid[0] * threads[0] * grid[1] * threads[1]
            card.current_stream().queue(lambda: self._run(grid, threads, values))

        return launch

    def _argument(self, argument):
        if isinstance(argument, DeviceNDArray):
            self._card.check_current(argument.device)
            return argument.values
        if isinstance(argument, tuple):
            assert all(type(number) is int for number in argument)
            return argument
        if type(argument) in (int, float, bool):
            return argument
        raise TypeError(f"a kernel does not take a {type(argument)}")

    def _run(self, grid, threads, values):
        card = self._card
        for y in range(grid[1] * threads[1]):
            for x in range(grid[0] * threads[0]):
                card.position = (x, y)
                self._function(*values)


_COMPILED = {}


def compiled_pixel_functions():
    """What the kernels call for each pixel, compiled for the CPU under the same names."""
    if not _COMPILED:
        from numba import njit

        from zemosaic_pipeline.pixels.combine import combine_pixel
        from zemosaic_pipeline.pixels.kernels import measure_cell, resample_pixel

        for function in (resample_pixel, measure_cell, combine_pixel):
            _COMPILED[function.__name__] = njit(cache=True, error_model="numpy")(function)
    return _COMPILED


def fake_numba_cuda(card):
    """What the backend and the kernels use of ``numba.cuda``."""

    def grid(dimensions):
        assert dimensions == 2
        return card.position

    def as_cuda_array(array, sync=True):
        assert not sync, "this waits for everything launched so far"
        return DeviceNDArray(array.__cuda_array_interface__)

    def compile_ir(ir, **options):
        card.compiled.append(options)

    module = types.ModuleType("numba.cuda")
    module.grid, module.as_cuda_array = grid, as_cuda_array
    module.jit = lambda **options: lambda function: Kernel(card, function, options)
    module.cudadrv = SimpleNamespace(nvvm=SimpleNamespace(compile_ir=compile_ir))
    return module
