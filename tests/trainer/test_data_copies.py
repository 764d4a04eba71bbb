"""Which templates do nothing with texts but copy them, by their code and by what they ask of the texts."""

from __future__ import annotations

from typing import Any

import pytest
from tests.trainer.templates import FOLDER

from tuneward_trainer.data.copies import copies_only, environment, unasked

AROUND = "{%% for m in messages %%}<{{ m.role }}>%s{%% endfor %%}"
COPIES = [
    "{{ m.content }}",
    "{{ 'a' + m['content'] + 'b' }}",
    "{{ m.content | trim }}{{ m.content.strip() }}",
    "{% set text = m.content %}{% if text is string and text %}{{ text }}{% endif %}",
    "{% if m.role in ['user', 'system'] and loop.index0 % 2 == 0 %}{{ m.content or '' }}{% endif %}",
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ m.content }}",
    "{% generation %}{{ m.content }}{% endgeneration %}",
]
ASKS = [
    "{{ m.content if m.content != 'x' }}",
    "{{ m.content if 'x' in m.content }}",
    "{{ m.content[1:] }}",
    "{{ m.content.split('x')[-1] }}",
    "{{ m.content | length }}",
    "{{ m.content if m.content.startswith('x') }}",
    "{% if m.content in ['x', 'y'] %}{% endif %}",
    "{% for c in m.content if c is iterable %}{{ c }}{% endfor %}",
    "{{ m.content if m.content is sequence }}",
]
READS = [
    "{{ m.content | upper }}",
    "{{ 'a' ~ m.content }}",
    "{{ [m.content] | join }}",
    "{{ '%s' % m.content }}",
    "{% if m.content in 'xyz' %}{% endif %}",
    "{{ 'xyz'.startswith(m.content) }}",
    "{{ 'a' in m.content in 'xyz' }}",
    "{% set ns = namespace(_a=1) %}{{ ns._a }}",
    "{% if m.content | tojson == 'x' %}{% endif %}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(m.content) }}",
    "{% set x %}{{ m.content }}{% endset %}",
    "{{ m | tojson is string }}",
    "{% oops %}",
]


def rendered(part: str) -> str | None:
    template = environment().from_string(AROUND % part)
    messages = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}]

    def render(given: Any) -> str:
        return template.render(messages=given)

    return unasked(render, messages)


@pytest.mark.parametrize("part", COPIES)
def test_templates_that_copy(part: str) -> None:
    assert copies_only(AROUND % part)
    assert (rendered(part) or "").startswith("<user>")


@pytest.mark.parametrize("part", ASKS)
def test_templates_that_ask_a_text(part: str) -> None:
    assert copies_only(AROUND % part)
    assert rendered(part) is None


@pytest.mark.parametrize("part", READS)
def test_templates_whose_code_may_read_a_text_unnoticed(part: str) -> None:
    assert not copies_only(AROUND % part)


def test_models_templates() -> None:
    found = {name: copies_only((FOLDER / f"{name}.jinja").read_text()) for name in ("llama3", "phi3", "qwen2_5", "gptoss")}
    assert found == {"llama3": True, "phi3": True, "qwen2_5": True, "gptoss": False}
