"""Running code on meta tensors, which have no data, and counting the bytes that it would have alive at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import adagrad, adam, sgd
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels import blockwise, moments, random, tiles
from ..core import bucket, refresh

aten = torch.ops.aten
META = torch.device("meta")
CHECK = "_device_dtype_check_for_fused"

Self = TypeVar("Self", bound="Watch")

_MADE: dict[Any, Any] = {}
"""What operations return, by the shapes of their arguments; torch would find it in Python, slowly, in every call."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of the meta tensors that are made inside and alive, and the most of them at a time.

    Where code asks for values it gets invented ones: a number is 1, a condition True, `nonzero` finds every entry.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: set[int] = set()
        self._numbers = _no_numbers()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do not import torch's compiler, which takes a second, to say that nothing is compiled here."""
        return False

    def __enter__(self: Self) -> Self:
        self._numbers.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._numbers.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        how = kwargs or {}
        given: list[Tensor] = []
        key = (func, torch.get_default_dtype(), _key(args, given), *((name, _key(how[name], given)) for name in how))
        asked = None
        for tensor in given:
            if tensor.is_meta:
                asked = tensor if asked is None else asked
                self._known.add(tensor.untyped_storage()._cdata)
        answer = _answer(func, asked, how) if func in ASKING and asked is not None else None
        made = _run(func, args, how, given, key) if answer is None else answer
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.allocated(key, size)
            weakref.finalize(storage, self._forget, key, size)

    def allocated(self, key: int, size: int) -> None:
        """Count a storage that is new."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def freed(self, key: int, size: int) -> None:
        """Count one that is no more."""
        self.now -= size

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.freed(key, size)


def _key(value: Any, given: list[Tensor]) -> Any:
    """A hashable description of arguments, which decides the form of a result; appends their tensors to `given`."""
    if isinstance(value, Tensor):
        given.append(value)
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, tuple | list):
        return tuple([_key(part, given) for part in value])
    return type(value), value


def _run(func: Any, args: tuple[Any, ...], how: Mapping[str, Any], given: list[Tensor], key: Any) -> Any:
    """Run an operation, or make what it is known to return for such arguments."""
    try:
        known = _MADE.get(key)
    except TypeError:  # an argument that cannot be compared
        return func(*args, **how)
    if known is None:
        made = func(*args, **how)
        _MADE[key] = _form(func, args, given, made)
        return made
    if known is WRITTEN:
        return args[0]
    return known.make() if isinstance(known, Form) else func(*args, **how)


@dataclass(frozen=True, slots=True)
class Form:
    """What an operation returns: new tensors, or one, of these shapes, strides and dtypes."""

    parts: tuple[tuple[Any, Any, torch.dtype], ...]
    several: bool

    def make(self) -> Any:
        """Make them without data."""
        made = tuple(torch.empty_strided(size, stride, dtype=dtype, device=META) for size, stride, dtype in self.parts)
        return made if self.several else made[0]


WRITTEN, OTHER = "its first argument", "anything else, such as a view"


def _form(func: Any, args: tuple[Any, ...], given: list[Tensor], made: Any) -> Form | str:
    if any(tensor.ndim and not tensor.is_meta for tensor in given):
        return OTHER  # the result may depend on values
    if func._schema.name.endswith("_") and args and made is args[0] and made.is_meta:
        return WRITTEN
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    outs = made if isinstance(made, tuple) else (made,)
    if func._schema.is_mutable or not all(_is_new(out, storages) for out in outs):
        return OTHER
    return Form(tuple((out.shape, out.stride(), out.dtype) for out in outs), isinstance(made, tuple))


def _is_new(out: Any, storages: set[int]) -> bool:
    """Whether it is a tensor without data that fills a storage of its own."""
    if not isinstance(out, Tensor) or not out.is_meta or out.untyped_storage()._cdata in storages:
        return False
    last = sum((size - 1) * stride for size, stride in zip(out.shape, out.stride(), strict=True))
    return out.untyped_storage().nbytes() == (last + 1 if out.numel() else 0) * out.itemsize


NUMBER, ENTRIES, COPY = aten._local_scalar_dense.default, aten.nonzero.default, aten._to_copy.default
ASKING = (NUMBER, ENTRIES, COPY)


def _answer(func: Any, asked: Tensor, how: Mapping[str, Any]) -> Any:
    """Invent what is asked of data: one number, the entries that are not zero, or a copy on the host."""
    if func is NUMBER:
        return 1.0 if asked.is_floating_point() else True if asked.dtype == torch.bool else 1
    if func is ENTRIES:
        return asked.new_empty((asked.numel(), asked.ndim), dtype=torch.int64)
    if how.get("device") == torch.device("cpu"):
        return torch.ones(asked.shape, dtype=how.get("dtype") or asked.dtype)
    return None


@contextmanager
def pieces_of(device: str) -> Iterator[None]:
    """Let code treat meta tensors as those of a device: cut into pieces of the same size, stepped by the same forms."""
    where: list[tuple[Any, str, Any]] = [(moments, "_FUSED_DEVICES", moments._FUSED_DEVICES | {META.type})]
    # torch's own optimizers ask whether the device has a fused form; what it allocates is nothing.
    where += [(module, CHECK, _accept) for module in (adam, sgd, adagrad) if hasattr(module, CHECK)]
    if device == "cpu":
        where += [(bucket, "GPU_BUFFER", bucket.CPU_BUFFER), (tiles, "GPU_CHUNK", tiles.CHUNK)]
        where += [(refresh, "BATCH", refresh.CPU_BATCH), (blockwise, "ASKED", blockwise.ASKED | {META.type})]
    with replaced(where):
        yield


def _accept(*_: Any, **__: Any) -> None:
    pass


def _no_numbers() -> AbstractContextManager[None]:
    """Make random meta tensors at once: counting them block by block, as they are made with data, takes minutes."""
    names = ("normal", "signs")
    return replaced([(random, name, partial(_numbers, getattr(random, name))) for name in names])


@contextmanager
def replaced(where: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Give names of modules other values for a while."""
    before = [(module, name, getattr(module, name)) for module, name, _ in where]
    for module, name, value in where:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _numbers(make: Callable[..., Tensor], seed: int, rows: int | range, cols: int, device: Any = "cpu") -> Tensor:
    if torch.device(device) != META:
        return make(seed, rows, cols, device)
    return torch.empty((rows if isinstance(rows, int) else len(rows), cols), device=META, dtype=torch.float32)
