"""A GPU where there is none: tensors that say they lie on cuda:0 and compute on the CPU.

Inside `pretend_gpu()` whatever is asked for on "cuda" is such a tensor. An operation that mixes
devices raises as on a GPU, and the yielded `Waits` count what makes the processor wait for the
device. The numbers are those of the CPU. What it cannot tell: whether CUDA's kernels give the same
numbers, and how fast they are.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda:0")
# They give a number to Python, or a tensor whose size only the numbers tell.
WAITS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "_linalg_check_errors"),
}
COPIES = {"_to_copy", "copy_"}
# Their indices may lie on the CPU.
INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_"}


class Waits:
    """`count` of times that the processor waited; `strict` makes the next one an error."""

    def __init__(self):
        self.count, self.strict = 0, False

    def add(self, what):
        if self.strict:
            raise AssertionError(f"{what} makes the processor wait for the GPU")
        self.count += 1


class OnGpu(torch.Tensor):
    """`held` is the tensor with the numbers, on the CPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            # PyTorch's own code would ask CUDA about tensors on it.
            device="meta",
        )

    def __init__(self, held):
        self.held = held

    @property
    def device(self):
        return DEVICE

    @property
    def is_cuda(self):
        return True

    @property
    def is_meta(self):
        return False

    def __repr__(self):
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        # PyTorch does not ask subclasses about these.
        if func is torch.Tensor.data_ptr:
            return args[0].held.data_ptr()
        if func is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Where the mode is not on: to show it, or to compare it.
        return func(*tree_map(_held, args), **tree_map(_held, kwargs or {}))


class _Gpu(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits = Waits()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        given = kwargs.get("device")
        there = any(isinstance(x, OnGpu) for x in tensors)
        asked = there if given is None else torch.device(given).type != "cpu"
        if not there and not asked:
            return func(*args, **kwargs)
        # In inference mode what is made of other operations comes here undone.
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        stray = [x for x in tensors if not isinstance(x, OnGpu) and x.is_meta]
        assert not stray, f"{func}: PyTorch made a tensor where this file does not look"
        _check_devices(name, args, kwargs)
        if given is not None:
            kwargs["device"] = "cpu"
        non_blocking = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
        to_host = name == "copy_" and not isinstance(args[0], OnGpu)
        if name in WAITS or (name in INDEXED and there and _by_truth(args[1])):
            self.waits.add(name)
        elif there and (to_host or (name == "_to_copy" and not asked)) and not non_blocking:
            self.waits.add("a copy to the CPU")
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if to_host or not asked:
            return args[0] if to_host else result
        result = tree_map(lambda x: OnGpu(x) if isinstance(x, torch.Tensor) else x, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if there else result


def _held(x):
    return x.held if isinstance(x, OnGpu) else x


def _by_truth(indices):
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _check_devices(name, args, kwargs):
    if name in COPIES:
        return
    checked = (args[0], args[2:]) if name in INDEXED else (args, kwargs)
    tensors = [x for x in tree_leaves(checked) if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, OnGpu) for x in tree_leaves((args, kwargs)))
    # A number alone may stay on the CPU.
    here = [tuple(x.shape) for x in tensors if not isinstance(x, OnGpu) and x.ndim > 0]
    if here and there:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu: {name} with {here} on the CPU"
        )


class _FromNumbers(TorchFunctionMode):
    """`torch.tensor([1, 2], device=…)`, which asks CUDA itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def pretend_gpu():
    """Yields the `Waits`."""
    gpu = _Gpu()
    memory = mock.patch("torch.cuda.mem_get_info", return_value=(2**36, 2**36))
    with memory, mock.patch("torch.cuda._lazy_init"), gpu, _FromNumbers():
        yield gpu.waits
