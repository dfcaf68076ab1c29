"""Train from Python on the built-in corpus, then use the model.

python examples/train_from_python.py [STEPS] [RUN_DIR]
"""

from __future__ import annotations

import sys
from pathlib import Path

import ultra
from ultra.config import load_config
from ultra.train import train


def main(steps: int = 300, run_dir: Path = Path("runs/from-python")) -> int:
    cfg = load_config(
        "quickstart",
        [
            "model.layer_pattern=[retnet, standard_attn]",
            "model.num_layers=2",
            "model.vocab_size=1000",
            "training.max_samples=500",
            "training.eval_samples=32",
            f"training.scheduler_total_steps={steps}",
            f"training.val_interval={max(steps // 4, 1)}",
            f"training.cache_dir={run_dir / 'cache'}",
        ],
    )
    code = train(cfg, run_dir=run_dir)  # goes on from the newest checkpoint if there is one
    if code != 0:
        return code
    model = ultra.load(run_dir)
    for token, probability in model.fill_mask("Return the [MASK] of the list.")[0]:
        print(f"{probability:.4f}  {token!r}")
    print("embeddings", model.embed(["a text", "another text"]).shape)
    print("held-out", model.evaluate())
    return 0


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main(*[int(a) for a in given[:1]], *[Path(a) for a in given[1:2]]))
