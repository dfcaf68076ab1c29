"""`python -m bench.training_step standard tinybert`: a training step of a preset beside plain PyTorch of its shape.

Plain is what one would write today: torch.nn.TransformerEncoder of the same width, heads, layers and FFN, learned
positions, a tied vocabulary matrix, labelled rows gathered before the loss. Forward, backward and AdamW, in turns, on
the GPU if there is one. The presets with other mixers than attention do other work; their ratio says what that costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.machine import cpu_name
from bench.timing import measure
from ultra.cli import keep_freed_memory
from ultra.config import load_config
from ultra.config.run import RunConfig
from ultra.model import build_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Plain(nn.Module):
    def __init__(self, cfg: RunConfig) -> None:
        super().__init__()
        m = cfg.model
        self.table = nn.Embedding(m.vocab_size, m.hidden_size)
        self.positions = nn.Embedding(cfg.training.max_length, m.hidden_size)
        layer = nn.TransformerEncoderLayer(
            m.hidden_size,
            m.num_heads,
            m.ffn_hidden_size,
            m.dropout,
            m.ffn_activation,
            batch_first=True,
            norm_first=True,
        )
        layers = m.num_layers * m.num_loops
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(m.hidden_size), enable_nested_tensor=False)
        self.dense, self.norm = nn.Linear(m.hidden_size, m.hidden_size), nn.LayerNorm(m.hidden_size)
        self.bias = nn.Parameter(torch.zeros(m.vocab_size))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.table(ids) + self.positions.weight[: ids.shape[1]]
        labelled = labels != -100
        rows = self.norm(nn.functional.gelu(self.dense(self.encoder(x)[labelled])))
        logits = nn.functional.linear(rows, self.table.weight, self.bias)
        return nn.functional.cross_entropy(logits.float(), labels[labelled])


def step(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype | None) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            objective = loss()
        objective.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(": ", 1)[-1].splitlines()[0])
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=8.0)
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    kept = "keeps freed memory" if keep_freed_memory() else "as the user has set it"
    print(f"{where}, torch {torch.__version__}; {args.batch} x {args.length} tokens; allocator {kept}")
    print("| preset | dtype | ours, ms | plain, ms | tokens/s | plain over ours |\n|---|---|--:|--:|--:|--:|")
    for preset in args.presets:
        for dtype, fast, slow in compare(load_config(preset, []), args.batch, args.length, args.seconds):
            rate = f"{args.batch * args.length / fast:,.0f}"
            print(f"| {preset} | {dtype} | {fast * 1e3:.0f} | {slow * 1e3:.0f} | {rate} | {slow / fast:.2f} |")


def compare(cfg: RunConfig, batch: int, length: int, seconds: float) -> Iterator[tuple[str, float, float]]:
    """(dtype, seconds of a step of ours, of the plain one)."""
    torch.manual_seed(0)
    ids = torch.randint(5, cfg.model.vocab_size, (batch, length), device=DEVICE)
    labels = torch.where(torch.rand(ids.shape, device=DEVICE) < cfg.training.mlm_probability, ids, -100)
    ours, plain = build_model(cfg).to(DEVICE).train(), Plain(cfg).to(DEVICE).train()
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        calls = step(ours, lambda: ours(ids, labels=labels).loss, dtype), step(plain, lambda: plain(ids, labels), dtype)
        fast, slow = (measure(call, DEVICE, seconds).median for call in calls)
        yield name, fast, slow


if __name__ == "__main__":
    main()
