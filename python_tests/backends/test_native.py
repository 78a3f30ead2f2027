"""effective_weight of the native backend against the formula in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from petite_fast.backends import native

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
DTYPES = list(CODES)

# name: weight shape, groups, transposed
FORMS = {
    "dense": ((12, 10, 3, 3, 3), 1, False),
    "odd": ((7, 5, 1, 2, 3), 1, False),
    "wide": ((9, 67, 3, 3, 3), 1, False),
    "grouped": ((12, 4, 3, 3, 3), 3, False),
    "depthwise": ((17, 1, 3, 3, 3), 17, False),
    "one row": ((1, 701, 1, 1, 1), 1, False),
    "linear": ((33, 130), 1, False),
    "transposed": ((10, 12, 2, 2, 2), 1, True),
    "transposed wide": ((6, 90, 2, 2, 3), 1, True),
    "transposed grouped": ((12, 5, 3, 2, 1), 4, True),
}


def formula(weight, lora_A, lora_B, scale, gamma, groups, transposed):
    """W_eff in float64, written from the definition, one channel pair at a time."""
    weight = weight.double()
    rows = weight.shape[0]
    matrix = weight.reshape(rows, -1)
    if lora_A is not None:
        a = lora_A.double().reshape(lora_A.shape[0], -1)
        b = lora_B.double()
        if transposed:
            product = torch.einsum("qc,qj->cj", a, b.reshape(b.shape[0], -1))
        else:
            product = torch.einsum("oq,qj->oj", b, a)
        matrix = matrix + scale * product
    result = matrix.reshape(weight.shape).clone()
    if gamma is not None:
        for row in range(rows):
            if not transposed:
                result[row] *= gamma[row].double()
                continue
            per_group = weight.shape[1]
            group = row // (rows // groups)
            for column in range(per_group):
                result[row, column] *= gamma[group * per_group + column].double()
    return result


def operands(shape, groups, transposed, rank, with_gamma, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    weight = draw(*shape)
    outputs = shape[1] * groups if transposed else shape[0]
    gamma = draw(outputs) if with_gamma else None
    if not rank:
        return weight, None, None, gamma
    if transposed:
        return weight, draw(rank, shape[0], *(1 for _ in shape[2:])), draw(rank, *shape[1:]), gamma
    return weight, draw(rank, *shape[1:]), draw(shape[0], rank), gamma


def magnitude(weight, lora_A, lora_B, scale, gamma, groups, transposed):
    """The same sum of absolute values: what rounding errors of the accumulation scale with."""
    positive = [None if t is None else t.double().abs() for t in (weight, lora_A, lora_B, gamma)]
    return formula(*positive[:3], abs(scale), positive[3], groups, transposed)


def check(result, arguments, accumulate):
    """Rounded once: within one step of the rounded exact value, plus the accumulation's error."""
    weight, lora_A, lora_B, scale, gamma, groups, transposed, dtype = arguments
    exact = formula(weight, lora_A, lora_B, scale, gamma, groups, transposed)
    bound = magnitude(weight, lora_A, lora_B, scale, gamma, groups, transposed)
    rank = 0 if lora_A is None else lora_A.shape[0]
    accumulation = (rank + 3) * torch.finfo(accumulate).eps * bound
    rounded = exact.to(dtype).double()
    info = torch.finfo(dtype)
    step = torch.clamp(exact.abs() * info.eps, min=info.smallest_normal * info.eps)
    assert result.dtype == dtype and result.shape == weight.shape
    error = (result.double() - rounded).abs()
    worst = (error - step - accumulation).max().item()
    assert worst <= 0, f"off by {worst} beyond one rounding"
    # Away from ties the rounding itself must be right, not just near. (The slack also covers
    # torch's own conversion of a double, which goes through float32 and rounds twice.)
    slack = accumulation + exact.abs() * 2.0**-24 * (dtype.itemsize < 4)
    nearest = (exact - slack).to(dtype) == (exact + slack).to(dtype)
    assert torch.equal(result[nearest].double(), rounded[nearest])


def accumulator(*dtypes):
    return torch.float64 if torch.float64 in dtypes else torch.float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [0, 1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("with_gamma", [False, True])
def test_forms(form, rank, with_gamma):
    shape, groups, transposed = FORMS[form]
    tensors = operands(shape, groups, transposed, rank, with_gamma, torch.float32)
    arguments = (*tensors[:3], 2.0, tensors[3], groups, transposed, torch.float32)
    assert native.can_run_effective_weight(*arguments) == (True, "")
    check(native.effective_weight(*arguments), arguments, torch.float32)


@pytest.mark.parametrize("form", ["dense", "wide", "depthwise", "transposed grouped"])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("computed", DTYPES)
def test_dtypes(form, stored, computed):
    shape, groups, transposed = FORMS[form]
    weight, lora_A, lora_B, gamma = operands(shape, groups, transposed, 4, True, stored)
    arguments = (weight, lora_A, lora_B, 0.75, gamma, groups, transposed, computed)
    check(native.effective_weight(*arguments), arguments, accumulator(stored, computed))


@pytest.mark.parametrize("factors", DTYPES)
def test_factors_of_another_dtype(factors):
    weight, *_ = operands((9, 67, 3, 3, 3), 1, False, 0, False, torch.bfloat16)
    _, lora_A, lora_B, gamma = operands((9, 67, 3, 3, 3), 1, False, 6, True, factors, seed=1)
    arguments = (weight, lora_A, lora_B, 1.5, gamma, 1, False, torch.bfloat16)
    check(native.effective_weight(*arguments), arguments, accumulator(factors))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rank_beyond_one_block_and_threads(threads):
    tensors = operands((70, 33, 3, 3, 3), 1, False, 71, True, torch.float32)
    arguments = (*tensors[:3], 0.1, tensors[3], 1, False, torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = native.effective_weight(*arguments)
    finally:
        torch.set_num_threads(before)
    check(result, arguments, torch.float32)


def test_threads_do_not_change_the_result():
    tensors = operands((64, 64, 3, 3, 3), 1, False, 8, True, torch.float32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(
            native.effective_weight(*tensors[:3], 2.0, tensors[3], 1, False, torch.float32)
        )
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_nothing_is_written_around_the_output():
    # The kernel writes vectors: a canary on both sides shows one that goes too far.
    tensors = operands((3, 7, 1, 1, 3), 1, False, 2, False, torch.float32)
    module, _ = native._load()
    size = tensors[0].numel()
    canvas = torch.full((size + 64,), 7.0)
    out = canvas[32:-32]
    given = [native._operand(t) for t in (*tensors, out)]
    module.effective_weight(*given, 7, 3, 1, (1, 1, 3), 2, 1.0, False, 1)
    assert (canvas[:32] == 7).all() and (canvas[-32:] == 7).all()
    assert not (out == 7).any()


def run_python(folder, *arguments, **variables):
    """A fresh interpreter, away from the checkout: it sees the package that is installed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**environment, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(name, tmp_path):
    if name not in native.build_info()["isas_usable"]:
        pytest.skip(f"this CPU or build has no {name}")
    names = ("test_forms", "test_dtypes", "test_expected_instruction_set")
    run = run_python(
        tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider",
        "-k", "wide-5 or wide-9 or grouped-3 or depthwise or expected",
        *(f"{__file__}::{test}" for test in names),
        PETITE_FAST_CPU_ISA=name, PETITE_FAST_EXPECT_ISA=name,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout


def test_expected_instruction_set():
    info = native.build_info()
    assert info["isa"] == os.environ.get("PETITE_FAST_EXPECT_ISA", info["isa"])
    assert info["isa"] in info["isas_usable"]


@pytest.mark.parametrize("value", ["avx1024", "AVX2"])
def test_unknown_instruction_set_is_one_clear_error(value, tmp_path):
    code = "from petite_fast.backends import native; native.build_info()"
    run = run_python(tmp_path, "-c", code, PETITE_FAST_CPU_ISA=value)
    assert run.returncode != 0
    assert f"PETITE_FAST_CPU_ISA: got '{value}', wanted one of avx512, avx2, baseline" in run.stderr


def test_refusals_have_reasons():
    weight, lora_A, lora_B, gamma = operands((4, 4, 3, 3, 3), 1, False, 2, True, torch.float32)

    def reason(**changes):
        arguments = {
            "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "scale": 1.0, "gamma": gamma,
            "groups": 1, "transposed": False, "dtype": torch.float32,
        }  # fmt: skip
        possible, text = native.can_run_effective_weight(**{**arguments, **changes})
        assert possible == (not text)
        return text

    assert reason() == ""
    assert "weight is not contiguous" in reason(
        weight=weight.to(memory_format=torch.channels_last_3d)
    )
    assert "lora_A is not contiguous" in reason(lora_A=lora_A.transpose(-1, -2))
    assert "no kernel for torch.int8" in reason(dtype=torch.int8)
    assert "lora_B of torch.int32" in reason(lora_B=lora_B.int())
    assert "device 'meta'" in reason(weight=weight.to("meta"))
    assert "gamma is on meta" in reason(gamma=gamma.to("meta"))
    assert "empty" in reason(weight=weight[:0])


def test_a_wrong_shape_is_an_error_and_not_a_read_past_the_end():
    weight, lora_A, lora_B, gamma = operands((4, 4, 3, 3, 3), 1, False, 2, True, torch.float32)

    def run(**changes):
        arguments = {
            "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "scale": 1.0, "gamma": gamma,
            "groups": 1, "transposed": False, "dtype": torch.float32,
        }  # fmt: skip
        native.effective_weight(**{**arguments, **changes})

    with pytest.raises(ValueError, match="lora_A: must have 216 elements, got 108"):
        run(lora_A=lora_A[:, :2].contiguous())
    with pytest.raises(ValueError, match="lora_B: must have 8 elements, got 4"):
        run(lora_B=lora_B[:2])
    with pytest.raises(ValueError, match="gamma: must have 4 elements, got 3"):
        run(gamma=gamma[:3])
    with pytest.raises(ValueError, match="lora_A and lora_B come together"):
        run(lora_B=None)
    with pytest.raises(ValueError, match="groups must divide"):
        run(groups=3)


def test_a_missing_module_is_a_reason_and_not_a_failure(tmp_path):
    code = (
        "import sys; sys.modules['petite_fast._native'] = None\n"
        "from petite_fast.backends import native\n"
        "possible, reason = native.available()\n"
        "assert not possible and 'petite_fast._native does not load' in reason, reason\n"
    )
    run = run_python(tmp_path, "-c", code)
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda(form, dtype, monkeypatch):
    monkeypatch.setenv("PETITE_FAST_BACKEND", "native")
    shape, groups, transposed = FORMS[form]
    weight, lora_A, lora_B, gamma = operands(shape, groups, transposed, 9, True, dtype)
    arguments = (weight, lora_A, lora_B, 2.0, gamma, groups, transposed, dtype)
    moved = [t.cuda() if isinstance(t, torch.Tensor) else t for t in arguments]
    possible, reason = native.can_run_effective_weight(*moved)
    if not possible:
        pytest.skip(reason)
    check(native.effective_weight(*moved).cpu(), arguments, accumulator(dtype))
