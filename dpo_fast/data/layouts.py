"""Layouts of a row: its columns decide the layout, which gives (tag, prompt, chosen, rejected) to `make_pair`.

The result is a normalised row as sources.py defines it. Nothing here reads a file.
"""

import json
import math

RANKING_PAIRS = ("all", "best_worst")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
SHAREGPT_ROLES |= {role: role for role in ("user", "assistant", "system", "tool")}


class BadRowError(Exception):
    """One row cannot be used; in the message details follow the first ': ', so that equal reasons can be counted."""


def read_row(row, ranking_pairs: str) -> tuple[str, dict, list[tuple]]:
    """Layout, extras (tools, chat_template_kwargs, p_chosen) and a list of (tag, prompt, chosen, rejected) of one row."""
    if isinstance(row, BadRowError):
        raise row
    if not isinstance(row, dict):
        raise BadRowError(f"the row is not an object of named columns: found {type(row).__name__}")
    given = {key: value for key, value in row.items() if value is not None}
    if given.get("images") or given.get("image"):
        raise BadRowError("the row has images, only text can be trained on")
    extras = {}
    for key, kind in (("tools", list), ("chat_template_kwargs", dict)):
        if given.get(key):
            extras[key] = _decoded(key, given[key], kind)
    if "p_chosen" in given:
        if "completions" in given:
            raise BadRowError("'p_chosen' is of one pair, and this row ranks several completions: drop the column")
        extras["p_chosen"] = given["p_chosen"]
    for layout, columns, read in LAYOUTS:
        if all(column in given for column in columns):
            return layout, extras, read(given, ranking_pairs)
    null = ", ".join(key for key in row if key not in given)
    raise BadRowError(
        f"no known layout has these columns: {', '.join(given) or 'none'}{f' (null: {null})' if null else ''}. Known: "
        + "; ".join(layout for layout, _, _ in LAYOUTS)
    )


def _decoded(key: str, value, kind: type):
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadRowError(f"'{key}' is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise BadRowError(f"'{key}' must be a {kind.__name__}: found {type(value).__name__}")
    return value


def _direct(row: dict, _) -> list[tuple]:
    return [("", row.get("prompt"), row["chosen"], row["rejected"])]


def _sharegpt(row: dict, _) -> list[tuple]:
    prompt = _side("conversations", row["conversations"])
    if isinstance(prompt, str) or prompt[-1]["role"] not in ("user", "tool"):
        raise BadRowError("'conversations' must be messages that end before the reply, with a user or tool turn")
    return [("", _system(row) + prompt, _reply(row["chosen"]), _reply(row["rejected"]))]


def _alpaca(row: dict, _) -> list[tuple]:
    replies = [row["chosen"], row["rejected"]] if "chosen" in row and "rejected" in row else row["output"]
    if not isinstance(replies, list) or len(replies) != 2:
        raise BadRowError("'output' must be a list of two, [best, worst]")
    turns = row.get("history", [])
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise BadRowError("'history' must be a list of [question, answer]")
    if not all(isinstance(row.get(field, ""), str) for field in ("instruction", "input")):
        raise BadRowError("'instruction' and 'input' must be text")
    prompt = _system(row)
    for question, answer in turns:
        prompt += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [("", [*prompt, {"role": "user", "content": question}], *map(_reply, replies))]


def _system(row: dict) -> list[dict]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _reply(value):
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _ranked(row: dict, ranking_pairs: str) -> list[tuple]:
    """Pairs of N completions: all pairs of unequal rank, the best completion first, or only the best with the worst."""
    completions = row["completions"]
    if not isinstance(completions, list):
        raise BadRowError(f"'completions' must be a list: found {type(completions).__name__}")
    n = len(completions)
    if "ranks" in row:
        order = _preferred(_numbers("ranks", row["ranks"], n), ranking_pairs)
    elif "scores" in row:
        order = _preferred([-score for score in _numbers("scores", row["scores"], n)], ranking_pairs)
    elif ranking_pairs == "all":
        order = row["preferred_pairs"]
        valid = isinstance(order, list) and all(isinstance(p, list) and len(p) == 2 for p in order)
        if not valid or any(type(i) is not int or not 0 <= i < n for p in order for i in p):
            raise BadRowError(f"'preferred_pairs' must be [[better, worse], ...] with indices below: {n}")
    else:
        raise ValueError("ranking_pairs='best_worst' needs ranks or scores; preferred_pairs name their pairs already")
    return [(f" completions {i} > {j}", row["prompt"], completions[i], completions[j]) for i, j in order]


def _numbers(field: str, values, n: int) -> list[float]:
    numeric = isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    if not numeric or len(values) != n:
        raise BadRowError(f"'{field}' must hold one number per completion: {n} completions, {field} {values}")
    return values


def _preferred(cost: list[float], ranking_pairs: str) -> list[tuple[int, int]]:
    order = sorted(range(len(cost)), key=cost.__getitem__)
    if ranking_pairs == "best_worst":
        order = [order[0], order[-1]] if order else []
    return [(i, j) for k, i in enumerate(order) for j in order[k + 1 :] if cost[i] < cost[j]]


# (name, required columns, reader); the first match wins.
LAYOUTS = (
    ("prompt, chosen, rejected", ("prompt", "chosen", "rejected"), _direct),
    ("prompt, completions, ranks", ("prompt", "completions", "ranks"), _ranked),
    ("prompt, completions, scores", ("prompt", "completions", "scores"), _ranked),
    ("prompt, completions, preferred_pairs", ("prompt", "completions", "preferred_pairs"), _ranked),
    ("sharegpt conversations, chosen, rejected", ("conversations", "chosen", "rejected"), _sharegpt),
    ("alpaca instruction, input, chosen, rejected", ("instruction", "chosen", "rejected"), _alpaca),
    ("alpaca instruction, input, output [best, worst]", ("instruction", "output"), _alpaca),
    ("chosen, rejected without prompt", ("chosen", "rejected"), _direct),
)


def read_prompt(row) -> str | list[dict]:
    """The prompt of one row, text or messages, as its pairs have it or, without completions, as its column holds it.

    Messages without completions that end with the assistant are a whole conversation, whose last reply is left out.
    """
    if isinstance(row, BadRowError):
        raise row
    given = {key: value for key, value in row.items() if value is not None} if isinstance(row, dict) else {}
    if "instruction" in given:
        return _alpaca({**given, "chosen": "", "rejected": ""}, "all")[0][1]
    pairs = []
    if not isinstance(row, dict) or "chosen" in given or "completions" in given:
        _, _, pairs = read_row(row, "all")
    if pairs:
        return make_pair(*pairs[0][1:])[1]["prompt"]
    name = next((name for name in ("prompt", "messages", "conversations") if name in given), None)
    if name is None:
        raise BadRowError(f"the row has no prompt, messages, conversations or instruction: found {', '.join(given)}")
    prompt = _side(name, given[name])
    if isinstance(prompt, str):
        return prompt
    while prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    return _system(given) + prompt


def make_pair(prompt, chosen, rejected) -> tuple[str, dict]:
    """The way in which the three values were read (for the report), and the normalised pair."""
    chosen, rejected = _side("chosen", chosen), _side("rejected", rejected)
    prompt = prompt if prompt is None else _side("prompt", prompt)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRowError("one of 'chosen' and 'rejected' is text, the other messages")
    if chosen == rejected:
        raise BadRowError("'chosen' equals 'rejected'")
    _refuse_empty(chosen, rejected, "")
    if isinstance(chosen, str) and prompt is None:
        n = _common_text(chosen, rejected)
        how, prompt, chosen, rejected = (
            "text, their common beginning is the prompt",
            chosen[:n],
            chosen[n:],
            rejected[n:],
        )
    elif isinstance(chosen, str) and isinstance(prompt, str):
        how = "text"
    elif isinstance(chosen, str):
        how, chosen, rejected = "messages with replies as text", _reply(chosen), _reply(rejected)
    elif prompt is None or _opens(chosen) or _opens(rejected):
        how, prompt, n = _prompt_of_conversations(prompt, chosen, rejected)
        chosen, rejected = chosen[n:], rejected[n:]
    elif isinstance(prompt, str):
        how, prompt = "messages with the prompt as text", [{"role": "user", "content": prompt}]
    else:
        how = "messages"
    _refuse_empty(chosen, rejected, " after the prompt")
    for field, value in (("chosen", chosen), ("rejected", rejected)):
        if _opens(value):
            raise BadRowError(f"'{field}' goes on with a {value[0]['role']} turn where the reply must be")
    return how, {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _prompt_of_conversations(prompt, chosen: list[dict], rejected: list[dict]) -> tuple[str, list[dict], int]:
    """How it was read, the prompt of two conversations that hold it, and how many of their first messages belong to it."""
    end = min(len(chosen), len(rejected)) - 1
    common = next((i for i in range(end) if chosen[i] != rejected[i]), end)
    if common == 0:
        raise BadRowError("'chosen' and 'rejected' do not begin with the same message, so they hold no common prompt")
    if not isinstance(prompt, list):
        tail = "" if prompt is None else " that repeat the text prompt"
        return f"whole conversations{tail}", chosen[:common], common
    how = "messages, the prompt repeated in the completions (stripped)"
    for n in range(min(common, len(prompt)), 0, -1):
        if prompt[-n:] == chosen[:n]:
            return how, prompt, n
    if chosen[:common][-len(prompt) :] == prompt:
        return how, chosen[:common], common
    raise BadRowError("'chosen' and 'rejected' begin with turns that are not those of 'prompt'")


def _common_text(chosen: str, rejected: str) -> int:
    """Length of the implicit prompt in characters: each side keeps at least one, and a space goes with the completion."""
    end = min(len(chosen), len(rejected)) - 1
    n = next((i for i in range(end + 1) if chosen[i] != rejected[i]), None)
    if n is None:
        return end
    return n - 1 if n and chosen[n - 1] == " " else n


def _side(field: str, value) -> str | list[dict]:
    """One side of a pair: text as it is, or messages with role and content and without null entries."""
    if isinstance(value, str):
        return _text(field, value)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise BadRowError(f"'{field}' must be text or a list of messages: found {type(value).__name__}")
    if not value:
        raise BadRowError(f"'{field}' is empty")
    return [_message(field, message) for message in value]


def _message(field: str, message) -> dict:
    if not isinstance(message, dict):
        raise BadRowError(f"'{field}' must hold messages with role and content: found {type(message).__name__}")
    message = {key: value for key, value in message.items() if value is not None}
    if "from" in message and "role" not in message:
        sender = message.pop("from")
        if not isinstance(sender, str) or sender not in SHAREGPT_ROLES:
            raise BadRowError(f"'{field}' has an unknown sender, known are {', '.join(SHAREGPT_ROLES)}: {sender!r}")
        message = {"role": SHAREGPT_ROLES[sender], "content": message.pop("value", None)} | message
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise BadRowError(f"'{field}' has a content part that is not text")
        content = message["content"] = "".join(part["text"] for part in content)
    if not isinstance(message.get("role"), str) or not (isinstance(content, str) or message.get("tool_calls")):
        raise BadRowError(f"'{field}' has a message without a role or a content as text: keys {', '.join(message)}")
    _text(field, content or "")
    return message


def _text(field: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRowError(f"'{field}' holds half a surrogate pair, which is no text (cut emoji?)") from None
    return text


def _opens(value) -> bool:
    """Whether `value` is a conversation from its beginning; a reply never starts with these roles."""
    return isinstance(value, list) and value[0]["role"] in ("user", "system", "developer")


def _refuse_empty(chosen, rejected, when: str) -> None:
    for field, value in (("chosen", chosen), ("rejected", rejected)):
        texts = [value] if isinstance(value, str) else [m.get("content", "") for m in value if not m.get("tool_calls")]
        calls = isinstance(value, list) and len(texts) < len(value)
        if not calls and not any(text.strip() for text in texts):
            raise BadRowError(f"'{field}' is empty{when}")
