"""A CUDA device that is not there, for what a host can get wrong about a real one.

Its tensors lie in host memory, its arithmetic is the CPU's, its kernels run in Triton's interpreter. As on a GPU is the
time at which things happen. Work sent to a stream is only noted down; it is done when the host waits for it, not
sooner, and no more of it than is waited for. Memory that nothing has been computed into is NaN, or an absurd integer.
So a result that is read too early, a stream that ought to have waited for another, a host buffer that is written again
while a copy has yet to read it: each gives wrong numbers here every time, and on a GPU once in a while. A graph keeps
what is sent during its capture and sends it at each replay, with the host's numbers as they were then.

Not pretended: speed, a GPU's own rounding, its allocator and libraries, whatever goes on inside it.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from types import SimpleNamespace
from weakref import finalize

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

from train.precompile import AbsentGpu

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 (pretended)", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132,
    L2_cache_size=2**20,
)  # fmt: skip
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
INDEXED = {"index", "index_put_"}  # with indices from either side
# Products of 16-bit factors that are summed and kept in fp32, which only CUDA has.
WIDE_PRODUCTS = {
    aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    aten.addmm.dtype_out: lambda c, a, b, dtype, *, out: torch.addmm(c, a.to(dtype), b.to(dtype), out=out),
}


class OfTheGpu:
    gpu: "PretendGpu"  # there is one at a time


class Stream(OfTheGpu):
    """Work that was sent and is not done yet, in order; during a capture, what is sent goes to `tape` instead."""

    def __init__(self, device=None):
        self.queue, self.tape = deque(), None
        self.gpu.streams.append(self)

    def send(self, work: Callable[[], None]) -> None:
        (self.queue if self.tape is None else self.tape).append(work)

    def run(self, until: "Mark | None" = None) -> None:
        while self.queue and not (until and until.time):
            self.queue.popleft()()

    def record_event(self) -> "Event":
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        stream, mark = event.stream, event.mark
        self.send(lambda: stream.run(mark))

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Mark:
    """Work that takes down the time."""

    time: float | None = None

    def __call__(self) -> None:
        self.time = perf_counter()


class Event(OfTheGpu):
    def __init__(self, enable_timing: bool = False):
        self.stream, self.mark = self.gpu.default, Mark()

    def record(self, stream: Stream | None = None) -> None:
        self.stream, self.mark = stream or self.gpu.current_stream(), Mark()
        self.stream.send(self.mark)

    def synchronize(self) -> None:
        """No accident: `set_sync_debug_mode` lets it pass."""
        self.stream.run(self.mark)

    def elapsed_time(self, end: "Event") -> float:
        if self.mark.time is None or end.mark.time is None:
            raise RuntimeError("device not ready")
        return 1e3 * (end.mark.time - self.mark.time)


class Graph(OfTheGpu):
    def __init__(self):
        self.tape = []

    def pool(self) -> int:
        return id(self)

    def replay(self) -> None:
        for work in self.tape:
            self.gpu.current_stream().send(work)


class PretendGpu(TorchDispatchMode):
    """The device, for this thread and those it starts, while it is open as a context. `waited` counts how often the
    host waited for it by accident, by operation."""

    def __init__(self, monkeypatch):
        super().__init__()
        OfTheGpu.gpu = self
        self.streams: list[Stream] = []
        self.default = Stream()
        self.waited: Counter[str] = Counter()
        self.may_wait = True
        self._local = threading.local()
        self._on_gpu: set[int] = set()  # storages, by address
        self._pinned: set[int] = set()
        self._patch_tensors(monkeypatch)
        self._patch_cuda(monkeypatch)

    def current_stream(self, device=None) -> Stream:
        return getattr(self._local, "stream", self.default)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._local.stream = before

    @contextmanager
    def capture(self, graph: Graph, pool=None, stream=None, capture_error_mode="global") -> Iterator[None]:
        self.synchronize()
        with self.stream(stream or Stream()):
            self.current_stream().tape = graph.tape
            try:
                yield
            finally:
                self.current_stream().tape = None

    def synchronize(self, device=None) -> None:
        self._not_in_capture("the device is waited for")
        for stream in self.streams:
            stream.run()

    def wait(self, operation: str) -> None:
        """The host waits for the current stream, because of an operation that cannot do otherwise."""
        self._not_in_capture(f"{operation} waits")
        if not self.may_wait:
            raise RuntimeError(f"called a synchronizing CUDA operation: {operation}")
        self.waited[operation] += 1
        self.current_stream().run()

    def _not_in_capture(self, what: str) -> None:
        if self.current_stream().tape is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")

    def owns(self, tensor: Tensor) -> bool:
        return not getattr(self._local, "works", False) and tensor.untyped_storage()._cdata in self._on_gpu

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def mark(self, tensor: Tensor, pinned: bool = False) -> Tensor:
        """`tensor`, whose memory is from now on the device's, or the host's and pinned."""
        storage, storages = tensor.untyped_storage(), self._pinned if pinned else self._on_gpu
        storages.add(storage._cdata)
        finalize(storage, storages.discard, storage._cdata)
        return tensor

    def allocate(self, like: Tensor, pinned: bool = False) -> Tensor:
        """Memory that holds nonsense."""
        out = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype)
        if out.is_floating_point():
            out.fill_(torch.nan)
        elif out.dtype != torch.bool:
            out.fill_(torch.iinfo(out.dtype).max // 2)
        return self.mark(out, pinned)

    @contextmanager
    def working(self) -> Iterator[None]:
        """As the device: tensors are plain memory, and autograd has had its say."""
        before, self._local.works = getattr(self._local, "works", False), True
        try:
            with _disable_current_modes(), torch._C._AutoDispatchBelowAutograd():
                yield
        finally:
            self._local.works = before

    def send(self, function: Callable, *args, **kwargs) -> None:
        """To the current stream. The tensors are taken by their memory of now: `data` of a parameter may be another by
        the time that the work is done. Numbers that are tensors of the host go along as they are."""

        def taken(leaf):
            return leaf if not isinstance(leaf, Tensor) else leaf.detach() if self.owns(leaf) else leaf.detach().clone()

        arguments = tree_map(taken, (args, kwargs))

        def work():
            with self.working():
                function(*arguments[0], **arguments[1])

        self.current_stream().send(work)

    def copy(self, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Between host and device, or on one of them."""
        host = None if self.owns(to) and self.owns(source) else source if self.owns(to) else to
        if host is not None and not self.is_pinned(host) and host.dim():
            self._not_in_capture("a copy of memory that is not pinned")
            # CUDA takes what it is to send at once, and comes back when it has what it fetches.
            non_blocking = non_blocking and host is source
            source = source.clone() if host is source else source
        works = [to.detach(), source.detach()]

        def work():
            with self.working():
                works[0].copy_(works[1])

        self.current_stream().send(work)
        if host is not None and host.dim() and not non_blocking:
            self.wait("a copy")
        return to

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        pinned = kwargs.pop("pin_memory", False)
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        to_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if not to_gpu and not any(map(self.owns, tensors)):
            out = func(*args, **kwargs)
            return self.mark(out, pinned=True) if pinned else out
        if name == "copy_":
            return self.copy(*args, **kwargs)
        if name == "_to_copy":
            return self._to_copy(*args, **kwargs)
        strangers = [t for t in tensors if t.dim() and not self.owns(t)]
        if strangers and name not in INDEXED:
            raise RuntimeError(f"{name}: all tensors should be on cuda:0, and {len(strangers)} are on the CPU")
        if func.is_view or name in ("detach", "set_"):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self.send(WIDE_PRODUCTS.get(func, func), *args, **kwargs)
            arguments = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
            written = [arguments[a.name] for a in func._schema.arguments if a.is_write]
            return None if not func._schema.returns else written[0] if len(written) == 1 else tuple(written)
        shapes = self._shapes(func, args, kwargs)
        kwargs = kwargs | ({"device": torch.device("cpu")} if to_gpu else {})
        if shapes is None:  # a number, or tensors whose shapes depend on numbers
            self.wait(name)
            with self.working():
                out = func(*args, **kwargs)
            return self.mark(out) if isinstance(out, Tensor) else out
        out = tree_map(self.allocate, shapes)
        if name not in ALLOCATIONS:
            self.send(self._compute, WIDE_PRODUCTS.get(func, func), args, kwargs, out)
        return out

    def _shapes(self, func, args, kwargs):
        """Tensors without memory in the shapes of what `func` returns; None where it returns no tensors, or only their
        numbers would tell."""
        on_meta = {"device": torch.device("meta")} if "device" in kwargs else {}
        try:
            with self.working():
                args, kwargs = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, (args, kwargs))
                shapes = func(*args, **(kwargs | on_meta))
        except (NotImplementedError, RuntimeError):
            return None
        return shapes if all(isinstance(leaf, Tensor) for leaf in tree_leaves(shapes)) else None

    @staticmethod
    def _compute(func, args, kwargs, out) -> None:
        for to, result in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
            to.copy_(result)

    def _to_copy(self, source: Tensor, *, non_blocking: bool = False, dtype=None, device=None, **kwargs) -> Tensor:
        """On the device: autograd means that too where it says "cpu", which it takes the memory to be."""
        with self.working():
            like = aten._to_copy(source, dtype=dtype, device=torch.device("meta"), **kwargs)
        return self.copy(self.allocate(like), source, non_blocking)

    def _patch_tensors(self, patch) -> None:
        """What tensors are asked by Python code, and where they are made."""
        gpu, to_elsewhere, numpy, tolist = self, Tensor.to, Tensor.numpy, Tensor.tolist
        device, deepcopy, tensor = Tensor.device, Tensor.__deepcopy__, torch.tensor

        def to(tensor, *args, **kwargs):
            wanted, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
            if wanted is not None and wanted.type == "cuda" and gpu.owns(tensor):
                return tensor if dtype is None else to_elsewhere(tensor, dtype)
            if wanted is not None and wanted.type == "cuda":
                return aten._to_copy(tensor, dtype=dtype, device=wanted, non_blocking=non_blocking)
            if wanted is not None and wanted.type == "cpu" and gpu.owns(tensor):
                with gpu.working():
                    like = to_elsewhere(tensor, "meta", dtype)
                return gpu.copy(gpu.allocate(like, pinned=True), tensor, non_blocking)
            return to_elsewhere(tensor, *args, **kwargs)

        def of_data(*args, pin_memory=False, device=None, **kwargs):
            out = tensor(*args, **kwargs)
            out = gpu.mark(out, pinned=True) if pin_memory else out
            return out if device is None else out.to(device)

        def on_host(tensor):
            if gpu.owns(tensor):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
            return tensor

        def copied(tensor, memo):
            return memo.setdefault(id(tensor), tensor.detach().clone()) if gpu.owns(tensor) else deepcopy(tensor, memo)

        for name, value in {
            "device": property(lambda t: DEVICE if gpu.owns(t) else device.__get__(t)),
            "is_cuda": property(gpu.owns), "to": to, "cpu": lambda t: to(t, "cpu"),
            "numpy": lambda t, **kwargs: numpy(on_host(t), **kwargs), "tolist": lambda t: tolist(to(t, "cpu")),
            "is_pinned": lambda t: gpu.is_pinned(t), "record_stream": lambda t, stream: None, "__deepcopy__": copied,
        }.items():  # fmt: skip
            patch.setattr(Tensor, name, value)
        patch.setattr(torch, "tensor", of_data)

    def _patch_cuda(self, patch) -> None:
        """The device's own functions; Triton, which launches kernels there; threads, which see the same device."""
        gpu, run_kernel, run_thread = self, InterpretedFunction.run, threading.Thread.run

        def launch(kernel, *args, **kwargs):
            given = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
            if not any(map(gpu.owns, given)):
                return run_kernel(kernel, *args, **kwargs)
            assert all(map(gpu.owns, given)), f"{kernel.__name__} is given a tensor of the host"
            return gpu.send(run_kernel, kernel, *args, **kwargs)

        def in_thread(thread):
            with gpu:
                run_thread(thread)

        patch.setattr(InterpretedFunction, "run", launch)
        patch.setattr(triton.runtime.driver, "_active", AbsentGpu(90))
        patch.setattr(threading.Thread, "run", in_thread)
        generator = torch.zeros(16, dtype=torch.uint8)
        for name, value in {
            "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None,
            "current_device": lambda: 0, "get_device_name": lambda device=None: PROPERTIES.name,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_properties": lambda device=None: PROPERTIES,
            "mem_get_info": lambda: (70 * 2**30, 80 * 2**30), "max_memory_allocated": lambda: 2**30,
            "empty_cache": lambda: None, "reset_peak_memory_stats": lambda: None,
            "get_rng_state": generator.clone, "set_rng_state": lambda state: None,
            "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": self.capture, "stream": self.stream,
            "current_stream": self.current_stream, "synchronize": self.synchronize,
            "set_sync_debug_mode": lambda mode: setattr(gpu, "may_wait", mode != "error"),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
