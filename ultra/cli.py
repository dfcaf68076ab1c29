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

import ultra
from ultra.errors import UserError


def train(args: argparse.Namespace) -> int:
    from ultra.config import load_config

    cfg = load_config(args.config, args.overrides)  # before the slow import: errors come at once

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
            texts += args.input.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--input {args.input}: {error}") from None
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

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
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
        sub.add_argument("run", metavar="RUN", type=Path, help="a run folder or one of its checkpoints")
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


def sleep_while_waiting() -> None:
    """OpenMP threads spin only briefly between parallel regions, unless the user has chosen otherwise.

    It has to be said before torch is imported. Threads that spin for milliseconds fight for the cores as soon as
    anything else runs: one busy process beside it made a training step on 2 cores 15 times slower, with this limit
    4 times; alone on the machine both take the same time (docs/LOG.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def entry_point() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
