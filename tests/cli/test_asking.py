"""`generate` and `chat`: what they ask `expertune` for, print, and refuse before a model is loaded."""

import json
import logging
import os
import threading
import warnings
from types import SimpleNamespace

import pytest
from rich.console import Console

from expertune.cli.answered import Compared
from expertune.errors import ConfigError, DataError
from expertune.generation.chat import StillAnsweringError
from expertune.generation.sampling import Sampling
from expertune.run.answering import Answer
from expertune.terminal import on_terminal
from tests.cli.conftest import type_lines

TUNED = Answer("Who?", "inform(name[Ada], year[1815])", "adapter", 5, 9, "stop", 0.25)
BASE = Answer("Who?", "inform(name[Bob], year[1815])", "none", 5, 9, "length", 0.25)

DEFAULTS = {
    "max_new_tokens": 100,
    "base_only": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "seed": None,
    "system": None,
    "columns": {},
    "batch_size": 32,
    "compare": False,
    "places": (),
    "adapter": None,
    "trust_remote_code": False,
    "other_base": False,
    "model": None,
}


def loading(run_dir, which):
    """The line that a command begins with."""
    return f"{run_dir}: loading the libraries, then the base model with {which}\n"


@pytest.fixture
def asked(api):
    """What `expertune.answers` was asked; it answers each prompt in angle brackets."""
    seen = []

    def answers(run_dir, prompts, **options):
        print("a library's note")
        logging.getLogger("transformers.generation").warning("a developer's note")
        warnings.warn("a developer's warning", UserWarning, stacklevel=1)
        seen.append((prompts, options))
        which = [BASE, TUNED] if options["compare"] else [TUNED]
        return (
            Answer(prompt, f"<{prompt}>", each.adapter, 5, 9, each.finish_reason, 0.25)
            for prompt in prompts
            for each in which
        )

    api.answers = answers
    return seen


def test_generate_prints_the_answer_only(run, run_dir, asked):
    arguments = ["--prompt", "I like it.", "--max-new-tokens", "7", "--adapter", "checkpoint-2"]
    code, out, err = run("generate", run_dir, *arguments)
    assert (code, out) == (0, "<I like it.>\n")
    assert err == f"{loading(run_dir, 'the adapter of checkpoint-2')}a library's note\n"
    assert asked == [(["I like it."], DEFAULTS | {"max_new_tokens": 7, "adapter": "checkpoint-2"})]


def test_verbose_lets_warnings_of_libraries_through(run, run_dir, asked):
    with pytest.warns(UserWarning, match="a developer's warning"):
        run("generate", run_dir, "--prompt", "Who?", "--verbose")


def test_generate_reads_its_prompt_from_stdin(run, run_dir, asked, monkeypatch):
    type_lines(monkeypatch, "two", "lines", "")
    assert run("generate", run_dir, "--prompt", "-")[1] == "<two\nlines>\n"


def test_settings_of_draws_columns_and_system_reach_the_run(run, run_dir, asked):
    draws = ["--temperature", "0.7", "--top-p", "0.9", "--top-k", "40", "--seed", "3", "--batch-size", "4"]
    rest = ["--column", "context=a = b", "--column", "title=", "--system", "Be brief."]
    assert run("generate", run_dir, "--prompt", "Who?", *draws, *rest)[0] == 0
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 3, "batch_size": 4, "system": "Be brief."}
    assert asked == [(["Who?"], DEFAULTS | given | {"columns": {"context": "a = b", "title": ""}})]


def test_columns_alone_are_a_prompt(run, run_dir, asked):
    assert run("generate", run_dir, "--column", "instruction=Who?")[0] == 0
    assert asked[0][0] == [{}]


@pytest.mark.parametrize("option", ["--top-p", "--top-k"])
def test_an_option_that_temperature_0_leaves_without_effect_is_told(run, run_dir, asked, option):
    err = run("generate", run_dir, "--prompt", "Who?", "--temperature", "0", option, "1")[2]
    assert "--top-p and --top-k change nothing then\n" in err
    assert "change nothing" not in run("generate", run_dir, "--prompt", "Who?", "--temperature", "0")[2]


def test_a_seed_of_nothing_that_is_drawn_is_told(run, run_dir, asked):
    told = "--seed 3 decides nothing: the most likely token is taken each time; --temperature 1 draws\n"
    assert told in run("generate", run_dir, "--prompt", "Who?", "--seed", "3")[2]
    assert told not in run("generate", run_dir, "--prompt", "Who?", "--seed", "3", "--top-k", "5")[2]


def test_what_is_loaded_is_told_before_the_libraries_are(run, run_dir, api):
    def answers(*_, **__):
        raise DataError("here")

    api.answers = answers
    err = run("generate", run_dir, "--prompt", "Who?", "--base-only", "--model", "there")[2]
    assert err.splitlines()[0] == f"{run_dir}: loading the libraries, then there without its final adapter"


@pytest.mark.parametrize("given", [["--top-k", "0"], ["--top-p", "1"]])
def test_a_value_that_leaves_out_no_token_draws_nothing_and_this_is_told(run, run_dir, asked, given):
    err = run("generate", run_dir, "--prompt", "Who?", *given)[2]
    told = "leaves out no token, and the most likely one is taken each time; --temperature 1 draws\n"
    assert f"{' '.join(given)} {told}" in err
    assert "drawing with seed" not in err
    assert asked[0][1]["seed"] is None


def test_draws_without_a_seed_get_one_that_is_told(run, run_dir, asked):
    err = run("generate", run_dir, "--prompt", "Who?", "--temperature", "1")[2]
    seed = asked[0][1]["seed"]
    assert f"drawing with seed {seed}; --seed {seed} draws the same again\n" in err


@pytest.mark.parametrize(
    ("name", "content", "prompts", "places"),
    [
        ("q.txt", "one\n\ntwo {}\r\n", ["one", "two {}"], [1, 3]),
        ("q", "one", ["one"], [1]),
        ("q.jsonl", '{"instruction": "one", "context": ""}\n', [{"instruction": "one", "context": ""}], [1]),
        ("q.csv", "prompt\none\n", [{"prompt": "one"}], [1]),
        ("-", "one\ntwo\n", ["one", "two"], [1, 2]),
        ("-", '\n{"prompt": "one"}\n', [{"prompt": "one"}], [2]),
    ],
)
def test_prompts_of_a_file_keep_their_places(
    run, run_dir, asked, tmp_path, monkeypatch, name, content, prompts, places
):
    if name == "-":
        type_lines(monkeypatch, *content.split("\n"))
    else:
        (tmp_path / name).write_bytes(content.encode())
    code, out, _ = run("generate", run_dir, "--prompt-file", name)
    assert code == 0
    label = "stdin" if name == "-" else name
    assert (asked[0][0], asked[0][1]["places"]) == (prompts, [f"{label}: row {number}" for number in places])
    assert out.startswith("> ")


@pytest.mark.parametrize(("content", "prompt"), [("one\n", "one"), ('{"prompt": "one"}\n', {"prompt": "one"})])
def test_prompts_are_read_from_a_pipe(run, run_dir, asked, tmp_path, content, prompt):
    os.mkfifo(tmp_path / "pipe")
    writes = threading.Thread(target=(tmp_path / "pipe").write_text, args=[content])
    writes.start()
    assert run("generate", run_dir, "--prompt-file", "pipe")[0] == 0
    writes.join()
    assert (asked[0][0], asked[0][1]["places"]) == ([prompt], ["pipe: row 1"])


def test_prompts_of_a_file_are_printed_above_their_answers(run, run_dir, asked, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": "Who?", "n": 1}\n{"prompt": "a\\nb\\u001b"}\n')
    assert run("generate", run_dir, "--prompt-file", "q.jsonl")[1] == (
        "> prompt: Who?\n> n: 1\n<{'prompt': 'Who?', 'n': 1}>\n\n> prompt: a\n> b\\x1b\n<{'prompt': 'a\\nb\\x1b'}>\n\n"
    )


def test_json_is_an_object_a_line(run, run_dir, asked, tmp_path):
    (tmp_path / "q.txt").write_text("one\n\u00e9\n")
    lines = run("generate", run_dir, "--prompt-file", "q.txt", "--json")[1].splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "prompt": prompt,
            "prompt_tokens": 5,
            "completion": f"<{prompt}>",
            "adapter": "adapter",
            "tokens": 9,
            "finish_reason": "stop",
            "seconds": 0.25,
        }
        for prompt in ("one", "\u00e9")
    ]
    compared = json.loads(run("generate", run_dir, "--prompt", "one", "--json", "--compare")[1])
    assert compared.keys() == {"prompt", "prompt_tokens", "base", "tuned"}
    assert (compared["base"]["adapter"], compared["tuned"]["adapter"]) == ("none", "adapter")
    assert compared["base"]["finish_reason"] == "length"


def test_answers_that_are_cut_are_counted(run, run_dir, asked):
    err = run("generate", run_dir, "--prompt", "one", "--compare")[2]
    assert "cut after 100 tokens: 1 of 2 answers; see --max-new-tokens\n" in err


def shown(width, terminal=False, base=BASE):
    console = Console(width=width, force_terminal=terminal, color_system="standard" if terminal else None)
    with console.capture() as capture:
        console.print(Compared(base, TUNED))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_compared_answers_stand_side_by_side_or_below_each_other_by_the_width():
    assert shown(120) == [
        "> Who?",
        f"{'base':60}tuned (adapter)",
        f"{'inform(name[[-Bob-]], year[1815])':60}inform(name[{{+Ada+}}], year[1815])",
        f"{'9 tokens, 0.2 s, cut':60}9 tokens, 0.2 s",
        "",
    ]
    assert shown(60) == [
        "> Who?",
        "base",
        "inform(name[[-Bob-]], year[1815])",
        "9 tokens, 0.2 s, cut",
        "tuned (adapter)",
        "inform(name[{+Ada+}], year[1815])",
        "9 tokens, 0.2 s",
        "",
    ]


def test_compared_answers_are_marked_by_style_on_a_terminal():
    text = "\n".join(shown(60, terminal=True))
    assert "[-" not in text
    assert "{+" not in text
    assert "\x1b[9;31mBob\x1b[0m" in text
    assert "\x1b[1;32mAda\x1b[0m" in text


def test_answers_that_are_the_same_are_shown_once():
    assert shown(120, base=TUNED) == [
        "> Who?",
        "both answer the same:",
        "inform(name[Ada], year[1815])",
        "9 tokens, 0.2 s",
        "",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing is asked: give --prompt TEXT, --prompt-file FILE, or the template's columns as --column NAME="),
        (["--prompt", "a", "--prompt-file", "q.txt"], "--prompt and --prompt-file: give one of the two"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0; it must be 0"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0.0; it must be above 0 and at most 1"),
        (["--prompt", "a", "--top-k", "-1"], "top_k is -1; it must be 0"),
        (["--prompt", "a", "--column", "context"], "--column 'context': write it as NAME=TEXT"),
        (["--prompt", "a", "--column", "b=1", "--column", "b=2"], "--column b is given twice"),
        (["--prompt", "a", "--compare", "--base-only"], "leave out --base-only"),
        (["--prompt-file", "gone.txt"], "--prompt-file: gone.txt: no such file"),
        (["--prompt-file", "."], "--prompt-file: .: a folder; give a file in it"),
        (["--prompt-file", "empty.txt"], "--prompt-file: empty.txt: the file is empty"),
        (["--prompt-file", "latin1.txt"], "--prompt-file: latin1.txt: row 1: not UTF-8: byte 0xe9 at byte offset 1"),
        (["--prompt-file", "broken.jsonl"], "--prompt-file: broken.jsonl: row 2: not valid JSON"),
    ],
)
def test_bad_input_is_one_error_before_anything_is_loaded(run, run_dir, api, tmp_path, arguments, message):
    (tmp_path / "q.txt").write_text("a")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin1.txt").write_bytes(b"h\xe9\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    api.answers = None
    code, out, err = run("generate", run_dir, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("expertune: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_stdin_that_is_not_utf_8_is_named(run, run_dir, api, monkeypatch):
    type_lines(monkeypatch)
    monkeypatch.setattr("sys.stdin.buffer", SimpleNamespace(read=lambda: b"h\xe9"))
    for option in ("--prompt", "--prompt-file"):
        assert "not UTF-8: byte 0xe9 at byte offset 1" in run("generate", run_dir, option, "-")[2]


def test_what_a_model_writes_moves_no_cursor_of_a_terminal_and_is_exact_in_a_file(monkeypatch):
    text = "a\x1b[2J\tb\n\u200c\x9b"
    assert on_terminal(text) == text
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    assert on_terminal(text) == "a\\x1b[2J\tb\n\u200c\\x9b"


class EchoingConversation:
    """Repeats each question, a word at a time; `fail` maps a word to the error that it meets."""

    remembers, system, base_only, finish_reason = False, None, False, "stop"
    questions = SimpleNamespace(template=SimpleNamespace(name="viggo"))
    sampling = Sampling(7)

    def __init__(self):
        self.fail, self.turns, self.asked = {}, [], []

    def stream(self, message):
        self.asked.append((message, self.base_only, self.system))
        for word in message.split(" "):
            if word in self.fail:
                raise self.fail[word]
            yield word

    def reset(self):
        self.turns.clear()


@pytest.fixture
def chat(run, run_dir, api, monkeypatch):
    conversation, seen = EchoingConversation(), []

    def open_conversation(run_dir, **options):
        seen.append(options)
        return conversation

    api.chat = open_conversation

    def talk(*lines, options=()):
        type_lines(monkeypatch, *lines)
        return run("chat", run_dir, *options)

    return SimpleNamespace(talk=talk, conversation=conversation, seen=seen, run_dir=run_dir, fail=conversation.fail)


def test_chat_answers_each_line_and_ends_with_the_input(chat):
    code, out, err = chat.talk("one two", "  ", "three")
    assert (code, out) == (0, "onetwo\nthree\n")
    assert err == loading(chat.run_dir, "its final adapter") + (
        f"{chat.run_dir}: the base model with its final adapter. /help lists commands; /exit or Ctrl-D ends.\n"
        "Template viggo has no place for earlier turns: each line is asked by itself.\n"
    )


def test_chat_ends_at_exit(chat):
    assert chat.talk("one", "/exit", "two")[:2] == (0, "one\n")


def test_chat_says_which_adapter_answers(chat):
    assert "base model with the adapter of checkpoint-50" in chat.talk(options=["--adapter", "checkpoint-50"])[2]
    assert "mine without its final adapter" in chat.talk(options=["--base-only", "--model", "mine"])[2]
    assert [options["base_only"] for options in chat.seen] == [False, True]


def test_chat_says_that_turns_are_remembered_where_they_are(chat):
    chat.conversation.remembers = True
    assert "Earlier turns are part of each question; /reset forgets them." in chat.talk()[2]


def test_settings_of_a_chat_reach_it(chat):
    chat.talk(options=["--system", "Be brief.", "--column", "context=a", "--temperature", "0.5", "--seed", "1"])
    (options,) = chat.seen
    assert (options["system"], options["columns"]) == ("Be brief.", {"context": "a"})
    assert (options["temperature"], options["seed"], options["max_new_tokens"]) == (0.5, 1, 256)


def test_commands_of_a_chat_do_as_they_say(chat):
    chat.conversation.turns.append("a turn")
    lines = ["/base", "one", "/base", "/system Be  brief.", "two", "/system", "/reset", "three", "/etc/passwd is what"]
    code, out, err = chat.talk(*lines)
    assert (code, out) == (0, "one\ntwo\nthree\n/etc/passwdiswhat\n")
    assert chat.conversation.asked == [
        ("one", True, None),
        ("two", False, "Be  brief."),
        ("three", False, None),
        ("/etc/passwd is what", False, None),
    ]
    assert chat.conversation.turns == []
    assert err.splitlines()[3:] == [
        "From here on answers come without the adapter; earlier turns stay.",
        "From here on answers come with the adapter; earlier turns stay.",
        "The system prompt is set; earlier turns stay.",
        "The system prompt is gone; earlier turns stay.",
        "Earlier turns are forgotten.",
    ]


def test_help_lists_the_commands_and_an_unknown_one_is_no_question(chat):
    code, out, err = chat.talk("/help", "/rest")
    assert (code, out) == (0, "")
    for name in ("/help", "/reset", "/system TEXT", "/base", "/exit", "Ctrl-C"):
        assert f"\n  {name} " in err
    assert "/rest is no command; did you mean /reset?" in err


def test_system_prompt_that_a_template_refuses_does_not_end_the_chat(chat, monkeypatch):
    def refuse(self, text):
        raise ConfigError("system: template viggo has no place for a system prompt; write it into the prompt")

    monkeypatch.setattr(EchoingConversation, "system", property(lambda self: None, refuse))
    code, out, err = chat.talk("/system Be brief.", "one")
    assert (code, out) == (0, "one\n")
    assert "error: system: template viggo has no place" in err


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("length", "(cut after 7 tokens; see --max-new-tokens)"),
        ("context", "(cut where the model's context ends; /reset makes room)"),
    ],
)
def test_an_answer_that_is_cut_says_so(chat, reason, said):
    chat.conversation.finish_reason = reason
    assert said in chat.talk("one")[2]


def test_a_question_that_cannot_be_asked_does_not_end_the_chat(chat):
    chat.fail["long"] = DataError("the message makes a prompt of 9 tokens, but the model's context holds 8; shorten it")
    code, out, err = chat.talk("long", "one")
    assert (code, out) == (0, "one\n")
    assert "expertune: error: the message makes a prompt of 9 tokens" in err


def test_ctrl_c_stops_an_answer_and_not_the_chat(chat):
    chat.fail["now"] = KeyboardInterrupt()
    assert chat.talk("stop now please", "one")[:2] == (0, "stop ...\none\n")


def test_ctrl_c_while_the_first_one_waits_for_a_token_ends_the_chat(chat):
    chat.fail["now"] = StillAnsweringError()
    code, out, err = chat.talk("stop now please", "one")
    assert (code, out) == (130, "stop ...\n")
    assert err.endswith("expertune: interrupted\n")
