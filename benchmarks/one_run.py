"""One row of the tables: `python one_run.py JOB.json RESULT.json`, in the environment of its peer.

A peer runs as its own documents say, on the same rows, model, LoRA and steps. What is timed is the
training from the beginning of the first step to the end of the last one: no loading, measuring or
saving. For everything that is built on the Trainer a callback takes the times, from outside.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from workload import (
    ACCUMULATION,
    ALPHA,
    END,
    LEARNING_RATE,
    LONGEST,
    MICRO,
    TARGETS,
    Job,
    encoded,
    make,
    shape_of,
    texts,
)

Result = dict[str, Any]
Changes = dict[str, Any]
NONE: Changes = {}


# -- Taking the time


def now() -> tuple[float, float]:
    torch = sys.modules["torch"]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def note(result: Result, start: tuple[float, float], steps: int) -> None:
    end = now()
    result |= {"wall": end[0] - start[0], "cpu": end[1] - start[1], "steps": steps}


def watch(job: Job, result: Result) -> None:
    """Have every Trainer of this process take its times."""
    import transformers

    class Stopwatch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == job.untimed:
                self.start = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == state.max_steps:
                note(result, self.start, state.global_step - job.untimed)

    attach(Stopwatch())


def attach(callback: Any) -> None:
    """Give the callback to every Trainer of this process, whoever makes it."""
    import transformers

    plain = transformers.Trainer.train

    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        trainer.add_callback(callback)
        return plain(trainer, *args, **kwargs)

    transformers.Trainer.train = train


def ours_here(job: Job, callback: Any) -> None:
    """Make the workload and train in this process, for the callback to look on."""
    make(job)
    place = Path(job.folder, "run")
    place.mkdir()
    os.chdir(place)
    attach(callback)
    ours(job, {})
    os.chdir("/")


def pretend_smaller_gpu(job: Job) -> None:
    """A T4 has less memory and no bfloat16; the speed remains that of the GPU that is there."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, job.memory_gb * 1e9 / total))
    torch.cuda.get_device_capability = lambda *_: (7, 5)


# -- Ours, and the Trainer by hand


def ours(job: Job, result: Result) -> None:
    """The real command line; the flags make it the same work, and leave out measuring and saving."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import finetune_colab

    watch(job, result)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in job.rows))
    command = f"""train --yes --model-name={job.model} --dataset-path=rows.jsonl --seed={job.seed}
        --max-steps={job.steps} --lora-targets={",".join(TARGETS[job.targets])} --lora-r={job.rank}
        --lora-dropout={job.dropout} --validation-fraction=0 --eval-answers=0 --save-steps=1000000
        --save-minutes=10000"""
    if code := finetune_colab.main([*command.split(), *job.extra]):
        raise SystemExit(code)
    [record] = Path("model").glob("run.json")
    measured = json.loads(record.read_text())["results"]
    names = ("estimated_seconds", "train_seconds", "estimated_memory_gb", "peak_memory_gb")
    result["run"] = {name: measured[name] for name in names}
    commits = [json.loads(path.read_text()) for path in Path().glob("checkpoints/*/*/COMMIT.json")]
    result["run"]["skipped_steps"] = max(one["record"]["stats"]["skipped_steps"] for one in commits)


def common(job: Job) -> dict[str, Any]:
    """What every TrainingArguments gets."""
    return {
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "seed": job.seed,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def loaded(job: Job) -> tuple[Any, Any]:
    """The base model, on a processor as float32 and on a GPU in 4 bits, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.float32}
    if job.gpu:
        half, kind = (
            torch.float16,
            {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        )
        four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=half, **kind)
        options = {"dtype": half, "quantization_config": four_bit, "device_map": {"": 0}}
    model = AutoModelForCausalLM.from_pretrained(job.model, **options)
    model.config.use_cache = False
    return model, AutoTokenizer.from_pretrained(job.model)


def trainer(job: Job, result: Result, padded: bool = False, order: str = "random") -> None:
    """Trainer and PEFT; `padded` is the recipe of most notebooks, the rest what the Trainer can do."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    watch(job, result)
    model, tokenizer = loaded(job)
    if job.gpu:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=padded)
    elif padded:
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **job.lora))
    rows = [
        {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids, prompt in encoded(job)
    ]
    fill = {"padding": "max_length", "max_length": LONGEST} if padded else {}
    arguments = TrainingArguments(
        "out",
        gradient_checkpointing=padded,
        train_sampling_strategy=order,
        fp16=job.gpu,
        use_cpu=not job.gpu,
        optim="paged_adamw_32bit" if job.gpu else "adamw_torch",
        **common(job),
    )
    Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer, **fill), rows).train()


# -- The peers


def trl(job: Job, result: Result, whole: bool = False, changes: Changes = NONE) -> None:
    """SFTTrainer; with `whole` text and no changes as its defaults are, checkpointing included."""
    from peft import LoraConfig

    watch(job, result)
    model, tokenizer = loaded(job)
    lora = LoraConfig(task_type="CAUSAL_LM", **job.lora)
    supervise(job, whole, changes, model=model, processing_class=tokenizer, peft_config=lora)


def supervise(job: Job, whole: bool, changes: Changes, **what: Any) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    pairs = texts(job.rows)
    form = [{"text": p + a} if whole else {"prompt": p, "completion": a} for p, a in pairs]
    settings = {"max_length": LONGEST, "bf16": False, "fp16": False, "use_cpu": True}
    arguments = SFTConfig("out", **settings | common(job) | changes)
    SFTTrainer(args=arguments, train_dataset=Dataset.from_list(form), **what).train()


def unsloth(job: Job, result: Result, whole: bool = False, changes: Changes = NONE) -> None:
    """Its generic path: its kernels need a GPU."""
    from unsloth import FastLanguageModel  # before transformers, which it changes

    watch(job, result)
    kind = {"dtype": sys.modules["torch"].float32, "load_in_4bit": False}
    model, tokenizer = FastLanguageModel.from_pretrained(job.model, LONGEST, **kind)
    options = {"use_gradient_checkpointing": "unsloth" if whole else False}
    model = FastLanguageModel.get_peft_model(model, **job.lora, **options)
    supervise(job, whole, changes, model=model, processing_class=tokenizer)


def litgpt(job: Job, result: Result) -> None:
    """Its own loop without its validation; 4 x 4, prompts masked."""
    import litgpt.finetune.lora as script
    from litgpt.args import TrainArgs
    from litgpt.config import name_to_config
    from litgpt.data import JSON
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    shape = shape_of(job)
    names = """n_embd=hidden_size n_layer=num_hidden_layers n_head=num_attention_heads
        vocab_size=vocab_size padded_vocab_size=vocab_size intermediate_size=intermediate_size
        block_size=max_position_embeddings"""
    known = {theirs: shape[name] for theirs, name in (one.split("=") for one in names.split())}
    known["rotary_percentage"] = shape["rope_parameters"]["partial_rotary_factor"]
    name_to_config["phi-2"] |= known
    place = Path("phi-2").absolute()
    shutil.copytree(job.model, place)
    convert_hf_checkpoint(place, dtype="float32")
    rows = [{"instruction": row["question"], "output": " " + row["answer"]} for row in job.rows]
    Path("data").mkdir()
    Path("data/train.json").write_text(json.dumps(rows))
    Path("data/val.json").write_text(json.dumps(rows[:4]))

    class Done(BaseException):
        """After this it would validate, sample and merge."""

    def timed(fit: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = now()
        fit(*args, **kwargs)
        note(result, start, job.steps)
        raise Done

    script.fit = partial(timed, script.fit)
    script.validate = lambda *_, **__: sys.modules["torch"].tensor(0.0)
    limits = {"max_steps": job.steps, "max_seq_length": LONGEST, "epochs": 2, "lr_warmup_steps": 1}
    try:
        script.setup(
            checkpoint_dir=place,
            out_dir=Path("out"),
            precision="32-true",
            lora_r=job.rank,
            lora_alpha=ALPHA,
            lora_dropout=job.dropout,
            lora_key=True,
            lora_projection=True,
            lora_mlp=job.targets == "all",
            data=JSON(Path("data"), mask_prompt=True, prompt_style="phi-2", num_workers=0),
            train=TrainArgs(
                global_batch_size=MICRO * ACCUMULATION, micro_batch_size=MICRO, **limits
            ),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": LEARNING_RATE}},
            logger_name="csv",
            seed=job.seed,
        )
    except Done:
        return


def llamafactory(job: Job, result: Result, changes: Changes = NONE) -> None:
    """Its stage `sft`, with a template that leaves the text as it is."""
    stub = types.ModuleType("torchaudio")  # it imports that, and for text needs nothing of it
    stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = stub
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    import yaml
    from llamafactory.data.template import StringFormatter, register_template
    from llamafactory.train import tuner

    watch(job, result)
    pairs = [(p, a.removesuffix(END)) for p, a in texts(job.rows)]
    rows = [{"instruction": p, "input": "", "output": a} for p, a in pairs]
    Path("rows.json").write_text(json.dumps(rows))
    Path("dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}')
    form = {
        "format_user": StringFormatter(slots=["{{content}}"]),
        "format_assistant": StringFormatter(slots=["{{content}}", {"eos_token"}]),
    }
    register_template("as_it_is", **form)
    settings = yaml.safe_load(f"""
        {{stage: sft, do_train: true, finetuning_type: lora, model_name_or_path: {job.model},
        dataset: rows, dataset_dir: ., template: as_it_is, cutoff_len: {LONGEST}, output_dir: out,
        lora_rank: {job.rank}, lora_alpha: {ALPHA}, lora_dropout: {job.dropout}, use_cpu: true,
        lora_target: "{",".join(TARGETS[job.targets])}", preprocessing_num_workers: 1}}""")
    tuner.run_exp(settings | common(job) | changes)


def axolotl(job: Job, result: Result, changes: Changes = NONE) -> None:
    """`axolotl train` with prompt and answer as segments; its kernels do not know Phi's layers."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import yaml
    from axolotl.cli.train import do_cli

    watch(job, result)
    with Path("rows.jsonl").open("w") as file:
        for prompt, answer in texts(job.rows):
            parts = [{"label": False, "text": prompt}, {"label": True, "text": answer}]
            file.write(json.dumps({"segments": parts}) + "\n")
    settings = yaml.safe_load(f"""
        {{base_model: {job.model}, datasets: [{{path: rows.jsonl, ds_type: json, type: input_output}}],
        dataset_prepared_path: prepared, sequence_len: {LONGEST}, special_tokens: {{pad_token: "{END}"}},
        adapter: lora, lora_r: {job.rank}, lora_alpha: {ALPHA}, lora_dropout: {job.dropout},
        lora_target_modules: [{",".join(TARGETS[job.targets])}], attn_implementation: sdpa,
        lora_qkv_kernel: false, lora_o_kernel: false, lora_mlp_kernel: false,
        lora_embedding_kernel: false, micro_batch_size: {MICRO}, num_epochs: 1, seed: {job.seed},
        gradient_accumulation_steps: {ACCUMULATION}, optimizer: adamw_torch, lr_scheduler: linear,
        learning_rate: {LEARNING_RATE}, bf16: false, fp16: false, tf32: false, save_strategy: "no",
        output_dir: out, dataset_processes: 1, dataloader_num_workers: 0,
        dataloader_pin_memory: false}}""")
    Path("settings.yml").write_text(yaml.safe_dump(settings | changes))
    do_cli("settings.yml")


def matrix_rate(job: Job, result: Result) -> None:
    """Floating-point operations per second of processor time in the model's own matrix products."""
    import torch

    shape, tokens, done = shape_of(job), 500, 0
    h, wide = shape["hidden_size"], shape["intermediate_size"]
    products = []
    for ins, outs, count in ((h, h, 4), (h, wide, 1), (wide, h, 1)):
        for weight in torch.randn(count, ins, outs):
            products.append((torch.randn(tokens, ins), weight))
            products.append((torch.randn(tokens, outs), weight.t()))
    start = now()
    while now()[1] - start[1] < 1:
        for left, right in products:
            _ = left @ right
            done += 2 * tokens * right.numel()
    note(result, start, 0)
    result["rate"] = done / result["cpu"]


def machine(job: Job, result: Result) -> None:
    """What is there, and which attention torch would take in 16 bits for causal rows of 150 tokens."""
    import torch
    import transformers

    result |= {
        "name": "a processor",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if not job.gpu:
        return
    from torch.backends import cuda

    result |= {"name": torch.cuda.get_device_name(), "memory": torch.cuda.mem_get_info()[1]}
    for shape, heads, size in (("phi-2", 32, 80), ("Llama 3, keys repeated", 32, 128)):
        q = torch.randn(1, heads, 150, size, dtype=torch.float16, device="cuda", requires_grad=True)
        how = cuda.SDPAParams(q, q, q, None, 0.0, True, False)
        ways = {
            "flash": cuda.can_use_flash_attention,
            "efficient": cuda.can_use_efficient_attention,
        }
        result[shape] = [name for name, can in ways.items() if can(how)] or ["math"]


def nf4(job: Job, result: Result) -> None:
    """Milliseconds of a product with phi-2's widest layer in 4 bits: widened first, or as bitsandbytes does."""
    import torch
    from bitsandbytes import functional, matmul_4bit

    width = shape_of(job)["hidden_size"]
    weight = torch.randn(4 * width, width, dtype=torch.float16, device="cuda")
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    for tokens in (1, 150, 3000):
        x = torch.randn(tokens, width, dtype=torch.float16, device="cuda")
        ways: dict[str, Callable[[], Any]] = {
            "widened": lambda x=x: x @ functional.dequantize_4bit(packed, state).T,
            "bitsandbytes": lambda x=x: matmul_4bit(x, packed.t(), quant_state=state),
        }
        for name, multiply in ways.items():
            multiply()
            start = now()
            for _ in range(50):
                multiply()
            result[f"{name}, {tokens} tokens"] = round((now()[0] - start[0]) * 20, 3)


GROUPED = {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": False}
FLAT = {"padding_free": True, "max_length": None, "gradient_checkpointing": False}
PACKED = {"sample_packing": True, "micro_batch_size": 1, "pad_to_sequence_len": False}
NO_CHECKPOINTING = {"disable_gradient_checkpointing": True}  # as LLaMA-Factory calls it
ROWS: dict[str, Callable[[Job, Result], None]] = {
    "workload": lambda job, _: make(job),
    "matrix_rate": matrix_rate,
    "machine": machine,
    "nf4": nf4,
    "ours": ours,
    "padded": partial(trainer, padded=True),
    "trainer-dynamic": trainer,
    "trainer-grouped": partial(trainer, order="group_by_length"),
    "trl-default": partial(trl, whole=True),
    "trl-grouped": partial(trl, changes=GROUPED),
    "trl-padding-free": partial(trl, changes=FLAT),
    "litgpt": litgpt,
    "llamafactory-default": llamafactory,
    "llamafactory-grouped": partial(llamafactory, changes=GROUPED | NO_CHECKPOINTING),
    "axolotl-default": axolotl,
    "axolotl-packing": partial(axolotl, changes=PACKED),
    "unsloth-default": partial(unsloth, whole=True),
    "unsloth-grouped": partial(unsloth, changes=GROUPED),
}


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    result: Result = {}
    if job.memory_gb:
        pretend_smaller_gpu(job)
    ROWS[job.row](job, result)
    if job.gpu:
        cuda = sys.modules["torch"].cuda
        result["gpu_memory"] = cuda.max_memory_allocated() / 2**20
        result["gpu_reserved"] = cuda.max_memory_reserved() / 2**20
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":  # some peers start processes that import this file
    main()
