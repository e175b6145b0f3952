"""CUDA kernels on one GPU: first that they are right, then how fast beside PyTorch and beside copying.

    .venv/bin/python -m benchmarks.gpu [--check-only] [--emulate]

Complete within ten minutes, compilation included. Each time is the median over replays of a CUDA graph that
launches the kernel many times, each time on other tensors, so that L2 holds none of them. Two baselines are
measured in the same run: PyTorch's own operator (cuBLAS, SDPA, ...), and the floor, the bytes that the kernel
must move at the rate at which this GPU copies. `--emulate` does the checks alone, small, on the CPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_decode
from benchmarks.fleet import write_result
from benchmarks.gpu_checks import (
    EXPERT_FORMATS,
    FORMATS,
    FULL,
    SMALL,
    check,
    mixed_states,
    random_batch,
    sampling_rows,
)
from trireme.kernels import cuda_elementwise, cuda_experts, cuda_host_memory, cuda_kv, cuda_ops, reference
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cuda_attention import paged_attention
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_expert_weights import PackedExperts
from trireme.kernels.cuda_launch import Launcher
from trireme.kernels.cuda_linear import low_bit_linear
from trireme.kernels.cuda_sampling import sample
from trireme.quant.device_layouts import DIRECT, PackedWeight
from trireme.quant.formats import weight_format

WORKING_SET_BYTES = 512 << 20
"""Tensors of one measurement together: several times the L2 of any GPU."""
REPLAYS = 9


def seconds(call: Callable[[int], object], copies: int) -> float:
    """Median time of one call, over replays of a graph of `copies` calls; call(i) uses the i-th tensors."""
    for index in range(copies):
        call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(copies):
            call(index)
    times = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / copies)
    return statistics.median(times)


def copies_of(num_bytes: int) -> int:
    """So many tensors that together they do not fit L2."""
    return max(4, min(64, math.ceil(WORKING_SET_BYTES / num_bytes)))


@dataclass(frozen=True, slots=True)
class Timer:
    """Times kernels against their baseline and the floor."""

    copy_bytes_per_s: float
    """Read and written together."""

    @staticmethod
    def measured(device: torch.device) -> Timer:
        source, target = torch.empty(2, 1 << 30, dtype=torch.uint8, device=device)
        return Timer(2 * source.numel() / seconds(lambda _: target.copy_(source), 4))

    def compare(
        self,
        ours: Callable[[int], object],
        theirs: Callable[[int], object] | None,
        *,
        copies: int,
        moved_bytes: float,
    ) -> dict[str, float]:
        """Microseconds, and how many times the floor and PyTorch's time that is."""
        ours_s, floor_s = seconds(ours, copies), moved_bytes / self.copy_bytes_per_s
        figures = {"us": ours_s * 1e6, "times_floor": ours_s / floor_s}
        if theirs is not None:
            theirs_s = seconds(theirs, copies)
            figures |= {"pytorch_us": theirs_s * 1e6, "times_faster": theirs_s / ours_s}
        return {name: round(value, 3) for name, value in figures.items()}


def measure_products(launcher: Launcher, device: torch.device, timer: Timer) -> dict[str, object]:
    """Low-bit products against bfloat16 ones by cuBLAS."""
    figures: dict[str, object] = {}
    for outputs, inputs in ((4096, 4096), (8192, 8192), (28672, 8192)):
        plain_bytes = 2 * outputs * inputs
        plain = torch.randn(copies_of(plain_bytes), outputs, inputs, dtype=torch.bfloat16, device=device)
        for name in FORMATS:
            packed = random_weight(name, outputs, inputs, device)
            words = len(packed.words) * 4 + packed.scales.numel() * 4
            weights = [replace(packed, words=packed.words.clone()) for _ in range(copies_of(words))]
            for tokens in (1, 8, 32, 128):
                x = torch.randn(tokens, inputs, dtype=torch.bfloat16, device=device)
                figures[f"{name} {outputs}x{inputs} {tokens}"] = timer.compare(
                    lambda i, x=x, weights=weights: low_bit_linear(launcher, x, weights[i % len(weights)]),  # type: ignore[misc]
                    lambda i, x=x, plain=plain: F.linear(x, plain[i % len(plain)]),  # type: ignore[misc]
                    copies=len(weights),
                    moved_bytes=words + 2 * tokens * (inputs + outputs),
                )
    return figures


def measure_wgmma(launcher: Launcher, device: torch.device, timer: Timer) -> dict[str, object]:
    """Low-bit products of many tokens by wgmma against those by mma.sync and against bfloat16 ones by cuBLAS.

    `same_bits` says whether the tensor cores add alike in both; `pays_from_tokens` is what
    `cuda_linear.WGMMA_TOKENS` should be for the weight, or null.
    """
    del timer  # the floor is arithmetic here, not copying
    figures: dict[str, object] = {}
    if not launcher.has_wgmma:
        return figures
    for outputs, inputs in ((4096, 4096), (8192, 8192), (28672, 8192)):
        plain = torch.randn(outputs, inputs, dtype=torch.bfloat16, device=device)
        for name in ("fp6_e3m2", "int8_ch", "int4_g32", "int4_g128_zeros"):
            packed = random_weight(name, outputs, inputs, device)
            weights = [replace(packed, words=packed.words.clone()) for _ in range(8)]
            times_faster: dict[int, float] = {}
            for tokens in (16, 32, 48, 64, 96, 128, 512, 2048):
                x = torch.randn(tokens, inputs, dtype=torch.bfloat16, device=device)
                by_wgmma_s, by_mma_s = (_product_s(launcher, x, weights, uses) for uses in (True, False))
                plain_s = seconds(lambda _, x=x, plain=plain: F.linear(x, plain), 4)  # type: ignore[misc]
                found, other = (
                    low_bit_linear(launcher, x, packed, uses_wgmma=uses) for uses in (True, False)
                )
                times_faster[tokens] = by_mma_s / by_wgmma_s
                figures[f"{name} {outputs}x{inputs} {tokens}"] = {
                    "us": round(by_wgmma_s * 1e6, 3),
                    "tflop_per_s": round(2e-12 * tokens * outputs * inputs / by_wgmma_s, 1),
                    "mma_us": round(by_mma_s * 1e6, 3),
                    "times_faster_than_mma": round(times_faster[tokens], 3),
                    "pytorch_us": round(plain_s * 1e6, 3),
                    "same_bits": torch.equal(found, other),
                }
            figures[f"{name} {outputs}x{inputs}"] = {"pays_from_tokens": pays_from(times_faster)}
    return figures


def _product_s(launcher: Launcher, x: Tensor, weights: Sequence[PackedWeight], uses_wgmma: bool) -> float:
    """Time of one product, over weights that L2 does not hold together."""
    return seconds(lambda i: low_bit_linear(launcher, x, weights[i], uses_wgmma=uses_wgmma), len(weights))


def pays_from(times_faster: Mapping[int, float]) -> int | None:
    """The least number of tokens from which all measured ones are faster; None: the largest is not."""
    slower = [tokens for tokens, factor in times_faster.items() if factor <= 1.0]
    return min((tokens for tokens in times_faster if tokens > max(slower, default=0)), default=None)


def random_weight(name: str, outputs: int, inputs: int, device: torch.device) -> PackedWeight:
    """Any codes and scales: their values do not change the time. Sizes are multiples of 128."""
    form = weight_format(name)
    per_scale = (outputs,) if form.group_size is None else (outputs, inputs // form.group_size)
    limits = torch.iinfo(torch.int32)
    words = outputs * inputs * form.bits // 32
    return PackedWeight(
        layout=DIRECT,
        form=form,
        shape=(outputs, inputs),
        words=torch.randint(limits.min, limits.max, (words,), dtype=torch.int32, device=device),
        scales=torch.rand(per_scale, device=device),
        zeros=torch.full(per_scale, 7, dtype=torch.uint8, device=device) if form.has_zeros else None,
    )


def measure_mixtures(launcher: Launcher, device: torch.device, timer: Timer) -> dict[str, object]:
    """All experts of a layer in one launch each, against a loop over them by cuBLAS.

    The loop is told which experts were chosen, so that it waits for nothing. The floor is one read of them.
    """
    figures: dict[str, object] = {}
    for num_experts, chosen, hidden, inner in ((8, 2, 4096, 14336), (128, 8, 2048, 768)):
        gate_up = torch.randn(num_experts, 2 * inner, hidden, dtype=torch.bfloat16, device=device) / 64
        down = torch.randn(num_experts, hidden, inner, dtype=torch.bfloat16, device=device) / 64
        for name in EXPERT_FORMATS:
            if name is None:
                packed = cuda_ops.pack_experts(list(gate_up), list(down))
            else:
                shapes = ((2 * inner, hidden), (hidden, inner))
                parts = [
                    [random_weight(name, *shape, device) for _ in range(num_experts)] for shape in shapes
                ]
                packed = cuda_ops.pack_experts(parts[0], parts[1])
            assert packed is not None
            for tokens in (1, 16, 128):
                figures[f"{name or 'bf16'} {num_experts}x{hidden}x{inner} {tokens}"] = _time_mixture(
                    launcher, timer, packed, gate_up, down, tokens=tokens, chosen=chosen
                )
    return figures


def _time_mixture(
    launcher: Launcher,
    timer: Timer,
    packed: tuple[PackedExperts, PackedExperts],
    gate_up: Tensor,
    down: Tensor,
    *,
    tokens: int,
    chosen: int,
) -> dict[str, float]:
    copies, (num_experts, _, hidden) = 8, gate_up.shape
    x, residual = torch.randn(2, tokens, hidden, dtype=gate_up.dtype, device=gate_up.device)
    logits = torch.randn(copies, tokens, num_experts, dtype=gate_up.dtype, device=gate_up.device)

    def choose(index: int) -> tuple[Tensor, Tensor]:
        return cuda_experts.choose_experts(launcher, logits[index], num_chosen=chosen, renormalises=True)

    choices = [choose(index) for index in range(copies)]
    groups = [
        [(expert, *(experts == expert).nonzero(as_tuple=True)) for expert in experts.unique().tolist()]
        for _, experts in choices
    ]

    def loop(index: int) -> Tensor:
        shares, out = choices[index][0], residual.clone()
        for expert, rows, places in groups[index]:
            made = reference.swiglu(F.linear(x[rows], gate_up[expert]))
            out.index_add_(0, rows, F.linear(made, down[expert]) * shares[rows, places, None])
        return out

    return timer.compare(
        lambda i: cuda_experts.mixture_add(launcher, x, *choose(i), *packed, residual),
        loop,
        copies=copies,
        moved_bytes=(packed[0].nbytes + packed[1].nbytes) * sum(map(len, groups)) / copies / num_experts,
    )


def measure_host_memory(launcher: Launcher, device: torch.device, timer: Timer) -> dict[str, object]:
    """Weights in pinned memory, read in place, against copying them first; the floor is one copy of them."""
    outputs, inputs, vocab, width = 8192, 8192, 131_072, 4096
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16).pin_memory()
    table = torch.randn(vocab, width, dtype=torch.bfloat16).pin_memory()
    landing = torch.empty_like(weight, device=device)
    copy_s = seconds(lambda _: landing.copy_(weight, non_blocking=True), 4)
    link = Timer(weight.nbytes / copy_s)
    figures: dict[str, object] = {"link_gb_per_s": round(link.copy_bytes_per_s / 1e9, 1)}
    for tokens in (1, 8):
        x = torch.randn(tokens, inputs, dtype=torch.bfloat16, device=device)
        figures[f"bf16 {outputs}x{inputs} {tokens}"] = link.compare(
            lambda _, x=x: cuda_host_memory.linear(launcher, x, weight),  # type: ignore[misc]
            lambda _, x=x: F.linear(x, landing.copy_(weight, non_blocking=True)),  # type: ignore[misc]
            copies=4,
            moved_bytes=weight.nbytes,
        )
    packed = random_weight("fp6_e2m3", outputs, inputs, device)
    host = replace(packed, words=packed.words.cpu().pin_memory())
    x = torch.randn(1, inputs, dtype=torch.bfloat16, device=device)
    figures[f"fp6_e2m3 {outputs}x{inputs} 1"] = link.compare(
        lambda _: cuda_host_memory.linear(launcher, x, host), None, copies=4, moved_bytes=host.words.nbytes
    )
    for tokens in (1, 512):
        indices = torch.randint(vocab, (tokens,), device=device)
        figures[f"embedding of {tokens}"] = link.compare(
            lambda _, indices=indices: cuda_host_memory.embedding(launcher, table, indices),  # type: ignore[misc]
            None,
            copies=4,
            moved_bytes=2 * tokens * width,
        )
    return figures


def measure_attention(launcher: Launcher, device: torch.device, timer: Timer) -> dict[str, object]:
    """Decode and prefill against SDPA over keys that lie side by side, which paged ones do not."""
    figures: dict[str, object] = {}
    heads, kv_heads, head_dim = 32, 8, 128
    for count, context, queries in (
        (1, 8192, 1),
        (16, 2048, 1),
        (64, 2048, 1),
        (4, 32768, 1),
        (1, 8192, 2048),
    ):
        batch, blocks = random_batch((queries,) * count, (context,) * count, device, torch.bfloat16)
        kv_bytes = 4 * count * context * kv_heads * head_dim
        copies = copies_of(kv_bytes)
        caches = torch.randn(copies, 2, blocks, 16, kv_heads, head_dim, dtype=torch.bfloat16, device=device)
        q = torch.randn(count * queries, heads, head_dim, dtype=torch.bfloat16, device=device)
        split_q = q.view(count, queries, heads, head_dim).transpose(1, 2)
        mask = None
        if queries > 1:
            mask = torch.ones(queries, context, dtype=torch.bool, device=device).tril(context - queries)

        def ours(index: int, q: Tensor = q, caches: Tensor = caches, batch: AttentionBatch = batch) -> Tensor:
            return paged_attention(
                launcher, q, caches[index, 0], caches[index, 1], batch, scale=head_dim**-0.5
            )

        def theirs(
            index: int, q: Tensor = split_q, caches: Tensor = caches, mask: Tensor | None = mask
        ) -> Tensor:
            k, v = caches[index].view(2, q.shape[0], -1, kv_heads, head_dim).transpose(2, 3)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        name = f"{count} sequences of {context}, {queries} queries each"
        figures[name] = timer.compare(ours, theirs, copies=copies, moved_bytes=kv_bytes + 4 * q.numel())
    return figures


def measure_elementwise(launcher: Launcher, device: torch.device, timer: Timer) -> dict[str, object]:
    """Fused kernels against the same by PyTorch's operators."""
    tokens, width = 4096, 8192
    element_bytes = 2 * tokens * width
    copies = copies_of(element_bytes)
    x, residual = torch.randn(2, copies, tokens, width, dtype=torch.bfloat16, device=device)
    weight = torch.randn(width, dtype=torch.bfloat16, device=device)
    blocks = x.view(copies, tokens // 16, -1)
    order = torch.randperm(tokens // 16, device=device)

    def add_rms_norm(index: int) -> Tensor:
        return F.rms_norm(residual[index].add_(x[index]), (width,), weight, 1e-5)

    return {
        "add_rms_norm": timer.compare(
            lambda i: cuda_elementwise.add_rms_norm(launcher, x[i], residual[i], weight, 1e-5),
            add_rms_norm,
            copies=copies,
            moved_bytes=4 * element_bytes,
        ),
        "swiglu": timer.compare(
            lambda i: cuda_elementwise.swiglu(launcher, x[i]),
            lambda i: reference.swiglu(x[i]),
            copies=copies,
            moved_bytes=1.5 * element_bytes,
        ),
        "copy_blocks": timer.compare(
            lambda i: cuda_kv.copy_blocks(
                launcher, blocks[i], residual[i].view(tokens // 16, -1), source_blocks=order
            ),
            lambda i: torch.index_select(blocks[i], 0, order),
            copies=copies,
            moved_bytes=2 * element_bytes,
        ),
    }


def measure_sampling(launcher: Launcher, device: torch.device, timer: Timer) -> dict[str, object]:
    """Mixed filters; PyTorch's time is that of a softmax and a full sort, the floor that of one read."""
    figures: dict[str, object] = {}
    for count in (1, 64):
        vocab = 128_256
        copies = copies_of(4 * count * vocab)
        logits = torch.randn(copies, count, vocab, device=device) * 3
        rows = sampling_rows(mixed_states(count, vocab, device), device)
        figures[f"{count} rows of {vocab}"] = timer.compare(
            lambda i, logits=logits, rows=rows: sample(launcher, logits[i], rows),  # type: ignore[misc]
            lambda i, logits=logits: logits[i].softmax(-1).sort(-1, descending=True),  # type: ignore[misc]
            copies=copies,
            moved_bytes=4 * count * vocab,
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check-only", action="store_true", help="measure nothing")
    parser.add_argument("--emulate", action="store_true", help="check on the CPU, in the emulator")
    args = parser.parse_args()
    device = torch.device("cpu") if args.emulate else torch.device("cuda", 0)
    if not args.emulate and not cuda_ops.is_available(device):
        parser.error(
            "no GPU of compute capability 8.0 or newer, or no cuda-bindings; --emulate needs neither"
        )
    with tempfile.TemporaryDirectory() as folder:
        launcher = Emulator(Path(folder), has_wgmma=True) if args.emulate else cuda_ops.launcher_of(device)
        sizes = SMALL if args.emulate else FULL
        # What no machine without a GPU can show comes first.
        checks = [] if args.emulate else gpu_decode.check_graphs(device)
        checks += gpu_decode.check_choices(launcher, device, vocab=sizes.vocab)
        checks += check(launcher, device, sizes)
    wrong = [result for result in checks if not result.error < 1.0]
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks passed")
    for result in wrong:
        print(f"WRONG {result.name}: {result.error:.3g} times what is allowed")
    if wrong:
        raise SystemExit(1)
    if args.emulate or args.check_only:
        return
    timer = Timer.measured(device)
    figures: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(device),
        "copy_gb_per_s": round(timer.copy_bytes_per_s / 1e9, 1),
        "largest_error": {result.name: round(result.error, 3) for result in checks},
    }
    for name, measure in (
        ("products", measure_products),
        ("wgmma", measure_wgmma),
        ("mixtures", measure_mixtures),
        ("host_memory", measure_host_memory),
        ("attention", measure_attention),
        ("elementwise", measure_elementwise),
        ("sampling", measure_sampling),
    ):
        figures[name] = measure(launcher, device, timer)
        print(name, figures[name], flush=True)
    figures["decode"] = gpu_decode.measure_decode(device, timer.copy_bytes_per_s)
    print("decode", figures["decode"], flush=True)
    print(write_result("gpu", figures))


if __name__ == "__main__":
    main()
