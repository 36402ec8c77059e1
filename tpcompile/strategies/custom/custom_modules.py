"""The modules of a model that a plan gives to custom strategies, and how their weights are placed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tpcompile.capture.repeats.layer_fingerprint import fingerprint, weight_owners
from tpcompile.errors import TpCompileError
from tpcompile.ir.layout.weight_layout import ParamLayout
from tpcompile.ir.module_tensors import every_name
from tpcompile.ir.names import starred
from tpcompile.ir.placements import Replicate, Shard
from tpcompile.ranks.agree import together
from tpcompile.ranks.exchange import exchange

from .custom_strategy import CustomStrategy, resolve
from .opaque_module import Wrapped, captured_as_operators
from .probe_partition import RankPart, layout_from, local_of, probe


@dataclass
class CustomModules:
    """What the compiler knows about the modules of custom strategies of one model.

    Attributes:
        strategies: the strategy of each module, by the module's name.
        keys: per module, the name that it shares with equal ones.
        templates: per key, one of the modules.
        parts: per parameter, what each rank holds of it.
        shapes: per parameter, its whole shape.
        mesh: the mesh, of one dimension.
    """

    strategies: dict[str, CustomStrategy] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    templates: dict[str, tuple[str, nn.Module]] = field(default_factory=dict)
    parts: dict[str, list[RankPart]] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    mesh: DeviceMesh | None = None

    def layout(self, name: str, tensor: Tensor, axis_sizes: tuple[int, ...]) -> ParamLayout:
        """How a parameter is placed, on sub-axes of these sizes."""
        strategy, _ = self.of_parameter(name)
        return layout_from(name, tensor, axis_sizes, self.parts[name], strategy.name)

    def of_parameter(self, name: str) -> tuple[CustomStrategy, str]:
        """The strategy that a parameter belongs to, and the parameter's own name in its module."""
        path = next(p for p in self.strategies if name.startswith(p + "."))
        return self.strategies[path], name[len(path) + 1 :]

    def local_part(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """What a rank holds of a whole parameter, as the strategy cuts it: a plain tensor of its own."""
        strategy, own = self.of_parameter(name)
        assert self.mesh is not None, "there is no mesh"
        part = strategy.partition(whole.detach(), own.rpartition(".")[2], rank, self.mesh)
        return local_of(part).clone(memory_format=torch.contiguous_format)

    def with_names(self, model: nn.Module) -> CustomModules:
        """The same, with one name for modules of repeated layers that are equal now: layers look equal."""
        owners = weight_owners(model)
        keys: dict[str, str] = {}
        templates: dict[str, tuple[str, nn.Module]] = {}
        kinds: dict[str, list[object]] = {}
        for path, strategy in self.strategies.items():
            module, name = model.get_submodule(path), f"{strategy.name}: {starred(path)}"
            facts = fingerprint(module, owners, path)
            seen = kinds.setdefault(name, [])
            if facts not in seen:
                seen.append(facts)
            number = seen.index(facts)
            keys[path] = name + (f" ({number + 1})" if number else "")
            templates.setdefault(keys[path], (path, module))
        return replace(self, keys=keys, templates=templates)

    def captured(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, the modules appear as operators in whatever is captured."""
        return captured_as_operators([self._wrap(model, path) for path in self.strategies])

    def _wrap(self, model: nn.Module, path: str) -> Wrapped:
        module, strategy = model.get_submodule(path), self.strategies[path]
        names = [name for name, _ in every_name(module)]
        lie = {n: self.parts.get(f"{path}.{n}") for n in names}
        whole = [i for i, n in enumerate(names) if _is_whole(lie[n], self.shapes.get(f"{path}.{n}", ()))]
        return Wrapped(
            module,
            self.keys[path],
            path,
            tuple(names),
            tuple(whole),
            strategy.input,
            strategy.output,
            _summed(strategy, [part for part in lie.values() if part]),
        )


def _is_whole(parts: Sequence[RankPart] | None, shape: Sequence[int]) -> bool:
    """Whether all ranks hold a weight as it is; buffers always are."""
    if parts is None:
        return True
    same = tuple(((0, int(s)),) for s in shape)
    return all(p.runs == same for p in parts)


def _summed(strategy: CustomStrategy, parts: Sequence[Sequence[RankPart]]) -> bool:
    """Whether backward leaves summands of the gradients of whole operands."""
    declared = getattr(strategy.layer, "whole_input_gradient", None)
    if declared is not None:
        return not declared
    plain = any(part.placements is None for ranks in parts for part in ranks)
    return plain and not isinstance(strategy.output, Replicate)


def find_modules(model: nn.Module, custom: Mapping[str, str]) -> CustomModules:
    """The modules that a plan gives to custom strategies.

    Args:
        model: the model.
        custom: glob of a module -> name of a registered custom strategy. Any of a module's names will do.

    Raises:
        TpCompileError: a glob names no module, a strategy cannot be used, a module has two, or it cannot be
            taken apart from the rest of the model.
    """
    found = CustomModules()
    known = {name: resolve(name) for name in dict.fromkeys(custom.values())}
    first: dict[int, str] = {}
    every = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    names = {name: first.setdefault(id(module), name) for name, module in every}
    given: dict[str, CustomStrategy] = {}
    for glob, strategy in custom.items():
        matches = [n for n in names if fnmatchcase(n, glob)]
        if not matches:
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3)
            raise TpCompileError(
                f"{glob!r} names no module",
                where="plan",
                todo=f"did you mean {', '.join(near)}?" if near else "see model.named_modules()",
            )
        given.update({n: known[strategy] for n in matches})
    for name, path in names.items():
        if name in given and found.strategies.setdefault(path, given[name]) is not given[name]:
            pair = f"{found.strategies[path].name!r} and {given[name].name!r}"
            raise TpCompileError(
                f"one module under several names is given to two strategies, {pair}",
                where=f"plan: {name}, which is {path}",
                todo="give all its names to the same strategy, or only one of them to any",
            )
    owners = weight_owners(model)
    for path in found.strategies:
        own = tuple(f"{name}." for name, main in names.items() if main == path)
        _check_apart(model, path, own, found.strategies, owners)
    return found


def _check_apart(
    model: nn.Module,
    path: str,
    own: tuple[str, ...],
    strategies: Mapping[str, CustomStrategy],
    owners: Mapping[int, frozenset[str]],
) -> None:
    module = model.get_submodule(path)
    inside = next((p for p in strategies if p.startswith(path + ".")), None)
    if inside is not None:
        raise TpCompileError(
            f"{inside} is inside of {path}", where="plan", todo="give a strategy to one of them"
        )
    if "forward" in module.__dict__:
        raise TpCompileError("the module's forward was replaced", where=path, todo="leave it to the planner")
    for tensor in (*module.parameters(), *module.buffers()):
        other = next((n for n in sorted(owners[id(tensor)]) if not n.startswith(own)), None)
        if other is not None:
            raise TpCompileError(
                f"a weight of the module is also {other}",
                where=path,
                todo="a custom strategy can have weights only that nothing else uses: untie them",
            )


def partition_modules(
    model: nn.Module,
    custom: Mapping[str, str],
    ranks: int,
    mesh: DeviceMesh | None,
    group: dist.ProcessGroup | None,
    rank: int,
) -> CustomModules:
    """``find_modules``, with what each rank holds of every parameter. Nothing is changed.

    Without a process group the ranks are asked one after the other, on a mesh that cannot communicate.

    Raises:
        TpCompileError: on all ranks, if a strategy fails on any.
    """
    if not custom:
        return CustomModules()
    own = together(group, "find the modules of custom strategies", lambda: find_modules(model, custom))
    if group is None:
        alone = [_silent_mesh(ranks, r) for r in range(ranks)]
        everyone = [_probe(model, own, r, m) for r, m in enumerate(alone)]
    else:
        assert mesh is not None
        mine = together(
            group, "partition the weights of custom strategies", lambda: _probe(model, own, rank, mesh)
        )
        everyone = exchange(group, "tell what custom strategies hold", mine)
    own.mesh = mesh
    own.shapes = {n: p.shape for n, p in model.named_parameters() if n in everyone[0]}
    own.parts = {name: [each[name] for each in everyone] for name in everyone[0]}
    return own


def _silent_mesh(ranks: int, rank: int) -> DeviceMesh:
    return DeviceMesh("cpu", torch.arange(ranks), mesh_dim_names=("tp",), _init_backend=False, _rank=rank)


def _probe(model: nn.Module, own: CustomModules, rank: int, mesh: DeviceMesh) -> dict[str, RankPart]:
    """What this rank holds of every parameter; parameters that look alike are asked about once."""
    known: dict[object, RankPart] = {}
    found: dict[str, RankPart] = {}
    for path, strategy in own.strategies.items():
        for name, param in model.get_submodule(path).named_parameters():
            kind = name.rpartition(".")[2]
            key = (id(strategy), kind, tuple(param.shape), param.dtype)
            if key not in known:
                known[key] = probe(strategy, param, kind, rank, mesh)
            found[f"{path}.{name}"] = known[key]
    for path, strategy in own.strategies.items():
        _refuse_packed(path, strategy, model.get_submodule(path), found)
    return found


def _refuse_packed(
    path: str, strategy: CustomStrategy, module: nn.Module, parts: Mapping[str, RankPart]
) -> None:
    """Packed weights with contiguous inputs or outputs contradict each other."""
    packed = [
        name
        for name, _ in module.named_parameters()
        if any(len(runs) > 1 for runs in parts[f"{path}.{name}"].runs or ())
    ]
    lie = (strategy.input, strategy.output)
    if (
        packed
        and any(isinstance(p, Shard) for p in lie)
        and not any(isinstance(p, Shard) and p.factor for p in lie)
    ):
        raise TpCompileError(
            f"the rank's part of {packed[0]} is made of several blocks, "
            "but the strategy declares a contiguous part of the activations",
            where=f"{path}, custom strategy {strategy.name!r}",
            todo="declare the packed dimension as tpcompile.Shard(dim, 1): a part of every block",
        )
