"""What every export costs for a model of phi-2's real size, and how fast each result answers.

    python benchmarks/export.py FOLDER            (needs 40 GB of disk; half an hour on 2 cores)
    python benchmarks/export.py FOLDER answers    only how fast what is there answers

The model has random weights and the adapter too: times and memory depend on sizes alone. Each step is a
process of its own, as a person would start it. Memory is the most that it holds by itself; what it has
mapped from files comes on top, which the system takes back when it needs the room.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune_colab as ft

SCRIPT = Path(ft.__file__).resolve()
QUESTION = "What is overfitting, and what can be done about it?"
TOKENS = 32
IN_TRANSFORMERS = """
import sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, question, tokens, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(question, return_tensors="pt")
with torch.no_grad():
    start = time.perf_counter()
    count = int(tokens)
    model.generate(**inputs, min_new_tokens=count, max_new_tokens=count, do_sample=False)
print(f"({count} tokens, {count / (time.perf_counter() - start):.1f} a second)")
"""


def make_run(home: Path) -> None:
    """A base of phi-2's shape and a finished run with an adapter for it."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ft.demo_folder())
    torch.set_default_dtype(torch.float16)
    shape = PhiConfig(
        **(
            ft.DEMO_SHAPE
            | {"vocab_size": 51_200, "hidden_size": 2560, "intermediate_size": 10_240}
            | {"hidden_act": "gelu_new"}
        )
    )
    shape.num_hidden_layers = shape.num_attention_heads = shape.num_key_value_heads = 32
    shape.max_position_embeddings = 2048
    base = PhiForCausalLM(shape)
    torch.set_default_dtype(torch.float32)
    base.save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    cfg = ft.Config(MODEL_NAME="./base", LOAD_IN_4BIT=True)
    model = ft.add_lora(cfg, base)
    folder = home / "model"
    folder.mkdir()
    weights = {
        name.replace(".default", ""): torch.randn_like(value, dtype=torch.float32) * 0.01
        for name, value in model.state_dict().items()
        if "lora_" in name
    }
    save_file(weights, folder / ft.ADAPTER)
    ft.lora_config(cfg, ft.adapted_layers(cfg, ft.linear_layers(base))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": QUESTION * 3}]
    ft.write_json(folder / ft.SAMPLE, [talk] * ft.ROWS_IN_SAMPLE)
    record = {"settings": vars(cfg), "run": "x", "device": {"four_bit": True}}
    ft.write_json(folder / "run.json", record)
    (folder / ft.BASE_PLACE).write_text(str(home / "base"))


def measured(home: Path, label: str, command: list[object]) -> None:
    """Run a process to its end: seconds, memory, and the last line that it prints."""
    start, own, mapped, done = time.perf_counter(), 0, 0, threading.Event()
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def watch() -> None:
        nonlocal own, mapped
        while not done.wait(0.2):
            try:
                parent = psutil.Process(process.pid)
                family = [parent, *parent.children(recursive=True)]
                held = [one.memory_info() for one in family]
                own = max(own, sum(one.rss - one.shared for one in held))
                mapped = max(mapped, sum(one.shared for one in held))
            except psutil.NoSuchProcess:
                pass

    threading.Thread(target=watch, daemon=True).start()
    told, _ = process.communicate()
    done.set()
    lines = [line for line in told.replace("\r", "\n").splitlines() if "it/s]" not in line]
    losses = [line for line in lines if line.startswith("Loss")]
    row = {
        "step": label,
        "seconds": round(time.perf_counter() - start, 1),
        "memory_gb": round(own / 1e9, 2),
        "mapped_gb": round(mapped / 1e9, 2),
        "code": process.returncode,
        "said": " ".join([*losses, *lines[-1:]]),
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    home = Path(sys.argv[1]).resolve()
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "model").exists():
        make_run(home)
    python: list[object] = [sys.executable, SCRIPT]
    if sys.argv[2:] != ["answers"]:
        measured(home, "merge, into 4 bits", [*python, "export", "--to", "merged"])
        for kind in ("q8_0", "f16", "q4_k_m"):
            command = [*python, "export", "--to", "gguf", "--quantize", kind]
            measured(home, f"GGUF {kind}", command)
            size = (home / "model-gguf" / f"model-{kind}.gguf").stat().st_size
            print(kind, round(size / 1e9, 2), "GB", flush=True)
    asking = [*python, "chat", "--max-tokens", TOKENS, "--output-dir"]
    measured(home, "answer, 4 bits", [*asking, "model", "--load-in-4bit", QUESTION])
    for dtype in ("bfloat16", "float32"):
        command = [sys.executable, "-c", IN_TRANSFORMERS, "model-merged", QUESTION, TOKENS, dtype]
        measured(home, f"answer, transformers {dtype}", command)


if __name__ == "__main__":
    main()
