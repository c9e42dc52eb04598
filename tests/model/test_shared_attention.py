"""The CUDA kernel of shared attention against the CPU's path; without a GPU, in Triton's interpreter where it is installed."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.model.attention import attend_shared
from longer.model.shared_attention import Readers, attend

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="the kernel needs Triton: CUDA builds of PyTorch bring it")
DEVICE = "cuda" if ON_CUDA else "cpu"
pytestmark = pytest.mark.kernels
NUM_EXAMPLES = 60 if ON_CUDA else 5
HALF = (torch.bfloat16, 1e-2) if ON_CUDA else (torch.float16, 1e-3)
"""The interpreter multiplies no bfloat16 matrices."""


@dataclass(frozen=True)
class Case:
    """Inputs of `attend`: query, context, tail and own keys and values (None where absent); in float64 on the CPU at first.

    The first run of queries sees groups only, the second a tail too, the third tail and own keys: as groups, tails and candidates.
    """

    readers: Readers
    num_visible_P: torch.Tensor
    inputs: tuple[torch.Tensor | None, ...]

    def to(self, dtype: torch.dtype, device: str) -> "Case":
        tensors = {name: value.to(device) for name, value in vars(self.readers).items() if torch.is_tensor(value)}
        inputs = tuple(None if x is None else x.to(device, dtype) for x in self.inputs)
        return Case(replace(self.readers, **tensors, _tiles={}), self.num_visible_P.to(device), inputs)


def random_case(
    seed: int, requests: list[list[int]], kinds: int, heads: int, width: int, tail: int, own: bool, spread: float = 1.0
) -> Case:
    """`requests[b]` holds the number of queries, of each kind, of each request of history b; kind j has j more of each."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * spread

    num_keys_B = torch.randint(0, 150, (len(requests),), generator=generator)
    per_kind_R = [torch.tensor([n + kind for row in requests for n in row], dtype=torch.int64) for kind in range(kinds)]
    sizes_S = torch.tensor([sum(n + kind for n in row) for kind in range(kinds) for row in requests], dtype=torch.int64)
    total, num_requests = int(sizes_S.sum()), sum(map(len, requests))
    firsts = [0, *(int(sum(sizes.sum() for sizes in per_kind_R[:kind])) for kind in range(1, kinds))]
    tail_first, own_first = firsts[min(1, kinds - 1)], firsts[-1]
    runs = range(min(1, kinds - 1), kinds)
    row_P = torch.repeat_interleave(torch.arange(len(sizes_S)) % len(requests), sizes_S)
    readers = Readers(
        offsets_S1=_offsets(sizes_S),
        key_begin_B=_offsets(num_keys_B)[:-1],
        num_keys_B=num_keys_B,
        max_keys=int(num_keys_B.max()),
        tail_first=tail_first,
        own_first=own_first,
        request_P=torch.cat([torch.repeat_interleave(per_kind_R[kind]) for kind in runs]),
        sees_PT=torch.rand(total - tail_first, tail, generator=generator) < 0.5,
        request_offsets_JR1=torch.stack([firsts[kind] + _offsets(per_kind_R[kind]) for kind in runs]),
    )
    num_visible_P = (torch.rand(total, generator=generator) * (num_keys_B[row_P] + 1)).long()
    shared = [random(int(num_keys_B.sum()), heads, width) for _ in range(2)]
    tails = [random(num_requests, tail, heads, width) if tail else None for _ in range(2)]
    owns = [random(total - own_first, heads, width) if own else None for _ in range(2)]
    return Case(readers, num_visible_P, (random(total, heads, width), *shared, *tails, *owns))


def _offsets(sizes: torch.Tensor) -> torch.Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def reference(case: Case, inputs: list[torch.Tensor | None]) -> torch.Tensor:
    """The same by `attend_shared`, one query a row; a further key of zero value and no weight stands where none is visible."""
    query, key, value, tail_key, tail_value, own_key, own_value = inputs
    assert query is not None
    assert key is not None
    assert value is not None
    readers, rows = case.readers, []
    for segment in range(readers.num_segments):
        row = segment % readers.num_rows
        keys = slice(int(readers.key_begin_B[row]), int(readers.key_begin_B[row] + readers.num_keys_B[row]))
        for p in range(int(readers.offsets_S1[segment]), int(readers.offsets_S1[segment + 1])):
            private, sees = [], []
            if tail_key is not None and p >= readers.tail_first:
                request, sees_T = readers.request_P[p - readers.tail_first], readers.sees_PT[p - readers.tail_first]
                private.append((tail_key[request], tail_value[request]))
                sees.append(sees_T)
            if own_key is not None and p >= readers.own_first:
                private.append((own_key[p - readers.own_first][None], own_value[p - readers.own_first][None]))
                sees.append(torch.tensor([True]))
            if not case.num_visible_P[p] and not any(s.any() for s in sees):
                rows.append(query[p].flatten()[None] * 0)
                continue
            sees_S = torch.cat(sees) if sees else torch.zeros(0, dtype=torch.bool)
            k, v = (
                torch.cat(x)[None] if x else key[None, :0] for x in ([a for a, _ in private], [a for _, a in private])
            )
            context = key[None, keys], value[None, keys]
            rows.append(
                attend_shared(query[p : p + 1], *context, [1], case.num_visible_P[p : p + 1], k, v, sees_S[None])
            )
    return torch.cat(rows)


def gradients(out: torch.Tensor, inputs: list[torch.Tensor | None], d_out: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of every input that is there; a tensor that nothing read has none."""
    there = [x for x in inputs if x is not None]
    grads = torch.autograd.grad(out, there, d_out, allow_unused=True, materialize_grads=True)
    return [x.detach().cpu().double() for x in (out, *grads)]


def leaves(case: Case) -> list[torch.Tensor | None]:
    return [None if x is None else x.clone().requires_grad_() for x in case.inputs]


def actual(case: Case, d_out: torch.Tensor) -> list[torch.Tensor]:
    inputs = leaves(case)
    query, key, value, *private = inputs
    tail, own = (None if pair[0] is None else pair for pair in (private[:2], private[2:]))
    return gradients(attend(query, (key, value), case.readers, case.num_visible_P, tail, own), inputs, d_out)


def assert_equal(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """Relative error of output and gradients, each as a whole; inputs are rounded before both sides see them.

    Gradients that cancel (of a query that sees one key, say) are compared with the size of what is cancelled.
    """
    if not len(case.num_visible_P):
        return
    d_out = torch.randn(len(case.num_visible_P), case.inputs[0].shape[1:].numel(), dtype=torch.float64).to(dtype)
    rounded = case.to(dtype, "cpu").to(torch.float64, "cpu")
    inputs = leaves(rounded)
    wanted = gradients(reference(rounded, inputs), inputs, d_out.double())
    got = actual(case.to(dtype, DEVICE), d_out.to(DEVICE))
    for number, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        error, size = (ours - theirs).norm(), torch.maximum(theirs.norm(), d_out.double().norm())
        assert error <= tolerance * size, f"output {number}: {error / size:.1e}"


CASES = {
    "seed": st.integers(0, 2**31),
    "requests": st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=3),
    "kinds": st.integers(1, 3),
    "shape": st.sampled_from([(2, 2, 3), (2, 6, 0), (3, 16, 4), (1, 24, 2), (2, 32, 5), (2, 64, 4), (1, 128, 1)]),
    "own": st.booleans(),
}


@given(**CASES)
@settings(max_examples=NUM_EXAMPLES, deadline=None)
def test_kernel_equals_the_cpu_path_in_float32(
    seed: int, requests: list[list[int]], kinds: int, shape: tuple[int, int, int], own: bool
) -> None:
    assert_equal(random_case(seed, requests, kinds, *shape, own), torch.float32, 1e-5)


@given(**CASES)
@settings(max_examples=NUM_EXAMPLES, deadline=None)
def test_kernel_in_half_precision_is_as_exact_as_its_inputs(
    seed: int, requests: list[list[int]], kinds: int, shape: tuple[int, int, int], own: bool
) -> None:
    """bfloat16 keeps 8 bits, float16 11: weights and outputs are rounded to them, sums are not; 1 % and 0.1 % of the whole."""
    assert_equal(random_case(seed, requests, kinds, *shape, own), *HALF)


def test_long_runs_of_queries_are_cut_into_tiles() -> None:
    assert_equal(random_case(3, [[150], [], [2, 300]], 3, 2, 32, 4, True), torch.float32, 1e-5)


def test_large_scores_do_not_overflow() -> None:
    assert_equal(random_case(1, [[40], [9, 9]], 3, 2, 32, 3, True, spread=5.0), torch.float32, 1e-5)


def test_equal_inputs_give_equal_bits() -> None:
    """No sum depends on which program finished first."""
    case = random_case(2, [[40], [9, 30]], 3, 2, 32, 3, True).to(torch.float32, DEVICE)
    d_out = torch.randn(len(case.num_visible_P), 64).to(DEVICE)
    for first, second in zip(actual(case, d_out), actual(case, d_out), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kept", [torch.int8, torch.float8_e4m3fn])
def test_keys_and_values_of_fewer_bits_are_read_as_what_they_stand_for(kept: torch.dtype) -> None:
    if kept == torch.float8_e4m3fn and not (ON_CUDA and torch.cuda.get_device_capability() >= (8, 9)):
        pytest.skip("fp8 needs a card that has it")
    dtype, tolerance = HALF
    case = random_case(5, [[30], [9, 20], [0]], 3, 2, 32, 3, True).to(dtype, DEVICE)
    query, key, value, *others = case.inputs
    pairs, scales = [], []
    for x_NHZ in (key, value):
        scale_NH = x_NHZ.float().abs().amax(-1) / 127 if kept == torch.int8 else torch.ones_like(x_NHZ[..., 0].float())
        scaled = x_NHZ.float() / scale_NH[..., None]
        pairs.append((scaled.round() if kept == torch.int8 else scaled).to(kept))
        scales.append(scale_NH.contiguous())
    private = tuple(others[:2]), tuple(others[2:])
    told = tuple(scales) if kept == torch.int8 else None
    found = attend(query, tuple(pairs), case.readers, case.num_visible_P, *private, told)
    meant = [(x.float() * scale[..., None]).to(dtype) for x, scale in zip(pairs, scales, strict=True)]
    wanted = attend(query, tuple(meant), case.readers, case.num_visible_P, *private)
    assert (found - wanted).float().norm() <= tolerance * wanted.float().norm()


@given(st.lists(st.integers(0, 300), min_size=1, max_size=300), st.sampled_from([16, 32, 128]))
@settings(max_examples=NUM_EXAMPLES, deadline=None)
def test_tiles_cover_every_query_once(sizes: list[int], size: int) -> None:
    offsets_S1 = _offsets(torch.tensor(sizes)).to(DEVICE)
    nothing = offsets_S1[:-1]
    segment, first = (x.cpu() for x in Readers(offsets_S1, nothing, nothing, 0).tiles(sum(sizes), size))
    end = torch.minimum(first + size, offsets_S1.cpu()[segment + 1])
    found = [list(range(a, b)) for a, b in zip(first.tolist(), end.tolist(), strict=True)]
    assert [p for run in found for p in run] == list(range(sum(sizes)))
    assert all(offsets_S1[s] <= a for s, a, run in zip(segment, first, found, strict=True) if run)
