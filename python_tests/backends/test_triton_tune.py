"""Tuning of the Triton kernels without a GPU: what is measured, kept, and taken because of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from triton.errors import TritonError
from triton_kernels import compiler, interpreter, run_interpreted_tests

from petite_fast.backends import eager
from petite_fast.backends import triton as backend
from petite_fast.backends.triton import tune, tune_cache
from petite_fast.backends.triton.tune_cache import Cache, Entry
from petite_fast.ops import dispatch

ONE = (1, 1, 1)
GEOMETRY = (ONE, ONE, ONE, False, (0, 0, 0), 1)
ABOUT = {"device": "a card", "torch": "2.11.0", "triton": "3.6.0", "source": "0123"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder that is empty, and a card that nobody asks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PETITE_FAST_BACKEND", raising=False)
    monkeypatch.setattr(tune, "describe", lambda device: ABOUT)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for cached in (tune.cache_of, tune_cache._warn_once):
        cached.cache_clear()
    yield
    tune.cache_of.cache_clear()


class Bench:
    """Functions that a timer of ours knows by name; each gives `value`, or raises it."""

    def __init__(self, **times: float) -> None:
        self.times, self.runs, self.timed = times, {}, []

    def run(self, name: str, value: Any = 1.0) -> Callable[[], Any]:
        def run() -> Any:
            if isinstance(value, Exception):
                raise value
            return torch.full((3,), value)

        self.runs[run] = name
        return run

    def timer(self, run: Callable[[], Any]) -> float:
        self.timed.append(self.runs[run])
        return self.times[self.runs[run]]


def measure(bench: Bench, names: str, **keywords: Any) -> Entry | None:
    candidates = [({"ROWS": place}, bench.run(name)) for place, name in enumerate(names)]
    return tune.measure(bench.run("library"), candidates, bench.timer, **keywords)


@compiler
@pytest.mark.parametrize(
    ("times", "rows", "wins"),
    [
        ({"a": 5, "b": 4, "c": 6}, 1, True),
        ({"a": 4, "b": 3.9, "c": 4.1}, 0, True),  # a tie: the earlier one
        ({"a": 9.8, "b": 12, "c": 11}, 0, False),  # a tie: the library
        ({"a": 12, "b": 11, "c": 10.9}, 1, False),
    ],
)
def test_the_fastest_is_taken_and_ties_change_nothing(times: Any, rows: int, wins: bool) -> None:
    entry = measure(Bench(library=10, **times), "abc")
    assert entry is not None and entry.config == {"ROWS": rows} and entry.triton_wins == wins
    assert entry.triton_ms == times["abc"[rows]] and entry.library_ms == 10


@compiler
def test_the_budget_ends_it_but_never_before_the_first() -> None:
    for budget, timed in ((0.0, "a"), (2.5, "ab"), (100.0, "abc")):
        bench, ticks = Bench(library=10, a=5, b=4, c=3), iter(range(0, 100, 2))
        measure(bench, "abc", budget=budget, clock=lambda ticks=ticks: float(next(ticks)))
        assert bench.timed == ["library", *timed]


@compiler
def test_what_fails_or_is_wrong_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(library=10, right=9)
    candidates = [
        ({"ROWS": 1}, bench.run("large", TritonError("out of resource"))),
        ({"ROWS": 2}, bench.run("wrong", 1.02)),
        ({"ROWS": 3}, bench.run("wrong", float("nan"))),
    ]
    entry = tune.measure(bench.run("library"), candidates, bench.timer)
    assert entry == Entry(10, None, {}) and not entry.triton_wins
    assert caplog.text.count("is wrong here and not taken") == 2
    entry = tune.measure(
        bench.run("library"), [*candidates, ({"ROWS": 4}, bench.run("right", 1.004))], bench.timer
    )
    assert entry == Entry(10, 9, {"ROWS": 4}) and entry.triton_wins
    with pytest.raises(ZeroDivisionError):  # a bug of ours is no slow kernel
        tune.measure(bench.run("library"), [({}, lambda: 1 / 0)], bench.timer)
    full = bench.run("full", torch.OutOfMemoryError("out of memory"))
    assert tune.measure(full, candidates, bench.timer) is None
    assert tune.measure(bench.run("library", float("inf")), candidates, bench.timer) is None


@compiler
def test_entries_are_kept(tmp_path: Path) -> None:
    first, second = Cache(ABOUT), Cache(ABOUT)
    entry, other = Entry(2.0, 1.0, {"ROWS": 64, "num_warps": 8}), Entry(1.0, None, {})
    first.put("conv", entry)
    second.put("grad", other)  # another process, which had not seen the first's
    again = Cache(ABOUT)
    assert again.entries == {"conv": entry, "grad": other}
    assert [path.name for path in (tmp_path / "petite_fast").iterdir()] == [again.path.name]
    for name in ABOUT:
        assert Cache({**ABOUT, name: "another"}).entries == {}


@compiler
def test_a_cache_is_for_a_device_its_versions_and_the_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device}")
    monkeypatch.setattr(tune_cache, "__file__", str(tmp_path / "tune_cache.py"))
    (tmp_path / "conv.py").write_text("a kernel")
    first = tune_cache.describe(0)
    assert first["device"] == "card 0" and first["torch"] == torch.__version__
    assert set(first) == {"device", "torch", "cudnn", "triton", "source"}
    assert tune_cache.describe(0) == first != tune_cache.describe(1)
    (tmp_path / "conv.py").write_text("another")
    assert tune_cache.describe(0)["source"] != first["source"]


@compiler
@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"entries": {}}', '{"about": {}, "entries": {}}',
        json.dumps({"about": ABOUT, "entries": []}),
        json.dumps({"about": ABOUT, "entries": {"k": {"library_ms": 1}}}),
        json.dumps({"about": ABOUT, "entries": {
            "k": {"library_ms": "x", "triton_ms": 1, "config": {}}}}),
        json.dumps({"about": ABOUT, "entries": {
            "k": {"library_ms": 1, "triton_ms": 1, "config": {"ROWS": "many"}}}}),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_warning(text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = Cache(ABOUT).path
    path.parent.mkdir(parents=True)
    path.write_text(text)
    caches = [Cache(ABOUT), Cache(ABOUT)]
    assert all(cache.entries == {} for cache in caches)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} is no tuning file of this device: ignored"
    ]
    caches[0].put("conv", Entry(2.0, 1.0, {}))
    assert Cache(ABOUT).entries == {"conv": Entry(2.0, 1.0, {})}


@compiler
def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "petite_fast").write_text("a file")
    cache = Cache(ABOUT)
    for key in ("conv", "grad"):
        cache.put(key, Entry(2.0, 1.0, {}))
    assert len(cache.entries) == 2
    assert caplog.text.count("tuning is not kept") == 1


@compiler
def test_what_the_key_tells_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(2, 4, 5, 6, 7), torch.ones(8, 4, 3, 3, 3)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def key(op: str = "conv", x: torch.Tensor = x, bias: Any = None, stride: Any = ONE) -> str:
        return tune.geometry_key(op, (x, weight, bias, stride, *GEOMETRY[1:]))

    keys = [
        key(), key("conv_grad_input"), key(x=x[:1]), key(x=x.half()), key(bias=weight[:, 0, 0, 0]),
        key(stride=(1, 1, 2)),
    ]  # fmt: skip
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    keys.append(key())
    assert len(set(keys)) == 7
    assert key(stride=[1, 1, 1]) == key() == key(x=torch.zeros_like(x))


@compiler
def test_measured_once_and_only_when_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(library=10, a=5)
    run = bench.run("a")
    x, weight = torch.ones(1, 4, 5, 6, 7), torch.ones(8, 4, 3, 3, 3)

    library = bench.run("library")

    def find(library: Callable[[], Any] = library) -> Entry | None:
        arguments = (x, weight, None, *GEOMETRY)
        return tune.find("conv", arguments, library, lambda: [({"ROWS": 64}, run)], bench.timer)

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert find() is None
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert find() is None and bench.timed == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    wanted = Entry(10, 5, {"ROWS": 64})
    assert find() == find() == wanted and bench.timed == ["library", "a"]
    tune.cache_of.cache_clear()  # another process
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert find() == wanted and bench.timed == ["library", "a"]

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    x, calls = x[:, :, :3], []

    def not_finite() -> torch.Tensor:
        calls.append(1)
        return torch.tensor([float("inf")])

    assert find(not_finite) is None and find(not_finite) is None
    assert calls == [1]


def cuda_arguments(op: str) -> list[Any]:
    """Arguments of an op on a card that is not there, in a layout that the kernels take."""

    def volume(channels: int) -> torch.Tensor:
        plain = torch.empty(1, channels, 5, 6, 7, device="cuda", dtype=torch.bfloat16)
        return plain.to(memory_format=torch.channels_last_3d)

    weight, lora_A, lora_B = (
        torch.empty(size, device="cuda", dtype=torch.bfloat16)
        for size in ((24, 20, 3, 3, 3), (2, 20, 3, 3, 3), (24, 2))
    )
    if op == "conv":
        return [volume(20), weight, None, *GEOMETRY]
    if op == "conv_grad_input":
        return [volume(24), weight, [1, 20, 5, 6, 7], *GEOMETRY]
    return [volume(24), volume(20), None, lora_A, lora_B, ONE, ONE, *[True] * 3]


@pytest.mark.usefixtures("free_choice")
@compiler
@pytest.mark.parametrize("op", ["conv", "conv_grad_input", "low_rank_gradient"])
def test_dispatch_takes_what_was_faster(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "available", lambda device: (True, ""))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with FakeTensorMode():
        arguments = cuda_arguments(op)
        key = tune.geometry_key(op, arguments)

        def chosen(entry: Entry | None) -> tuple[Any, str]:
            if entry is not None:
                tune.cache_of(0).put(key, entry)
                tune.cache_of.cache_clear()
            with dispatch.explaining() as found:
                function = dispatch.choose(op, *arguments)
            ((decision, _),) = found.items()
            return function, " ".join(decision.refusals)

        function, why = chosen(None)
        assert function is getattr(eager, op) and "triton: not measured on this device" in why
        function, why = chosen(Entry(2.0, 2.5, {"ROWS": 64}))
        assert function is getattr(eager, op) and "measured 2.5 ms, the library 2 ms" in why
        function, why = chosen(Entry(2.0, None, {}))
        assert function is getattr(eager, op) and "no configuration gave" in why
        function, why = chosen(Entry(2.0, 1.0, {"ROWS": 64}))
        assert function is backend._FUNCTIONS[op] and "ms" not in why

        # The kernel is launched as it was measured, whoever asks.
        from petite_fast.backends.triton import conv, low_rank

        launched = []
        name, module = ("conv", conv) if op == "conv" else (op, conv)
        module = low_rank if op == "low_rank_gradient" else module
        monkeypatch.setattr(module, name, lambda *_, config: launched.append(config))
        function(*arguments)
        monkeypatch.setenv("PETITE_FAST_BACKEND", "triton")
        dispatch.choose(op, *arguments)(*arguments)
        function(*arguments, config={"ROWS": 32})
        assert launched == [{"ROWS": 64}, {"ROWS": 64}, {"ROWS": 32}]


@interpreter
@pytest.mark.parametrize("op", ["conv", "conv_grad_input", "low_rank_gradient"])
def test_interpreted_configurations(op: str) -> None:
    """All of them give what the library gives, by the tuner's own measure."""
    from petite_fast.backends.triton import conv, low_rank

    torch.manual_seed(0)
    x, grad_y = torch.randn(1, 6, 4, 5, 6), torch.randn(1, 20, 5, 6, 7)
    weight, lora_B = torch.randn(20, 6, 2, 2, 2), torch.randn(20, 3)
    x, grad_y = (t.to(memory_format=torch.channels_last_3d) for t in (x, grad_y))
    if op == "conv":
        library: list[Any] = [x, weight, None, *GEOMETRY]
        ours, function = [*library[:6], grad_y.shape[2:]], conv.conv
    elif op == "conv_grad_input":
        library = [grad_y, weight, list(x.shape), *GEOMETRY]
        ours, function = library[:6], conv.conv_grad_input
    else:
        library = [grad_y, x, None, weight[:3], lora_B, ONE, ONE, True, True, True]
        ours, function = [grad_y, x, *library[3:]], low_rank.low_rank_gradient
    configs = tune.LOW_RANK if op == "low_rank_gradient" else tune.CONV
    seen = []
    for config in configs:
        entry = tune.measure(
            lambda: getattr(eager, op)(*library),
            [(config, lambda config=config: function(*ours, config=config))],
            lambda run: 1.0,
        )
        assert entry is not None and entry.triton_ms is not None, config
        seen.append(entry.config)
    assert seen == list(configs)


@compiler
def test_in_the_interpreter(tmp_path: Path) -> None:
    run_interpreted_tests(__file__, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_timer() -> None:
    small, large = (torch.ones(n, device="cuda") for n in (2**10, 2**27))
    times = [tune.cuda_timer(each.clone) for each in (small, large)]
    assert 0 < times[0] < times[1] < 1000
