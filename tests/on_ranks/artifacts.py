"""What the ranks do in ``test_artifacts``: they save programs, load them, and compare every bit."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import DynamicCache, StaticCache

import tpcompile
from tests.helpers import families
from tests.helpers.other_thread import turns_of_others
from tests.helpers.toys import Attention, Mlp
from tests.on_ranks.models import call, mesh
from tests.on_ranks.module_life import refusal
from tests.on_ranks.sizes import Asks
from tpcompile.planner.plan import digest_of
from tpcompile.runtime.artifacts import save_program
from tpcompile.runtime.artifacts.save_program import file_digest

DAMAGES = ("flip", "cut", "more", "gone", "other")
CALLS = [
    ["aten.from_file.default", ["a file", True, 1], {}],
    ["aten.from_file.out", ["a file", True, 1], {}],
    ["tpcompile.opaque_module.default", [], {}],
    ["tpcompile.local_module.default", [], {}],
    ["aten.save.default", [], {}],
    ["operator.attrgetter", ["system"], {}],
    ["os.system", ["true"], {}],
]
STRUCTURES = [["pathlib.Path", "a file", [None]], ["transformers.pipelines.Pipeline", None, []]]
VALUES = [
    *(
        {"device": "cuda:9"},
        {"dtype": "load"},
        {"node": 10**9},
        {"group": [7]},
        {"float": "1"},
        {"slice": []},
    ),
    *(None, -1, 10**30, 0.5, [], {}, True, "s28", "aten.add.Tensor"),
]


class Counted(nn.Module):
    """A packed attention and an MLP; a buffer that calls change; weights whose memory is not in order."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp, self.drop = Attention(packed=True), Mlp(20, 36), nn.Dropout(0.5)
        self.odd = nn.Parameter(torch.randn(7, 20).t())
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, *, scale: float = 1.0, style: Tensor | None = None) -> dict[str, Any]:
        self.calls += 1
        y = self.mlp(self.attention(x)) * scale
        y = y if style is None else y + style
        return {"y": self.drop(y), "more": (y @ self.odd, self.calls.clone())}


class AsksGradients(Mlp):
    """Does something else where gradients are recorded, or wanted of its argument."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if torch.is_grad_enabled() else 3) * (5 if x.requires_grad else 7)


class AsksWeights(Mlp):
    """Does something else where its weights want gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.up.weight.requires_grad else 3)


class InParts(nn.Module):
    """Cannot be captured as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Mlp().eval(), Mlp().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)  # type: ignore[no-any-return]


class Writes(nn.Module):
    """Keeps what it saw last."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.last = Mlp(), None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x)
        self.last = y
        return y


class Codes(nn.Module):
    """A codebook that some calls write, after others have divided it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("book", torch.randn(64, 12))

    def forward(self, x: Tensor, update: bool = False) -> Tensor:
        if update:
            self.book.copy_(self.book * 0.5 + x.mean(0))
        return x @ self.book.t()


def bits(mine: Any, theirs: Any) -> bool:
    """Whether all tensors of two results are the same, and the results of one type."""
    pairs = zip(families.tensors(mine).items(), families.tensors(theirs).items(), strict=True)
    return type(mine) is type(theirs) and all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


def toy(folder: str) -> dict[str, Any]:
    """Two calls of a toy, and what is refused."""
    torch.manual_seed(0)
    sharded = tpcompile.parallelize(Counted().eval(), mesh(), (torch.randn(3, 5, 20),))
    x, style = torch.randn(4, 9, 20), torch.randn(20)
    with torch.no_grad():
        sharded(x, style=style, scale=0.5)
        sharded.save_program(folder)
        loaded = tpcompile.load_program(folder, mesh())
        same = [
            bits(loaded(x), sharded(x)),
            bits(loaded(x[:2], scale=0.5, style=style), sharded(x[:2], scale=0.5, style=style)),
        ]
        counted = [int(model(x)["more"][1]) for model in (loaded, sharded)]
        expected = {"x": x, "y": sharded(x)["y"], "more": sharded(x)["more"][0]}
    if dist.get_rank() == 0:
        save_file(expected, f"{folder}-expected.safetensors")
    halves = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"), backend_override={"tp": "gloo"})
    found: dict[str, Any] = {"same": same, "counted": counted, "text": repr(loaded)}
    found["refused"] = [
        refusal(lambda: loaded(x, scale=0.25)),
        refusal(lambda: loaded(x.double())),
        refusal(lambda: loaded(x.clone().requires_grad_())),
        refusal(lambda: loaded(x[dist.get_rank() :, :8])),
        refusal(lambda: tpcompile.load_program(folder, halves, axis="dp")),
        refusal(lambda: sharded.save_program(str(Path(folder).parent))),
    ]
    codes, wide = tpcompile.parallelize(Codes().eval(), mesh()), torch.randn(3, 12)
    with torch.no_grad():
        codes(wide), codes(wide, update=True)
    found["refused"].append(refusal(lambda: codes.save_program(f"{folder}-codes")))
    writing = tpcompile.parallelize(Writes().eval(), mesh(), (torch.randn(3, 12),))
    other = tpcompile.parallelize(Mlp(), mesh(), (torch.randn(3, 12),))
    for model in (writing, other):
        found["refused"].append(refusal(lambda model=model: model.save_program(f"{folder}-other")))  # type: ignore[misc]
    return found


def folders(folder: str) -> dict[str, Any]:
    """Folders of somebody else's, those of a save that did not end, and calls in other orders."""
    torch.manual_seed(0)
    x, rank = torch.randn(1, 12), dist.get_rank()  # of which x[0] sends as much
    sharded = tpcompile.parallelize(Mlp().eval(), mesh())
    with torch.no_grad():
        wanted = [sharded(x), sharded(x[0])]
    foreign, manifest = Path(folder) / "foreign", Path(folder) / "ours" / "program.json"
    if not rank:
        foreign.mkdir()
        for name in ("program.json", "rank-0.json"):
            (foreign / name).write_text("{}")
    found: dict[str, Any] = {"foreign": refusal(lambda: sharded.save_program(str(foreign)))}
    found["kept"] = sorted(path.read_text() for path in foreign.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_program, "save_file", _no_room)
        found["full"] = refusal(lambda: sharded.save_program(str(manifest.parent)))
    found["unfinished"] = refusal(lambda: tpcompile.load_program(manifest.parent, mesh()))
    sharded.save_program(str(manifest.parent))
    loaded = tpcompile.load_program(manifest.parent, mesh())
    found["same"] = all(torch.equal(loaded(a), b) for a, b in zip((x, x[0]), wanted, strict=True))
    found["order"] = refusal(lambda: [loaded(x[0] if rank else x) for _ in range(64)])
    with torch.no_grad():
        parts: Any = tpcompile.parallelize(InParts(), mesh(), (x,), compose=True)
        parts(x)
    found["parts"] = refusal(lambda: parts.save_program(str(manifest.parent)))
    hasty = tpcompile.load_program(manifest.parent, mesh(), timeout=2)
    found["one refuses"] = refusal(lambda: hasty(x.double() if rank else x))
    found["after"] = [torch.equal(hasty(x), wanted[0]) for _ in "ab"]  # no orders are compared at the third
    found["one refuses what others run"] = refusal(lambda: hasty(x.double() if rank else x))
    return found


def replicas(folder: str) -> list[str]:
    """What replicas hear: the folder is there; it is not; they name different ones; they are no replicas."""
    axes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    sharded = tpcompile.parallelize(Mlp().eval(), axes, (torch.randn(3, 12),), axis="tp")
    x, replica = torch.randn(2, 12), axes.get_local_rank("dp")

    def save_and_load() -> None:
        sharded.save_program(folder)
        loaded = tpcompile.load_program(folder, axes, axis="tp")
        assert torch.equal(loaded(x), sharded(x)), "the programs are the same"

    said = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_program, "save_file", lambda *args: (time.sleep(1), save_file(*args)))
        said.append(refusal(save_and_load))
        patch.setattr(save_program, "save_file", _no_room)
        said.append(refusal(save_and_load))
        said.append(refusal(lambda: sharded.save_program(f"{folder}-{replica}")))
        sharded.up.weight.add_(replica)
        said.append(refusal(lambda: sharded.save_program(folder)))
        return said


def gradients(folder: str) -> tuple[bool, list[str]]:
    """A program that asks whether gradients are recorded: whether it is right without, and what is said."""
    sharded: Any = tpcompile.parallelize(AsksGradients().eval(), mesh())
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        wanted = sharded(x)
        sharded.save_program(folder)
    loaded = tpcompile.load_program(folder, mesh())
    said = [refusal(lambda: loaded(x))]
    with torch.no_grad():
        said.append(refusal(lambda: loaded(x.clone().requires_grad_())))
        return bits(loaded(x), wanted), said


def as_it_is(folder: str) -> tuple[list[bool], list[str]]:
    """Programs of weights that want gradients, and of such that do not: whether the model's own is saved; and
    what is said where ranks have others, and where its forward does more.
    """
    asks: Any = tpcompile.parallelize(AsksWeights().eval(), mesh())
    x, same = torch.randn(2, 5, 12), []
    with torch.no_grad():
        for wanted in (True, False, True):
            result = asks.requires_grad_(wanted)(x)
            asks.save_program(folder)
            same.append(bits(tpcompile.load_program(folder, mesh())(x), result))
    asks.requires_grad_(dist.get_rank() == 0)
    said = [refusal(lambda: asks.save_program(folder))]
    asks.requires_grad_(True)
    inner = asks.forward
    asks.forward = lambda x: inner(x) + 1
    return same, [*said, refusal(lambda: asks.save_program(folder))]


def parameters(folder: str) -> tuple[bool, str]:
    """A program for an argument that python asks whether it is a parameter: whether it runs for one, and
    what is said to another tensor.
    """
    asks: Any = tpcompile.parallelize(Asks().eval(), mesh())
    x, by = nn.Parameter(torch.randn(2, 12, 16), requires_grad=False), torch.ones(16)
    with torch.no_grad():
        wanted = asks(x, by)
    asks.save_program(folder)
    loaded = tpcompile.load_program(folder, mesh())
    return bits(loaded(x, by)[0], wanted[0]), refusal(lambda: loaded(x.data, by))


def _no_room(*args: Any) -> None:
    raise OSError("no room")


def fuzz(folder: str, scratch: str) -> dict[str, Any]:
    """What becomes of damaged folders, and of such as somebody has made up: refused, or as it was."""
    torch.manual_seed(0)
    sharded = tpcompile.parallelize(Counted().eval(), mesh(), (torch.randn(3, 5, 20),))
    x = torch.randn(4, 9, 20)
    with torch.no_grad():
        sharded.save_program(folder)
        wanted = sharded(x)
    mine, trap = Path(scratch) / str(dist.get_rank()), Path(scratch) / "trap"
    files = sorted(path.name for path in Path(folder).iterdir())
    texts = [name for name in files if name.endswith(".json")]
    outcomes: dict[str, int] = {}

    def judge() -> None:
        try:
            loaded = tpcompile.load_program(str(mine), mesh())
            found = "the same" if bits(loaded(x), wanted) else "wrong"
        except tpcompile.TpCompileError:
            found = "refused"
        outcomes[found] = outcomes.get(found, 0) + 1
        assert found != "wrong"

    def renew() -> None:
        shutil.rmtree(mine, ignore_errors=True)
        shutil.copytree(folder, mine)

    @settings(max_examples=60, derandomize=True, database=None, deadline=None)
    @given(st.sampled_from(files), st.sampled_from(DAMAGES), st.integers(0), st.integers(1, 255))
    def damaged(name: str, how: str, at: int, by: int) -> None:
        renew()
        content = bytearray((mine / name).read_bytes())
        at %= len(content)
        if how == "flip":
            content[at] ^= by
        elif how == "cut":
            del content[at:]
        elif how == "more":
            content[at:at] = bytes([by])
        if how == "gone":
            (mine / name).unlink()
        else:
            other = (mine / files[by % len(files)]).read_bytes()
            (mine / name).write_bytes(other if how == "other" else bytes(content))
        judge()

    def change(name: str, places: Any, value: Any) -> str:
        """What is said to a folder with another value, and digests that fit."""
        renew()
        data = json.loads((mine / name).read_text())
        holder, key = places(data)
        holder[key] = value
        (mine / name).write_text(json.dumps(data))
        manifest = json.loads((mine / "program.json").read_text())
        if name != "program.json":
            manifest["files"][name] = file_digest(mine / name)
        (mine / "program.json").write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))
        said = refusal(lambda: tpcompile.load_program(str(mine), mesh()))
        assert not trap.exists()
        return said

    @settings(max_examples=100, derandomize=True, database=None, deadline=None)
    @given(st.sampled_from(texts), st.integers(0), st.sampled_from([*CALLS, *STRUCTURES, *VALUES]))
    def made_up(name: str, at: int, value: Any) -> None:
        change(name, lambda data: (every := list(places_in(data)))[at % len(every)], value)

    damaged()
    made_up()
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    calls = [*CALLS, ["aten.add.Tensor", [], {f"x={code} or self": 1}]]
    hostile = [change(f"rank-{rank}.json", _first_call, call) for rank in range(2) for call in calls]
    for key, value in (("guards", [code]), ("guards", [f"s28 < 9 or {code}"]), ("ranges", [[code, 2, 9]])):
        hostile.append(change("rank-0.json", lambda data, key=key: (_call(data), key), value))
    for value in STRUCTURES:
        hostile.append(change("rank-0.json", lambda data: (_call(data), "result"), value))
    return {**outcomes, "hostile": hostile}


def _call(data: Any) -> Any:
    return data["programs"][0]["call"]


def _first_call(data: Any) -> Any:
    return data["programs"][0]["graph"]["calls"], 0


def places_in(data: Any) -> Any:
    """All places of a JSON value: the container, and the key there."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, dict | list):
            yield from places_in(value)


def model_family(name: str, folder: str) -> list[bool]:
    """A model of transformers: a prompt, and the next token, with both kinds of caches."""
    model = tpcompile.parallelize(
        families.build(name, num_hidden_layers=1), mesh(), example_kwargs=call(name, (2, 7))
    )
    ids, more = families.token_ids(3, 6), families.token_ids(3, 1)
    caches = [
        lambda: DynamicCache(config=model.config),
        lambda: StaticCache(config=model.config, max_cache_len=16),
    ]
    with torch.no_grad():

        def run(runs: Any) -> list[Any]:
            results = []
            for make in caches:
                cache = make()
                for tokens in (ids, more):
                    results.append(runs(input_ids=tokens, past_key_values=cache, use_cache=True).logits)
            return results

        wanted = run(model)
        model.save_program(folder)
        loaded = tpcompile.load_program(folder, mesh())
        return [bits(x, y) for x, y in zip(run(loaded), wanted, strict=True)]


def generating(folder: str) -> dict[str, Any]:
    """Whether a saved program generates as its model, in several ways, and what is refused."""
    model: Any = tpcompile.parallelize(families.build("llama", num_hidden_layers=1), mesh())
    ids = families.token_ids(2, 6)
    ways: dict[str, dict[str, Any]] = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "beams": {"num_beams": 2},
        "drawn": {"do_sample": True, "temperature": 3.0},
    }

    def run(generate: Any) -> list[Tensor]:
        torch.manual_seed(0)
        return [generate(ids, max_new_tokens=5, **{"do_sample": False, **way}) for way in ways.values()]

    wanted = run(model.generate)
    model.save_program(folder)
    loaded = tpcompile.load_program(folder, mesh())
    same = map(torch.equal, run(loaded.generate), wanted)
    found: dict[str, Any] = dict(zip(ways, same, strict=True))
    options = {
        "max_new_tokens": 3,
        "return_dict_in_generate": True,
        "output_logits": True,
        "do_sample": False,
    }
    pairs = zip(loaded.generate(ids, **options).logits, model.generate(ids, **options).logits, strict=True)
    found["bits"] = all(torch.equal(x, y) for x, y in pairs)
    found["aligned"] = all(tensor.data_ptr() % 64 == 0 for tensor in loaded.tensors.values())
    found["another call"] = refusal(lambda: loaded.generate(ids, max_new_tokens=2, output_attentions=True))
    found["ranks"] = refusal(lambda: loaded.generate(ids, max_new_tokens=2 + dist.get_rank()))
    found["files"] = refusal(lambda: loaded.loop.save_pretrained(folder))
    dist.barrier()
    if dist.get_rank() == 0:
        manifest = Path(folder) / "program.json"
        data = json.loads(manifest.read_text())
        data["generates"]["class"] = ["subprocess", "Popen"]
        manifest.write_text(json.dumps(data | {"digest": digest_of(data)}))
    dist.barrier()
    found["class"] = refusal(lambda: tpcompile.load_program(folder, mesh()).generate(ids))
    pictures: Any = tpcompile.parallelize(families.build("qwen2_vl"), mesh())
    pictures.prepare_inputs_for_generation = pictures.prepare_inputs_for_generation
    with torch.no_grad():
        pictures(input_ids=ids, use_cache=False)
    pictures.save_program(folder)
    found["replaced"] = refusal(lambda: tpcompile.load_program(folder, mesh()).generate(ids))
    del pictures.prepare_inputs_for_generation
    pictures.save_program(folder)
    found["modules"] = refusal(lambda: tpcompile.load_program(folder, mesh()).generate(ids))
    return found


def uneven(folder: str) -> bool:
    """Whether ranks generate whose caches have other sizes, one of them no heads."""
    fields = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = tpcompile.parallelize(families.build("llama", **fields), mesh())
    ids = families.token_ids(2, 6)
    wanted = model.generate(ids, max_new_tokens=3, do_sample=False)
    model.save_program(folder)
    loaded = tpcompile.load_program(folder, mesh())
    return torch.equal(loaded.generate(ids, max_new_tokens=3, do_sample=False), wanted)


class HandsOn(nn.Module):
    """Gives what it is given, too."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(20, 36)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mlp(x), x


class Draws(nn.Module):
    """Draws random numbers in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(20, 36)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.mlp(x), 0.5, training=True)


def packages(folder: str) -> dict[str, Any]:
    """A program with native code: what it gives, for which sizes it runs, and what is refused."""
    torch.manual_seed(0)
    sharded = tpcompile.parallelize(Counted().attention.eval(), mesh(), (torch.randn(3, 5, 20),))
    x = torch.randn(3, 5, 20)
    with torch.no_grad():
        sharded.save_program(folder, package=True)
        loaded = tpcompile.load_program(folder, mesh(), package=True)
        ran: list[bool] = []
        for call in loaded.calls:
            code = call.package
            assert code is not None

            def runs(*inputs: Any, runs: Any = code.runs) -> Any:
                ran.append(True)
                return runs(*inputs)

            call.package = replace(code, runs=runs)
        torch.testing.assert_close(loaded(x), sharded(x))
        packaged = len(ran)
        same = torch.equal(loaded(x[:2]), sharded(x[:2])) and len(ran) == packaged
        dist.barrier()
        late = 1.0 if dist.get_rank() else 0.0
        time.sleep(late)
        turns = turns_of_others(lambda: loaded(x))
        plain = tpcompile.load_program(folder, mesh())
        untouched = torch.equal(plain(x), sharded(x)) and all(each.package is None for each in plain.calls)
        sharded.save_program(folder)
        hands_on = tpcompile.parallelize(HandsOn(), mesh(), (x,))
        refused = refusal(lambda: hands_on.save_program(folder, package=True))
        draws = tpcompile.parallelize(Draws(), mesh(), (x,))
        drawn = refusal(lambda: draws.save_program(folder, package=True))
        assert torch.equal(tpcompile.load_program(folder, mesh())(x), sharded(x))  # it is still there
    without = refusal(lambda: tpcompile.load_program(folder, mesh(), package=True))
    found = {"turns": turns, "late": late, "packaged": packaged, "same": same, "untouched": untouched}
    return found | {"without": without, "refused": refused, "drawn": drawn}
