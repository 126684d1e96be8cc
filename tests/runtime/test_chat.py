"""Chat templates: the text that transformers would render, and an end to every template that means harm."""

import json
import threading
import time

import pytest

from tfinfer.errors import CorruptModelError, InputError, ModelError, UnsafeModelError
from tfinfer.tokens.chat import MAX_OUTPUT, MAX_TEMPLATE, ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Héllo 🎉"},
    {"role": "assistant", "content": " hi "},
]
CHATML = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
<|{{ message['role'] }}|>
{{ message.content | trim ~ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
<|assistant|>
{%- endif %}
"""


def render(source, messages=MESSAGES, **options):
    return ChatTemplate(source, TOKENS).render(messages, **options)


def test_a_usual_template_renders():
    expected = "<s><|system|>\nBe <brief> & kind.</s><|user|>\nHéllo 🎉</s><|assistant|>\nhi</s>"
    assert render(CHATML, add_generation_prompt=False) == expected
    assert render(CHATML) == expected + "<|assistant|>"


def test_blocks_leave_no_blank_lines():
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_tools_come_as_json_that_is_not_escaped_for_html():
    tools = [{"name": "f", "description": "<é>"}]
    assert render("{{ tools | tojson }}", tools=tools) == json.dumps(tools, ensure_ascii=False)
    assert render("{{ tools[0] | tojson(indent=2) }}", tools=tools) == json.dumps(
        tools[0], indent=2, ensure_ascii=False
    )
    assert render("{{ tools is none }}") == "True"


@pytest.mark.parametrize(
    "source, expected",
    [
        ("{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{% endfor %}", "0False1False2True"),
        ("{% for m in messages if m.role == 'user' %}{{ loop.length }}{% endfor %}", "1"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "3"),
        ("{% macro tag(x, y=['a', 'b']) %}<{{ x }}{{ y | join }}>{% endmacro %}{{ tag('u') ~ tag(1) }}", "<uab><1ab>"),
        ("{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}in{% endcall %}", "[in]"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "system, user, assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ (messages | first).content.split('<')[0] }}{{ messages[1:][0].role }}", "Be user"),
        ("{% for a, b in {'k': ('v', 1)}.items() %}{{ a }}{{ b }}{% endfor %}", "k('v', 1)"),
        ("{{ '<|{}|>'.format('x') }}{{ 'in %s of 2024' % 'May' }}", "<|x|>in May of 2024"),
        ("{{ '%s-%s' | format(1, 2) }}", "1-2"),
        ("{{ '{a}'.format_map({'a': 1}) }}{{ 7 * 6 }}{{ 'ab' * 2 }}{{ 2 ** 10 }}", "142abab1024"),
        ("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% for m in messages %}{% generation %}{{ m.role[0] }}{% endgeneration %}{% endfor %}", "sua"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ absent }}{{ none }}", "a1None"),
        ("{% if 'x' is in ['x', absent] and (1, 2) == (1, 2) %}yes{% endif %}", "yes"),
        ("{% for m in [[1, [2]], [3]] recursive %}{% if m is iterable %}<{{ loop(m) }}>{% else %}{{ m }}{% endif %}"
         "{% endfor %}", "<1<2>><3>"),
    ],
)  # fmt: skip
def test_what_templates_use_works(source, expected):
    """The counting must not change what a template means."""
    assert render(source) == expected


def test_the_date_is_there():
    assert render("{{ strftime_now('%Y-%m') }}") == time.strftime("%Y-%m")


def test_a_long_conversation_renders():
    """The budgets are far from what real use needs."""
    messages = [{"role": "user", "content": "x" * 900}, {"role": "assistant", "content": "y" * 90}] * 500
    assert len(render(CHATML, messages)) > 495_000


def test_copying_a_long_conversation_turn_by_turn_renders():
    """Weighing every copy down to its last string would take longer than a template may run."""
    copy = "{% for m in messages %}{% set ns.m = ns.m + [m] %}{% endfor %}"
    source = "{% set ns = namespace(m=[]) %}" + copy + "{{ ns.m | length }}"
    assert render(source, [{"role": "user", "content": "x" * 99}] * 1000) == "1000"


def test_one_template_renders_in_several_threads():
    template = ChatTemplate("{% for i in range(2000) %}{{ messages[0].content }}{% endfor %}", {})
    results = {}

    def work(name):
        results[name] = template.render([{"role": "user", "content": name}])

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: name * 2000 for name in "abcd"}


def test_messages_are_not_changed():
    with pytest.raises(UnsafeModelError):
        render("{{ messages.append(1) }}")
    with pytest.raises(UnsafeModelError):
        render("{{ messages[0].update({'role': 'x'}) }}")


BAD_MESSAGES = [
    [],
    None,
    "hello",
    {"role": "user", "content": "x"},
    ["hello"],
    [{"content": "x"}],
    [{"role": 1, "content": "x"}],
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": ["x"]}],
    [{"role": "user", "content": "x" * (MAX_OUTPUT + 1)}],
]


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=lambda messages: repr(messages)[:40])
def test_messages_of_another_shape_are_refused(messages):
    with pytest.raises(InputError, match=r"messages.*expected .*got"):
        render(CHATML, messages)


def test_tool_calls_need_no_content():
    assert render("{{ messages[0].role }}", [{"role": "assistant", "content": None, "tool_calls": [{}]}]) == "assistant"


@pytest.mark.parametrize("tools", ["x", [1], 3], ids=repr)
def test_tools_of_another_shape_are_refused(tools):
    with pytest.raises(InputError, match="tools: expected"):
        render(CHATML, tools=tools)


def test_what_the_template_refuses_is_an_input_error_with_its_words():
    with pytest.raises(InputError, match=r"chat template.*no system role here"):
        render("{{ raise_exception('no system role here') }}")


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ 'a' | nofilter }}", "{{ " + "(" * 9999 + " }}", "x" * (MAX_TEMPLATE + 1), None]
)
def test_a_template_that_does_not_compile_is_corrupt(source):
    with pytest.raises(CorruptModelError, match="chat template"):
        ChatTemplate(source, TOKENS)


def test_special_tokens_are_strings():
    with pytest.raises(CorruptModelError, match="special tokens"):
        ChatTemplate("", {"bos_token": None})


@pytest.mark.parametrize(
    "source",
    ["{{ absent.x }}", "{{ messages[9].role }}", "{{ 1 / 0 }}", "{% include 'x' %}", "{{ 'a' + 1 }}", "{{ lipsum() }}"],
)
def test_a_template_that_fails_is_a_model_error(source):
    with pytest.raises(ModelError, match="chat template: fails on these messages"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'].__mro__ }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ self.__init__ }}",
        "{% macro m() %}{% endmacro %}{{ m._func }}",
    ],
)
def test_an_attempt_to_leave_the_sandbox_is_unsafe(source):
    with pytest.raises(UnsafeModelError, match="chat template"):
        render(source)


LOOP = "{{% set ns = namespace(x={}) %}}{{% for i in range(99) %}}{}{{% endfor %}}{{{{ ns.x }}}}"
HOSTILE = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "loops that are filtered": "{% for i in range(99999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
    "sums in a loop": "{% for i in range(100000) %}{% set x = range(100000) | sum %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two calls each": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a range": "{% for i in range(1000000000) %}{% endfor %}",
    "output": "{% for i in range(100000) %}" + "x" * 100 + "{% endfor %}",
    "hidden output": "{% set y %}{% for i in range(100000) %}" + "x" * 60_000 + "{% endfor %}{% endset %}",
    "a power": "{{ 10 ** 10 ** 9 }}{{ 9 ** (9 ** 9) }}",
    "squares": LOOP.format(3, "{% set ns.x = ns.x * ns.x %}"),
    "doubling by ~": LOOP.format("'aa'", "{% set ns.x = ns.x ~ ns.x %}"),
    "doubling by +": LOOP.format("'aa'", "{% set ns.x = ns.x + ns.x %}"),
    "doubling by *": LOOP.format("'aa'", "{% set ns.x = ns.x * 2 %}"),
    "doubling by set": LOOP.format("'aa'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "doubling by join": LOOP.format("'aa'", "{% set ns.x = [ns.x, ns.x] | join %}"),
    "nested lists": LOOP.format("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
    "nested tuples": LOOP.format("(1,)", "{% set ns.x = (ns.x, ns.x) %}"),
    "nested views": LOOP.format("{}", "{% set ns.x = dict(a=ns.x.items(), b=ns.x.items()) %}").replace(
        "x={}", "x=dict()"
    ),
    "repetition": "{{ 'a' * 10000000000 }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "indent": "{% set x = '\n' * 100000 %}{{ x | indent(100000, true, true) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "replace": "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
    "join": "{% set x = 'a' * 1000000 %}{{ x.join(x) }}",
    "join of references": "{% set x = 'a' * 1000000 %}{{ range(9999) | map('replace', range(1), x) | join(x) }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "%": "{{ '%999999999d' % 1 }}",
    "% with star": "{{ '%*d' % (999999999, 1) }}",
    "% with key": "{{ '%(a)999999999d' % {'a': 1} }}",
    "% of references": "{% set x = 'a' * 1000000 %}{{ ('%(x)s' * 10000) % {'x': x} }}",
    "format": "{{ '%999999999d' | format(1) }}",
    "str.format": "{{ '{:>999999999}'.format(1) }}",
    "str.format of a width": "{{ '{:>{}}'.format(1, 99999) }}",
    "format_map": "{{ '{:>{w}}'.format_map({'w': 99999}) }}",
    "date": "{{ strftime_now('%999999999Y') }}",
    "json": "{{ messages | tojson(indent=1000000000) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_an_error_soon(name):
    """A timer by signal works in the main thread only; this one has to work in any, so it runs in another."""
    caught = []

    def work():
        try:
            render(HOSTILE[name])
        except ModelError as error:
            caught.append(str(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)  # far more than is needed: a busy machine gives a thread little time
    assert caught
    assert caught[0].startswith("chat template: ")


def test_a_hostile_constant_is_not_computed_while_compiling():
    started = time.process_time()
    with pytest.raises(ModelError):
        render("{{ 'a' | center(1000000000) }}")
    assert time.process_time() - started < 1


def test_the_next_rendering_works_after_a_hostile_one():
    """A budget that is not renewed would refuse everything that comes after."""
    template = ChatTemplate("{% for i in range(messages | length) %}{{ 'x' * 100000 }}{% endfor %}", {})
    with pytest.raises(ModelError):
        template.render([{"role": "user", "content": ""}] * 99)
    for _ in range(3):
        assert len(template.render([{"role": "user", "content": ""}] * 9)) == 900_000
