"""What all modules of a sharded model have in common: changes that programs would not notice are noticed."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpcompile.capture.export.look_inside import only_asks
from tpcompile.capture.export.shots import MISSING
from tpcompile.errors import TpCompileError
from tpcompile.ir.check import check_arguments
from tpcompile.ir.module_tensors import named_tensor
from tpcompile.ir.unwrap import APART, taken_apart
from tpcompile.ranks.agree import compare, together
from tpcompile.weights.load_state import check_state, own_parts, state_lines
from tpcompile.weights.sharded_parameter import ShardedParameter

from .place import Root
from .replaced_forward import LIFTED, lift_forward
from .settings import types_of

ENTRY = "_tp_entry"
"""The attribute by which a submodule of a sharded model knows its place in it."""

_SAME_STATE = "load the same tensors on every rank; nothing was loaded"
TABLES = ("_parameters", "_buffers")


class WatchedModule(nn.Module):
    """Mixed into the classes of a sharded model and of its submodules.

    Programs hold the layers that were there when they were captured, and what their code has computed from
    attributes. Layers cannot be replaced; other attributes can, and select other programs.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        own, place = self.__dict__, self._place()
        if place is not None:
            layer = isinstance(value, nn.Module) and value is not self._modules.get(name)
            if layer or name in own.get(APART, ()):
                self._refuse_change(name)
            if name == "__class__" and place[1] and not _is_wrapped(value, type(self)):
                self._refuse_change(name)
            if name == "qconfig":
                self._refuse_quantizing()
            if any(name in own[table] for table in TABLES):
                self._set_weight(name, value)
                return
            if name == "forward" and place[1]:
                self._replace_forward(value)
                return
            self._report(name, own.get(name, MISSING), value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._place() is not None and name in self.__dict__.get(APART, ()):
            self._refuse_change(name)
        if name == "forward" and LIFTED in self.__dict__:
            self._replace_forward(MISSING)
            return
        self._report(name, self.__dict__.get(name, MISSING), MISSING)
        super().__delattr__(name)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As in ``nn.Module``; all calls that lead to the hook run as python from here on."""
        handle = super().register_forward_hook(*args, **kwargs)
        harmless = only_asks(getattr((*args, *kwargs.values())[0], "__code__", None))
        return handle if harmless else self._note_hook("_forward_hooks", handle)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """See ``register_forward_hook``."""
        return self._note_hook("_forward_pre_hooks", super().register_forward_pre_hook(*args, **kwargs))

    def register_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, if the module is part of a sharded model.

        Raises:
            TpCompileError: it is.
        """
        if self._place() is not None:
            refuse_old_hooks(type(self).__name__)
        return super().register_backward_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """See ``register_forward_hook``."""
        return self._note_hook("_backward_hooks", super().register_full_backward_hook(*args, **kwargs))

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """See ``register_forward_hook``."""
        handle = super().register_full_backward_pre_hook(*args, **kwargs)
        return self._note_hook("_backward_pre_hooks", handle)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As in ``nn.Module``: whole tensors, of which every rank takes its part. All ranks call it.

        Raises:
            TpCompileError: on all ranks: a key is missing or unexpected, has another shape, or other values
                on another rank. Nothing is loaded then.
        """
        if (place := self._place()) is not None:
            group, own = place[0].compiler.group, nn.Module.state_dict(self, keep_vars=True)
            given = copy.copy(state_dict)  # with its metadata, the versions of modules

            def check() -> None:
                asked = {"state_dict": state_dict, "strict": strict, "assign": assign}
                check_arguments(nn.Module.load_state_dict, asked, "load_state_dict")
                if assign and any(self._is_tied(tensor) for tensor in own.values()):
                    _refuse_untying(type(self).__name__)
                given.update(own_parts(own, state_dict))
                check_state(own, place[1] or type(self).__name__, given, strict)

            together(group, "check the state dict", check)
            compare(group, "calls of load_state_dict", state_lines(given, strict, assign), _SAME_STATE)
            state_dict = given
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        place = self._place()
        if place is not None and not place[1] and prefix:  # a module around the model loads
            given = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
            lines = state_lines(given, False, False)
            todo = "load the same tensors on every rank; nothing of this model was loaded"
            compare(place[0].compiler.group, "states of a model in another module", lines, todo)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self._place() is not None:
            _refuse_cast(self, fn)
        before, leaves = types_of(self), _leaves(self)
        result = super()._apply(fn, recurse)
        if (place := self._place()) is not None:
            place[0].settings.report_types(place[1], before, types_of(self))
            if leaves != _leaves(self):
                place[0].rebind()
        return result

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TpCompileError(
            "a sharded model cannot be pickled: other processes and other numbers of ranks could not use it",
            where=type(self).__name__,
            todo="save its weights: save_pretrained, full_state_dict, or sharded_state_dict with "
            "torch.distributed.checkpoint; or copy the whole model with copy.deepcopy",
        )

    def _place(self) -> tuple[Root, str] | None:
        """The runtime that the module belongs to, and its path in the model.

        A new instance, which code of the model makes of a sharded class, has none.
        """
        own = self.__dict__
        if "_tp" in own:
            return own["_tp"], ""
        return (own[ENTRY].root._tp, own[ENTRY].entry.path) if ENTRY in own else None

    def _report(self, name: str, old: Any, new: Any) -> None:
        place = self._place()
        if place is not None and not place[0].running:
            place[0].settings.report(place[1], name, old, new)

    def _replace_forward(self, value: Any) -> None:
        """Has a part run another forward; the next call captures it."""
        own = self.__dict__
        self._report("forward", own.get(LIFTED, MISSING), value)
        own_again = getattr(value, "__func__", None) is type(self).forward and value.__self__ is self
        if value is MISSING or own_again:
            own.pop(LIFTED, None)
            return
        own["forward"] = value
        lift_forward(self)

    def _note_hook(self, table: str, handle: Any) -> Any:
        place = self._place()
        if place is not None and place[1] and not place[0].running:
            place[0].hooks.append((place[1], table, handle.id))
        return handle

    def _refuse_change(self, name: str) -> None:
        raise TpCompileError(
            "a layer or weight of a sharded model is replaced, added or removed, "
            "which its programs would not notice",
            where=f"{type(self).__name__}.{name}",
            todo="change the model before parallelize; adapters may be put in by PEFT (get_peft_model, "
            "add_adapter)",
        )

    def _refuse_quantizing(self) -> None:
        raise TpCompileError(
            "torch.ao.quantization looks for layers of torch's own classes, and would leave those of a "
            "sharded model as they are",
            where=type(self).__name__,
            todo="quantise the model before parallelize",
        )

    def _set_weight(self, name: str, value: Any) -> None:
        """Replaces a weight by a whole one, of which this rank takes its part, or by what FSDP makes."""
        old, before = self._parameters.get(name, self._buffers.get(name)), types_of(self)
        place = self._place()
        assert place is not None
        if isinstance(old, Tensor) and isinstance(value, Tensor) and value is not old:
            where = f"{type(self).__name__}.{name}"
            if old.shape != value.shape or (value.is_meta and not old.is_meta):
                raise TpCompileError(
                    f"a weight of shape {tuple(old.shape)} is replaced by one of {tuple(value.shape)} on "
                    f"{value.device}",
                    where=where,
                    todo="give a whole tensor of the same shape, or change the model before parallelize",
                )
            if isinstance(value, ShardedParameter) and _layout(value) != _layout(old):
                raise TpCompileError(
                    "a weight is replaced by one that is divided otherwise",
                    where=where,
                    todo="give its values (full_tensor()), or tie weights before parallelize",
                )
            if (isinstance(value, ShardedParameter) or not isinstance(value, DTensor)) and self._is_tied(old):
                _refuse_untying(where)
            if isinstance(old, ShardedParameter) and not isinstance(value, DTensor):
                part = old.part_of(value)
                value = (
                    ShardedParameter.parameter(part, old.placing, value.requires_grad)
                    if isinstance(value, nn.Parameter)
                    else ShardedParameter(part, old.placing)
                )
            table = self._parameters if name in self._parameters else self._buffers
            if table is self._buffers or isinstance(value, nn.Parameter):
                dict.__setitem__(table, name, value)
        super().__setattr__(name, value)
        place[0].settings.report_types(place[1], before, types_of(self))
        if isinstance(old, DTensor):
            place[0].rebind(foreign=not isinstance(value, ShardedParameter))

    def _is_tied(self, tensor: Any) -> bool:
        """Whether a tensor is in several places of the whole model."""
        root = root_of(self)
        assert root is not None, "its weights are watched"
        tables = (table for module in root.modules() for table in (module._parameters, module._buffers))
        return sum(other is tensor for table in tables for other in table.values()) > 1


def root_of(module: nn.Module) -> nn.Module | None:
    """The sharded model that a module is, or is a part of."""
    own = module.__dict__
    if "_tp" in own:
        return module
    return own[ENTRY].root if ENTRY in own else None


def _refuse_cast(module: nn.Module, fn: Any) -> None:
    """Refuses another type for parts of quantised weights: scales would be rounded, numbers would grow."""
    for name, parts in taken_apart(module).items():
        for part in (named_tensor(module, part) for part in parts):
            if fn(torch.empty(0, dtype=part.dtype, device=part.device)).dtype != part.dtype:
                raise TpCompileError(
                    f"a quantised weight would be cast from {part.dtype}",
                    where=name,
                    todo="cast the model before parallelize, or only move it: model.to(device)",
                )


def _refuse_untying(where: str) -> NoReturn:
    raise TpCompileError(
        "a weight that is tied to another one is replaced in one place, which programs would not notice",
        where=where,
        todo="copy into it, or change the model before parallelize",
    )


def _layout(tensor: Tensor) -> str:
    return tensor.placing.text() if isinstance(tensor, ShardedParameter) else ""


def _is_wrapped(kind: type, own: type) -> bool:
    """Whether a class that a part is given does what its own does, as that of ``fully_shard``."""
    same: Any = getattr(kind, "forward", None)
    return issubclass(kind, own) and same is getattr(own, "forward", None)


def _leaves(module: nn.Module) -> list[int]:
    """The identities of what programs read of a module's own parameters."""
    return [id(getattr(t, "_local_tensor", t)) for t in module._parameters.values()]


def refuse_old_hooks(where: str) -> NoReturn:
    """Refuses ``register_backward_hook``, which is about single steps of autograd.

    Raises:
        TpCompileError: always.
    """
    raise TpCompileError(
        "a hook of register_backward_hook sees steps of autograd, which are others in a sharded model",
        where=where,
        todo="use register_full_backward_hook",
    )
