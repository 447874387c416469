"""Proof chains: every step follows from exactly what its edges say."""

import pytest
from chains import CONCEPTS, make_proofs

PROOFS = [proof for n in (2, 8, 14) for proof in make_proofs(10, seed=3, n_steps=n)]


def follows(rules, known):
    """What one application of a rule adds to what is known."""
    return {rule.conclusion for rule in rules if rule.antecedents and set(rule.antecedents) <= known}


def written_before(proof, i):
    """Conclusions by where they stand: ("line", p) for rules and facts, ("step", j) for earlier steps."""
    places = {("line", p): rule for p, rule in enumerate(proof.lines)}
    return places | {("step", j): rule for j, rule in enumerate(proof.steps[:i])}


def needed(proof, i):
    lines = {("line", p) for query, p in proof.line_edges if query == i}
    return lines | {("step", j) for query, j in proof.step_edges if query == i}


def can_conclude(places, step):
    rules = [rule for (kind, _), rule in places.items() if kind == "line"]
    known = {rule.conclusion for (kind, _), rule in places.items() if kind == "step" or not rule.antecedents}
    return step.conclusion in follows(rules, known)


@pytest.mark.parametrize("proof", PROOFS)
def test_a_step_follows_from_what_it_needs_and_not_without_any_of_it(proof):
    for i, step in enumerate(proof.steps):
        places, own = written_before(proof, i), needed(proof, i)
        assert len(own) == 1 + len(step.antecedents)  # its rule, and a place for each antecedent
        assert can_conclude({place: places[place] for place in own}, step)
        for place in own:
            assert not can_conclude({p: rule for p, rule in places.items() if p != place}, step)


def test_nothing_contradicts_and_the_branches_are_there():
    for proof in PROOFS:
        known = {rule.conclusion for rule in proof.lines if not rule.antecedents}
        while added := follows(proof.lines, known) - known:
            known |= added
        applied = [rule for rule in proof.lines if rule in proof.steps]
        idle = [rule for rule in proof.lines if rule.antecedents and rule not in proof.steps]
        assert len(applied) == len(proof.steps) == len({step.conclusion for step in proof.steps})
        applies = [set(rule.antecedents) <= known for rule in idle]
        assert applies.count(True) == applies.count(False) == 3
        dead = {rule.conclusion for rule, live in zip(idle, applies, strict=True) if not live}
        assert dead <= {step.conclusion for step in proof.steps}


def test_sources_are_far_and_several():
    edges = [edge for proof in PROOFS[-10:] for edge in proof.step_edges]
    distances = [i - j for i, j in edges]
    assert sum(d == 1 for d in distances) < len(distances) / 2 and max(distances) > 6
    several = [len(step.antecedents) == 2 for proof in PROOFS for step in proof.steps]
    assert 0.4 < sum(several) / len(several) < 0.8


def test_the_text_is_the_proof():
    proof = make_proofs(1, seed=0, n_steps=3)[0]
    assert proof.question.count("\n") == len(proof.lines) and proof.question.endswith("?")
    step = proof.steps[-1]
    first, second = step.antecedents
    who = proof.individual
    assert proof.thinking.split("\n\n")[-1] == (
        f"{who} is a {first} and a {second}, so {who} is a {step.conclusion}."
    )
    assert f"Everything that is a {first} and a {second} is a {step.conclusion}." in proof.question.split(
        "\n"
    )
    assert proof.answer == f"Yes, {who} is a {step.conclusion}."


def test_the_same_seed_gives_the_same_proofs():
    assert make_proofs(3, seed=1) == make_proofs(3, seed=1) != make_proofs(3, seed=2)
    assert len(set(CONCEPTS)) == len(CONCEPTS) == 75


@pytest.mark.parametrize("options", [{"n_steps": 1}, {"n_facts": 1}, {"n_steps": 80}])
def test_sizes_that_make_no_proof_are_refused(options):
    with pytest.raises(ValueError, match="expected at least 2, 2 and 0"):
        make_proofs(1, seed=0, **options)
