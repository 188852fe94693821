"""The style sheet of the page: light, dark and paper. Imports no torch."""

from __future__ import annotations

from .charts import NUM_COLOURS

LIGHT = """--page: #ffffff; --ink: #1c2127; --soft: #5c6773; --rule: #e3e7eb; --panel: #f6f8fa; --alarm: #b3261e;
  --alarm-panel: #fdf1ef; --c0: #1f6fd6; --c1: #d0561a; --c2: #12855f; --c3: #8648c9; --c4: #a77e00; --c5: #c2306f;
  --c6: #0e8397; --c7: #7a4a2b; --c8: #8b95a1;"""
DARK = """--page: #14181d; --ink: #e4e8ec; --soft: #98a4b0; --rule: #2b323a; --panel: #1b2027; --alarm: #ff8a80;
  --alarm-panel: #2a1c1c; --c0: #6cabff; --c1: #ff9a66; --c2: #4fcf9f; --c3: #c39bff; --c4: #e2bb4a; --c5: #ff86b4;
  --c6: #4cc9dd; --c7: #c99a78; --c8: #77818d;"""
RULES = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 22px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 25px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 34px 0 10px; }
h3 { font-size: 14px; margin: 20px 0 4px; } p { margin: 4px 0 10px; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 10px; }
.tile { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px; }
.tile b { display: block; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 14px; }
.charts + .table, .charts + h3, .table + .charts, div + .charts { margin-top: 14px; }
figure { margin: 0; border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px; }
figcaption { font-weight: 600; font-size: 14px; } svg { width: 100%; height: auto; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--soft); }
.key { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin: 0 5px 4px 0; }
.square { height: 10px; margin-bottom: -1px; } .dashed1, .dashed2 { width: 9px; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.label { fill: var(--soft); font-size: 12px; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .hover { fill: transparent; }
.pale { opacity: .3; } .line.pale { stroke-width: 1; } .layer { opacity: .88; }
.dash1 { stroke-dasharray: 7 3; } .dash2 { stroke-dasharray: 2 3; }
.mark { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 4 3; } .faint { opacity: .22; }
.table { overflow-x: auto; margin-top: 8px; } .scroll { max-height: 420px; overflow: auto; }
table { border-collapse: collapse; min-width: min(100%, 560px); font-size: 14px; }
th, td { text-align: left; padding: 5px 26px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td { font-variant-numeric: tabular-nums; overflow-wrap: break-word; max-width: 40em; }
td:first-child { min-width: 8em; } .scroll th { position: sticky; top: 0; background: var(--page); }
.advice { list-style: none; margin: 16px 0 0; padding: 0; display: grid; gap: 8px; }
.advice li { border: 1px solid var(--rule); border-left: 4px solid var(--soft); border-radius: 8px; padding: 8px 14px;
  background: var(--panel); }
.advice li.warning { border-left-color: var(--alarm); background: var(--alarm-panel); }
.advice b { display: block; } .warning b { color: var(--alarm); }
details { margin-top: 22px; border-top: 1px solid var(--rule); padding-top: 12px; }
summary { font-weight: 600; font-size: 19px; cursor: pointer; overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
"""
PAPER = """
  body { max-width: none; padding: 0; font-size: 11px; }
  figure, .tile, tr, .advice li { break-inside: avoid; } h2, h3, summary { break-after: avoid; }
  .charts { grid-template-columns: 1fr 1fr; } .tiles { grid-template-columns: repeat(5, 1fr); }
  .tile b { font-size: 14px; } .tile span, table, pre { font-size: 10px; } .legend { font-size: 10px; }
  .scroll { max-height: none; } .scroll th { position: static; } pre { white-space: pre-wrap; }
  details::details-content { content-visibility: visible; block-size: auto; }
"""


def style_sheet() -> str:
    """Give the whole sheet."""
    colours = "".join(
        f".line.c{i} {{ stroke: var(--c{i}); }} .f{i} {{ fill: var(--c{i}); }} .k{i} {{ background: var(--c{i}); }}\n"
        for i in range(NUM_COLOURS)
    )
    return (
        f":root {{ color-scheme: light dark; {LIGHT} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}\n{RULES}{colours}"
        f"@media print {{ :root {{ color-scheme: light; {LIGHT} }}{PAPER}}}\n"
    )
