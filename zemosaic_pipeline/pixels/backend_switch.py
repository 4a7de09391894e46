"""The one place that chooses a backend and answers a failure of the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.pixels.backend_base import Backend, DeviceFailure, NoGpuSupport
from zemosaic_pipeline.pixels.backend_cpu import CpuBackend
from zemosaic_pipeline.pixels.backend_cuda import CudaBackend, open_cuda

Result = TypeVar("Result")


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
    opener: Callable[[], CudaBackend] = open_cuda
    tell: Callable[[str, str], None] = lambda key, text: None
    reason: str = "the GPU was not asked for"
    gpu: CudaBackend | None = None
    cpu: CpuBackend = field(default_factory=CpuBackend)
    fell_back: bool = False
    started: bool = False

    def start(self) -> None:
        """Open the GPU where it is wanted, once. With ``auto``, a machine without GPU libraries uses its CPU without a
        word."""
        if self.mode not in ("auto", "on", "off"):
            raise UsageError(f"gpu must be auto, on or off, not {self.mode!r}")
        if self.mode == "off" or self.started:
            return
        self.started = True
        try:
            self.gpu = self.opener()
            self.reason = self.gpu.description
        except DeviceFailure as failure:
            self._fall_back(failure)

    @property
    def name(self) -> str:
        """``gpu`` or ``cpu``: what the next step will run on."""
        return "cpu" if self.gpu is None else "gpu"

    @property
    def backend(self) -> Backend:
        """What the next step will run on."""
        return self.cpu if self.gpu is None else self.gpu

    def run(self, step: Callable[[Backend], Result]) -> Result:
        """``step(backend)`` on the GPU, or, after any device failure, once more and wholly on the CPU."""
        if self.gpu is not None:
            try:
                with self.gpu.guard("Phase 5"):
                    result = step(self.gpu)
                    self.gpu.synchronize()
                return result
            except DeviceFailure as failure:
                self._fall_back(failure)
        return step(self.cpu)

    def _fall_back(self, failure: DeviceFailure) -> None:
        self.gpu, self.reason = None, str(failure)
        self.fell_back = self.mode == "on" or not isinstance(failure, NoGpuSupport)
        if self.fell_back:
            self.tell("phase5_gpu_fallback", f"the GPU is not used, the CPU does the work: {failure}")

    def close(self) -> None:
        """Release the device; a device that fails while it is released has done its work."""
        if self.gpu is not None:
            gpu, self.gpu = self.gpu, None
            try:
                gpu.close()
            except DeviceFailure as failure:
                self.tell("", f"the GPU did not release its memory: {failure}")
