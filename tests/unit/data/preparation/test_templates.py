"""What is written around questions: the words of the evaluation of the same kind, once."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest
import yaml

from megatron_opdlm.data.preparation.templates import TEMPLATES, plain_text, with_template

TASKS = Path(__file__).parents[4] / "megatron_opdlm" / "evaluation" / "tasks"


def evaluation_prompt(file, **row):
    """The prompt of a task of the evaluation, by jinja2 from its YAML file."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda *_: None)
    template = yaml.load((TASKS / file).read_text(), loader)["doc_to_text"]
    return jinja2.Template(template, keep_trailing_newline=True).render(row)


@pytest.mark.parametrize(
    ("domain", "file"), [("math", "_math.yaml"), ("science", "_choice.yaml"), ("codeforces", "opdlm_codeforces.yaml")]
)
def test_training_and_evaluation_ask_in_the_same_words(domain, file):
    assert with_template("How {many}?", domain) == evaluation_prompt(file, question="How {many}?")


@pytest.mark.parametrize("domain", ["code", "chat", "", "logic"])
def test_other_domains_leave_the_question_as_it_stands(domain):
    assert with_template("Hello {name}!\n", domain) == "Hello {name}!\n"


@pytest.mark.parametrize("domain", TEMPLATES)
def test_a_question_in_its_template_is_left_alone(domain):
    once = with_template("1+1=?", domain)
    assert with_template(once, domain) == once
    assert with_template(once.rstrip(), domain) == once.rstrip()


def test_the_last_message_of_the_user_is_wrapped():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    asked = [*messages, {"role": "user", "content": "1+1=?"}]
    assert with_template(asked, "math") == [*messages, {"role": "user", "content": with_template("1+1=?", "math")}]
    assert with_template([{"role": "system", "content": "Be brief"}], "math") == [
        {"role": "system", "content": "Be brief"}
    ]


def test_plain_text_is_all_that_is_said():
    assert plain_text([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]) == "a\nb"
    assert plain_text("a") == "a"
