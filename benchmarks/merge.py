"""``keye-merge`` against mergekit and against copying the same bytes: time and peak memory.

::

    python -m benchmarks.merge --gb 1                                  # all of it, in a folder that is removed again

    pip install --target /tmp/other --no-deps mergekit immutables      # never a dependency of ours
    python -m benchmarks.merge prepare --folder /tmp/bench --gb 2.1    # three random models
    python -m benchmarks.merge measure --folder /tmp/bench --mergekit /tmp/other --inputs disk cached
    python -m benchmarks.merge report --folder /tmp/bench

Three models of one architecture in bfloat16, one file each, values of the size of weights. Every measurement is a
process of its own. It starts with the inputs dropped from the page cache ("disk"), or in it ("cached"), as those of
models that were just trained are; and ends when the result is on the disk: copying and ours sync what they wrote, for
mergekit it is done here ("of it sync, s"). The rivals take turns, and the disk rests before each (``--rest``): that of
a virtual machine is fast for a while and slower once that is used up. ``measure`` may be called several times: the
report takes the median of all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.results import Result
from keye_train.merging.shard_file import PlannedTensor, ShardFile
from keye_train.runs import sync, write_json_atomic

MODELS = ("a", "b", "c")
INPUTS = ("disk", "cached")
FOLDER = Path("runs/benchmark_merge")
"""On the disk that runs are on: a folder for temporary files may be in memory."""
HIDDEN, INTERMEDIATE, VOCABULARY = 1536, 6144, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": VOCABULARY,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama: mergekit has to know the architecture."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        block = f"model.layers.{i}."
        found |= {f"{block}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        found |= {f"{block}mlp.{part}_proj.weight": (INTERMEDIATE, HIDDEN) for part in ("gate", "up")}
        found[f"{block}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        found |= {f"{block}{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def prepare(folder: Path, gigabytes: float) -> None:
    """Write the models: a common start, and a small step of each away from it."""
    layer = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / layer))
    tensors = [PlannedTensor(name, torch.bfloat16, shape) for name, shape in shapes(layers).items()]
    for number, model in enumerate(MODELS):
        (folder / model).mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / model / "config.json", CONFIG | {"num_hidden_layers": layers})
        with ShardFile(folder / model / "model.safetensors", tensors) as shard:
            for seed, tensor in enumerate(tensors):
                start = torch.randn(tensor.elements, generator=torch.Generator().manual_seed(seed)).mul_(0.02)
                step = torch.randn(tensor.elements, generator=torch.Generator().manual_seed(1000 * number + seed + 1))
                shard.write(start.add_(step, alpha=0.001).bfloat16())
    print(f"{layers} layers, {(folder / 'a' / 'model.safetensors').stat().st_size:,} bytes each")


def measure(
    folder: Path, mergekit: Path | None, dtype: str, inputs: str, only: Sequence[str], rest_s: float = 0.0
) -> None:
    """One turn of every rival with inputs "disk" or "cached"; rows are added to FOLDER/rows.jsonl."""
    rivals: dict[str, tuple[list[str], dict[str, str]]] = {
        "copy": (["sh", "-c", _copy_script(folder, dtype)], {}),
        "keye-merge": (_ours(folder, dtype), {}),
        "keye-merge hash_inputs=false": ([*_ours(folder, dtype), "hash_inputs=false"], {}),
    }
    if mergekit is not None:
        rivals["mergekit"] = (_mergekit(folder, dtype), {"PYTHONPATH": str(mergekit), "HF_HUB_OFFLINE": "1"})
    for name, (command, environment) in rivals.items():
        if only and name not in only:
            continue
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "copied").unlink(missing_ok=True)
        _settle(folder, inputs == "cached")
        time.sleep(rest_s)
        started = time.perf_counter()
        usage = _run(command, environment)
        ended = time.perf_counter()
        for file in (folder / "out").glob("*.safetensors"):
            sync(file)  # nothing is left to do where its writer did
        row = {"rival": name, "dtype": dtype, "inputs": inputs, "seconds": round(time.perf_counter() - started, 2)}
        row |= {"sync_s": round(time.perf_counter() - ended, 2), "cpu_s": round(usage[0], 2)}
        row |= {"peak_mib": usage[1] // 1024}
        with (folder / "rows.jsonl").open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(row) + "\n")
        print(row, flush=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "copied").unlink(missing_ok=True)


def _ours(folder: Path, dtype: str) -> list[str]:
    models = ",".join(str(folder / model) for model in MODELS)
    code = "from keye_train.cli.chain import merge_main; merge_main()"
    return [sys.executable, "-c", code, f"models=[{models}]", f"out={folder / 'out'}", f"dtype={dtype}"]


def _mergekit(folder: Path, dtype: str) -> list[str]:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(folder / model), "parameters": {"weight": 1.0}} for model in MODELS],
        "dtype": "float32",
        "out_dtype": dtype,
    }
    write_json_atomic(folder / "mergekit.yaml", recipe)  # JSON is YAML
    words = ["mergekit-yaml", str(folder / "mergekit.yaml"), str(folder / "out"), "--no-copy-tokenizer"]
    words += ["--no-write-model-card", "--out-shard-size", "5B"]
    code = f"import sys; sys.argv = {words!r}; from mergekit.scripts.run_yaml import main; main()"
    return [sys.executable, "-c", code]


def _copy_script(folder: Path, dtype: str) -> str:
    """Read all inputs once, and write as many bytes as the result has (twice an input for float32); then fsync."""
    a, b, c = (folder / model / "model.safetensors" for model in MODELS)
    out = folder / "copied"
    if dtype == "float32":
        return f"cp {a} {out} && cat {b} >> {out} && cat {c} > /dev/null && sync {out}"
    return f"cat {a} {b} > /dev/null && cp {c} {out} && sync {out}"


def _settle(folder: Path, cached: bool) -> None:
    """Wait until earlier results are on the disk; then have the inputs in the page cache, or not."""
    os.sync()
    for model in MODELS:
        descriptor = os.open(folder / model / "model.safetensors", os.O_RDONLY)
        if cached:
            while os.read(descriptor, 1 << 24):
                pass
        else:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _run(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Run a command; processor seconds and peak resident KiB of it and its children."""
    child = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    errors = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{command[:3]} failed:\n{errors[-2000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss


def report(folder: Path) -> None:
    """The dated file from all rows."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    n_bytes = (folder / "a" / "model.safetensors").stat().st_size
    about = __doc__.split("\n\n")[-1].replace("\n", " ") if __doc__ else ""
    result = Result("merge", f"{about} Each model: {n_bytes:,} bytes.")
    for dtype, inputs in sorted({(row["dtype"], row["inputs"]) for row in rows}, reverse=True):
        chosen = [row for row in rows if (row["dtype"], row["inputs"]) == (dtype, inputs)]
        middle: Callable[[str, str], float] = lambda rival, key, chosen=chosen: statistics.median(  # noqa: E731
            row[key] for row in chosen if row["rival"] == rival
        )
        for rival in dict.fromkeys(row["rival"] for row in chosen):
            seconds = [row["seconds"] for row in chosen if row["rival"] == rival]
            result.add(
                {
                    "inputs": inputs,
                    "result": dtype,
                    "what": rival,
                    "seconds": f"{middle(rival, 'seconds'):.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
                    "of it sync, s": f"{middle(rival, 'sync_s'):.1f}",
                    "of copy speed": f"{100 * middle('copy', 'seconds') / middle(rival, 'seconds'):.0f} %",
                    "processor s": f"{middle(rival, 'cpu_s'):.1f}",
                    "peak MiB": int(middle(rival, "peak_mib")),
                    "runs": len(seconds),
                }
            )
    result.write()


def everything(gigabytes: float, mergekit: Path | None, dtype: str, turns: int, rest_s: float) -> None:
    """Prepare, measure in turns, report; in ``FOLDER``, which is removed afterwards."""
    FOLDER.mkdir(parents=True)
    try:
        prepare(FOLDER, gigabytes)
        for _ in range(turns):
            for inputs in INPUTS:
                measure(FOLDER, mergekit, dtype, inputs, [], rest_s)
        report(FOLDER)
    finally:
        shutil.rmtree(FOLDER)


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Before anything is written: is there room, and is what was asked for possible?"""
    if arguments.command != "all":
        if arguments.folder is None:
            parser.error(f"{arguments.command} needs --folder")
        return
    if arguments.folder is not None or arguments.only:
        parser.error("--folder and --only go with prepare, measure and report")
    if arguments.turns < 1:
        parser.error("--turns: at least 1")
    if FOLDER.exists():
        parser.error(f"{FOLDER} is left of a run that was killed, or of one that still runs: remove it")
    needed = 1.05 * (5 if arguments.dtype == "float32" else 4) * arguments.gb * 1e9  # three models and a result
    free = shutil.disk_usage(Path()).free
    if free < needed:
        parser.error(f"{FOLDER} takes {needed:,.0f} bytes and {free:,} are free: choose a smaller --gb")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line, see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="all", choices=["all", "prepare", "measure", "report"])
    parser.add_argument("--folder", type=Path, help="for all commands but `all`")
    parser.add_argument("--gb", type=float, default=2.1, help="size of each model (default: 2.1)")
    parser.add_argument("--mergekit", type=Path, help="folder that holds mergekit; default: it is left out")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--only", nargs="*", default=[], help="measure: these rivals alone")
    parser.add_argument("--inputs", nargs="+", default=INPUTS, choices=INPUTS, help="measure: where they are")
    parser.add_argument("--rest", type=float, default=0, help="seconds before each measurement (default: 0)")
    parser.add_argument("--turns", type=int, default=3, help="all: turns of every rival (default: 3)")
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    if arguments.command == "all":
        everything(arguments.gb, arguments.mergekit, arguments.dtype, arguments.turns, arguments.rest)
    elif arguments.command == "prepare":
        prepare(arguments.folder, arguments.gb)
    elif arguments.command == "measure":
        for inputs in arguments.inputs:
            measure(arguments.folder, arguments.mergekit, arguments.dtype, inputs, arguments.only, arguments.rest)
    else:
        report(arguments.folder)


if __name__ == "__main__":
    main()
