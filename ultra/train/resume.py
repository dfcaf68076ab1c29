"""Where a run starts: which checkpoint, and whether it fits the config."""

from __future__ import annotations

import logging
from pathlib import Path

from tokenizers import Tokenizer

from ultra.config.load import load_config
from ultra.config.run import RunConfig
from ultra.data.tokenizer import load_tokenizer
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


def changes(cfg: RunConfig, path: Path, section: str) -> dict[str, str]:
    """Field -> "a there, now b" for what differs between `cfg` and the config beside the weights in `path`."""
    old = load_config(path / "config.yaml").model_dump(mode="json")[section]
    new = cfg.model_dump(mode="json")[section]
    return {
        key: f"{section}.{key}: {old.get(key)} in the checkpoint, now {value}"
        for key, value in new.items()
        if old.get(key) != value
    }


def refuse_other_model(cfg: RunConfig, path: Path) -> None:
    """Raises UserError where the checkpoint's config describes another network; other changes are logged."""
    model, training = changes(cfg, path, "model"), changes(cfg, path, "training")
    fatal = [line for key, line in model.items() if key not in FREE_ON_RESUME]
    if cfg.model.use_moe and "moe_balance" in model and cfg.model.model_dump()["moe_balance"] == "aux":
        fatal.append(f"{model['moe_balance']}, which has no place for its selection bias; both keeps it")
    if fatal:
        raise UserError(
            f"cannot resume from {path}, its network is another one:\n  " + "\n  ".join(fatal)
            + "\nUndo these changes, or take another --run-dir"
        )  # fmt: skip
    for line in (*model.values(), *training.values()):
        log.warning("changed since the checkpoint: %s", line)


def warn_of_other_model(cfg: RunConfig, path: Path) -> None:
    """Name the fields that change the function of init_from's weights though every shape fits, such as num_heads."""
    if (path / "config.yaml").is_file():
        for key, line in changes(cfg, path, "model").items():
            if key not in FREE_ON_RESUME:
                log.warning("init_from: %s; the weights fit, but they were trained as another function", line)


def with_tokenizer_of(cfg: RunConfig, path: Path) -> RunConfig:
    """`cfg`, where training.init_from is set, with the tokenizer of the weights that the run starts or goes on from.

    One trained on the new text would give other ids to the same words. Raises UserError when the config names another
    one, or when the folder has none.
    """
    t = cfg.training
    if t.init_from is None:
        return cfg
    if t.tokenizer is not None:
        refuse_other_vocabulary(load_tokenizer(t.tokenizer).tokenizer, path)
        return cfg
    tokenizer = str(tokenizer_file(path))
    log.info("tokenizer %s", tokenizer)
    return cfg.model_copy(update={"training": t.model_copy(update={"tokenizer": tokenizer})})


def refuse_other_vocabulary(tokenizer: Tokenizer, path: Path) -> None:
    """Raises UserError unless the tokenizer.json of the folder gives the same ids to the same tokens."""
    file = tokenizer_file(path)
    if Tokenizer.from_file(str(file)).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{path} was trained with another vocabulary; set training.tokenizer={file}")


def tokenizer_file(path: Path) -> Path:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{path} has no tokenizer.json; put the one that its weights were trained with there")
    return file
