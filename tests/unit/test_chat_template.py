"""Chat templates render as the checkpoint means them, and cannot reach out of their sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trireme.errors import InvalidCheckpoint, InvalidRequest
from trireme.gateway.chat_template import ChatTemplate, load_chat_template

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "trireme-py-1m"
TALK = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]


def test_our_checkpoints_template_equals_the_reference_renderer() -> None:
    from transformers import AutoTokenizer

    template = load_chat_template(CHECKPOINT)
    assert template is not None
    reference = AutoTokenizer.from_pretrained(str(CHECKPOINT))
    expected = reference.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert template.render(TALK) == expected == "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\n"


def test_special_tokens_and_filters_are_there() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
        {"bos_token": "<s>"},
    )
    talk = [{"role": "skip", "content": ""}, {"role": "user", "content": "é<"}]
    assert template.render(talk) == '<s>{"role": "user", "content": "é<"}>'


def test_a_template_may_refuse_a_conversation() -> None:
    template = load_chat_template(CHECKPOINT)
    assert template is not None
    with pytest.raises(InvalidRequest, match="Unknown role: tool") as caught:
        template.render([{"role": "tool", "content": "x"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ missing.attribute }}",
    ],
)
def test_a_template_cannot_reach_out_or_change_anything(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_marks_for_training_render_as_their_content() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}.{% endfor %}"
    template = ChatTemplate(source, {})
    assert template.render([{"role": "assistant", "content": "a"}]) == "a."


def test_a_broken_template_is_the_checkpoints_fault(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint):
        ChatTemplate("{% for %}", {})
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(InvalidCheckpoint):
        load_chat_template(tmp_path)


def test_a_template_file_goes_before_the_configuration(tmp_path: Path) -> None:
    config = {"chat_template": "old", "eos_token": {"content": "<e>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("new{{ eos_token }}")
    template = load_chat_template(tmp_path)
    assert template is not None and template.render([]) == "new<e>"
    (tmp_path / "chat_template.jinja").unlink()
    named = {"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    template = load_chat_template(tmp_path)
    assert template is not None and template.render([]) == "d"
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_chat_template(tmp_path) is None
