"""Testbed problems: what they say, what needs what, and that they are what their knobs ask for."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflow_tl.errors import ProblemError
from stepflow_tl.testbed import ProblemSpec, make_problems

SPECS = st.fixed_dictionaries(
    {
        "n_steps": st.integers(1, 26),
        "n_distractors": st.integers(0, 8),
        "number_share": st.floats(0, 1),
        "min_distance": st.integers(1, 4),
        "modulus": st.integers(2, 10),
        "shuffled": st.booleans(),
    }
)


def work_out(question: str, modulus: int) -> dict[str, int]:
    """Values of all names, by substitution until nothing is left: no order, no code of the package."""
    lines = [line.split(" = ") for line in question.splitlines()[:-1]]
    open_lines, values = dict(lines), {}
    while open_lines:
        for name, right in list(open_lines.items()):
            parts = right.split(" ")
            if all(part in "+-" or part.isdigit() or part in values for part in parts):
                numbers = [values.get(part, part) for part in parts[::2]]
                total = int(numbers[0])
                if len(parts) == 3:
                    total += int(numbers[1]) * (1 if parts[1] == "+" else -1)
                values[name] = total % modulus
                del open_lines[name]
    return values


@settings(max_examples=300, deadline=None)
@given(knobs=SPECS, seed=st.integers(0, 10_000))
def test_the_thinking_is_what_the_question_asks_for(knobs, seed):
    spec = ProblemSpec(**knobs)
    (problem,) = make_problems(spec, 1, seed=seed)
    values = work_out(problem.question, spec.modulus)
    names = [derivation.name for derivation in problem.derivations]
    assert names == sorted(names) and len(names) == spec.n_steps
    assert len(values) == spec.n_steps + spec.n_distractors
    for derivation in problem.derivations:
        assert derivation.value == values[derivation.name] < spec.modulus
        operands = (derivation.left, derivation.right)
        stated = (derivation.left_value, derivation.right_value)
        assert stated == tuple(values[o] if o in values else int(o) for o in operands)
    assert problem.question.splitlines()[-1] == f"find {names[-1]}"
    assert problem.answer == str(values[names[-1]])
    assert problem.thinking.split("\n\n") == [derivation.text for derivation in problem.derivations]


@settings(max_examples=300, deadline=None)
@given(knobs=SPECS, seed=st.integers(0, 10_000))
def test_edges_are_the_names_that_a_step_mentions(knobs, seed):
    (problem,) = make_problems(ProblemSpec(**knobs), 1, seed=seed)
    texts = [derivation.text for derivation in problem.derivations]
    lines = problem.question.splitlines()[:-1]
    steps, premises = set(), set()
    for i, text in enumerate(texts):
        mentioned = set(text.split(" = ")[1].split(": ")[0].split(" ")) - {"+", "-"}
        steps |= {(i, j) for j, other in enumerate(texts) if other[0] in mentioned}
        premises |= {(i, p) for p, line in enumerate(lines) if line[0] == text[0]}
    assert problem.step_edges == steps and all(j < i for i, j in steps)
    assert problem.premise_edges == premises


@settings(max_examples=100, deadline=None)
@given(low=st.integers(1, 5), more=st.integers(0, 5), seed=st.integers(0, 1000))
def test_the_first_operand_stands_at_the_distance_asked_for(low, more, seed):
    spec = ProblemSpec(n_steps=20, min_distance=low, max_distance=low + more)
    (problem,) = make_problems(spec, 1, seed=seed)
    order = {derivation.name: i for i, derivation in enumerate(problem.derivations)}
    for i, derivation in enumerate(problem.derivations[1:], start=1):
        assert min(low, i) <= i - order[derivation.left] <= low + more


@settings(max_examples=100, deadline=None)
@given(knobs=SPECS, n_asked=st.integers(1, 2), seed=st.integers(0, 1000))
def test_long_steps_and_a_second_variable_change_the_form_of_the_same_problem(knobs, n_asked, seed):
    knobs["n_steps"] = max(n_asked, knobs["n_steps"])
    (short,) = make_problems(ProblemSpec(**knobs), 1, seed=seed)
    (long,) = make_problems(ProblemSpec(**knobs, n_asked=n_asked, long_steps=True), 1, seed=seed)
    assert (long.premises, long.derivations) == (short.premises, short.derivations)
    values = work_out(long.question, long.spec.modulus)
    for paragraph, derivation in zip(long.thinking.split("\n\n"), long.derivations, strict=True):
        definition, *stated, result = paragraph.split("\n")
        assert f"{definition}: {result}" == derivation.text
        names = [name for name in (derivation.left, derivation.right) if name in values]
        assert stated == [f"{name} = {values[name]}" for name in names]
    asked = long.question.splitlines()[-1].removeprefix("find ").split(" + ")
    assert asked[0] == long.derivations[-1].name and len(asked) == n_asked
    if n_asked == 1:
        assert long.answer == short.answer
    else:
        assert asked[1] in [derivation.name for derivation in long.derivations[: knobs["n_steps"] // 2]]
        x, y = (values[name] for name in asked)
        assert long.answer == f"{x} + {y} = {(x + y) % long.spec.modulus}"


def test_number_share_decides_about_the_second_operand():
    def part_of_numbers(share):
        problems = make_problems(ProblemSpec(n_steps=20, number_share=share), 100, seed=0)
        later = [d for problem in problems for d in problem.derivations[2:]]
        return sum(d.right.isdigit() for d in later) / len(later)

    assert part_of_numbers(0.0) == 0 and part_of_numbers(1.0) == 1
    assert abs(part_of_numbers(0.3) - 0.3) < 0.05


def test_distractors_are_defined_like_variables_and_needed_by_nothing():
    for problem in make_problems(ProblemSpec(n_steps=4, n_distractors=3), 20, seed=0):
        extra = [p for p, premise in enumerate(problem.premises) if premise.name.isupper()]
        assert len(extra) == 3 and not {p for _, p in problem.premise_edges} & set(extra)
        for p in extra:
            name, body = problem.premises[p].text.split(" = ")
            left, sign, right = body.split(" ")
            assert left in "abcd" and sign in "+-" and right in "abcd0123456789"
            assert name not in problem.thinking


def test_the_same_seed_gives_the_same_problems_and_another_seed_others():
    spec = ProblemSpec()
    assert make_problems(spec, 20, seed=3) == make_problems(spec, 20, seed=3)
    assert make_problems(spec, 20, seed=3)[:5] == make_problems(spec, 5, seed=3)
    assert not set(p.question for p in make_problems(spec, 500, seed=3)) & set(
        p.question for p in make_problems(spec, 500, seed=4)
    )


def test_premises_in_order_and_shuffled_are_the_same_lines():
    (problem,) = make_problems(ProblemSpec(n_distractors=2, shuffled=False), 1, seed=0)
    names = [premise.name for premise in problem.premises]
    assert names[:8] == list("abcdefgh") and all(name.isupper() for name in names[8:])
    (shuffled,) = make_problems(ProblemSpec(), 1, seed=0)
    assert [p.name for p in shuffled.premises] != sorted(p.name for p in shuffled.premises)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"n_steps": 0}, "n_steps=0: expected 1 to 26"),
        ({"n_steps": 27}, "n_steps=27: expected 1 to 26"),
        ({"n_distractors": -1}, "n_distractors=-1: expected 0 to 26"),
        ({"n_distractors": 27}, "n_distractors=27: expected 0 to 26"),
        ({"number_share": 1.5}, "number_share=1.5: expected 0 to 1"),
        ({"min_distance": 0}, "min_distance=0"),
        ({"min_distance": 3, "max_distance": 2}, "max_distance=2 is below min_distance=3"),
        ({"n_asked": 3}, "n_asked=3: expected 1, or 2 with n_steps of at least 2"),
        ({"n_asked": 2, "n_steps": 1}, "n_asked=2: expected 1, or 2"),
        ({"modulus": 11}, "modulus=11: expected 2 to 10"),
    ],
)
def test_what_cannot_be_is_refused(knobs, message):
    with pytest.raises(ProblemError, match=message.replace("(", r"\(")):
        ProblemSpec(**knobs)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ProblemSpec().n_steps = 3
