"""Train one checkpoint of the family on a CPU, within a budget of wall time.

    python checkpoints/train.py --variant 6m --minutes 40 --seed 0 --out checkpoints/trireme-py-6m

The schedule follows the clock, not a number of steps: a slower machine takes fewer steps and still
ends with a learning rate of zero. `--teacher` distils from another checkpoint (the draft learns the
default's distribution, which is what speculation needs); `--grow` starts from a shallower one.
"""

import argparse
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW, Muon, Optimizer

if not __package__:  # started as a script: find the package, and only it, beside this file's folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from checkpoints.batches import Batch, TrainingText, batches
from checkpoints.corpus import read_corpus
from checkpoints.layout import load_checkpoint, save_checkpoint
from checkpoints.model import SHAPES, CausalLm, count_parameters
from checkpoints.tokenizer import train_tokenizer

WARMUP = 0.02
"""Share of the run in which the learning rate rises."""
CLIP_NORM = 1.0
REPORT_EVERY_S = 10.0
SAVE_EVERY_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one variant is trained."""

    learning_rate: float = 4e-3
    """Peak."""
    batch_tokens: int = 8192
    """Fewer take more steps of less effect out of the same time: right for short or slow runs."""
    weight_decay: float = 0.1
    teacher_weight: float = 0.75
    """Share of the loss that follows the teacher's distribution, where there is a teacher."""
    compiled: bool = True
    """Compiling takes half a minute and then almost doubles the speed."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands; saved with its state and quoted in the model card."""

    step: int = 0
    tokens: int = 0
    epoch: int = 0
    elapsed_s: float = 0.0
    """Time in training, compiling included, summed over resumed runs."""
    loss: float = math.nan
    """Mean over the last report's steps, nats per token, the teacher's share included."""


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of inputs, targets and positions."""


def make_loss(model: CausalLm, teacher: CausalLm | None, *, teacher_weight: float) -> Loss:
    """Cross-entropy with the text, mixed with the divergence from the teacher if there is one."""

    def loss(inputs: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(inputs, positions)
        log_probabilities = functional.log_softmax(logits.float().flatten(0, 1), dim=-1)
        cross_entropy = functional.nll_loss(log_probabilities, targets.flatten())
        if teacher is None:
            return cross_entropy
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            taught = teacher(inputs, positions)
        taught = functional.log_softmax(taught.float().flatten(0, 1), dim=-1)
        divergence = functional.kl_div(log_probabilities, taught, log_target=True, reduction="batchmean")
        return (1 - teacher_weight) * cross_entropy + teacher_weight * divergence

    return loss


def make_optimizers(model: CausalLm, *, weight_decay: float = 0.1) -> tuple[Optimizer, ...]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms.

    Muon's updates are scaled to the size of AdamW's, so one learning rate serves both.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    return (
        Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    )


def learning_rate_factor(progress: float) -> float:
    """Linear warm-up, then a cosine to zero at progress 1."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min((progress - WARMUP) / (1 - WARMUP), 1.0)))


def train_step(
    model: CausalLm,
    loss_of: Loss,
    optimizers: tuple[Optimizer, ...],
    batch: Batch,
    *,
    learning_rate: float,
) -> float:
    """One update; returns the loss before it, nats per token."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    loss = loss_of(batch.inputs, batch.targets, batch.positions)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def grow(shallow: CausalLm, deep: CausalLm) -> None:
    """Give `deep` the function of `shallow`: its layers, and between them new ones that add nothing.

    The widths must agree. New layers spread evenly; their last matrices start at zero, so they
    learn from the first step and disturb nothing before it.
    """
    old_layers, new_layers = len(shallow.model.layers), len(deep.model.layers)
    kept = {(index + 1) * new_layers // old_layers - 1: index for index in range(old_layers)}
    deep.model.embed_tokens.load_state_dict(shallow.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(shallow.model.norm.state_dict())
    for index, layer in enumerate(deep.model.layers):
        if index in kept:
            layer.load_state_dict(shallow.model.layers[kept[index]].state_dict())
        else:
            for name, parameter in layer.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    torch.nn.init.zeros_(parameter)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train one checkpoint on the standard library.")
    parser.add_argument("--variant", choices=SHAPES, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="wall time, compiling included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--state", type=Path, help="file that keeps what a longer run needs to go on")
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--teacher", type=Path, help="checkpoint to distil from")
    parser.add_argument("--grow", type=Path, help="shallower checkpoint of equal width to start from")
    parser.add_argument("--learning-rate", type=float, default=Recipe().learning_rate)
    parser.add_argument("--batch-tokens", type=int, default=Recipe().batch_tokens)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    recipe = Recipe(
        learning_rate=arguments.learning_rate,
        batch_tokens=arguments.batch_tokens,
        compiled=not arguments.no_compile,
    )

    corpus = read_corpus()
    tokenizer = train_tokenizer(module.text for module in corpus.training)
    text = TrainingText(corpus.training, tokenizer, seed=arguments.seed)
    model = CausalLm(SHAPES[arguments.variant])
    print(
        f"{arguments.variant}: {count_parameters(model):,} parameters; {len(corpus.training)} modules, "
        f"{text.source_tokens:,} tokens; {len(corpus.held_out)} modules held out",
        flush=True,
    )
    if arguments.grow:
        grow(load_checkpoint(arguments.grow)[0], model)
    teacher = load_checkpoint(arguments.teacher)[0].requires_grad_(False) if arguments.teacher else None
    optimizers = make_optimizers(model, weight_decay=recipe.weight_decay)
    progress = Progress()
    if arguments.resume:
        progress = _load_state(arguments.state, model, optimizers)

    def save() -> None:
        save_checkpoint(model, tokenizer, arguments.out)
        run = {
            "command": " ".join(["python", "checkpoints/train.py", *sys.argv[1:]]),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "parameters": count_parameters(model),
            **asdict(progress),
            "recipe": asdict(recipe),
        }
        (arguments.out / "training.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        if arguments.state:
            _save_state(arguments.state, model, optimizers, progress)

    loss_of = make_loss(model, teacher, teacher_weight=recipe.teacher_weight)
    if recipe.compiled:
        loss_of = torch.compile(loss_of, dynamic=False)
    _run(model, loss_of, optimizers, recipe, text, progress, budget_s=arguments.minutes * 60, save=save)
    save()


def _run(
    model: CausalLm,
    loss_of: Loss,
    optimizers: tuple[Optimizer, ...],
    recipe: Recipe,
    text: TrainingText,
    progress: Progress,
    *,
    budget_s: float,
    save: Callable[[], None],
) -> None:
    """Train until the budget is spent, reporting and saving now and then."""
    started_s = time.monotonic() - progress.elapsed_s
    reported_s = saved_s = progress.elapsed_s
    reported_tokens = progress.tokens
    losses: list[float] = []
    for batch in _stream(text, progress, batch_tokens=recipe.batch_tokens, budget_s=budget_s):
        rate = recipe.learning_rate * learning_rate_factor(progress.elapsed_s / budget_s)
        losses.append(train_step(model, loss_of, optimizers, batch, learning_rate=rate))
        progress.step += 1
        progress.tokens += batch.inputs.numel()
        progress.elapsed_s = time.monotonic() - started_s
        since_report_s = progress.elapsed_s - reported_s
        if since_report_s >= REPORT_EVERY_S:
            progress.loss = sum(losses) / len(losses)
            speed = (progress.tokens - reported_tokens) / since_report_s
            print(
                f"step {progress.step} tokens {progress.tokens:,} loss {progress.loss:.3f} "
                f"{speed:,.0f} tokens/s rate {rate:.1e} "
                f"ETA {(budget_s - progress.elapsed_s) / 60:.1f} min",
                flush=True,
            )
            losses.clear()
            reported_s, reported_tokens = progress.elapsed_s, progress.tokens
        if progress.elapsed_s - saved_s >= SAVE_EVERY_S:
            save()
            saved_s = progress.elapsed_s


def _stream(text: TrainingText, progress: Progress, *, batch_tokens: int, budget_s: float) -> Iterator[Batch]:
    """Batches, epoch after epoch, for as long as the budget lasts."""
    for epoch in itertools.count(progress.epoch):
        progress.epoch = epoch
        for batch in batches(text.epoch(epoch), batch_tokens=batch_tokens, seed=epoch):
            if progress.elapsed_s >= budget_s:
                return
            yield batch


def _save_state(path: Path, model: CausalLm, optimizers: tuple[Optimizer, ...], progress: Progress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
    }
    unfinished = path.with_suffix(".part")
    torch.save(state, unfinished)
    unfinished.replace(path)


def _load_state(path: Path, model: CausalLm, optimizers: tuple[Optimizer, ...]) -> Progress:
    """Restore a run; it goes on with the epoch after the one it was stopped in."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    progress = Progress(**state["progress"])
    progress.epoch += 1
    return progress


if __name__ == "__main__":
    main()
