"""A simulated GPU: what is on the wrong device fails as it does with CUDA, and each wait for the device is counted.

    with simulated_gpu() as gpu:
        train(args)  # with --cuda
    print(gpu.waits)  # {("read" or "send", line of the script): how often}

A tensor that is made on "cuda", or moved there, says that its device is cuda:0. The CPU computes it, so the results are
those of the CPU, bit for bit.

Refused, as by CUDA:
- operations on tensors of both devices. Allowed are copies, CPU indices, and a single CPU number in arithmetic.
- .numpy() without .cpu()

Counted are waits: the program stands still until the device has done all that it was told to do.
- A read: the program needs what was computed there. So do .item(), .tolist(), .cpu(), `if tensor:`, and what must know
  a size: nonzero(), or a mask as an index.
- A send: a copy to the device without non_blocking=True. PyTorch returns from it when the copy has arrived, behind all
  that was queued before (memcpy_and_sync in PyTorch's aten/src/ATen/native/cuda/Copy.cu).

It cannot show:
- time, memory, and what CUDA's kernels and cuDNN do: their rounding, their random numbers, what they refuse, and where
  they wait on their own
- several GPUs, CUDA graphs, torch.compile, pinned memory. non_blocking=True counts as no wait, though from memory that
  is not pinned it may be one.

Not implemented, and an error: gradients from one device to the other, .to(tensor), new_tensor(), one_hot().
"""

import linecache
import sys
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
INDEXING = aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_  # (self, indices, ...)
FILLING = aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_
DEPENDS_ON_DATA = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape  # what is returned, or its size


class GPUTensor(torch.Tensor):
    """A tensor on the simulated GPU. Its numbers are in `memory`, a CPU tensor for SimulatedGPU alone.

    PyTorch's C++ has each operation carried out by __torch_dispatch__. Otherwise it takes this for a CPU tensor, so the
    methods below __torch_dispatch__ must not reach C++.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # SimulatedGPU sees all calls
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, memory, gpu):
        layout = dict(strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, memory.shape, **layout)

    def __init__(self, memory, gpu):
        self.memory, self.gpu = memory, gpu

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        gpu = next(x.gpu for x in operands if isinstance(x, GPUTensor))
        return gpu.compute(func, operands, args, kwargs or {})

    def numpy(self, *, force=False):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self):
        return self.gpu.move(self.detach(), CPU).tolist()

    def __repr__(self):
        return f"on the simulated GPU: {self.gpu.move(self.detach(), CPU)}"

    def __reduce_ex__(self, protocol):  # for torch.save
        return self.gpu.move(self.detach(), CPU).__reduce_ex__(protocol)


def memory_of(x):
    return x.memory if isinstance(x, GPUTensor) else x


def is_on_cpu(x):
    return isinstance(x, torch.Tensor) and not isinstance(x, GPUTensor)


class SimulatedGPU(TorchFunctionMode):
    """The device. It sees all calls of PyTorch's functions, and carries out the operations on GPUTensors."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __deepcopy__(self, memo):
        return self  # a copied tensor is on the same device

    def wait(self, kind):
        """Count a wait under the line that caused it: the innermost one outside of PyTorch and this file."""
        frame = sys._getframe()
        while frame.f_globals.get("__name__", "").partition(".")[0] in (__name__, "torch"):
            frame = frame.f_back
        self.waits[kind, linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()] += 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """A call of a function. Those that name a device must not reach C++, which would look for a real GPU."""
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args[1:], **kwargs)
            return self.move(args[0], device, dtype, non_blocking, memory_format)
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            return self.move(args[0], CPU if func is torch.Tensor.cpu else CUDA)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = torch.device(kwargs["device"])
        if func in (torch.as_tensor, torch.tensor):  # made of data, which is copied
            return self.move(func(*args, **kwargs | {"device": None}), device)
        made = func(*tree_map(memory_of, args), **kwargs | {"device": CPU})
        return GPUTensor(made, self) if device.type == "cuda" else made

    def move(self, x, device, dtype=None, non_blocking=False, memory_format=None):
        """What Tensor.to does. device=None: stay where it is."""
        on_gpu = isinstance(x, GPUTensor)
        to_gpu = on_gpu if device is None else device.type == "cuda"
        dtype, memory_format = dtype or x.dtype, memory_format or torch.preserve_format
        if on_gpu == to_gpu:
            return torch.Tensor.to(x, dtype, memory_format=memory_format)
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("gradients from one device to the other are not simulated: detach() first")
        if not non_blocking:
            self.wait("send" if to_gpu else "read")
        copy = aten._to_copy(memory_of(x), dtype=dtype, memory_format=memory_format)
        return GPUTensor(copy, self) if to_gpu else copy

    def compute(self, func, operands, args, kwargs):
        """An operation of PyTorch on `operands`, the tensors in args and kwargs; at least one is on the GPU."""
        self.check_devices(func, operands, args)
        self.count_waits(func, args)
        args, kwargs = tree_map(memory_of, (args, kwargs))
        results = func(*args, **kwargs)
        return tree_map(lambda x: GPUTensor(x, self) if isinstance(x, torch.Tensor) else x, results)

    def check_devices(self, func, operands, args):
        """Refuse operands of both devices where CUDA does."""
        if func.overloadpacket is aten.copy_:
            return
        takes_number = torch.Tag.pointwise in func.tags or func.overloadpacket in FILLING
        if func.overloadpacket in INDEXING and isinstance(args[0], GPUTensor):
            takes_number, operands = True, args[2:]  # its indices may be on the CPU
        for x in filter(is_on_cpu, operands):
            is_number = x.dim() == 0 and not (func._schema.is_mutable and x is args[0])  # that is where the result goes
            if not (takes_number and is_number):
                found = f"found at least two devices, cuda:0 and cpu! ({func} got {tuple(x.shape)} on the CPU)"
                raise RuntimeError(f"Expected all tensors to be on the same device, but {found}")

    def count_waits(self, func, args):
        """Count how often CUDA would wait in this operation."""
        if func.overloadpacket is aten.copy_:
            target, source, *non_blocking = args
            if is_on_cpu(target) != is_on_cpu(source) and non_blocking != [True]:
                self.wait("read" if is_on_cpu(target) else "send")
        elif func.overloadpacket in INDEXING:
            for index in [x for x in args[1] if x is not None]:
                is_mask = index.dtype in (torch.bool, torch.uint8)
                if is_mask and isinstance(index, GPUTensor):
                    self.wait("read")
                if not is_mask and is_on_cpu(index):  # a CPU mask becomes indices in pinned memory: no wait
                    self.wait("send")
        elif any(tag in func.tags for tag in DEPENDS_ON_DATA):
            self.wait("read")


@contextmanager
def simulated_gpu():
    """While this lasts, PyTorch has a GPU: the SimulatedGPU that it gives. Afterwards, no trace of it is left."""
    group, autocast = torch._C._group_tensors_by_device_and_dtype, torch.autocast

    def group_by_device(lists, *args, **kwargs):
        """For optimizers and gradient norms. C++ would say that all tensors are on the CPU."""
        groups = group(lists, *args, **kwargs)
        return {(found[0][0][0].device, dtype): found for (_, dtype), found in groups.items()}

    # The accelerator would be asked for CUDA graphs. Module.to must swap parameters, as C++ cannot move them in place.
    with (
        SimulatedGPU() as gpu,
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "get_device_name", lambda device=None: "a simulated GPU"),
        patch.object(torch.cuda, "synchronize", lambda device=None: gpu.wait("read")),
        patch.object(torch.accelerator, "current_accelerator", lambda check_available=False: None),
        patch.object(torch, "autocast", lambda device_type, *args, **kwargs: autocast("cpu", *args, **kwargs)),
        patch.object(torch._C, "_group_tensors_by_device_and_dtype", group_by_device),
        patch.object(torch.__future__, "get_swap_module_params_on_conversion", lambda: True),
    ):
        yield gpu
