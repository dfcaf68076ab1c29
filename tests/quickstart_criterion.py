"""What a finished quickstart run must have learned; check_quickstart.py and the test of its sharpness use it."""

from __future__ import annotations

MAX_EVAL_LOSS = 5.9  # nats, over all labelled tokens of the held-out windows
MIN_GAIN = 0.6  # nats, on [MASK] alone, against the training unigram counts
MAX_SECONDS = 300.0


def shortfalls(eval_loss: float, eval_mask_loss: float, unigram_loss: float) -> list[str]:
    """What is missing, empty when all is well.

    A network that does not look at the context can copy the labelled tokens that are shown unchanged; on
    [MASK] it knows nothing beyond the frequencies of tokens, so the second condition asks what only context
    can give. NaN fails.
    """
    found = []
    if not eval_loss <= MAX_EVAL_LOSS:
        found.append(f"held-out loss {eval_loss:.4f} is above {MAX_EVAL_LOSS}")
    if not unigram_loss - eval_mask_loss >= MIN_GAIN:
        found.append(
            f"held-out loss on [MASK] {eval_mask_loss:.4f} is {unigram_loss - eval_mask_loss:.4f} below the "
            f"unigram loss {unigram_loss:.4f}; at least {MIN_GAIN} is asked for"
        )
    return found
