"""Puts an adapter of PEFT around a model that has no weights yet: only the adapter gets values."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.module_tensors import of_the_kind, replace_tensors, whole_tensors

from .request import Built

_TODO = "load the whole model with transformers, put the adapter into it, and call tpcompile.parallelize"


def add_adapter(built: Built, adapter: Any, device: torch.device) -> Built:
    """The model of a checkpoint with an adapter, which has its values; random ones are those of a fixed seed.

    While PEFT works, every weight that is loaded later is a single number, which takes no memory. It works
    twice, with other numbers: so an adapter is found out whose values follow from those of weights.

    Args:
        built: a model on ``meta`` and what its tensors are made of.
        adapter: a configuration of PEFT, or the folder of an adapter that was saved.
        device: where the adapter goes.

    Raises:
        TpCompileError: PEFT is not there, or refuses; the adapter's values follow from weights.
    """
    with refusing("the adapter cannot be put into the model", where="adapter", todo=_TODO):
        first, second = (_Wrapped(built, adapter, number) for number in (0, 1))
        moved = second.moved()
        made, before = whole_tensors(second.model), whole_tensors(first.model)
        expressions = {name: built.expressions[old] for name, old in moved.items()}
        for name in made.keys() - moved.keys():
            if not torch.equal(before[name], made[name]):
                expressions[name] = expressions[second.copied(name, moved)]
    places = {name: "meta" if name in expressions else device for name in made}
    new = {id(old): of_the_kind(old, old.to(places[name])) for name, old in made.items()}
    replace_tensors(second.model, new)
    return replace(built, model=second.model.eval(), expressions=expressions)


class _Wrapped:
    """A copy of a model with the adapter; each of its weights is one number.

    Attributes:
        model: the copy.
    """

    def __init__(self, built: Built, adapter: Any, number: int) -> None:
        from peft import PeftModel, get_peft_model

        model = copy.deepcopy(built.model)
        whole = whole_tensors(model)
        self._stand_ins = {name: _stand_in(whole[name], number) for name in built.expressions}
        replace_tensors(model, {id(whole[name]): new for name, new in self._stand_ins.items()})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if isinstance(adapter, str | PathLike):
                self.model: Any = PeftModel.from_pretrained(model, fspath(adapter))
            else:
                self.model = get_peft_model(model, copy.deepcopy(adapter))

    def moved(self) -> dict[str, str]:
        """The weights' names in the model with the adapter, and those without it.

        Raises:
            TpCompileError: the adapter has put others in their place.
        """
        now = {id(tensor): name for name, tensor in whole_tensors(self.model).items()}
        for name, tensor in self._stand_ins.items():
            if id(tensor) not in now or any(tensor.stride()):
                raise TpCompileError("the adapter changes weights of the model", where=name, todo=_TODO)
        return {now[id(tensor)]: name for name, tensor in self._stand_ins.items()}

    def copied(self, name: str, moved: Collection[str]) -> str:
        """The weight that a tensor of the adapter's is a copy of, which is trained instead (modules_to_save).

        Raises:
            TpCompileError: it follows from weights in another way.
        """
        original = name.replace(f".modules_to_save.{self.model.active_adapter}.", ".original_module.")
        if original == name or original not in moved:
            raise TpCompileError(
                "the adapter's values follow from weights of the model, which are not loaded yet",
                where=name,
                todo=_TODO,
            )
        return original


def _stand_in(tensor: Tensor, number: int) -> Tensor:
    return of_the_kind(tensor, torch.full((), number, dtype=tensor.dtype).expand(tensor.shape))
