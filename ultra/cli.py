"""The command line: parse, load, call. Exit codes: 0 done, 1 error, 2 bad config or usage, 75 interrupted and
resumable, 130 interrupted.

Every command imports what it needs inside its function, so that `ultra --help` answers without torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ultra
from ultra.errors import UserError


def train(args: argparse.Namespace) -> int:
    from ultra.config import load_config

    cfg = load_config(args.config, args.overrides)  # before the slow import: errors come at once

    keep_freed_memory()
    from ultra.train import train as run

    return run(cfg, run_dir=args.run_dir or Path("runs") / Path(args.config).stem, resume=args.resume)


def evaluate(args: argparse.Namespace) -> int:
    import json

    print(json.dumps(ultra.load(args.run, args.which).evaluate(args.samples), indent=2))
    return 0


def fill_mask(args: argparse.Namespace) -> int:
    masks = ultra.load(args.run, args.which).fill_mask(args.text, top_k=args.top_k)
    for number, ranked in enumerate(masks, start=1):
        if len(masks) > 1:
            print(f"mask {number}")
        for token, probability in ranked:
            # quoted where there is something to see: white space, or a word that joins what stands before it
            shown = token[1:] if token[:1] == " " and token[1:].isprintable() and token[1:] else repr(token)
            print(f"{probability:8.4f}  {shown}")
    return 0


def embed(args: argparse.Namespace) -> int:
    import json

    texts = list(args.text)
    if args.input is not None:
        try:
            lines = args.input.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--input {args.input}: {error}") from None
        lines = [] if lines == [""] else [line.removesuffix("\r") for line in lines]
        if blank := next((n for n, line in enumerate(lines, start=1) if not line.strip()), None):
            raise UserError(f"{args.input}:{blank}: the line is empty; remove it")
        texts += lines
    if not texts:
        raise UserError("nothing to embed: give texts, or --input FILE with one text a line")
    if args.output is not None and args.output.suffix != ".npy":
        raise UserError(f"--output {args.output}: embeddings are written as a NumPy array; name a .npy file")
    vectors = ultra.load(args.run, args.which).embed(texts)
    if args.output is None:
        for text, vector in zip(texts, vectors.tolist(), strict=True):
            print(json.dumps({"text": text, "embedding": vector}, ensure_ascii=False))
    else:
        import numpy as np

        try:
            np.save(args.output, np.asarray(vectors))
        except OSError as error:
            raise UserError(f"--output {args.output}: {error}") from None
        print(f"{len(texts)} embeddings in {args.output}")
    return 0


def export(args: argparse.Namespace) -> int:
    from ultra.export import save_ternary, save_weights
    from ultra.inference import load

    save = {"safetensors": save_weights, "ternary": save_ternary}[args.format]
    print(save(load(args.run, args.which, device="cpu"), args.out))
    return 0


def data_inspect(args: argparse.Namespace) -> int:
    from ultra.config import load_config

    cfg = load_config(args.config, args.overrides)

    from ultra.data.inspect import inspect

    log_to_stderr()
    print(inspect(cfg, args.samples))
    return 0


def data_build(args: argparse.Namespace) -> int:
    from ultra.config import load_config

    cfg = load_config(args.config, args.overrides)

    from ultra.data.build import build

    return until_stopped(lambda should_stop: build(cfg, should_stop), "what is filled stays; the same command goes on")


def tokenizer_train(args: argparse.Namespace) -> int:
    from ultra.data.train_tokenizer import run

    def train(should_stop: Callable[[], bool]) -> str:
        return run(
            args.source,
            args.overrides,
            kind=args.type,
            vocab_size=args.vocab_size,
            output=args.output,
            text_column=args.text_column,
            force=args.force,
            should_stop=should_stop,
        )

    return until_stopped(train, "nothing written")


def until_stopped(work: Callable[[Callable[[], bool]], str], left: str) -> int:
    """Print the result of `work`, or what is `left` after SIGINT or SIGTERM: then 75, as after training."""
    from ultra.data.cache import Interrupted
    from ultra.train.signals import EXIT_INTERRUPTED, stop_on_signals

    log_to_stderr()
    try:
        with stop_on_signals() as stop:
            print(work(stop))
        return 0
    except Interrupted:
        print(f"interrupted; {left}", file=sys.stderr)
        return EXIT_INTERRUPTED


def log_to_stderr() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


def cache_folder(args: argparse.Namespace) -> Path:
    """DIR, else the cache_dir of --config, else the default one."""
    from ultra.config import TrainingConfig, load_config

    if args.dir is not None and args.config is not None:
        raise UserError("give DIR or --config, not both")
    if args.dir is not None:
        return Path(args.dir)
    training = TrainingConfig() if args.config is None else load_config(args.config).training
    return Path(training.cache_dir).expanduser()


def cache_ls(args: argparse.Namespace) -> int:
    from ultra.data.manage import listing

    print(listing(cache_folder(args)))
    return 0


def cache_verify(args: argparse.Namespace) -> int:
    from ultra.data.manage import verify

    folder = cache_folder(args)
    terminal = sys.stderr.isatty()
    verdict = verify(folder, lambda name: print(f"\r\033[K{name}", end="", file=sys.stderr) if terminal else None)
    if terminal:
        print("\r\033[K", end="", file=sys.stderr)
    for problem in verdict.damage:
        print(f"DAMAGED {problem}")
    if verdict.unchecked:
        print(f"no checksum recorded for {len(verdict.unchecked)} files, written by an earlier version:")
        print(*(f"  {name}" for name in verdict.unchecked), sep="\n")
    print(
        f"{verdict.files} files, {len(verdict.damage)} damaged, {len(verdict.unchecked)} without a checksum in {folder}"
    )
    if verdict.damage:
        print(f"`ultra cache rm {folder} KEY` removes a damaged cache (--all: everything); the next run fills it again")
    return 1 if verdict.damage else 0


def cache_rm(args: argparse.Namespace) -> int:
    from ultra.data.manage import remove

    keys = list(args.words)
    args.dir = keys.pop(0) if keys and args.config is None else None
    if args.dir is None and args.config is None:
        raise UserError("name what to remove: `ultra cache rm DIR KEY`, or `ultra cache rm DIR --all`")
    if bool(keys) == args.all:
        raise UserError("give KEYs or --all, not both" if keys else "give a KEY (see `ultra cache ls`), or --all")

    def confirm(question: str) -> bool:
        if args.yes:
            return True
        if not sys.stdin.isatty():
            raise UserError("nothing removed: there is no terminal to ask at; add --yes to remove")
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")

    print(remove(cache_folder(args), keys, everything=args.all, confirm=confirm))
    return 0


def estimate(args: argparse.Namespace) -> int:
    from ultra.config import load_config

    cfg = load_config(args.config, args.overrides)

    from ultra.estimate import estimate as run

    print(run(cfg))
    return 0


def doctor(args: argparse.Namespace) -> int:
    from ultra.doctor import report

    text, code = report()
    print(text)
    return code


def verify(args: argparse.Namespace) -> int:
    from ultra.train.checkpoint import verify as run

    results = run(args.path)
    for path, damage in results.items():
        print(f"{path}  {'whole' if damage is None else f'DAMAGED: {damage}'}")
    damaged = sum(damage is not None for damage in results.values())
    if damaged:
        print(f"{damaged} of {len(results)} checkpoints damaged; training resumes from the newest whole one")
    return 1 if damaged else 0


def schema(args: argparse.Namespace) -> int:
    from ultra.config.schema import schema_yaml

    sys.stdout.write(schema_yaml())
    return 0


def explain(args: argparse.Namespace) -> int:
    from ultra.config.load import explain as run

    print(run(args.field))
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="ultra", description="Pre-train, evaluate and serve hybrid masked-language-model encoders."
    )
    top.add_argument("--version", action="version", version=f"ultra {ultra.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, group: Any = commands
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = group.add_parser(name, help=text, description=text)
        sub.set_defaults(command=run, rest=None)
        return sub

    def config_arguments(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a preset")
        sub.add_argument(
            "overrides",
            metavar="key=value",
            nargs="*",
            default=[],
            help="such as model.num_layers=4 training.batch_size=2",
        )
        sub.set_defaults(rest="overrides")

    def run_arguments(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("run", metavar="RUN", type=Path, help="a run folder, one of its checkpoints, or an export")
        sub.add_argument(
            "--which",
            choices=["latest", "best"],
            default="latest",
            help="checkpoint of a run folder: newest, or lowest held-out loss; default: latest",
        )

    sub = command("train", train, "train the encoder that CONFIG describes")
    config_arguments(sub)
    sub.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<name of CONFIG>")
    sub.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: from the newest checkpoint in the run folder; default: auto",
    )
    sub = command("eval", evaluate, "held-out loss and accuracy of a trained model")
    run_arguments(sub)
    sub.add_argument("--samples", type=positive, metavar="N", help="windows; default: eval_samples of the run")
    sub = command("fill-mask", fill_mask, "rank the tokens for [MASK] in a text")
    run_arguments(sub)
    sub.add_argument("text", metavar="TEXT", help="text with [MASK] in it")
    sub.add_argument("--top-k", type=positive, default=5, metavar="K", help="tokens to print; default: 5")
    sub = command("embed", embed, "sentence embeddings, as JSON lines or a NumPy file")
    run_arguments(sub)
    sub.add_argument("text", metavar="TEXT", nargs="*", default=[], help="texts to embed")
    sub.set_defaults(rest="text")
    sub.add_argument("--input", type=Path, metavar="FILE", help="one text a line")
    sub.add_argument("--output", type=Path, metavar="FILE", help=".npy file; default: JSON lines on stdout")
    sub = command("export", export, "write a trained model in another form")
    run_arguments(sub)
    sub.add_argument(
        "--format",
        choices=["safetensors", "ternary"],
        default="safetensors",
        help="safetensors (the default): the weights as they are; ternary: those of BitNet at 2 bits each",
    )
    sub.add_argument("out", metavar="OUT", type=Path, help="folder to write, new or empty")
    data = commands.add_parser("data", help="look at the data of a configuration, or prepare it")
    about = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    sub = command("inspect", data_inspect, "counts, lengths, duplicates, waste and decoded masked samples", about)
    config_arguments(sub)
    sub.add_argument(
        "--samples", type=not_negative, default=5, metavar="N", help="training samples to show; default: 5"
    )
    sub.epilog = "Looks at what is cached; where nothing is, the first unit (dataset_batch_size documents) is filled."
    sub = command(
        "build", data_build, "fill the token cache completely; interrupted, it goes on where it stopped", about
    )
    config_arguments(sub)
    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer")
    about = tokenizer.add_subparsers(title="commands", metavar="COMMAND", required=True)
    sub = command("train", tokenizer_train, "train a tokenizer.json for training.tokenizer", about)
    sub.add_argument("source", metavar="SOURCE|CONFIG", help="a folder or file of text, `builtin`, or a configuration")
    sub.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="of CONFIG")
    sub.set_defaults(rest="overrides")
    sub.add_argument("--type", choices=["bpe", "wordpiece", "unigram"], default="bpe", help="default: bpe (byte-level)")
    sub.add_argument("--vocab-size", type=positive, metavar="N", help="default: of CONFIG, else 50000")
    sub.add_argument("--output", type=Path, required=True, metavar="FILE", help="such as tokenizer.json")
    sub.add_argument("--text-column", metavar="NAME", help="column of SOURCE that holds the text")
    sub.add_argument("--force", action="store_true", help="replace FILE")
    cache = commands.add_parser("cache", help="list, verify or remove token caches")
    about = cache.add_subparsers(title="commands", metavar="COMMAND", required=True)
    folder = "a cache_dir; default: that of --config, else the default one"
    for name, run, text in (
        ("ls", cache_ls, "what a cache_dir holds"),
        ("verify", cache_verify, "compare every byte with its checksum; exit code 1: something is damaged"),
    ):
        sub = command(name, run, text, about)
        sub.add_argument("dir", metavar="DIR", nargs="?", help=folder)
        sub.add_argument("--config", metavar="CONFIG", help="the configuration whose cache_dir is meant")
    sub = command("rm", cache_rm, "remove caches; asks first, and never while a process fills one of them", about)
    sub.usage = "ultra cache rm [--yes] (DIR | --config CONFIG) (KEY ... | --all)"
    sub.add_argument("words", metavar="DIR KEY", nargs="*", default=[], help="a cache_dir, then beginnings of keys")
    sub.set_defaults(rest="words")
    sub.add_argument("--config", metavar="CONFIG", help="the configuration whose cache_dir is meant, instead of DIR")
    sub.add_argument("--all", action="store_true", help="every cache, the trained tokenizers and the index")
    sub.add_argument("--yes", action="store_true", help="do not ask")
    sub = command("estimate", estimate, "parameters, memory and disk space of CONFIG, without training")
    config_arguments(sub)
    sub = command("verify", verify, "compare every byte of a run's checkpoints with their checksums")
    sub.add_argument("path", metavar="PATH", type=Path, help="a run folder or one of its checkpoints")
    command("doctor", doctor, "what is installed, which backends run, and what would fix the rest")
    command("schema", schema, "the JSON Schema of the configuration, as YAML")
    config = commands.add_parser("config", help="about the fields of a configuration")
    about = config.add_subparsers(title="commands", metavar="COMMAND", required=True)
    sub = about.add_parser("explain", help="describe one field: meaning, values, default")
    sub.add_argument("field", metavar="FIELD", help="such as hidden_size or training.batch_size")
    sub.set_defaults(command=explain, rest=None)
    return top


def positive(text: str) -> int:
    """argparse type: an integer above 0."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer above 0")
    return value


def not_negative(text: str) -> int:
    """argparse type: an integer from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0")
    return int(text)


def sleep_while_waiting() -> None:
    """OpenMP threads spin only briefly between parallel regions, unless the user has chosen otherwise.

    It has to be said before torch is imported. Threads that spin for milliseconds fight for the cores as soon as
    anything else runs: one busy process beside it made a training step on 2 cores 15 times slower, with this limit
    4 times; alone on the machine both take the same time (docs/LOG.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def keep_freed_memory() -> bool:
    """Tells glibc to keep what tensors free for the next ones, unless the user has set or replaced its allocator.

    By default every large tensor is mapped anew, and its pages are cleared when they are first touched: a third of the
    time that `standard` spends in the system. Steps on a CPU are 1.1 to 1.15 times as fast, and take up to 1.04 of the
    memory (docs/LOG.md). Returns whether it did so.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # malloc.h
    chosen = [name for name in os.environ if name.startswith("MALLOC_")]
    if not sys.platform.startswith("linux") or chosen or {"LD_PRELOAD", "GLIBC_TUNABLES"} & os.environ.keys():
        return False
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28))
    return mallopt is not None and all([mallopt(*setting) == 1 for setting in settings])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; usage errors, --help and --version return as well."""
    try:
        top = parser()
        # argparse reads "*" arguments in one place: `CONFIG --run-dir DIR key=value` leaves the last over.
        args, late = top.parse_known_args(argv)
        stray = late if args.rest is None else [word for word in late if word.startswith("-")]
        if stray:
            top.error(f"unrecognized arguments: {' '.join(stray)}")
        if late:
            getattr(args, args.rest).extend(late)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    sleep_while_waiting()
    try:
        code: int = args.command(args)
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except (RuntimeError, ValueError) as error:
        backend = os.environ.get("ULTRA_BACKEND")
        if not backend or f"{backend!r}" not in str(error):  # as in "ULTRA_BACKEND='foo' is unknown"
            raise
        print(f"{error}\nULTRA_BACKEND is {backend} in this environment; unset it to run what fits", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def entry_point() -> None:
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has what it wanted, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        code = 141  # as the shell reports a process that SIGPIPE ended
    sys.exit(code)


if __name__ == "__main__":
    entry_point()
