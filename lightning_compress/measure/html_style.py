"""The style sheet of the HTML page: light and dark, from a telephone to a desk, and on paper."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c232b; --faint: #5a6673; --paper: #ffffff; --card: #f3f5f8;
  --line: #d5dbe2; --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf0; --faint: #a6b1bd; --paper: #14181d; --card: #1f252c;
  --line: #3a434d; --link: #8ab8f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p, li, dd, figcaption { overflow-wrap: anywhere; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; list-style: none; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem; padding: 0;
  list-style: none; }
.tiles li { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.15rem; }
.faint, figcaption, .tiles span { color: var(--faint); font-size: .875rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
.tall { max-height: 34rem; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9375rem; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; font-weight: 500; position: sticky; left: 0; background: var(--paper); }
.long { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; }
thead th, thead th:first-child { background: var(--card); position: sticky; top: 0; white-space: normal; }
thead th { min-width: 4.5rem; }
.charts .long { min-width: 8rem; }
.short, thead .short { white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem;
  align-items: start; }
figure { margin: 1rem 0; max-width: 30rem; }
figure svg { display: block; width: 100%; height: auto; }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .5rem 0; font-size: .875rem; }
.key span::before { content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  background: #8a9bb0; }
.key span + span::before { background: #d9622b; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem; padding: 0;
  list-style: none; }
.cards li { background: var(--card); border-radius: .5rem; padding: .6rem; font-size: .875rem;
  overflow-wrap: anywhere; }
img { display: block; width: 100%; max-width: 9rem; height: auto; image-rendering: pixelated; border-radius: .25rem; }
.example { margin: 1.25rem 0; }
.beside { display: grid; grid-template-columns: repeat(3, minmax(0, 9rem)); gap: .5rem; }
.beside figure { margin: 0; }
.beside img { border: 1px solid var(--line); }
.strip { display: flex; flex-wrap: wrap; gap: 2px; margin: .25rem 0 .5rem; }
.strip span { padding: .1rem .3rem; border-radius: .2rem; color: #111111; font-size: .875rem; overflow-wrap: anywhere; }
dt { font-weight: 600; }
dd { margin: 0 0 .5rem 1rem; }
@media (max-width: 36rem) { th, td { padding: .3rem .35rem; } table { font-size: .8125rem; }
  td, tbody th { white-space: normal; } td.short { white-space: nowrap; } thead th { min-width: 3.5rem; }
  .long { min-width: 7rem; } }
@media print { .tall { max-height: none; overflow: visible; } }
"""
