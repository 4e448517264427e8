"""A fake of the CUDA runtime, as `cuda-python` has it, with host memory for a device."""

import ctypes
from types import SimpleNamespace


class Status(int):
    name = "cudaErrorUnknown"


class FakeCuda:
    """The CUDA runtime with host memory for a device; `alive` are the allocations and streams not given back.

    A stream that is captured records what would be done; a launch does it.
    """

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    recording = None

    def __init__(self):
        self.alive, self.fails, self.launches, self.capture_fails = {}, None, 0, False
        self._streams, self.clock_ms, self.times_ms = 0, 0.0, {}
        type(self).recording = None

    @classmethod
    def now(cls, stream, work):
        """Do `work`, or record it when the stream is being captured."""
        if cls.recording is not None:
            cls.recording.append(work)
        else:
            work()

    def _allocate(self, size):
        if self.fails is not None:
            return self.fails, None
        memory = (ctypes.c_ubyte * size)()
        self.alive[ctypes.addressof(memory)] = memory
        return Status(0), ctypes.addressof(memory)

    def cudaHostAlloc(self, size, flags):
        return self._allocate(size)

    def cudaMalloc(self, size):
        return self._allocate(size)

    def cudaStreamCreate(self):
        self._streams += 1
        self.alive[f"stream {self._streams}"] = True
        return Status(0), self._streams

    def cudaStreamDestroy(self, stream):
        del self.alive[f"stream {stream}"]
        return (Status(0),)

    def cudaFree(self, address):
        if address:  # freeing nothing is how a program makes CUDA's context
            del self.alive[address]
        return (Status(0),)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        self.now(stream, lambda: (self._pass(0.25), ctypes.memmove(target, source, size)))
        return (Status(0),)

    def _pass(self, milliseconds):
        """Every copy takes a quarter of a millisecond of the device's time, and nothing else takes any."""
        self.clock_ms += milliseconds

    def cudaEventCreate(self):
        event = f"event {len(self.times_ms)}"
        self.times_ms[event] = None
        self.alive[event] = True
        return Status(0), event

    def cudaEventRecord(self, event, stream):
        self.times_ms[event] = self.clock_ms
        return (Status(0),)

    def cudaEventElapsedTime(self, start, end):
        return Status(0), self.times_ms[end] - self.times_ms[start]

    def cudaEventSynchronize(self, event):
        return (Status(0),)

    def cudaEventDestroy(self, event):
        del self.alive[event]
        return (Status(0),)

    def cudaStreamBeginCapture(self, stream, mode):
        type(self).recording = []
        return (Status(0),)

    def cudaStreamEndCapture(self, stream):
        recorded, type(self).recording = self.recording, None
        return (Status(900), None) if self.capture_fails else (Status(0), recorded)

    def cudaGraphInstantiate(self, graph, flags):
        self.alive["graph", id(graph)] = graph
        return Status(0), graph

    def cudaGraphDestroy(self, graph):
        return (Status(0),)

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        for work in graph:
            work()
        return (Status(0),)

    def cudaGraphExecDestroy(self, graph):
        del self.alive["graph", id(graph)]
        return (Status(0),)

    def cudaMemGetInfo(self):
        return Status(0), 1 << 30, 2 << 30

    def cudaStreamSynchronize(self, stream):
        return (Status(0),)

    def cudaGetErrorString(self, status):
        return Status(0), b"out of memory"
