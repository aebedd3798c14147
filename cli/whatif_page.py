"""The page of an answer: one HTML file that holds its data, its script and the plotting library."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any


def page(answer: dict[str, Any]) -> str:
    """HTML that needs no network; `cli/whatif_page.js` draws it."""
    from plotly.offline import get_plotlyjs

    folder = files(__package__)
    style = folder.joinpath("whatif_page.css").read_text(encoding="utf-8")
    script = folder.joinpath("whatif_page.js").read_text(encoding="utf-8")
    data = json.dumps(answer, allow_nan=False).replace("</", "<\\/")  # would end the script
    question = answer["question"]
    traffic, runs = answer["traffic"], answer["runs"]
    source = traffic.get("file") or traffic.get("generator") or "traffic"
    least, most = f"{runs['min_requests']:,}", f" to {runs['max_requests']:,}"
    most = most if runs["max_requests"] > runs["min_requests"] else ""
    about = (
        f"{source} · runs of {runs['horizon_s']:g} s, but of {least}{most} requests, "
        f"the first {100 * runs['warm_share']:g} % to warm the caches · at most "
        f"{len(question['seeds'])} samples · simulated by CacheTune {answer['version']}"
    )
    whole = ", ".join(f"{k} {v}" for k, v in traffic.items())
    assumptions = "".join(f"<li>{html.escape(a)}" for a in answer["assumptions"])
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>CacheTune: what if</title>
<style>{style}</style><body>
<h1 id="sentence">{html.escape(answer["sentence"])}</h1>
<p class="aside">{html.escape(answer["aside"])}</p>
<div class="cards" id="cards"></div>
<p class="what">{html.escape(about)}</p>
<div class="filters" id="filters"></div>
<label class="target" id="target"><input type="range" id="rate"> <span id="says"></span></label>
<div class="scroll"><table id="rows"></table></div>
<div class="plots"><div class="plot" id="capacity"></div><div class="plot" id="pareto"></div>
<div class="plot" id="level"></div>
<div id="what-if"><div class="plot" id="whatif"></div><ul class="note" id="cannot"></ul></div></div>
<h2>Where the numbers come from</h2><p class="note">Traffic: {html.escape(whole)}</p>
<p class="note" id="of"></p>
<div class="scroll"><table id="memory"></table></div>
<div class="scroll"><table id="provenance"></table></div>
<h2>Assumed</h2><ul class="note">{assumptions}</ul>
<script type="application/json" id="answer">{data}</script>
<script>{get_plotlyjs()}</script><script>{script}</script></body></html>
"""
