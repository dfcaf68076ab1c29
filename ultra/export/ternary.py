"""A BitNet model with its matrices at 2 bits a weight.

The folder holds model.safetensors, config.yaml, tokenizer.json and manifest.json with their checksums. The weights of
every BitLinear and MoE are stored as the codes and scales of a PackedBitLinear and PackedMoE, everything else in
float32 as trained: parameters, and the buffers too, which a model built without storage does not compute. Format
ternary-1 had the tensors of each expert apart, `w_in.3.codes`; it is still read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ultra.config import RunConfig
from ultra.errors import UserError
from ultra.export.weights import write_folder
from ultra.model import Encoder, build_model
from ultra.train import checkpoint
from ultra_kernels.nn import BitLinear, MoE, PackedMatrices

if TYPE_CHECKING:
    from ultra.inference import Pipeline


@dataclass(frozen=True)
class Exported:
    """What an export wrote; bytes of the ternary matrices, packed and as float32, and of the whole folder."""

    folder: Path
    matrices: int
    packed_bytes: int
    float_bytes: int
    disk_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.disk_bytes / 2**20:.1f} MiB on disk\n"
            f"{self.matrices} ternary matrices: {self.packed_bytes:,} bytes, {self.float_bytes:,} in float32 "
            f"(1/{self.float_bytes / self.packed_bytes:.1f})"
        )


def save_ternary(pipeline: Pipeline, out: str | Path) -> Exported:
    """Write the model of a pipeline with ternary weights; `ultra.load_ternary` reads it.

    out: a folder that is new or empty; it is there as a whole or not at all. Raises UserError for a model trained
    without use_bitnet, or where `out` cannot be written.
    """
    out = Path(out)
    layers = ternary_layers(pipeline.model)
    if not layers:
        again = checkpoint.is_ternary(pipeline.folder)
        why = "is exported already" if again else "was trained without BitNet; train it with model.use_bitnet=true"
        raise UserError(f"{pipeline.folder}: there are no weights to make ternary: the model {why}")
    tensors, matrices, packed_bytes, float_bytes = every_tensor(pipeline.model), 0, 0, 0
    for name, layer in layers.items():
        packed = layer.pack()
        tensors = {key: t for key, t in tensors.items() if not key.startswith(f"{name}.")}
        tensors |= {f"{name}.{key}": t for key, t in packed.state_dict().items()}
        sizes = linear_bytes(packed)
        matrices, packed_bytes, float_bytes = matrices + sizes[0], packed_bytes + sizes[1], float_bytes + sizes[2]
    disk_bytes = write_folder(out, pipeline, tensors, checkpoint.TERNARY)
    return Exported(out, matrices, packed_bytes, float_bytes, disk_bytes)


def read_model(folder: Path, cfg: RunConfig) -> Encoder:
    """The packed model of an exported folder, on the CPU. Its float weights are never in memory."""
    with torch.device("meta"):
        model = build_model(cfg)
    pack(model)
    model.to_empty(device="cpu")
    tensors = _stack_experts(checkpoint.read_tensors(folder, "model.safetensors"))
    checkpoint.copy_tensors(every_tensor(model), tensors, folder)
    return model


def _stack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of format ternary-1 under the names of today's; those of today as they are."""
    together: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key in list(tensors):
        if found := re.fullmatch(r"(.*\.w_(?:in|out))\.(\d+)(\.\w+)", key):
            together[found[1] + found[3]][int(found[2])] = tensors.pop(key)
    return tensors | {key: torch.stack([parts[e] for e in sorted(parts)]) for key, parts in together.items()}


def pack(model: nn.Module) -> None:
    """Replaces every ternary layer by its packed form, in place; what is left of the model is frozen, too."""
    for name, layer in ternary_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.pack())
    model.requires_grad_(False)


def ternary_layers(model: nn.Module) -> dict[str, BitLinear | MoE]:
    """Name -> layer, of those whose weights training rounds to three values."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BitLinear) or (isinstance(module, MoE) and module.bitnet)
    }


def every_tensor(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that a state_dict leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def linear_bytes(model: nn.Module) -> tuple[int, int, int]:
    """(matrices, their bytes, their bytes in float32) of the packed layers of a model."""
    packed = [module for module in model.modules() if isinstance(module, PackedMatrices)]
    stored = sum(module.codes.nbytes + module.scale.nbytes for module in packed)
    float_bytes = sum(4 * m.in_features * m.out_features * m.scale.numel() for m in packed)
    return sum(module.scale.numel() for module in packed), stored, float_bytes
