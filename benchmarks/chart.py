"""The figures as an SVG that reads on white and on black, without a library."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.head { font-weight: 600 }
.bar { fill: #9aa4af }
.ours { fill: #2563eb }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .bar { fill: #6e7781 } .ours { fill: #60a5fa } }
"""
_LABELS = 240
_BARS = 150
_STEP = 20
_GAP = 70


def draw(
    capture: Mapping[str, Mapping[str, Any]],
    latency: Mapping[str, Mapping[str, Any]],
    bulk: Mapping[str, Mapping[str, Any]],
    titles: Mapping[str, str],
) -> str:
    """Three panels side by side.

    Args:
        capture, latency, bulk: medians by peer, as benchmarks/peers.py has them.
        titles: of the peers, in order.

    Returns:
        The SVG.
    """
    base = capture.get("untriggered", {}).get("tps", 0)
    panels = [
        (
            "of untriggered, 8 clients",
            {name: row["tps"] / base for name, row in capture.items() if base and name != "untriggered"},
            "{:.2f}",
        ),
        ("latency p50, ms", {name: row["p50_ms"] for name, row in latency.items()}, "{:.2f}"),
        (
            "400k consumed after, s",
            {name: row["consumed_s"] for name, row in bulk.items() if "consumed_s" in row},
            "{:.1f}",
        ),
    ]
    names = [name for name in titles if any(name in values for _, values, _ in panels)]
    width, height = _LABELS + len(panels) * (_BARS + _GAP), 40 + _STEP * len(names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<style>{_STYLE}</style>",
    ]
    for row, name in enumerate(names):
        parts.append(f'<text x="0" y="{44 + row * _STEP}">{escape(titles[name])}</text>')
    for number, (head, values, form) in enumerate(panels):
        left = _LABELS + number * (_BARS + _GAP)
        parts.append(f'<text class="head" x="{left}" y="18">{escape(head)}</text>')
        largest = max(values.values(), default=1)
        for row, name in enumerate(names):
            if name not in values:
                continue
            length = max(1.0, _BARS * values[name] / largest)
            kind = "bar ours" if name.startswith("cdc") else "bar"
            y = 33 + row * _STEP
            parts.append(f'<rect class="{kind}" x="{left}" y="{y}" width="{length:.1f}" height="14"/>')
            parts.append(f'<text x="{left + length + 5:.1f}" y="{y + 11}">{form.format(values[name])}</text>')
    return "\n".join([*parts, "</svg>", ""])
