"""Train one model for a number of minutes of wall-clock time, and leave a checkpoint at any moment.

The learning rate follows the clock and not the step count: on a busy machine the run makes fewer
steps, but it always ends decayed. Matrices inside the layers use Muon, all else AdamW.

Workers are processes of one thread each that average their gradients once a step. On cores shared
with other work this is twice as fast as one process of two threads, which would wait for the slower
core at every single operation.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from training.data import BATCH_TOKENS, Packer, load_documents
from training.model import Llama, ModelConfig, export_weights, import_weights
from training.muon import Muon
from training.tokenizer import END_OF_TEXT, IM_END, save_tokenizer

WARMUP = 0.02  # share of the time
DECAY_FROM = 0.55  # constant until here, then linearly to FINAL
FINAL = 0.03
RESUMED = 0.4  # where a resumed run begins
LOG_EVERY = 50


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How one model is trained."""

    minutes: float
    seed: int = 0
    matrix_lr: float = 4e-3  # Muon, scaled to AdamW's update size
    other_lr: float = 4e-3
    weight_decay: float = 0.02
    clip: float = 1.0
    checkpoint_minutes: float = 4.0
    workers: int = 2
    batch_tokens: int = BATCH_TOKENS  # of one worker


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One model to train: its shape, its text and where the result goes."""

    config: ModelConfig
    documents: Path  # written by `data.save_documents`
    tokenizer: Path
    directory: Path
    options: TrainOptions
    bf16: bool = True
    threads: int = 1
    resume: bool = False  # go on from the weights in `directory`

    @property
    def rendezvous(self) -> Path:
        """Where the workers find one another."""
        return (self.directory / "rendezvous").resolve()


def schedule(share: float, *, resumed: bool = False) -> float:
    """Learning-rate factor at a share of the time, from 0 to 1. A resumed run only decays."""
    if resumed:
        return RESUMED * (1 - share) + FINAL * share if share > WARMUP else 0.05
    if share < WARMUP:
        return max(share / WARMUP, 0.02)
    if share < DECAY_FROM:
        return 1.0
    rest = min(1.0, (share - DECAY_FROM) / (1 - DECAY_FROM))
    return 1.0 + (FINAL - 1.0) * rest


def write_model(model: Llama, tokenizer: Tokenizer, directory: Path) -> None:
    """A directory that `transformers` and Quire load."""
    save_tokenizer(tokenizer, directory)
    config = model.config.hf_config(bos=END_OF_TEXT, eos=IM_END, pad=END_OF_TEXT)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": [IM_END, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    partial = directory / "model.safetensors.part"
    save_file(export_weights(model), partial, metadata={"format": "pt"})
    partial.rename(directory / "model.safetensors")


def _optimizers(model: Llama, options: TrainOptions) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    return [
        Muon(matrices, lr=options.matrix_lr, weight_decay=options.weight_decay),
        torch.optim.AdamW(others, lr=options.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _average_gradients(model: Llama, workers: int) -> None:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.view(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= workers
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def _share_of_time(start: float, options: TrainOptions, workers: int) -> float:
    """Elapsed share of the budget, as worker 0 sees it, so that all stop at the same step."""
    share = torch.tensor([(time.monotonic() - start) / (options.minutes * 60)])
    if workers > 1:
        dist.broadcast(share, src=0)
    return float(share)


def _work(rank: int, job: TrainJob) -> None:
    """One worker. Worker 0 prints, writes checkpoints and, at the end, the figures."""
    options, workers = job.options, job.options.workers
    torch.set_num_threads(1 if workers > 1 else job.threads)
    if workers > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{job.rendezvous}", rank=rank, world_size=workers
        )
    torch.manual_seed(options.seed)
    model = Llama(job.config, seed=options.seed)
    if job.resume:
        import_weights(model, load_file(job.directory / "model.safetensors"))
    optimizers = _optimizers(model, options)
    base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    packer = Packer(load_documents(job.documents), seed=options.seed + rank)
    tokenizer = Tokenizer.from_file(str(job.tokenizer))
    start = saved = time.monotonic()
    step, smooth = 0, 0.0
    while (share := _share_of_time(start, options, workers)) < 1 or step < 2:
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(share, resumed=job.resume)
        ids, targets = packer.batch(options.batch_tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=job.bf16):
            loss = model.loss(ids, targets)
        loss.backward()
        if workers > 1:
            _average_gradients(model, workers)
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        value = loss.item()
        smooth = value if step == 1 else 0.98 * smooth + 0.02 * value
        if rank == 0 and step % LOG_EVERY == 0:
            elapsed = time.monotonic() - start
            speed = step * workers * options.batch_tokens / elapsed
            print(f"{elapsed:6.0f}s step {step} loss {smooth:.4f} {speed:.0f} tok/s", flush=True)
        if rank == 0 and time.monotonic() - saved > options.checkpoint_minutes * 60:
            write_model(model, tokenizer, job.directory)
            saved = time.monotonic()
    if rank == 0:
        write_model(model, tokenizer, job.directory)
        figures = {
            "steps": step,
            "tokens": step * workers * options.batch_tokens,
            "seconds": round(time.monotonic() - start),
            "loss": round(smooth, 4),
        }
        (job.directory / "figures.json").write_text(json.dumps(figures))
    if workers > 1:
        dist.destroy_process_group()


def train(job: TrainJob) -> dict[str, float]:
    """Run a job to its end; returns steps, tokens, seconds and the last smoothed loss."""
    job.directory.mkdir(parents=True, exist_ok=True)
    if job.options.workers == 1:
        _work(0, job)
    else:
        job.rendezvous.unlink(missing_ok=True)
        mp.start_processes(_work, args=(job,), nprocs=job.options.workers, start_method="spawn")
        job.rendezvous.unlink(missing_ok=True)
    figures: dict[str, float] = json.loads((job.directory / "figures.json").read_text())
    return figures
