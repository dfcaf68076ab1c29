"""A tokenising process: see ultra/data/encode.py. Reads requests from standard input until it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback

import numpy as np
from tokenizers import Tokenizer

from ultra.data.encode import encode, read_message, write_message
from ultra.data.tokenizer import vocabulary


def main() -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the trainer decides when this one ends
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    try:
        [content] = read_message(requests)
        setup = json.loads(content)
        vocab = vocabulary(Tokenizer.from_str(setup["tokenizer"]), where="the tokenizer", names=setup["names"])
        dtype = np.dtype(setup["dtype"])
        while True:
            lengths, joined = read_message(requests)
            try:
                ends = np.cumsum(np.frombuffer(lengths, np.int64)).tolist()
                text = joined.decode()
                found = encode(vocab, [text[a:b] for a, b in zip([0, *ends], ends, strict=False)], dtype)
            except Exception:  # told over there, where somebody reads it
                write_message(answers, traceback.format_exc().encode())
            else:
                write_message(answers, found.tokens, found.sizes.tobytes(), found.hashes.tobytes())
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the trainer has gone: nobody is left to flush for
