"""The style of the report: plain CSS for light and dark screens."""

CSS = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5d6675; --line: #dfe3e8;
  --paper: #ffffff; --panel: #f5f7f9;
  --dpnet: #2f7de1; --good: #1f7a4d; --bad: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #323a45;
  --paper: #14181e; --panel: #1c222a;
  --good: #57c28d; --bad: #f0837b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 1rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
.lead { font-size: 1.1rem; margin: 0 0 1.2rem; }
.note { color: var(--soft); font-size: .875rem; }
small { color: var(--soft); font-weight: normal; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; }
.tile { background: var(--panel); border-radius: 10px; padding: 14px 18px;
  border-top: 4px solid var(--line); }
.tile b { display: block; font-size: 1.8rem; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.tile b small { font-size: 1rem; }
figure { margin: 0; }
.chart { margin-bottom: 1.2rem; }
.chart svg { width: 100%; height: auto; max-width: 680px; display: block; }
.chart svg text { font-family: inherit !important; }
.charts, .tables { display: grid; gap: 28px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)); }
.chart figcaption { font-weight: 600; margin-bottom: .3rem; }
table { width: 100%; border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; align-self: start; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { text-align: right; padding: .4rem .5rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; font-size: .8rem; }
th:first-child, .left th, .left td { text-align: left; }
tbody th { font-weight: normal; white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
td small { display: block; font-size: .72rem; white-space: nowrap; }
.wide { overflow-x: auto; }
.tile .values { display: block; font-size: .78rem; }
.paired td b { font-size: .78rem; }
.better b { color: var(--good); } .worse b { color: var(--bad); }
.level b { color: var(--soft); font-weight: normal; }
.sort { display: flex; flex-wrap: wrap; gap: .6rem 1rem; } .sort[hidden] { display: none; }
.sort select { font: inherit; padding: .25rem .4rem; color: var(--ink); background: var(--panel);
  border: 1px solid var(--line); border-radius: 6px; }
.pairs { display: grid; gap: 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
.pair { background: var(--panel); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.pair header { font-weight: 600; margin-bottom: .6rem; }
.pair header small { display: block; overflow-wrap: anywhere; }
.mark { border-radius: 5px; padding: .05rem .45rem; color: #fff; background: #5d6675; }
.mark.best { background: #1f7a4d; } .mark.worst { background: #b3372f; }
.pair img { display: block; width: 100%; image-rendering: auto; }
.slider { --at: 50%; position: relative; border-radius: 6px; overflow: hidden; }
.slider .before { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.slider::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px;
  margin-left: -1px; background: #fff; box-shadow: 0 0 3px #000; pointer-events: none; }
.slider input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; touch-action: pan-y; }
.slider:focus-within { outline: 2px solid var(--dpnet); outline-offset: 2px; }
.thumbs { display: grid; gap: 10px 8px;
  grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); }
.thumbs img { border-radius: 4px; } .thumbs figcaption { font-size: .75rem; line-height: 1.3; }
.thumbs small { display: block; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .4rem 1.2rem;
  margin: 0; font-size: .93rem; }
dt { font-weight: 600; } dd { margin: 0; }
code, pre { font: .82rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
details { margin: .4rem 0; } summary { cursor: pointer; }
pre { background: var(--panel); border-radius: 8px; padding: 12px 16px; overflow-x: auto; }
@media (max-width: 560px) { .charts, .tables { grid-template-columns: minmax(0, 1fr); }
  .tile { padding: 10px 12px; } .tile b { font-size: 1.3rem; } .tile small { font-size: .8rem; }
  .tables tr > :nth-child(2) { display: none; } main { padding: 24px 14px 60px; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .6rem; } }
"""
