"""The version that the package, the citation and the changelog name is one."""

import re
from pathlib import Path

from stepflow_tl.version import __version__

ROOT = Path(__file__).resolve().parents[2]


def test_the_citation_has_the_version_of_the_package():
    assert re.findall(r"(?m)^version: (.*)$", (ROOT / "CITATION.cff").read_text("utf-8")) == [__version__]


def test_the_changelog_begins_with_this_version_or_the_next():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    version, date = re.findall(r"(?m)^## \[([\d.]+)\] - (unreleased|\d{4}-\d\d-\d\d)$", text)[0]
    numbers, own = ([int(part) for part in each.split(".")] for each in (version, __version__))
    assert numbers > own if date == "unreleased" else numbers == own
