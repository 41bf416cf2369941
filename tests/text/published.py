# ruff: noqa: E501 (templates)
"""Chat templates with the behaviour of published ones, in our own words.

A published template is the property of its model's authors, so none of their text is here. What each of these
shares with the templates in `like` is what a server meets: which roles it knows, in which order turns may
come, what empty content must look like, whether arguments are an object or text, where content may be parts,
and what is lost or refused. Instructions, error texts and layout are ours; special tokens are facts of the format.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """One template. `tokens`: the special tokens it names. `like`: the templates that behave so."""

    source: str
    like: str
    notes: str
    tokens: dict[str, str] = field(default_factory=dict)


BOS = {"bos_token": "<s>"}
EOS = {"eos_token": "</s>"}

QWEN2_5 = r"""
{%- macro turn(role, text) %}{{- '<|im_start|>' + role + '\n' + text + '<|im_end|>\n' }}{% endmacro %}
{%- set head = messages[0].content if messages[0].role == 'system' else 'Be of use.' %}
{%- if tools %}
    {{- '<|im_start|>system\n' ~ head ~ '\nFunctions: ' ~ (tools | tojson) ~ '<|im_end|>\n' }}
{%- else %}
    {{- turn('system', head) }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls) %}
        {{- turn(m.role, m.content) }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if m.content %}{{- '\n' + m.content }}{% endif %}
        {%- for c in m.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' ~ c.function.name ~ '", "arguments": ' ~ (c.function.arguments | tojson) ~ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' }}{{- m.content }}{{- '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

QWEN3_FIRST = r"""
{%- if tools or messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + (messages[0].content + '\n' if messages[0].role == 'system' else '') }}
    {%- if tools %}{{- 'Functions: ' ~ (tools | tojson) }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set seen = namespace(query=-1) %}
{%- for m in messages[::-1] %}
    {%- if m.role == 'user' and seen.query < 0 and not m.content.startswith('<tool_response>') %}
        {%- set seen.query = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set said = m.content %}
        {%- set thought = m.reasoning_content if m.reasoning_content else '' %}
        {%- if not thought and '</think>' in m.content %}
            {%- set thought = m.content.split('</think>')[0] %}
            {%- set said = m.content.split('</think>')[-1] %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if thought and loop.index0 > seen.query %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
        {{- '' + said }}
        {%- for c in m.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}
            {{- c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if enable_thinking is false else '') }}{% endif %}"""

QWQ = r"""
{%- set told = messages[0].role == 'system' %}
{%- if tools %}
    {{- '<|im_start|>system\n' ~ (messages[0].content if told else '') ~ '\nFunctions: ' ~ (tools | tojson) ~ '<|im_end|>\n' }}
{%- elif told %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' + m.content.split('</think>')[-1].lstrip('\n') }}
        {%- for c in m.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' ~ c.function.name ~ '", "arguments": ' ~ (c.function.arguments | tojson) ~ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{% endif %}"""

QWEN3_CODER = r"""
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- if tools or messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + (messages[0].content + '\n' if messages[0].role == 'system' else '') }}
    {%- if tools %}{{- 'Functions: ' ~ (tools | tojson) }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for m in rest %}
    {%- if m.role == 'assistant' and m.tool_calls %}
        {{- '<|im_start|>assistant\n' }}
        {%- if m.content is string and m.content | trim %}{{- m.content | trim + '\n' }}{% endif %}
        {%- for c in m.tool_calls %}
            {{- '<tool_call>\n<function=' + c.function.name + '>\n' }}
            {%- for name, value in c.function.arguments | items %}
                {{- '<parameter=' + name + '>\n' ~ (value if value is string else value | tojson) ~ '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>\n' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

QWEN3_5 = r"""
{%- macro shown(content) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is not none and content is defined %}
        {%- for part in content %}
            {%- if part.type == 'image' %}
                {{- '<|image_pad|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- else %}
                {{- raise_exception('A part of type ' ~ part.type ~ ' is unknown.') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if not messages | selectattr('role', 'equalto', 'user') | list %}{{- raise_exception('A user message is needed.') }}{% endif %}
{%- if tools or messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' }}
    {%- if tools %}{{- 'Functions: ' ~ (tools | tojson) ~ '\n' }}{% endif %}
    {{- (shown(messages[0].content) if messages[0].role == 'system' else '') ~ '<|im_end|>\n' }}
{%- endif %}
{%- set asked = namespace(at=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set asked.at = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set text = shown(m.content) | trim %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\n' + text + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thought = m.reasoning_content if m.reasoning_content is string else text.split('</think>')[0] if '</think>' in text else '' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > asked.at %}{{- '<think>\n' + thought.replace('<think>', '') + '\n</think>\n\n' }}{% endif %}
        {{- text.split('</think>')[-1] }}
        {%- for c in m.tool_calls or [] %}
            {{- '\n<tool_call>\n<function=' + c.function.name + '>\n' }}
            {%- for name, value in c.function.arguments | items %}
                {{- '<parameter=' + name + '>\n' ~ (value if value is string else value | tojson) ~ '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + text + '\n</tool_response><|im_end|>\n' }}
    {%- elif m.role != 'system' or not loop.first %}
        {{- raise_exception('Role ' ~ m.role ~ ' cannot stand here.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{% endif %}"""

LLAMA_3_1 = r"""
{{- bos_token }}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{% endif %}
{{- '<|eot_id|>' }}
{%- if tools %}
    {%- if not rest %}{{- raise_exception('The functions have no message to stand in.') }}{% endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\nFunctions: ' ~ (tools | tojson) ~ '\n' }}{{- rest[0].content | trim }}{{- '<|eot_id|>' }}
    {%- set rest = rest[1:] %}
{%- endif %}
{%- for m in rest %}
    {%- if 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('One call a message, no more and no less.') }}{% endif %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' ~ m.tool_calls[0].function.name }}
        {{- '", "parameters": ' ~ (m.tool_calls[0].function.arguments | tojson) ~ '}<|eot_id|>' }}
    {%- elif m.role in ['tool', 'ipython'] %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {{- m.content | tojson if m.content is iterable and m.content is not string else m.content }}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{{- m.content | trim }}{{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

LLAMA_4 = r"""
{%- macro shown(content) %}
    {%- if content is string %}
        {{- content | trim }}
    {%- else %}
        {%- for part in content %}{% if part.type == 'text' %}{{- part.text | trim }}{% endif %}{% endfor %}
    {%- endif %}
{%- endmacro %}
{{- bos_token }}
{%- set told = messages[0].role == 'system' %}
{%- set rest = messages[1:] if told else messages %}
{{- '<|header_start|>system<|header_end|>\n\n' ~ (shown(messages[0].content) if told else 'Be of use.') ~ '<|eot|>' }}
{%- if tools and not rest %}{{- raise_exception('The functions have no message to stand in.') }}{% endif %}
{%- for m in rest %}
    {%- if tools and loop.first %}
        {{- '<|header_start|>user<|header_end|>\n\nFunctions: ' ~ (tools | tojson) ~ '\n' ~ shown(m.content) ~ '<|eot|>' }}
    {%- elif m.tool_calls is defined and m.tool_calls | length > 0 %}
        {{- '<|header_start|>assistant<|header_end|>\n\n' ~ shown(m.content) }}
        {%- for c in m.tool_calls %}
            {{- '{"name": "' ~ c.function.name ~ '", "parameters": ' ~ (c.function.arguments | tojson) ~ '}' }}
        {%- endfor %}
        {{- '<|eot|>' }}
    {%- elif m.role in ['tool', 'ipython'] %}
        {{- '<|header_start|>ipython<|header_end|>\n\n' ~ shown(m.content) ~ '<|eom|>' }}
    {%- elif m.tool_calls is not defined %}
        {{- '<|header_start|>' ~ m.role ~ '<|header_end|>\n\n' ~ shown(m.content) ~ '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}"""

# Mistral: turns alternate, but for calls and their results; the ids have nine characters.
MISTRAL_NEMO = r"""
{{- bos_token }}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- set last_user = (rest | selectattr('role', 'equalto', 'user') | list)[-1] %}
{%- set turns = namespace(count=0) %}
{%- for m in rest %}
    {%- set calls = m.tool_calls is defined and m.tool_calls is not none %}
    {%- if m.role != 'tool' and not calls %}
        {%- if (m.role == 'user') != (turns.count % 2 == 0) %}{{- raise_exception('User and assistant take turns.') }}{% endif %}
        {%- set turns.count = turns.count + 1 %}
    {%- endif %}
    {%- if m.role == 'user' %}
        {%- if tools and m == last_user %}{{- '[AVAILABLE_TOOLS]' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}{% endif %}
        {{- '[INST]' + (messages[0].content + '\n\n' if loop.last and messages[0].role == 'system' else '') + m.content + '[/INST]' }}
    {%- elif calls %}
        {{- '[TOOL_CALLS][' }}
        {%- for c in m.tool_calls %}
            {%- if c.id is not defined or c.id | length != 9 %}{{- raise_exception('A call needs an id of nine characters.') }}{% endif %}
            {{- '{"name": "' ~ c.function.name ~ '", "arguments": ' ~ (c.function.arguments | tojson) ~ ', "id": "' ~ c.id ~ '"}' }}
            {{- '' if loop.last else ', ' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif m.role == 'assistant' %}
        {{- m.content + eos_token }}
    {%- elif m.role == 'tool' %}
        {%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{- raise_exception('A result needs an id of nine characters.') }}{% endif %}
        {{- '[TOOL_RESULTS]{"content": ' ~ m.content ~ ', "call_id": "' ~ m.tool_call_id ~ '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('No place for the role ' ~ m.role) }}
    {%- endif %}
{%- endfor %}"""

MISTRAL_SMALL_3_2 = r"""
{%- macro shown(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {%- if part.type == 'text' %}{{- part.text }}{% elif part.type == 'image' %}{{- '[IMG]' }}{% else %}{{- raise_exception('A part of type ' ~ part.type ~ ' is unknown.') }}{% endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- macro system(content) %}{{- '[SYSTEM_PROMPT]' + (content if content is string else content[0].text) + '[/SYSTEM_PROMPT]' }}{% endmacro %}
{{- bos_token }}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{{- system(messages[0].content if messages[0].role == 'system' else 'Be brief.') }}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- set turns = namespace(count=0) %}
{%- for m in rest %}
    {%- if m.role != 'tool' and not m.tool_calls %}
        {%- if (m.role == 'user') != (turns.count % 2 == 0) %}{{- raise_exception('User and assistant take turns.') }}{% endif %}
        {%- set turns.count = turns.count + 1 %}
    {%- endif %}
    {%- if m.role == 'system' %}
        {{- system(m.content) }}
    {%- elif m.role == 'user' %}
        {{- '[INST]' ~ shown(m.content) ~ '[/INST]' }}
    {%- elif m.role == 'assistant' and m.tool_calls %}
        {%- for c in m.tool_calls %}
            {%- if c.id is not string or c.id | length != 9 %}{{- raise_exception('A call needs an id of nine characters.') }}{% endif %}
            {{- '[TOOL_CALLS]' ~ c.function.name ~ '[CALL_ID]' ~ c.id ~ '[ARGS]' ~ (c.function.arguments | tojson) }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'assistant' %}
        {{- shown(m.content) + eos_token }}
    {%- elif m.role == 'tool' %}
        {%- if m.tool_call_id is not string or m.tool_call_id | length != 9 %}{{- raise_exception('A result needs an id of nine characters.') }}{% endif %}
        {{- '[TOOL_RESULTS]' ~ m.tool_call_id ~ '[TOOL_CONTENT]' ~ m.content ~ '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('No place for the role ' ~ m.role) }}
    {%- endif %}
{%- endfor %}"""

MISTRAL_3_VLLM = r"""
{{- bos_token }}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- if messages[0].role == 'system' %}
    {{- '[SYSTEM_PROMPT]' + (messages[0].content if messages[0].content is string else messages[0].content[0].text) + '[/SYSTEM_PROMPT]' }}
{%- endif %}
{%- if tools %}{{- '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for m in rest %}
    {%- if m.role == 'user' %}
        {{- '[INST]' }}
        {%- if m.content is string %}{{- m.content }}{% else %}{% for part in m.content %}{{- part.text }}{% endfor %}{% endif %}
        {{- '[/INST]' }}
    {%- elif m.tool_calls is defined %}
        {{- '[TOOL_CALLS] [' }}
        {%- for c in m.tool_calls %}
            {%- if c.id | length < 9 %}{{- raise_exception('The id ' + c.id + ' is too short.') }}{% endif %}
            {{- '{"name": "' ~ c.function.name ~ '", "arguments": ' ~ (c.function.arguments | tojson) ~ ', "id": "' ~ c.id[-9:] ~ '"}' }}
            {{- '' if loop.last else ', ' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif m.role == 'assistant' %}
        {{- (m.content if m.content is string else m.content[0].text) + eos_token }}
    {%- elif m.role == 'tool' %}
        {%- if m.tool_call_id | length < 9 %}{{- raise_exception('The id ' + m.tool_call_id + ' is too short.') }}{% endif %}
        {{- '[TOOL_RESULTS] {"content": ' ~ m.content ~ ', "call_id": "' ~ m.tool_call_id[-9:] ~ '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('No place for the role ' ~ m.role) }}
    {%- endif %}
{%- endfor %}"""

DEVSTRAL_2507 = r"""
{%- macro first(content) %}{{- content if content is string else content[0]['text'] + '' }}{% endmacro %}
{{- bos_token }}
{%- if messages[0].role != 'system' %}{{- '[SYSTEM_PROMPT]Work on the code.[/SYSTEM_PROMPT]' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {{- '[SYSTEM_PROMPT]' ~ first(m.content) ~ '[/SYSTEM_PROMPT]' }}
    {%- elif m.role == 'user' %}
        {{- '[INST]' }}
        {%- if m.content is string %}
            {{- m.content }}
        {%- else %}
            {%- for part in m.content %}
                {%- if part.type == 'text' %}{{- part.text }}{% elif part.type == 'image' %}{{- '[IMG]' }}{% else %}{{- raise_exception('A part of type ' ~ part.type ~ ' is unknown.') }}{% endif %}
            {%- endfor %}
        {%- endif %}
        {{- '[/INST]' }}
    {%- elif m.role == 'assistant' %}
        {{- first(m.content) }}
        {%- for c in m.tool_calls or [] %}
            {%- set text = c.function.arguments if c.function.arguments is string else c.function.arguments | tojson %}
            {{- '[TOOL_CALLS]' + c.function.name + '[ARGS]' + text }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS]' ~ m.content ~ '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('No place for the role ' ~ m.role) }}
    {%- endif %}
    {%- if loop.first and tools %}{{- '[AVAILABLE_TOOLS]' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- endfor %}"""

MINISTRAL_3 = r"""
{%- macro chunks(content, image=false) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for chunk in content %}
            {%- if chunk.type == 'text' %}
                {{- chunk.text }}
            {%- elif chunk.type == 'thinking' %}
                {{- '[THINK]' + chunk.thinking + '[/THINK]' }}
            {%- elif chunk.type == 'image' and image %}
                {{- '[IMG]' }}
            {%- else %}
                {{- raise_exception('A chunk of type ' ~ chunk.type ~ ' is unknown.') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{{- bos_token }}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{{- '[SYSTEM_PROMPT]' ~ chunks(messages[0].content if messages[0].role == 'system' else 'Think first.') ~ '[/SYSTEM_PROMPT]' }}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- set turns = namespace(count=0) %}
{%- for m in rest %}
    {%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
        {%- if (m.role == 'user') != (turns.count % 2 == 0) %}{{- raise_exception('User and assistant take turns.') }}{% endif %}
        {%- set turns.count = turns.count + 1 %}
    {%- endif %}
    {%- if m.role == 'user' %}
        {%- if m.content | length == 0 and m.content is not string %}{{- raise_exception('A user message needs content.') }}{% endif %}
        {{- '[INST]' ~ chunks(m.content, true) ~ '[/INST]' }}
    {%- elif m.role == 'assistant' %}
        {%- if not m.content and not m.tool_calls %}{{- raise_exception('An assistant message needs content or calls.') }}{% endif %}
        {%- if m.content | length > 0 %}{{- chunks(m.content) }}{% endif %}
        {%- for c in m.tool_calls or [] %}
            {%- set text = c.function.arguments if c.function.arguments is string else c.function.arguments | tojson %}
            {{- '[TOOL_CALLS]' + c.function.name + '[ARGS]' + (text or '{}') }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS]' ~ m.content ~ '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('No place for the role ' ~ m.role) }}
    {%- endif %}
{%- endfor %}"""

# DeepSeek: what the assistant's content must be for its calls to show differs from release to release.
DEEPSEEK_V3 = r"""
{%- set all = namespace(systems='', answering=false) %}
{%- for m in messages %}{% if m.role == 'system' %}{% set all.systems = all.systems + ('\n\n' if all.systems else '') + m.content %}{% endif %}{% endfor %}
{{- bos_token ~ all.systems }}
{%- if tools %}{{- '\nFunctions: ' ~ (tools | tojson) }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|User|>' + m.content + '<|Assistant|>' }}
    {%- elif m.role == 'assistant' and m.tool_calls is defined and m.tool_calls is not none %}
        {%- for c in m.tool_calls %}
            {%- if loop.first and m.content is not none %}{{- m.content + '' }}{% endif %}
            {{- '<|call|>' + c.type + '<|sep|>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}
        {%- endfor %}
        {{- '<|end|>' }}
    {%- elif m.role == 'assistant' %}
        {{- m.content + '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|output|>' + m.content + '<|/output|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role not in ['user', 'tool'] %}{{- '<|Assistant|>' }}{% endif %}"""

R1_DISTILL_QWEN = r"""
{%- set last = namespace(system='') %}
{%- for m in messages %}{% if m.role == 'system' %}{% set last.system = m.content %}{% endif %}{% endfor %}
{{- bos_token ~ last.system }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|User|>' + m.content }}
    {%- elif m.role == 'assistant' and m.content is none %}
        {{- '<|Assistant|><|calls|>' }}
        {%- for c in m.tool_calls %}
            {{- '<|call|>' + c.type + '<|sep|>' + c.function.name + '\n```json\n' + (c.function.arguments | tojson) + '\n```' }}
        {%- endfor %}
        {{- '<|end|>' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|Assistant|>' + (m.content.split('</think>')[-1] if '</think>' in m.content else m.content) + '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|output|>' + m.content + '<|/output|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{- '<|Assistant|><think>\n' }}{% endif %}"""

R1_DISTILL_LLAMA = R1_DISTILL_QWEN.replace(
    "(c.function.arguments | tojson)", "c.function.arguments"
)

R1_LLAMA_CPP = R1_DISTILL_QWEN.replace("m.content is none", "not m.content")

DEEPSEEK_V3_1 = r"""
{%- set all = namespace(systems='') %}
{%- for m in messages %}{% if m.role == 'system' %}{% set all.systems = all.systems + ('\n\n' if all.systems else '') + m.content %}{% endif %}{% endfor %}
{{- bos_token ~ all.systems }}
{%- for m in messages %}
    {%- set open = '<|Assistant|></think>' if loop.previtem is defined and loop.previtem.role == 'user' else '' %}
    {%- if m.role == 'user' %}
        {{- '<|User|>' + m.content }}
    {%- elif m.role == 'assistant' and m.tool_calls %}
        {{- open }}{%- if m.content %}{{- m.content + '' }}{% endif %}
        {%- for c in m.tool_calls %}
            {{- '<|call|>' + c.function.name + '<|sep|>' + (c.function.arguments | tojson) + '<|/call|>' }}
        {%- endfor %}
        {{- '<|end|>' }}
    {%- elif m.role == 'assistant' %}
        {{- open + (m.content.split('</think>')[1] if '</think>' in m.content else m.content) + '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|output|>' + m.content + '<|/output|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role == 'user' %}{{- '<|Assistant|></think>' }}{% endif %}"""

DEEPSEEK_V3_2 = r"""
{%- set all = namespace(systems='') %}
{%- for m in messages %}{% if m.role == 'system' %}{% set all.systems = all.systems + ('\n\n' if all.systems else '') + (m.content or '') %}{% endif %}{% endfor %}
{{- bos_token ~ all.systems }}
{%- if tools %}{{- '\nFunctions: ' ~ (tools | tojson) }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|User|>' + (m.content or '') }}
    {%- elif m.role == 'assistant' %}
        {{- '<|Assistant|></think>' ~ (m.content or '') }}
        {%- for c in m.tool_calls or [] %}
            {%- set fields = c.function.arguments %}
            {%- if fields is string %}{% set fields = fields | from_json %}{% endif %}
            {{- '<invoke name="' + c.function.name + '">' }}
            {%- for name, value in fields.items() %}
                {{- '<parameter name="' + name + '">' ~ (value if value is string else value | tojson) ~ '</parameter>' }}
            {%- endfor %}
            {{- '</invoke>' }}
        {%- endfor %}
        {{- '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<result>' + (m.content or '') + '</result>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'assistant' %}{{- '<|Assistant|></think>' }}{% endif %}"""

GLM_4_6 = r"""
{%- macro shown(content) %}
    {%- if content is iterable and content is not string %}
        {%- for part in content %}{{- part if part is string else part.text }}{% endfor %}
    {%- else %}
        {{- content }}
    {%- endif %}
{%- endmacro %}
{{- '[gMASK]<sop>' }}
{%- if tools %}{{- '<|system|>\nFunctions: ' ~ (tools | tojson) }}{% endif %}
{%- set asked = namespace(at=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set asked.at = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role in ['user', 'system'] %}
        {{- '<|' + m.role + '|>\n' + shown(m.content) }}
    {%- elif m.role == 'assistant' %}
        {%- set text = shown(m.content) %}
        {%- set thought = m.reasoning_content if m.reasoning_content is string else text.split('</think>')[0] if '</think>' in text else '' %}
        {{- '<|assistant|>\n<think>' + (thought if loop.index0 > asked.at else '') + '</think>\n' + text.split('</think>')[-1] }}
        {%- for c in m.tool_calls or [] %}
            {%- set fields = c.function.arguments or {} %}
            {%- if fields is not mapping %}{{- raise_exception('The arguments are no object: ' ~ fields) }}{% endif %}
            {{- '\n<tool_call>' + c.function.name }}
            {%- for name, value in fields.items() %}
                {{- '\n<arg_key>' ~ name ~ '</arg_key>\n<arg_value>' ~ (value if value is string else value | tojson) ~ '</arg_value>' }}
            {%- endfor %}
            {{- '\n</tool_call>' }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}
        {{- '<|observation|>\n<tool_response>\n' }}
        {%- if m.content is string %}{{- m.content }}{% else %}{% for part in m.content %}{{- part }}{% endfor %}{% endif %}
        {{- '\n</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""

GLM_4_7 = r"""
{%- macro shown(content) %}
    {%- if content is iterable and content is not string %}
        {%- for part in content %}{{- part if part is string else part.text }}{% endfor %}
    {%- else %}
        {{- content }}
    {%- endif %}
{%- endmacro %}
{{- '[gMASK]<sop>' }}
{%- if tools %}{{- '<|system|>Functions: ' ~ (tools | tojson) }}{% endif %}
{%- set asked = namespace(at=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set asked.at = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role in ['user', 'system'] %}
        {{- '<|' + m.role + '|>' + shown(m.content) }}
    {%- elif m.role == 'assistant' %}
        {%- set text = shown(m.content) %}
        {%- set thought = m.reasoning_content if m.reasoning_content is string else text.split('</think>')[0] if '</think>' in text else '' %}
        {{- '<|assistant|>' + ('<think>' + thought if thought and loop.index0 > asked.at else '') + '</think>' + text.split('</think>')[-1] }}
        {%- for c in m.tool_calls or [] %}
            {{- '<tool_call>' + c.function.name }}
            {%- for name, value in c.function.arguments.items() %}
                {{- '<arg_key>' ~ name ~ '</arg_key><arg_value>' ~ (value if value is string else value | tojson) ~ '</arg_value>' }}
            {%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}
        {{- '<|observation|><tool_response>' }}
        {%- if m.content is string %}{{- m.content }}{% else %}{% for part in m.content %}{{- part }}{% endfor %}{% endif %}
        {{- '</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>' }}{% endif %}"""

GPT_OSS = r"""
{{- '<|start|>system<|message|>Channels: analysis, commentary, final.<|end|>' }}
{%- set told = messages[0].role in ['developer', 'system'] %}
{%- set rest = messages[1:] if told else messages %}
{%- if told or tools %}
    {{- '<|start|>developer<|message|>' }}
    {%- if told and messages[0].content %}{{- messages[0].content }}{% endif %}
    {%- if tools %}{{- '\nFunctions: ' ~ (tools | tojson) }}{% endif %}
    {{- '<|end|>' }}
{%- endif %}
{%- set called = namespace(name=none) %}
{%- for m in rest %}
    {%- if m.role == 'assistant' %}
        {%- if 'content' in m and '<|channel|>' in m.content %}{{- raise_exception('Channels have fields of their own.') }}{% endif %}
        {%- if 'tool_calls' in m %}
            {%- set call = m.tool_calls[0].function %}
            {%- set answered = rest[loop.index:] | selectattr('role', 'equalto', 'assistant') | rejectattr('tool_calls', 'defined') | list %}
            {%- if m.content and m.thinking %}
                {{- raise_exception('Beside calls there is content or thinking.') }}
            {%- elif (m.content or m.thinking) and not answered %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}
            {%- endif %}
            {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' + (call.arguments | tojson) + '<|call|>' }}
            {%- set called.name = call.name %}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
            {%- set called.name = none %}
        {%- endif %}
    {%- elif m.role == 'tool' %}
        {%- if called.name is none %}{{- raise_exception('A result follows a call.') }}{% endif %}
        {{- '<|start|>functions.' + called.name + ' to=assistant<|channel|>commentary<|message|>' + (m.content | tojson) + '<|end|>' }}
    {%- elif m.role == 'user' %}
        {{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""

GEMMA_2 = r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('There is no system role.') }}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('User and assistant take turns.') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}{{- m.content | trim }}{{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}"""

GEMMA_3 = r"""
{{- bos_token }}
{%- set told = messages[0].role == 'system' %}
{%- if told %}{% set head = (messages[0].content if messages[0].content is string else messages[0].content[0].text) + '\n\n' %}{% endif %}
{%- for m in (messages[1:] if told else messages) %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('User and assistant take turns.') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (head if told and loop.first else '') }}
    {%- if m.content is string %}
        {{- m.content | trim }}
    {%- elif m.content is iterable %}
        {%- for part in m.content %}{% if part.type == 'text' %}{{- part.text | trim }}{% endif %}{% endfor %}
    {%- else %}
        {{- raise_exception('Content is text or parts.') }}
    {%- endif %}
    {{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}"""

GEMMA_3_TOOLS = r"""
{{- bos_token }}
{%- set told = messages[0].role == 'system' %}
{%- if told %}{% set head = (messages[0].content if messages[0].content is string else messages[0].content[0].text) + '\n\n' %}{% endif %}
{%- set turns = namespace(count=0) %}
{%- for m in (messages[1:] if told else messages) %}
    {%- if m.role != 'tool' and m.tool_calls is not defined %}
        {%- if (m.role == 'user') != (turns.count % 2 == 0) %}{{- raise_exception('User and assistant take turns.') }}{% endif %}
        {%- set turns.count = turns.count + 1 %}
    {%- endif %}
    {%- set role = 'model' if m.role == 'assistant' else 'user' if m.role == 'tool' else m.role %}
    {{- '<start_of_turn>' + role + '\n' + (head if told and loop.first else '') }}
    {%- if tools and loop.first %}{{- 'Functions: ' ~ (tools | tojson) ~ '\n' }}{% endif %}
    {%- for c in m.tool_calls or [] %}
        {{- c.function.name + '(' }}
        {%- if c.function.arguments is mapping %}
            {%- for name, value in c.function.arguments.items() %}{{- name ~ '=' ~ (value | tojson) ~ ('' if loop.last else ', ') }}{% endfor %}
        {%- elif c.function.arguments is iterable %}
            {{- c.function.arguments | map('tojson') | join(', ') }}
        {%- else %}
            {{- c.function.arguments | tojson }}
        {%- endif %}
        {{- ')' }}
    {%- endfor %}
    {%- if m.content is string %}
        {{- m.content | trim }}
    {%- elif m.content is iterable %}
        {%- for part in m.content %}{% if part.type == 'text' %}{{- part.text | trim }}{% endif %}{% endfor %}
    {%- else %}
        {{- raise_exception('Content is text or parts.') }}
    {%- endif %}
    {{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}"""

PHI_4_MINI = r"""
{{- '<|system|>' }}
{{- messages[0].content | trim if messages[0].role == 'system' else 'Be of use.' }}
{%- if tools %}{{- '\nFunctions: ' ~ (tools | tojson) }}{% endif %}
{{- '<|end|>' }}
{%- for m in messages if m.role != 'system' %}
    {{- '<|' + m.role + '|>' }}
    {%- if m.content %}
        {{- m.content }}
    {%- else %}
        {%- for c in m.tool_calls or [] %}{{- '{"name": "' ~ c.function.name ~ '", "arguments": ' ~ c.function.arguments ~ '}' }}{% endfor %}
    {%- endif %}
    {{- '<|end|>' }}
{%- endfor %}
{{- '<|assistant|>' }}"""

GRANITE_3_3 = r"""
{%- macro turn(role, text) %}{{- '<|start_of_role|>' + role + '<|end_of_role|>' + text + '<|end_of_text|>\n' }}{% endmacro %}
{%- if messages[0].role != 'system' %}{{- turn('system', 'Be of use.') }}{% endif %}
{%- if tools %}{{- turn('available_tools', tools | tojson) }}{% endif %}
{%- for m in messages %}{{- turn(m.role, m.content) }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

GRANITE_3_0_TOOLS = r"""
{%- macro turn(role, text) %}{{- '<|start_of_role|>' + role + '<|end_of_role|>' + text + '<|end_of_text|>\n' }}{% endmacro %}
{%- if tools %}{{- turn('available_tools', tools | tojson) }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and m.tool_calls is defined %}
        {{- turn('assistant', '<|tool_call|>' + (m.tool_calls | map(attribute='function') | list | tojson)) }}
    {%- elif m.role == 'tool' %}
        {{- turn('tool_response', m.content) }}
    {%- elif m.role in ['system', 'user', 'assistant'] %}
        {{- turn(m.role, m.content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

# The system message opens the prompt and then meets the loop, which does not know it.
GRANITE_20B_FC = r"""
{{- 'SYSTEM: ' + (messages[0].content if messages[0].role == 'system' else 'Call functions where they help.') }}
{%- if tools %}{{- '<|function_call_library|>' ~ (tools | tojson) }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '\nUSER: ' + m.content }}
    {%- elif m.role == 'assistant' and m.tool_calls is defined %}
        {{- '\nASSISTANT:' }}
        {%- for c in m.tool_calls %}
            {{- '<function_call> {"name": "' ~ c.function.name ~ '", "arguments": ' ~ (c.function.arguments | tojson) ~ '}' }}
        {%- endfor %}
        {{- '<|endoftext|>' }}
    {%- elif m.role == 'assistant' %}
        {{- '\nASSISTANT: ' + m.content + '<|endoftext|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<function_response> ' + m.content }}
    {%- else %}
        {{- raise_exception('No place for the role ' ~ m.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '\nASSISTANT: ' }}{% endif %}"""

MINIMAX_M2 = r"""
{%- macro shown(content) %}
    {%- if content is iterable and content is not string %}
        {%- for part in content %}{{- part if part is string else part.text }}{% endfor %}
    {%- else %}
        {{- content }}
    {%- endif %}
{%- endmacro %}
{{- ']~b]system\n' ~ (shown(messages[0].content) if messages[0].role == 'system' and messages[0].content else 'Be of use.') }}
{%- if tools %}{{- '\nFunctions: ' ~ (tools | tojson) }}{% endif %}
{{- '[e~[\n' }}
{%- set state = namespace(asked=-1, called=false) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set state.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- ']~b]user\n' + shown(m.content) + '[e~[\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set text = shown(m.content) %}
        {%- set thought = m.reasoning_content if m.reasoning_content is string else text.split('</think>')[0] if '</think>' in text else '' %}
        {{- ']~b]ai\n' + ('<think>\n' + thought + '\n</think>\n' if thought and loop.index0 > state.asked else '') + text.split('</think>')[-1] }}
        {%- for c in m.tool_calls or [] %}
            {{- '<minimax:tool_call><invoke name="' + c.function.name + '">' }}
            {%- for name, value in c.function.arguments.items() %}
                {{- '<parameter name="' + name + '">' ~ (value if value is string else value | tojson) ~ '</parameter>' }}
            {%- endfor %}
            {{- '</invoke></minimax:tool_call>' }}
        {%- endfor %}
        {%- set state.called = m.tool_calls | length > 0 if m.tool_calls else false %}
        {{- '[e~[\n' }}
    {%- elif m.role == 'tool' %}
        {%- if not state.called %}{{- raise_exception('A result follows a call.') }}{% endif %}
        {{- ']~b]tool' }}
        {%- for result in ([m.content] if m.content is string else m.content) %}
            {{- '\n<response>' ~ (result if result is string else result.text) ~ '</response>' }}
        {%- endfor %}
        {{- '[e~[\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ']~b]ai\n<think>\n' }}{% endif %}"""

MINIMAX_M1 = r"""
{%- macro shown(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}{% if part.type == 'text' %}{{- part.text }}{% endif %}{% endfor %}
    {%- endif %}
{%- endmacro %}
{%- set head = messages[0].content if messages[0].role == 'system' else 'Be of use.' %}
{{- '<beginning_of_sentence>system\n' ~ (head if head is string else head[0].text | trim) }}
{%- if tools %}{{- '\nFunctions: ' ~ (tools | tojson) }}{% endif %}
{{- '<end_of_sentence>\n' }}
{%- for m in messages %}
    {%- if 'tool_calls' in m %}
        {{- '<beginning_of_sentence>ai\n' }}
        {%- for c in m.tool_calls %}{{- '{"name": "' ~ c.function.name ~ '", "arguments": ' ~ (c.function.arguments | tojson) ~ '}\n' }}{% endfor %}
        {{- '<end_of_sentence>\n' }}
    {%- elif m.role in ['user', 'assistant', 'tool'] %}
        {{- '<beginning_of_sentence>' + m.role + '\n' + shown(m.content or [] if m.role == 'assistant' else m.content) + '<end_of_sentence>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<beginning_of_sentence>ai\n' }}{% endif %}"""

HERMES_3_TOOLS = r"""
{{- bos_token + '<|im_start|>system\nFunctions:' }}
{%- for tool in tools %}{{- '\n' ~ (tool | tojson) }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- for m in messages %}
    {%- if m.role in ['user', 'system'] or (m.role == 'assistant' and m.tool_calls is not defined) %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- for c in m.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}
            {{- c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>tool\n<tool_response>\n' }}{{- m.content }}{{- '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

COMMAND_R7B = r"""
{{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' }}
{%- if tools %}{{- 'Functions: ' ~ (tools | tojson) ~ '\n' }}{% endif %}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{% endif %}
{{- '<|END_OF_TURN_TOKEN|>' }}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|START_OF_TURN_TOKEN|><|' ~ m.role | upper ~ '_TOKEN|>' ~ m.content ~ '<|END_OF_TURN_TOKEN|>' }}
    {%- elif m.role == 'assistant' and m.tool_calls %}
        {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|>' }}{{ m.reasoning_content }}{{- '<|END_THINKING|><|START_ACTION|>[' }}
        {%- for c in m.tool_calls %}
            {{- '{"tool_call_id": "' ~ loop.index0 ~ '", "tool_name": "' ~ c.function.name ~ '", "parameters": ' ~ (c.function.arguments | tojson) ~ '}' }}
            {{- '' if loop.last else ',' }}
        {%- endfor %}
        {{- ']<|END_ACTION|><|END_OF_TURN_TOKEN|>' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' }}{{ m.content }}{{- '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[{"results": {"0": ' ~ (m.content | tojson) }}
        {{- '}, "is_error": null}]<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>' }}
    {%- endif %}
{%- endfor %}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"""

KIMI_K2 = r"""
{%- if tools %}{{- '<|im_system|>tool_declare<|im_middle|>' ~ (tools | tojson) ~ '<|im_end|>' }}{% endif %}
{%- for m in messages %}
    {%- set side = m.role if m.role in ['user', 'assistant'] else 'system' %}
    {{- '<|im_' + side + '|>' + m.role + '<|im_middle|>' }}
    {%- if m.role == 'tool' %}
        {{- 'Result of ' ~ m.tool_call_id ~ '\n' ~ m.content }}
    {%- elif m.content is string or (m.content and m.tool_calls) %}
        {{- m.content }}
    {%- else %}
        {%- for part in m.content or [] %}{{- part.text }}{% endfor %}
    {%- endif %}
    {%- for c in m.tool_calls or [] %}
        {{- '<|tool_call_begin|>functions.' ~ c.function.name ~ ':' ~ loop.index0 ~ '<|tool_call_argument_begin|>' ~ (c.function.arguments | tojson) ~ '<|tool_call_end|>' }}
    {%- endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"""

# A list of the template's own is changed in place: transformers' sandbox forbids `append` and `pop`.
KIMI_K2_QUEUE = r"""
{%- macro shown(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content or [] %}{{- part.text }}{% endfor %}
    {%- endif %}
{%- endmacro %}
{%- set waiting = namespace(ids=[]) %}
{%- if tools %}{{- '<|im_system|>tool_declare<|im_middle|>' ~ (tools | tojson) ~ '<|im_end|>' }}{% endif %}
{%- for m in messages %}
    {%- set side = m.role if m.role in ['user', 'assistant'] else 'system' %}
    {{- '<|im_' + side + '|>' + (m.name or m.role) + '<|im_middle|>' }}
    {%- if m.role == 'tool' %}
        {{- 'Result of ' ~ (waiting.ids.pop(0) if waiting.ids else 'functions.' ~ m.name) ~ '\n' }}
    {%- endif %}
    {{- shown(m.content) }}
    {%- for c in m.tool_calls or [] %}
        {%- set id = 'functions.' ~ c.function.name ~ ':' ~ loop.index0 %}
        {%- set _ = waiting.ids.append(id) %}
        {{- '<|tool_call_begin|>' ~ id ~ '<|tool_call_argument_begin|>' }}
        {{- c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}
        {{- '<|tool_call_end|>' }}
    {%- endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"""

SMOLLM3 = r"""
{{- '<|im_start|>system\n' }}
{%- if messages[0].role != 'system' %}
    {{- 'Be of use.' }}
{%- elif '/no_think' in messages[0].content %}
    {{- messages[0].content.replace('/no_think', '') }}
{%- else %}
    {{- messages[0].content.rstrip() }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for m in messages %}
    {%- set text = m.content if m.content is string else '' %}
    {%- if m.role in ['user', 'tool'] %}
        {{- '<|im_start|>user\n' + text + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' + text.lstrip('\n') + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

FUNCTIONARY_3_2 = r"""
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' ~ (tools | tojson if tools else 'No functions.') ~ '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {%- if m.role in ['user', 'system', 'tool'] %}
        {{- m.content + '<|eot_id|>' }}
    {%- else %}
        {%- if m.content %}{{- '>>>all\n' + m.content }}{% endif %}
        {%- for c in m.tool_calls or [] %}{{- '>>>' + c.function.name + '\n' + c.function.arguments }}{% endfor %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n>>>' }}{% endif %}"""

FUNCTIONGEMMA = r"""
{%- set functions = tools if tools | length > 0 else [] %}
{%- for m in messages %}
    {%- if m.role in ['developer', 'system', 'user'] %}
        {{- '<start_of_turn>user\n' }}{{- m.content }}
        {%- if m.role != 'user' %}{{- '\nFunctions: ' ~ (functions | tojson) }}{% endif %}
        {{- '<end_of_turn>\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<start_of_turn>model\n' }}
        {%- if m.tool_calls is defined and m.tool_calls | length > 0 %}
            {%- for c in m.tool_calls %}
                {%- set fields = c.function.arguments %}
                {%- if fields is string %}{% set fields = fields | fromjson %}{% endif %}
                {{- '<start_function_call>call:' + c.function.name + '{' }}
                {%- for name, value in fields.items() %}{{- name ~ ':<escape>' ~ value ~ '<escape>' ~ ('' if loop.last else ',') }}{% endfor %}
                {{- '}<end_function_call>' }}
            {%- endfor %}
        {%- else %}
            {{- m.content }}
        {%- endif %}
        {{- '<end_of_turn>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<start_of_turn>user\nResult of ' ~ (m.name | default('a function')) ~ ': ' }}{{- m.content }}{{- '<end_of_turn>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}"""

LLAMA_2 = r"""
{%- set told = messages[0].role == 'system' %}
{%- for m in (messages[1:] if told else messages) %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('User and assistant take turns.') }}{% endif %}
    {%- if m.role == 'user' %}
        {{- bos_token + '[INST] ' }}
        {%- if told and loop.first %}{{- '<<SYS>>\n' }}{{- messages[0].content | trim }}{{- '\n<</SYS>>\n\n' }}{% endif %}
        {{- '' + m.content + ' [/INST]' }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' }}{{- m.content | trim }}{{- ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

VICUNA = r"""
{{- bos_token }}
{%- set told = messages[0].role == 'system' %}
{%- if told %}{{- messages[0].content | trim }}{{- '\n\n' }}{% endif %}
{%- for m in (messages[1:] if told else messages) %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('User and assistant take turns.') }}{% endif %}
    {%- if m.role == 'user' %}
        {{- 'USER: ' }}{{- m.content | trim }}{{- '\n' }}
    {%- elif m.role == 'assistant' %}
        {{- 'ASSISTANT: ' }}{{- m.content | trim }}{{- eos_token + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{% endif %}"""

ALPACA = r"""
{%- set systems = messages | selectattr('role', 'equalto', 'system') | list %}
{%- if systems %}{{- (systems | last).content | trim }}{{- '\n\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '### Instruction:\n' }}{{- m.content | trim }}{{- '\n\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '### Response:\n' }}{{- m.content | trim }}{{- '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\n' }}{% endif %}"""

CHATML = r"""
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

SOLAR_OPEN = r"""
{%- macro named(id) %}{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id == id %}{{- c.function.name }}{% endif %}{% endfor %}{% endfor %}{% endmacro %}
{{- '<|begin|>system<|content|>Be of use.' }}
{%- for m in messages if m.role == 'system' %}{{- '\n\n' }}{{- m.content }}{% endfor %}
{%- if tools %}{{- '\nFunctions: ' ~ (tools | tojson) }}{% endif %}
{{- '<|end|>' }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|begin|>user<|content|>' + m.content + '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|begin|>tool<|tool_response:begin|>' + m.tool_call_id + '<|tool_response:name|>' + named(m.tool_call_id) }}
        {{- '<|tool_response:result|>' }}{{- m.content }}{{- '<|tool_response:end|><|end|>' }}
    {%- elif m.role == 'assistant' and m.tool_calls %}
        {{- '<|begin|>assistant<|tool_calls|>' }}
        {%- for c in m.tool_calls %}
            {{- '<|tool_call:begin|>' + c.id + '<|tool_call:name|>' + c.function.name + '<|tool_call:args|>' }}
            {{- c.function.arguments | tojson if c.function.arguments is mapping else c.function.arguments }}
            {{- '<|tool_call:end|>' }}
        {%- endfor %}
        {{- '<|calls|>' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|begin|>assistant<|content|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|begin|>assistant' }}{% endif %}"""

# Content of an object's form: a mapping with `parts`, which no client sends.
APERTUS = r"""
{%- macro text(role, content) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is mapping %}
        {%- for part in content.parts %}{{- part.text }}{% endfor %}
    {%- else %}
        {{- raise_exception('This content is none for the role ' ~ role) }}
    {%- endif %}
{%- endmacro %}
{{- bos_token + '<|system_start|>' }}
{%- set told = messages[0].role == 'system' %}
{{- (text('system', messages[0].content) if told else 'Be of use.') + '<|system_end|>' }}
{%- if tools %}{{- '<|developer_start|>' ~ (tools | tojson) ~ '<|developer_end|>' }}{% endif %}
{%- set turn = namespace(open=false) %}
{%- for m in (messages[1:] if told else messages) %}
    {%- if m.role == 'user' %}
        {%- if turn.open %}{{- '<|assistant_end|>' }}{% set turn.open = false %}{% endif %}
        {{- '<|user_start|>' + text('user', m.content) + '<|user_end|>' }}
    {%- elif m.role == 'assistant' %}
        {%- if not turn.open %}{{- '<|assistant_start|>' }}{% set turn.open = true %}{% endif %}
        {%- if m.content is defined and m.content is not none or not m.tool_calls %}{{- text('assistant', m.content) }}{% endif %}
        {%- for c in m.tool_calls or [] %}{{- '{"' ~ c.function.name ~ '": ' ~ (c.function.arguments if c.function.arguments is string else c.function.arguments | tojson) ~ '}' }}{% endfor %}
    {%- elif m.role == 'tool' %}
        {%- if not turn.open %}{{- raise_exception('A result belongs to a turn of the assistant.') }}{% endif %}
        {{- '[' ~ (m.content if m.content is string else m.content | tojson) ~ ']' }}
    {%- else %}
        {{- raise_exception('No place for the role ' ~ m.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant_start|>' }}{% endif %}"""

BIELIK_3 = r"""
{%- set told = messages[0].role == 'system' and messages[0].content %}
{%- if told or tools %}
    {{- '<|im_start|>system\n' }}
    {%- if told %}{{- messages[0].content }}{% endif %}
    {%- if tools %}{{- '\nFunctions: ' ~ (tools | tojson) }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set text = m.content | default('') %}
        {%- set thought = m.reasoning_content | default('') %}
        {%- if not thought and '</think>' in text %}
            {%- set thought = text.split('</think>')[0] %}
            {%- set text = text.split('</think>')[-1] %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' + ('<think>\n' + thought + '\n</think>\n' if thought else '') + text.lstrip() }}
        {%- for c in m.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}
            {{- c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<|function_output|>' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

PARTS_ONLY = r"""
{%- for m in messages %}
    {{- m.role | capitalize ~ ':' }}
    {%- for part in m.content %}
        {%- if part.type == 'image' %}{{- '<image>' }}{% elif part.type == 'text' %}{{- ' ' + part.text }}{% endif %}
    {%- endfor %}
    {{- '<end_of_utterance>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{% endif %}"""


BY_NAME: dict[str, Published] = {
    "qwen2.5": Published(
        QWEN2_5,
        "Qwen2.5-7B-Instruct",
        "content is concatenated, but may be null or absent beside calls; arguments by tojson; unknown roles are lost",
    ),
    "qwen3": Published(
        QWEN3_FIRST,
        "Qwen3-0.6B of April 2025",
        "a string is sought in the assistant's content, so null and absent fail; reasoning after the last question shows; arguments text or object",
    ),
    "qwq": Published(
        QWQ,
        "QwQ-32B",
        "the assistant's content is split, so null and absent fail; reasoning is lost",
    ),
    "qwen3-coder": Published(
        QWEN3_CODER,
        "Qwen3-Coder",
        "arguments must be an object (the filter items); content may be null beside calls only; any role is printed",
    ),
    "qwen3.5": Published(
        QWEN3_5,
        "Qwen3.5-4B",
        "text and parts and null in every role; system first only and other roles raise; a user message is needed; arguments must be an object",
    ),
    "llama-3.1": Published(
        LLAMA_3_1,
        "Llama-3.1-8B-Instruct, Llama-3.3-70B-Instruct",
        "one call a message or it raises, by the key alone; its content and reasoning are lost; parts print their form; None is printed",
        BOS,
    ),
    "llama-4": Published(
        LLAMA_4,
        "llama4_json of vLLM",
        "text and parts in every role; null cannot be iterated, absent can; several calls; any role is printed",
        BOS,
    ),
    "mistral-nemo": Published(
        MISTRAL_NEMO,
        "Mistral-Nemo-Instruct-2407",
        "turns alternate but for calls and results; ids of nine characters; the system message shows only where the user has the last word; content beside calls is lost",
        BOS | EOS,
    ),
    "mistral-small-3.2": Published(
        MISTRAL_SMALL_3_2,
        "Mistral-Small-3.2-24B-Instruct-2506",
        "turns alternate; ids of nine characters; parts but for results; content beside calls is lost; null fails without calls",
        BOS | EOS,
    ),
    "mistral-3-vllm": Published(
        MISTRAL_3_VLLM,
        "mistral3 of vLLM",
        "no alternation; the last nine characters of an id of nine or more; calls by the key alone; content beside calls is lost",
        BOS | EOS,
    ),
    "devstral-2507": Published(
        DEVSTRAL_2507,
        "Devstral-Small-2507 by Unsloth",
        "the first part of the assistant's content is taken, so null and absent fail; no alternation; unknown roles raise; arguments text or object",
        BOS | EOS,
    ),
    "ministral-3": Published(
        MINISTRAL_3,
        "Ministral-3-14B-Reasoning-2512",
        "an assistant message with neither content nor calls raises; null beside calls fails, empty and absent do not; turns alternate; chunks of text and thinking",
        BOS | EOS,
    ),
    "deepseek-v3": Published(
        DEEPSEEK_V3,
        "DeepSeek-V3 as the field reports have it: vLLM's deepseekv3 without its tojson",
        "arguments are concatenated, so an object fails; content may be null beside calls but not absent; all systems open the prompt",
        BOS,
    ),
    "r1-distill-qwen": Published(
        R1_DISTILL_QWEN,
        "DeepSeek-R1-Distill-Qwen as the field reports have it, with tojson",
        "calls show only where content is null; the last of several system messages counts",
        BOS,
    ),
    "r1-distill-llama": Published(
        R1_DISTILL_LLAMA,
        "DeepSeek-R1-Distill-Llama-8B",
        "calls show only where content is null, and arguments are concatenated; the last of several system messages counts",
        BOS,
    ),
    "r1-llama.cpp": Published(
        R1_LLAMA_CPP,
        "llama-cpp-deepseek-r1 of llama.cpp",
        "calls show only where content is empty in any way; content hides them",
        BOS,
    ),
    "deepseek-v3.1": Published(
        DEEPSEEK_V3_1,
        "DeepSeek-V3.1",
        "arguments by tojson; content may be anything empty beside calls; null fails without calls",
        BOS,
    ),
    "deepseek-v3.2": Published(
        DEEPSEEK_V3_2,
        "DeepSeek-V3.2 as written for llama.cpp",
        "text arguments meet the filter from_json, which transformers has not; empty content of any kind is taken",
        BOS,
    ),
    "glm-4.6": Published(
        GLM_4_6, "GLM-4.6", "None is printed; arguments that are text raise; parts in every role"
    ),
    "glm-4.7": Published(
        GLM_4_7,
        "GLM-4.7-Flash",
        "None is printed; arguments that are text fail; parts in every role",
    ),
    "gpt-oss": Published(
        GPT_OSS,
        "gpt-oss-120b",
        "system or developer first only, later ones are lost; one call of several shows; content with thinking beside calls raises; null content fails",
    ),
    "gemma-2": Published(
        GEMMA_2,
        "gemma-2-2b-it",
        "a system message raises; turns alternate, so calls and results cannot be said; None is printed",
        BOS,
    ),
    "gemma-3": Published(
        GEMMA_3,
        "gemma-3 (as Unsloth ships it)",
        "the system message opens the first turn; turns alternate; parts in every role; null raises; calls are lost",
        BOS,
    ),
    "gemma-3-tools": Published(
        GEMMA_3_TOOLS,
        "gemma3_pythonic of vLLM",
        "a result is a user's turn and a user after it raises; arguments that are text are taken to pieces; null raises, absent does not",
        BOS,
    ),
    "phi-4-mini": Published(
        PHI_4_MINI,
        "phi4_mini of vLLM",
        "content hides the calls; later system messages are lost; any other role is printed; parts print their form",
    ),
    "granite-3.3": Published(
        GRANITE_3_3,
        "granite-3.3-2B-Instruct",
        "calls are lost; content is concatenated in every role; any role is printed",
    ),
    "granite-3.0-tools": Published(
        GRANITE_3_0_TOOLS,
        "granite of vLLM",
        "calls hide the content, which may be null there; unknown roles are lost; no parts",
    ),
    "granite-20b-fc": Published(
        GRANITE_20B_FC,
        "granite_20b_fc of vLLM",
        "a system message raises wherever it stands; calls by the key alone hide the content",
    ),
    "minimax-m2": Published(
        MINIMAX_M2,
        "MiniMax-M2",
        "None is printed; arguments must be an object; later system messages are lost; a result without a call raises",
    ),
    "minimax-m1": Published(
        MINIMAX_M1,
        "MiniMax-M1",
        "calls hide the content; later system messages are lost; null and parts are taken",
    ),
    "hermes-3": Published(
        HERMES_3_TOOLS,
        "Hermes-3-Llama-3.1-8B (tool_use)",
        "tools must be a list, none fails; calls by the key alone hide the content; arguments text or object",
        BOS,
    ),
    "command-r7b": Published(
        COMMAND_R7B,
        "c4ai-command-r7b-12-2024 (tool_use)",
        "calls hide the content; reasoning shows with calls; parts print their form; None is printed; results carry null",
    ),
    "kimi-k2": Published(
        KIMI_K2,
        "Kimi-K2 of moonshotai",
        "everything shows but reasoning; null is taken; a result shows its tool_call_id; parts of a result print their form",
    ),
    "kimi-k2-queue": Published(
        KIMI_K2_QUEUE,
        "Kimi-K2-Instruct, Kimi-K2-Thinking",
        "calls change a list in place: transformers' sandbox forbids it, minijinja does not; results are named by the order of the calls",
    ),
    "smollm3": Published(
        SMOLLM3,
        "SmolLM3-3B by Unsloth",
        "calls are lost, results show as the user's; later system messages and all parts are lost",
    ),
    "functionary-3.2": Published(
        FUNCTIONARY_3_2,
        "functionary-medium-v3.2",
        "arguments are concatenated, so an object fails; null and absent are taken in the assistant's turn",
        BOS,
    ),
    "functiongemma": Published(
        FUNCTIONGEMMA,
        "functiongemma of vLLM",
        "tools must be a list; a result shows the name on its message; developer and system alike; text arguments meet an unknown filter",
    ),
    "llama-2": Published(
        LLAMA_2,
        "Llama-2-chat",
        "system first only; turns alternate; a system message at the end is lost; None is printed",
        BOS | EOS,
    ),
    "vicuna": Published(
        VICUNA, "vicuna", "as llama-2, but the user's parts print their form", BOS | EOS
    ),
    "alpaca": Published(
        ALPACA,
        "template_alpaca of vLLM",
        "the last system message counts; other roles, calls and results are lost; None is printed",
    ),
    "chatml": Published(
        CHATML,
        "template_chatml of vLLM",
        "every role is concatenated; calls are lost; null and absent fail",
    ),
    "solar-open": Published(
        SOLAR_OPEN,
        "Solar-Open-100B",
        "ids are needed; calls hide the content; all systems open the prompt; text and object arguments",
    ),
    "apertus": Published(
        APERTUS,
        "Apertus-8B-Instruct, in vLLM's form",
        "parts in a list raise but in results; system first only and other roles raise; a result before any answer raises",
        BOS,
    ),
    "bielik-3": Published(
        BIELIK_3,
        "Bielik-11B-v3.0-Instruct",
        "absent content is taken and null fails; reasoning shows; later system messages are lost; results are concatenated",
    ),
    "parts-only": Published(
        PARTS_ONLY,
        "SmolVLM, Idefics3 (from memory, not compared)",
        "content is a list of parts in every role; text is lost",
    ),
}
