"""One command that rebuilds the built-in model: `python -m training.build --minutes 60`.

It reads the sources, trains the tokenizer, the model and the draft, runs the gates, and with
`--install` puts the result into the package.
"""

import argparse
import json
import os
import platform
import shutil
import time
from itertools import islice
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer

from training import chat, data
from training import corpus as corpora
from training.model import DRAFT, MAIN, ModelConfig, count_parameters
from training.tokenizer import train_tokenizer
from training.train import TrainJob, TrainOptions, train

OUT = Path(__file__).with_name("out")
PACKAGE = Path(__file__).resolve().parents[1] / "src" / "quire" / "builtin"
TOKENIZER, DOCUMENTS, REPORT = OUT / "tokenizer.json", OUT / "documents.npz", OUT / "train.json"
SEED = 20261121
CONVERSATIONS_PER_MINUTE = 2200  # about what two cores consume
PROSE_SHARE = 0.08  # of the tokens
FINE_TUNE_PROSE_SHARE = 0.03


def make_tokenizer(corpus: corpora.Corpus, prose: list[str]) -> Tokenizer:
    """Trained on conversations mostly: those are what it will encode."""
    chats = corpora.conversations(corpus.generators, count=12000, seed=SEED + 1)
    return train_tokenizer([*chats, *Random(SEED).sample(prose, len(prose) // 8)])


def make_documents(
    corpus: corpora.Corpus,
    tokenizer: Tokenizer,
    prose: list[str],
    *,
    minutes: float,
    prose_share: float = PROSE_SHARE,
) -> tuple[list[data.Document], dict[str, int]]:
    """Encoded conversations and prose in the right shares, and the tokens of each."""
    count = max(2000, int(minutes * CONVERSATIONS_PER_MINUTE))
    chats = corpora.conversations(corpus.generators, count=count, seed=SEED)
    documents: list[data.Document] = []
    while batch := list(islice(chats, 5000)):
        documents += data.encode_chat(tokenizer, batch)
    chat_tokens = sum(len(d.ids) for d in documents)
    wanted = chat_tokens * prose_share / (1 - prose_share)
    pieces = data.encode_prose(tokenizer, prose)
    Random(SEED).shuffle(pieces)
    prose_tokens = 0
    for piece in pieces:
        if prose_tokens >= wanted:
            break
        documents.append(piece)
        prose_tokens += len(piece.ids)
    return documents, {"chat": chat_tokens, "prose": prose_tokens}


def write_sources(corpus: corpora.Corpus, tokens: dict[str, int]) -> None:
    listing = {
        s.name: {"licence": s.licence, "characters": sum(map(len, s.pieces)), "files": s.files}
        for s in corpus.sources
    }
    text = json.dumps({"tokens": tokens, "sources": listing}, indent=1)
    (OUT / "sources.json").write_text(text + "\n")


def install(folder: str = "model") -> None:
    """Copy a finished model from `out` into the package."""
    target = PACKAGE / folder
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted((OUT / folder).iterdir()):
        if path.suffix in (".json", ".safetensors") and path.name != "figures.json":
            shutil.copyfile(path, target / path.name)


def start_from(source: Path) -> Tokenizer:
    """Copy the finished model and draft of `source` into `out`; the tokenizer stays as it is."""
    for folder in ("model", "draft"):
        (OUT / folder).mkdir(exist_ok=True)
        shutil.copyfile(source / folder / "model.safetensors", OUT / folder / "model.safetensors")
    return Tokenizer.from_file(str(source / "model" / "tokenizer.json"))


def prepare(minutes: float, source: Path | None) -> None:
    """Text, tokenizer and packed documents for a run of this length, into `out/`."""
    corpus = corpora.build_corpus()
    prose, _ = corpus.split_prose()
    prose_share = PROSE_SHARE
    if source:
        tokenizer = start_from(source)
        corpus.generators.shares, prose_share = chat.FINE_TUNE_SHARES, FINE_TUNE_PROSE_SHARE
    else:
        tokenizer = make_tokenizer(corpus, prose)
    tokenizer.save(str(TOKENIZER))
    documents, tokens = make_documents(
        corpus, tokenizer, prose, minutes=minutes, prose_share=prose_share
    )
    data.save_documents(documents, DOCUMENTS)
    write_sources(corpus, tokens)
    print("tokens", tokens, "documents", len(documents), flush=True)


def run(name: str, config: ModelConfig, minutes: float, args: argparse.Namespace) -> None:
    """Train one of the two models and note its figures in `out/train.json`."""
    print(name, count_parameters(config), "parameters", flush=True)
    seed = SEED + 1 if args.resume else SEED + 2 if args.source else SEED  # other orders
    resume = args.resume or args.source is not None
    options = TrainOptions(
        minutes=minutes, seed=seed, workers=args.workers, batch_tokens=args.batch_tokens
    )
    job = TrainJob(
        config, DOCUMENTS, TOKENIZER, OUT / name, options, not args.fp32, args.threads, resume
    )
    figures = train(job) | {"parameters": count_parameters(config)}
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%F"),
    }
    report = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    how = " (resumed)" if args.resume else " (fine-tuned)" if args.source else ""
    report |= {name + how: figures, "machine": machine}
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    if args.install:
        install(name)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=60, help="training time of the main model")
    add("--draft-minutes", type=float, help="default: a sixth of --minutes")
    add("--workers", type=int, default=2, help="processes of one thread each")
    add("--threads", type=int, default=1, help="threads where --workers is 1")
    add("--batch-tokens", type=int, default=data.BATCH_TOKENS, help="tokens of a worker's step")
    add("--fp32", action="store_true", help="train in fp32, where bf16 is slow")
    add("--only", choices=("model", "draft"), help="reuse out/ for the rest")
    add("--from", dest="source", type=Path, metavar="DIR",
        help="fine-tune the model and the draft in DIR, such as src/quire/builtin")  # fmt: skip
    add("--resume", action="store_true", help="go on from the weights in out/; with --only")
    add("--install", action="store_true", help="copy the result into the package")
    add("--no-gates", action="store_true", help="skip the evaluation")
    args = parser.parse_args()
    if args.resume and not args.only:
        parser.error("--resume goes on with one model: add --only model or --only draft")
    if args.source and args.only:
        parser.error("--from fine-tunes model and draft: leave --only out, or use --resume")
    return args


def main() -> None:
    args = arguments()
    OUT.mkdir(exist_ok=True)
    if not args.only:
        REPORT.unlink(missing_ok=True)
        prepare(args.minutes, args.source)
    if args.only != "draft":
        run("model", MAIN, args.minutes, args)
    if args.only != "model":
        default = args.minutes if args.only else args.minutes / 6
        run("draft", DRAFT, default if args.draft_minutes is None else args.draft_minutes, args)
    if not args.no_gates:
        from training import evaluate

        evaluate.main(["--model", str(OUT / "model"), "--draft", str(OUT / "draft")])


if __name__ == "__main__":
    main()
