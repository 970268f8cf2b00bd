"""What the speed benchmarks share: a run's settings, the rows, a random Phi, and the least work.

It is imported in the environment of every peer, and so needs the standard library alone to start.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "dense")
TARGETS = {"attention": ATTENTION, "all": (*ATTENTION, "fc1", "fc2")}
ALPHA, DROPOUT, LEARNING_RATE = 32, 0.05, 2e-4
MICRO, ACCUMULATION, LONGEST = 4, 4, 512
END = "<|endoftext|>"
# Width, layers, heads, rows of the embedding. The small ones have the proportions of Phi: with
# phi-2's 51,200 rows their last layer would be half of the work, and not its twentieth part.
SHAPES = {
    "tiny": (64, 2, 1, 2048),
    "slim": (256, 4, 4, 2048),
    "small": (512, 8, 8, 2048),
    "phi-2": (2560, 32, 32, 51_200),
}


@dataclass
class Job:
    """One run, in a process of its own, on the workload in `folder`."""

    folder: str
    row: str = "ours"
    steps: int = 8
    targets: str = "attention"
    rank: int = 16
    dropout: float = DROPOUT
    seed: int = 0
    untimed: int = 0  # steps at the beginning
    gpu: bool = False
    memory_gb: float = 0  # of a smaller GPU to pretend
    extra: list[str] = field(default_factory=list)  # flags for finetune_colab.py
    kind: str = "qa"  # of the workload: qa, long, or the words of every answer
    shape: str = "small"
    vocabulary: int = 0  # another than the shape's

    @property
    def model(self) -> str:
        return f"{self.folder}/model"

    @property
    def rows(self) -> list[dict[str, str]]:
        return made_rows(self.steps * MICRO * ACCUMULATION, self.kind)

    @property
    def lora(self) -> dict[str, Any]:
        targets = list(TARGETS[self.targets])
        options = {"lora_alpha": ALPHA, "lora_dropout": self.dropout, "target_modules": targets}
        return {"r": self.rank, **options}


def texts(rows: Sequence[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Prompt and answer; the space belongs to the answer, so that both are cut alike together."""
    for row in rows:
        yield f"Instruct: {row['question']}\nOutput:", f" {row['answer']}{END}"


def encoded(job: Job) -> list[tuple[list[int], int]]:
    """The ids of each row, and how many of them are its prompt's."""
    from tokenizers import Tokenizer

    cutter = Tokenizer.from_file(f"{job.model}/tokenizer.json")
    both = [(cutter.encode(p).ids, cutter.encode(a).ids) for p, a in texts(job.rows)]
    return [(prompt + answer, len(prompt)) for prompt, answer in both]


def shape_of(job: Job) -> dict[str, Any]:
    """As in the model's config.json."""
    return dict(json.loads(Path(job.model, "config.json").read_text(encoding="utf-8")))


def useful_work(job: Job) -> tuple[int, float]:
    """Tokens, and the floating-point operations that nobody can do without.

    Counted: the base forwards; gradients of its inputs, but none where nothing below learns; causal
    attention (half the square) and twice that backwards; LoRA; the last layer at answers only. Not
    counted: everything that is no matrix product.
    """
    shape, rows, targets = shape_of(job), encoded(job), TARGETS[job.targets]
    h, layers, wide = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
    tokens = sum(len(ids) for ids, _ in rows)
    first = h * h + (h * wide if "fc1" in targets else 0)  # what the first layer hands back
    work = 2.0 * tokens * ((4 * h * h + 2 * h * wide) * (2 * layers - 1) + first)
    work += 6 * h * layers * sum(len(ids) ** 2 for ids, _ in rows)
    work += 4 * h * shape["vocab_size"] * sum(len(ids) - prompt for ids, prompt in rows)
    for name in targets:
        ins, outs = {"fc1": (h, wide), "fc2": (wide, h)}.get(name, (h, h))
        handed = 0 if name in ("dense", "fc2") else ins
        work += 2 * tokens * job.rank * (3 * (ins + outs) * layers - handed)
    return tokens, work


# -- Making it


def book() -> str:
    """English that every Python carries: the language's own help pages."""
    from pydoc_data import topics

    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def made_rows(count: int, kind: str) -> list[dict[str, str]]:
    """Rows of chance with the lengths of real ones: the first rows are the same for every count."""
    words = [word.lower() for word in re.findall(r"\b[A-Za-z][a-z]{1,14}\b", book())]
    marks = (",", ".", *[""] * 20)
    rng = random.Random(1234)

    def sentence(length: int, end: str) -> str:
        parts = [rng.choice(words) + rng.choice(marks) for _ in range(length)]
        return " ".join(parts).rstrip(",.").capitalize() + end

    def answer_length(index: int) -> int:
        if kind == "long":  # 150 to 400 tokens
            return rng.randint(105, 270)
        if kind != "qa":
            return int(kind)
        if index % 61 == 30:  # 8 of 490
            return rng.randint(265, 285)
        return max(20, min(120, round(rng.lognormvariate(math.log(50), 0.5))))

    return [
        {"question": sentence(rng.randint(8, 25), "?"), "answer": sentence(answer_length(at), ".")}
        for at in range(count)
    ]


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    cutter = Tokenizer(models.BPE())
    cutter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cutter.decoder = decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=[END], initial_alphabet=bytes_, show_progress=False
    )
    cutter.train_from_iterator([book()], trainer)
    ends = {"eos_token": END, "bos_token": END, "unk_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=cutter, model_max_length=2048, **ends)


def make_model(job: Job) -> Any:
    """A Phi of chance, its biases and norms too, or else they would hide mistakes."""
    import torch
    from transformers import AutoModelForCausalLM, PhiConfig, set_seed

    set_seed(0)
    width, layers, heads, vocabulary = SHAPES[job.shape]
    config = PhiConfig(
        vocab_size=job.vocabulary or vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        partial_rotary_factor=32 * heads / width,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device("cuda" if job.gpu else "cpu"), torch.no_grad():
        dtype = torch.float16 if job.gpu else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def make(job: Job) -> None:
    make_model(job).save_pretrained(job.model)
    make_tokenizer().save_pretrained(job.model)
