"""The style of a page: one column that fits 320 pixels, light or dark as the reader's system is, contrasts of WCAG AA (tests/report/test_style.py computes them)."""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff", "card": "#f3f5f7", "ink": "#1b2430", "soft": "#4b5a6b", "rule": "#c6ced8", "link": "#0a58a8", "good": "#0b6e4f", "bad": "#b3261e",
    "heat": "#8cbcf0", "c0": "#1b2430", "c1": "#0b7285", "c2": "#b3480c", "c3": "#6a3fb5", "c4": "#2b7a2b", "c5": "#b3266b", "c6": "#7a6200", "c7": "#3458c7",
}  # fmt: skip
DARK = {
    "paper": "#12171d", "card": "#1c232b", "ink": "#e8edf2", "soft": "#aab7c4", "rule": "#3d4956", "link": "#8fc1f5", "good": "#6fd3a8", "bad": "#ff9a91",
    "heat": "#1f5fae", "c0": "#e8edf2", "c1": "#4fc3d9", "c2": "#f0965a", "c3": "#b99cf0", "c4": "#82cf82", "c5": "#f08dbd", "c6": "#d9bf4a", "c7": "#93aef5",
}  # fmt: skip
"""Colours by name. ``heat`` is what a full cell of a confusion matrix is, under ``ink``; ``c0`` to ``c7`` are lines."""


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header,main,footer{max-width:72rem;margin:0 auto;padding:0 1rem;overflow-wrap:anywhere}
header{padding-top:1.5rem}
footer{padding-bottom:2rem;color:var(--soft)}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem}
h2{font-size:1.25rem;margin:2.25rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--rule)}
h3{font-size:1.05rem;margin:1.5rem 0 .5rem}
a{color:var(--link)}
.soft{color:var(--soft)}
.good{color:var(--good)}
.bad{color:var(--bad)}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:.5rem;background:var(--card);padding:.5rem}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;padding:0;margin:.75rem 0}
nav a{display:inline-block;padding:.25rem 0}
.notice{background:var(--card);border-left:4px solid var(--bad);padding:.5rem .75rem;margin:1rem 0}
.notice ul{margin:.25rem 0;padding-left:1.25rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,9.5rem),1fr));gap:.5rem;margin:1rem 0;padding:0}
.facts div{background:var(--card);padding:.5rem .75rem;border-radius:.4rem}
.facts dt{color:var(--soft);font-size:.85rem}
.facts dd{margin:0;font-size:1.2rem;font-weight:600;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1rem}
figure{margin:0}
.chart{background:var(--card);border-radius:.4rem;padding:.6rem;max-width:36rem}
.chart>svg{width:100%;height:auto;display:block}
.chart figcaption{font-weight:600}
.chart p{margin:.25rem 0 0;color:var(--soft);font-size:.9rem}
svg text{fill:var(--soft);font-size:13px;font-family:inherit}
.grid{stroke:var(--rule);stroke-width:.7}
.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.faint{stroke-width:1;opacity:.4}
.dashed{stroke-dasharray:6 4}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1rem;padding:0;margin:.35rem 0 0;font-size:.9rem}
.key{width:24px;height:12px}
.bar rect{fill:var(--c7);opacity:.55}
.bar circle{fill:var(--ink)}
.scroll{overflow-x:auto;max-width:100%;margin:.75rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.25rem 0}
th,td{text-align:left;vertical-align:top;padding:.3rem .6rem;border-bottom:1px solid var(--rule);overflow-wrap:normal}
th{font-weight:600}
tbody th{font-weight:500}
.wrap th,.wrap td{overflow-wrap:anywhere;min-width:5rem}
.wrap tbody th{min-width:min(16rem,34vw)}
.matrix td,.matrix thead th{text-align:center}
.matrix td{background:color-mix(in srgb,var(--heat) calc(var(--share)*1%),var(--paper));border:1px solid var(--rule)}
.matrix .hit{font-weight:700}
details{margin:.75rem 0}
summary{cursor:pointer;padding:.35rem 0;color:var(--link)}
pre{background:var(--card);padding:.75rem;border-radius:.4rem;overflow:auto;max-height:32rem;margin:.5rem 0;font:.85rem/1.45 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
code{font:.9em ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,8.5rem),1fr));gap:.75rem;list-style:none;padding:0}
.samples.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
.samples>li{background:var(--card);border-radius:.4rem;padding:.6rem;min-width:0}
.samples img,.whole{max-width:100%;height:auto;display:block}
.samples img{width:100%;image-rendering:pixelated}
audio{width:100%;display:block}
.samples p{margin:.35rem 0 0}
.samples pre{max-height:16rem}
@media print{details>*{display:block}}
"""


def stylesheet() -> str:
    """All of it."""
    light, dark = (f":root{{color-scheme:{name};{_variables(c)}}}" for name, c in (("light", LIGHT), ("dark", DARK)))
    lines = "".join(f".line.c{n}{{stroke:var(--c{n})}}.dot.c{n} circle{{fill:var(--c{n})}}" for n in range(8))
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}{RULES}{lines}"
