"""A stand-in for a device that has no float64, as Apple's has none.

Inside ``device()`` tensors that are made on TYPE, or moved there, hold a tensor of the CPU and
refuse what that device refuses: float64, operands on another device that are not one number, and
a copy to the host that also changes the dtype to float64.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

TYPE = "lazy"
"""A type that torch lets be named without a library for it, which "mps" is not."""

COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device.

    Args:
        inner: the tensor of the CPU that holds its elements.
    """

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype is torch.float64:
            raise TypeError("this device has no float64")
        places = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), dtype=inner.dtype, device=TYPE, **places
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def data_ptr(self):
        return self.inner.data_ptr()

    def __repr__(self):
        return f"OnDevice({self.inner})"


def dispatch(function, args, kwargs):
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, OnDevice)]
    here = [t for t in tensors if not isinstance(t, OnDevice)]
    target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    if there and function not in COPIES and any(t.dim() for t in here):
        raise RuntimeError(f"{function}: expected all tensors to be on the same device")
    args, kwargs = tree_map(lambda t: t.inner if isinstance(t, OnDevice) else t, (args, kwargs))
    if target == TYPE:
        kwargs["device"] = "cpu"
    found = function(*args, **kwargs)
    if function is torch.ops.aten.copy_.default:
        check_read(tensors[0], tensors[1])
        return tensors[0]
    if target not in (None, TYPE) or not (there or target == TYPE):
        if there:
            check_read(found, there[0])
        return found
    by_inner = {id(t.inner): t for t in there}

    def wrap(t):
        if not isinstance(t, torch.Tensor):
            return t
        if id(t) not in by_inner:
            by_inner[id(t)] = OnDevice(t)
        return by_inner[id(t)]

    return tree_map(wrap, found)


def check_read(target, source):
    """Refuse to read into float64: such a copy casts before it leaves the device."""
    reads = isinstance(source, OnDevice) and not isinstance(target, OnDevice)
    if reads and target.dtype is torch.float64:
        raise TypeError("this device has no float64, to which a number would be cast there")


class Device(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class Functions(TorchFunctionMode):
    """torch.tensor and ``x.data = y``, which dispatch modes do not see."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.Tensor.data.__set__ and isinstance(args[0], OnDevice):
            args[0].inner = args[1].inner
            return None
        place = kwargs.get("device")
        if function is torch.tensor and place is not None and torch.device(place).type == TYPE:
            return function(*args, **{**kwargs, "device": "cpu"}).to(place)
        return function(*args, **kwargs)


@contextlib.contextmanager
def device():
    """Tensors made on TYPE inside are of the stand-in."""
    with Device(), Functions():
        yield torch.device(TYPE)
