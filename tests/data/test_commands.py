"""ultra data inspect | build, tokenizer train, cache ls | verify | rm: what they do, and every bad input tried."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from ultra.cli import main
from ultra.config import load_config
from ultra.data import cache as cache_module
from ultra.data import open_data
from ultra.data.cache import Filler
from ultra.data.manage import verify


@pytest.fixture(autouse=True)
def no_log_handlers() -> None:
    import logging

    logging.getLogger().handlers[:] = [h for h in logging.getLogger().handlers if "Capture" in type(h).__name__]


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""model: {{vocab_size: 400}}
training:
  cache_dir: {tmp_path / "cache"}
  local_parquet_dir: {corpus}
  text_column: body
  batch_size: 3
  gradient_accumulation_steps: 2
  max_length: 24
  dataset_batch_size: 100
  dataloader_workers: 0
  num_workers: 1
  val_fraction: 0.1
  seed: 11
""",
        encoding="utf-8",
    )
    return str(path)


def caches(tmp_path: Path) -> list[Path]:
    return sorted(p.parent for p in tmp_path.glob("cache/tokens/*/manifest.json"))


def documents(folder: Path) -> list[int]:
    return [u["documents"] for u in json.loads((folder / "manifest.json").read_text())["units"]]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".lock"}


# ---------------------------------------------------------------- data inspect


def test_inspect_fills_the_first_unit_and_no_more(config: str, tmp_path: Path, corpus: Path, texts, capsys) -> None:
    path = corpus / "part-0.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[3:3] = ['{"body": null}', lines[0], "{oops"]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert main(["data", "inspect", config]) == 0
    assert [documents(f) for f in caches(tmp_path)] == [[100]]
    out = capsys.readouterr().out
    data = open_data(load_config(config))
    cache = data.corpora[0].cache
    first = cache.units[0]
    offsets, hashes = cache.index(first)
    lengths = np.diff(offsets) - 2
    held_out = int(data.corpora[0].split.is_validation(hashes).sum())
    assert "the first 1 unit;" in out and str(cache.folder) in out
    assert f"documents      100: {100 - held_out} training, {held_out} validation" in out
    assert "duplicates     1.00%" in out
    assert "skipped        2 rows" in out and "1 part-0.jsonl: line that is not JSON" in out
    assert f"mean {lengths.mean():.0f} tokens, longest {lengths.max()}" in out
    assert f"50 %: {np.median(lengths):.0f}" in out
    characters = sum(len(t) for t in [*texts[:99], texts[0]])
    assert f"tokens/char    {lengths.sum() / characters:.3f}" in out
    windows = [data.corpora[0].windows(first, validation=v).count for v in (False, True)]
    assert f"windows        {windows[0]} training, {windows[1]} validation, of 24 tokens" in out
    used = len(np.unique(np.concatenate([cache.tokens(first)]))) - 2  # without [CLS] and [SEP]
    assert f"vocabulary     {used} of {data.vocab_size - 5} ordinary ids occur; 5 special" in out
    data.close()


def test_inspect_shows_the_samples_of_training(config: str, capsys) -> None:
    assert main(["data", "inspect", config, "training.pack_sequences=false", "--samples", "4"]) == 0
    out = capsys.readouterr().out
    assert "packing        off" in out and "sample 4" not in out
    data = open_data(load_config(config, ["training.pack_sequences=false", "training.batch_size=1"]))
    batches = [batch for pair, _ in zip(data.train_batches(0), range(2), strict=False) for batch in pair]
    for n, batch in enumerate(batches):
        assert batch.first_sample == n
        assert torch.equal(batch.input_ids, data.sample(n).input_ids)
        text = data.tokenizer.decode(batch.input_ids[0].tolist(), skip_special_tokens=False)
        labels = batch.labels[0][batch.labels[0] >= 0].tolist()
        header = f"sample {n}: {batch.input_ids.shape[1]} tokens, 1 documents or parts; {len(labels)} predicted: "
        block = out[out.index(header) :]
        assert block.split("\n", 1)[1].startswith(
            f"{text}\npredict: " + " ".join(repr(data.tokenizer.decode([label])) for label in labels)
        )
    data.close()


def test_inspect_of_several_sources(config: str, tmp_path: Path, texts, capsys) -> None:
    (tmp_path / "b.txt").write_text("\n\n".join(texts[:40]), encoding="utf-8")
    sources = (
        f"training.sources=[{{path: {tmp_path / 'corpus'}, text_column: body, weight: 3}}, {{path: {tmp_path}/b.txt}}]"
    )
    alone = ["training.local_parquet_dir=null", "training.text_column=null"]
    assert main(["data", "inspect", config, sources, *alone, "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert "(75.0% of the training windows)" in out and "(25.0% of the training windows)" in out
    assert f"sample 0 from {tmp_path / 'corpus'}: 24 tokens" in out


def test_inspect_says_when_a_sample_is_not_cached(config: str, capsys) -> None:
    assert main(["data", "inspect", config, "training.dataset_batch_size=2", "--samples", "300"]) == 0
    assert "lies in a unit of" in capsys.readouterr().out


def test_inspect_of_a_cache_of_an_earlier_version(config: str, tmp_path: Path, capsys) -> None:
    assert main(["data", "build", config]) == 0
    forget_checksums(caches(tmp_path)[0])
    assert main(["data", "inspect", config]) == 0
    assert "not recorded in this cache" in capsys.readouterr().out


def forget_checksums(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"], content["source"]
    for unit in content["units"]:
        del unit["sha256"], unit["characters"]
    (folder / "manifest.json").write_text(json.dumps(content, indent=1))


# ---------------------------------------------------------------- data build


def test_build_fills_everything_and_then_nothing(config: str, tmp_path: Path, capsys, monkeypatch) -> None:
    assert main(["data", "build", config]) == 0
    [folder] = caches(tmp_path)
    assert documents(folder) == [100, 100, 60]
    out = capsys.readouterr().out
    tokens = sum(u["tokens"] for u in json.loads((folder / "manifest.json").read_text())["units"])
    assert f"260 documents, {tokens:,} tokens in 3 units" in out and str(folder) in out
    assert f"{tokens:,} new tokens in" in out and "tokens/s" in out
    monkeypatch.setattr(Filler, "start", None)
    assert main(["data", "build", config]) == 0
    assert "complete already" in capsys.readouterr().out


def test_build_goes_on_after_a_stop(config: str, tmp_path: Path, capsys, monkeypatch) -> None:
    write, asked = Filler._write_unit, []

    def slow(self: Filler, n: int, *args: object) -> object:
        if n == 1 and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
            self._stop_asked.wait(30)
        return write(self, n, *args)

    monkeypatch.setattr(Filler, "_write_unit", slow)
    assert main(["data", "build", config]) == 75
    assert "what is filled stays" in capsys.readouterr().err
    [folder] = caches(tmp_path)
    assert documents(folder) == [100]
    assert main(["data", "build", config]) == 0
    assert documents(folder) == [100, 100, 60]
    assert verify(tmp_path / "cache").damage == []


def test_build_in_a_process_of_its_own(config: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ultra", "data", "build", config, "training.num_workers=2"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "260 documents" in done.stdout and "\r" not in done.stderr  # plain lines where there is no terminal


KILLED = """
import sys, time
from ultra.cli import main
from ultra.data import cache, encode
encode.IN_PROCESS_CHARS, encode.CHARS_PER_PROCESS, encode.cores, cache.CHUNK_DOCUMENTS = 0, 1, lambda: 2, 5
make, call = encode.Process.__init__, encode.Process.__call__

def announced(self, *args):
    make(self, *args)
    print(self.pid, flush=True)

def slow(self, texts):
    time.sleep(0.05)
    return call(self, texts)

encode.Process.__init__, encode.Process.__call__ = announced, slow
main(sys.argv[1:])
"""


def test_build_killed_loses_one_unit_and_leaves_no_process(config: str, tmp_path: Path, capsys) -> None:
    builder = subprocess.Popen(
        [sys.executable, "-c", KILLED, "data", "build", config, "training.num_workers=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert builder.stdout is not None
    end = time.monotonic() + 60
    while not (caches(tmp_path) and documents(caches(tmp_path)[0])) and time.monotonic() < end:
        time.sleep(0.01)
    builder.kill()
    builder.wait()
    pids = [int(line) for line in builder.stdout]
    assert pids
    [folder] = caches(tmp_path)
    assert documents(folder) in ([100], [100, 100])
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in pids)
    assert verify(tmp_path / "cache").damage == []
    assert main(["data", "build", config]) == 0
    got = tree(folder)
    shutil.rmtree(tmp_path / "cache")
    assert main(["data", "build", config]) == 0
    wanted = tree(folder)
    assert {name: got[name] for name in wanted} == wanted


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_build_refills_on_demand(config: str, tmp_path: Path, capsys) -> None:
    assert main(["data", "build", config]) == 0
    path = caches(tmp_path)[0] / "unit-00000.bin"
    good = path.read_bytes()
    path.write_bytes(bytes(len(good)))
    assert main(["data", "build", config, "training.prefer_local_cache=false"]) == 0
    assert path.read_bytes() == good


# ---------------------------------------------------------------- tokenizer train


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_a_trained_tokenizer_trains(kind: str, config: str, corpus: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / f"{kind}.json"
    argv = ["tokenizer", "train", str(corpus), "--text-column", "body", "--type", kind, "--vocab-size", "300"]
    assert main([*argv, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert f"{kind} tokenizer of" in out and "260 documents" in out and f"training.tokenizer={output}" in out
    data = open_data(load_config(config, [f"training.tokenizer={output}"]))
    assert 90 < data.vocab_size <= 300
    assert (data.pad_id, data.cls_id, data.sep_id, data.mask_id) == (0, 2, 3, 4)
    [batch, _] = next(data.train_batches(0))
    assert batch.input_ids.shape == (1, 72) and (batch.input_ids == 4).any()
    known, literal = data.vocabulary.encode_documents(["the river walks", "the [MASK] walks"])
    assert len(known) and not data.vocabulary.special[known].any()
    assert data.mask_id not in literal
    assert data.mask_id in data.vocabulary.encode_prompt("the [MASK] walks")
    data.close()


def test_tokenizer_of_a_config_and_of_the_builtin_corpus(config: str, tmp_path: Path, capsys, monkeypatch) -> None:
    output = tmp_path / "t.json"
    assert main(["tokenizer", "train", config, "training.max_samples=30", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "bpe tokenizer of " in out and " ids from 30 documents" in out and "400 ids were asked for" in out
    from ultra.data import train_tokenizer

    monkeypatch.setattr(train_tokenizer, "TOKENIZER_CHARS", 20_000)
    argv = ["tokenizer", "train", "builtin", "--vocab-size", "300", "--output", str(output)]
    before = output.read_bytes()
    assert main(argv) == 2 and "exists and is kept" in capsys.readouterr().err and output.read_bytes() == before
    assert main([*argv, "--force"]) == 0 and output.read_bytes() != before


# ---------------------------------------------------------------- cache


@pytest.fixture
def filled(config: str, tmp_path: Path) -> Path:
    assert main(["data", "build", config]) == 0
    return tmp_path / "cache"


def test_ls_lists(filled: Path, config: str, corpus: Path, capsys) -> None:
    main(["data", "build", config, "training.dataset_batch_size=500", "training.max_samples=9"])
    capsys.readouterr()
    assert main(["cache", "ls", str(filled)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == "KEY DOCUMENTS TOKENS SIZE STATE CHANGED SOURCE".split()
    rows = {line.split()[1]: line for line in out.splitlines()[1:3]}
    assert " whole " in rows["260"] and " partial " in rows["9"]
    assert all(line.endswith(str(corpus)) for line in rows.values())
    assert out.splitlines()[-1].startswith("2 caches, 2 trained tokenizers, ")
    assert main(["cache", "ls", "--config", config]) == 0
    assert capsys.readouterr().out == out
    with FileLock(caches(filled.parent)[0] / "fill.lock"):
        assert main(["cache", "ls", str(filled)]) == 0
    assert " filling " in capsys.readouterr().out


def test_verify_finds_any_flipped_byte(filled: Path, capsys) -> None:
    assert main(["cache", "verify", str(filled)]) == 0
    assert " 0 damaged, 0 without a checksum" in capsys.readouterr().out
    rng = np.random.default_rng(0)
    paths = [Path(p) for p in tree(filled)]
    assert {p.suffix for p in paths} == {".json", ".bin", ".npy", ".sha256"}
    for path in paths:
        good = path.read_bytes()
        text = path.suffix == ".json" and "tokenizers" not in path.parts
        # of small JSON files every byte, each with every kind of damage that its bits allow
        places = range(len(good)) if text and len(good) < 3000 else [0, len(good) - 1, *rng.integers(len(good), size=6)]
        for at in places:
            bad = bytearray(good)
            bad[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            damage = verify(filled).damage
            assert damage and any(path.name.removesuffix(".sha256") in d for d in damage), (path, at, bad[at])
        for bad in (good[:-1], good + b"\0", b""):
            path.write_bytes(bad)
            assert verify(filled).damage, (path, len(bad))
        if path.name in ("manifest.json", "index.json"):  # white space that JSON does not mind
            path.write_bytes(good.replace(b"\n", b"\t", 1))
            assert verify(filled).damage
        path.write_bytes(good)
    assert verify(filled).damage == []


def test_verify_finds_missing_files(filled: Path, capsys) -> None:
    for path in map(Path, tree(filled)):
        good = path.read_bytes()
        path.unlink()
        code = main(["cache", "verify", str(filled)])
        out = capsys.readouterr().out
        if path.suffix == ".sha256":  # what is not recorded is said, not invented
            assert code == 0 and "no checksum recorded for 1 files" in out and path.stem in out
        else:
            assert code == 1 and f"{path.name}: missing" in out and "ultra cache rm" in out
        path.write_bytes(good)


def test_a_cache_of_an_earlier_version_is_said_to_have_no_checksums(filled: Path, capsys) -> None:
    [folder] = caches(filled.parent)
    forget_checksums(folder)
    assert main(["cache", "verify", str(filled)]) == 0
    assert "no checksum recorded for 7 files" in capsys.readouterr().out  # three units and the manifest
    (folder / "unit-00001.bin").write_bytes(b"short")
    assert main(["cache", "verify", str(filled)]) == 1
    assert "unit-00001.bin: 5 bytes for" in capsys.readouterr().out


def test_a_damaged_trained_tokenizer_is_trained_again(filled: Path, config: str, caplog) -> None:
    [path] = (filled / "tokenizers").glob("*.json")
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"[MASK]"', b'"[MUSK]"'))
    data = open_data(load_config(config))
    assert path.read_bytes() == good and any("it is trained again" in m for m in caplog.messages)
    assert data.corpora[0].cache.complete  # the same tokenizer, so the same cache
    data.close()


def test_rm_removes_one_or_all(filled: Path, config: str, capsys) -> None:
    main(["data", "build", config, "training.max_samples=9"])
    first, second = caches(filled.parent)
    assert main(["cache", "rm", str(filled), first.name[:6], "--yes"]) == 0
    assert not first.exists() and caches(filled.parent) == [second]
    assert verify(filled).damage == []
    assert main(["data", "build", config]) == 0 and main(["cache", "rm", "--config", config, "--all", "--yes"]) == 0
    assert not tree(filled)
    capsys.readouterr()
    assert main(["cache", "ls", str(filled)]) == 0 and capsys.readouterr().out.splitlines()[-1].startswith("0 caches")
    assert main(["data", "build", config]) == 0  # and all can be made again


def test_rm_asks_and_removes_nothing_without_yes(filled: Path, capsys, monkeypatch) -> None:
    before = tree(filled)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    assert main(["cache", "rm", str(filled), "--all"]) == 2
    assert "add --yes" in capsys.readouterr().err

    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(["cache", "rm", str(filled), "--all"]) == 0 and "nothing removed" in capsys.readouterr().out
    assert tree(filled) == before
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert main(["cache", "rm", str(filled), "--all"]) == 0 and not tree(filled)


def test_rm_refuses_while_a_process_fills(filled: Path, capsys) -> None:
    [folder] = caches(filled.parent)
    before = tree(filled)
    for lock in (folder / "fill.lock", filled / "prepare.lock"):
        with FileLock(lock):
            for what in ([folder.name], ["--all"]):
                assert main(["cache", "rm", str(filled), *what, "--yes"]) == 2
                assert f"{lock} is held" in capsys.readouterr().err
    assert tree(filled) == before


def test_rm_touches_only_what_is_of_a_cache(filled: Path, tmp_path: Path, capsys) -> None:
    [folder] = caches(filled.parent)
    (folder / "notes.txt").write_text("mine")
    (filled / "tokens" / "my folder").mkdir()
    (filled / "tokens" / "my folder" / "unit-00000.bin").write_text("mine")
    elsewhere = tmp_path / ("a" * 32)
    shutil.copytree(folder, elsewhere)
    (filled / "tokens" / ("a" * 32)).symlink_to(elsewhere)
    kept = tree(elsewhere)
    assert main(["cache", "rm", str(filled), "--all", "--yes"]) == 0
    assert "left" in capsys.readouterr().out and (folder / "notes.txt").read_text() == "mine"
    assert (filled / "tokens" / "my folder" / "unit-00000.bin").exists() and tree(elsewhere) == kept
    assert not (folder / "manifest.json").exists()


# ---------------------------------------------------------------- bad input


BIG = "training.dataset_batch_size=1000"
NOWHERE = "training.local_parquet_dir=/no/such/folder"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["data"], "COMMAND"),
        (["data", "look"], "invalid choice"),
        (["data", "inspect"], "CONFIG"),
        (["data", "inspect", "no/such.yaml"], "no such file or preset"),
        (["data", "inspect", "CONFIG", "training.vocab=3"], "unknown field"),
        (["data", "inspect", "CONFIG", "--samples", "-1"], "not an integer from 0"),
        (["data", "inspect", "CONFIG", NOWHERE], "training.local_parquet_dir=/no/such/folder does not exist"),
        (["data", "inspect", "CONFIG", "training.text_column=txt"], "no column training.text_column='txt'"),
        (["data", "inspect", "CONFIG", "training.tokenizer=/no/such"], "no tokenizer.json there"),
        (["data", "inspect", "CONFIG", "model.vocab_size=8"], "model.vocab_size=8 is too small"),
        (["data", "inspect", "CONFIG", "training.cache_dir=/dev/null/x"], "training.cache_dir=/dev/null/x"),
        (["data", "inspect", "CONFIG", "training.local_parquet_dir=EMPTY"], "found: nothing"),
        (["data", "inspect", "CONFIG", "training.local_parquet_dir=BLANK"], "holds no readable document"),
        (["data", "inspect", "CONFIG", "training.val_fraction=0.99999", BIG], "no training documents"),
        (["data", "build"], "CONFIG"),
        (["data", "build", "no/such.yaml"], "no such file or preset"),
        (["data", "build", "CONFIG", "training.num_worker=3"], "did you mean 'num_workers'"),
        (["data", "build", "CONFIG", NOWHERE], "does not exist"),
        (["data", "build", "CONFIG", "training.local_parquet_dir=BLANK"], "holds no readable document"),
        (["data", "build", "CONFIG", "training.cache_dir=/dev/null/x"], "training.cache_dir=/dev/null/x"),
        (["tokenizer", "train", "builtin"], "--output"),
        (["tokenizer", "train", "--output", "OUT"], "SOURCE"),
        (["tokenizer", "train", "/no/such", "--output", "OUT"], "SOURCE=/no/such does not exist"),
        (["tokenizer", "train", "EMPTY", "--output", "OUT"], "SOURCE="),
        (["tokenizer", "train", "BLANK", "--output", "OUT"], "holds no readable document; skipped: a.jsonl: "),
        (["tokenizer", "train", "CORPUS", "--output", "OUT", "--text-column", "x"], "no column --text-column='x'"),
        (["tokenizer", "train", "CORPUS", "training.seed=1", "--output", "OUT"], "overrides go with a config"),
        (["tokenizer", "train", "builtin", "--text-column", "x", "--output", "OUT"], "no columns"),
        (["tokenizer", "train", "CONFIG", "--text-column", "x", "--output", "OUT"], "override training.text_column"),
        (["tokenizer", "train", "no.yaml", "--output", "OUT"], "no such file or preset"),
        (["tokenizer", "train", "CORPUS", "--type", "word", "--output", "OUT"], "invalid choice"),
        (["tokenizer", "train", "CORPUS", "--vocab-size", "0", "--output", "OUT"], "not an integer above 0"),
        (["tokenizer", "train", "CORPUS", "--vocab-size", "9", "--output", "OUT"], "--vocab-size=9 is too small"),
        (["tokenizer", "train", "CORPUS", "--type", "unigram", "--vocab-size", "9", "--output", "OUT"], "too small"),
        (["tokenizer", "train", "CORPUS", "--type", "wordpiece", "--vocab-size", "9", "--output", "OUT"], "too small"),
        (["tokenizer", "train", "CORPUS", "--output", "CORPUS"], "is a folder"),
        (["tokenizer", "train", "CORPUS", "--output", "CONFIG"], "exists and is kept"),
        (["tokenizer", "train", "CORPUS", "--output", "/no/such/t.json"], "there is no folder /no/such"),
        (["cache"], "COMMAND"),
        (["cache", "ls", "/no/such"], "/no/such: no such folder"),
        (["cache", "ls", "CONFIG"], "Not a directory"),
        (["cache", "ls", "EMPTY", "--config", "CONFIG"], "not both"),
        (["cache", "ls", "--config", "no.yaml"], "no such file or preset"),
        (["cache", "verify", "/no/such"], "/no/such: no such folder"),
        (["cache", "verify", "EMPTY"], "nothing to verify"),
        (["cache", "rm"], "name what to remove"),
        (["cache", "rm", "EMPTY"], "give a KEY"),
        (["cache", "rm", "EMPTY", "--all", "--yes"], "nothing to remove"),
        (["cache", "rm", "EMPTY", "abc", "--all", "--yes"], "not both"),
        (["cache", "rm", "EMPTY", "abc", "--yes"], "no cache begins with 'abc'"),
        (["cache", "rm", "FILLED", "", "--yes"], "no cache begins with ''"),
        (["cache", "rm", "/no/such", "--all", "--yes"], "no such folder"),
    ],
)
def test_bad_input_exits_2_and_loses_nothing(argv, message, config: str, corpus: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.jsonl").write_text('{"body": " "}\n{"body": null}\n')
    folder = tmp_path / "cache" / "tokens" / ("0" * 32)
    folder.mkdir(parents=True)
    (folder / "unit-00000.bin").write_bytes(b"abc")
    names = {
        "CONFIG": config,
        "CORPUS": str(corpus),
        "EMPTY": str(tmp_path / "empty"),
        "BLANK": str(tmp_path / "blank"),
        "FILLED": str(tmp_path / "cache"),
        "OUT": str(tmp_path / "out.json"),
    }
    for name, value in names.items():
        argv = [word.replace(name, value) if word.isupper() or "=" in word else word for word in argv]
    before = tree(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message.replace("EMPTY", names["EMPTY"]) in error and "Traceback" not in error
    after = tree(tmp_path)
    assert before.items() <= after.items()
    assert not (tmp_path / "out.json").exists()


def test_no_permission_is_told_and_changes_nothing(
    filled: Path, config: str, corpus: Path, capsys, monkeypatch
) -> None:
    """As by another user: root, whom CI may be, may read everything, so the calls fail here by hand."""
    before, scandir, real_open = tree(filled), os.scandir, open
    refused: list[str] = []

    def check(path: object) -> None:
        if any(str(path).startswith(prefix) for prefix in refused):
            raise PermissionError(13, "Permission denied", str(path))

    def guarded_scandir(path: object = ".") -> object:
        check(path)
        return scandir(path)  # type: ignore[call-overload]

    def guarded_open(path: object, *args: object, **kwargs: object) -> object:
        check(path)
        return real_open(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", guarded_scandir)
    monkeypatch.setattr("builtins.open", guarded_open)
    monkeypatch.setattr("io.open", guarded_open)
    new = ["training.cache_dir=" + str(filled.parent / "other")]
    for path, argv in (
        (corpus, ["data", "inspect", config, *new]),
        (corpus, ["tokenizer", "train", str(corpus), "--output", str(filled.parent / "t.json")]),
        (corpus / "part-1.jsonl", ["data", "build", config, *new]),
        (filled, ["cache", "ls", str(filled)]),
        (filled, ["cache", "verify", str(filled)]),
        (filled, ["cache", "rm", str(filled), "--all", "--yes"]),
    ):
        refused[:] = [str(path)]
        assert main(argv) == 2, argv
        assert "Permission denied" in capsys.readouterr().err
    refused[:] = []
    assert tree(filled) == before
    refused[:] = [str(caches(filled.parent)[0] / "unit-00001.bin")]
    assert main(["cache", "verify", str(filled)]) == 1
    assert "unit-00001.bin: unreadable: Permission denied" in capsys.readouterr().out


def test_a_damaged_cache_is_told_by_every_command(filled: Path, config: str, capsys) -> None:
    [folder] = caches(filled.parent)
    (folder / "manifest.json").write_text("{")
    before = tree(filled)
    for command in ("inspect", "build"):
        assert main(["data", command, config]) == 2
        assert "manifest.json is damaged" in capsys.readouterr().err
    assert main(["cache", "ls", str(filled)]) == 0 and " damaged " in capsys.readouterr().out
    assert tree(filled) == before
    assert main(["cache", "rm", str(filled), folder.name, "--yes"]) == 0 and main(["data", "build", config]) == 0


def test_chunks_of_the_progress_lines(config: str, capsys, monkeypatch) -> None:
    from ultra.data import build

    monkeypatch.setattr(cache_module, "CHUNK_DOCUMENTS", 5)
    monkeypatch.setattr(build, "LINE_S", 0.0)
    write = Filler._write_unit

    def slow(self: Filler, *args: object) -> object:
        time.sleep(0.6)
        return write(self, *args)

    monkeypatch.setattr(Filler, "_write_unit", slow)
    assert main(["data", "build", config]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "new tokens, " in line]
    assert lines and all("documents, " in line and "%" in line for line in lines)
