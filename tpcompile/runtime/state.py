"""What a sharded model knows: how it was made, where its weights are, its programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from tpcompile.capture.held_caches import Held
from tpcompile.compile_program import Compiler
from tpcompile.ir.calls import CallSignature, leaf_names
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.torch_internals import TreeSpec
from tpcompile.ranks.compare_calls import compare_call
from tpcompile.strategies.custom.custom_modules import CustomModules
from tpcompile.weights.shard import shard_weights
from tpcompile.weights.sharded_parameter import ShardedParameter
from tpcompile.weights.sharded_weights import ShardedWeights

from .guards import Entry, Hook, open_paths
from .last_call import LastCall
from .program import RankProgram, autocast_of
from .settings import Settings
from .watched_module import ENTRY


@dataclass
class State:
    """What a sharded module knows beyond the original one.

    Attributes:
        compiler: makes programs for this model on this mesh.
        signature: the original forward's.
        original: the original class of the module.
        layout: where the weights are; None until the first program decides it.
        programs: one per call signature.
        caches: how tensors are placed that programs handed out to be given back, by name.
        divided: the paths of modules with divided weights in them.
        composed: the modules, with the arguments given, that run as python over their parts.
        pieces: the paths of modules that get programs under them although nothing of them is divided yet.
        compile_options: torch.compile's for every program, or None to run them as they are.
        compare_calls: compare every call over the ranks, not only a program's first one.
        lifted: a forward that was set on the model before it was sharded.
        hooks: hooks on submodules that no program has in it.
        custom: the modules of custom strategies.
        foreign: whether another library (FSDP) has made something else of the parameters.
        lent: the identities of weights that others stand for (``functional_call``), by their place: what is
            compiled holds the weights themselves, and is not used then.
        steering: the streamer and the user's logits processors of the generation that runs.
        retyped: the ``ShardedParameter.retyped`` that the settings take into account.
        number: tells the model from others over the same ranks; equal on all of them. A copy's is its
            original's, and which copy it is.
        copies: how many copies of it were made.
        captured: how many programs it has had.
        generating: whether it is in ``generate``, whose arguments decide about its calls.
        leader: tells the other ranks of calls that this one makes, in ``serve_ranks``.
        served: whether ranks are in ``serve_ranks``: they may have changed the model each in its own way.
        running: how many calls are being worked on: what the model's own code changes is not a new setting.
        found: the program that was looked for, and found, last.
        last: per path that is called, how to know another call like the last one.
    """

    compiler: Compiler
    signature: CallSignature
    original: type[nn.Module]
    settings: Settings = field(default_factory=Settings)
    layout: WeightLayout | None = None
    programs: list[RankProgram] = field(default_factory=list)
    caches: dict[str, Held] = field(default_factory=dict)
    divided: frozenset[str] = frozenset()
    composed: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)
    pieces: frozenset[str] = frozenset()
    compile_options: dict[str, Any] | None = None
    compare_calls: bool = False
    lifted: Any = None
    hooks: list[Hook] = field(default_factory=list)
    steering: tuple[Any, Sequence[Any]] = (None, ())
    retyped: int = -1
    number: tuple[int, ...] = ()
    copies: int = 0
    captured: int = 0
    running: int = 0
    generating: bool = False
    leader: Any = None
    served: bool = False
    custom: CustomModules = field(default_factory=CustomModules)
    foreign: bool = False
    lent: dict[tuple[int, str], int] = field(default_factory=dict)
    found: RankProgram | None = field(init=False, default=None)
    last: dict[str, LastCall] = field(init=False, default_factory=dict)

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks; None without a mesh."""
        return self.compiler.group

    @property
    def group_name(self) -> str:
        """What tells the ranks of this model from others."""
        return "" if self.compiler.axis is None else self.compiler.axis.group_name

    def find(
        self, names: tuple[str, ...], leaves: Sequence[Any], spec: TreeSpec, training: bool, path: str = ""
    ) -> RankProgram | None:
        """The program of a call, of the model or of the submodule at ``path``, if it was captured."""
        for program in self.programs:
            if program.entry == path and program.types == self.settings.types:
                fits = program.fits(names, leaves, training) and program.captured.in_spec == spec
                if fits and program.reads.hold(self.settings.state):
                    return program
        return None

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], entry: Entry | None = None
    ) -> dict[str, Any]:
        """The call as keyword arguments in the order of the signature.

        Raises:
            TpCompileError: the call does not fit the signature.
        """
        called = entry or self
        return called.signature.bind_or_refuse(args, kwargs, called.original.__name__)

    def compare(
        self,
        model: nn.Module,
        bound: dict[str, Any],
        path: str,
        leaves: Sequence[Any],
        act: str = "run",
    ) -> None:
        """Compares a call that ranks are to run or to capture; the parts of caches differ."""
        mode = "train" if model.get_submodule(path).training else "eval"
        modes = f"gradients {torch.is_grad_enabled()}, autocast {autocast_of(leaves)}"
        what = f"{path or type(model).__name__} in {mode} mode, {modes}"
        named = [(n, x) for n, x in zip(leaf_names(bound), leaves, strict=True) if n not in self.caches]
        names, values = [n for n, _ in named], [x for _, x in named]
        compare_call(self.compiler.group, act, what, names, values)

    def weights(self, layout: WeightLayout | None = None) -> ShardedWeights:
        """What gathers, loads and saves the weights needs to know."""
        layout = layout or self.layout
        assert self.compiler.axis is not None and layout is not None, (
            "a sharded model has a mesh and a layout"
        )
        return ShardedWeights(layout, self.compiler.axis, self.custom)

    def mark_weights(self, model: nn.Module) -> None:
        """Makes parameters of which nothing is decided yet what they will be: optimizers may be made now."""
        if self.layout is None and self.compiler.axis is not None:
            shard_weights(model, ShardedWeights.undecided(model, self.compiler.axis))

    def rebind(self, foreign: bool = False) -> None:
        """Takes note that weights are other tensors than before, or no sharded parameters any more."""
        if not self.foreign:
            self.foreign = foreign
            for program in self.programs:
                program.bind(not foreign)

    def note_types(self, model: nn.Module) -> None:
        """Finds out whether weights have other types, if some parameter got one through its ``data``."""
        if self.retyped != ShardedParameter.retyped:
            self.retyped = ShardedParameter.retyped
            self.settings.find_types(model)

    def note_composed(self, model: nn.Module) -> None:
        """Notes what follows from what runs as python: which modules get programs, what stays whole."""
        self.pieces = open_paths(model, self.layout) if self.composed else frozenset()

    def original_of(self, model: nn.Module) -> Callable[[str], type[nn.Module]]:
        """What gives the original class of a module of the model, by its path."""

        def original(path: str) -> type[nn.Module]:
            module = model.get_submodule(path)
            guard = module.__dict__.get(ENTRY)
            return guard.entry.original if guard is not None else self.original if not path else type(module)

        return original
