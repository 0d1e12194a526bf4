"""A page that is one file: its text, its style, its pictures."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple
from urllib.parse import quote

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2430; --soft: #5b6676; --rule: #d9dee6; --card: #f6f8fa;
  --c0: #2571cd; --c1: #d1480c; --c2: #12805c; --c3: #8e44ad; --c4: #a87900; --c5: #c2185b; --c6: #00838f;
  --c7: #6d4c41; --grey: #a9b2bf; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161c; --ink: #e4e9f0; --soft: #9aa7b8; --rule: #303946;
  --card: #1b212a; --c0: #6cabf7; --c1: #ff8a5c; --c2: #4fc99a; --c3: #cf8fec; --c4: #e3b341; --c5: #ff7bab;
  --c6: #4dd0e1; --c7: #c3a195; --grey: #566272; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.75rem, 3vw, 2rem) 4rem; max-width: 1400px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 0 0 .6rem; }
section { border-top: 1px solid var(--rule); padding-top: 1rem; margin-top: 1.6rem; }
p { max-width: 75ch; margin: .4rem 0; } .soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
a { color: var(--c0); } nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.2rem; }
figure { margin: 0 0 1rem; min-width: 0; } figcaption { margin-bottom: .3rem; }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--soft); }
.rule { stroke: var(--rule); fill: none; } .axis { stroke: var(--soft); fill: none; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; } .faint { opacity: .35;
  stroke-width: 1; } svg .other { stroke-dasharray: 5 4; } circle { fill: currentColor; }
.spots { stroke: currentColor; stroke-width: 5; stroke-linecap: round; fill: none; opacity: .75; }
svg .spots.other { stroke-dasharray: none; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
.others { color: var(--grey); } svg .spots.others { opacity: .45; }
.keys { list-style: none; display: flex; flex-wrap: wrap; gap: 0 .9rem; margin: .2rem 0 0; padding: 0;
  font-size: .85rem; } .keys i { display: inline-block; width: 1rem; height: .25rem; margin-right: .35rem;
  background: currentColor; vertical-align: middle; } .keys i.other { height: 0; background: none;
  border-top: 2px dashed currentColor; }
.scrolls { overflow-x: auto; max-width: 100%; margin: 0 0 1rem; } table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; padding-bottom: .3rem; } th, td { padding: .25rem .7rem .25rem 0; text-align: left;
  border-bottom: 1px solid var(--rule); vertical-align: bottom; overflow-wrap: normal; } .number { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; } th.number { white-space: normal; }
.beside { color: var(--soft); font-style: italic; } td:first-child { overflow-wrap: anywhere; min-width: 7rem; }
.bars { max-width: 46rem; } .bars > div {
  display: grid; grid-template-columns: minmax(4rem, 30%) 1fr 4rem; gap: .6rem; align-items: center;
  font-size: .85rem; line-height: 1.35; margin-bottom: .15rem; } .bar { background: var(--card); height: .9rem; }
.bar i { display: block; height: 100%; background: var(--c0); min-width: 1px; } .value { text-align: right;
  font-variant-numeric: tabular-nums; }
.confusion { font-size: .75rem; } .confusion th, .confusion td { padding: .15rem .25rem; border: 0; }
.confusion thead span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9rem; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; } .confusion tbody th { font-weight: normal; text-align: right;
  min-width: 5rem; max-width: 12rem; } .confusion tbody td { text-align: center; min-width: 1.6rem;
  background: color-mix(in srgb, var(--c0) calc(var(--part) * 100%), var(--card)); } td.most { color: var(--paper); }
.confusion thead td { border: 0; } .confusion td:first-child { min-width: 0; }
.pixels { width: 100%; max-width: 40rem; image-rendering: pixelated; background: var(--card); display: block; }
.plot { display: block; width: 100%; min-width: 46rem; max-width: 78rem; }
.matrix { max-width: 100%; } .map { max-width: 40rem; }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 31rem), 1fr)); gap: 0 1.5rem; }
h3 { font-size: 1.05rem; margin: 1rem 0 .5rem; } .alone { max-width: 46rem; }
.rows > div { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-start; margin-bottom: .9rem; }
.rows p { flex-basis: 100%; max-width: none; margin: 0; }
.shot { width: 4.6rem; margin: 0; font-size: .72rem; line-height: 1.25; }
.shot img { width: 100%; display: block; border-radius: 3px; border: 2px solid transparent; }
.shot.asked { margin-right: .8rem; } .shot.right img { border-color: var(--c2); } .shot.wrong img {
  border-color: var(--c1); } details { margin: .6rem 0; } summary { cursor: pointer; color: var(--c0); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0; font-size: .95rem; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; }
@media print { nav { display: none; } section { break-inside: avoid; } }
"""


class Section(NamedTuple):
    title: str
    body: str
    """HTML; a section without any is left out."""


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A whole page.

    Args:
        lead: HTML that stands before the sections.
    """
    shown = [section for section in sections if section.body]
    links = "".join(f"<a href='#s{place}'>{escape(section.title)}</a>" for place, section in enumerate(shown))
    bodies = "".join(
        f"<section id='s{place}'><h2>{escape(section.title)}</h2>{section.body}</section>"
        for place, section in enumerate(shown)
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<meta name=color-scheme content='light dark'><title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{lead}<nav>{links}</nav>{bodies}</body></html>\n"
    )


def told(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>' for name, value in pairs)}</dl>"


def tables_beside(stem: str) -> str:
    """Links to the tables of the page's figures."""
    links = (
        f"<a href='{escape(quote(f'{stem}.{end}'))}'>{kind}</a>" for end, kind in (("md", "Markdown"), ("csv", "CSV"))
    )
    return f"<p class=soft>The same figures: {', '.join(links)}</p>"
