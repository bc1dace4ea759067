"""Every kind of work against its closed form, written out; torch's own counter where it knows the op."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from work import Apply

from aerogel.cost import Cost, count
from aerogel.cost.einsum import einsum
from aerogel.graph import capture


def cost_of(work: nn.Module | Callable[..., Tensor], *inputs: Tensor) -> Cost:
    return count(capture(work if isinstance(work, nn.Module) else Apply(work), inputs))


def r(*shape: int) -> Tensor:
    return torch.randn(shape)


class MultiHead(nn.Module):
    """nn.MultiheadAttention of a sequence with itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


MACS = {
    "lstm": (nn.LSTM(32, 64, batch_first=True), (r(2, 20, 32),), 20 * 2 * 4 * 64 * (32 + 64)),
    "lstm, unbatched": (nn.LSTM(32, 64), (r(20, 32),), 20 * 4 * 64 * (32 + 64)),
    "lstm, two layers, both ways": (nn.LSTM(32, 64, 2, bidirectional=True), (r(20, 2, 32),), 5_898_240),
    "lstm, projected": (nn.LSTM(32, 64, proj_size=16), (r(20, 2, 32),), 40 * (4 * 64 * (32 + 16) + 64 * 16)),
    "gru": (nn.GRU(32, 64), (r(20, 2, 32),), 20 * 2 * 3 * 64 * (32 + 64)),
    "rnn": (nn.RNN(32, 64), (r(20, 2, 32),), 20 * 2 * 64 * (32 + 64)),
    "transformer layer": (nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), (r(2, 50, 64),), 3_916_800),
    "attention": (lambda q: F.scaled_dot_product_attention(q, q, q), (r(2, 4, 50, 16),), 2 * 4 * 50 * 50 * (16 + 16)),
    "attention, other lengths": (
        F.scaled_dot_product_attention, (r(2, 4, 5, 16), r(2, 4, 7, 16), r(2, 4, 7, 3)), 2 * 4 * 5 * 7 * (16 + 3)),
    "transposed convolution": (nn.ConvTranspose2d(8, 12, 4, 2), (r(2, 8, 5, 5),), 2 * 8 * 25 * 12 * 16),
    "transposed, grouped": (nn.ConvTranspose2d(8, 12, 4, 2, groups=4), (r(2, 8, 5, 5),), 2 * 8 * 25 * 3 * 16),
    "convolution in time": (nn.Conv1d(4, 6, 3), (r(2, 4, 10),), 2 * 6 * 8 * 4 * 3),
    "convolution in space and time": (nn.Conv3d(2, 3, 3), (r(1, 2, 5, 5, 5),), 3 * 27 * 2 * 27),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (r(2, 3, 4), r(2, 4, 5)), 2 * 3 * 4 * 5),
    "einsum, implicit": (lambda a, b: torch.einsum("ij,jk", a, b), (r(3, 4), r(4, 5)), 3 * 4 * 5),
    "einsum, ellipsis": (
        lambda a, b: torch.einsum("...ij,...jk->...ik", a, b), (r(7, 2, 3, 4), r(2, 4, 5)), 7 * 2 * 3 * 4 * 5),
    "einsum of three": (
        lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c), (r(3, 4), r(4, 5), r(5, 6)), 3 * 4 * 5 + 3 * 5 * 6),
    "einsum of three, by a path": (
        lambda a, b, c: torch._VF.einsum("ij,jk,kl->il", (a, b, c), path=[1, 2, 0, 1]),  # as opt_einsum chooses it
        (r(3, 4), r(4, 5), r(5, 6)), 4 * 5 * 6 + 3 * 4 * 6),
    "einsum, summed in one": (lambda a, b: torch.einsum("abc,bd->ad", a, b), (r(2, 3, 4), r(3, 5)), 2 * 3 * 5),
    "einsum without a sum": (lambda a, b: torch.einsum("i,j->ij", a, b), (r(3), r(4)), 0),
    "bilinear": (nn.Bilinear(5, 6, 7), (r(3, 5), r(3, 6)), 3 * 7 * (5 * 6 + 5)),
    "matrix times vector": (torch.mv, (r(4, 5), r(5)), 20),
    "matmul with a vector": (torch.matmul, (r(4, 5), r(5)), 20),
    "dot": (torch.dot, (r(5), r(5)), 5),
    "baddbmm": (torch.baddbmm, (r(2, 3, 5), r(2, 3, 4), r(2, 4, 5)), 2 * 3 * 4 * 5),
    "vdot": (torch.vdot, (r(5), r(5)), 5),
    "addmv": (torch.addmv, (r(4), r(4, 5), r(5)), 20),
    "addbmm": (torch.addbmm, (r(3, 5), r(2, 3, 4), r(2, 4, 5)), 2 * 3 * 4 * 5),
    "inner": (torch.inner, (r(3, 4), r(5, 4)), 3 * 5 * 4),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=([1, 2], [0, 1])), (r(2, 3, 4), r(3, 4, 5)), 2 * 5 * 12),
    "affine grid": (lambda m: F.affine_grid(m, [2, 3, 5, 7], align_corners=False), (r(2, 2, 3),), 2 * 35 * 3 * 2),
    "lstm cell": (lambda x, h, w, v: torch.lstm_cell(x, (h, h), w, v)[0],
                  (r(3, 5), r(3, 6), r(24, 5), r(24, 6)), 3 * 24 * (5 + 6)),
    "gru cell": (lambda x, h, w, v: torch.gru_cell(x, h, w, v), (r(3, 5), r(3, 6), r(18, 5), r(18, 6)), 3 * 18 * 11),
    "multi-head attention": (MultiHead(16, 2), (r(3, 10, 16),), 3 * (10 * 4 * 16 * 16 + 2 * 10 * 10 * 16)),
    "attention, shared keys": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        (r(2, 8, 5, 16), r(2, 2, 7, 16)), 2 * 8 * 5 * 7 * (16 + 16)),
    "attention, one query for all": (
        F.scaled_dot_product_attention, (r(1, 4, 50, 16), r(2, 4, 50, 16), r(2, 4, 50, 16)), 640_000),
    "attention, one query and no batch": (
        F.scaled_dot_product_attention, (r(50, 16), r(4, 50, 16), r(4, 50, 16)), 320_000),
    "attention, more values": (
        F.scaled_dot_product_attention, (r(1, 4, 50, 16), r(1, 4, 50, 16), r(2, 4, 50, 16)), 480_000),
    "causal attention, not halved": (
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), (r(2, 4, 50, 16),), 640_000),
    "interpolation": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (r(1, 3, 4, 4),), 0),
}  # fmt: skip


@pytest.mark.parametrize("case", MACS)
def test_macs(case: str) -> None:
    work, inputs, macs = MACS[case]
    found = cost_of(work, *inputs)  # type: ignore[arg-type]
    assert found.macs == macs
    assert found.uncounted == {}


KNOWN_TO_TORCH = [
    case for case in MACS if not case.startswith(("lstm", "gru", "rnn", "bilinear", "matrix", "einsum of"))
]


@pytest.mark.parametrize("case", KNOWN_TO_TORCH)
def test_macs_are_those_that_torch_counts_on_the_meta_device(case: str) -> None:
    """An independent count: torch decomposes there to matrix products, which it counts one by one."""
    work, inputs, macs = MACS[case]
    module = copy.deepcopy(work).to("meta").eval() if isinstance(work, nn.Module) else work  # type: ignore[attr-defined]
    with FlopCounterMode(display=False) as counter:
        module(*(x.to("meta") for x in inputs))  # type: ignore[operator]
    expected = counter.get_total_flops() / 2
    if case in ("matmul with a vector", "dot", "vdot", "addmv", "addbmm", "affine grid"):
        assert expected == 0, "torch counts it now: move it among the others"
    else:
        assert macs == expected


WORK = {
    "softmax": (lambda x: x.softmax(1), (r(2, 8),), 5 * 16),
    "sum to one": (lambda x: x.sum(1), (r(2, 8),), 16),
    "layer norm": (nn.LayerNorm(8), (r(2, 8),), 7 * 16),
    "einsum without a sum": (lambda a, b: torch.einsum("i,j->ij", a, b), (r(3), r(4)), 12),
    "einsum, a sum": (lambda a: torch.einsum("ij->i", a), (r(3, 4),), 12),
    "einsum, a trace": (lambda a: torch.einsum("ii->", a), (r(3, 3),), 3),
    "einsum, a diagonal": (lambda a: torch.einsum("ii->i", a), (r(3, 3),), 0),
    "einsum, a transpose": (lambda a: torch.einsum("...ij->...ji", a), (r(2, 3, 4),), 0),
    "einsum, sums of both": (lambda a, b: torch.einsum("ab,cd->a", a, b), (r(2, 3), r(4, 5)), 6 + 20 + 2),
    "einsum, of one row": (lambda a, b: torch.einsum("ab,bc->ac", a, b), (r(2, 1), r(1, 3)), 6),
    "norm of the batch": (nn.BatchNorm2d(3, track_running_stats=False), (r(2, 3, 4, 4),), 7 * 96),
    "norm of the past": (nn.BatchNorm2d(3), (r(2, 3, 4, 4),), 2 * 96),
    "fft, all dimensions": (lambda x: torch.fft.fftn(x).real, (r(4, 8, 8),), 5 * 256 * 8),
    "fft, the last dimensions": (lambda x: torch.fft.fftn(x, s=(8, 8)).real, (r(4, 8, 8),), 7_680),
    "fft, cut": (lambda x: torch.fft.fft(x, n=8).real, (r(4, 16),), 4 * 5 * 8 * 3),
    "fft, padded": (lambda x: torch.fft.fft(x, n=32).real, (r(4, 16),), 4 * 5 * 32 * 5),
    "fft of real numbers": (lambda x: torch.fft.rfft(x).real, (r(4, 16),), 4 * 5 * 16 * 4 // 2),
    "fft of real numbers, cut": (lambda x: torch.fft.rfft2(x, s=(4, 8)).real, (r(4, 16, 16),), 4 * 5 * 32 * 5 // 2),
    "fft to real numbers": (lambda x: torch.fft.irfft(x), (torch.complex(r(4, 9), r(4, 9)),), 4 * 5 * 16 * 4 // 2),
    "fft": (lambda x: torch.fft.fft(x).real, (r(4, 16),), 5 * 16 * 4 * 4),
    "comparison and logic": (lambda x: (x > 0) & (x < 1) | ~(x == 2), (r(2, 8),), 6 * 16),
    "cumulative": (lambda x: x.cumsum(1).cumprod(1), (r(2, 8),), 2 * 16),
    "differences": (lambda x: x.diff(), (r(2, 8),), 14),
    "root mean square norm": (lambda x: x * torch.rsqrt(x.pow(2).mean(1, True) + 1), (r(2, 8),), 64 + 16 + 2 + 8 + 16),
    "buckets": (lambda x: torch.bucketize(x, torch.arange(7.0)), (r(2, 8),), 3 * 16),
    "grid sampling": (F.grid_sample, (r(1, 3, 4, 4), r(1, 5, 5, 2)), 7 * 75),
    "grid sampling, nearest": (lambda x, g: F.grid_sample(x, g, "nearest"), (r(1, 3, 4, 4), r(1, 5, 5, 2)), 0),
    "variance and mean": (lambda x: torch.var_mean(x, 1)[0], (r(2, 8),), 48),
    "distances": (torch.cdist, (r(3, 4), r(5, 4)), 3 * 15 * 4),
    "lerp": (torch.lerp, (r(2, 8), r(2, 8), r(2, 8)), 48),
    "sum of products": (torch.addcmul, (r(2, 8), r(2, 8), r(2, 8)), 32),
    "folding": (lambda x: F.fold(x, (4, 4), 2), (r(1, 12, 9),), 108),
    "indexed addition": (
        lambda x, i: x.index_add(0, i, torch.ones_like(x[:2])), (r(3, 4), torch.tensor([0, 1])), 8),
    "moving data": (
        lambda x: torch.triu(F.unfold(x, 2).roll(1).repeat_interleave(2, 0)).new_ones(3), (r(1, 3, 4, 4),), 0),
    "meshes": (lambda x: torch.meshgrid(x, torch.arange(3.0), indexing="ij")[0].type_as(x), (r(4),), 0),
    "weight norm": (lambda v, g: torch._weight_norm(v, g, 0), (r(4, 8), r(4, 1)), 4 * 32),
    "bags of rows": (
        lambda w, i: F.embedding_bag(i, w), (r(9, 4), torch.zeros(2, 3, dtype=torch.long)), 24),
    "scatter": (
        lambda x, i: torch.zeros(2, 5).scatter_add(1, i, x), (r(2, 3), torch.zeros(2, 3, dtype=torch.long)), 6),
}  # fmt: skip


@pytest.mark.parametrize("case", WORK)
def test_element_wise_work(case: str) -> None:
    work, inputs, flops = WORK[case]
    found = cost_of(work, *inputs)  # type: ignore[arg-type]
    assert (found.macs, found.flops, found.uncounted) == (0, flops, {})


@settings(max_examples=40, deadline=None)
@given(
    terms=st.lists(st.lists(st.sampled_from("abcd"), max_size=3).map("".join), min_size=1, max_size=3),
    data=st.data(),
)
def test_einsum_multiplies_as_pytorch_does(terms: list[str], data: st.DataObject) -> None:
    """Every index has a size of its own, at times one. The second count: the products that PyTorch dispatches."""
    sizes = dict(zip("abcd", data.draw(st.permutations([1, 2, 3, 5])), strict=True))
    out = "".join(data.draw(st.permutations(sorted(set("".join(terms))))))[: data.draw(st.integers(0, 4))]
    operands = [torch.zeros([sizes[index] for index in term], device="meta") for term in terms]
    equation = f"{','.join(terms)}->{out}"
    with FlopCounterMode(display=False) as counter:
        torch.einsum(equation, *operands)
    assert einsum(equation, [x.shape for x in operands])[0] == counter.get_total_flops() // 2


@pytest.mark.parametrize("mask", [None, (2, 1, 5, 7)])
def test_the_softmax_of_attention_is_of_every_score(mask: tuple[int, ...] | None) -> None:
    """One query for two: scores (2, 4, 5, 7), six operations each; as many where the mask alone has two."""
    key, held = (r(2 if mask is None else 1, 4, 7, 16), () if mask is None else (r(*mask),))
    cost = cost_of(lambda q, k, *mask: F.scaled_dot_product_attention(q, k, k, *mask), r(1, 4, 5, 16), key, *held)
    assert cost.flops - 2 * cost.macs == 6 * 2 * 4 * 5 * 7
    assert cost.macs == (2 + (2 if mask is None else 1)) * 4 * 5 * 7 * 16


def test_a_lookup_reads_the_rows_it_returns() -> None:
    net, words = nn.Embedding(1000, 8), torch.zeros(2, 5, dtype=torch.long)
    assert cost_of(net, words).access_bytes == 10 * 8 + 2 * 10 * 8 * 4


def test_what_has_no_formula_is_named() -> None:
    assert set(cost_of(lambda x: torch.linalg.inv(x), r(3, 3)).uncounted) == {"linalg_inv"}
