"""Where a run starts: which checkpoint, and whether it fits the config."""

from __future__ import annotations

import logging
from pathlib import Path

from tokenizers import Tokenizer

from ultra.config.load import load_config
from ultra.config.run import RunConfig
from ultra.errors import UserError
from ultra.train import checkpoint

log = logging.getLogger(__name__)

# Model fields that a resumed run may change: none of them alters the function that the weights define.
FREE_ON_RESUME = frozenset(
    {"dropout", "gradient_checkpointing", "ode_checkpoint", "bitnet_two_stage", "retention_chunk"}
    | {"moe_aux_loss", "moe_z_loss", "moe_balance", "moe_bias_rate", "init_std"}
)


def find_start(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, or None for a fresh run. `resume` is auto, never or a path."""
    existing = checkpoint.steps(run_dir)
    if resume == "never":
        if existing:
            raise UserError(f"{run_dir} already holds checkpoints; take another --run-dir, or --resume auto")
        return None
    if resume == "auto":
        found = checkpoint.latest(run_dir)
        if existing and found is None:
            raise UserError(
                f"all {len(existing)} checkpoints in {run_dir / 'checkpoints'} are damaged (reasons above); "
                "move that folder away to start afresh"
            )
        return found
    found = checkpoint.resolve(Path(resume))
    if not (found / "state.json").is_file():
        raise UserError(f"{found} holds weights only; start from them with training.init_from={found}")
    if existing and found.resolve().parent.parent != run_dir.resolve():
        raise UserError(f"{run_dir} already holds another run; take another --run-dir to go on from {found}")
    return found


def refuse_other_model(cfg: RunConfig, path: Path) -> None:
    """Raises UserError where the checkpoint's config describes another network; other changes are logged."""
    old = load_config(path / "config.yaml").model_dump(mode="json")
    new = cfg.model_dump(mode="json")
    lines: dict[bool, list[str]] = {True: [], False: []}
    for section in ("model", "training"):
        for key, value in new[section].items():
            if (before := old[section].get(key)) != value:
                fatal = section == "model" and key not in FREE_ON_RESUME
                lines[fatal].append(f"{section}.{key}: {before} in the checkpoint, now {value}")
    if lines[True]:
        raise UserError(
            f"cannot resume from {path}, its network is another one:\n  " + "\n  ".join(lines[True])
            + "\nUndo these changes, or take another --run-dir"
        )  # fmt: skip
    for line in lines[False]:
        log.warning("changed since the checkpoint: %s", line)


def refuse_other_vocabulary(tokenizer: Tokenizer, path: Path) -> None:
    """Raises UserError unless the tokenizer.json of the folder gives the same ids to the same tokens."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{path} has no tokenizer.json, so its vocabulary cannot be compared with this run's")
    if Tokenizer.from_file(str(file)).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{path} was trained with another vocabulary; set training.tokenizer={file}")
