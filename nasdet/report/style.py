"""The look of the page: light, dark and print, from a phone to a desk; no file but the page itself."""

from __future__ import annotations

_LIGHT = """
--ground:#fbfbf9;--card:#fff;--ink:#1b1d21;--muted:#62666f;--line:#e1e2e0;--accent:#1f5fbf;
--c0:#1f5fbf;--c1:#c2570c;--c2:#1d7f52;--c3:#8541b8;--c4:#be2f4a;--c5:#8b8f98;--c6:#0d7d8c;--c7:#86690c;--c8:#b03a9d;
--std:#1f5fbf;--sep:#c2570c;--other:#1d7f52;--none:#8b8f98;
--std-rgb:31 95 191;--sep-rgb:216 110 24;--other-rgb:29 127 82;--none-rgb:120 124 132;
--good:#1d7f52;--bad:#be2f4a;
"""
_DARK = """
--ground:#131519;--card:#1b1e24;--ink:#e8e9ec;--muted:#a0a5b0;--line:#32363f;--accent:#82b1ff;
--c0:#82b1ff;--c1:#f6a55c;--c2:#63c999;--c3:#c795ef;--c4:#f58397;--c5:#7d828d;--c6:#5cc8d8;--c7:#d9bb55;--c8:#f293dd;
--std:#82b1ff;--sep:#f6a55c;--other:#63c999;--none:#8d929d;
--std-rgb:90 150 255;--sep-rgb:240 145 60;--other-rgb:80 190 140;--none-rgb:150 155 165;
--good:#63c999;--bad:#f58397;
"""

CSS = (
    f":root{{color-scheme:light;{_LIGHT}}}"
    f"@media(prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{_DARK}}}}}"
    f":root[data-theme=dark]{{color-scheme:dark;{_DARK}}}"
    f"@media print{{:root,:root[data-theme=dark],:root:not([data-theme=light]){{color-scheme:light;{_LIGHT}}}}}"
    + """
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{
  margin:0;background:var(--ground);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
}
main,header,nav>div,footer{max-width:1120px;margin:0 auto;padding:0 clamp(14px,3vw,32px)}
header{padding-top:36px}
h1{font-size:clamp(1.6rem,4.4vw,2.4rem);line-height:1.15;letter-spacing:-.02em;margin:.1em 0 .25em}
h2{font-size:1.5rem;letter-spacing:-.01em;margin:0 0 .5em;line-height:1.2}
h3{font-size:1.12rem;margin:1.9em 0 .6em}
h2 code,h3 code{font-size:.7em;color:var(--muted);font-weight:400;margin-left:.4em}
.kicker{color:var(--muted);margin:0;font-size:.95rem}
.kicker b{color:var(--ink)}
section{padding-top:14px;margin-top:38px;border-top:1px solid var(--line);scroll-margin-top:52px}
section section,h3+*{margin-top:0}
code,pre{font-family:ui-monospace,"SF Mono","Cascadia Mono","DejaVu Sans Mono",monospace;font-size:.87em}
pre{
  background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;overflow-x:auto;
  white-space:pre-wrap;overflow-wrap:anywhere;margin:.6em 0;
}
nav{position:sticky;top:0;z-index:2;background:var(--ground);border-bottom:1px solid var(--line);margin-top:22px}
nav>div{
  display:flex;gap:20px;overflow-x:auto;padding-top:10px;padding-bottom:10px;font-size:.92rem;align-items:center;
}
nav a{color:var(--muted);text-decoration:none;white-space:nowrap}
nav a:hover,nav a:focus-visible{color:var(--accent);text-decoration:underline}
nav button{
  margin-left:auto;flex:none;font:inherit;color:var(--muted);background:none;border:1px solid var(--line);
  border-radius:99px;padding:2px 12px;cursor:pointer;
}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.chip{
  display:inline-block;border:1px solid currentColor;border-radius:99px;padding:0 10px;font-size:.82rem;
  font-weight:600;vertical-align:2px;letter-spacing:0;
}
.chip.good{color:var(--good)}
.chip.bad{color:var(--bad)}
.chip.plain{color:var(--muted)}
.facts{display:flex;flex-wrap:wrap;gap:12px 40px;margin:20px 0 14px}
.facts>div{max-width:52ch}
.facts dt,.tiles dt{color:var(--muted);font-size:.8rem}
.facts dd{margin:0;overflow-wrap:anywhere}
.tiles{display:flex;flex-wrap:wrap;gap:10px;margin:.4em 0 1em}
.tiles>div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:8px 16px;min-width:88px}
.tiles dd{margin:0;font-size:1.25rem;font-weight:650;font-variant-numeric:tabular-nums}
details{margin:.6em 0}
summary{cursor:pointer;color:var(--muted)}
.note,figcaption,caption{color:var(--muted);font-size:.9rem}
.note{max-width:78ch}
figcaption b,caption b{color:var(--ink)}
.verdict{max-width:78ch}
.warn{border-left:3px solid var(--bad);padding-left:12px;max-width:78ch}
li{max-width:78ch;margin:.25em 0}
.scroll{overflow-x:auto;margin:.5em 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
caption{caption-side:bottom;text-align:left;padding-top:8px}
th,td{padding:8px 12px;text-align:right;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:2px;white-space:normal}
thead th{color:var(--muted);font-weight:500;font-size:.85rem}
tbody th{font-weight:550}
small{color:var(--muted)}
.result td:nth-child(2){font-size:1.15rem}
.bar{
  display:block;height:5px;border-radius:3px;background:var(--line);margin-top:5px;min-width:70px;
  overflow:hidden;
}
.bar i{display:block;height:100%;border-radius:3px}
figure{
  margin:0;background:var(--card);border:1px solid var(--line);border-radius:14px;padding:14px 16px;
  break-inside:avoid;min-width:0;
}
figcaption{margin-bottom:8px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:18px;margin:.4em 0 18px}
.grid.n3{grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr))}
.grid.n1{max-width:700px}
svg{display:block;width:100%;height:auto}
svg.chart{max-width:620px;margin:0 auto;overflow:visible}
.n3 svg.chart text{font-size:12px!important}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:0 0 6px;padding:0;font-size:.88rem}
.legend li{margin:0}
.legend i{display:inline-block;width:18px;height:4px;border-radius:2px;margin-right:6px;vertical-align:3px}
.cell{max-width:380px;margin:0 auto}
.cell text{font-size:13px;fill:var(--ink)}
.cell .mid{text-anchor:middle}
.cell .strong{font-weight:650}
.cell text.small{font-size:11px;fill:var(--muted)}
.cell .rail{stroke:var(--c5);stroke-width:1.5;fill:none;opacity:.55}
.cell .box{fill:var(--ground);stroke:var(--c5);stroke-width:1.2}
.cell .node{fill:var(--ink)}
.cell circle+text{fill:var(--card);font-weight:700}
.edge path{fill:none}
.edge rect{fill:var(--card)}
.edge path,.edge rect{stroke:var(--tone)}
.edge rect{stroke-width:1.4}
.cell .edge text.strong,.cell .edge .tap{fill:var(--tone)}
.edge.std,.panel.std,span.std{--tone:var(--std)}
.edge.sep,.panel.sep,span.sep{--tone:var(--sep)}
.edge.other,.panel.other,span.other{--tone:var(--other)}
.edge.none,.panel.none,span.none{--tone:var(--none)}
th span.std,th span.sep,th span.other,th span.none,p span.std,p span.sep,p span.other,p span.none{
  color:var(--tone);font-weight:600;
}
.heatmap{width:auto;min-width:min(100%,470px);margin:0 auto}
.heatmap th,.heatmap td{padding:2px;border:0;text-align:center;font-size:.86rem;vertical-align:middle}
.heatmap tbody th{text-align:left;padding-right:8px;white-space:nowrap}
.heat{
  display:block;min-width:34px;padding:4px 2px;border-radius:6px;background:rgb(var(--rgb)/var(--p));
  border:2px solid transparent;
}
.heat.std{--rgb:var(--std-rgb)}
.heat.sep{--rgb:var(--sep-rgb)}
.heat.other{--rgb:var(--other-rgb)}
.heat.none{--rgb:var(--none-rgb)}
.heat.kept{border-color:var(--ink);font-weight:700}
.out{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden;white-space:nowrap}
.panels{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:14px 18px}
.panel p{margin:0 0 3px;font-size:.84rem;line-height:1.35;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.panel svg{height:64px;border-bottom:1px solid var(--line)}
.panel path{fill:none;stroke:var(--c5);stroke-width:1;opacity:.42;vector-effect:non-scaling-stroke}
.panel .best{stroke:var(--tone);stroke-width:2.2;opacity:1}
.panel .even{stroke-dasharray:2 3;opacity:.9}
.ways{grid-template-columns:repeat(auto-fill,minmax(148px,1fr))}
.ways path{stroke:none;opacity:1}
.intensities{max-width:720px}
.intensities text{font-size:12px;fill:var(--ink)}
.intensities .layer{text-anchor:end;font-size:11.5px}
.intensities .share{text-anchor:middle;fill:var(--card);font-weight:600;font-size:11px}
.strides{max-width:860px}
.strides text{font-size:12px;fill:var(--ink)}
.strides .end{text-anchor:end}
.strides .mid{text-anchor:middle;font-size:11px;fill:var(--c5)}
.strides .rail{stroke:var(--line);stroke-width:1;fill:none}
.strides .way{stroke:var(--c0);stroke-width:2.5;fill:none;stroke-linejoin:round}
.strides .lateral{stroke:var(--c1);stroke-width:2;fill:none}
.strides .reads{stroke:var(--c2);stroke-width:1.6;stroke-dasharray:4 3;fill:none}
.strides .heads{fill:var(--c2);font-weight:600}
.strides .block{fill:var(--card);stroke:var(--c0);stroke-width:2}
.strides .block.read{fill:var(--c2);stroke:var(--c2)}
.scatter{max-width:620px;margin:0 auto}
.scatter text{font-size:11px;fill:var(--muted)}
.scatter .mid{text-anchor:middle}
.scatter .end{text-anchor:end}
.scatter .rule{stroke:var(--line);stroke-width:.8}
.scatter .front,.scatter .line{fill:none;stroke-width:1.8}
.scatter .front{stroke:var(--c1)}
.scatter .best{stroke:var(--ink);stroke-width:1.6}
.wide{margin:.4em 0 18px}
.tag{
  font-size:.72rem;margin-left:4px;border:1px solid var(--line);border-radius:99px;padding:0 6px;
  color:var(--muted);
}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:18px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:8px}
.pair>div{min-width:0}
img{display:block;width:100%;height:auto;border-radius:8px}
.which{font-size:.78rem;color:var(--muted)}
.categories{list-style:none;padding:0;margin:.4em 0;columns:3 240px;column-gap:36px}
.categories li{
  display:grid;grid-template-columns:minmax(3.5em,auto) minmax(60px,150px) 3.4em;justify-content:space-between;
  gap:10px;align-items:center;margin:0;padding:3px 0;break-inside:avoid;
}
.categories span:first-child{overflow-wrap:anywhere}
.categories .bar{margin:0}
.categories b{text-align:right;font-weight:600;font-variant-numeric:tabular-nums}
footer{padding-top:26px;padding-bottom:44px;color:var(--muted);font-size:.86rem}
@media(max-width:520px){
  .panels{grid-template-columns:1fr 1fr}
  .pair{grid-template-columns:1fr}
  figure{padding:12px 10px}
  th,td{padding:7px 7px}
  .bar{min-width:34px}
  .result th,.result td{font-size:.82rem;padding:6px 4px}
  .result td:nth-child(2){font-size:.95rem}
  .chart text{font-size:12px!important}
  .heatmap th,.heatmap td{padding:1px;font-size:.74rem}
  .heat{min-width:25px;padding:3px 0;border-radius:4px}
  .heatmap tbody th{padding-right:4px}
}
@media print{
  body{background:#fff}
  .heatmap{min-width:0}.heatmap th,.heatmap td{padding:0;font-size:.68rem}
  .heat{min-width:20px;padding:2px 0;border-width:1px}
  .heatmap thead th{font-size:.55rem;letter-spacing:-.04em}.panel p{white-space:normal}
  nav{display:none}
  body{font-size:10.5pt}
  *{print-color-adjust:exact;-webkit-print-color-adjust:exact}
  section{break-inside:auto;margin-top:20px}
  h2,h3{break-after:avoid}
  tr,figure,.panel{break-inside:avoid}
  .scroll{overflow:visible}
  details>*{display:block}
  .pictures{grid-template-columns:1fr 1fr}
  .grid{grid-template-columns:1fr 1fr}
}
@media(prefers-reduced-motion:reduce){
  html{scroll-behavior:auto}
}
"""
)

# Three states would need words; two are what a reader wants: the other one of what is shown.
SCRIPT = """
document.getElementById('theme').addEventListener('click', function () {
  var root = document.documentElement, dark = matchMedia('(prefers-color-scheme:dark)').matches;
  root.dataset.theme = (root.dataset.theme || (dark ? 'dark' : 'light')) === 'dark' ? 'light' : 'dark';
});
addEventListener('beforeprint', function () {
  document.querySelectorAll('details').forEach(function (part) { part.open = true; });
});
"""
