"""The report of a study: its sentences follow from the numbers, its words cannot become markup."""

import re

import pytest
from rendered_pages import HOSTILE, elements_of
from study_findings import CONTROL, PLAIN, REPAIR, make_comparison, make_evaluation, make_findings

from stepflow_tl.rendering.document import Table
from stepflow_tl.rendering.study_conclusions import Contrast, contrast_in_words, in_short, repair_in_words
from stepflow_tl.rendering.study_report import study_blocks, write_study_report


def never(question):
    return False


def some(question):
    return question % 4 == 0


def most(question):
    return question % 4 != 1


def words(n, right):
    return " ".join(repair_in_words(make_evaluation(n, right), REPAIR))


def test_a_repair_that_changes_nothing_is_said_not_to_help():
    assert words(20, {PLAIN: some, REPAIR: some}) == (
        "StepFlow does not help here: it changes the score of none of 20 questions (25.0 % right without, "
        "25.0 % with it)."
    )


def test_a_repair_that_gains_by_chance_is_said_not_to_help():
    found = words(20, {PLAIN: some, REPAIR: lambda i: some(i) or i == 1})
    assert found.startswith("That StepFlow helps is not shown by these 20 questions: +5.0 points [")
    assert "gained 1, lost 0 of 20 questions, p 1.0000" in found and "A gain of more than" in found


def test_a_repair_that_helps_and_one_that_harms():
    assert words(40, {PLAIN: some, REPAIR: most}).startswith("StepFlow helps: +50.0 points [")
    harm = words(40, {PLAIN: most, REPAIR: some})
    assert harm.startswith("StepFlow does not help here, it does harm: -50.0 points [")
    assert "A gain" not in harm


def test_the_control_decides_whether_the_place_matters():
    rules = {PLAIN: some, REPAIR: most}
    same = words(40, {**rules, CONTROL: most})
    assert "in a random place, has the same score on all 40 questions" in same
    close = words(40, {**rules, CONTROL: lambda i: most(i) and i != 3})
    assert "nothing here says that the place of the intervention matters" in close
    worse = words(40, {**rules, CONTROL: some})
    assert "It gets more right than its control" in worse
    better = words(40, {PLAIN: some, REPAIR: some, CONTROL: most})
    assert "It gets fewer right than its control" in better


@pytest.mark.parametrize(
    ("lock_in", "expected"),
    [
        (0.6, "All traces: lower in right answers, as the paper predicts (-0."),
        (-0.6, "All traces: higher in right answers, against what the paper predicts (+0."),
        (0.0, "All traces: no difference beyond chance ("),
    ],
)
def test_a_difference_is_held_against_the_papers_prediction(lock_in, expected):
    contrast = Contrast("all traces", make_comparison(lock_in=lock_in))
    assert contrast_in_words(contrast, "lock_in", "shallow", -1).startswith(expected)


def test_what_cannot_be_compared_says_why():
    findings = make_findings(
        make_evaluation(8, {PLAIN: some, REPAIR: some}),
        contrasts=(Contrast("all traces", None, ("1 right trace",)),),
        repaired=Contrast("with and without", None, ("no map",)),
    )
    short = list(in_short(findings))
    assert "All traces: 1 right trace." in short[1]
    assert short[-1] == "The maps under StepFlow cannot be compared: no map."
    assert study_blocks(findings)  # and the rest of the report stands without them


@pytest.fixture
def written(tmp_path):
    evaluation = make_evaluation(
        2 * len(HOSTILE), {PLAIN: never, REPAIR: lambda i: i % 2 == 0, CONTROL: some}, texts=HOSTILE
    )
    markdown, page = write_study_report(make_findings(evaluation, texts=HOSTILE), tmp_path)
    return markdown.read_text(), page.read_text(), tmp_path


def test_both_forms_state_the_same_numbers(written):
    markdown, page, _ = written
    bare = re.sub(r"\\(.)", r"\1", markdown)
    for said in (
        "StepFlow helps: +50.0 points",
        "as the paper predicts",
        "figures",
        "Right answers by difficulty",
    ):
        assert said in bare
    assert "StepFlow helps: +50.0 points" in page and "as the paper predicts" in page
    numbers = re.findall(r"-?\d\.\d{4}", bare)
    assert len(numbers) > 100 and set(numbers) <= set(re.findall(r"-?\d\.\d{4}", page))


def test_the_page_asks_for_nothing_and_no_text_becomes_markup(written):
    _, page, _ = written
    found = elements_of(page)
    tags = {tag for tag, _ in found}
    assert {"table", "svg", "pre", "a"} <= tags and not {"script", "img", "iframe", "link", "textarea"} & tags
    for tag, attributes in found:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src")], tag
        if tag == "a":
            assert attributes["href"].startswith("pages/")
    assert "default-src 'none'" in page and "\x1b" not in page and "\u202e" not in page


def test_markdown_holds_hostile_text_in_fences(written):
    markdown, _, folder = written
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "window.harmed" in markdown and "window.harmed" not in re.sub(r"`[^`]*`", "", outside)
    images = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", markdown)
    assert len(images) == 8 and all((folder / name).read_text().startswith("<svg") for name in images)


def test_each_changed_question_shows_both_answers_and_their_pages(written):
    _, page, _ = written
    assert page.count("Gained: q") == len(HOSTILE)
    assert "pages/q20-StepFlow.html" in page and "plain, wrong: another number" in page


def test_differences_are_paired_within_each_difficulty():
    evaluation = make_evaluation(16, {PLAIN: some, REPAIR: lambda i: i % 2 == 0})
    blocks = study_blocks(make_findings(evaluation))
    (table,) = [each for each in blocks if isinstance(each, Table) and each.header[0] == "difficulty"]
    even, odd = table.rows
    assert even[:5] == ("even", "8", "0.500", "1.000", "+0.500") and even[6:8] == ("4", "0")
    assert odd[4:] == ("+0.000", "no answer differs", "0", "0", "-")


def test_equal_findings_give_equal_files(written, tmp_path):
    _, page, folder = written
    evaluation = make_evaluation(
        2 * len(HOSTILE), {PLAIN: never, REPAIR: lambda i: i % 2 == 0, CONTROL: some}, texts=HOSTILE
    )
    again = tmp_path / "again"
    again.mkdir()
    write_study_report(make_findings(evaluation, texts=HOSTILE), again)
    names = ["report.md", "report.html", *(f"figures/{path.name}" for path in (folder / "figures").iterdir())]
    assert len(names) == 10
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_narrow_and_wide_without_asking_for_anything(written, open_page, width, dark):
    page = open_page(written[2] / "report.html", width=width, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(22, 24, 28)" if dark else "rgb(255, 255, 255)")
    beside = page.evaluate(
        "(() => { const [a, b] = document.querySelectorAll('.beside:has(section + section) section');"
        " return a.getBoundingClientRect().top === b.getBoundingClientRect().top; })()"
    )
    assert beside == (width > 1000)
