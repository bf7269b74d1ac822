"""The report of a loop: curves over the rounds as PNG, and one HTML file that is complete in itself."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from .candidates import write_whole
from .items import read_candidates
from .settings import Settings

# (title, [(key of a round's metrics, legend)]); win rates are drawn with their intervals.
_CURVES = (
    ("win rate", [("win_start", "against the start"), ("win_before", "against the round before")]),
    ("reward accuracy", [("accuracy", "held out"), ("train_accuracy", "training")]),
    ("held-out reward margin", [("margin", "")]),
    ("nats per token", [("kl_start", "KL to the start"), ("entropy", "entropy of samples")]),
    ("tokens per sample", [("length", "")]),
    ("repeated 4-grams", [("repetition", "")]),
)
_COLUMNS = (
    ("round", "round", "{}"), ("pairs", "pairs", "{}"), ("replayed", "replayed", "{}"),
    ("accuracy", "held-out accuracy", "{:.1%}"), ("margin", "margin", "{:.3f}"),
    ("train_accuracy", "training accuracy", "{:.1%}"), ("win_before", "wins against the round before", ""),
    ("win_start", "wins against the start", ""), ("kl_start", "KL to the start (nats per token)", "{:.3f}"),
    ("entropy", "entropy (nats per token)", "{:.2f}"), ("length", "tokens", "{:.1f}"),
    ("truncated", "truncated", "{:.0%}"), ("empty", "empty", "{:.0%}"), ("repetition", "repetition", "{:.1%}"),
    ("chosen_delta", "change of chosen log-probs (nats)", "{:.2f}"),
)  # fmt: skip
_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;"
    "font-size:14px}td,th{border:1px solid #bbb;padding:.3em .6em;text-align:right}pre{white-space:pre-wrap;background:"
    "#f3f3f3;padding:.5em}.warn{background:#fff3cd;padding:.5em 1em}img{max-width:100%}.best{font-weight:bold}"
)


def write_report(folder: Path, settings: Settings, history: Sequence[dict], best: int) -> None:
    """Write curves.png and report.html into `folder`. `history` holds the metrics of the start and of each round."""
    picture = curves(history)
    temporary = folder / "curves.png.tmp"
    temporary.write_bytes(picture)
    temporary.replace(folder / "curves.png")
    write_whole(folder / "report.html", _page(folder, settings, history, best, picture))


def curves(history: Sequence[dict]) -> bytes:
    """A PNG with one panel per measure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, lines) in zip(figure.subplots(2, 3).flat, _CURVES, strict=True):
        axes.set_title(title)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for key, legend in lines:
            found = [(m["round"], m[key]) for m in history if m.get(key) is not None]
            if not found:
                continue
            x, values = zip(*found, strict=True)
            if isinstance(values[0], dict):
                middle = [v["rate"] for v in values]
                low, high = ([abs(v[end] - v["rate"]) for v in values] for end in ("low", "high"))
                axes.errorbar(x, middle, yerr=[low, high], marker="o", capsize=4, label=legend)
                axes.axhline(0.5, color="grey", linewidth=0.8)
            else:
                axes.plot(x, values, marker="o", label=legend)
        if lines[0][1] and axes.has_data():
            axes.legend()
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=100)
    return target.getvalue()


def _cell(m: dict, key: str, form: str) -> str:
    value = m.get(key)
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['rate']:.1%} [{value['low']:.0%}, {value['high']:.0%}]"
    return form.format(value)


def _page(folder: Path, settings: Settings, history: Sequence[dict], best: int, picture: bytes) -> str:
    head = "".join(f"<th>{title}</th>" for _, title, _ in _COLUMNS)
    rows = "".join(
        f"<tr{' class=best' if m['round'] == best else ''}>"
        + "".join(f"<td>{_cell(m, key, form)}</td>" for key, _, form in _COLUMNS)
        + "</tr>"
        for m in history
    )
    warned = "".join(
        f"<p class=warn>Round {m['round']}: {html.escape(sentence)}.</p>" for m in history for sentence in m["warnings"]
    )
    image = base64.b64encode(picture).decode()
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>dpo_fast loop</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(str(settings.model))}</h1><p>{len(history) - 1} rounds, the reference is that of the "
        f"{settings.reference}. The best round is {best}: its samples win most often against the start's on prompts that "
        f"were never labelled for training.</p>{warned or '<p>No limit was passed.</p>'}"
        f'<img alt="curves over the rounds" src="data:image/png;base64,{image}">'
        f"<table><tr>{head}</tr>{rows}</table><p>Win rates: the judge was asked in both orders, a tie is half a win; in "
        "brackets the 95 % confidence interval over prompts.</p>"
        f"<h2>Samples on held-out prompts</h2>{_examples(folder, history)}</html>\n"
    )


def _examples(folder: Path, history: Sequence[dict], count: int = 5) -> str:
    root = folder if (folder / "start").is_dir() else folder.parent
    last = folder if (folder / "samples.jsonl").exists() else root / f"round-{history[-1]['round']:02d}"
    before = {row["id"]: row for row in read_candidates(root / "start" / "samples.jsonl")}
    parts = []
    for row in read_candidates(last / "samples.jsonl")[:count]:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1].get("content") or ""
        texts = [("prompt", prompt)]
        texts += [("start", before[row["id"]]["completions"][0]["text"]), ("now", row["completions"][0]["text"])]
        parts += [f"<h3>{name}</h3><pre>{html.escape(text)}</pre>" for name, text in texts]
    return "".join(parts)
