"""What is exported answers as the tuned model does, in the programs that it is made for."""

import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
import urllib.request
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.response import addinfourl

import pytest
import yaml
from conftest import PAIRS, Patch, Run, call, in_words, save_phi, sweep, train_tokenizer, write_workbook
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from seams import SCRIPT, ask, encode, load_base, load_tuned, mean_loss
from tables import cases
from test_chat import X, talk

TALK = (X, "5", "And 3 plus 3?", "6")
SYSTEM = "{{ if .System }}{{ .System }}\n\n{{ end }}"
ALONE = "{{ range $i, $_ := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}{{ .Content }}…{{ end }}{{ end }}"
CHAT = '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}…{{ else if eq .Role "assistant" }}{{ .Content }}…{{ end }}{{ end }}'
FORM = "Instruct: {}\nOutput:"
PHI = './my "phi": \\ 2 #1'  # a name that a card has to quote
KINDS = {"q8_0": 2e-3, "f16": 1e-5, "q4_k_m": 0.1}  # in this order; divergence allowed, of a token
FAMILIES = cases("families")


@functools.cache
def read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def save_base(folder: Path, kind: str, signs: list[str], template: str) -> None:
    import torch
    import transformers as tf
    from tokenizers import normalizers

    shape = {"vocab_size": 448, "hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config")(**shape)).save_pretrained(folder)
    tokenizer = train_tokenizer([f"{q}\n{a}" for q, a in PAIRS], 380)
    if kind == "Qwen2":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens({"additional_special_tokens": signs, "eos_token": signs[1]})
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(folder)


class Family:
    """A run of this family, all its exports, and the merged model as transformers loads it."""

    def __init__(self, name: str, home: Path, tokenizer: Any) -> None:
        from transformers import AutoModelForCausalLM

        head, _, template = FAMILIES[name].partition("\n    ")
        _, kind, layers, *signs = head.split(" | ")
        self.name, self.home, self.has_template = name, home, bool(template)
        if name == "phi":
            save_phi(home / PHI, tokenizer, intermediate_size=1280)
        else:
            save_base(home / "base", kind, "".join(signs).split(), template)
        write_workbook(home / "dataset.xlsx", [("question", "answer"), *PAIRS])
        flags = ("--model-name", PHI if name == "phi" else "./base", "--lora-targets", layers, "--eval-answers", 0)
        assert call(home, *flags, "--max-steps", 30, "--learning-rate", 2e-2) == 0
        real = subprocess.run

        def known_as_qwen(argv: list[str], **how: Any) -> Any:  # a real one is known to the converters by its tokens
            return real([one.replace('"gpt-2"', '"qwen2"') for one in argv], **how)

        for kind in KINDS:
            with redirect_stdout(io.StringIO()) as out, redirect_stderr(out), Patch.context() as patch:
                patch.setattr(subprocess, "run", known_as_qwen if name == "qwen2" else real)
                code = call(home, "export", "--to", "gguf", "--quantize", kind)
            self.printed = out.getvalue()
            if code and "could not be fetched" in self.printed:
                pytest.skip(self.printed)
            assert code == 0, self.printed
        self.model = AutoModelForCausalLM.from_pretrained(home / "model-merged").eval()
        self.tokenizer = read_tokenizer(home / "model-merged")

    def gguf(self, kind: str = "f16") -> Path:
        return self.home / "model-gguf" / f"model-{kind}.gguf"

    def prompt(self, question: str) -> list[int]:
        """As anybody would ask who has the exported folder only."""
        how = {"add_generation_prompt": True, "return_dict": True}
        return list(self.tokenizer.apply_chat_template(talk(question), **how)["input_ids"])

    def trained(self, *texts: str) -> list[int]:
        """As the training read it."""
        return list(encode(read_tokenizer(self.home / "model"), talk(*texts))["input_ids"])

    def in_llama_cpp(self, text: str, signs: bool = True) -> list[int]:
        return list(to_server(self.gguf(), "tokenize", content=text, add_special=True, parse_special=signs)["tokens"])


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Family]:
    return functools.cache(lambda name: Family(name, tmp_path_factory.mktemp(name), tokenizer))


@pytest.fixture(params=["phi", *(sweep(one) for one in [*FAMILIES][1:])])
def family(request: pytest.FixtureRequest, make_family: Callable[[str], Family]) -> Family:
    return make_family(request.param)


@pytest.fixture(scope="session")
def phi(make_family: Callable[[str], Family]) -> Family:
    return make_family("phi")


@functools.cache
def llama_server(path: Path) -> Any:
    """llama.cpp's own server, which is another one than the script's."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_ctx, options.warmup, options.verbosity = 512, False, -1
    return xllamacpp.Server(options)


def to_server(path: Path, what: str, **asked: Any) -> Any:
    place = f"{llama_server(path).listening_address}/{what}"
    return json.load(urllib.request.urlopen(urllib.request.Request(place, json.dumps(asked).encode())))


def test_llama_cpp_answers_as_transformers_does(family: Family) -> None:
    import torch

    for question in (X, "What is 7 plus 6?", "Why is the sky blue?\n\n  And grass?"):
        asked = family.prompt(question)
        ids = family.model.generate(torch.tensor([asked]), max_new_tokens=24, do_sample=False)
        told = ids[0, len(asked) :].tolist()
        said = to_server(family.gguf(), "v1/chat/completions", messages=talk(question), temperature=0, max_tokens=16)
        assert said["usage"]["prompt_tokens"] == len(asked)  # as in the training, without any flag
        text = family.tokenizer.decode(told[:16], skip_special_tokens=True)
        assert re.sub(r"\W", "", said["choices"][0]["message"]["content"]) == re.sub(r"\W", "", text)
        with torch.no_grad():
            exact = torch.log_softmax(family.model(ids[:, :-1]).logits[0, -len(told) :], -1)
        for kind, allowed in KINDS.items():
            there = []
            for i in range(len(told)):  # the log-likelihoods of every token that may come next
                how = {"prompt": asked + told[:i], "n_predict": 1, "n_probs": 448, "temperature": 0}
                [place] = to_server(family.gguf(kind), "completion", **how)["completion_probabilities"]
                there.append([one["logprob"] for one in sorted(place["top_logprobs"], key=lambda one: one["id"])])
            assert (exact.exp() * (exact - torch.tensor(there))).sum(-1).mean() < allowed, kind
            assert kind != "f16" or torch.tensor(there).argmax(-1).tolist() == told


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(question=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60))
def test_llama_cpp_cuts_every_question_as_the_training_did(family: Family, question: str) -> None:
    assume(not any(sign in question for sign in family.tokenizer.all_special_tokens))
    form = read_tokenizer(family.home / "model-gguf")
    text = form.apply_chat_template(talk(question), tokenize=False, add_generation_prompt=True)
    composed = unicodedata.normalize("NFC", text) if family.name == "qwen2" else text
    assert family.in_llama_cpp(composed, family.has_template) == family.trained(question)


def test_the_templates_give_whole_talks_as_they_were_taught(family: Family) -> None:
    for beside in ("model-merged", "model-gguf"):
        tokenizer = read_tokenizer(family.home / beside)
        whole, ours = tokenizer.apply_chat_template(talk(*TALK), tokenize=False), family.trained(*TALK)
        if family.has_template:
            theirs = tokenizer.apply_chat_template(talk(*TALK), return_dict=True)["input_ids"]
            assert theirs[: len(ours)] == ours
            assert not tokenizer.decode(theirs[len(ours) :], skip_special_tokens=True).strip()
        else:
            assert whole == (f"{FORM} {{}}{tokenizer.eos_token}" * 2).format(*TALK)
            system = [{"role": "system", "content": "Be brief."}, *talk(X)]
            asked = tokenizer.apply_chat_template(system, tokenize=False, add_generation_prompt=True)
            assert asked == FORM.format(f"Be brief.\n\n{X}")
    text = (family.home / "model-gguf" / "Modelfile").read_text(encoding="utf-8")  # Ollama's
    assert text.startswith("FROM ./model-q4_k_m.gguf\n")  # the newest
    assert "model-q4_k_m.gguf" in family.printed.rpartition("Next")[2]
    assert "PARAMETER temperature 0\n" in text
    before, after = in_ollama(family.home, ALONE)  # each question was taught alone
    for system in ("", "Be brief.\n\n"):
        assert family.in_llama_cpp(before + system + X + after) == family.trained(system + X)


def in_ollama(home: Path, turns: str) -> tuple[str, ...]:
    """What stands around the texts in a template of this kind."""
    text = (home / "model-gguf" / "Modelfile").read_text(encoding="utf-8")
    between = "(.*?)".join(map(re.escape, (SYSTEM + turns).split("…")))
    found = re.search(f'(?s)TEMPLATE """(.*?){between}"""', text)
    assert found, text
    return found.groups()


def test_an_export_of_conversations_is_asked_whole_and_beside_no_other(phi: Family, beside: Path) -> None:
    before, *after = in_ollama(beside, CHAT)
    said = "".join(" " * (i % 2) + one + after[i % 2] for i, one in enumerate(TALK[:3]))
    assert phi.in_llama_cpp(before + said) == phi.trained(*TALK[:3])
    # beside it, the exports of an earlier training were put aside
    assert [p.name for p in (beside / "model-gguf").glob("model-*")] == ["model-f16.gguf"]
    assert len([*(beside / "model-gguf.previous").glob("model-*")]) == 3


@pytest.mark.parametrize("command", ["chat", "compare", "chat --base"])
def test_a_folder_with_a_gguf_alone_is_refused_with_what_opens_it(command: str, phi: Family, run: Run) -> None:
    code, printed = run(*command.split(), X, "--output-dir", phi.home / "model-gguf")
    assert code == 2 and re.search("LM Studio, Ollama.*--output-dir ./model", in_words(printed))


def test_a_space_answers_as_the_tuned_model_does(phi: Family) -> None:
    client = pytest.importorskip("gradio_client").Client
    assert call(phi.home, "export", "--to", "space") == 0
    command, place = [sys.executable, "-u", "app.py"], phi.home / "model-space"
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            link = next(found[0] for line in process.stdout or () if (found := re.search(r"http://[\d.:]+", line)))
            page = client(link, verbose=False)
            told, again = (page.predict(X, api_name="/reply") for _ in range(2))  # each question alone
        finally:
            process.terminate()
    [wanted] = ask(load_tuned(phi.home / "model"), X, MAX_TOKENS=16)
    assert told == again and re.sub(r"\W", "", told).startswith(re.sub(r"\W", "", wanted.text))


def test_the_merged_model_is_the_adapted_one(phi: Family, patched: Patch) -> None:
    import torch

    tuned, ids = load_tuned(phi.home / "model"), torch.tensor([phi.prompt(X)])
    with torch.no_grad():
        assert torch.allclose(tuned.model(ids).logits, phi.model(ids).logits, atol=1e-4)
    patched.chdir(phi.home / "model-merged")
    assert len({path.stat().st_mode for path in Path().iterdir()}) == 1, "all can be read by the same people"
    measured = json.loads(Path("run.json").read_text())["merged"]
    assert measured["merged"] == pytest.approx(measured["adapter"], rel=1e-4)
    assert phi.model.generation_config.eos_token_id == tuned.tokenizer.eos_token_id
    assert phi.model.config.resid_pdrop == 0.1, "the base's own config"
    assert not hasattr(phi.model.config, "quantization_config")
    exec(re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1], {})  # what its card says to do


def test_what_was_trained_on_4_bits_is_merged_into_these(workbook: Path, phi_folder: Path, run: Run) -> None:
    flags = f"--model-name {phi_folder} --load-in-4bit --eval-answers 0 --max-steps 6 --learning-rate 2e-2"
    assert run(*flags.split())[0] == 0
    os.chdir("model")
    assert run("export", "--to", "merged", "--output-dir", ".")[0] == 0
    measured = json.loads(Path("../model-merged/run.json").read_text())["merged"]
    assert measured["four_bit"] and measured["merged"] <= measured["adapter"] * 1.01
    tuned, live = load_tuned(Path("../model-merged")), load_tuned(Path(), True)
    assert not any("4bit" in type(module).__name__ for module in tuned.model.modules())
    examples = [encode(live.tokenizer, talk(*pair)) for pair in PAIRS[:8]]
    assert mean_loss(tuned.model, examples) == pytest.approx(mean_loss(live.model, examples), rel=0.02)


def test_weights_in_16_bits_are_measured_as_exactly_as_in_32(phi_folder: Path, tokenizer: Any) -> None:
    half, examples = load_base(phi_folder).half(), [encode(tokenizer, talk(*pair)) for pair in PAIRS[:6]]
    assert mean_loss(half, examples) == pytest.approx(mean_loss(half.float(), examples), rel=1e-5)


def leftovers(home: Path) -> list[str]:
    return [p.name for p in home.rglob("*") if "partial" in p.name or p.name.endswith(".old")]


def test_converters_with_other_bytes_are_not_run(phi: Family, folder: Path, run: Run, patched: Patch) -> None:
    patched.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patched.setattr(urllib.request, "urlopen", lambda *_, **__: addinfourl(io.BytesIO(b"other"), Message(), "", 200))
    code, printed = run("export", "--to", "gguf", "--output-dir", phi.home / "model-merged", "--export-dir", "x")
    assert code == 2 and "checksum" in printed
    assert not [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".gz", ".gguf")]


BREAKS = """import os, runpy, sys
def replace(old, new, real=os.replace, **how):
    if str(new).endswith(last):
        {}
    real(old, new, **how)
last, os.replace = sys.argv.pop(1), replace
runpy.run_path({!r}, run_name="__main__")"""
FULL = "raise OSError(28, 'No space left on device')"
ENDS = {130: "raise KeyboardInterrupt", 2: FULL, -9: "os.kill(os.getpid(), 9)"}


@pytest.mark.parametrize("last", ["tokenizer_config.json", sweep(".model-gguf.partial/run.json")])
@pytest.mark.parametrize("code", ENDS)
def test_an_export_that_breaks_off_leaves_nothing_half(code: int, last: str, phi: Family, folder: Path) -> None:
    for name in ("model", PHI):
        shutil.copytree(phi.home / name, name)
    to, final = ("gguf", "model-gguf/model-q8_0.gguf") if "gguf" in last else ("merged", "model-merged")
    argv = [sys.executable, "-c", BREAKS.format(ENDS[code], str(SCRIPT)), last, "export", "--to", to]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert code != 2 or re.search("room|space", in_words(done.stderr))
    assert code < 0 or not leftovers(folder)
    assert not Path(final).exists()
    assert call(folder, "export", "--to", to) == 0
    assert not leftovers(folder)
    assert to == "merged" or Path(final).read_bytes() == phi.gguf("q8_0").read_bytes()


@pytest.fixture(scope="module")
def beside(phi: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model without its adapter, exported beside the exports of another training."""
    home = tmp_path_factory.mktemp("beside")
    for name in ("model-merged", "model-gguf"):
        shutil.copytree(phi.home / name, home / name)
    record = json.loads((path := home / "model-gguf" / "run.json").read_text())
    path.write_text(json.dumps(record | {"adapter": "another"}))
    record = json.loads((path := home / "model-merged" / "run.json").read_text())
    path.write_text(json.dumps(record | {"dataset": {"shape": "conversations"}}))
    assert call(home, "export", "--to", "gguf", "--quantize", "f16", "--output-dir", "model-merged") == 0
    return home


def test_cards_and_a_space_have_what_hugging_face_asks_for_and_a_changed_space_is_kept(phi: Family) -> None:
    assert call(phi.home, "export", "--to", "space") == 0
    space = phi.home / "model-space"
    files = {p.name for p in space.iterdir()}
    assert files >= {"README.md", "app.py", "requirements.txt", "run.json"}
    assert not files & {"sample_rows.json", "answers.xlsx", "base_model_folder.txt"}
    assert [p.name for p in space.glob("*.gguf")] == ["model-q8_0.gguf"]
    kinds = "merged", "gguf", "space"
    cards = [(phi.home / f"model-{kind}" / "README.md").read_text(encoding="utf-8") for kind in kinds]
    front = {kind: yaml.safe_load(card.split("---\n")[1]) for kind, card in zip(kinds, cards, strict=True)}
    assert not [name for one in front.values() for name in one if name.startswith("base_model")]  # it is in a folder
    assert [one.get("library_name") for one in front.values()] == ["transformers", "gguf", None]
    own = front["space"]
    assert PHI[2:] in own["title"]
    assert (own["sdk"], own["app_file"], type(own["python_version"])) == ("gradio", "app.py", str)
    assert {own["colorFrom"], own["colorTo"]} <= {"blue", "indigo"}  # the Hub knows eight
    assert tuple(map(int, own["sdk_version"].split(".")[:2])) >= (6, 7)
    written = (space / "README.md").read_text()
    (space / "README.md").write_text("my own words")
    assert call(phi.home, "export", "--to", "space") == 0
    kept = (phi.home / "model-space.previous/README.md", space / "README.md")
    assert [path.read_text() for path in kept] == ["my own words", written] and "| `eval_loss` |" in written


def test_a_merge_that_loses_what_was_learnt_is_refused(finished: Path, run: Run, patched: Patch) -> None:
    from peft.tuners.lora import Linear

    real = Linear.get_delta_weight
    patched.setattr(Linear, "get_delta_weight", lambda *args: 0 * real(*args))
    code, printed = run("export", "--to", "merged")
    assert (code, "adapter as it is" in printed, Path("model-merged").exists()) == (2, True, False)


def test_a_sentencepiece_model_is_refused_before_it_is_merged(finished: Path, run: Run) -> None:
    path = finished / "model" / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"byte_fallback": false', '"byte_fallback": true'), encoding="utf-8")
    code, printed = run("export", "--to", "gguf")
    assert (code, "--to merged" in printed, (finished / "model-merged").exists()) == (2, True, False)
    assert [log for log in Path("logs").iterdir() if "SentencePiece" in log.read_text()]
