"""Section 3: the schemas of known data sets, exports and logs, each with its pairs or its refusal.

Most are records, written as one template that is filled with the same questions and answers. Every
one is read twice: as JSON, one record a line, and as a table with its columns the other way round,
since the order of columns may never decide which of them asks.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_3_real_files import (
    FOUR,
    TWO,
    chat,
    csv_file,
    jsonl,
    read,
    refusal,
    sharegpt,
    texts,
    xlsx,
)

import finetune_colab as ft

QA = [
    ("How do I reset my password?", "Click on the link and follow the steps."),
    ("Opening hours on Sunday", "We open at ten and close at four."),
    ("Where is the office?", "It lies in Main Street, on the left."),
    ("Refunds after a month", "No, only within thirty days of purchase."),
]
TALKS = {
    "{ask}": chat("user: {q}"),
    "{talk}": chat("user: {q}", "assistant: {a}"),
    "{bad talk}": chat("user: {q}", "assistant: {x}"),
    "{shared}": sharegpt("human: {q}", "gpt: {a}"),
}
UNCLEAR = "more than one column|neither the headers|no column of questions|holds lists|all hold"

# A name, a record, and what comes of it where that is not the pair of {q} and {a}: "->" and the
# texts of the conversation, or "!!" and a pattern for the refusal; without one, the columns are
# unclear. {x} is an answer that must not be learnt, {n} a number, {l} a letter; TALKS has more.
SCHEMAS = r"""
# Instructions
Dolly: {"instruction": "{q}", "context": "About {n}.", "response": "{a}", "category": "qa"}
    -> ["{q}\n\nAbout {n}.", "{a}"]
OpenOrca: {"id": "niv.{n}", "system_prompt": "Be kind.", "question": "{q}", "response": "{a}"}
    -> ["Be kind.\n\n{q}", "{a}"]
Alpaca with the whole prompt beside: {"instruction": "{q}", "input": "", "output": "{a}", "text": "Below is an instruction.\n\n### Instruction:\n{q}\n\n### Response:\n{a}"}
Python code instructions: {"instruction": "{q}", "input": "n = {n}", "output": "{a}", "prompt": "Below is an instruction.\n\n### Instruction:\n{q}\n\n### Input:\nn = {n}\n\n### Output:\n{a}"}
    -> ["{q}\n\nn = {n}", "{a}"]
one instruction, the question as input: {"instruction": "You are a bank's assistant.", "input": "{q}", "output": "{a}"}
    -> ["You are a bank's assistant.\n\n{q}", "{a}"]
LLaMA-Factory with a system prompt and history: {"instruction": "{q}", "input": "", "output": "{a}", "system": "Be kind.", "history": [["First {n}?", "Yes {n}."]]}
    -> ["Be kind.\n\nFirst {n}?", "Yes {n}.", "{q}", "{a}"]
Firefly: {"kind": "NER", "input": "{q}", "target": "{a}"}
FLAN: {"inputs": "{q}", "targets": "{a}", "task": "cot_gsm8k"}
P3: {"inputs_pretokenized": "{q}", "targets_pretokenized": "{a}", "inputs": [1, 2], "targets": [3, 4]}
self-instruct: {"id": "t{n}", "instruction": "{q}", "instances": [{"input": "", "output": "{a}"}]}
    !!
unnatural instructions: {"instruction": "{q}", "instances": [{"input": "i", "output": "{a}", "constraints": ""}]}
    !!
super-natural instructions: {"id": "task{n}", "definition": "In this task", "inputs": "{q}", "targets": "{a}"}
CoT collection: {"source": "{q}", "target": "{a}", "rationale": "Since {n}.", "type": "CoT"}
    !!
MetaMath: {"type": "MATH_AnsAug", "query": "{q}", "original_question": "Once {n}?", "response": "{a}"}
MATH: {"problem": "{q}", "level": "Level 5", "type": "Algebra", "solution": "{a}"}
NuminaMath: {"source": "syn", "problem": "{q}", "solution": "{a}", "messages": "{talk}"}
OpenR1: {"problem": "{q}", "solution": "{x}", "answer": "{n}", "generations": ["<think>a</think>", "b"], "correctness_math_verify": [true, false], "messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "<think>a</think> {a}"}]}
    -> ["{q}", "<think>a</think> {a}"]
thinking beside the response: {"Question": "{q}", "Complex_CoT": "Let me see {n}.", "Response": "{a}"}
HumanEval: {"task_id": "HumanEval/{n}", "prompt": "def f{n}():\n    pass", "entry_point": "f{n}", "canonical_solution": "    return {n}", "test": "check(f{n})"}
    !!
text and SQL: {"question": "{q}", "sql": "SELECT {n} FROM t"}
    -> ["{q}", "SELECT {n} FROM t"]
Spider: {"db_id": "d{n}", "query": "SELECT {n} FROM t", "question": "{q}", "query_toks": ["SELECT"]}
    -> ["{q}", "SELECT {n} FROM t"]
a query that is SQL: {"natural_language": "Show all heads older than {n}", "query": "SELECT {n} FROM head"}
    -> ["Show all heads older than {n}", "SELECT {n} FROM head"]
SQL with a context: {"question": "{q}", "context": "CREATE TABLE t (n INTEGER)", "answer": "SELECT {n}"}
    -> ["{q}", "SELECT {n}"]
Bitext: {"flags": "B", "instruction": "{q}", "category": "ORDER", "intent": "x", "response": "{a}"}
mental health counselling: {"Context": "{q}", "Response": "{a}"}
a clue and its response: {"round": "1", "comments": "-", "clue": "{q}", "answer": "{a}"}
# Two columns of other names
human and bot: {"human": "{q}", "bot": "{a}"}
Human and AI: {"Human": "{q}", "AI": "{a}"}
user message and bot response: {"user_message": "{q}", "bot_response": "{a}"}
user and assistant: {"user": "{q}", "assistant": "{a}"}
system, user and assistant: {"system": "Be kind.", "user": "{q}", "assistant": "{a}"}
    -> ["Be kind.\n\n{q}", "{a}"]
message and response: {"message": "{q}", "response": "{a}"}
faq and reply: {"faq": "{q}", "reply": "{a}"}
issue and solution: {"issue": "Printer {n} is off", "solution": "{a}"}
    -> ["Printer {n} is off", "{a}"]
problem, cause and solution: {"category": "hw", "problem": "Printer {n} is off", "cause": "Cable {n} loose", "solution": "{a}"}
    -> ["Printer {n} is off", "{a}"]
input_text and output_text: {"input_text": "{q}", "output_text": "{a}"}
text_input and output: {"text_input": "{q}", "output": "{a}"}
question_text and reference_answer: {"question_text": "{q}", "reference_answer": "{a}"}
keyword and response: {"keyword": "word {n}", "response": "{a}"}
    -> ["word {n}", "{a}"]
Customer Question, Agent Answer: {"ID": "{n}", "Customer Question": "{q}", "Agent Answer": "{a}"}
front and back of a card: {"Front": "City {n}", "Back": "Town {n}", "Tags": "geo"}
    !!
term and definition: {"Term": "Term {n}", "Definition": "It is {n}"}
    !!
two languages: {"en": "Hello {n}", "fr": "Salut {n}"}
    !!
message_1 and message_2: {"role_1": "Biologist", "topic;": "t", "message_1": "{q}", "message_2": "{a}"}
# Questions with contexts, titles, ids
BoolQ: {"question": "{q}", "title": "Page {n}", "answer": true, "passage": "Long ago {n}."}
    -> ["{q}", "TRUE"]
flat SQuAD with the answer called text: {"context": "A long context of {n} that goes on for a while and mentions many facts.", "question": "Who is number {n}?", "id": "id{n}", "answer_start": "{n}", "text": "the number {n}"}
    -> ["Who is number {n}?", "the number {n}"]
NQ-open: {"question": "{q}", "answer": ["{a}"]}
long and short answers: {"question": "{q}", "long_answers": "{a}", "short_answers": "{x}"}
    !!
HotpotQA: {"_id": "5a7a06935542990198eaf05{n}", "answer": "{a}", "question": "{q}", "supporting_facts": [["A", 0], ["B", 0]], "context": [["A", ["B"]]], "type": "comparison", "level": "medium"}
TriviaQA: {"question": "{q}", "question_id": "tc_{n}", "answer": {"aliases": ["{x}"], "type": "W", "value": "{a}"}}
MS MARCO: {"answers": ["{a}"], "passages": {"is_selected": [1, 0], "passage_text": ["a", "b"]}, "query": "{q}", "query_id": "{n}", "wellFormedAnswers": []}
ELI5: {"q_id": "x{n}", "title": "{q}", "selftext": "", "answers": {"a_id": ["c", "d"], "text": ["{a}", "{x}"], "score": [3, 2]}}
DuReader: {"documents": [{"title": "x"}], "question": "{q}", "answers": ["{a}"], "question_type": "E"}
PubMedQA: {"pubid": "{n}", "question": "{q}", "context": {"contexts": ["x"]}, "long_answer": "{a}", "final_decision": "yes"}
medical questions of Amazon: {"questionType": "yes/no", "asin": "1466736038", "question": "{q}", "answerType": "Y", "answer": "{a}"}
Yahoo answers: {"id": "{n}", "topic": "4", "question_title": "{q}", "question_content": "", "best_answer": "{a}"}
counsel chat: {"questionID": "{n}", "questionTitle": "Case {n}", "questionText": "{q}", "questionLink": "https://example.org", "therapistInfo": "Ann", "answerText": "{a}", "upvotes": "1"}
Stack Exchange with an accepted answer: {"Id": "{n}", "Title": "{q}", "Tags": "<a>", "AcceptedAnswerId": "9{n}", "AnswerBody": "{a}"}
Stack Exchange, paired: {"qid": "{n}", "question": "{q}", "response_j": "{a}", "response_k": "{x}"}
    !!
titles and bodies of questions: {"Id": "{n}", "Title": "{q}", "Body": "{a}"}
support tickets with their answers: {"subject": "Ticket {n}", "body": "{q}", "answer": "{a}", "queue": "IT", "priority": "low"}
emails and replies: {"Subject": "S {n}", "Email Body": "{q}", "Reply": "{a}"}
QnA Maker: {"Question": "{q}", "Answer": "{a}", "Source": "Editorial", "Metadata": "", "SuggestedQuestions": "[]", "IsContextOnly": "False", "Prompts": "[]", "QnaId": "{n}"}
a FAQ with HTML: {"question": "{q}", "answer": "<p>{a}</p>", "answer_html": "<p>x</p>", "link": "https://x.org"}
    -> ["{q}", "<p>{a}</p>"]
Moodle's questions: {"Question name": "Q{n}", "Question text": "{q}", "Answer": "{a}", "Grade": "1"}
a form: {"Timestamp": "2024/01/0{n}", "What is your question?": "{q}", "Answer": "{a}"}
an interview's model answers: {"No": "{n}", "Interview Question": "{q}", "Sample Answer": "{a}", "Difficulty": "Easy"}
a question in other words: {"question": "{q}", "paraphrased_question": "{x}", "answer": "{a}"}
where the answer was found: {"question": "{q}", "answer": "{a}", "answer_source": "page {n}"}
CRAG with two texts of one question: {"domain": "x", "question": "{q}", "tokens": ["a"], "final_answer": "{a}"}
StrategyQA: {"qid": "b{n}", "term": "The Police", "question": "{q}", "answer": true, "facts": ["f"]}
    -> ["{q}", "TRUE"]
TruthfulQA, generation: {"question": "{q}", "best_answer": "{a}", "correct_answers": ["{a}", "b"], "incorrect_answers": ["{x}"]}
K-QA: {"Question": "{q}", "Free_form_answer": "{a}", "Must_have": ["m"], "Nice_to_have": ["n"]}
a context that is all there is: {"question": "{q}", "context": "Page {n} says so."}
    !!
a hint: {"question": "{q}", "topic": "t", "hint": "hint {n} is here for you"}
    !!
the file of the answer: {"question": "{q}", "file_name": "manual_{n}.pdf", "page": "1"}
    !!
a link to the answer: {"question": "{q}", "answer_link": "https://x.org/{n}"}
    !!
questions only: {"id": "{n}", "question": "{q}", "category": "c{n}"}
    !!
# Quizzes
Open Trivia DB: {"type": "multiple", "question": "{q}", "correct_answer": "{a}", "incorrect_answers": ["{x}", "b"]}
The Trivia API: {"id": "62{n}", "correctAnswer": "{a}", "incorrectAnswers": ["{x}"], "question": {"text": "{q}"}}
SciQ: {"question": "{q}", "distractor1": "{x}", "distractor2": "d {n}", "correct_answer": "{a}", "support": "S {n}."}
CommonsenseQA: {"question": "{q}", "question_concept": "x", "choices": {"label": ["A"], "text": ["{x}"]}, "answerKey": "A"}
    !!
MMLU: {"question": "{q}", "subject": "x", "choices": ["{a}", "{x}"], "answer": 1}
    !! which of the options is right
MMLU-Pro: {"question_id": "{n}", "question": "{q}", "options": ["{a}", "{x}"], "answer": "{l}", "answer_index": 2}
    -> ["{q}", "{l}"]
MedMCQA: {"id": "{n}", "question": "{q}", "opa": "{a}", "opb": "{x}", "opc": "c {n}", "cop": 1, "exp": "Since {n}."}
    !!
MedQA: {"question": "{q}", "answer": "{a}", "options": {"A": "{a}", "B": "y"}, "answer_idx": "A"}
PIQA: {"goal": "{q}", "sol1": "{a}", "sol2": "{x}", "label": "0"}
    !!
Social IQa: {"context": "Ann {n}.", "question": "{q}", "answerA": "{a}", "answerB": "{x}", "answerC": "c", "label": "1"}
    !!
TruthfulQA, choices: {"question": "{q}", "mc1_targets": {"choices": ["{a}", "{x}"], "labels": [1, 0]}}
    !!
Kahoot: {"Question - max 120 characters": "{q}", "Answer 1": "{a}", "Answer 2": "{x}", "Correct answer(s)": "1"}
    !! which of the options is right
Quizizz: {"Question Text": "{q}", "Option 1": "{a}", "Option 2": "{x}", "Correct Answer": "1", "Time": "30"}
    !! which of the options is right
a quiz with the name of the option: {"question": "{q}", "option1": "{a}", "option2": "{x}", "answer": "option1"}
    !! which of the options is right
a quiz with the number of the option: {"id": "{n}", "question": "{q}", "options": ["{x}", "{a}"], "correctAnswer": 1}
    !! which of the options is right
a quiz with the number in Portuguese: {"pergunta": "{q}", "alternativas": ["{x}", "{a}"], "resposta_correta": "{n}"}
    !! which of the options is right
a quiz with the index apart: {"pregunta": "{q}", "opciones": ["{a}", "b"], "correctaIdx": 0, "explicacion": "Explicación {n} larga."}
    !!
a quiz with right and wrong answers: {"question": "{q}", "answers": [{"text": "{x}", "correct": false}, {"text": "{a}", "correct": true}]}
a quiz with right and wrong choices: {"question": "{q}", "choices": [{"answer": "{a}", "correct": true}, {"answer": "{x}", "correct": false}]}
    !!
a quiz with the letter in Vietnamese: {"Câu hỏi": "{q}", "Giải thích": "giải thích dài {n}", "A": "Mèo {n}", "B": "Chó {n}", "Đáp án đúng": "{l}"}
    -> ["{q}", "{l}"]
four answers in Vietnamese: {"Câu hỏi": "{q}", "Đáp án A": "{a}", "Đáp án B": "{x}", "Đáp án đúng": "A"}
    !!
wrong answers in German: {"Frage": "{q}", "Antwort": "{a}", "FalscheAntwort1": "{x}", "FalscheAntwort2": "z {n}"}
wrong answers in Italian: {"id": "{n}", "domanda": "{q}", "risposta_corretta": "{a}", "risposta_errata_1": "{x}"}
a pupil's answers in Portuguese: {"data_hora": "10:0{n}", "pergunta": "{q}", "resposta_aluno": "{x}", "resposta_correta": "{a}"}
# What models said beside what is true
RAGAS, its test set: {"user_input": "{q}", "reference_contexts": ["c {n}"], "reference": "{a}", "synthesizer_name": "single_hop"}
RAGAS 0.2: {"user_input": "{q}", "retrieved_contexts": ["c", "d"], "response": "{x}", "reference": "{a}"}
    !!
RAGAS, scored: {"question": "{q}", "answer": "{x}", "contexts": ["c", "d"], "ground_truth": "{a}", "faithfulness": "0.5"}
    !!
DeepEval: {"input": "{q}", "actual_output": "{x}", "expected_output": "{a}", "context": ["x", "y"]}
DeepEval, nothing generated yet: {"input": "{q}", "actual_output": null, "expected_output": "{a}", "source_file": "a.pdf"}
LangSmith, in objects: {"inputs": {"question": "{q}"}, "outputs": {"answer": "{a}"}, "id": "{n}"}
promptfoo: {"question": "{q}", "__expected": "contains: {n}", "[openai:gpt-4o] {{question}}": "{x}"}
    !!
HaluEval: {"knowledge": "k {n}", "question": "{q}", "right_answer": "{a}", "hallucinated_answer": "{x}"}
a reference beside models: {"Question": "{q}", "Reference Answer": "{a}", "GPT-4 Answer": "{x}", "Llama Answer": "l {n}"}
a gold answer beside systems: {"query": "{q}", "rag_answer": "{x}", "no_rag_answer": "n {n}", "gold_answer": "{a}"}
expected and actual: {"question": "{q}", "expected_answer": "{a}", "actual_answer": "{x}", "score": "1"}
an answer and the expected one: {"question": "{q}", "expected": "{a}", "answer": "{x}"}
    !!
an answer and the correct one: {"question": "{q}", "answer": "{x}", "correct_answer": "{a}"}
    !!
an answer and the true one: {"question": "{q}", "answer": "{x}", "Ground Truth": "{a}"}
    !!
an answer and its target: {"question": "{q}", "target": "{a}", "answer": "{x}"}
    !!
a label and its prediction: {"question": "{q}", "true_answer": "{a}", "prediction": "{x}"}
students' answers: {"question": "{q}", "desired_answer": "{a}", "student_answer": "{x}", "score_avg": "2.5"}
a bot's log with corrections: {"timestamp": "2024-01-0{n}", "user_question": "{q}", "bot_answer": "{x}", "correct_answer": "{a}"}
two models: {"question": "{q}", "mistral_7b_answer": "{a}", "gemma_answer": "{x}"}
    !!
two models of names nobody knows: {"question": "{q}", "copilot_answer": "{x}", "luisgpt_answer": "{a}"}
    !!
a model before and after: {"prompt": "{q}", "base_response": "{x}", "finetuned_response": "{a}"}
    !!
old and new: {"question": "{q}", "old_answer": "{x}", "new_answer": "{a}"}
    !!
AlpacaEval: {"dataset": "helpful_base", "instruction": "{q}", "output": "{a}", "generator": "davinci"}
AlpacaEval, two outputs: {"instruction": "{q}", "output_1": "{a}", "generator_1": "a", "output_2": "{x}", "generator_2": "b"}
    !!
MT-Bench: {"question_id": 81, "category": "writing", "turns": ["{q}", "Again"], "reference": ["{a}", "b"]}
    !!
IFEval: {"key": "{n}", "prompt": "{q}", "instruction_id_list": ["p:n"], "kwargs": [{}]}
    !!
HelpSteer: {"prompt": "{q}", "response": "{a}", "helpfulness": 3, "correctness": 4}
UltraFeedback, raw: {"source": "evol", "instruction": "{q}", "models": ["a", "b"], "completions": [{"model": "a", "response": "{a}"}, {"model": "b", "response": "{x}"}], "correct_answers": ["None"], "incorrect_answers": ["None"]}
    !!
# Preferences
DPO: {"prompt": "{q}", "chosen": "{a}", "rejected": "{x}"}
DPO where only the rejected one asks: {"prompt": "Go {n}", "rejected": "What is {n}?", "chosen": "It is {n}."}
    -> ["Go {n}", "It is {n}."]
Orca DPO: {"system": "Be kind.", "question": "{q}", "chosen": "{a}", "rejected": "{x}"}
    -> ["Be kind.\n\n{q}", "{a}"]
LLaMA-Factory DPO: {"instruction": "{q}", "input": "x", "chosen": "{a}", "rejected": "{x}"}
    -> ["{q}\n\nx", "{a}"]
LLaMA-Factory DPO, ShareGPT: {"conversations": [{"from": "human", "value": "{q}"}], "chosen": {"from": "gpt", "value": "{a}"}, "rejected": {"from": "gpt", "value": "{x}"}}
UltraFeedback, binarized: {"prompt": "{q}", "chosen": "{talk}", "rejected": "{bad talk}", "messages": "{talk}", "score_chosen": 8.5}
UltraFeedback without messages: {"prompt": "{q}", "rejected": "{bad talk}", "chosen": "{talk}"}
HH-RLHF: {"chosen": "\n\nHuman: First {n}?\n\nAssistant: Yes {n}.\n\nHuman: {q}\n\nAssistant: {a}", "rejected": "\n\nHuman: First {n}?\n\nAssistant: Yes {n}.\n\nHuman: {q}\n\nAssistant: {x}"}
    -> ["First {n}?", "Yes {n}.", "{q}", "{a}"]
TRL, preference of turns: {"prompt": "{ask}", "chosen": [{"role": "assistant", "content": "{a}"}], "rejected": [{"role": "assistant", "content": "{x}"}]}
OpenAI's preferences: {"input": {"messages": "{ask}", "tools": [], "parallel_tool_calls": true}, "preferred_output": [{"role": "assistant", "content": "{a}"}], "non_preferred_output": [{"role": "assistant", "content": "{x}"}]}
    !!
SafeRLHF: {"prompt": "{q}", "response_0": "{x}", "response_1": "{a}", "safer_response_id": 1}
    !!
SHP: {"post_id": "x", "history": "{q}", "human_ref_A": "{a}", "human_ref_B": "{x}", "labels": 1}
    !!
Nectar: {"prompt": "\n\nHuman: {q}\n\nAssistant: ", "answers": [{"answer": "{a}", "rank": 1}, {"answer": "b", "rank": 2}]}
    !!
HelpSteer 3: {"domain": "g", "context": [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "{q}"}], "response1": "{a}", "response2": "{x}"}
    !!
anchor, positive, negative: {"anchor": "{q}", "positive": "{a}", "negative": "{x}"}
the arena: {"model_a": "x", "model_b": "y", "winner": "model_a", "conversation_a": "{talk}", "conversation_b": "{bad talk}"}
    !! all hold conversations
# Conversations
no robots: {"prompt": "{q}", "prompt_id": "6{n}", "messages": "{talk}", "category": "Chat"}
UltraChat, texts in turn: {"id": "{n}", "data": ["First {n}?", "Yes {n}.", "{q}", "{a}"]}
    -> ["First {n}?", "Yes {n}.", "{q}", "{a}"]
LIMA: {"conversations": ["{q}", "{a}"], "source": "stackexchange"}
DailyDialog: {"dialog": ["{q}", "{a}"], "act": [3, 4], "emotion": [0, 0]}
LMSYS-Chat: {"conversation_id": "3{n}", "model": "vicuna", "conversation": "{talk}", "openai_moderation": [{"flagged": false}]}
OpenHermes: {"category": "orca", "conversations": "{shared}", "system_prompt": "Be kind.", "title": null}
    -> ["Be kind.\n\n{q}", "{a}"]
ShareGPT with what the person closed: {"id": "Q{n}", "conversations": [{"from": "human", "value": "First {n}?"}, {"from": "gpt", "value": "Yes {n}."}, {"from": "human", "value": "{q}"}, {"from": "gpt", "value": "{a}"}, {"from": "human", "value": "Thanks!"}]}
    -> ["First {n}?", "Yes {n}.", "{q}", "{a}"]
ShareGPT in items: {"id": "x{n}", "items": "{shared}"}
Capybara: {"source": "A", "conversation": [{"input": "{q}", "output": "{a}"}]}
    !!
XTuner: {"conversation": [{"system": "S", "input": "{q}", "output": "{a}"}]}
    !!
a system prompt beside the messages: {"system": "Be kind.", "messages": "{talk}"}
    -> ["Be kind.\n\n{q}", "{a}"]
Gemini: {"systemInstruction": {"role": "system", "parts": [{"text": "Be kind."}]}, "contents": [{"role": "user", "parts": [{"text": "{q}"}]}, {"role": "model", "parts": [{"text": "{a}"}]}]}
    -> ["Be kind.\n\n{q}", "{a}"]
Cohere: {"messages": [{"role": "System", "content": "Be kind."}, {"role": "User", "content": "{q}"}, {"role": "Chatbot", "content": "{a}"}]}
    -> ["Be kind.\n\n{q}", "{a}"]
Claude's export: {"uuid": "u", "chat_messages": [{"text": "{q}", "sender": "human"}, {"text": "{a}", "sender": "assistant"}]}
Telegram: {"name": "Ann", "messages": [{"id": 1, "from": "Ann", "text": "{q}"}, {"id": 2, "from": "Bob", "text": "{a}"}]}
    !! role|answer
a reward for answers to come: {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "{q}"}], "answer": "{a}"}
    -> ["Be kind.\n\n{q}", "{a}"]
TRL, prompt and completion of turns: {"prompt": "{ask}", "completion": [{"role": "assistant", "content": "{a}"}]}
a log of inputs and outputs: {"id": "{n}", "input": [{"role": "user", "content": "First {n}?"}, {"role": "assistant", "content": "Yes {n}."}, {"role": "user", "content": "{q}"}], "output": "{a}"}
    -> ["First {n}?", "Yes {n}.", "{q}", "{a}"]
open messages and a reference: {"messages": "{ask}", "reference_answer": "{a}"}
a model's messages beside the reference: {"messages": "{bad talk}", "reference": "Quite other {n}"}
    !! not the one in "reference"
messages that reach the reference: {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "Let me see: {a}"}], "ground_truth": "{a}"}
    -> ["{q}", "Let me see: {a}"]
an expected answer beside a trace: {"question": "{q}", "expected": "{a}", "trace": "{bad talk}"}
answers beside a history of turns: {"question": "{q}", "answer": "{a}", "chat_history": [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "Yes."}]}
answers beside a history as text: {"question": "{q}", "history": "User: First?\nAssistant: Yes.", "answer": "{a}"}
answers that are dialogues: {"question": "{q}", "answer": "User: Hi {n}\nAssistant: Hello {n}"}
    -> ["{q}", "User: Hi {n}\nAssistant: Hello {n}"]
a dialogue and its summary: {"id": "{n}", "summary": "Ann bakes {n}.", "dialogue": "Ann: Hi {n}\nBob: Sure"}
    !!
an article and its highlights: {"article": "LONDON -- A star of {n} gains a fortune", "highlights": "Star {n} is rich"}
    !!
empathetic dialogues: {"conv_id": "hit:0", "utterance_idx": "{n}", "prompt": "I remember the fireworks.", "utterance": "{q}"}
    !!
# Tools, pictures, weights
OpenAI with tools: {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "content": "21"}, {"role": "assistant", "content": "{x}"}]}
    !! a tool is used
tools after the first answer: {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}, {"role": "user", "content": "And now?"}, {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "content": "21"}]}
Anthropic with tools: {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "15"}]}, {"role": "assistant", "content": "{x}"}]}
    !! not text
Hermes with tools: {"conversations": [{"from": "human", "value": "{q}"}, {"from": "gpt", "value": "<tool_call>\n{}\n</tool_call>"}, {"from": "tool", "value": "{x}"}]}
    !! a tool is used
Glaive: {"system": "SYSTEM: You may call functions.", "chat": "USER: {q}\n\n\nASSISTANT: <functioncall> {\"name\": \"f\"} <|endoftext|>\n\n\nFUNCTION RESPONSE: {\"r\": 1}\n\n\nASSISTANT: {x} <|endoftext|>"}
    !! a tool is used
xLAM: {"id": "{n}", "query": "{q}", "answers": "[{\"name\": \"f\"}, {\"name\": \"g\"}]", "tools": "[]"}
    !!
a picture in parts: {"messages": [{"role": "user", "content": [{"type": "text", "text": "{q}"}, {"type": "image_url", "image_url": {}}]}, {"role": "assistant", "content": "{a}"}]}
    !! not text
LLaVA: {"id": "{n}", "image": "{n}.jpg", "conversations": [{"from": "human", "value": "<image>\n{q}"}, {"from": "gpt", "value": "{a}"}]}
    !! not text
Qwen-VL: {"conversations": [{"from": "human", "value": "Picture 1: <img>a.jpg</img>\n{q}"}, {"from": "gpt", "value": "{a}"}]}
    !! not text
answers not to be learnt: {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{x}", "weight": 0}]}
    !! not to be learnt
# One text
Llama 2: {"text": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n{q} [/INST] {a} </s>"}
    -> ["Be kind.\n\n{q}", "{a}"]
Llama 3: {"text": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{a}<|eot_id|>"}
Gemma: {"text": "<bos><start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n{a}<end_of_turn>\n"}
Zephyr: {"text": "<|user|>\n{q}</s>\n<|assistant|>\n{a}</s>"}
user: and assistant:: {"text": "user: {q}\nassistant: {a}"}
Q: and A:: {"text": "Q: {q}\nA: {a}"}
    !!
a call between customer and agent: {"call_id": "{n}", "transcript": "Customer: {q}\nAgent: {a}"}
    !!
a legacy prompt with its marks: {"prompt": "{q}\n\n###\n\n", "completion": " {a} END"}
    -> ["{q}\n\n###", "{a} END"]
a prompt that ends where the answer begins: {"prompt": "### Human: {q}### Assistant:", "completion": "{a}"}
    -> ["### Human: {q}### Assistant:", "{a}"]
a prompt of Claude 2: {"prompt": "\n\nHuman: {q}\n\nAssistant:", "completion": " {a}"}
    -> ["Human: {q}\n\nAssistant:", "{a}"]
a prompt with examples: {"prompt": "Question: {n}+2?\nAnswer: 4\n\nQuestion: {q}\nAnswer:", "completion": "{a}"}
    -> ["Question: {n}+2?\nAnswer: 4\n\nQuestion: {q}\nAnswer:", "{a}"]
# No questions with answers at all
intents of Rasa: {"text": "{q}", "intent": "intent_{n}", "entities": []}
    !!
texts and intents: {"text": "{q}", "intent": "intent_{n}"}
    !!
texts and labels: {"text": "It was {n}", "label": "positive"}
    !!
two sentences: {"premise": "A man {n}.", "hypothesis": "He sleeps {n}", "label": "neutral"}
    !!
two questions: {"qid1": "{n}", "question1": "{q}", "question2": "Really {n}?", "is_duplicate": "0"}
    !!
Wikipedia: {"id": "{n}", "url": "https://x.org/{n}", "title": "Page {n}", "text": "It is about {n}."}
    !!
papers: {"title": "Paper {n}", "abstract": "We present {n}", "authors": "A B"}
    !!
products: {"product_name": "Thing {n}", "description": "A nice thing {n}", "price": "9.9"}
    !!
contacts: {"Name": "Ann {n}", "Email": "a{n}@example.org"}
    !!
diseases: {"disease": "D{n}", "symptoms": "S{n}, b", "treatment": "T{n}"}
    !!
quotes: {"quote": "Be {n} yourself", "author": "Author {n}"}
    !!
Discord: {"AuthorID": "12", "Author": "a#1", "Date": "2023-01-0{n}", "Content": "{q}"}
    !!
turns, one a row: {"conversation_id": "{n}", "role": "user", "content": "{q}"}
    !!
OpenAI's batches: {"custom_id": "r-{n}", "method": "POST", "url": "/v1/chat", "body": {"model": "m", "messages": "{ask}"}}
    !!
segments of Axolotl: {"segments": [{"label": true, "text": "<s>Hi {n}"}]}
    !!
patterns with several responses: {"tag": "t{n}", "patterns": ["{q}", "b"], "responses": ["{a}", "c"]}
    !!
several questions with one answer: {"title": "Topic {n}", "questions": ["{q}", "b"], "answer": "{a}"}
    !!
both languages in objects: {"question": {"en": "{q}", "de": "b"}, "answer": {"en": "{a}", "de": "c"}}
    !!
both languages in columns: {"question_en": "{q}", "answer_en": "{a}", "question_fr": "Que faire du numéro {n} ?", "answer_fr": "Allez voir à la page {n}."}
    !!
"""


def cases(table: str) -> dict[str, list[str]]:
    """Of every case of a table, the lines under its name."""
    blocks = re.split(r"\n(?! )", table.strip())
    named = [block.split("\n") for block in blocks if not block.startswith("#")]
    assert len({name.split(": {")[0] for name, *_ in named}) == len(named)
    return {re.split(r": \{| \| ", name)[0]: [name, *map(str.strip, more)] for name, *more in named}


def each_of(table: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases(table).values(), ids=cases(table))


def filled(template: Any, n: int) -> Any:
    """A template with the texts of one pair in it."""
    if isinstance(template, dict):
        return {key: filled(value, n) for key, value in template.items()}
    if isinstance(template, list):
        return [filled(value, n) for value in template]
    if not isinstance(template, str):
        return template
    if template in TALKS:
        return filled(TALKS[template], n)
    question, answer = QA[n]
    texts = {"q": question, "a": answer, "x": f"Wrong: {answer}", "n": str(n), "l": "ABCD"[n]}
    return re.sub(r"\{([qaxnl])\}", lambda mark: texts[mark[1]], template)


def refused_or_dropped(name: str) -> str:
    """Why nothing of a file is learnt: the refusal, or the reasons of all its rows."""
    try:
        pairs = read(name)
    except ft.UserError:
        return refusal(name)
    assert texts(pairs) == []
    return "\n".join(note.reason for note in pairs.dropped)


@each_of(SCHEMAS)
def test_a_schema_gives_its_pairs_in_any_order_of_columns(case: list[str], folder: Path) -> None:
    line, outcome = [*case, '-> ["{q}", "{a}"]'][:2]
    record = json.loads(line[line.index(": {") + 2 :])
    rows = [filled(record, n) for n in range(len(QA))]
    columns = list(reversed(record))
    cells = [["TRUE" if row[key] is True else row[key] for key in columns] for row in rows]
    (folder / "data.jsonl").write_bytes(jsonl(*rows))
    (folder / "data.csv").write_bytes(csv_file([columns, *cells]))
    for name in ("data.jsonl", "data.csv"):
        if outcome.startswith("!!"):
            assert re.search(outcome[3:] or UNCLEAR, refused_or_dropped(name))
        else:
            talk = json.loads(outcome[3:])
            assert texts(read(name)) == [tuple(filled(talk, n)) for n in range(len(QA))]


@each_of(SCHEMAS)
def test_answers_that_ask_are_never_taken_for_questions(
    case: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, outcome = [*case, '-> ["{q}", "{a}"]'][:2]
    if outcome.startswith("!!") or line.startswith(("message_1", "anchor")):
        return  # such names tell nothing, and then what asks is the question
    asking = [(f"Number {n} is off", f"Have you tried to turn number {n} on?") for n in range(4)]
    monkeypatch.setitem(globals(), "QA", asking)
    rows = [filled(json.loads(line[line.index(": {") + 2 :]), n) for n in range(len(QA))]
    (folder / "data.jsonl").write_bytes(jsonl(*rows))
    try:
        found = texts(read("data.jsonl"))
    except ft.UserError:
        return
    assert found == [tuple(filled(json.loads(outcome[3:]), n)) for n in range(len(QA))]


# A name and a file, its content, and what comes of it; then "--" and why which rows are left out.
# A workbook is written as its rows, the end of a line as \n.
SOME = {"TWO": TWO, "THREE": [*TWO, FOUR[3]], "BUT ONE": [FOUR[0], *FOUR[2:]], "FOUR": FOUR}
FILES = r"""
CoQA | coqa.json
    {"data": [{"story": "S", "questions": [{"input_text": "Why?", "turn_id": 1}, {"input_text": "Who?", "turn_id": 2}], "answers": [{"input_text": "So.", "turn_id": 1}, {"input_text": "I.", "turn_id": 2}]}, {"story": "S", "questions": [{"input_text": "How?", "turn_id": 1}], "answers": [{"input_text": "Thus.", "turn_id": 1}]}]}
    !!
DROP | drop.json
    {"nfl_Why?": {"passage": "P", "qa_pairs": [{"question": "Why?", "answer": {"number": "3", "spans": ["So."]}}]}, "nfl_How?": {"passage": "P", "qa_pairs": [{"question": "How?", "answer": {"number": "3", "spans": ["Thus."]}}]}}
    !!
QuAC | quac.json
    {"data": [{"paragraphs": [{"context": "C", "qas": [{"id": "Why?", "followup": "n", "question": "Why?", "answers": [{"text": "So.", "answer_start": 0}], "orig_answer": {"text": "So."}}, {"id": "How?", "followup": "n", "question": "How?", "answers": [{"text": "Thus.", "answer_start": 0}], "orig_answer": {"text": "Thus."}}]}]}]}
    -> TWO
CMRC | cmrc.json
    {"version": "v1", "data": [{"id": "T", "paragraphs": [{"id": "T", "context": "范", "qas": [{"id": "1", "question": "什么时候被任为主教的？", "answers": [{"text": "1963年"}]}]}]}]}
    -> [["什么时候被任为主教的？", "1963年"]]
TriviaQA as it is downloaded | wikipedia-train.json
    {"Data": [{"Answer": {"Aliases": ["So.", "x"], "Type": "W", "Value": "So."}, "Question": "Why?", "QuestionId": "tc"}, {"Answer": {"Aliases": ["Thus.", "x"], "Type": "W", "Value": "Thus."}, "Question": "How?", "QuestionId": "tc"}], "Domain": "Web", "Version": 1.0}
    !!
MS MARCO in columns | train.json
    {"answers": {"0": ["Yes"], "1": ["No"]}, "query": {"0": "is a cat a pet", "1": "is a rock alive"}, "query_id": {"0": 1, "1": 2}}
    -> [["is a cat a pet", "Yes"], ["is a rock alive", "No"]]
PubMedQA by ids | ori_pqal.json
    {"21640": {"QUESTION": "Why?", "CONTEXTS": ["C"], "YEAR": "2011", "final_decision": "yes", "LONG_ANSWER": "So."}, "21641": {"QUESTION": "How?", "CONTEXTS": ["C"], "YEAR": "2011", "final_decision": "yes", "LONG_ANSWER": "Thus."}}
    -> TWO
BIG-bench | bbh.json
    {"canary": "x", "examples": [{"input": "Why?", "target": "So."}, {"input": "How?", "target": "Thus."}]}
    -> TWO
super-natural instructions with their examples | task1.json
    {"Definition": ["In this task"], "Positive Examples": [{"input": "P", "output": "Q", "explanation": "good"}, {"input": "P", "output": "Q", "explanation": "good"}], "Negative Examples": [{"input": "N", "output": "M", "explanation": "bad"}, {"input": "N", "output": "M", "explanation": "bad"}], "Instances": [{"id": "0", "input": "Why?", "output": ["So."]}, {"id": "1", "input": "How?", "output": ["Thus."]}, {"id": "2", "input": "Who is it?", "output": ["It is me."]}]}
    -> THREE
Amazon's questions as Python prints them | qa.json
    {'asin': '1466', 'question': 'Why?', 'answer': 'So.'}\n{'asin': '1466', 'question': 'How?', 'answer': 'Thus.'}\n{'asin': '1466', 'question': 'Who is it?', 'answer': 'It is me.'}
    -> THREE
WikiQA | wikiqa.csv
    question_id,question,document_title,answer,label\nQ1,how are caves formed,Cave,A partly submerged cave.,0\nQ1,how are caves formed,Cave,By melting ice.,1\nQ2,who is he,He,A man of Rome.,0\nQ2,who is he,He,The mayor.,1
    -> [["how are caves formed", "By melting ice."], ["who is he", "The mayor."]]
    -- marked as wrong in .label | marked as wrong in .label
KTO | kto.jsonl
    {"prompt": "Why?", "completion": "So.", "label": true}\n{"prompt": "How?", "completion": "Thus.", "label": false}\n{"prompt": "Tell me where.", "completion": "Over there.", "label": true}\n{"prompt": "Who is it?", "completion": "It is me.", "label": true}
    -> BUT ONE
    -- marked as wrong in .label
KTO with turns | kto.json
    [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], "label": true}, {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Thus."}], "label": false}, {"messages": [{"role": "user", "content": "Tell me where."}, {"role": "assistant", "content": "Over there."}], "label": true}, {"messages": [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "It is me."}], "label": true}]
    -> BUT ONE
    -- marked as wrong in .label
answers with a column that says which are right | log.csv
    question,answer,correct\nWhy?,So.,yes\nHow?,Thus.,no\nTell me where.,Over there.,yes\nWho is it?,It is me.,yes
    -> BUT ONE
    -- marked as wrong in .correct
chats, some with tools | glaive.json
    [{"conversations": [{"from": "human", "value": "Time?"}, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "12"}, {"from": "gpt", "value": "Noon."}]}, {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "tools": "[]"}, {"conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "Thus."}], "tools": "[]"}]
    -> TWO
    -- a tool is used
chats of InternLM, a list a line | a.jsonl
    [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]\n[{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Thus."}]
    -> TWO
ShareGPT without names | a.json
    {"conversations": [[{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "Thus."}]]}
    -> TWO
ChatterBot | a.json
    {"categories": ["AI"], "conversations": [["Why?", "So."], ["How?", "Thus."], ["Who is it?", "It is me."]]}
    -> THREE
LCCC, turns of different number | a.json
    [["火锅 在 重庆", "哈哈", "不会 的"], ["下午 好", "你 好"]]
    !!
turns, one a line | a.jsonl
    {"role": "user", "content": "Why?"}\n{"role": "assistant", "content": "So."}\n{"role": "user", "content": "Why?"}\n{"role": "assistant", "content": "So."}
    !!
intents, several patterns each | intents.json
    {"intents": [{"tag": "Why?", "patterns": ["Why?", "x"], "responses": ["So.", "y"], "context_set": ""}, {"tag": "How?", "patterns": ["How?", "x"], "responses": ["Thus.", "y"], "context_set": ""}, {"tag": "Who is it?", "patterns": ["Who is it?", "x"], "responses": ["It is me.", "y"], "context_set": ""}]}
    !!
intents, one pattern each | intents.json
    {"intents": [{"tag": "tWhy?", "patterns": ["Why?"], "responses": ["So."]}, {"tag": "tHow?", "patterns": ["How?"], "responses": ["Thus."]}, {"tag": "tWho is it?", "patterns": ["Who is it?"], "responses": ["It is me."]}]}
    -> THREE
QnA Maker's knowledge base | kb.json
    {"qnaDocuments": [{"id": 0, "answer": "So.", "source": "x", "questions": ["Why?"], "metadata": []}, {"id": 1, "answer": "Thus.", "source": "x", "questions": ["How?"], "metadata": []}, {"id": 2, "answer": "It is me.", "source": "x", "questions": ["Who is it?"], "metadata": []}]}
    -> THREE
schema.org | faq.json
    {"@type": "FAQPage", "mainEntity": [{"@type": "Question", "name": "Why?", "acceptedAnswer": {"@type": "Answer", "text": "So."}}, {"@type": "Question", "name": "How?", "acceptedAnswer": {"@type": "Answer", "text": "Thus."}}, {"@type": "Question", "name": "Who is it?", "acceptedAnswer": {"@type": "Answer", "text": "It is me."}}]}
    !!
a FAQ by topics | faq.json
    {"account": [{"question": "Why?", "answer": "So."}, {"question": "How?", "answer": "Thus."}], "orders": [{"question": "Who is it?", "answer": "It is me."}]}
    -> THREE
a FAQ of answers by questions | faq.json
    {"Why?": "So.", "How?": "Thus.", "Who is it?": "It is me."}
    -> THREE
a FAQ in one more object | faq.json
    {"faq": {"Why?": "So.", "How?": "Thus.", "Who is it?": "It is me."}}
    -> THREE
a FAQ by keys | faq.json
    {"faq": {"title": "FAQ", "items": {"q0": {"question": "Why?", "answer": "So."}, "q1": {"question": "How?", "answer": "Thus."}, "q2": {"question": "Who is it?", "answer": "It is me."}}}}
    -> THREE
flat keys of a translation | en.json
    {"faq.q1": "Why?", "faq.a1": "So.", "faq.q2": "How?", "faq.a2": "Thus."}
    !!
a quiz in one more object | quiz.json
    {"quiz": [{"question": "Why?", "answer": "So.", "options": ["a", "b"]}, {"question": "How?", "answer": "Thus.", "options": ["a", "b"]}, {"question": "Who is it?", "answer": "It is me.", "options": ["a", "b"]}]}
    -> THREE
questions only, of VQA | vqa.json
    {"questions": [{"image_id": 1, "question": "Why?"}, {"image_id": 1, "question": "How?"}, {"image_id": 1, "question": "Who is it?"}]}
    !!
rows of a page's list | a.jsonl
    ["Why?", "So."]\n["How?", "Thus."]\n["Who is it?", "It is me."]
    -> THREE
Jeopardy | JEOPARDY_CSV.csv
    Show Number, Air Date, Category, Value, Question, Answer\n4680,2004-12-31,HISTORY,$200,Why?,So.\n4680,2004-12-31,HISTORY,$200,How?,Thus.\n4680,2004-12-31,HISTORY,$200,Tell me where.,Over there.\n4680,2004-12-31,HISTORY,$200,Who is it?,It is me.
    -> FOUR
Jeopardy, where the answer is what is read | clues.tsv
    round\tcategory\tcomments\tanswer\tquestion\n1\tLAKES\t-\tSo.\tWhy?\n1\tLAKES\t-\tThus.\tHow?\n1\tLAKES\t-\tOver there.\tTell me where.\n1\tLAKES\t-\tIt is me.\tWho is it?
    -> FOUR
MMLU without a header | abstract_algebra_test.csv
    Find the degree of the field extension over Q.,0,4,2,6,B\nLet p be in S_5. Find the index of it in S_5.,8,2,24,120,C
    !!
a quiz without a header, its right answers last | quiz.csv
    Which is the capital?;Rome;Lima;Oslo;Lima\nWhat is 2+2?;Four;Five;Six;Four
    !!
AG news without a header | news.csv
    3,Wall St. Bears Claw Back Into the Black,Short-sellers are seeing green again.\n4,Carlyle Looks Toward Commercial Aerospace,The firm placed its bets on it.
    !!
a chat of two without marks | chat.txt
    Human 1: Hi!\nHuman 2: What is your favorite holiday?\nHuman 1: Any.
    !!
lines cut by signs nobody uses | movie_lines.tsv
    L1045 +++$+++ u0 +++$+++ They do not!\nL1044 +++$+++ u2 +++$+++ They do to!
    !!
Anki with its columns | anki.txt
    #separator:tab\n#html:false\n#guid column:1\n#notetype column:2\nq5Zy0\tBasic\tWhy?\tSo.\tgeo\nq5Zy1\tBasic\tHow?\tThus.\tgeo\nq5Zy2\tBasic\tWho is it?\tIt is me.\tgeo
    !!
a table in Markdown | faq.md
    | question | answer |\n| --- | --- |\n| Why? | So. |\n| How? | Thus. |\n| Who is it? | It is me. |
    -> THREE
    -- blank
a FAQ as JavaScript | faq.js
    const faq = [\n  { question: 'Why?', answer: 'So.' },\n];
    !! .
statements of SQL | faq.sql
    INSERT INTO faq (question, answer) VALUES ('Why?', 'So.');\nINSERT INTO faq (question, answer) VALUES ('How?', 'Thus.');
    !! dump of a database
sections between the rows | faq.xlsx
    [["Question", "Answer"], ["ACCOUNT", null], ["Why?", "So."], ["How?", "Thus."], ["OFFICE", null], ["Tell me where.", "Over there."], ["Who is it?", "It is me."]]
    -> FOUR
    -- no answer | no answer
questions and answers below one another | faq.xlsx
    [["FAQ"], ["Why?"], ["So."], ["How?"], ["Thus."], ["Who is it?"], ["It is me."]]
    !!
rows that begin with Q: and A: | faq.xlsx
    [["Q:", "Why?"], ["A:", "So."], ["Q:", "How?"], ["A:", "Thus."]]
    !!
a table lying on its side | faq.xlsx
    [["Question", "Why?", "How?", "Tell me where.", "Who is it?"], ["Answer", "So.", "Thus.", "Over there.", "It is me."]]
    !!
two tables side by side | faq.xlsx
    [["Question", "Answer", null, "Question", "Answer"], ["Why?", "So.", null, "Tell me where.", "Over there."], ["How?", "Thus.", null, "Who is it?", "It is me."]]
    !!
a survey | form.csv
    Timestamp,How old are you?,What do you like?,What should we improve?\n2024/01/01,21,I like 1 things,Nothing 1 much\n2024/01/02,22,I like 2 things,Nothing 2 much\n2024/01/03,23,I like 3 things,Nothing 3 much\n2024/01/04,24,I like 4 things,Nothing 4 much
    !!
answers of an examination | grades.csv
    Surname,Question 1,Response 1,Right answer 1,Question 2,Response 2,Right answer 2\nS0,Why?,r0,So.,How?,s0,Thus.\nS1,Why?,r1,So.,How?,s1,Thus.\nS2,Why?,r2,So.,How?,s2,Thus.\nS3,Why?,r3,So.,How?,s3,Thus.
    !!
"""


@each_of(FILES)
def test_a_file_gives_its_pairs(case: list[str], folder: Path) -> None:
    title, content, outcome, *more = case
    name = title.split(" | ")[1]
    written = content.replace("\\n", "\n").replace("\\t", "\t").encode()
    (folder / name).write_bytes(xlsx(json.loads(content)) if name.endswith("xlsx") else written)
    if outcome.startswith("!!"):
        assert re.search(outcome[3:] or UNCLEAR, refused_or_dropped(name))
        return
    pairs = read(name)
    assert texts(pairs) == (SOME.get(outcome[3:]) or [*map(tuple, json.loads(outcome[3:]))])
    reasons = more[0].removeprefix("-- ").split(" | ") if more else []
    assert len(pairs.dropped) == len(reasons)
    assert all(map(re.search, reasons, [note.reason for note in pairs.dropped]))


# What people call the two columns, in many languages, and two rows in which nothing asks, so that
# only the names tell the columns apart.
LANGUAGES = """
English | Question, Questions, Query, Prompts, FAQ question | Answer, Answers, Reply, Responses, Our answer | Opening hours → Nine to five | Returns → Within two weeks
German | Frage, Fragen, Häufige Fragen | Antwort, Antworten, Unsere Antworten | Öffnungszeiten → Von neun bis fünf | Rückgabe → Binnen zwei Wochen
Dutch | Vraag, Vragen, Veelgestelde vragen | Antwoord, Antwoorden, Ons antwoord | Openingstijden → Van negen tot vijf | Retour → Binnen twee weken
Afrikaans | Vraag, Vrae | Antwoord, Antwoorde | Ure → Van nege tot vyf | Terugsending → Binne twee weke
West Frisian | Fraach, Fragen | Antwurd, Antwurden | Iepeningstiden → Fan njoggen oant fiif | Werom → Binnen twa wiken
Luxembourgish | Fro, Froen | Äntwert, Äntwerten | Zäiten → Vun néng bis fënnef | Retour → An zwou Wochen
Yiddish | פֿראַגע, פֿראַגעס | ענטפֿער, ענטפֿערס | שעהען → פֿון נײַן ביז פֿינף | צוריק → אין צוויי וואָכן
Swedish | Fråga, Frågor, Vanliga frågor | Svar, Svaren, Vårt svar | Öppettider → Nio till fem | Retur → Inom två veckor
Norwegian | Spørsmål, Spørsmålet, Spørsmåla | Svar, Svaret, Svara | Åpningstider → Ni til fem | Retur → Innen to uker
Danish | Spørgsmål, Spørgsmålet, Spørgsmålene | Svar, Svaret, Svarene | Åbningstider → Ni til fem | Retur → Inden to uger
Icelandic | Spurning, Spurningar | Svar, Svör | Opnunartími → Níu til fimm | Skil → Innan tveggja vikna
Faroese | Spurningur, Spurningar | Svar, Svør | Tíðir → Níggju til fimm | Aftur → Innan tvær vikur
Finnish | Kysymys, Kysymykset | Vastaus, Vastaukset | Aukiolo → Yhdeksästä viiteen | Palautus → Kahdessa viikossa
Estonian | Küsimus, Küsimused | Vastus, Vastused | Ajad → Üheksast viieni | Tagastus → Kahe nädala jooksul
Latvian | Jautājums, Jautājumi | Atbilde, Atbildes | Laiks → No deviņiem līdz pieciem | Atgriešana → Divu nedēļu laikā
Lithuanian | Klausimas, Klausimai | Atsakymas, Atsakymai | Laikas → Nuo devynių iki penkių | Grąžinimas → Per dvi savaites
Polish | Pytanie, Pytania | Odpowiedź, Odpowiedzi | Godziny → Od dziewiątej do piątej | Zwrot → W ciągu dwóch tygodni
Czech | Otázka, Otázky, Dotaz, Dotazy | Odpověď, Odpovědi, Odpověď, Odpovědi | Doba → Od devíti do pěti | Vrácení → Do dvou týdnů
Slovak | Otázka, Otázky | Odpoveď, Odpovede | Hodiny → Od deviatej do piatej | Vrátenie → Do dvoch týždňov
Slovenian | Vprašanje, Vprašanja | Odgovor, Odgovori | Čas → Od devetih do petih | Vračilo → V dveh tednih
Croatian | Pitanje, Pitanja | Odgovor, Odgovori | Vrijeme → Od devet do pet | Povrat → U dva tjedna
Serbian | Питање, Питања | Одговор, Одговори | Време → Од девет до пет | Повраћај → За две недеље
Macedonian | Прашање, Прашања | Одговор, Одговори | Време → Од девет до пет | Враќање → За две недели
Bulgarian | Въпрос, Въпроси | Отговор, Отговори | Време → От девет до пет | Връщане → До две седмици
Russian | Вопрос, Вопросы, Вопрос клиента | Ответ, Ответы, Ответ оператора | Часы → С девяти до пяти | Возврат → В течение двух недель
Ukrainian | Питання, Запитання | Відповідь, Відповіді | Години → З дев'ятої до п'ятої | Повернення → Протягом двох тижнів
Belarusian | Пытанне, Пытанні | Адказ, Адказы | Гадзіны → З дзевяці да пяці | Вяртанне → За два тыдні
Romanian | Întrebare, Întrebări, Întrebarea | Răspuns, Răspunsuri, Răspunsul | Program → De la nouă la cinci | Retur → În două săptămâni
Hungarian | Kérdés, Kérdések | Válasz, Válaszok | Nyitvatartás → Kilenctől ötig | Visszaküldés → Két héten belül
Albanian | Pyetje, Pyetja, Pyetjet | Përgjigje, Përgjigja, Përgjigjet | Orari → Nga nënta deri në pesë | Kthimi → Brenda dy javëve
Greek | Ερώτηση, Ερωτήσεις, ΕΡΩΤΗΣΗ | Απάντηση, Απαντήσεις, ΑΠΑΝΤΗΣΗ | Ωράριο → Εννέα με πέντε | Επιστροφή → Σε δύο εβδομάδες
French | Question, Questions, Votre question | Réponse, Réponses, Notre réponse | Horaires → De neuf à cinq | Retour → Sous deux semaines
Occitan | Question, Questions | Responsa, Responsas | Oraris → De nòu a cinc | Tornada → En doas setmanas
Spanish | Pregunta, Preguntas, Preguntas frecuentes | Respuesta, Respuestas, Respuesta oficial | Horario → De nueve a cinco | Devolución → En dos semanas
Catalan | Pregunta, Preguntes | Resposta, Respostes | Horari → De nou a cinc | Devolució → En dues setmanes
Galician | Pregunta, Preguntas | Resposta, Respostas | Horario → De nove a cinco | Devolución → En dúas semanas
Portuguese | Pergunta, Perguntas, Questão, Questões | Resposta, Respostas, Resposta, Respostas | Horário → Das nove às cinco | Troca → Em duas semanas
Italian | Domanda, Domande, Domande frequenti | Risposta, Risposte, Le risposte | Orario → Dalle nove alle cinque | Reso → Entro due settimane
Basque | Galdera, Galderak | Erantzuna, Erantzunak | Ordutegia → Bederatzietatik bostetara | Itzulketa → Bi astetan
Maltese | Mistoqsija, Mistoqsijiet | Tweġiba, Tweġibiet | Ħinijiet → Mid-disgħa sal-ħamsa | Ritorn → Fi żmien ġimagħtejn
Irish | Ceist, Ceisteanna | Freagra, Freagraí | Uaireanta → Ó naoi go cúig | Aischur → Laistigh de choicís
Scottish Gaelic | Ceist, Ceistean | Freagairt, Freagairtean | Uairean → Naoi gu còig | Tilleadh → Taobh a-staigh cola-deug
Welsh | Cwestiwn, Cwestiynau | Ateb, Atebion | Oriau → Naw tan bump | Dychwelyd → O fewn pythefnos
Breton | Goulenn, Goulennoù | Respont, Respontoù | Eurioù → Eus nav da bemp | Distro → E div sizhun
Esperanto | Demando, Demandoj | Respondo, Respondoj | Horoj → De naŭ ĝis kvin | Reveno → Ene de du semajnoj
Turkish | Soru, Sorular, SORULAR, Sık sorulan sorular | Cevap, Cevaplar, CEVAPLAR, Yanıtlar | Saatler → Dokuzdan beşe | İade → İki hafta içinde
Azerbaijani | Sual, Suallar | Cavab, Cavablar | Saatlar → Doqquzdan beşə | Qaytarma → İki həftə ərzində
Turkmen | Sorag, Soraglar | Jogap, Jogaplar | Wagt → Dokuzdan bäşe | Gaýtarmak → Iki hepdede
Uzbek | Savol, Savollar, Савол | Javob, Javoblar, Жавоб | Vaqt → Toʻqqizdan beshgacha | Qaytarish → Ikki hafta ichida
Kazakh | Сұрақ, Сұрақтар | Жауап, Жауаптар | Уақыты → Тоғыздан беске дейін | Қайтару → Екі апта ішінде
Kyrgyz | Суроо, Суроолор | Жооп, Жооптор | Убакыт → Тогуздан бешке чейин | Кайтаруу → Эки жумада
Tatar | Сорау, Сораулар | Җавап, Җаваплар | Вакыт → Тугыздан бишкә кадәр | Кире → Ике атна эчендә
Tajik | Савол, Саволҳо | Ҷавоб, Ҷавобҳо | Вақт → Аз нӯҳ то панҷ | Бозгашт → Дар ду ҳафта
Mongolian | Асуулт, Асуултууд | Хариулт, Хариултууд | Цаг → Есөөс таван цаг хүртэл | Буцаалт → Хоёр долоо хоногт
Armenian | Հարց, Հարցեր | Պատասխան, Պատասխաններ | Ժամեր → Իննից հինգը | Վերադարձ → Երկու շաբաթում
Georgian | კითხვა, კითხვები, შეკითხვა | პასუხი, პასუხები, პასუხი | საათები → ცხრიდან ხუთამდე | დაბრუნება → ორ კვირაში
Hebrew | שאלה, שאלות, השאלה | תשובה, תשובות, התשובה | שעות → מתשע עד חמש | החזרה → בתוך שבועיים
Arabic | سؤال, السؤال, الأسئلة, أسئلة شائعة | جواب, الجواب, الإجابات, الإجابة | الساعات → من التاسعة إلى الخامسة | الإرجاع → خلال أسبوعين
Persian | پرسش, سوال, پرسش‌ها, سوالات | پاسخ, جواب, پاسخ‌ها, جواب‌ها | ساعت‌ها → از نه تا پنج | مرجوعی → تا دو هفته
Pashto | پوښتنه, پوښتنې | ځواب, ځوابونه | وخت → له نهو تر پنځو | بېرته → په دوو اونیو کې
Kurdish | Pirs, Pirsên | Bersiv, Bersivên | Dem → Ji nehan heta pêncan | Vegerandin → Di du hefteyan de
Sorani | پرسیار, پرسیارەکان | وەڵام, وەڵامەکان | کات → لە نۆ تا پێنج | گەڕاندنەوە → لە دوو هەفتەدا
Uyghur | سوئال, سوئاللار | جاۋاب, جاۋابلار | ۋاقىت → توققۇزدىن بەشكىچە | قايتۇرۇش → ئىككى ھەپتىدە
Urdu | سوال, سوالات | جواب, جوابات | اوقات → نو سے پانچ تک | واپسی → دو ہفتے میں
Sindhi | سوال, سوالات | جواب, جوابات | وقت → نون کان پنجن تائين | واپسي → ٻن هفتن ۾
Hindi | प्रश्न, सवाल, प्रश्नों | उत्तर, जवाब, उत्तरों | समय → नौ से पाँच तक | वापसी → दो सप्ताह में
Marathi | प्रश्न, प्रश्‍न | उत्तर, उत्तरे | वेळ → नऊ ते पाच | परतावा → दोन आठवड्यांत
Nepali | प्रश्न, प्रश्नहरू | उत्तर, उत्तरहरू | समय → नौ देखि पाँच सम्म | फिर्ता → दुई हप्तामा
Bengali | প্রশ্ন, প্রশ্নসমূহ | উত্তর, উত্তরসমূহ | সময় → নয়টা থেকে পাঁচটা | ফেরত → দুই সপ্তাহে
Assamese | প্ৰশ্ন, প্ৰশ্নসমূহ | উত্তৰ, উত্তৰসমূহ | সময় → ন বজাৰ পৰা পাঁচ বজালৈ | ঘূৰাই → দুই সপ্তাহত
Odia | ପ୍ରଶ୍ନ, ପ୍ରଶ୍ନଗୁଡ଼ିକ | ଉତ୍ତର, ଉତ୍ତରଗୁଡ଼ିକ | ସମୟ → ନଅଟାରୁ ପାଞ୍ଚଟା | ଫେରସ୍ତ → ଦୁଇ ସପ୍ତାହରେ
Punjabi | ਸਵਾਲ, ਪ੍ਰਸ਼ਨ | ਜਵਾਬ, ਉੱਤਰ | ਸਮਾਂ → ਨੌਂ ਤੋਂ ਪੰਜ ਤੱਕ | ਵਾਪਸੀ → ਦੋ ਹਫ਼ਤਿਆਂ ਵਿੱਚ
Gujarati | પ્રશ્ન, પ્રશ્નો | જવાબ, જવાબો | સમય → નવથી પાંચ સુધી | પરત → બે અઠવાડિયામાં
Tamil | கேள்வி, கேள்விகள், வினா | பதில், பதில்கள், விடை | நேரம் → ஒன்பது முதல் ஐந்து வரை | திரும்ப → இரண்டு வாரங்களில்
Telugu | ప్రశ్న, ప్రశ్నలు | సమాధానం, సమాధానాలు | సమయం → తొమ్మిది నుండి ఐదు వరకు | వాపసు → రెండు వారాల్లో
Kannada | ಪ್ರಶ್ನೆ, ಪ್ರಶ್ನೆಗಳು | ಉತ್ತರ, ಉತ್ತರಗಳು | ಸಮಯ → ಒಂಬತ್ತರಿಂದ ಐದರವರೆಗೆ | ಹಿಂತಿರುಗಿಸುವಿಕೆ → ಎರಡು ವಾರಗಳಲ್ಲಿ
Malayalam | ചോദ്യം, ചോദ്യങ്ങൾ | ഉത്തരം, ഉത്തരങ്ങൾ | സമയം → ഒൻപതു മുതൽ അഞ്ചു വരെ | തിരികെ → രണ്ടാഴ്ചയ്ക്കകം
Sinhala | ප්‍රශ්නය, ප්‍රශ්න | පිළිතුර, පිළිතුරු | වේලාව → නවයේ සිට පහ දක්වා | ආපසු → සති දෙකකින්
Thai | คำถาม, คำถามที่พบบ่อย | คำตอบ, คำตอบ | เวลา → เก้าโมงถึงห้าโมง | คืนสินค้า → ภายในสองสัปดาห์
Lao | ຄຳຖາມ, ຄໍາຖາມ | ຄຳຕອບ, ຄໍາຕອບ | ເວລາ → ເກົ້າຫາຫ້າໂມງ | ສົ່ງຄືນ → ພາຍໃນສອງອາທິດ
Khmer | សំណួរ, សំណួរ | ចម្លើយ, ចម្លើយ | ម៉ោង → ប្រាំបួនដល់ប្រាំ | ប្រគល់ → ក្នុងពីរសប្ដាហ៍
Burmese | မေးခွန်း, မေးခွန်းများ | အဖြေ, အဖြေများ | အချိန် → ကိုးနာရီမှငါးနာရီ | ပြန်ပို့ → နှစ်ပတ်အတွင်း
Tibetan | དྲི་བ, འདྲི་བ | ལན, ལན | དུས་ཚོད → དགུ་ནས་ལྔ་བར | ཕྱིར་ལོག → བདུན་ཕྲག་གཉིས་ནང
Vietnamese | Câu hỏi, Các câu hỏi, Câu hỏi thường gặp, Hỏi | Câu trả lời, Trả lời, Đáp án đúng, Đáp | Giờ → Chín giờ đến năm giờ | Đổi trả → Trong hai tuần
Indonesian | Pertanyaan, Pertanyaan umum, Soal | Jawaban, Jawaban resmi, Jawaban | Jam → Sembilan sampai lima | Retur → Dua minggu
Malay | Soalan, Soalan lazim | Jawapan, Jawapan rasmi | Waktu → Sembilan hingga lima | Pulangan → Dua minggu
Javanese | Pitakon, Pitakonan | Wangsulan, Jawaban | Wektu → Sanga nganti lima | Bali → Rong minggu
Sundanese | Patarosan, Pananya | Waleran, Jawaban | Waktu → Salapan nepi ka lima | Balik → Dua minggu
Tagalog | Tanong, Mga tanong | Sagot, Mga sagot | Oras → Alas nuwebe hanggang alas singko | Balik → Dalawang linggo
Cebuano | Pangutana, Mga pangutana | Tubag, Mga tubag | Oras → Alas nuybe hangtod alas singko | Balik → Duha ka semana
Malagasy | Fanontaniana, Ny fanontaniana | Valiny, Ny valiny | Ora → Sivy ka hatramin'ny dimy | Famerenana → Roa herinandro
Maori | Pātai, Ngā pātai | Whakautu, Ngā whakautu | Hāora → Iwa ki te rima | Whakahoki → Rua wiki
Swahili | Swali, Maswali | Jibu, Majibu | Saa → Tatu hadi kumi na moja | Kurudisha → Wiki mbili
Amharic | ጥያቄ, ጥያቄዎች | መልስ, መልሶች | ሰዓት → ከሦስት እስከ አሥራ አንድ | መመለስ → በሁለት ሳምንት
Tigrinya | ሕቶ, ሕቶታት | መልሲ, መልስታት | ሰዓት → ካብ ትሽዓተ ክሳብ ሓሙሽተ | ምምላስ → ኣብ ክልተ ሰሙን
Somali | Su'aal, Su’aalo | Jawaab, Jawaabo | Saacadaha → Sagaal ilaa shan | Celin → Laba toddobaad
Oromo | Gaaffii, Gaaffilee | Deebii, Deebiiwwan | Sa'aatii → Sagal hanga shan | Deebisuu → Torban lama
Hausa | Tambaya, Tambayoyi | Amsa, Amsoshi | Lokaci → Tara zuwa biyar | Dawowa → Mako biyu
Yoruba | Ìbéèrè, Àwọn ìbéèrè | Ìdáhùn, Àwọn ìdáhùn | Àkókò → Mẹ́sàn-án sí márùn-ún | Ìdápadà → Ọ̀sẹ̀ méjì
Igbo | Ajụjụ, Ajụjụ ndị ahụ | Azịza, Azịza ndị ahụ | Oge → Itoolu ruo ise | Nlọghachi → Izu abụọ
Zulu | Umbuzo, Imibuzo | Impendulo, Izimpendulo | Isikhathi → Isishiyagalolunye kuya kwesihlanu | Ukubuyisa → Amasonto amabili
Xhosa | Umbuzo, Imibuzo | Impendulo, Iimpendulo | Ixesha → Ithoba ukuya kwisihlanu | Ukubuyisa → Iiveki ezimbini
Shona | Mubvunzo, Mibvunzo | Mhinduro, Mhinduro | Nguva → Nhanhatu kusvika shanu | Kudzosa → Masvondo maviri
Kinyarwanda | Ikibazo, Ibibazo | Igisubizo, Ibisubizo | Amasaha → Saa tatu kugeza saa kumi | Gusubiza → Ibyumweru bibiri
Haitian Creole | Kesyon, Kesyon yo | Repons, Repons yo | Orè → Nevè a senkè | Retou → De semèn
Chinese, simplified | 问题, 用户问题, 提问, 常见问题, 问题内容, 题目, 标准问, 问 | 答案, 标准答案, 回复, 解答, 回答内容, 正确答案, 标准答, 答 | 营业时间 → 早上九点到下午五点。 | 退货 → 两周之内。
Chinese, traditional | 問題, 使用者問題, 提問, 常見問題, 問題內容, 題目 | 答案, 標準答案, 回覆, 解答, 回答內容, 正確答案 | 營業時間 → 早上九點到下午五點。 | 退貨 → 兩週之內。
Japanese | 質問, 質問文, 質問内容, お問い合わせ, 問い合わせ内容, よくある質問, 問い, 問題文 | 回答, 回答文, 回答内容, ご回答, 回答例, 答え, 答え, 解答 | 営業時間 → 九時から五時までです。 | 返品 → 二週間以内です。
Korean | 질문, 질문내용, 문의, 문의 내용, 고객 질문, 자주 묻는 질문 | 답변, 답변내용, 응답, 답변 내용, 상담사 답변, 모범답안 | 영업시간 → 아홉 시부터 다섯 시까지입니다. | 반품 → 이 주 이내입니다.
"""


@each_of(LANGUAGES)
def test_the_columns_are_known_by_their_names_in_any_language(
    case: list[str], folder: Path
) -> None:
    _, questions, answers, *rows = case[0].split(" | ")
    pairs = [tuple(row.split(" → ")) for row in rows]
    for header in zip(questions.split(", "), answers.split(", "), strict=True):
        for step in (1, -1):
            (folder / "faq.csv").write_bytes(csv_file([row[::step] for row in (header, *pairs)]))
            assert texts(read("faq.csv")) == pairs, header


# Encodings from before Unicode, as Excel and old programs save what people write.
ENCODED = """
shift_jis
    質問 → 回答
    パスワードを忘れたときはどうすればよいですか → ログイン画面の「パスワードを忘れた方」から再設定できます。
    営業時間を教えてください → 平日は九時から十八時まで、土曜日は正午までです。
    商品を返品したいです → 到着から十四日以内にご連絡ください。
    送料はいくらですか → 全国一律五百円で、五千円以上のご注文は無料です。
    駐車場はありますか → 店舗の裏に十台分ございます。
    支払い方法は何がありますか → クレジットカード、銀行振込、代金引換をご利用いただけます。
euc_jp
    質問 → 回答
    図書館は何時に開きますか → 火曜日から日曜日まで、午前九時半に開館します。
    本は何冊まで借りられますか → お一人につき十冊まで、二週間お貸しします。
    返却が遅れたらどうなりますか → 延滞した日数だけ貸し出しが停止されます。
    カードの作り方を知りたい → 住所がわかるものを窓口にお持ちください。
    子どもでも利用できますか → はい、保護者の方とご一緒にお越しください。
    会議室の予約について → ホームページまたはお電話でお申し込みください。
cp949
    질문 → 답변
    비밀번호를 잊어버렸어요 → 로그인 화면에서 비밀번호 찾기를 눌러 주세요.
    영업시간이 어떻게 되나요 → 평일은 오전 아홉 시부터 오후 여섯 시까지입니다.
    반품하고 싶습니다 → 받으신 날부터 십사 일 이내에 연락해 주세요.
    배송비는 얼마인가요 → 전국 삼천 원이며 오만 원 이상은 무료입니다.
    주차할 수 있나요 → 건물 뒤편에 열 대까지 주차할 수 있습니다.
    결제 방법을 알려 주세요 → 신용카드와 계좌이체, 휴대폰 결제가 가능합니다.
big5
    問題 → 答案
    忘記密碼應該怎麼辦 → 請在登入頁面點選忘記密碼，再依照說明重新設定。
    請問營業時間 → 週一到週五早上九點到晚上六點，週六只到中午。
    我想要退貨 → 收到商品之後十四天之內都可以退貨。
    運費是多少錢 → 全國免費，離島地區除外。
    附近有停車場嗎 → 大樓後面有十個停車位。
    可以用什麼方式付款 → 信用卡、轉帳或是貨到付款都可以。
gb18030
    问题 → 答案
    忘记密码应该怎么办 → 请在登录页面点击忘记密码，再按照说明重新设置。
    请问营业时间 → 周一到周五早上九点到晚上六点，周六只到中午。
    我想要退货 → 收到商品之后十四天之内都可以退货。
    运费是多少钱 → 全国免费包邮，偏远地区除外。
    附近有停车场吗 → 大楼后面有十个停车位。
    可以用什么方式付款 → 信用卡、转账或者货到付款都可以。
cp1250
    Pytanie → Odpowiedź
    Nie pamiętam hasła → Proszę kliknąć „Zapomniałem hasła” na stronie logowania.
    Godziny otwarcia → Od poniedziałku do piątku między dziewiątą a piątą.
    Chciałbym zwrócić książkę → Można to zrobić w ciągu czternastu dni.
    Koszt wysyłki → Dziesięć złotych, powyżej stu złotych za darmo.
    Gdzie można zaparkować → Na tyłach budynku jest dziesięć miejsc.
    Jak mogę zapłacić → Kartą, przelewem albo gotówką przy odbiorze.
cp1250 in Czech
    Otázka → Odpověď
    Zapomněl jsem heslo → Klikněte na přihlašovací stránce na odkaz pod políčkem.
    Otevírací doba → Od pondělí do pátku mezi devátou a pátou hodinou.
    Chtěl bych vrátit zboží → Můžete tak učinit do čtrnácti dnů.
    Cena dopravy → Sto korun, při větší objednávce zdarma.
    Kde se dá zaparkovat → Za budovou je deset míst pro zákazníky.
    Jak můžu zaplatit → Kartou, převodem nebo v hotovosti při převzetí.
cp1250 in Hungarian
    Kérdés → Válasz
    Elfelejtettem a jelszavamat → Kattintson a bejelentkező oldalon a megfelelő gombra.
    Nyitvatartási idő → Hétfőtől péntekig kilenctől öt óráig vagyunk nyitva.
    Szeretném visszaküldeni → Tizennégy napon belül megteheti.
    A szállítás költsége → Ezer forint, nagyobb rendelésnél ingyenes.
    Hol lehet parkolni → Az épület mögött tíz férőhely van.
    Hogyan fizethetek → Bankkártyával, átutalással vagy készpénzzel.
cp1251
    Вопрос → Ответ
    Я забыл пароль → Нажмите на странице входа кнопку «Забыли пароль».
    Часы работы → С понедельника по пятницу с девяти до шести.
    Хочу вернуть товар → Это можно сделать в течение четырнадцати дней.
    Стоимость доставки → Триста рублей, при большом заказе бесплатно.
    Где можно поставить машину → За зданием есть десять мест.
    Как можно заплатить → Картой, переводом или наличными при получении.
cp1251 in Ukrainian
    Питання → Відповідь
    Я забув пароль → Натисніть на сторінці входу кнопку «Забули пароль».
    Години роботи → З понеділка до п'ятниці з дев'ятої до шостої.
    Хочу повернути товар → Це можна зробити протягом чотирнадцяти днів.
    Вартість доставки → Сто гривень, за більшого замовлення безкоштовно.
    Де можна залишити авто → За будівлею є десять місць.
    Як можна заплатити → Карткою, переказом або готівкою під час отримання.
cp1251 in Bulgarian
    Въпрос → Отговор
    Забравих си паролата → Натиснете бутона на страницата за вход.
    Работно време → От понеделник до петък от девет до шест часа.
    Искам да върна стоката → Можете да го направите до четиринадесет дни.
    Цена на доставката → Пет лева, а при по-голяма поръчка е безплатна.
    Къде мога да паркирам → Зад сградата има десет места.
    Как мога да платя → С карта, с превод или в брой при получаване.
koi8_r
    Вопрос → Ответ
    Я потерял читательский билет → Обратитесь к дежурному, билет восстановят за один день.
    Когда открыт читальный зал → Каждый день, кроме понедельника, с десяти до восьми.
    Сколько книг можно взять → Не больше десяти книг на две недели.
    Как продлить срок → Позвоните нам или напишите письмо.
    Есть ли скидки студентам → Да, вход для студентов бесплатный.
    Где находится гардероб → На первом этаже, справа от входа.
cp1253
    Ερώτηση → Απάντηση
    Ξέχασα τον κωδικό μου → Πατήστε στη σελίδα σύνδεσης το κουμπί κάτω από το πεδίο.
    Ώρες λειτουργίας → Από Δευτέρα έως Παρασκευή, εννέα με πέντε.
    Θέλω να επιστρέψω το προϊόν → Μπορείτε μέσα σε δεκατέσσερις ημέρες.
    Κόστος αποστολής → Τρία ευρώ, και δωρεάν για μεγάλες παραγγελίες.
    Υπάρχει χώρος στάθμευσης → Πίσω από το κτίριο υπάρχουν δέκα θέσεις.
    Τρόποι πληρωμής → Με κάρτα, με κατάθεση ή με μετρητά κατά την παραλαβή.
cp1254
    Soru → Cevap
    Şifremi unuttum → Giriş sayfasında “Şifremi unuttum” bağlantısına tıklayın.
    Çalışma saatleri → Pazartesiden cumaya dokuzdan altıya kadar açığız.
    Ürünü iade etmek istiyorum → On dört gün içinde iade edebilirsiniz.
    Kargo ücreti → Elli lira, büyük siparişlerde ücretsiz.
    Arabayı nereye bırakabilirim → Binanın arkasında on kişilik yer var.
    Nasıl ödeyebilirim → Kartla, havaleyle ya da kapıda nakit ödeyebilirsiniz.
cp1255
    שאלה → תשובה
    שכחתי את הסיסמה → יש ללחוץ על הקישור בעמוד הכניסה ולעקוב אחר ההוראות.
    שעות הפתיחה → בימים ראשון עד חמישי מתשע עד חמש.
    אני רוצה להחזיר מוצר → אפשר להחזיר בתוך ארבעה עשר ימים.
    דמי המשלוח → עשרים שקלים, ובהזמנה גדולה חינם.
    איפה אפשר לחנות → מאחורי הבניין יש עשרה מקומות.
    איך אפשר לשלם → בכרטיס אשראי, בהעברה או במזומן.
cp1256
    السؤال → الجواب
    نسيت كلمة المرور → اضغط على الرابط في صفحة الدخول ثم اتبع الخطوات.
    ساعات العمل → من الأحد إلى الخميس من التاسعة إلى الخامسة.
    أريد إرجاع المنتج → يمكنك ذلك خلال أربعة عشر يوما.
    تكلفة الشحن → عشرون ريالا، والطلبات الكبيرة مجانا.
    أين يمكنني إيقاف السيارة → خلف المبنى توجد عشرة مواقف.
    كيف يمكنني الدفع → بالبطاقة أو بالتحويل أو نقدا عند الاستلام.
cp874
    คำถาม → คำตอบ
    ลืมรหัสผ่าน → กดลิงก์ใต้ช่องรหัสผ่านในหน้าเข้าสู่ระบบ
    เวลาเปิดทำการ → วันจันทร์ถึงวันศุกร์ เก้าโมงเช้าถึงห้าโมงเย็น
    ต้องการคืนสินค้า → คืนได้ภายในสิบสี่วันหลังจากได้รับของ
    ค่าจัดส่ง → ห้าสิบบาท สั่งซื้อมากส่งฟรี
    ที่จอดรถ → หลังอาคารมีที่จอดสิบคัน
    วิธีชำระเงิน → บัตรเครดิต โอนเงิน หรือจ่ายเงินสดเมื่อรับของ
mac_roman
    Question → Réponse
    J’ai oublié mon mot de passe → Cliquez sur le lien à côté du champ, puis suivez les étapes.
    Heures d’ouverture → Du lundi au vendredi, fermé à midi et après dix-huit heures.
    Rendre un article abîmé → C’est gratuit, même après l’été.
    Frais d’expédition → Cinq euros, à régler dès la commande passée.
    Où se garer → Derrière le bâtiment, à côté de l’entrée réservée.
    Régler par chèque → Non, seulement par carte ou en espèces à la réception.
cp1252
    Frage → Antwort
    Ich möchte das Passwort ändern → Über „Konto“ und dann „Sicherheit“ – dort steht der Knopf.
    Öffnungszeiten → Täglich außer sonntags, von neun bis fünf.
    Rückgabe → Binnen vierzehn Tagen, wenn die Größe nicht passt.
    Versandkosten → Fünf Euro, für größere Bestellungen keine.
    Wo kann ich parken → Hinter dem Gebäude gibt es zehn Plätze für Gäste.
    Zahlungsarten → Mit Karte, per Überweisung oder bar – wie Sie möchten.
cp1252 in Spanish
    Pregunta → Respuesta
    He olvidado la contraseña → Pulse el botón que está debajo y siga las indicaciones.
    Horario → De lunes a sábado, según la estación del año.
    Quiero hacer una devolución → Podrá hacerla durante los próximos catorce días.
    Gastos de envío → Cinco euros; en España, más allá de la península, diez.
    Dónde se puede aparcar → Detrás del edificio, junto al jardín pequeño.
    Cómo se paga → Con tarjeta, también en metálico, nunca con cheque.
"""


@each_of(ENCODED)
def test_an_old_encoding_is_recognised_by_its_letters(
    case: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoding = case[0].split()[0]
    rows = [tuple(line.split(" → ")) for line in case[1:]]
    for delimiter in ",;\t":
        (folder / "faq.csv").write_bytes(csv_file(rows, encoding, delimiter=delimiter))
        assert texts(read("faq.csv")) == rows[1:]
        assert ft.ENCODINGS[encoding][0].split()[0] in capsys.readouterr().out
