"""Train the small Llama decoder on which reuse quality is measured.

    python -m cachetune.calibration.train_toy --out DIR --seed 0 --minutes 30
    python -m cachetune.calibration.train_toy --out DIR2 --init DIR --lr 1e-2 --minutes 4

The second form repairs one embedding row of saved weights (see `zero_header_row`). The learning
rate and the curriculum follow elapsed time, so the weights depend on the speed of the machine; the
seed fixes the initial weights and the stream of training data.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from .tasks import (
    ANSWER_0,
    ASK,
    HEADER_0,
    NOT_A_VALUE,
    TASK_NAMES,
    VOCAB_SIZE,
    TaskInstance,
    make_instance,
    pose,
    stream,
)

IGNORE = -100
CURRICULUM_CHUNKS = (1, 2, 4, 8)
LEVEL_DEADLINES = (0.15, 0.30, 0.45, 1.0)
LEVEL_UP_ACCURACY = 0.90
REHEARSAL_PROBABILITY = 0.15
TOKENS_PER_STEP = 4096
REPAIR_ZEROED_HEADERS = 0.30
WARMUP_STEPS, CLIP_NORM = 50, 1.0
LOSS_WEIGHTS = {"answer": 1.0, "resolved": 0.5, "key": 0.25, "lm": 0.25}
# The auxiliary heads read the residual stream before the layers that need the information.
KEY_DEPTH, RESOLVED_DEPTH = 2, 3
LOG_EVERY_STEPS = 20
SAVE_EVERY_S = 300.0


@dataclass(frozen=True)
class Batch:
    """Token ids and targets, all int64 [batch, tokens]; IGNORE where no target exists."""

    ids: Tensor
    answer: Tensor
    resolved: Tensor
    key: Tensor
    following: Tensor


def toy_config() -> LlamaConfig:
    """Four layers, width 128, 0.67 M parameters. The large initial std is what lets it train."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


class AuxiliaryHead(nn.Module):
    """Normalised linear read-out of a hidden state [..., width] to vocabulary logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, VOCAB_SIZE)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., VOCAB_SIZE]."""
        logits: Tensor = self.linear(functional.rms_norm(hidden, hidden.shape[-1:]))
        return logits


def collate(instances: list[TaskInstance]) -> Batch:
    """Targets for instances of equal shape: n chunks, then the suffix."""
    ids = np.array([[t for c in i.chunks for t in c] + list(i.suffix) for i in instances])
    n_context = sum(len(c) for c in instances[0].chunks)
    chunk_tokens = len(instances[0].chunks[0])
    answer, resolved, key, following = (np.full_like(ids, IGNORE) for _ in range(4))
    answer[:, n_context + np.array(instances[0].answer_positions)] = [i.answers for i in instances]
    meaning = np.array([[m for row in i.resolved for m in row] for i in instances])
    row, col = np.nonzero(meaning != NOT_A_VALUE)
    resolved[row, col] = meaning[row, col]
    key[row, col] = ids[row, col - 1]
    # Values are uniform noise and a chunk's first token follows nothing: neither is a target.
    following[:, : n_context - 1] = ids[:, 1:n_context]
    following[row, col - 1] = IGNORE
    following[:, chunk_tokens - 1 : n_context : chunk_tokens] = IGNORE
    return Batch(*(torch.from_numpy(a) for a in (ids, answer, resolved, key, following)))


def zero_some_headers(rng: np.random.Generator, one: TaskInstance) -> TaskInstance:
    """The same context with a share of its headers set to shift 0, asked anew."""
    zeroed = rng.random(len(one.chunks)) < REPAIR_ZEROED_HEADERS
    chunks = [
        tuple(HEADER_0 if zero and HEADER_0 <= t < ANSWER_0 else t for t in chunk)
        for chunk, zero in zip(one.chunks, zeroed, strict=True)
    ]
    return pose(rng, one.task, chunks)


def draw(rng: np.random.Generator, n_chunks: int, repair: bool) -> Batch:
    """A batch of about TOKENS_PER_STEP tokens, both tasks in equal parts."""
    pairs = max(1, TOKENS_PER_STEP // (2 * 70 * n_chunks))
    instances = [make_instance(rng, task, n_chunks) for task in TASK_NAMES * pairs]
    if repair:
        instances = [zero_some_headers(rng, one) for one in instances]
    return collate(instances)


def zero_header_row(model: LlamaForCausalLM) -> list[nn.Parameter]:
    """Freeze all but the input embedding of the shift-0 header, restarted at its siblings' mean.

    A header of shift 0 says what no header says, so training from scratch pushes its embedding
    away from the other headers' and the model then looks past it to an older one.
    """
    model.requires_grad_(False)
    weight = model.model.embed_tokens.weight
    weight[HEADER_0] = weight[HEADER_0 + 1 : ANSWER_0].mean(0)
    weight.requires_grad_(True)
    only_row = torch.zeros_like(weight)
    only_row[HEADER_0] = 1.0
    weight.register_hook(lambda gradient: gradient * only_row)
    return [weight]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the positions that have a target."""
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE)


def losses(
    model: LlamaForCausalLM, heads: nn.ModuleDict | None, batch: Batch
) -> tuple[Tensor, dict[str, float]]:
    """Weighted training loss and its parts; the accuracies are those of the two tasks' answers."""
    out = model(input_ids=batch.ids, output_hidden_states=True, use_cache=False)
    parts = {
        "answer": cross_entropy(out.logits, batch.answer),
        "lm": cross_entropy(out.logits, batch.following),
    }
    if heads is not None:
        resolved = heads["resolved"](out.hidden_states[RESOLVED_DEPTH])
        parts["resolved"] = cross_entropy(resolved, batch.resolved)
        parts["key"] = cross_entropy(heads["key"](out.hidden_states[KEY_DEPTH]), batch.key)
    total = torch.stack([LOSS_WEIGHTS[name] * part for name, part in parts.items()]).sum()
    asked = batch.answer != IGNORE
    right = (out.logits.argmax(-1) == batch.answer)[asked].float()
    scores = {name: part.item() for name, part in parts.items()}
    is_header = (torch.roll(batch.ids, 1, dims=1) == ASK["running_header"])[asked]
    scores["header_accuracy"] = right[is_header].mean().item()
    scores["recall_accuracy"] = right[~is_header].mean().item()
    return total, scores


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, seed: int, n_contexts: int, n_chunks: int = 8
) -> dict[str, dict[str, float | None]]:
    """Plain-forward accuracy and count per task, cross-chunk and local answers apart."""
    model.eval()
    result: dict[str, dict[str, float | None]] = {}
    for task in TASK_NAMES:
        rng = stream(f"evaluate/{task}", seed)
        tally = {True: [0, 0], False: [0, 0]}
        for _ in range(n_contexts):
            one = make_instance(rng, task, n_chunks)
            batch = collate([one])
            guess = model(input_ids=batch.ids).logits[0].argmax(-1)[batch.answer[0] != IGNORE]
            for cross, answer, got in zip(
                one.cross_chunk, one.answers, guess.tolist(), strict=True
            ):
                tally[cross][0] += int(answer == got)
                tally[cross][1] += 1
        result[task] = {}
        for cross, name in ((True, "cross"), (False, "local")):
            right, n = tally[cross]
            result[task] |= {f"{name}_accuracy": right / n if n else None, f"{name}_n": n}
    model.train()
    return result


def train(args: argparse.Namespace) -> tuple[LlamaForCausalLM, int]:
    """Train for `args.minutes`, writing the log and a rolling copy of the weights to `args.out`."""
    torch.manual_seed(args.seed)
    last = len(CURRICULUM_CHUNKS) - 1
    repair = args.init is not None
    heads = None
    if repair:
        model, level = LlamaForCausalLM.from_pretrained(args.init), last
        params = zero_header_row(model)
    else:
        model, level = LlamaForCausalLM(toy_config()), 0
        width = model.config.hidden_size
        heads = nn.ModuleDict({name: AuxiliaryHead(width) for name in ("resolved", "key")})
        params = [*model.parameters(), *heads.parameters()]
    # Decay would also move the rows that a repair must leave alone.
    decay = 0.0 if repair else 0.01
    optimiser = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=decay)
    rng = stream("repair" if repair else "train", args.seed)
    start_s = last_save_s = time.monotonic()
    step, running = 0, 0.0
    with (args.out / "training_log.jsonl").open("w") as log:
        if repair:
            log.write((args.init / "training_log.jsonl").read_text())
        while (done := (time.monotonic() - start_s) / (60 * args.minutes)) < 1.0:
            rate = args.lr * min(1.0, (step + 1) / WARMUP_STEPS)
            rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
            for group in optimiser.param_groups:
                group["lr"] = rate
            rehearse = level > 0 and rng.random() < REHEARSAL_PROBABILITY
            n_chunks = CURRICULUM_CHUNKS[int(rng.integers(level)) if rehearse else level]
            total, scores = losses(model, heads, draw(rng, n_chunks, repair))
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(params, CLIP_NORM)
            optimiser.step()
            step += 1
            if n_chunks == CURRICULUM_CHUNKS[level]:
                worst = min(scores["header_accuracy"], scores["recall_accuracy"])
                running = 0.9 * running + 0.1 * worst
            if step % LOG_EVERY_STEPS == 0:
                row = {"step": step, "minutes": round(done * args.minutes, 2)}
                row |= {"stage": len(args.previous), "chunks": n_chunks}
                rounded = {name: round(value, 4) for name, value in scores.items()}
                log.write(json.dumps(row | {"lr": round(rate, 6)} | rounded) + "\n")
                log.flush()
            if level < last and (running > LEVEL_UP_ACCURACY or done > LEVEL_DEADLINES[level]):
                level, running = level + 1, 0.0
            if time.monotonic() - last_save_s > SAVE_EVERY_S:
                model.save_pretrained(args.out)
                report = {"step": step, "evaluation": evaluate(model, args.seed + 1000, 8)}
                log.write(json.dumps(report) + "\n")
                last_save_s = time.monotonic()
    return model, step


def previous_stages(directory: Path) -> list[dict[str, object]]:
    """Records of the trainings that led to the weights in `directory`, oldest first."""
    record = json.loads((directory / "training.json").read_text())
    earlier = record.pop("previous_stages", [])
    return [*earlier, record]


def main() -> None:
    """Train, save the model and write what was done and reached to `training.json`."""
    parser = argparse.ArgumentParser(description="Train the small decoder for quality.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0, help="training time")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--init", type=Path, help="repair the weights in this directory")
    parser.add_argument("--contexts", type=int, default=60, help="contexts per final evaluation")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    args.previous = previous_stages(args.init) if args.init else []
    model, steps = train(args)
    model.save_pretrained(args.out)
    summary = {
        "command": f"python -m cachetune.calibration.train_toy --out DIR --seed {args.seed} "
        f"--minutes {args.minutes:g} --lr {args.lr:g}" + (" --init PREVIOUS" if args.init else ""),
        "seed": args.seed,
        "steps": steps,
        "minutes": args.minutes,
        "zeroed_headers": REPAIR_ZEROED_HEADERS if args.init else 0.0,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "evaluation_seed": args.seed + 2000,
        "evaluation_contexts": args.contexts,
        "evaluation": evaluate(model, args.seed + 2000, args.contexts),
        "previous_stages": args.previous,
    }
    (args.out / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    json.dump(summary["evaluation"], sys.stdout)
    print()


if __name__ == "__main__":
    main()
