"""What the tests of HTML share: texts that try to become more than text, and ways to read a page back."""

import json
from html.parser import HTMLParser
from typing import Any

HOSTILE = [
    "</script><script>window.harmed = 1; alert(1)</script>",
    "<img src=x onerror='window.harmed = 1'>",
    "<svg/onload=window.harmed=1>",
    "<!--<script>",
    "<a href='javascript:window.harmed=1'>javascript:alert(1)</a>",
    "\u202edesrever\u202c and \u2067isolated",
    "a\x00b\x1b[31m",
    "\u2028\u2029",
    "'\"&`${window.harmed = 1} {{constructor.constructor('window.harmed=1')()}}",
    "&lt;b&gt; &amp; a<b && b>c <think>",
    "]]> </style></textarea></title> -->",
]


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any]]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def elements_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Every element of the page with its attributes, as a browser would see them."""
    parser = _Elements()
    parser.feed(text)
    parser.close()
    return parser.found


def props_of(view: Any) -> dict[str, Any]:
    """What a view hands to circuitsvis, read back from its own HTML."""
    start = view.fragment.index("const view = ") + len("const view = ")
    return json.JSONDecoder().raw_decode(view.fragment, start)[0]["props"]
