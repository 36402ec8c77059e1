"""Calls of torch that a graph cannot say: refused while a model is traced, or given their functional form."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from tpcompile.errors import CannotCapture
from tpcompile.ir.torch_internals import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    tree_leaves,
)

from .aliases import DROPOUTS, drops_nothing
from .asked_tracing import as_untraced
from .explain_failure import here
from .look_inside import PLAIN, is_librarys, module_of, only_asks
from .memory_order import STRIDES, MemoryOrder
from .open_sizes import is_message, sizes_as_numbers, unseen
from .shots import storage
from .written_constants import WrittenConstants

_TENSOR: Any = Tensor
_PARTS = "parallelize(compose=True) lets this module run as the python that it is"
_FUNCTION = f"change the gradient with a torch.autograd.Function; or {_PARTS}"
_REFUSED: dict[Any, tuple[str, str]] = {
    Tensor.register_hook: ("registers a hook on a value", _FUNCTION),
    Tensor.register_post_accumulate_grad_hook: ("registers a hook on a value", _FUNCTION),
    Tensor.retain_grad: ("asks for a value's gradient (retain_grad)", f"return the value; or {_PARTS}"),
    Tensor.backward: ("runs backward", _PARTS),
    torch.autograd.backward: ("runs backward", _PARTS),
    torch.autograd.grad: ("takes a gradient (torch.autograd.grad)", _PARTS),
    _TENSOR.data.__set__: ("assigns to a tensor's data", "compute a new tensor, or write with copy_"),
}
_INFERENCE = ("asks for the inference mode", f"ask torch.is_grad_enabled(); or {_PARTS}")
_PLACE = ("asks where a tensor is in memory", f"compute it with the tensor's values; or {_PARTS}")
_PLACES = (
    *(Tensor.storage_offset, Tensor.is_pinned, Tensor.is_shared, Tensor.data_ptr, Tensor.is_set_to),
    *(Tensor.storage, Tensor.untyped_storage, Tensor._typed_storage, Tensor._is_view),
    *(_TENSOR._base.__get__, _TENSOR._version.__get__),
)
_GRAD_FN = _TENSOR.grad_fn.__get__
_GRAD = _TENSOR.grad.__get__
_DATA = _TENSOR.data.__get__
_PEEKS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__),
    *(
        Tensor.__index__,
        Tensor.__complex__,
        Tensor.__contains__,
        torch.equal,
        torch.allclose,
        torch.is_nonzero,
    ),
}
_SPELLS = (Tensor.__repr__, Tensor.__format__)
_ASKS = (_TENSOR.requires_grad.__get__, _TENSOR.is_leaf.__get__)
_TRACING_ERRORS = (
    *(CannotCapture, GuardOnDataDependentSymNode, DataDependentOutputException),
    *(DynamicOutputShapeException, UnsupportedFakeTensorException, UnsupportedOperatorException),
)
_LOOKING = ("__torch_function__", "handle_torch_function")
_DECISIONS = ("__bool__", "__int__", "__index__", "__float__")
_NEEDS_GRAD = (Tensor.requires_grad_, _TENSOR.requires_grad.__set__)


class Watch(TorchFunctionMode):
    """Looks at what a traced model calls.

    Attributes:
        peeked: the constant tensors whose values its python has asked for, by identity.
        computed: it has also asked for values that were computed of constants.
        wanting: the storages of tensors that want gradients and are not part of the model.
        asks_gradients: it has asked whether gradients are recorded, or wanted.
        order: whether it depends on the order in which an argument's elements are in memory.
        errors: what went wrong in a call of torch because it was traced; its python may have gone on.
        written: tensors from outside that it may have written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peeked: dict[int, Tensor] = {}
        self.computed = False
        self.wanting: set[int] = set()
        self.asks_gradients = False
        self.order = MemoryOrder()
        self.errors: list[Exception] = []
        self.written = WrittenConstants()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if get_proxy_mode() is None:  # torch's own, below what is traced
            return func(*args, **kwargs)
        try:
            return self._call(func, args, kwargs)
        except Exception as error:
            if func in _PEEKS or isinstance(error, _TRACING_ERRORS):
                self.errors.append(error)
            raise

    def refuse(self, what: str, todo: str) -> None:
        """Refuses what a graph cannot say, also if the model's python catches that.

        Raises:
            CannotCapture: always.
        """
        try:
            _refuse(what, todo)
        except CannotCapture as error:
            self.errors.append(error)
            raise

    def refuse_swallowed(self) -> None:
        """Refuses a trace that has gone on after an error that only tracing has (``except Exception``).

        Raises:
            CannotCapture: this is one.
        """
        for error in self.errors:
            if isinstance(error, CannotCapture):
                raise error
            what = str(error).strip().split("\n")[0]
            raise CannotCapture(
                f"the model's forward catches an error that it has only while it is traced ({what})",
                where="a try statement in forward",
                todo=f"compute it with tensors, without looking at values; or {_PARTS}",
            ) from error

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        real = [x for x in given if not isinstance(x, FakeTensor)]
        self.wanting.update(storage(x) for x in real if x.requires_grad)
        if func == _GRAD and not is_librarys(_caller(), "tpcompile"):
            _refuse(
                "reads the gradient of a tensor (grad)", f"give it to the model as an argument; or {_PARTS}"
            )
        if func is Tensor.is_inference and not is_librarys(_caller(), "tpcompile"):
            _refuse(*_INFERENCE)
        self.asks_gradients |= func in _ASKS and not is_librarys(_caller(), "tpcompile")
        if func in _PLACES and not is_librarys(_caller(), "tpcompile"):
            _refuse(*_PLACE)
        if func in STRIDES and not is_librarys(_caller(), "tpcompile"):
            self.order.ask(given)
        if func in _SPELLS and len(real) < len(given) and not _is_message():
            _refuse("makes text of a tensor's values", f"compute it with tensors; or {_PARTS}")
        if func in _PEEKS:
            self.peeked.update((id(x), x) for x in real)
        if func == _DATA:
            return args[0].detach()  # which the graph knows; `data` would leave it a tensor without values
        if func is Tensor.detach_ and not args[0].requires_grad:
            return args[0]
        if func in _REFUSED:
            _refuse(*_REFUSED[func])
        if func is Tensor.detach_:
            _refuse("detaches a value in place (detach_)", "use detach()")
        asks = func in _NEEDS_GRAD and not args[0].requires_grad and (*args[1:], *kwargs.values(), True)[0]
        if asks and not only_asks(_calling(sys._getframe(1)).f_code):
            _refuse("asks for a tensor's gradient (requires_grad)", "set requires_grad before the call")
        if func in DROPOUTS and drops_nothing(*args, **kwargs):
            return given[0]
        if real and len(real) == len(given):
            self.written.note(func, kwargs, real)
        result = self.order.call(func, args, kwargs, given)
        if func in _PEEKS and len(real) < len(given):  # what follows from the call's tensors is a symbol
            self.computed |= all(isinstance(x, PLAIN) for x in tree_leaves(result))
        if func == _GRAD_FN and result is not None:
            _refuse("looks at what autograd has recorded (grad_fn)", _FUNCTION)
        return result


def _refuse(what: str, todo: str) -> None:
    raise CannotCapture(
        f"the model's forward {what}, which a captured program would not do", where=here(), todo=todo
    )


def _caller() -> str:
    """The python module that has called what is being looked at."""
    return module_of(_calling(sys._getframe(2)))


def _is_message() -> bool:
    """Whether the text of a tensor is made by torch, or for a message."""
    frame = _calling(sys._getframe(2))
    while frame.f_back is not None and module_of(frame) in ("torch._tensor", "torch.overrides"):
        frame = _calling(frame.f_back)
    return is_librarys(module_of(frame)) or is_message(frame)


def _calling(frame: FrameType) -> FrameType:
    """What calls torch, below what looks at its calls; torch's own python hands some of them on."""
    while (back := frame.f_back) is not None and frame.f_code.co_name in _LOOKING:
        frame = (back.f_back or back) if frame.f_code.co_name == "handle_torch_function" else back
    return frame


@contextmanager
def _noted_decisions(watch: Watch) -> Iterator[None]:
    """Lets the errors be noted of python that asks for the value of a symbol which has none."""

    def noting(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def decide(symbol: Any) -> Any:
            try:
                return original(symbol)
            except GuardOnDataDependentSymNode as error:
                if not is_librarys(_caller(), "sympy"):
                    watch.errors.append(error)
                raise

        return unseen(decide)

    with ExitStack() as stack:
        for kind in (torch.SymInt, torch.SymFloat, torch.SymBool):
            for name in {*_DECISIONS} & {*vars(kind)}:
                stack.enter_context(patch.object(kind, name, noting(getattr(kind, name))))
        yield


@contextmanager
def _recorded_inference_mode() -> Iterator[None]:
    """Lets a traced model's ``inference_mode`` be what a graph can say of it: ``no_grad``.

    Export does not see it: gradients would flow where the model's python has none.
    """
    kind, inside = torch.inference_mode, dict[int, Any]()
    enter, leave = kind.__enter__, kind.__exit__

    def enter_recorded(self: torch.inference_mode) -> None:
        if get_proxy_mode() is None:
            enter(self)
        else:
            inside[id(self)] = torch.set_grad_enabled(not self.mode)

    def leave_recorded(self: torch.inference_mode, *raised: Any) -> None:
        if id(self) in inside:
            inside.pop(id(self)).__exit__(*raised)
        else:
            leave(self, *raised)

    with patch.object(kind, "__enter__", enter_recorded), patch.object(kind, "__exit__", leave_recorded):
        yield


@contextmanager
def watched_calls() -> Iterator[Watch]:
    """Watches what a model calls inside of the block.

    Yields:
        What was seen.

    Raises:
        CannotCapture: it changes or takes gradients in a way that no operator of a graph says.
    """
    enter = saved_tensors_hooks.__enter__

    def only_torchs(self: saved_tensors_hooks) -> Any:
        if type(self).__module__.partition(".")[0] != "torch" or type(self) is saved_tensors_hooks:
            watch.refuse("changes what autograd saves (saved_tensors_hooks)", _PARTS)
        return enter(self)

    asked, inferring = torch.is_grad_enabled, torch.is_inference_mode_enabled

    def is_grad_enabled() -> bool:
        watch.asks_gradients |= get_proxy_mode() is not None and not is_librarys(_caller(), "tpcompile")
        return asked()

    def is_inference_mode_enabled() -> bool:
        if get_proxy_mode() is not None and not is_librarys(_caller(), "tpcompile"):
            watch.refuse(*_INFERENCE)
        return inferring()

    watch = Watch()
    with (
        sizes_as_numbers(),
        patch.object(saved_tensors_hooks, "__enter__", only_torchs),
        patch.object(torch, "is_grad_enabled", is_grad_enabled),
        patch.object(torch, "is_inference_mode_enabled", is_inference_mode_enabled),
        _noted_decisions(watch),
        _recorded_inference_mode(),
        watch,
        watch.written,
        as_untraced(watch.errors),
    ):
        yield watch
    watch.refuse_swallowed()
